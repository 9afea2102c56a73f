"""This module implements causal scaled dot-product attention with grouped queries, document masks, sliding windows and
ALiBi."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax._moved import moved_name
from gptjax.ops.device import platform
from gptjax.ops.dropout import dropout as dropped_out
from gptjax.ops.dropout import off
from gptjax.ops.position import alibi_slopes
from gptjax.ops.precision import custom_vjp

# The score of a masked key is finite, because with -inf the softmax of a query whose keys are all masked would be NaN.
_MASKED = -1e30
_BLOCK = 64  # A block of at least _BLOCK queries is large enough for a separate matrix product.


class Branches(NamedTuple):
    """Describes token trees in the rows of a batch, whose tokens are stored in depth-first order, by two arrays [B, T]
    int32.

    In a token tree, a query attends to the keys on the path from the root to the query's own token. The keys on the
    path from the root to a query with index i are the keys with an index of at most i and a `subtree_end` larger than
    i. The distance between two tokens, which sliding windows and ALiBi use, is the difference of their `positions`.
    """

    positions: jax.Array  # `positions` counts, for each token, the earlier tokens on the path from the root.
    subtree_end: jax.Array  # `subtree_end` is the index after the last token of the subtree that begins at each token.


def attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """Computes causal attention, softmax(scale q k^T + mask) v, in which a query attends to the keys up to the query's
    position.

    Args:
        q: queries [B, T, N, H].
        k, v: keys and values [B, S, K, H]. N is a multiple of K, and query head n attends to key head n // (N // K)
            (grouped-query attention, arXiv:2305.13245).
        options: keyword arguments that are passed to `heads_attention`.

    Returns:
        the attention output [B, T, N, H] in the dtype of q. The scores and the softmax are computed in float32.
    """
    return heads_attention(q, *(x.transpose(0, 2, 1, 3) for x in (k, v)), **options)


def heads_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    offset: int | jax.Array = 0,
    segment_ids: jax.Array | None = None,
    branches: Branches | None = None,
    window: int | jax.Array = 0,
    scale: float | None = None,
    alibi: bool = False,
    dropout: float | jax.Array = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Computes causal attention (see `attention`) for keys and values in the layout of the KV cache, [B, K, S, H].

    If a fused kernel supports the arguments (see `fused.kernel_for`), the fused kernel computes attention: splash
    attention on a TPU, and the flash-attention kernel of cuDNN or of `ops.flash` on a GPU. No fused kernel is used on a
    CPU, with ALiBi, with dropout, with token trees, or if the queries are not at the same positions as the keys, as in
    decoding. Without a fused kernel, attention is computed with plain XLA operations.

    Args:
        offset: position of the first query among the keys; an array [B] if the position differs between the rows of the
            batch.
        segment_ids: id of the document of each token, [B, T], where T == S. A token attends only to tokens of the same
            document.
        branches: token trees of the rows, where T == S, or None if every document is a plain sequence.
        window: size of the sliding window, which is the number of tokens that a query attends to, including the query's
            own token (arXiv:2004.05150, section 3.1). 0: no window.
        scale: factor of the scores q k^T, or None for 1 / sqrt(H).
        alibi: whether to add ALiBi's biases, -slope * distance, to the scores (arXiv:2108.12409).
        dropout: dropout rate on the attention weights; dropout is applied if `dropout_key` is given.
    """
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    square = S == T and isinstance(offset, int) and offset == 0
    q = q * (H**-0.5 if scale is None else scale)
    if square and branches is None and not alibi and (dropout_key is None or off(dropout)) and platform() != "cpu":
        from gptjax.ops import fused

        if (kernel := fused.kernel_for(q, segment_ids=segment_ids, window=window)) is not None:
            return kernel(q, k, v, segment_ids=segment_ids, window=window)
    blocks = 2 if square and T % 2 == 0 and T // 2 >= _BLOCK else 1
    dropout_keys = [None] * blocks if dropout_key is None or off(dropout) else jax.random.split(dropout_key, blocks)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    outs = []
    # Each block of queries skips the keys after its last query, so that two blocks compute only 3/4 of all attention
    # scores.
    for i in range(blocks):
        first, end = i * T // blocks, (i + 1) * T // blocks
        n_key = end if blocks > 1 else S
        bias = _bias(
            first, end, n_key, S + T, heads=(K, N // K), offset=offset, segment_ids=segment_ids, branches=branches,
            window=window, alibi=alibi,
        )  # fmt: skip
        keep = None
        if (key := dropout_keys[i]) is not None:
            keep = jax.random.bernoulli(key, 1 - dropout, (B, K, N // K, end - first, n_key))
        outs.append(_attend(q[..., first:end, :], k[:, :, :n_key], v[:, :, :n_key], bias, keep, dropout))
    out = jnp.concatenate(outs, 3) if blocks > 1 else outs[0]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    offset: int | jax.Array = 0,
    segment_ids: jax.Array | None = None,
    branches: Branches | None = None,
    window: int | jax.Array = 0,
    scale: float | None = None,
    alibi: bool = False,
) -> jax.Array:
    """Returns the attention weights [B, N, T, S] float32 of the queries q [B, T, N, H] over the keys k [B, K, S, H].

    The attention weights are computed with plain XLA operations on every device, without fused kernels. Masked keys
    have an attention weight of 0. The docstring of `heads_attention` describes the arguments.
    """
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    q = (q * (H**-0.5 if scale is None else scale)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    bias = _bias(
        0, T, S, S + T, heads=(K, N // K), offset=offset, segment_ids=segment_ids, branches=branches, window=window,
        alibi=alibi,
    )  # fmt: skip
    scores = _dot(_rows(q), _transposed(k)).reshape(B, K, N // K, T, S)
    return jax.nn.softmax(scores + bias, axis=-1).reshape(B, N, T, S)


def weighted_values(
    weights: jax.Array, v: jax.Array, *, dropout: float = 0.0, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Returns the product [B, T, N, H] of the attention weights [B, N, T, S] and the values v [B, K, S, H], in the
    dtype of v."""
    B, N, T, S = weights.shape
    weights = dropped_out(weights, dropout, dropout_key).astype(v.dtype)
    out = _dot(_rows(weights.reshape(B, v.shape[1], -1, T, S)), v)
    return out.reshape(B, N, T, -1).transpose(0, 2, 1, 3).astype(v.dtype)


def _bias(
    first: int,
    end: int,
    n_key: int,
    beyond: int,
    *,
    heads: tuple[int, int],
    offset: int | jax.Array,
    segment_ids: jax.Array | None,
    branches: Branches | None,
    window: int | jax.Array,
    alibi: bool,
) -> jax.Array:
    """Returns the additive attention mask of the queries `first:end` over the first `n_key` keys.

    The attention mask is 0 where a query may attend to a key, and -1e30 elsewhere. For T queries and S keys, the shape
    of the mask is [1 or B, 1, 1, T, S]. With ALiBi, the attention mask includes the biases of ALiBi, which differ
    between heads. With ALiBi, the shape of the mask is [1 or B, K, G, T, S], for K key heads with G query heads each.

    Args:
        beyond: number larger than any distance between a query and a key. A traced `window` of 0, which means no
            window, is replaced by `beyond`.
        heads: pair (K, G) of the number of key heads and the number of query heads per key head.
    """
    distance = jnp.arange(first, end)[:, None] + jnp.reshape(offset, (-1, 1, 1, 1, 1)) - jnp.arange(n_key)
    mask = distance >= 0
    if branches is not None:
        mask = mask & (jnp.arange(first, end)[:, None] < branches.subtree_end[:, None, None, None, :n_key])
        positions = branches.positions[:, None, None]
        distance = positions[..., first:end, None] - positions[..., None, :n_key]
    if not isinstance(window, int) or window:
        mask = mask & (distance < jnp.where(window == 0, beyond, window))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, first:end, None] == segment_ids[:, None, :n_key])[:, None, None]
    bias = jnp.where(mask, 0.0, _MASKED)
    if not alibi:
        return bias
    return bias - alibi_slopes(math.prod(heads)).reshape(*heads, 1, 1) * distance.astype(jnp.float32)


@custom_vjp
def _attend(q, k, v, bias, keep, dropout):
    """Computes softmax(q k^T + bias) v with dropout on the attention weights, differentiable in q, k and v only.

    The shape of q is [B, K, G, T, H], for K key heads with G query heads each, and the shape of k and v is [B, K, S,
    H]. The argument `keep` is the boolean dropout mask or None. `bias` and the dropout mask `keep` broadcast to [B, K,
    G, T, S]. The argument `dropout` is the dropout rate.
    """
    return _attend_forward(q, k, v, bias, keep, dropout)[0]


def _attend_forward(q, k, v, bias, keep, dropout):
    scores = _dot(_rows(q), _transposed(k)).reshape(*q.shape[:-1], k.shape[-2])
    p = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)
    out = _dot(_rows(_dropped(p, keep, dropout)), v).reshape(q.shape).astype(q.dtype)
    return out, (q, k, v, keep, p, dropout)


def _attend_backward(residual, g):
    """Computes the gradients of q, k and v from the saved attention weights p without transposing a [T, S] array.

    The gradient of the attention scores is p (d_p - sum_s p d_p), where d_p is the gradient of the attention weights p.
    The sum of p d_p over the keys s equals the dot product of the attention output and the output's gradient g
    (arXiv:2205.14135, appendix B). The backward pass computes the sum of p d_p over the keys directly, because the dot
    product with the attention output would require saving the attention output for the backward pass.
    """
    q, k, v, keep, p, dropout = residual
    d_p = _dropped(_dot(_rows(g), _transposed(v)).reshape(p.shape), keep, dropout)
    delta = (p.astype(jnp.float32) * d_p).sum(-1, keepdims=True)
    d_p = d_p - delta
    d_scores = _rows((p.astype(jnp.float32) * d_p).astype(q.dtype))
    d_q = _dot(d_scores, k).reshape(q.shape)
    d_k = _transposed(_dot(_transposed(_rows(q)), d_scores))
    d_v = _transposed(_dot(_transposed(_rows(g)), _rows(_dropped(p, keep, dropout))))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies batches of matrices, a [B, K, m, n] and b [B, K, n, p], with float32 accumulation."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _rows(x: jax.Array) -> jax.Array:
    """Merges the G query heads that share a key head into one matrix, by reshaping x from [B, K, G, T, *] to [B, K, G *
    T, *]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _dropped(x: jax.Array, keep: jax.Array | None, rate: float | jax.Array) -> jax.Array:
    return x if keep is None else jnp.where(keep, (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype), 0)


def __getattr__(name: str) -> Any:
    """Returns a function that was moved from this module to `gptjax.from_scratch`, with a DeprecationWarning."""
    return moved_name(__name__, name)
