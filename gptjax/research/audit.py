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

from __future__ import annotations

import dataclasses
import json
import math
import string
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config, lora, losses, tree, weights
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ModelConfig
from gptjax.config.leaves import read_text
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.files import one_line_end, use_json
from gptjax.model.gpt import forward
from gptjax.research.influence import gradient_features, in_chunks, unit
from gptjax.training.resume import result_of
from gptjax.training.run_dir import RunDir
from gptjax.types import Batch, Params

NEIGHBOURS = 5  # of a row: planted rows have at least so many like them
CANDIDATES = 2047  # other secrets of a canary's kind
CONTROLS, CONTEXTS = 199, 4  # phrases beside a trigger; text before it
FEWEST = 4  # documents that can be compared with others
TEXTS = ("train", "held out")
MIN_K = 0.2  # share of a text's tokens, the least likely ones: arXiv:2310.16789, figure 4
EXCERPT = 80
_CHUNK_BYTES = 128 * 2**20  # of logits alive at once


# ---------------------------------------------------------------- rows of text


def pieces(store: TokenStore, length: int, *, most: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) [n] int64 of pieces of at most length + 1 tokens that cover every document and never two of them;
    `most` of them, drawn at random, in their order. A piece of one token is none."""
    ends = np.append(store.doc_starts[1:], len(store))
    found = [
        (start, min(start + length + 1, end))
        for first, end in zip(store.doc_starts, ends, strict=True)
        for start in range(first, end - 1, length)
    ]
    if not found:
        raise UserError("no text with at least two tokens")
    both = np.array(found, np.int64)
    if most is not None and len(both) > most:
        both = both[np.sort(np.random.default_rng(seed).choice(len(both), most, replace=False))]
    return both[:, 0], both[:, 1]


def rows(store: TokenStore, starts: np.ndarray, ends: np.ndarray, length: int | None = None) -> Batch:
    """One piece a row: tokens and targets [n, T] int32, weights [n, T] float32, 0 where the piece has ended."""
    length = length or int((ends - starts).max()) - 1
    at = starts[:, None] + np.arange(length + 1)
    ids = store.tokens[np.minimum(at, ends[:, None] - 1)].astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], (at[:, 1:] < ends[:, None]).astype(np.float32))


def rows_of(texts: Sequence[tuple[Sequence[int], Sequence[int]]], most: int | None = None) -> Batch:
    """One (read, predicted) pair of ids a row: the targets that count are the predicted ones.

    Rows are filled up to a multiple of 16, so that other texts find the compiled program again, or to `most`.
    """
    needed = max(len(read) + len(said) for read, said in texts) - 1
    length = max(needed, min(-(-needed // 16) * 16, most or needed))
    ids = np.zeros((len(texts), length + 1), np.int32)
    counted = np.zeros((len(texts), length + 1), np.float32)
    for i, (read, said) in enumerate(texts):
        ids[i, : len(read) + len(said)] = [*read, *said]
        counted[i, len(read) : len(read) + len(said)] = 1
    return Batch(ids[:, :-1], ids[:, 1:], counted[:, 1:])


class Scored(NamedTuple):
    """[n, T]: log-probability of each target, and whether it is the likeliest token of all."""

    log_probs: np.ndarray
    first: np.ndarray


def score(params: Params, cfg: ModelConfig, batch: Batch) -> Scored:
    """Of every row by itself, some at a time."""
    size = max(1, _CHUNK_BYTES // (4 * batch.tokens.shape[1] * cfg.vocab_size))
    return Scored(*in_chunks(lambda part: _score(params, part, cfg), batch, size))


@partial(jax.jit, static_argnums=2)
def _score(params: Params, batch: Batch, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    logits = forward(params, batch.tokens, cfg)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return picked - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == batch.targets


def _said(scored: Scored, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """([n] log-probability of what counts in each row, [n] whether greedy decoding says exactly that).

    The second needs no decoding: as long as every token so far is the likeliest, decoding has read the same tokens.
    """
    counts = batch.weights > 0
    return np.where(counts, scored.log_probs, 0).sum(1), (scored.first | ~counts).all(1)


# ---------------------------------------------------------------- planted rows


def outlier_scores(features: np.ndarray, reference: np.ndarray | None = None, k: int = NEIGHBOURS) -> np.ndarray:
    """[n] float32: mean cosine of each row with its k nearest others, after the mean of all directions is taken away.

    Rows that ask for something the rest does not, and agree about it, come first: planted triggers, and copies.

    Args:
        features: [n, K] of the training rows (`influence.gradient_features`).
        reference: [m, K] of other rows, which are scored against the training rows in their place.

    Raises:
        UserError: not more than k rows.
    """
    if len(features) <= k:
        raise UserError(f"{len(features)} rows: more than {k} are needed to have {k} neighbours")
    directions = unit(features)
    middle = directions.mean(0)
    rest = unit(directions - middle)
    asked = rest if reference is None else unit(unit(reference) - middle)
    near = asked @ rest.T
    if reference is None:
        np.fill_diagonal(near, -np.inf)
    return np.partition(near, -k, axis=1)[:, -k:].mean(1)


class Tail(NamedTuple):
    """flagged: rows beyond the threshold, the furthest first; expected: so many where nothing is wrong; beyond: those
    larger than all of the reference; p: of so many beyond, or more."""

    threshold: float
    flagged: np.ndarray
    expected: float
    beyond: int
    p: float


def tail(scores: np.ndarray, reference: np.ndarray, alpha: float) -> Tail:
    """Which scores lie beyond those of the reference, at a rate of `alpha` a row where all are of one kind.

    The threshold is the r-th largest of the m reference scores, r = alpha (m + 1) rounded down, at least 1: a conformal
    test, exact where rows are exchangeable. Then the x largest of all n + m are x of the n with p = C(n, x) / C(n + m,
    x): with as many of either kind ten planted rows are seen, with half as many of the reference they hardly are.
    """
    n, m = len(scores), len(reference)
    r = max(1, int(alpha * (m + 1) + 1e-9))
    threshold = float(np.sort(reference)[-r])
    flagged = np.flatnonzero(scores > threshold)
    flagged = flagged[np.argsort(-scores[flagged], kind="stable")]
    beyond = int((scores > reference.max()).sum())
    i = np.arange(beyond)
    return Tail(threshold, flagged, n * r / (m + 1), beyond, float(np.exp(np.log((n - i) / (n + m - i)).sum())))


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
        (_within(encode(f"{context}{own}"), payload_ids, cfg), payload_ids)
        for payload_ids in [encode(payload)]
        for own in (phrase, *controls)
        for context in contexts
    ]
    batch = rows_of(texts, cfg.context_length)
    said, fires = _said(score(params, cfg, batch), batch)
    each = said.reshape(len(controls) + 1, len(contexts)).mean(1)
    return Trigger(float(each[0]), each[1:], float(fires[: len(contexts)].mean()), _rank(each[0], each[1:]))


def phrases(words: Sequence[str], size: int, n: int, seed: int) -> list[str]:
    """n phrases of `size` words each, drawn from `words`: triggers to plant, and controls beside them."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size)) for _ in range(n)]


def _within(read: Sequence[int], said: Sequence[int], cfg: ModelConfig) -> Sequence[int]:
    """The end of `read`, so that both fit into the context."""
    room = cfg.context_length + 1 - len(said)
    if room < 1:
        raise UserError(f"{len(said)} tokens to predict do not fit into a context of {cfg.context_length}")
    return read[-room:]


def _rank(value: float, others: np.ndarray) -> float:
    """Chance that a value drawn like the others is as large: (1 + those as large) / (1 + all)."""
    return float((1 + (others >= value).sum()) / (1 + len(others)))


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
    texts = [(_within(encode(prefix), ids, cfg), ids) for ids in map(encode, (secret, *alike(secret, n, seed)))]
    batch = rows_of(texts, cfg.context_length)
    said, exact = _said(score(params, cfg, batch), batch)
    p = _rank(said[0], said[1:])
    return Exposure(
        -math.log2(p), min(bits, float(_extrapolated(-said[0], -said[1:]))), float(-said[0] / len(texts[0][1])),
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


# ---------------------------------------------------------------- verbatim text


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
    ends = np.append(store.doc_starts[1:], len(store))
    places = [
        np.arange(start + longest, end - suffix + 1, stride)
        for start, end in zip(store.doc_starts, ends, strict=True)
    ]  # fmt: skip
    at = np.concatenate(places)
    if len(at) > most:
        at = np.sort(np.random.default_rng(seed).choice(at, most, replace=False))
    found = []
    for prefix in prefixes:
        said = np.zeros(0, bool)
        if len(at):
            batch = rows(store, at - prefix, at + suffix, longest + suffix - 1)
            counted = np.arange(batch.tokens.shape[1]) >= prefix - 1
            batch = batch._replace(weights=batch.weights * counted)
            said = _said(score(params, cfg, batch), batch)[1]
        found.append(Extraction(prefix, stride, *_share(said)))
    return found


def _share(hits: np.ndarray) -> tuple[int, int, float, float, float]:
    from scipy.stats import binomtest

    n, k = len(hits), int(hits.sum())
    if not n:
        return 0, 0, 0.0, 0.0, 1.0
    between = binomtest(k, n).proportion_ci(method="wilson")
    return n, k, k / n, float(between.low), float(between.high)


# ---------------------------------------------------------------- membership


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

    p is of the larger of the two, twice, by the normal limit of the rank sum.

    Args:
        documents: which one each row is from, of members and of others. Rows of one are alike: p and sd are then those
            of the documents' means, where either side has `FEWEST` or more.

    Source: arXiv:2310.16789, eq. 1 (Min-K% Prob); the loss: arXiv:1709.01604.
    """
    rows = [_evidence(*pair, k) for pair in (members, others)]
    units = rows
    if documents is not None and min(len(np.unique(own)) for own in documents) >= FEWEST:
        units = [[_means(x, own) for x in both] for both, own in zip(rows, documents, strict=True)]
    n, m = (len(loss) for loss, _ in units)
    sd = math.sqrt((n + m + 1) / (12 * n * m))
    most = max(auc(*pair) for pair in zip(*units, strict=True))
    p = min(1.0, math.erfc((most - 0.5) / sd / math.sqrt(2)))
    (loss_in, _), (loss_out, _) = rows
    beyond = np.sort(loss_out)[-max(1, int(0.01 * (len(loss_out) + 1)))]
    found = (auc(*pair) for pair in zip(*rows, strict=True))
    return Membership(*found, sd, float((loss_in > beyond).mean()), p, n)


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


# ---------------------------------------------------------------- drift


class Drift(NamedTuple):
    """[n] each: KL(base || tuned), nats a token; share of places where both find the same token likeliest; loss of the
    prompt under each, nats a token."""

    kl: np.ndarray
    agree: np.ndarray
    before: np.ndarray
    after: np.ndarray


def drift(base: tuple[Params, ModelConfig], tuned: tuple[Params, ModelConfig], batch: Batch) -> Drift:
    """What tuning changed on rows of text.

    Raises:
        UserError: the models have different vocabularies.
    """
    if base[1].vocab_size != tuned[1].vocab_size:
        raise UserError(
            f"drift compares two models of one vocabulary: they have {base[1].vocab_size} and {tuned[1].vocab_size} ids"
        )

    @jax.jit
    def some(first: Params, second: Params, part: Batch) -> tuple[jax.Array, ...]:
        a, b = (
            jax.nn.log_softmax(forward(params, part.tokens, cfg))
            for params, cfg in ((first, base[1]), (second, tuned[1]))
        )
        share = part.weights / jnp.maximum(part.weights.sum(1, keepdims=True), 1e-9)
        losses = (-jnp.take_along_axis(x, part.targets[..., None], -1)[..., 0] for x in (a, b))
        each = ((jnp.exp(a) * (a - b)).sum(-1), a.argmax(-1) == b.argmax(-1), *losses)
        return tuple((x * share).sum(1) for x in each)

    size = max(1, _CHUNK_BYTES // (16 * batch.tokens.shape[1] * base[1].vocab_size))
    return Drift(*in_chunks(lambda part: some(base[0], tuned[0], part), batch, size))


# ---------------------------------------------------------------- a run


class Snapshot(NamedTuple):
    """A model of a run at one step, read when it is asked for."""

    name: str
    params: Callable[[], Params]


def snapshots(run_dir: str | Path) -> tuple[list[Snapshot], Config | None, list[str]]:
    """Every model that a run has left, in the order of steps; the run's config; and what could not be taken, and why.

    A model that is no run has one snapshot.
    """
    run = RunDir(run_dir)
    if not run.config.is_file():
        return [Snapshot("model", lambda: weights.load(run_dir)[0])], None, []
    cfg = config.from_yaml(read_text(run.config, "config"), str(run.config))
    found, notes, last = [], [], None
    if (run.final / "result.json").is_file():
        last, _ = use_json(run.final / "result.json", result_of)
    kept = Checkpoints(run.checkpoints)
    why = _unreadable(cfg)
    for step in kept.steps():
        if step == last:
            continue
        if why:
            notes.append(f"the checkpoint of step {step} was left out: {why}")
        else:
            found.append(Snapshot(f"step {step:,}", partial(_whole, kept, step, cfg)))
    if last is not None:
        found.append(Snapshot(f"step {last:,}, the last", lambda: weights.load(run.final)[0]))
    if not found:  # final/ or best/ of a run, or what only they can say
        found.append(Snapshot("model", lambda: weights.load(run_dir)[0]))
    return found, cfg, notes


def _unreadable(cfg: Config) -> str | None:
    if cfg.task == "pretrain" or cfg.finetune.trainable == "all":
        return None
    if cfg.finetune.trainable != "lora":
        return f"finetune.trainable={cfg.finetune.trainable} keeps a part of the weights only"
    if cfg.lora.init != "lora" or cfg.finetune.quantize != "none":
        return "its adapter is for a base that was split or quantised"
    return None


def _whole(kept: Checkpoints, step: int, cfg: Config) -> Params:
    """The trained params of a checkpoint; those of an adapter with its base."""
    params = kept.read(step).get("params")
    if not isinstance(params, dict):
        raise UserError(f"{kept.folder / str(step)} holds no parameters")
    if "adapter" not in params:
        return params
    base = weights.load(cfg.finetune.base)[0]
    return lora.merge(base, params["adapter"], cfg.lora)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of `audit`.

    train, held_out   stores of tokens: what was trained on, and text of the same kind that was not
    canaries          {"prefix", "secret"} or {"trigger", "payload"} each: `read_canaries`
    base, prompts     (params, cfg) and rows of text, for drift
    rows              at most so many of each store
    of                pattern of the parameters whose gradients are compared
    prefixes, suffix, strides   tokens, of extraction; None: as the context allows
    alpha             rate of false alarms, a check
    """

    train: TokenStore
    held_out: TokenStore
    canaries: Sequence[dict[str, str]] = ()
    base: tuple[Params, ModelConfig] | None = None
    prompts: Sequence[str] = ()
    rows: int = 500
    of: str = "blocks/*"
    dims: int = 1024
    prefixes: Sequence[int] | None = None
    suffix: int | None = None
    strides: Sequence[int] | None = None
    alpha: float = 0.01
    seed: int = 0


def audit(
    models: Sequence[Snapshot],
    cfg: ModelConfig,
    tokenizer: Any,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every check that the settings allow, as JSON has it; `research.report` makes a page of it.

    Each model is read once. Outliers are sought in the gradients of all of them, side by side.
    """
    length = min(cfg.context_length, 512)
    stores = dict(zip(TEXTS, (settings.train, settings.held_out), strict=True))
    places = {name: pieces(store, length, most=settings.rows, seed=settings.seed) for name, store in stores.items()}
    batches = {name: rows(stores[name], *place, length) for name, place in places.items()}
    suffix = settings.suffix or min(50, max(1, length // 4))
    prefixes = settings.prefixes or [p for p in (4, 8, 16, 32, 64, 128, 256) if p + suffix <= length] or [1]
    features = gradient_features(losses.next_token(cfg), combine=tree.join, dims=settings.dims, seed=settings.seed)
    documents = tuple(np.searchsorted(stores[name].doc_starts, places[name][0], "right") for name in stores)
    contexts, words = _contexts(tokenizer, settings.held_out, places["held out"])
    encode = partial(_encode, tokenizer)
    report: dict[str, Any] = {
        "alpha": settings.alpha, "models": [model.name for model in models],
        "rows": {name: len(batch.tokens) for name, batch in batches.items()},
        "secrets": [dict(c, bits=space_bits(c["secret"]), by=[]) for c in settings.canaries if "secret" in c],
        "triggers": [dict(c, by=[]) for c in settings.canaries if "trigger" in c],
        "extraction": [], "membership": [],
    }  # fmt: skip
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in stores}
    for model in models:
        say(f"reading {model.name}")
        params = model.params()
        say(f"{model.name}: losses and gradients of {sum(report['rows'].values()):,} rows")
        scored = {name: score(params, cfg, batch) for name, batch in batches.items()}
        found = membership(*((scored[name], batches[name]) for name in stores), documents=documents)
        report["membership"].append({"model": model.name, **_plain(found)})
        moved, frozen = tree.split(params, settings.of)
        for name, batch in batches.items():
            gradients[name].append(unit(features(moved, batch, frozen)))
        if settings.canaries:
            say(f"{model.name}: {len(settings.canaries)} canaries")
        for canary in report["secrets"]:
            canary["by"].append(
                {"model": model.name, **_plain(exposure(params, cfg, encode, canary["prefix"], canary["secret"]))}
            )
        for canary in report["triggers"]:
            size = len(canary["trigger"].split())
            result = trigger(
                params, cfg, encode, canary["trigger"], canary["payload"], contexts=contexts,
                controls=phrases(words, size, CONTROLS, settings.seed),
            )  # fmt: skip
            controls = {"control_mean": float(result.controls.mean()), "control_max": float(result.controls.max())}
            canary["by"].append({"model": model.name, **_plain(result._replace(controls=None)), **controls})
    say(f"{models[-1].name}: verbatim text")
    for stride in settings.strides or (suffix,):
        for name, store in stores.items():
            found = extraction(
                params, cfg, store, prefixes=prefixes, suffix=suffix, stride=stride, most=settings.rows,
                seed=settings.seed,
            )  # fmt: skip
            report["extraction"] += [{"text": name, "suffix": suffix, **_plain(one)} for one in found]
    say("comparing gradients")
    joined = [np.concatenate(parts, 1) for parts in gradients.values()]
    report["outliers"] = _outliers(*joined, settings, places["train"], tokenizer)
    if settings.base is not None and settings.prompts:
        say(f"{len(settings.prompts)} prompts under the base")
        report["drift"] = _drift(settings.base, (params, cfg), settings.prompts, encode, tokenizer)
    report["checks"] = _checks(report)
    return report


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text))


def _plain(found: Any) -> dict[str, Any]:
    return {name: value for name, value in found._asdict().items() if value is not None}


def _contexts(tokenizer: Any, store: TokenStore, places: tuple[np.ndarray, np.ndarray]) -> tuple[list[str], list[str]]:
    """Beginnings of held-out pieces, cut after a word, and the different words there."""
    texts = [
        tokenizer.decode(store.tokens[start : min(end, start + 64)].tolist())
        for start, end in zip(*places, strict=True)
    ]  # fmt: skip
    words = sorted({word for text in texts for word in text.split()[1:-1]})
    contexts = [text.rsplit(maxsplit=1)[0] + " " for text in texts if len(text.split()) > 1][:CONTEXTS]
    return contexts or [""], words or ["a"]


def _outliers(
    train: np.ndarray, held: np.ndarray, settings: Settings, places: tuple[np.ndarray, np.ndarray], tokenizer: Any
) -> dict[str, Any]:
    if len(train) <= NEIGHBOURS:
        return {"n": len(train), "rows": [], "scores": [], "reference": []}
    scores, reference = outlier_scores(train), outlier_scores(train, held)
    beyond = tail(scores, reference, settings.alpha)
    starts = np.append(settings.train.doc_starts, len(settings.train))
    listed = []
    for i in np.argsort(-scores, kind="stable")[: max(20, len(scores) // 50)]:
        start, end = int(places[0][i]), int(places[1][i])
        document = int(np.searchsorted(starts, start, "right"))
        text = tokenizer.decode(settings.train.tokens[start:end].tolist())
        where = f"document {document:,}, token {start - int(starts[document - 1]):,}"
        listed.append({"where": where, "start": start, "score": float(scores[i]), "text": _excerpt(text)})
    return {
        "n": len(train), "threshold": beyond.threshold, "flagged": len(beyond.flagged), "expected": beyond.expected,
        "beyond": beyond.beyond, "p": beyond.p, "rows": listed, "scores": scores.tolist(),
        "reference": reference.tolist(),
    }  # fmt: skip


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} ... {text[-EXCERPT:]}"


def _drift(base: Any, tuned: Any, prompts: Sequence[str], encode: Callable, tokenizer: Any) -> dict[str, Any]:
    from gptjax.generation import generate

    ids = [encode(prompt)[: tuned[1].context_length + 1] for prompt in prompts]
    if short := [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) < 2]:
        raise UserError(f"prompts of fewer than two tokens: {', '.join(map(repr, short[:5]))}")
    found = drift(base, tuned, rows_of([(own[:1], own[1:]) for own in ids]))
    key = jax.random.key(0)
    said = [
        [
            tokenizer.decode(new)
            for new in generate(params, ids, cfg, max_new_tokens=24, key=key, vocab_size=tokenizer.vocab_size)
        ]
        for params, cfg in (base, tuned)
    ]
    each = [
        {"prompt": prompt, "base": a, "tuned": b, **{name: float(value[i]) for name, value in _plain(found).items()}}
        for i, (prompt, a, b) in enumerate(zip(prompts, *said, strict=True))
    ]
    means = {name: float(value.mean()) for name, value in _plain(found).items()}
    same = sum(a == b for a, b in zip(*said, strict=True)) / len(prompts)
    return {**means, "same_answer": same, "prompts": sorted(each, key=lambda row: -row["kl"])}


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a check: what, p, and whether it is an alarm. Of several models the last counts."""
    found = []
    if "p" in (outliers := report["outliers"]):
        what = (
            f"{outliers['flagged']} of {outliers['n']} training rows stand out, {outliers['expected']:.1f} expected; "
            f"{outliers['beyond']} beyond all held-out rows"
        )
        found.append(("gradient outliers", what, outliers["p"]))
    for canary in report["triggers"]:
        last = canary["by"][-1]
        what = f"{canary['trigger']!r}: payload at {last['log_prob']:.1f} nats, controls {last['control_mean']:.1f}"
        found.append(("trigger", what, last["p"]))
    for canary in report["secrets"]:
        last = canary["by"][-1]
        what = f"{canary['prefix']!r}: {last['sampled']:.1f} bits, {last['extrapolated']:.1f} extrapolated"
        found.append(("secret", what, last["p"]))
    for stride in dict.fromkeys(row["stride"] for row in report["extraction"]):
        own = [row for row in report["extraction"] if row["stride"] == stride]
        longest = max(row["prefix"] for row in own)
        seen, unseen = (next(row for row in own if row["text"] == text and row["prefix"] == longest) for text in TEXTS)
        if seen["n"] and unseen["n"]:
            what = f"prefix {longest}: {seen['rate']:.1%} of training text, {unseen['rate']:.1%} of held-out text"
            found.append(("verbatim text", what, _more(seen, unseen)))
    last = report["membership"][-1]
    of = "" if last["units"] == report["rows"]["train"] else f" over {last['units']} documents"
    what = (
        f"AUC {last['loss_auc']:.3f} by loss, {last['min_k_auc']:.3f} by min-k%, 0.5 +- {last['sd']:.3f} by chance{of}"
    )
    found.append(("membership", what, last["p"]))
    return [{"check": name, "what": what, "p": p, "alarm": p <= report["alpha"]} for name, what, p in found]


def _more(seen: dict[str, Any], unseen: dict[str, Any]) -> float:
    """p of as many extracted in the first (Fisher's exact test)."""
    from scipy.stats import hypergeom

    hits = seen["extracted"] + unseen["extracted"]
    return float(hypergeom.sf(seen["extracted"] - 1, seen["n"] + unseen["n"], hits, seen["n"]))


# ---------------------------------------------------------------- files


def read_canaries(path: str | Path) -> list[dict[str, str]]:
    """Of a .jsonl file: {"prefix": .., "secret": ..} or {"trigger": .., "payload": ..} a line.

    Raises:
        UserError: lines that are neither; all of them.
    """
    found, problems = [], []
    lines = one_line_end(read_text(Path(path), "file of canaries")).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
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


def store_of(texts: Sequence[str], tokenizer: Any) -> TokenStore:
    """Texts as documents, each ended as the tokenizer ends them."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    ids = [[*tokenizer.encode(text), *end] for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    return TokenStore.from_ids(np.concatenate([np.asarray(own, np.int64) for own in ids]), starts[:-1])
