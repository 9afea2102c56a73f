"""This module implements position encodings: sinusoidal encodings, rotary embeddings (RoPE), linear biases (ALiBi), and
a shift of embeddings by one token."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def sinusoidal(positions: jax.Array, d_model: int) -> jax.Array:
    """Returns the sinusoidal encodings [.., D] float32 of the positions [..] int32: sines in even channels, cosines in
    odd channels.

    Source: arXiv:1706.03762, section 3.5.
    """
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
    """Returns the RoPE frequencies [H/2] float32 for head size H, in radians per position.

    Args:
        scaling: "none" keeps all frequencies. "linear" divides all frequencies by `factor` (arXiv:2306.15595). "llama3"
            depends on the number of rotations that a frequency makes in `original_context` positions: with at most
            `slow` rotations the frequency is divided by `factor`, with at least `fast` rotations the frequency is kept,
            and between `slow` and `fast` rotations both results are interpolated (as in transformers'
            modeling_rope_utils and Meta's llama-models).
    """
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling == "linear":
        return frequency / factor
    if scaling == "llama3":
        keep = llama3_ramp(frequency, slow, fast, original_context)
        return keep * frequency + (1 - keep) * frequency / factor
    return frequency


def llama3_ramp(frequency: Array, slow: float, fast: float, original_context: int) -> Array:
    """Returns the weight `keep`, from 0 to 1, of each unscaled frequency in the RoPE scaling of Llama 3.

    In the RoPE scaling of Llama 3, the scaled frequency is keep * frequency + (1 - keep) * frequency / factor. The
    weight `keep` has the dtype of `frequency`. The code that reads and writes GGUF files passes `frequency` as a
    float64 numpy array, because the factors in GGUF files were computed in float64.
    """
    rotations, xp = original_context * frequency / (2 * math.pi), jnp if isinstance(frequency, jax.Array) else np
    return xp.clip((rotations - slow) / (fast - slow), 0, 1)


def rope_table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines [.., H/2] float32 of RoPE for the positions [..] and frequencies [H/2]."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns the positions [B, T] int32 of tokens with the segment ids [B, T], restarting at 0 in every document.

    Example:
        segment ids  1 1 1 2 2 0
        positions    0 1 2 0 1 0
    """
    index = jnp.arange(segment_ids.shape[-1])
    begins = jnp.pad(segment_ids[..., 1:] != segment_ids[..., :-1], [(0, 0)] * (segment_ids.ndim - 1) + [(1, 0)])
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=segment_ids.ndim - 1)


def rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies rotary position embeddings: rotates the vector of each token in x [B, T, N, H] by the token's position.

    For the head size H, channel i is rotated together with channel i + H/2, as in the Llama implementation of
    transformers.

    The argument `table` is the result of `rope_table(positions, rope_frequencies(H))` for positions [B, T] or [T].
    Source: arXiv:2104.09864, eq. 34.
    """
    cos, sin = (t[..., None, :].astype(x.dtype) for t in table)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def alibi_slopes(n_head: int) -> jax.Array:
    """Returns the ALiBi slopes [N] float32, one slope per attention head.

    The ALiBi penalty on an attention score is the slope of the head times the distance between query and key in tokens.
    Source: arXiv:2108.12409.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_head - power)]
    return jnp.array(slopes, jnp.float32)


def previous(x: jax.Array, first: jax.Array | None = None, segment_ids: jax.Array | None = None) -> jax.Array:
    """Returns x [B, T, D] shifted by one token: each token gets the vector of the previous token of the same document,
    or zeros.

    With `cfg.smear`, the model multiplies the shifted embeddings by a learned weight per channel, and adds the products
    to the embeddings. In modded-nanogpt, the previous token's embedding is multiplied by a gate computed from the
    token's embedding instead of a learned weight per channel.

    Args:
        first: vector of the token before the first token of each row, [B, D], or None for zeros.
        segment_ids: id of the document of each token, [B, T], or None if every row is one document.
    """
    first = jnp.zeros_like(x[:, 0]) if first is None else first.astype(x.dtype)
    out = jnp.concatenate([first[:, None], x[:, :-1]], 1)
    if segment_ids is None:
        return out
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(begins[..., None], 0, out)
