"""Attention kernels that never hold a row of scores in memory: splash on a TPU, cuDNN on a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.ops.device import CONTEXT, ROWS, TENSOR, by_device, fit, mesh

SAVED = "attention"  # the name of what splash's backward pass reads, for remat policies


def splash_fits(T: int) -> bool:
    """Whether the TPU's kernel takes T queries over T keys: whole lanes of 128, on one device."""
    here = mesh()
    return T % 128 == 0 and (here is None or here.shape[CONTEXT] == 1)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention on a TPU, q [B, T, N, H] scaled already, k and v [B, K, T, H] -> [B, T, N, H].

    Under a mesh every device attends for its own rows and heads. Tiles in which nothing is seen are skipped.

    Args:
        segment_ids: [B, T]. window: tokens a query sees; 0: all. interpret: run it on a CPU, for tests.

    Source: jax.experimental.pallas.ops.tpu.splash_attention; the algorithm is arXiv:2205.14135.
    """
    (B, _, N, _), K = q.shape, k.shape[1]
    one = partial(_splash, window=window, interpret=interpret)
    if (here := mesh()) is None:
        return one(q, k, v, segment_ids)
    rows, heads = fit((ROWS, TENSOR), (B, N), here)
    if heads and K % here.shape[TENSOR]:
        k, v = (jnp.repeat(x, N // K, axis=1) for x in (k, v))
    narrow, ids = P(rows, heads, None, None), None if segment_ids is None else P(rows, None)
    wide = P(rows, None, heads, None)
    return by_device(one, (wide, narrow, narrow, ids), wide)(q, k, v, segment_ids)


def _splash(q, k, v, segment_ids, *, window, interpret):
    """One device's part."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    T, N = q.shape[1:3]
    block = next(size for size in (512, 256, 128) if T % size == 0)
    sizes = pallas.BlockSizes(**{
        f"block_{side}": block
        for side in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    })  # fmt: skip
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0) if 0 < window < T else pallas.CausalMask((T, T))
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip
    ids = None if segment_ids is None else pallas.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q.transpose(0, 2, 1, 3), k, v, segment_ids=ids).transpose(0, 2, 1, 3)


def cudnn_fits(q: jax.Array) -> bool:
    """Whether cuDNN's kernel takes these: bfloat16, heads of up to 128 numbers, no mesh to divide it by, an Ampere GPU
    or a later one (a T4 is none)."""
    new = float(getattr(jax.devices()[0], "compute_capability", 0)) >= 8
    return new and q.dtype == jnp.bfloat16 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and mesh() is None


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int = 0) -> jax.Array:
    """Causal attention on an NVIDIA GPU; shapes as in `splash`. No GPU has run it yet: only its equations are tested,
    with XLA in cuDNN's place."""
    return _causal(q, k, v, window, "cudnn")


def _causal(q, k, v, window, implementation):
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )  # fmt: skip
