"""Samplers. A filter maps logits [B, V] to logits; a sampler takes logits and a key, and returns tokens [B].

    sampler = chain(temperature(0.8), top_k(50), top_p(0.95))
    sampler = chain(repetition_penalty(1.2), pick=greedy)

Calls with the same arguments return the same sampler or filter object, so that a compiled decoding loop is reused.

A filter that depends on earlier tokens, such as `repetition_penalty`, has an attribute `history` that is True. Its last
argument is `seen` [B, V] bool, which is True where the row already contains the token. The same holds for a chain that
contains such a filter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from gptjax.config import SampleConfig
from gptjax.errors import UserError

_ROUNDING = 1e-6  # tolerance of `top_p`: five tokens of probability 0.02 reach p = 0.1 despite float32 rounding

Filter = Callable[..., jax.Array]
Sampler = Callable[..., jax.Array]


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the most likely token; among tokens of equal probability, the one with the lowest id."""
    return logits.argmax(-1)


def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Samples tokens from softmax(logits)."""
    return jax.random.categorical(key, logits)


@cache
def temperature(t: float) -> Filter:
    """Returns a filter that divides logits by t; t < 1 sharpens the distribution."""
    return lambda logits: logits / t


@cache
def top_k(k: int) -> Filter:
    """Returns a filter that keeps the k most likely tokens (arXiv:1805.04833), and tokens as likely as the k-th."""

    def keep(logits: jax.Array) -> jax.Array:
        last = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits < last, -jnp.inf, logits)

    return keep


@cache
def top_p(p: float) -> Filter:
    """Returns the filter of nucleus sampling (arXiv:1904.09751).

    The filter keeps the smallest set of most likely tokens with total probability >= p, and at least one token. Among
    tokens of equal probability, the filter keeps the tokens with the lowest ids.
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
    """Returns a filter that keeps tokens at least p times as likely as the most likely token (arXiv:2407.01082)."""
    return lambda logits: jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Filter that penalises repeated tokens, see `repetition_penalty`."""

    penalty: float
    history = True

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@cache
def repetition_penalty(penalty: float) -> Filter:
    """Returns a filter that penalises the tokens that the prompt and the continuation already have.

    A positive logit of a repeated token is divided by `penalty`, and a negative logit is multiplied by it
    (arXiv:1909.05858, section 4.1).
    """
    return RepetitionPenalty(penalty)


@dataclass(frozen=True)
class Chain:
    """Sampler that applies `filters` and then `pick`, see `chain`."""

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
    """Returns a sampler that applies the filters from left to right, and then `pick`.

    `pick` is itself a sampler, such as `draw` or `greedy`: a function that takes logits and a key, and returns tokens.
    Calls with the same arguments return the same object. `generate` compiles once per sampler object, so that a sampler
    that is a new lambda in each call costs seconds of compilation per call.
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
