"""Audits a model for memorised training text and for data poisoning.

The function `audit` runs all checks of an audit. Each check of an audit can also be called as a function:

    outlier_scores    how similar a row's gradient is to the most similar gradients of other rows: finds poisoned rows
                      and duplicates
    backdoor_trigger  how much a phrase raises the likelihood of a payload, compared with random control phrases
    exposure          how much likelier a secret is than random candidates of the same format
    extraction        how often greedy decoding reproduces training text verbatim, by prefix length
    membership        how well the loss separates training text from held-out text (membership inference)
    drift             how fine-tuning changed the model's predictions on a set of prompts

Every check except `drift` has a p-value: the probability of a result at least as extreme, under the null hypothesis
that the model has not memorised its training text and that the training data are not poisoned. A check of an audit
raises an alarm if its p-value is at most `alpha`, so that the expected rate of false alarms is at most `alpha`.
"""

from typing import Any

from gptjax._moved import moved_name
from gptjax.research.audit.canaries import (
    CANDIDATES,
    Exposure,
    Trigger,
    backdoor_trigger,
    exposure,
    phrases,
    random_candidates,
    read_canaries,
    secrets,
    space_bits,
)
from gptjax.research.audit.comparison import Drift, drift
from gptjax.research.audit.memorisation import MIN_DOCUMENTS, MIN_K, Extraction, Membership, auc, extraction, membership
from gptjax.research.audit.outliers import NEIGHBOURS, Tail, outlier_scores, tail
from gptjax.research.audit.results import TEXTS, Report, to_json
from gptjax.research.audit.run import CONTEXTS, CONTROLS, EXCERPT, Checkpoint, Settings, audit, checkpoints
from gptjax.research.audit.text import Scored, chunks, rows, rows_of, score, store_of

__all__ = [
    "CANDIDATES", "CONTEXTS", "CONTROLS", "EXCERPT", "MIN_DOCUMENTS", "MIN_K", "NEIGHBOURS", "TEXTS", "Checkpoint",
    "Drift", "Exposure", "Extraction", "Membership", "Report", "Scored", "Settings", "Tail", "Trigger", "auc", "audit",
    "backdoor_trigger", "checkpoints", "chunks", "drift", "exposure", "extraction", "membership", "outlier_scores",
    "phrases", "random_candidates", "read_canaries", "rows", "rows_of", "score", "secrets", "space_bits", "store_of",
    "tail", "to_json",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
