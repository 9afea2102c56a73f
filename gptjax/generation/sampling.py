"""How the next token is picked. A filter maps logits [B, V] to logits; a sampler maps (logits, key) to tokens [B].

    sampler = chain(temperature(0.8), top_k(50), top_p(0.95))
    sampler = chain(repetition_penalty(1.2), pick=greedy)

The same arguments give the same function object, so that a compiled loop is found again. A filter whose attribute
`history` is true is also given which tokens a row has seen, [B, V] bool, and so is a sampler that holds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from gptjax.config import SampleConfig
from gptjax.errors import UserError

_ROUNDING = 1e-6  # five tokens of 0.02 each reach 0.1, whatever their float32 sum is

Filter = Callable[..., jax.Array]
Sampler = Callable[..., jax.Array]


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
    """The likeliest token; of equals, the first."""
    return logits.argmax(-1)


def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """A token with the probabilities softmax(logits)."""
    return jax.random.categorical(key, logits)


@cache
def temperature(t: float) -> Filter:
    """logits / t: below 1 the likely get likelier."""
    return lambda logits: logits / t


@cache
def top_k(k: int) -> Filter:
    """Only the k likeliest (arXiv:1805.04833); tokens tied with the last of them stay."""

    def keep(logits: jax.Array) -> jax.Array:
        last = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits < last, -jnp.inf, logits)

    return keep


@cache
def top_p(p: float) -> Filter:
    """Only the smallest set of likeliest tokens whose probabilities reach p (arXiv:1904.09751), at least one token.

    Of tokens that are equally likely the first ids stay.
    """

    def keep(logits: jax.Array) -> jax.Array:
        ordered = jnp.sort(logits, axis=-1)[..., ::-1]
        reached = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        before = jnp.pad(reached[..., :-1], [(0, 0)] * (reached.ndim - 1) + [(1, 0)])  # of the likelier ones alone
        count = jnp.maximum((before < p - _ROUNDING).sum(-1, keepdims=True), 1)
        last = jnp.take_along_axis(ordered, count - 1, -1)
        tied = logits == last
        room = count - (logits > last).sum(-1, keepdims=True)
        return jnp.where((logits > last) | (tied & (jnp.cumsum(tied, -1) <= room)), logits, -jnp.inf)

    return keep


@cache
def min_p(p: float) -> Filter:
    """Only tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""
    return lambda logits: jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


@dataclass(frozen=True)
class RepetitionPenalty:
    """What `repetition_penalty` gives."""

    penalty: float
    history = True

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@cache
def repetition_penalty(penalty: float) -> Filter:
    """Logits of tokens in the prompt or the continuation so far: divided by it where above 0, else multiplied
    (arXiv:1909.05858, 4.1)."""
    return RepetitionPenalty(penalty)


@dataclass(frozen=True)
class Chain:
    """What `chain` gives."""

    filters: tuple[Filter, ...]
    pick: Sampler

    @property
    def history(self) -> bool:
        return any(getattr(change, "history", False) for change in self.filters)

    def __call__(self, logits: jax.Array, key: jax.Array, *seen: jax.Array) -> jax.Array:
        for change in self.filters:
            logits = change(logits, *seen) if getattr(change, "history", False) else change(logits)
        return self.pick(logits, key)


@cache
def chain(*filters: Filter, pick: Sampler = draw) -> Sampler:
    """All filters, left to right, then `pick`: a sampler (logits, key) -> tokens, such as `draw` or `greedy`.

    The same arguments give the same function. `generate` compiles anew for every function that it has not seen, so
    make a sampler once, outside of a loop: a new lambda in each call costs seconds.
    """
    return Chain(filters, pick)


def probabilities(sampler: Sampler) -> Callable[[jax.Array], jax.Array]:
    """logits [.., V] -> the probability with which `sampler` draws each token, float32.

    Raises:
        UserError: a sampler that is not `greedy`, `draw` or a `chain` of filters before one of them, or one that looks
            at earlier tokens.
    """
    if sampler is greedy:
        return lambda logits: jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
    if sampler is draw:
        return lambda logits: jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if not isinstance(sampler, Chain):
        raise UserError("sampler: its probabilities are not known; expected greedy, draw or chain(..)")
    if sampler.history:
        raise UserError("sampler: expected one that draws from the logits alone, got one with a repetition penalty")
    last = probabilities(sampler.pick)

    def of(logits: jax.Array) -> jax.Array:
        for change in sampler.filters:
            logits = change(logits)
        return last(logits)

    return of


def from_config(cfg: SampleConfig) -> Sampler:
    """The chain that a config asks for; temperature 0 is greedy."""
    filters = [repetition_penalty(cfg.repetition_penalty)] if cfg.repetition_penalty != 1 else []
    if cfg.temperature == 0:
        return chain(*filters, pick=greedy) if filters else greedy
    filters += [temperature(cfg.temperature)]
    filters += [top_k(cfg.top_k)] if cfg.top_k else []
    filters += [top_p(cfg.top_p)] if cfg.top_p < 1 else []
    filters += [min_p(cfg.min_p)] if cfg.min_p else []
    return chain(*filters)
