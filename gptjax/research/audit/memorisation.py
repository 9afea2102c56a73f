"""What a model has kept of its training text: places that it says word for word, and rows that it finds too likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.research.audit.text import Scored, continuations, document_spans, rows, sample, score
from gptjax.types import Batch, Params

FEWEST = 4  # documents that can be compared with others
MIN_K = 0.2  # share of a text's tokens, the least likely ones: arXiv:2310.16789, figure 4


class Extraction(NamedTuple):
    """Of n places `extracted` continue word for word. low, high: 95 % (Wilson)."""

    prefix: int
    stride: int
    n: int
    extracted: int
    rate: float
    low: float
    high: float


def extraction(
    params: Params,
    cfg: ModelConfig,
    store: TokenStore,
    *,
    prefixes: Sequence[int],
    suffix: int,
    stride: int,
    most: int = 1000,
    seed: int = 0,
) -> list[Extraction]:
    """How often greedy decoding, given a prefix of the text, says the next `suffix` tokens exactly.

    Suffixes begin every `stride` tokens of a document, the same ones for all prefixes; at most `most` of them. A stride
    of `suffix` or more keeps them apart.

    Raises:
        UserError: prefix and suffix do not fit into the context.
    Source: arXiv:2202.07646, 3.1.
    """
    longest = max(prefixes)
    if longest + suffix - 1 > cfg.context_length or min(*prefixes, suffix, stride) < 1:
        raise UserError(
            f"a prefix of {longest} and a suffix of {suffix} tokens need a context of {longest + suffix - 1}, and it "
            f"is {cfg.context_length}: lower them, all to at least 1"
        )
    places = [np.arange(start + longest, end - suffix + 1, stride) for start, end in document_spans(store)]
    at = sample(np.concatenate(places), most, seed)
    found = []
    for prefix in prefixes:
        exact = np.zeros(0, bool)
        if len(at):
            batch = rows(store, at - prefix, at + suffix, longest + suffix - 1)
            counted = np.arange(batch.tokens.shape[1]) >= prefix - 1
            batch = batch._replace(weights=batch.weights * counted)
            _, exact = continuations(score(params, cfg, batch), batch)
        found.append(Extraction(prefix, stride, *_wilson(exact)))
    return found


def _wilson(hits: np.ndarray) -> tuple[int, int, float, float, float]:
    """Their number, how many are True, the share, and its 95 % interval."""
    from scipy.stats import binomtest

    n, k = len(hits), int(hits.sum())
    if not n:
        return 0, 0, 0.0, 0.0, 1.0
    between = binomtest(k, n).proportion_ci(method="wilson")
    return n, k, k / n, float(between.low), float(between.high)


class Membership(NamedTuple):
    """auc: chance that a member scores above another text; sd: of that where there is no difference; tpr: share of the
    members found where 1 % of the others are taken for members; units: members that p counts, rows or documents."""

    loss_auc: float
    min_k_auc: float
    sd: float
    tpr: float
    p: float
    units: int


def membership(
    members: tuple[Scored, Batch],
    others: tuple[Scored, Batch],
    k: float = MIN_K,
    *,
    documents: tuple[np.ndarray, np.ndarray] | None = None,
) -> Membership:
    """How well the loss, and the mean of the least likely k of a row's tokens, tell members from others.

    p: one-sided Mann-Whitney U test (normal approximation) on the larger AUC, Bonferroni-corrected for two tests.

    Args:
        documents: which one each row is from, of members and of others. Rows of one are alike: p and sd are then those
            of the documents' means, where either side has `FEWEST` or more.

    Source: arXiv:2310.16789, eq. 1 (Min-K% Prob); the loss: arXiv:1709.01604.
    """
    rows = units = [_evidence(scored, batch, k) for scored, batch in (members, others)]
    if documents is not None and min(len(np.unique(own)) for own in documents) >= FEWEST:
        units = [(_means(loss, own), _means(lowest, own)) for (loss, lowest), own in zip(rows, documents, strict=True)]
    n, m = (len(loss) for loss, _ in units)
    sd = math.sqrt((n + m + 1) / (12 * n * m))
    most = max(auc(*pair) for pair in zip(*units, strict=True))
    p = min(1.0, math.erfc((most - 0.5) / sd / math.sqrt(2)))
    (loss_in, lowest_in), (loss_out, lowest_out) = rows
    beyond = np.sort(loss_out)[-max(1, int(0.01 * (len(loss_out) + 1)))]
    tpr = float((loss_in > beyond).mean())
    return Membership(auc(loss_in, loss_out), auc(lowest_in, lowest_out), sd, tpr, p, n)


def _means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    _, at = np.unique(groups, return_inverse=True)
    return np.bincount(at, values) / np.bincount(at)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Share of pairs in which the member's score is the larger; equal ones count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.sum() / (2 * len(members) * len(others)))


def _evidence(scored: Scored, batch: Batch, k: float) -> tuple[np.ndarray, np.ndarray]:
    """[n] mean log-probability, and [n] mean of the least likely share k, of each row's counted tokens."""
    counts = batch.weights > 0
    size = np.maximum(counts.sum(1), 1)
    ordered = np.sort(np.where(counts, scored.log_probs, np.inf), 1)
    few = np.maximum(1, np.floor(k * size)).astype(int)
    lowest = np.where(np.arange(ordered.shape[1]) < few[:, None], ordered, 0).sum(1) / few
    return np.where(counts, scored.log_probs, 0).sum(1) / size, lowest
