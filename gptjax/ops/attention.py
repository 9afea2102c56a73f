"""Scaled dot-product attention with a causal mask, grouped heads, documents and linear biases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.ops.linear import linear
from gptjax.ops.position import alibi_slopes

_MASKED = -1e30  # not -inf: a row with nothing to see gives a mean, never a NaN
_BLOCK = 64  # the smallest query block worth its own product


def causal_mask(n_query: int, n_key: int, offset: int | jax.Array = 0) -> jax.Array:
    """[T, S] bool, True where query t, standing at t + offset, may see key s: s <= t + offset.

    causal_mask(3, 3)   1 0 0
                        1 1 0
                        1 1 1
    """
    return jnp.arange(n_key)[None, :] <= jnp.arange(n_query)[:, None] + offset


def simple_attention(x: jax.Array) -> jax.Array:
    """Self-attention without weights, x [T, D] -> [T, D]: every row becomes a mean of all rows, weighted by
    softmax(x x^T). The first step towards the real one; nothing is learned."""
    return jax.nn.softmax(x @ x.T, axis=-1) @ x


def multi_head_attention(
    x: jax.Array, w_q: Any, w_k: Any, w_v: Any, w_o: Any, n_head: int, **options: Any
) -> jax.Array:
    """Causal self-attention of n_head heads side by side, x [B, T, D] -> [B, T, D]; options as in `attention`.

    w_q [D, N*H]; w_k, w_v [D, K*H]; w_o [N*H, D]. The model's layer adds biases, norms of q and k, rope and the cache
    between the same products. Source: arXiv:1706.03762, 3.2.2.
    """
    B, T, _ = x.shape
    H = w_q.shape[-1] // n_head
    q, k, v = (linear(x, w).reshape(B, T, -1, H) for w in (w_q, w_k, w_v))
    return linear(attention(q, k, v, **options).reshape(B, T, -1), w_o)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    offset: int | jax.Array = 0,
    key_valid: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    alibi: bool = False,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, each query over the keys up to its own place.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; N is a multiple of K, and query head n reads key head n // (N // K) (arXiv:2305.13245).
        offset: the place of the first query among the keys.
        key_valid: [B, S] bool, False for places that hold nothing (padding, unused cache).
        segment_ids: [B, T] with T == S; a token sees its own document only.
        alibi: add -slope * distance to the scores (arXiv:2108.12409).
        dropout: share of attention weights set to zero, where `dropout_key` is given.

    Returns:
        [B, T, N, H] in q's dtype; scores and softmax are float32.
    """
    T = q.shape[1]
    square = k.shape[1] == T and isinstance(offset, int)
    blocks = next((n for n in (4, 2) if square and T % n == 0 and T // n >= _BLOCK), 1)
    keys = [None] * blocks if dropout_key is None else jax.random.split(dropout_key, blocks)
    outs = []
    for i in range(blocks):  # a block of queries reads its own prefix only: half the work of the full square
        start, stop = i * T // blocks, (i + 1) * T // blocks
        end = stop if blocks > 1 else k.shape[1]
        outs.append(
            _attend(
                q[:, start:stop],
                k[:, :end],
                v[:, :end],
                offset=start if blocks > 1 else offset,
                key_valid=None if key_valid is None else key_valid[:, :end],
                query_segments=None if segment_ids is None else segment_ids[:, start:stop],
                key_segments=None if segment_ids is None else segment_ids[:, :end],
                alibi=alibi,
                dropout=dropout,
                dropout_key=keys[i],
            )
        )
    return jnp.concatenate(outs, 1) if blocks > 1 else outs[0]


def _attend(q, k, v, *, offset, key_valid, query_segments, key_segments, alibi, dropout, dropout_key):
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = (q * H**-0.5).reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if alibi:
        distance = jnp.arange(T)[:, None] + offset - jnp.arange(S)[None, :]
        scores -= alibi_slopes(N).reshape(K, N // K, 1, 1) * distance
    mask = causal_mask(T, S, offset)[None, None, None]
    if key_valid is not None:
        mask &= key_valid[:, None, None, None, :]
    if query_segments is not None:
        mask &= (query_segments[:, :, None] == key_segments[:, None, :])[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
    if dropout_key is not None and dropout > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout), 0.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, H)
