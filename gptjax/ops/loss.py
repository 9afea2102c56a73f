"""This module computes the next-token cross-entropy from logits, or chunk by chunk from hidden states without storing
all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptjax.ops.device import CONTEXT, ROWS, TENSOR, by_device, fit, mesh, platform
from gptjax.ops.ids import check_ids
from gptjax.ops.linear import aligned_columns, matmul, weight_gradient
from gptjax.ops.precision import custom_vjp
from gptjax.types import Mean

# _CHUNK_BYTES is the size of the float32 logits of a chunk of tokens. On GPUs with much memory, a chunk of tokens has
# more than _CHUNK_BYTES of logits.
_CHUNK_BYTES = 256 * 2**20
# _GPU_CHUNK_BYTES is the upper limit of the size of a chunk's logits, reached if JAX can use 32 GiB or more of a GPU.
# With chunks of 1 GiB of logits, the training step of GPT-2 124M, compiled for an H100, needs 7.6 GiB of memory and has
# 64.8 GB of memory traffic. With chunks of 2 GiB of logits, the training step would need 8.7 GiB of memory and have
# nearly the same memory traffic, 63.9 GB (tests/bench/gpu_program.py).
_GPU_CHUNK_BYTES = 2**30
# _NO_TOKEN is the logit of a column that pads the LM head. _NO_TOKEN is finite, because the gradient of the softcap
# squares the logits.
_NO_TOKEN = -1e15


def cross_entropy(
    logits: jax.Array, targets: jax.Array | np.ndarray, weights: jax.Array | np.ndarray | None = None
) -> Mean:
    """Returns the weighted cross-entropy of the targets as a `Mean`: the weighted sum of -log softmax(logits)[target],
    and the sum of the weights.

    Args:
        logits: logits of the model, [.., V].
        targets: target token ids [..] int32.
        weights: weight of each target, [..], or None if all weights are 1.

    Raises:
        UserError: a target is outside 0 to V - 1 (checked only outside `jit`, where the targets are known).
    """
    check_ids("targets", targets, logits.shape[-1], weights)
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    weights = jnp.ones_like(nll) if weights is None else weights
    return Mean((nll * weights).sum(), weights.sum())


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """Returns the softcapped logits cap * tanh(logits / cap), or the logits unchanged if `cap` is 0.

    Source: Gemma 2, arXiv:2408.00118.
    """
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
    """Computes `cross_entropy(softcap(hidden @ head, cap), targets, weights)` in chunks of tokens.

    Only the logits of one chunk of tokens are in memory at a time. When JAX differentiates `linear_cross_entropy`, the
    forward pass also computes the gradients of `hidden` and `head` chunk by chunk, so that the backward pass does not
    recompute logits.

    Args:
        hidden: hidden states [.., D].
        head: kernel of the LM head [D, V].
        targets: target token ids [..] int32.
        weights: weight of each target, [..], or None if all weights are 1.
        cap: softcap of the logits; 0: no softcap.
        dtype: dtype of the operands of the matrix products.
        chunk: number of tokens per chunk. If None, a chunk has as many tokens as fit in 256 MiB of logits, but at least
            128 tokens. If JAX may use more than 8 GiB of GPU memory, the limit of 256 MiB is raised to 1/32 of this
            memory, but to at most 1 GiB.

    Raises:
        UserError: a target is outside 0 to V - 1 (checked only outside `jit`, where the targets are known).
    """
    check_ids("targets", targets, head.shape[1], weights)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        chunks = _in_chunks((hidden.reshape(-1, head.shape[0]), targets.reshape(-1), weights.reshape(-1)), head, chunk)
        return _total(*chunks, head, cap, dtype)

    if (spec := _token_spec(targets)) is not None:
        axes = tuple(axis for entry in spec for axis in entry or ())
        total = by_device(
            lambda *args, total=total: jax.lax.psum(total(*args), axes), (P(*spec, None), P(), spec, spec), P()
        )
    return Mean(total(hidden, head, targets, weights), weights.sum())


def _token_spec(targets: jax.Array) -> P | None:
    """Returns the partition spec that shards the tokens [B, T] over the devices for the product with the LM head.

    The LM head is replicated, and each device splits the device's tokens into chunks. With a replicated LM head, the
    gradient of the LM head is summed over devices once, instead of once per chunk.

    The rows B of the tokens [B, T] are sharded over the mesh axes `data` and `fsdp`, and the columns T over `context`
    and `tensor`. If two mesh axes together do not shard B or T evenly, only the first of the two mesh axes shards B or
    T. `_token_spec` returns None if there is no mesh, if the targets are not two-dimensional, or if the first mesh axis
    alone does not shard B or T evenly.
    """
    current_mesh = mesh()
    if current_mesh is None or targets.ndim != 2:
        return None
    spec = fit((ROWS, (CONTEXT, TENSOR)), targets.shape, current_mesh)
    return spec if all(entry is not None for entry in spec) else None


def linear_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    cap: float = 0.0,
    dtype: str = "float32",
    chunk: int | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """Returns the log-probability log softmax(softcap(hidden @ head) / temperature)[target] of each token, [..]
    float32.

    `linear_log_probs` is for losses that are not a sum over tokens, such as DPO. `linear_log_probs` processes the
    tokens in chunks, and the backward pass recomputes the logits of each chunk. The docstring of `linear_cross_entropy`
    describes the arguments and the errors.
    """
    return _per_token(_log_probs, hidden, head, targets, cap, dtype, chunk, temperature)


def linear_log_probs_and_entropies(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    cap: float = 0.0,
    dtype: str = "float32",
    chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probabilities of `linear_log_probs`, and the entropy in nats of softmax(softcap(hidden @ head) /
    temperature), [..] each.

    The log-probabilities and the entropies are computed from the same logits. No gradient flows through the entropies.
    """

    def both(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        fixed = jax.lax.stop_gradient(logits)
        norm = jax.nn.logsumexp(fixed, 1)
        return _log_probs(logits, targets), norm - (jnp.exp(fixed - norm[:, None]) * fixed).sum(1)

    return _per_token(both, hidden, head, targets, cap, dtype, chunk, temperature)


def _log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, 1)


def _per_token(
    fn: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    cap: float,
    dtype: str,
    chunk: int | None,
    temperature: float,
) -> Any:
    """Returns the result of fn(logits / temperature, targets) for all tokens, computed in chunks by `map_logits`."""
    check_ids("targets", targets, head.shape[1])

    def at_temperature(logits: jax.Array, targets: jax.Array) -> Any:
        return fn(logits if temperature == 1 else logits / temperature, targets)

    return map_logits(at_temperature, [Head(hidden, head, cap, dtype)], (targets,), chunk=chunk)


class Head(NamedTuple):
    """Holds the input, the kernel and the settings of an LM head.

    Attributes:
        hidden: hidden states [.., D].
        kernel: kernel of the LM head [D, V].
        cap: softcap of the logits; 0: no softcap.
        dtype: dtype of the operands of the matrix product.
    """

    hidden: jax.Array
    kernel: jax.Array
    cap: float = 0.0
    dtype: str = "float32"


def map_logits(
    fn: Callable[..., Any], heads: Sequence[Head], arrays: tuple[jax.Array, ...], *, chunk: int | None = None
) -> Any:
    """Returns fn(*logits, *arrays) for all tokens, computed in chunks of M tokens.

    Only the logits of one chunk of tokens are in memory at a time. The backward pass recomputes the logits of each
    chunk.

    Args:
        fn: function of the logits of each head, [M, V] float32, and of the chunk's slice of each array, [M, ..]. `fn`
            returns a pytree of arrays [M, ..]. On a GPU or TPU, the logits may have further columns with the value
            -1e15.
        heads: one or more LM heads that are applied to the same tokens.
        arrays: arrays with the leading axes of the tokens; the first array has no other axes.
        chunk: number of tokens per chunk, as in `linear_cross_entropy`.

    Returns:
        The pytree that `fn` returns, with arrays for all tokens, whose leading axes are the axes of the tokens.
    """
    n_axes = arrays[0].ndim

    def mapped(hidden: list[jax.Array], kernels: list[jax.Array], arrays: tuple[jax.Array, ...]) -> Any:
        shape, size = arrays[0].shape, arrays[0].size
        flat = [x.reshape(-1, x.shape[-1]) for x in hidden] + [x.reshape(-1, *x.shape[n_axes:]) for x in arrays]
        chunks = _in_chunks(tuple(flat), kernels[0], chunk)
        aligned = [_row_major(aligned_columns(kernel)) for kernel in kernels]

        @jax.checkpoint
        def of_chunk(chunk: tuple[jax.Array, ...]) -> Any:
            logits = []
            for head, kernel, full, hidden in zip(heads, aligned, kernels, chunk, strict=False):
                # `head.dtype` is the dtype of the operands in the forward and in the backward pass.
                raw = matmul(kernel, hidden.astype(jnp.float32), head.dtype)
                logits.append(_logits(raw, head.cap, full.shape[1]))
            return fn(*logits, *chunk[len(heads) :])

        outs = _over_chunks(of_chunk, chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size].reshape(*shape, *x.shape[2:]), outs)

    if (spec := _token_spec(arrays[0])) is not None:
        mapped = by_device(mapped, (P(*spec, None), P(), spec), spec)
    return mapped([head.hidden for head in heads], [head.kernel for head in heads], arrays)


def _in_chunks(arrays: tuple[jax.Array, ...], head: jax.Array, chunk: int | None) -> tuple[jax.Array, ...]:
    """Returns the arrays [n, ..] split into chunks [n_chunks, chunk, ..], with zeros as padding at the end."""
    n = arrays[0].shape[0]
    chunk = min(n, chunk or max(128, _chunk_bytes() // (4 * head.shape[1])))
    n_chunks = -(-n // chunk)
    chunk = -(-n // n_chunks)  # All chunks of tokens have the same size, with as little padding as possible.
    pad = n_chunks * chunk - n
    if pad:
        arrays = tuple(jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(n_chunks, chunk, *x.shape[1:]) for x in arrays)


def _chunk_bytes() -> int:
    """Returns the size limit of a chunk's logits in bytes.

    The size limit of a chunk's logits is 256 MiB, or on a GPU 1/32 of the memory that JAX may use, clipped to the range
    from 256 MiB to 1 GiB.
    """
    stats = jax.local_devices()[0].memory_stats() if platform() == "gpu" else None
    return min(_GPU_CHUNK_BYTES, max(_CHUNK_BYTES, (stats or {}).get("bytes_limit", 0) // 32))


@partial(custom_vjp, nondiff_argnums=(4, 5))
def _total(hidden, targets, weights, head, cap, dtype):
    """Returns the weighted sum of the losses of C chunks of M tokens, from hidden [C, M, D], targets and weights [C,
    M]."""
    low = _row_major(aligned_columns(head.astype(dtype)))

    def chunk_loss(chunk):
        h, t, w = chunk
        return _chunk_logits(h, low, cap, dtype, t, w, head.shape[1])[0]

    return _over_chunks(chunk_loss, (hidden, targets, weights)).sum()


def _logits(raw, cap, n):
    """Returns the logits `raw` after the softcap, with the padding columns after the first n columns masked."""
    logits, columns = softcap(raw, cap), raw.shape[1]
    return logits if columns == n else jnp.where(jnp.arange(columns) < n, logits, _NO_TOKEN)


def _chunk_logits(h, head, cap, dtype, targets, weights, n):
    """Returns the weighted loss of a chunk, and the logits, probabilities and one-hot targets of the chunk, [M, V]
    each."""
    logits = _logits(jnp.dot(h.astype(dtype), head, preferred_element_type=jnp.float32), cap, n)
    shifted = logits - logits.max(-1, keepdims=True)
    exp = jnp.exp(shifted)
    norm = exp.sum(-1, keepdims=True)
    hit = (jnp.arange(head.shape[1]) == targets[:, None]) & (targets[:, None] < n)
    nll = jnp.log(norm[:, 0]) - jnp.where(hit, shifted, 0.0).sum(-1)
    return (nll * weights).sum(), (logits, exp / norm, hit)


def _row_major(a):
    """Returns `a` behind an optimisation barrier, which prevents XLA from merging the transpose of a tied head with a
    matrix product.

    The CPU backend of XLA cannot compute a matrix product in bfloat16 that is merged with a transpose.
    """
    return jax.lax.optimization_barrier(a)


def _over_chunks(fn, chunks):
    if chunks[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], chunks)))
    return jax.lax.map(fn, chunks)


def _forward(hidden, targets, weights, head, cap, dtype):
    low = _row_major(aligned_columns(head.astype(dtype)))

    def gradients(chunk, dhead):
        h, t, w = chunk
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
            lambda carry, chunk: gradients(chunk, carry), jnp.zeros(low.shape, jnp.float32), (hidden, targets, weights)
        )
        total = totals.sum()
    return total, (dhidden, _row_major(dhead[:, : head.shape[1]].astype(head.dtype)))


def _backward(cap, dtype, residual, g):
    dhidden, dhead = residual
    return dhidden * g.astype(dhidden.dtype), None, None, dhead * g.astype(dhead.dtype)


_total.defvjp(_forward, _backward)
