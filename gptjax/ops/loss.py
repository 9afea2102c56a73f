"""Next-token cross-entropy, from logits, or from hidden states in chunks of tokens without storing all logits."""

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

_CHUNK_BYTES = 256 * 2**20  # size of the float32 logits of a chunk of tokens; GPUs with much memory use larger chunks
# Upper limit on the size of a chunk's logits, reached if JAX can use 32 GiB or more of a GPU. At this size, the
# training step of GPT-2 124M, compiled for an H100, needs 7.6 GiB of memory and has 64.8 GB of memory traffic. With
# chunks of twice this size the step would need 8.7 GiB and have nearly the same traffic, 63.9 GB
# (tests/bench/gpu_program.py).
_GPU_CHUNK_BYTES = 2**30
_NO_TOKEN = -1e15  # logit of a padding column; not -inf, because the gradient of the softcap squares the logits


def cross_entropy(
    logits: jax.Array, targets: jax.Array | np.ndarray, weights: jax.Array | np.ndarray | None = None
) -> Mean:
    """Returns the weighted sum of -log softmax(logits)[target], and the sum of the weights, as a `Mean`.

    Args:
        logits: [.., V].
        targets: [..] int32.
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
    """Returns cap * tanh(logits / cap); a cap of 0 leaves the logits unchanged. Source: Gemma 2, arXiv:2408.00118."""
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

    Only the logits of one chunk are in memory at a time. When JAX differentiates this function, the forward pass also
    computes the gradients of `hidden` and `head`, chunk by chunk, so that the backward pass need not recompute logits.

    Args:
        hidden: [.., D].
        head: [D, V].
        targets: [..] int32.
        weights: weight of each target, [..], or None if all weights are 1.
        cap: softcap of the logits; 0: no softcap.
        dtype: dtype of the operands of the matrix products.
        chunk: number of tokens per chunk. If None, a chunk has as many tokens as fit in 256 MiB of logits, but at least
            128 tokens. If JAX may use more than 8 GiB of a GPU, the limit is 1/32 of that memory, but at most 1 GiB.

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
    """Returns the sharding that splits tokens [B, T] over the devices for the product with the LM head.

    The LM head is replicated, and each device splits its own tokens into chunks. The gradient of the LM head is then
    summed over devices once, instead of once per chunk.

    B is split over `data` and `fsdp`, and T over `context` and `tensor`. If two mesh axes do not split B or T evenly,
    only the first of them is used. Returns None if there is no mesh, if the targets are not two-dimensional, or if the
    first mesh axis alone does not split B or T evenly either.
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
    """Returns log softmax(softcap(hidden @ head) / temperature)[target] of each token, [..] float32.

    This function is for losses that are not a sum over tokens, such as DPO. The tokens are processed in chunks, and the
    backward pass recomputes the logits of each chunk. The other arguments and the errors are as in
    `linear_cross_entropy`.
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
    """Returns `linear_log_probs`, and the entropy in nats of softmax(softcap(hidden @ head) / temperature), [..] each.

    Both are computed from the same logits. The entropies have no gradient.
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
    """Returns fn(logits / temperature, targets) for all tokens; see `map_logits`."""
    check_ids("targets", targets, head.shape[1])

    def at_temperature(logits: jax.Array, targets: jax.Array) -> Any:
        return fn(logits if temperature == 1 else logits / temperature, targets)

    return map_logits(at_temperature, [Head(hidden, head, cap, dtype)], (targets,), chunk=chunk)


class Head(NamedTuple):
    """The input and the kernel of an LM head.

    hidden  [.., D]
    kernel  [D, V]
    cap     softcap of the logits; 0: no softcap
    dtype   dtype of the operands of the matrix product
    """

    hidden: jax.Array
    kernel: jax.Array
    cap: float = 0.0
    dtype: str = "float32"


def map_logits(
    fn: Callable[..., Any], heads: Sequence[Head], arrays: tuple[jax.Array, ...], *, chunk: int | None = None
) -> Any:
    """Applies fn(*logits, *arrays) to chunks of M tokens, so that only the logits of one chunk are in memory at a time.

    The backward pass recomputes the logits of each chunk.

    Args:
        fn: function of the logits of each head, [M, V] float32, and of the chunk's part of each array, [M, ..]. It
            returns a pytree of arrays [M, ..]. On a GPU or TPU the logits may have further columns with the value
            -1e15.
        heads: one or more LM heads, for the same tokens.
        arrays: arrays whose leading axes are those of the tokens; the first array has no other axes.
        chunk: number of tokens per chunk, as in `linear_cross_entropy`.

    Returns:
        The pytree that `fn` returns, for all tokens: its arrays are [.., ..] with the leading axes of the tokens.
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
                # `dtype` also applies to the backward pass
                raw = matmul(kernel, hidden.astype(jnp.float32), head.dtype)
                logits.append(_logits(raw, head.cap, full.shape[1]))
            return fn(*logits, *chunk[len(heads) :])

        outs = _over_chunks(of_chunk, chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size].reshape(*shape, *x.shape[2:]), outs)

    if (spec := _token_spec(arrays[0])) is not None:
        mapped = by_device(mapped, (P(*spec, None), P(), spec), spec)
    return mapped([head.hidden for head in heads], [head.kernel for head in heads], arrays)


def _in_chunks(arrays: tuple[jax.Array, ...], head: jax.Array, chunk: int | None) -> tuple[jax.Array, ...]:
    """Splits arrays [n, ..] into chunks [n_chunks, chunk, ..], padded with zeros at the end."""
    n = arrays[0].shape[0]
    chunk = min(n, chunk or max(128, _chunk_bytes() // (4 * head.shape[1])))
    n_chunks = -(-n // chunk)
    chunk = -(-n // n_chunks)  # chunks of equal size, with as little padding as possible
    pad = n_chunks * chunk - n
    if pad:
        arrays = tuple(jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(n_chunks, chunk, *x.shape[1:]) for x in arrays)


def _chunk_bytes() -> int:
    """Returns the size limit of a chunk's logits in bytes: 256 MiB, or on a GPU 1/32 of the memory that JAX may use,
    clipped to the range from 256 MiB to 1 GiB."""
    stats = jax.local_devices()[0].memory_stats() if platform() == "gpu" else None
    return min(_GPU_CHUNK_BYTES, max(_CHUNK_BYTES, (stats or {}).get("bytes_limit", 0) // 32))


@partial(custom_vjp, nondiff_argnums=(4, 5))
def _total(hidden, targets, weights, head, cap, dtype):
    """Returns the weighted sum of the losses of C chunks of M tokens: hidden [C, M, D], targets and weights [C, M]."""
    low = _row_major(aligned_columns(head.astype(dtype)))

    def chunk_loss(chunk):
        h, t, w = chunk
        return _chunk_logits(h, low, cap, dtype, t, w, head.shape[1])[0]

    return _over_chunks(chunk_loss, (hidden, targets, weights)).sum()


def _logits(raw, cap, n):
    """Applies the softcap to the logits `raw`, and masks the padding columns after the first n columns."""
    logits, columns = softcap(raw, cap), raw.shape[1]
    return logits if columns == n else jnp.where(jnp.arange(columns) < n, logits, _NO_TOKEN)


def _chunk_logits(h, head, cap, dtype, targets, weights, n):
    """Returns the weighted loss of a chunk, and its logits, probabilities and one-hot targets, [M, V] each."""
    logits = _logits(jnp.dot(h.astype(dtype), head, preferred_element_type=jnp.float32), cap, n)
    shifted = logits - logits.max(-1, keepdims=True)
    exp = jnp.exp(shifted)
    norm = exp.sum(-1, keepdims=True)
    hit = (jnp.arange(head.shape[1]) == targets[:, None]) & (targets[:, None] < n)
    nll = jnp.log(norm[:, 0]) - jnp.where(hit, shifted, 0.0).sum(-1)
    return (nll * weights).sum(), (logits, exp / norm, hit)


def _row_major(a):
    """Prevents XLA from merging the transpose of a tied head with the matrix product: XLA's CPU backend cannot compute
    the merged product in bfloat16."""
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
