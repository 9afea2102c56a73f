"""Samplers. A filter maps logits [B, V] to logits; a sampler takes logits and a key, and returns tokens [B].

    sampler = chain(temperature(0.8), top_k(50), top_p(0.95))
    sampler = chain(repetition_penalty(1.2), pick=greedy)

Calls of `chain`, `top_k` and the other functions with the same arguments return the same sampler or filter object, so
that a compiled decoding loop is reused.

A filter that depends on earlier tokens, such as `repetition_penalty`, has an attribute `history` that is True. The last
argument of a filter with `history` is `seen` [B, V] bool, which is True for each token that the row already contains. A
`chain` that contains a filter with the attribute `history` and the argument `seen` has this attribute and this argument
too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from gptjax.config import SampleConfig
from gptjax.errors import UserError

_ROUNDING = 1e-6  # Tolerance of `top_p` for float32 rounding, so that five tokens of probability 0.02 reach p = 0.1.

Filter = Callable[..., jax.Array]
Sampler = Callable[..., jax.Array]


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the most likely token of each row; among tokens of equal probability, the token with the lowest id is
    returned."""
    return logits.argmax(-1)


def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Samples a token of each row from the distribution softmax(logits)."""
    return jax.random.categorical(key, logits)


@cache
def temperature(t: float) -> Filter:
    """Returns a filter that divides the logits by the temperature t; t < 1 sharpens the distribution."""
    return lambda logits: logits / t


@cache
def top_k(k: int) -> Filter:
    """Returns a filter that keeps the k most likely tokens (arXiv:1805.04833), and all tokens that are as likely as the
    k-th token."""

    def keep(logits: jax.Array) -> jax.Array:
        last = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits < last, -jnp.inf, logits)

    return keep


@cache
def top_p(p: float) -> Filter:
    """Returns the filter of nucleus sampling (arXiv:1904.09751).

    The filter `top_p(p)` keeps the smallest set of most likely tokens whose total probability is at least p, and always
    keeps at least one token. Among tokens of equal probability, the filter `top_p(p)` keeps the tokens with the lowest
    ids.
    """

    def keep(logits: jax.Array) -> jax.Array:
        ordered = jnp.sort(logits, axis=-1)[..., ::-1]
        cumulative = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        before = jnp.pad(cumulative[..., :-1], [(0, 0)] * (cumulative.ndim - 1) + [(1, 0)])  # exclusive sum
        count = jnp.maximum((before < p - _ROUNDING).sum(-1, keepdims=True), 1)
        last = jnp.take_along_axis(ordered, count - 1, -1)
        tied = logits == last
        n_tied = count - (logits > last).sum(-1, keepdims=True)
        return jnp.where((logits > last) | (tied & (jnp.cumsum(tied, -1) <= n_tied)), logits, -jnp.inf)

    return keep


@cache
def min_p(p: float) -> Filter:
    """Returns the filter of min-p sampling, which keeps the tokens that are at least p times as likely as the most
    likely token (arXiv:2407.01082)."""
    return lambda logits: jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Filter that penalises repeated tokens, as documented at `repetition_penalty`."""

    penalty: float
    history = True

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@cache
def repetition_penalty(penalty: float) -> Filter:
    """Returns a filter that penalises tokens that already occur in the prompt or the continuation.

    A positive logit of a repeated token is divided by `penalty`, and a negative logit is multiplied by `penalty`
    (arXiv:1909.05858, section 4.1).
    """
    return RepetitionPenalty(penalty)


@dataclass(frozen=True)
class Chain:
    """Sampler that applies `filters` to the logits and then calls `pick`, as documented at `chain`."""

    filters: tuple[Filter, ...]
    pick: Sampler

    @property
    def history(self) -> bool:
        return any(getattr(logits_filter, "history", False) for logits_filter in self.filters)

    def __call__(self, logits: jax.Array, key: jax.Array, *seen: jax.Array) -> jax.Array:
        for logits_filter in self.filters:
            has_history = getattr(logits_filter, "history", False)
            logits = logits_filter(logits, *seen) if has_history else logits_filter(logits)
        return self.pick(logits, key)


@cache
def chain(*filters: Filter, pick: Sampler = draw) -> Sampler:
    """Returns a sampler that applies the filters to the logits from left to right, and then draws a token with `pick`.

    `pick` is itself a sampler, such as `draw` or `greedy`: a function that takes logits and a key, and returns tokens.
    Calls of `chain` with the same arguments return the same object. `generate` is compiled once per sampler object, so
    passing a new lambda as the sampler in each call costs seconds of compilation per call.
    """
    return Chain(filters, pick)


def probabilities(sampler: Sampler) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that maps logits [.., V] to the probabilities, float32, with which `sampler` draws each token.

    Raises:
        UserError: the sampler is not `greedy`, `draw` or a `chain` that ends in one of them, or the sampler depends on
            earlier tokens.
    """
    if sampler is greedy:
        return lambda logits: jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
    if sampler is draw:
        return lambda logits: jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if not isinstance(sampler, Chain):
        raise UserError("sampler: its probabilities are not known; expected greedy, draw or chain(..)")
    if sampler.history:
        raise UserError("sampler: expected one that draws from the logits alone, got one with a repetition penalty")
    to_probs = probabilities(sampler.pick)

    def filtered(logits: jax.Array) -> jax.Array:
        for logits_filter in sampler.filters:
            logits = logits_filter(logits)
        return to_probs(logits)

    return filtered


def from_config(cfg: SampleConfig) -> Sampler:
    """Returns the sampler that a `SampleConfig` describes; temperature 0 means greedy decoding."""
    filters = [repetition_penalty(cfg.repetition_penalty)] if cfg.repetition_penalty != 1 else []
    if cfg.temperature == 0:
        return chain(*filters, pick=greedy) if filters else greedy
    filters += [temperature(cfg.temperature)]
    filters += [top_k(cfg.top_k)] if cfg.top_k else []
    filters += [top_p(cfg.top_p)] if cfg.top_p < 1 else []
    filters += [min_p(cfg.min_p)] if cfg.min_p else []
    return chain(*filters)
