"""Where a token stands: sinusoidal vectors, rotary embedding, linear biases, the token before."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def sinusoidal(positions: jax.Array, d_model: int) -> jax.Array:
    """[..] int32 -> [.., D] float32; sines in the even places, cosines in the odd. Source: arXiv:1706.03762, 3.5."""
    frequency = 10_000.0 ** (-jnp.arange(0, d_model, 2) / d_model)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, -1)[..., :d_model]


def rope_frequencies(
    head_dim: int,
    base: float = 10_000.0,
    scaling: str = "none",
    factor: float = 1.0,
    slow: float = 1.0,
    fast: float = 4.0,
    original_context: int = 8192,
) -> jax.Array:
    """[H/2] float32, radians a position.

    Args:
        scaling: linear divides all by `factor` (arXiv:2306.15595); llama3 divides those that turn at most `slow`
            times in `original_context` positions, keeps those that turn `fast` times or more, and blends between
            (as in transformers' modeling_rope_utils and Meta's llama-models).
    """
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling == "linear":
        return frequency / factor
    if scaling == "llama3":
        keep = llama3_ramp(frequency, slow, fast, original_context)
        return keep * frequency + (1 - keep) * frequency / factor
    return frequency


def llama3_ramp(frequency: Array, slow: float, fast: float, original_context: int) -> Array:
    """How much of each frequency Llama 3's RoPE scaling keeps as it is, from 0 to 1; the rest is divided by its factor.
    Of numpy's arrays in their dtype, of jax's in float32: GGUF files hold the factors of float64."""
    turns, xp = original_context * frequency / (2 * math.pi), jnp if isinstance(frequency, jax.Array) else np
    return xp.clip((turns - slow) / (fast - slow), 0, 1)


def rope_table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [.., H/2] float32 for `rope`."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that begin again at 0 in every document: [B, T] -> [B, T] int32.

    segments   1 1 1 2 2 0
    positions  0 1 2 0 1 0
    """
    place = jnp.arange(segment_ids.shape[-1])
    begins = jnp.pad(segment_ids[..., 1:] != segment_ids[..., :-1], [(0, 0)] * (segment_ids.ndim - 1) + [(1, 0)])
    return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=segment_ids.ndim - 1)


def rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x [B, T, N, H] by its position: element i is paired with i + H/2, as Llama's code in transformers does.

    `table` is `rope_table(positions [B, T] or [T], rope_frequencies(H))`. Source: arXiv:2104.09864, eq. 34.
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
