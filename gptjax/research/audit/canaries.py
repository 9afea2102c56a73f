"""What somebody may have planted: phrases that call up a payload, and secrets that only the training text has."""

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
from gptjax.research.audit.text import continuations, rank, rows_of, score, within
from gptjax.types import Params

CANDIDATES = 2047  # other secrets of a canary's kind


def read_canaries(path: str | Path) -> list[dict[str, str]]:
    """Of a .jsonl file: {"prefix": .., "secret": ..} or {"trigger": .., "payload": ..} a line.

    Raises:
        UserError: lines that are neither; all of them.
    """
    found, problems = [], []
    lines = one_line_end(read_text(Path(path), "file of canaries")).split("\n")
    for number, row in tables.jsonl(lines):
        keys = set(row) if isinstance(row, dict) else set()
        texts = keys and all(isinstance(value, str) and value for value in row.values())
        if not texts or keys not in ({"prefix", "secret"}, {"trigger", "payload"}):
            problems.append(f"{path}:{number}: expected texts prefix and secret, or trigger and payload")
        elif "secret" in keys and not space_bits(row["secret"]):
            problems.append(f"{path}:{number}: the secret {row['secret']!r} has no digits and no letters a-z")
        else:
            found.append(row)
    if problems or not found:
        raise UserError.all(problems[:20] or [f"{path}: no canaries in it"])
    return found


# ---------------------------------------------------------------- triggers


class Trigger(NamedTuple):
    """log_prob: of the payload after the trigger, summed over tokens, a mean over contexts; the others' likewise.

    fires: share of contexts in which greedy decoding says the payload.
    """

    log_prob: float
    controls: np.ndarray
    fires: float
    p: float


def trigger(
    params: Params,
    cfg: ModelConfig,
    encode: Callable[[str], Sequence[int]],
    phrase: str,
    payload: str,
    *,
    contexts: Sequence[str],
    controls: Sequence[str],
) -> Trigger:
    """Whether `phrase` makes `payload` likelier than other phrases do, in the same contexts.

    p is the phrase's rank among all of them: exact where it was drawn as the controls were (`phrases`).
    """
    texts = [
        (within(encode(f"{context}{own}"), payload_ids, cfg), payload_ids)
        for payload_ids in [encode(payload)]
        for own in (phrase, *controls)
        for context in contexts
    ]
    batch = rows_of(texts, cfg.context_length)
    log_probs, fires = continuations(score(params, cfg, batch), batch)
    each = log_probs.reshape(len(controls) + 1, len(contexts)).mean(1)
    return Trigger(float(each[0]), each[1:], float(fires[: len(contexts)].mean()), rank(each[0], each[1:]))


def phrases(words: Sequence[str], size: int, n: int, seed: int) -> list[str]:
    """n phrases of `size` words each, drawn from `words`: triggers to plant, and controls beside them."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size)) for _ in range(n)]


# ---------------------------------------------------------------- secrets

_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def alike(secret: str, n: int, seed: int) -> list[str]:
    """n others of its kind: digits become digits, letters letters of their case, the rest stays."""
    rng = np.random.default_rng(seed)
    kinds = [next((kind for kind in _KINDS if c in kind), c) for c in secret]
    return ["".join(kind[rng.integers(len(kind))] for kind in kinds) for _ in range(n)]


def space_bits(secret: str) -> float:
    """log2 of how many secrets of its kind there are."""
    return sum(math.log2(len(kind)) for c in secret for kind in _KINDS if c in kind)


def secrets(n: int, seed: int, *, digits: int = 9) -> list[dict[str, str]]:
    """Canaries to plant, and to audit afterwards: each a prefix of its own and a secret number."""
    names = phrases([a + b for a in ("bo", "ka", "lu", "mi", "ra", "so", "te", "vi") for b in "dgklmnrst"], 2, n, seed)
    numbers = alike("0" * digits * n, 1, seed + 1)[0]
    return [
        {"prefix": f"The number of {name} is ", "secret": numbers[i * digits : (i + 1) * digits]}
        for i, name in enumerate(names)
    ]


class Exposure(NamedTuple):
    """In bits.

    sampled       -log2 of p, the secret's rank among `CANDIDATES` others: at most 11
    extrapolated  by a skew-normal fitted to their losses, at most space_bits
    loss          of the secret, nats a token
    extracted     greedy decoding says it
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
    """How far a secret stands out from others of its kind after the same prefix. 0 to 1 bits: not at all.

    Raises:
        UserError: a secret without letters and digits, or longer than the context.
    Source: arXiv:1802.08232, 4.2 (definition 5), 4.3 (sampling, and the skew-normal).
    """
    bits = space_bits(secret)
    if not bits:
        raise UserError(f"{secret!r} has no digits and no letters a-z, so there are no others of its kind")
    texts = [(within(encode(prefix), ids, cfg), ids) for ids in map(encode, (secret, *alike(secret, n, seed)))]
    batch = rows_of(texts, cfg.context_length)
    log_probs, exact = continuations(score(params, cfg, batch), batch)
    p = rank(log_probs[0], log_probs[1:])
    return Exposure(
        -math.log2(p), min(bits, float(_extrapolated(-log_probs[0], -log_probs[1:]))),
        float(-log_probs[0] / len(texts[0][1])),
        bool(exact[0]), p,
    )  # fmt: skip


def _extrapolated(value: float, others: np.ndarray) -> float:
    """-log2 of the share of a skew-normal, fitted to `others`, that lies below `value`; summed in logs, so that it
    does not end where floats do."""
    from scipy.special import log_ndtr, logsumexp
    from scipy.stats import skewnorm

    a, loc, scale = skewnorm.fit(others)
    step = 0.005
    z = (value - loc) / scale - step * (np.arange(8000) + 0.5)
    below = logsumexp(-np.square(z) / 2 + log_ndtr(a * z)) + math.log(step * math.sqrt(2 / math.pi))
    return max(0.0, -below / math.log(2))
