"""Where a token stands: sinusoidal vectors, rotary embedding, linear biases, the token before."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def sinusoidal(positions: jax.Array, d_model: int) -> jax.Array:
    """[..] int32 -> [.., D] float32; sines in the even places, cosines in the odd. Source: arXiv:1706.03762, 3.5."""
    frequency = 10_000.0 ** (-jnp.arange(0, d_model, 2) / d_model)
    angle = positions[..., None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, -1)[..., :d_model]


def rope_table(positions: jax.Array, head_dim: int, base: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [.., H/2] float32 for `rope`."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x [B, T, N, H] by its position: element i is paired with i + H/2, as Llama's code in transformers does.

    `table` is `rope_table(positions [B, T] or [T], H)`. Source: arXiv:2104.09864, eq. 34.
    """
    cos, sin = (t[..., None, :].astype(x.dtype) for t in table)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def alibi_slopes(n_head: int) -> jax.Array:
    """[N] float32, the penalty each head puts on one step of distance. Source: arXiv:2108.12409 and its code."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_head - power)]
    return jnp.array(slopes, jnp.float32)


def previous(x: jax.Array, first: jax.Array | None = None, segment_ids: jax.Array | None = None) -> jax.Array:
    """What stands one place before each token, [B, T, D] -> [B, T, D]; zero before a document's first token.

    The model's `smear` adds it, weighted by channel, to the embedding (modded-nanogpt has a gate in that place).

    Args:
        first: [B, D] what stands before the row; None: nothing.
        segment_ids: [B, T] the document of each token; None: one a row.
    """
    first = jnp.zeros_like(x[:, 0]) if first is None else first.astype(x.dtype)
    out = jnp.concatenate([first[:, None], x[:, :-1]], 1)
    if segment_ids is None:
        return out
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(begins[..., None], 0, out)
