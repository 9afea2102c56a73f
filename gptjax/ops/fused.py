"""This module chooses and calls fused attention kernels, which never store the attention scores in device memory.

The fused kernels are splash attention on TPUs, and on GPUs the flash attention of cuDNN or of `ops.flash`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.ops.device import CONTEXT, ROWS, TENSOR, by_device, capability, fit, mesh, platform
from gptjax.ops.precision import splash_keeps_it

# `jax.ad_checkpoint.checkpoint_name` gives the name SAVED to the arrays that the fused attention kernels save for the
# backward pass.
SAVED = "attention"
# AMPERE, HOPPER and BLACKWELL are the compute capabilities of NVIDIA GPU generations.
AMPERE, HOPPER, BLACKWELL = 8.0, 9.0, 10.0


def kernel_for(
    q: jax.Array, *, segment_ids: jax.Array | None = None, window: int | jax.Array = 0
) -> Callable[..., jax.Array] | None:
    """Returns the fused kernel for causal attention of the queries q [B, T, N, H] over T keys, or None if no fused
    kernel supports q.

    `kernel_for` returns the first kernel in the following table that supports the device and the arguments:

        device          kernel  documents  traced window  dtypes          head sizes               context parallelism
        TPU             splash  yes        no             all             all                      yes
        GPU, Ampere on  cudnn   no         no             16-bit          up to 128 (Hopper: 256)  no
        GPU, Ampere on  flash   yes        yes            16- and 32-bit  up to 256                yes
        older GPU       None

    On GPUs, fused kernels require a head size that is a multiple of 8. On TPUs, splash attention requires that the
    number of tokens of a row on each device is a multiple of 128. If `kernel_for` returns None, attention is computed
    with plain XLA operations.
    """
    static = isinstance(window, int)
    if platform() == "tpu":
        return splash if static and splash_fits(q.shape[1]) and splash_keeps_it() else None
    if platform() != "gpu":
        return None
    if static and segment_ids is None and cudnn_fits(q):
        return cudnn
    return flash if flash_fits(q) else None


def splash_fits(T: int) -> bool:
    """Returns True if splash attention supports T queries over T keys, which requires a multiple of 128 queries per
    device."""
    current_mesh = mesh()
    return T % (128 * (1 if current_mesh is None else current_mesh.shape[CONTEXT])) == 0


def cudnn_fits(q: jax.Array) -> bool:
    """Returns True if the flash-attention kernel of cuDNN supports the queries q on the target device.

    The cuDNN kernel requires 16-bit floats, a head size that is a multiple of 8 and at most 128 (256 on Hopper, from
    cuDNN 9.5 on), no context parallelism, an Ampere or later GPU (not a T4), and an installed cuDNN.
    """
    current_mesh, is_hopper = mesh(), jax.default_backend() == "gpu" and HOPPER <= capability() < BLACKWELL
    widest = 256 if is_hopper and cudnn_version() >= 90500 else 128
    return (
        capability() >= AMPERE
        and cudnn_version() > 0
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= widest
        and (current_mesh is None or current_mesh.shape[CONTEXT] == 1)
    )


def cudnn_version() -> int:
    """Returns the version of cuDNN as an integer, such as 90800, or 0 if jax finds no cuDNN."""
    try:
        from jax._src.lib import cuda_versions

        # Without a CUDA plugin for JAX, `cuda_versions` is None.
        return cuda_versions.cudnn_get_version() if cuda_versions else 0
    except (ImportError, AttributeError, RuntimeError):
        return 0


def flash_fits(q: jax.Array) -> bool:
    """Returns True if the kernels of `ops.flash` support the queries q on the target device.

    The kernels of `ops.flash` require 16- or 32-bit floats, a head size that is a multiple of 8 and at most 256, an
    Ampere or later GPU, and the Triton backend of Pallas (deprecated in jax 0.12).
    """
    return (
        capability() >= AMPERE
        and q.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and find_spec("jax.experimental.pallas.triton") is not None
    )


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention on a TPU with the splash-attention kernel of jax.

    Under a mesh, each device computes attention for the rows, heads and queries of the device's shard. The
    splash-attention kernel skips fully masked tiles of the attention scores.

    Args:
        q: queries [B, T, N, H], already multiplied by the softmax scale.
        k, v: keys and values [B, K, T, H].
        segment_ids: id of the document of each token, [B, T]. A token attends only to tokens of the same document.
        window: size of the sliding window, which is the number of tokens that a query attends to, including the query's
            own token. 0: no window.
        interpret: whether to run the kernel in the interpreter of Pallas on a CPU, for tests.

    Returns:
        the attention output [B, T, N, H] in the dtype of q.

    Source: jax.experimental.pallas.ops.tpu.splash_attention, which implements the algorithm of arXiv:2205.14135.
    """
    T, N = q.shape[1:3]
    if (current_mesh := mesh()) is None:
        kernel, spec = _splash_kernel(T, N, 1, window, interpret), None
    else:
        heads, tokens = fit((TENSOR, CONTEXT), (N, T), current_mesh)
        kernel = _splash_kernel(T, N // _size(heads, current_mesh), _size(tokens, current_mesh), window, interpret)
        spec = kernel.manual_sharding_spec(NamedSharding(current_mesh, P(None, tokens)))
    return _by_device(_splash, q, k, v, segment_ids, heads_at=1, extra=kernel, extra_spec=spec)


def _splash_kernel(T: int, n_heads: int, q_shards: int, window: int, interpret: bool) -> Any:
    """Returns the splash-attention kernel for the `n_heads` heads of one device and the T queries of all devices.

    The splash-attention kernel contains arrays that describe the attention mask of all T queries. The caller of
    `_splash_kernel` shards the arrays that describe the attention mask over the devices in the same way as the queries.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    block = next(size for size in (512, 256, 128) if T // q_shards % size == 0)
    sizes: dict[str, Any] = {
        f"block_{name}": block
        for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    }
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0) if 0 < window < T else pallas.CausalMask((T, T))
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * n_heads), block_sizes=pallas.BlockSizes(**sizes), head_shards=1,
        q_seq_shards=q_shards, residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip


def _splash(q, k, v, q_ids, k_ids, offset, kernel):
    """Computes attention on one device with the splash-attention kernel.

    The argument `kernel` is the shard of the splash-attention kernel for this device. The arrays in `kernel` describe
    the attention mask of the queries on this device, so that `_splash` does not need the argument `offset`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    ids = None if q_ids is None else pallas.SegmentIds(q_ids, k_ids)
    return jax.vmap(kernel)(q.transpose(0, 2, 1, 3), k, v, segment_ids=ids).transpose(0, 2, 1, 3)


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array = 0,
    **options: Any,
) -> jax.Array:
    """Computes causal attention on an NVIDIA GPU with the Pallas kernels of `ops.flash`.

    The docstring of `splash` describes the shapes of q, k, v and segment_ids.

    Args:
        window: size of the sliding window, which may be a tracer, so that scanned layers can have different windows.
        options: arguments `tiles` and `interpret` of `flash_attention`.
    """
    static = isinstance(window, int)
    attend = partial(_flash, **options, **({"window": window} if static else {}))
    # The transpose of k and v undoes the transpose in `attention.attention`, and XLA removes both transposes.
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    extra = () if static else (window,)
    return _by_device(attend, q, k, v, segment_ids, heads_at=2, extra=extra, extra_spec=(P(),) * len(extra))


def _flash(q, k, v, q_ids, k_ids, offset, extra, **options):
    from gptjax.ops.flash import flash_attention

    ids = None if q_ids is None else (q_ids, k_ids)
    traced = dict(zip(("window",), extra, strict=False))
    return flash_attention(q, k, v, segment_ids=ids, offset=offset, saved_as=SAVED, **traced, **options)


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: None = None, window: int = 0, by: str = "cudnn"
) -> jax.Array:
    """Computes causal attention on an NVIDIA GPU with cuDNN, without document masks.

    The docstring of `splash` describes the shapes of q, k and v.

    Args:
        by: `implementation` argument of `jax.nn.dot_product_attention`: "cudnn", or "xla" for tests on a CPU.
    """
    current_mesh = mesh()
    if segment_ids is not None or (current_mesh is not None and current_mesh.shape[CONTEXT] > 1):
        raise ValueError("cudnn supports neither segment_ids nor a context-parallel mesh: use flash")
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    attend = partial(_cudnn, window=window if 0 < window < q.shape[1] else 0, implementation=by)
    return _by_device(attend, q, k, v, None, heads_at=2)


def _cudnn(q, k, v, q_ids, k_ids, offset, extra, *, window, implementation):
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )  # fmt: skip


def _by_device(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    heads_at: int,
    extra: Any = None,
    extra_spec: Any = None,
) -> jax.Array:
    """Runs `attend(q, k, v, q_ids, k_ids, offset, extra)` on each device for the rows, heads and queries of the device.

    Under context parallelism, each device all-gathers the keys and values. Under context parallelism, the backward pass
    of attention all-gathers the keys and values again, because saving the gathered keys and values would take up the
    memory that sharding the tokens saves.

    Args:
        heads_at: axis of the heads in k and v, 1 or 2. The tokens are along axis 3 - heads_at.
        extra: pytree that is passed to `attend`, sharded by `extra_spec`.
    """
    if (current_mesh := mesh()) is None:
        return attend(q, k, v, segment_ids, segment_ids, 0, extra)
    (B, T, N, _), K = q.shape, k.shape[heads_at]
    rows, tokens, heads = fit((ROWS, CONTEXT, TENSOR), (B, T, N), current_mesh)
    if K % _size(heads, current_mesh):
        k, v = (jnp.repeat(x, N // K, axis=heads_at) for x in (k, v))

    def whole_rows(q, k, v, ids, extra):
        return attend(q, k, v, ids, ids, 0, extra)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
    def sharded_tokens(q, k, v, ids, extra):
        def all_gather(x, axis):
            return jax.lax.all_gather(x, CONTEXT, axis=axis, tiled=True)

        k, v = (all_gather(x, 3 - heads_at) for x in (k, v))
        offset = jax.lax.axis_index(CONTEXT) * q.shape[1]
        return attend(q, k, v, ids, None if ids is None else all_gather(ids, 1), offset, extra)

    q_spec, ids_spec = P(rows, tokens, heads, None), None if segment_ids is None else P(rows, tokens)
    kv_spec = q_spec if heads_at == 2 else P(rows, heads, tokens, None)
    fn = whole_rows if _size(tokens, current_mesh) == 1 else sharded_tokens
    return by_device(fn, (q_spec, kv_spec, kv_spec, ids_spec, extra_spec), q_spec)(q, k, v, segment_ids, extra)


def _size(axes: str | tuple[str, ...] | None, current_mesh: AbstractMesh) -> int:
    """Returns the number of shards of an array axis that is sharded over the mesh axes `axes`."""
    return math.prod(current_mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
