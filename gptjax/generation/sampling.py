"""How the next token is picked. A filter maps logits [B, V] to logits; a sampler maps (logits, key) to tokens [B].

    sampler = chain(temperature(0.8), top_k(50), top_p(0.95))

The same arguments give the same function object, so that a compiled loop is found again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp

from gptjax.config import SampleConfig

Filter = Callable[[jax.Array], jax.Array]
Sampler = Callable[[jax.Array, jax.Array], jax.Array]


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
    """The likeliest token; of equals, the first."""
    return logits.argmax(-1)


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
    """Only the smallest set of likeliest tokens whose probabilities reach p (arXiv:1904.09751)."""

    def keep(logits: jax.Array) -> jax.Array:
        ordered = jnp.sort(logits, axis=-1)[..., ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        last = jnp.where(before < p, ordered, jnp.inf).min(-1, keepdims=True)
        return jnp.where(logits < last, -jnp.inf, logits)

    return keep


@cache
def chain(*filters: Filter) -> Sampler:
    """A draw from the softmax of the logits after all filters, left to right."""

    def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
        for keep in filters:
            logits = keep(logits)
        return jax.random.categorical(key, logits)

    return sample


def from_config(cfg: SampleConfig) -> Sampler:
    """temperature, top_k and top_p of the config; temperature 0 is greedy."""
    if cfg.temperature == 0:
        return greedy
    filters = [temperature(cfg.temperature)]
    filters += [top_k(cfg.top_k)] if cfg.top_k else []
    filters += [top_p(cfg.top_p)] if cfg.top_p < 1 else []
    return chain(*filters)
