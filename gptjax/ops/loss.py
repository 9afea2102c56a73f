"""Next-token cross-entropy: of logits, and of hidden states with the head inside, chunk by chunk."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptjax.ops.device import CONTEXT, ROWS, TENSOR, by_device, fit, mesh, platform
from gptjax.ops.ids import check_ids
from gptjax.ops.linear import aligned_columns, matmul, weight_gradient
from gptjax.ops.precision import custom_vjp
from gptjax.types import Mean

_CHUNK_BYTES = 256 * 2**20  # of float32 logits alive at once
# At most, on a GPU with 32 GiB or more. GPT-2 124M's step compiled for an H100 (tests/bench/gpu_program.py) reads and
# writes 64.8 GB and takes 7.6 GiB with it; 63.9 GB and 8.7 GiB with twice as much.
_GPU_CHUNK_BYTES = 2**30
_NO_TOKEN = -1e15  # a logit whose square, in a softcap's gradient, is finite


def cross_entropy(
    logits: jax.Array, targets: jax.Array | np.ndarray, weights: jax.Array | np.ndarray | None = None
) -> Mean:
    """-log softmax(logits)[target], summed with weights; logits [.., V], targets [..] int32, weights [..].

    Raises:
        UserError: a target outside 0 to V - 1, where its value is known (not under `jit`); so do the two below.
    """
    check_ids("targets", targets, logits.shape[-1], weights)
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    weights = jnp.ones_like(nll) if weights is None else weights
    return Mean((nll * weights).sum(), weights.sum())


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap); 0 leaves them alone. Source: Gemma 2, arXiv:2408.00118."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    cap: float = 0.0,
    dtype: str = "float32",
    chunk: int | None = None,
) -> Mean:
    """`cross_entropy(softcap(hidden @ head), targets, weights)` without ever holding all the logits.

    Tokens go through in chunks. Under differentiation a chunk's logits become the gradients of `hidden` and `head`
    at once, so that nothing is computed twice and the memory is one chunk's, whatever the batch.

    Args:
        hidden: [.., D]. head: [D, V]. targets: [..] int32. weights: [..] or None for ones.
        cap: softcap of the logits. dtype: of the products. chunk: tokens at a time; None: as many as have
            256 MiB of logits, and on a GPU with more than 8 GiB a 32nd of its memory.
    """
    check_ids("targets", targets, head.shape[1], weights)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        parts = _in_chunks((hidden.reshape(-1, head.shape[0]), targets.reshape(-1), weights.reshape(-1)), head, chunk)
        return _total(*parts, head, cap, dtype)

    if (spec := _token_spec(targets)) is not None:
        axes = tuple(axis for side in spec for axis in side or ())
        total = by_device(
            lambda *args, total=total: jax.lax.psum(total(*args), axes), (P(*spec, None), P(), spec, spec), P()
        )
    return Mean(total(hidden, head, targets, weights), weights.sum())


def _token_spec(targets: jax.Array) -> P | None:
    """How [B, T] tokens lie while the head is applied: each device takes some, and has the whole head. Chunks are
    then made of its own tokens, and the head's gradient is summed over devices once, not once a chunk.

    None without a mesh, or where the axes of rows and tokens do not divide them.
    """
    here = mesh()
    if here is None or targets.ndim != 2:
        return None
    spec = fit((ROWS, (CONTEXT, TENSOR)), targets.shape, here)
    return spec if all(side is not None for side in spec) else None


def linear_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    cap: float = 0.0,
    dtype: str = "float32",
    chunk: int | None = None,
) -> jax.Array:
    """log softmax(softcap(hidden @ head))[target] of every token, [..] float32: for losses that are no sum over tokens.

    One chunk's logits at a time, which the backward pass computes again. Arguments as `linear_cross_entropy`.
    """

    check_ids("targets", targets, head.shape[1])

    def every(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        parts = _in_chunks((hidden.reshape(-1, head.shape[0]), targets.reshape(-1)), head, chunk)
        kernel = _row_major(aligned_columns(head))

        @jax.checkpoint
        def log_probs(part):
            raw = matmul(kernel, part[0].astype(jnp.float32), dtype)  # whose backward products are in `dtype` too
            logits = _logits(raw, cap, head.shape[1])
            return jnp.take_along_axis(logits, part[1][:, None], 1)[:, 0] - jax.nn.logsumexp(logits, 1)

        return _over_chunks(log_probs, parts).reshape(-1)[: targets.size].reshape(targets.shape)

    if (spec := _token_spec(targets)) is not None:
        every = by_device(every, (P(*spec, None), P(), spec), spec)
    return every(hidden, head, targets)


def _in_chunks(arrays: tuple[jax.Array, ...], head: jax.Array, chunk: int | None) -> tuple[jax.Array, ...]:
    """[n, ..] -> [chunks, chunk, ..], filled up with zeros."""
    n = arrays[0].shape[0]
    chunk = min(n, chunk or max(128, _chunk_bytes() // (4 * head.shape[1])))
    chunks = -(-n // chunk)
    chunk = -(-n // chunks)  # as even as they go
    pad = chunks * chunk - n
    if pad:
        arrays = tuple(jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(chunks, chunk, *x.shape[1:]) for x in arrays)


def _chunk_bytes() -> int:
    """A 32nd of a GPU's memory, within bounds; elsewhere, and where the memory is not known, 256 MiB."""
    stats = jax.local_devices()[0].memory_stats() if platform() == "gpu" else None
    return min(_GPU_CHUNK_BYTES, max(_CHUNK_BYTES, (stats or {}).get("bytes_limit", 0) // 32))


@partial(custom_vjp, nondiff_argnums=(4, 5))
def _total(hidden, targets, weights, head, cap, dtype):
    """hidden [C, M, D], targets and weights [C, M] -> the weighted sum of losses."""
    low = _row_major(aligned_columns(head.astype(dtype)))

    def chunk(part):
        h, t, w = part
        return _chunk_logits(h, low, cap, dtype, t, w, head.shape[1])[0]

    return _over_chunks(chunk, (hidden, targets, weights)).sum()


def _logits(raw, cap, n):
    """raw [M, n or more] float32; what is beyond n is no token and has no probability."""
    logits, columns = softcap(raw, cap), raw.shape[1]
    return logits if columns == n else jnp.where(jnp.arange(columns) < n, logits, _NO_TOKEN)


def _chunk_logits(h, head, cap, dtype, targets, weights, n):
    logits = _logits(jnp.dot(h.astype(dtype), head, preferred_element_type=jnp.float32), cap, n)
    shifted = logits - logits.max(-1, keepdims=True)
    exp = jnp.exp(shifted)
    norm = exp.sum(-1, keepdims=True)
    hit = (jnp.arange(head.shape[1]) == targets[:, None]) & (targets[:, None] < n)
    nll = jnp.log(norm[:, 0]) - jnp.where(hit, shifted, 0.0).sum(-1)
    return (nll * weights).sum(), (logits, exp / norm, hit)


def _row_major(a):
    """Keeps XLA from folding a tied head's transpose into the product, which its CPU backend refuses in bfloat16."""
    return jax.lax.optimization_barrier(a)


def _over_chunks(fn, parts):
    if parts[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.map(fn, parts)


def _forward(hidden, targets, weights, head, cap, dtype):
    low = _row_major(aligned_columns(head.astype(dtype)))

    def gradients(part, dhead):
        h, t, w = part
        total, (logits, p, hit) = _chunk_logits(h, low, cap, dtype, t, w, head.shape[1])
        d = (p - hit.astype(jnp.float32)) * w[:, None]
        if cap:
            d = d * (1 - jnp.square(logits / cap))
        d = d.astype(dtype)
        dh = jax.lax.dot_general(d, low, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        new = weight_gradient(h.astype(dtype), d)
        return (new if dhead is None else dhead + new), (total, dh.astype(hidden.dtype))

    if hidden.shape[0] == 1:
        dhead, (total, dhidden) = gradients(jax.tree.map(lambda x: x[0], (hidden, targets, weights)), None)
        dhidden = dhidden[None]
    else:
        dhead, (totals, dhidden) = jax.lax.scan(
            lambda carry, part: gradients(part, carry), jnp.zeros(low.shape, jnp.float32), (hidden, targets, weights)
        )
        total = totals.sum()
    return total, (dhidden, _row_major(dhead[:, : head.shape[1]].astype(head.dtype)))


def _backward(cap, dtype, residual, g):
    dhidden, dhead = residual
    return dhidden * g.astype(dhidden.dtype), None, None, dhead * g.astype(dhead.dtype)


_total.defvjp(_forward, _backward)
