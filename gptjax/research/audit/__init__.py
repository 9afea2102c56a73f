"""What a model has kept of its training text, and whether somebody put something there: single checks, and all of them.

outlier_scores   rows of the training set whose gradients push in one direction with a few others: planted ones, copies
trigger          what a phrase does to the likelihood of a payload, beside phrases that nobody planted
exposure         how much likelier a secret is than others of its kind
extraction       how often text comes back word for word, by the length of the prefix
membership       how well the loss tells what was trained on from what was not
drift            what tuning changed, on a set of prompts

Every check but the last gives p, the chance of such a result, or a stronger one, where nothing is wrong; it is an alarm
when p is at most `alpha`. So of checks on a model with nothing to find a share of at most alpha are alarms.
"""

from gptjax.research.audit.canaries import (
    CANDIDATES,
    Exposure,
    Trigger,
    alike,
    exposure,
    phrases,
    read_canaries,
    secrets,
    space_bits,
    trigger,
)
from gptjax.research.audit.comparison import Drift, drift
from gptjax.research.audit.memorisation import FEWEST, MIN_K, Extraction, Membership, auc, extraction, membership
from gptjax.research.audit.outliers import NEIGHBOURS, Tail, outlier_scores, tail
from gptjax.research.audit.results import TEXTS, Report, to_json
from gptjax.research.audit.run import CONTEXTS, CONTROLS, EXCERPT, Settings, Snapshot, audit, snapshots
from gptjax.research.audit.text import Scored, pieces, rows, rows_of, score, store_of

__all__ = [
    "CANDIDATES", "CONTEXTS", "CONTROLS", "EXCERPT", "FEWEST", "MIN_K", "NEIGHBOURS", "TEXTS", "Drift", "Exposure",
    "Extraction", "Membership", "Report", "Scored", "Settings", "Snapshot", "Tail", "Trigger", "alike", "auc",
    "audit", "drift", "exposure", "extraction", "membership", "outlier_scores", "phrases", "pieces",
    "read_canaries", "rows", "rows_of", "score", "secrets", "snapshots", "space_bits", "store_of", "tail",
    "to_json", "trigger",
]  # fmt: skip
