"""Measures the memorisation of training text by verbatim extraction and by membership inference."""

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

# The function `membership` tests per-document means only if the training rows and the held-out rows each come from at
# least MIN_DOCUMENTS documents.
MIN_DOCUMENTS = 4
# Min-K% Prob averages the log-probabilities of the least likely 20 % of a text's tokens (arXiv:2310.16789, fig. 4).
MIN_K = 0.2


class Extraction(NamedTuple):
    """The result of the function `extraction` for one prefix length and one stride.

    Attributes:
        prefix: length of the prefixes, in tokens.
        stride: distance between the starts of consecutive suffixes, in tokens.
        n: number of prefixes.
        extracted: number of prefixes that greedy decoding continues verbatim.
        rate: extracted / n.
        low, high: ends of the rate's 95 % Wilson interval.
    """

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
    """Measures how often greedy decoding from a prefix of a text reproduces the following tokens, the suffix, exactly.

    In each document, the first suffix begins after max(prefixes) tokens, and a further suffix begins every `stride`
    tokens. Every prefix length is tested on the same suffixes. The suffixes do not overlap if `stride` is at least the
    suffix length.

    Args:
        prefixes: prefix lengths, in tokens; one result is returned for each length.
        most: maximum number of suffixes; if the text has more, a random selection is used.

    Raises:
        UserError: the longest prefix and the suffix together do not fit into the context.
    Source: arXiv:2202.07646, 3.1.
    """
    longest = max(prefixes)
    if longest + suffix - 1 > cfg.context_length or min(*prefixes, suffix, stride) < 1:
        raise UserError(
            f"a prefix of {longest} and a suffix of {suffix} tokens need a context of {longest + suffix - 1}, and it "
            f"is {cfg.context_length}: lower them, all to at least 1"
        )
    candidates = [np.arange(start + longest, end - suffix + 1, stride) for start, end in document_spans(store)]
    starts = sample(np.concatenate(candidates), most, seed)
    results = []
    for prefix in prefixes:
        exact = np.zeros(0, bool)
        if len(starts):
            batch = rows(store, starts - prefix, starts + suffix, longest + suffix - 1)
            counted = np.arange(batch.tokens.shape[1]) >= prefix - 1
            batch = batch._replace(weights=batch.weights * counted)
            _, exact = continuations(score(params, cfg, batch), batch)
        results.append(Extraction(prefix, stride, *_wilson(exact)))
    return results


def _wilson(hits: np.ndarray) -> tuple[int, int, float, float, float]:
    """Counts the True values in the array `hits`, and computes a 95 % Wilson interval of their fraction.

    Returns:
        (number of values, number of True values, fraction of True values, lower end of the interval, upper end).
    """
    from scipy.stats import binomtest

    n, k = len(hits), int(hits.sum())
    if not n:
        return 0, 0, 0.0, 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return n, k, k / n, float(interval.low), float(interval.high)


class Membership(NamedTuple):
    """The result of the function `membership`, which tests whether scores separate training text from held-out text.

    Rows of text are scored by their loss and by Min-K% Prob. Members are rows of training text, and non-members are
    rows of held-out text. The loss of a row is negated, so that a high score indicates a row of training text.

    Attributes:
        loss_auc, min_k_auc: AUC of each score over rows, the probability that a member scores above a non-member.
        sd: standard deviation of the AUC under the null hypothesis.
        tpr: true positive rate, at a false positive rate of 1 %, of classifying rows by their loss.
        p: p-value of the test described in `membership`.
        units: number of members in the test. Members are rows, or documents if the test compares per-document means.
    """

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
    """Measures how well two scores separate members (rows of training text) from others (rows of held-out text).

    The first membership score of a row is its negative loss. The second membership score is Min-K% Prob, the mean
    log-probability of the least likely fraction k of a row's tokens. The p-value is computed by a one-sided
    Mann-Whitney U test (normal approximation) on the larger of the two scores' AUCs, Bonferroni-corrected for two
    tests.

    Args:
        documents: pair (document index of each row of `members`, document index of each row of `others`). If it is
            given, and members and others come from at least `MIN_DOCUMENTS` documents each, the p-value and sd are
            computed from per-document means of the scores, because rows of the same document are correlated.

    Min-K% Prob is defined in arXiv:2310.16789, eq. 1. The loss is used for membership inference in arXiv:1709.01604.
    """
    rows = units = [_evidence(scored, batch, k) for scored, batch in (members, others)]
    if documents is not None and min(len(np.unique(ids)) for ids in documents) >= MIN_DOCUMENTS:
        units = [(_means(loss, ids), _means(lowest, ids)) for (loss, lowest), ids in zip(rows, documents, strict=True)]
    n, m = (len(loss) for loss, _ in units)
    sd = math.sqrt((n + m + 1) / (12 * n * m))
    larger_auc = max(auc(*pair) for pair in zip(*units, strict=True))
    p = min(1.0, math.erfc((larger_auc - 0.5) / sd / math.sqrt(2)))
    (loss_in, lowest_in), (loss_out, lowest_out) = rows
    threshold = np.sort(loss_out)[-max(1, int(0.01 * (len(loss_out) + 1)))]
    tpr = float((loss_in > threshold).mean())
    return Membership(auc(loss_in, loss_out), auc(lowest_in, lowest_out), sd, tpr, p, n)


def _means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Returns the area under the ROC curve (AUC) of the scores of members and others (non-members).

    The AUC is the fraction of pairs (member, non-member) in which the member has the higher score; a tie counts 1/2.
    """
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.sum() / (2 * len(members) * len(others)))


def _evidence(scored: Scored, batch: Batch, k: float) -> tuple[np.ndarray, np.ndarray]:
    """Computes two membership scores, the negative loss and Min-K% Prob, of each of n rows.

    Tokens with loss weight 0 do not affect the membership scores.

    Returns:
        (mean log-probability of each row's tokens, mean log-probability of the least likely fraction k of each row's
        tokens), two arrays of shape [n].
    """
    counts = batch.weights > 0
    size = np.maximum(counts.sum(1), 1)
    ordered = np.sort(np.where(counts, scored.log_probs, np.inf), 1)
    n_lowest = np.maximum(1, np.floor(k * size)).astype(int)
    lowest = np.where(np.arange(ordered.shape[1]) < n_lowest[:, None], ordered, 0).sum(1) / n_lowest
    return np.where(counts, scored.log_probs, 0).sum(1) / size, lowest
