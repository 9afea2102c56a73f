"""Canaries, which are planted in training text to audit a model: backdoor triggers with a payload, and secrets."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.config.leaves import read_text
from gptjax.errors import UserError
from gptjax.files import one_line_end
from gptjax.formats import tables
from gptjax.research.audit.text import continuations, rank, rows_of, score, truncate_prompt
from gptjax.types import Params

CANDIDATES = 2047  # The default number of random candidates that a secret is compared with.


def read_canaries(path: str | Path) -> list[dict[str, str]]:
    """Reads canaries from a .jsonl file.

    Each line of a file of canaries is a JSON object: {"prefix": .., "secret": ..} or {"trigger": .., "payload": ..}.

    Raises:
        UserError: a line is invalid (the message lists at most 20 invalid lines), or the file has no canaries.
    """
    canaries, problems = [], []
    lines = one_line_end(read_text(Path(path), "file of canaries")).split("\n")
    for number, row in tables.jsonl(lines):
        keys = set(row) if isinstance(row, dict) else set()
        texts = keys and all(isinstance(value, str) and value for value in row.values())
        if not texts or keys not in ({"prefix", "secret"}, {"trigger", "payload"}):
            problems.append(f"{path}:{number}: expected texts prefix and secret, or trigger and payload")
        elif "secret" in keys and not space_bits(row["secret"]):
            problems.append(f"{path}:{number}: the secret {row['secret']!r} has no digits and no letters a-z")
        else:
            canaries.append(row)
    if problems or not canaries:
        raise UserError.all(problems[:20] or [f"{path}: no canaries in it"])
    return canaries


# ---------------------------------------------------------------- triggers


class Trigger(NamedTuple):
    """The effect of a backdoor trigger on one model.

    Attributes:
        log_prob: log-probability of the payload after the trigger, summed over its tokens, averaged over the contexts.
        controls: log-probability of the payload after each of n control phrases, [n].
        fires: fraction of contexts in which greedy decoding produces the payload after the trigger.
        p: p-value, which is the rank of the trigger among the control phrases, divided by n + 1.
    """

    log_prob: float
    controls: np.ndarray
    fires: float
    p: float


def backdoor_trigger(
    params: Params,
    cfg: ModelConfig,
    encode: Callable[[str], Sequence[int]],
    phrase: str,
    payload: str,
    *,
    contexts: Sequence[str],
    controls: Sequence[str],
) -> Trigger:
    """Tests whether a trigger phrase raises the log-probability of a payload more than control phrases do.

    The log-probability of the payload is computed after the trigger phrase and after every control phrase, in the same
    contexts. The p-value of the trigger test is computed from the rank of `phrase` among the control phrases. The
    p-value is exact if the function `phrases` drew `phrase` and the control phrases from the same distribution.
    """
    texts = [
        (truncate_prompt(encode(f"{context}{candidate}"), payload_ids, cfg), payload_ids)
        for payload_ids in [encode(payload)]
        for candidate in (phrase, *controls)
        for context in contexts
    ]
    batch = rows_of(texts, cfg.context_length)
    log_probs, fires = continuations(score(params, cfg, batch), batch)
    each = log_probs.reshape(len(controls) + 1, len(contexts)).mean(1)
    return Trigger(float(each[0]), each[1:], float(fires[: len(contexts)].mean()), rank(each[0], each[1:]))


def phrases(words: Sequence[str], size: int, n: int, seed: int) -> list[str]:
    """Draws n phrases of `size` random words from `words`. The phrases serve as triggers or as control phrases."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size)) for _ in range(n)]


# ---------------------------------------------------------------- secrets

_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def random_candidates(secret: str, n: int, seed: int) -> list[str]:
    """Draws n random secrets of the same format as `secret`.

    Each digit of the secret is replaced by a random digit, and each letter a-z or A-Z by a random letter of the same
    case. Characters of the secret that are neither digits nor letters a-z or A-Z are kept.
    """
    rng = np.random.default_rng(seed)
    kinds = [next((kind for kind in _KINDS if c in kind), c) for c in secret]
    return ["".join(kind[rng.integers(len(kind))] for kind in kinds) for _ in range(n)]


def space_bits(secret: str) -> float:
    """Returns the base-2 logarithm of the number of possible secrets of the same format as `secret`."""
    return sum(math.log2(len(kind)) for c in secret for kind in _KINDS if c in kind)


def secrets(n: int, seed: int, *, digits: int = 9) -> list[dict[str, str]]:
    """Returns n canaries to plant in training text: each has a unique prefix and a secret number of `digits` digits."""
    names = phrases([a + b for a in ("bo", "ka", "lu", "mi", "ra", "so", "te", "vi") for b in "dgklmnrst"], 2, n, seed)
    all_digits = random_candidates("0" * digits * n, 1, seed + 1)[0]
    return [
        {"prefix": f"The number of {name} is ", "secret": all_digits[i * digits : (i + 1) * digits]}
        for i, name in enumerate(names)
    ]


class Exposure(NamedTuple):
    """The result of the function `exposure`, which measures how strongly a model has memorised a secret.

    Attributes:
        sampled: exposure in bits, -log2 of p; at most 11 bits with 2,047 candidates.
        extrapolated: exposure in bits, from a skew-normal fit to the candidates' losses; at most `space_bits`.
        loss: the secret's loss, in nats per token.
        extracted: whether greedy decoding produces the secret after its prefix.
        p: p-value, which is the rank of the secret among n random candidates, divided by n + 1.
    """

    sampled: float
    extrapolated: float
    loss: float
    extracted: bool
    p: float


def exposure(
    params: Params,
    cfg: ModelConfig,
    encode: Callable[[str], Sequence[int]],
    prefix: str,
    secret: str,
    *,
    n: int = CANDIDATES,
    seed: int = 0,
) -> Exposure:
    """Measures how much likelier a secret is than random candidates of the same format, after the same prefix.

    An exposure between 0 and 1 bits means that the model has not memorised the secret.

    Args:
        n: number of random candidates.

    Raises:
        UserError: the secret has no digits and no letters a-z or A-Z, or is longer than the context.

    The exposure is defined in arXiv:1802.08232, section 4.2, definition 5; section 4.3 describes the estimates by
    sampling and by a skew-normal fit.
    """
    bits = space_bits(secret)
    if not bits:
        raise UserError(f"{secret!r} has no digits and no letters a-z, so there are no other secrets of its format")
    candidates = random_candidates(secret, n, seed)
    texts = [(truncate_prompt(encode(prefix), ids, cfg), ids) for ids in map(encode, (secret, *candidates))]
    batch = rows_of(texts, cfg.context_length)
    log_probs, exact = continuations(score(params, cfg, batch), batch)
    p = rank(log_probs[0], log_probs[1:])
    return Exposure(
        -math.log2(p), min(bits, float(_extrapolated(-log_probs[0], -log_probs[1:]))),
        float(-log_probs[0] / len(texts[0][1])),
        bool(exact[0]), p,
    )  # fmt: skip


def _extrapolated(value: float, others: np.ndarray) -> float:
    """Fits a skew-normal distribution to `others`, and returns -log2 of its cumulative probability at `value`.

    The density of the skew-normal distribution is integrated in log space, so that tiny probabilities do not underflow.
    """
    from scipy.special import log_ndtr, logsumexp
    from scipy.stats import skewnorm

    a, loc, scale = skewnorm.fit(others)
    step = 0.005
    z = (value - loc) / scale - step * (np.arange(8000) + 0.5)
    below = logsumexp(-np.square(z) / 2 + log_ndtr(a * z)) + math.log(step * math.sqrt(2 / math.pi))
    return max(0.0, -below / math.log(2))
