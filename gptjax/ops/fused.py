"""Attention kernels that never hold a row of scores in memory: splash on a TPU, cuDNN or our own on a GPU."""

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

SAVED = "attention"  # the name of what the kernels' backward pass reads, for remat policies
AMPERE, HOPPER, BLACKWELL = 8.0, 9.0, 10.0  # compute capabilities


def kernel_for(
    q: jax.Array, *, segment_ids: jax.Array | None = None, window: int | jax.Array = 0
) -> Callable[..., jax.Array] | None:
    """Which of `splash`, `cudnn` and `flash` runs causal attention of q [B, T, N, H] over T keys on the device that is
    compiled for; None: XLA does. The first that fits:

    device       kernel   documents   traced window   dtypes         head sizes                `context` > 1
    TPU          splash   yes         no              all            all                       yes
    Ampere on    cudnn    no          no              16-bit         to 128, to 256 on Hopper  no
    Ampere on    flash    yes         yes             16-bit, 32     to 256                    yes
    older GPU    None

    GPUs: head sizes that are multiples of 8. TPUs: multiples of 128 tokens per device.
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
    """Whether the TPU's kernel takes T queries over T keys: each device's queries are whole lanes of 128."""
    here = mesh()
    return T % (128 * (1 if here is None else here.shape[CONTEXT])) == 0


def cudnn_fits(q: jax.Array) -> bool:
    """Whether cuDNN's kernel takes these: 16-bit floats, heads of up to 128 channels (256 on Hopper), all tokens on
    one device, an Ampere GPU or a later one (a T4 is none), and a cuDNN that jax finds."""
    here, here_is_hopper = mesh(), jax.default_backend() == "gpu" and HOPPER <= capability() < BLACKWELL
    widest = 256 if here_is_hopper and cudnn_version() >= 90500 else 128
    return (
        capability() >= AMPERE
        and cudnn_version() > 0
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= widest
        and (here is None or here.shape[CONTEXT] == 1)
    )


def cudnn_version() -> int:
    """Such as 90800; 0 where jax finds none."""
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions.cudnn_get_version() if cuda_versions else 0  # None without a CUDA plugin
    except (ImportError, AttributeError, RuntimeError):
        return 0


def flash_fits(q: jax.Array) -> bool:
    """Whether `ops.flash` takes these: floats of 16 or 32 bits, heads of up to 256 channels, an Ampere GPU or a later
    one, and a jax that has Pallas' Triton backend (jax 0.12 says that it will go)."""
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
    """Causal attention on a TPU, q [B, T, N, H] scaled already, k and v [B, K, T, H] -> [B, T, N, H].

    Under a mesh every device attends for its own rows, heads and queries. Tiles in which nothing is seen are skipped.

    Args:
        segment_ids: [B, T]. window: tokens a query sees; 0: all. interpret: run it on a CPU, for tests.

    Source: jax.experimental.pallas.ops.tpu.splash_attention; the algorithm is arXiv:2205.14135.
    """
    T, N = q.shape[1:3]
    if (here := mesh()) is None:
        kernel, spec = _splash_kernel(T, N, 1, window, interpret), None
    else:
        heads, tokens = fit((TENSOR, CONTEXT), (N, T), here)
        kernel = _splash_kernel(T, N // _size(heads, here), _size(tokens, here), window, interpret)
        spec = kernel.manual_sharding_spec(NamedSharding(here, P(None, tokens)))
    return _by_device(_splash, q, k, v, segment_ids, heads_at=1, extra=kernel, extra_spec=spec)


def _splash_kernel(T: int, n_heads: int, q_shards: int, window: int, interpret: bool) -> Any:
    """For one device's heads and all devices' queries: the arrays that name their tiles are divided as queries are."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    block = next(size for size in (512, 256, 128) if T // q_shards % size == 0)
    sizes: dict[str, Any] = {
        f"block_{side}": block
        for side in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    }
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0) if 0 < window < T else pallas.CausalMask((T, T))
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * n_heads), block_sizes=pallas.BlockSizes(**sizes), head_shards=1,
        q_seq_shards=q_shards, residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip


def _splash(q, k, v, q_ids, k_ids, offset, kernel):
    """One device's part. Its part of `kernel` knows the offset."""
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
    """Causal attention on an NVIDIA GPU by our own kernels; shapes as in `splash`.

    Args:
        window: may be traced, as that of layers which differ. options: `tiles` and `interpret` of `flash_attention`.
    """
    static = isinstance(window, int)
    attend = partial(_flash, **options, **({"window": window} if static else {}))
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # back to the model's order: XLA drops both transposes
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
    """Causal attention on an NVIDIA GPU, without documents; shapes as in `splash`.

    Args:
        by: "xla" for tests: what cuDNN is asked for, on a CPU.
    """
    here = mesh()
    if segment_ids is not None or (here is not None and here.shape[CONTEXT] > 1):
        raise ValueError("cudnn: rows without documents, whole on each device; flash takes the others")
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
    """`attend(q, k, v, ids of the queries, ids of the keys, offset, extra)` by every device of the mesh for its own
    rows, heads and queries.

    Where tokens are divided each device gathers the keys and values of all of them, and does so again in the backward
    pass: to keep them would take the memory that dividing tokens saves.

    Args:
        heads_at: the axis of k's and v's heads, 1 or 2; that of their tokens is the other one.
    """
    if (here := mesh()) is None:
        return attend(q, k, v, segment_ids, segment_ids, 0, extra)
    (B, T, N, _), K = q.shape, k.shape[heads_at]
    rows, tokens, heads = fit((ROWS, CONTEXT, TENSOR), (B, T, N), here)
    if K % _size(heads, here):
        k, v = (jnp.repeat(x, N // K, axis=heads_at) for x in (k, v))

    def one_device(q, k, v, ids, extra):
        return attend(q, k, v, ids, ids, 0, extra)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
    def one_device_of_a_row(q, k, v, ids, extra):
        def of_all(x, axis):
            return jax.lax.all_gather(x, CONTEXT, axis=axis, tiled=True)

        k, v = (of_all(x, 3 - heads_at) for x in (k, v))
        offset = jax.lax.axis_index(CONTEXT) * q.shape[1]
        return attend(q, k, v, ids, None if ids is None else of_all(ids, 1), offset, extra)

    wide, ids = P(rows, tokens, heads, None), None if segment_ids is None else P(rows, tokens)
    narrow = wide if heads_at == 2 else P(rows, heads, tokens, None)
    fn = one_device if _size(tokens, here) == 1 else one_device_of_a_row
    return by_device(fn, (wide, narrow, narrow, ids, extra_spec), wide)(q, k, v, segment_ids, extra)


def _size(axes: str | tuple[str, ...] | None, here: AbstractMesh) -> int:
    return math.prod(here.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
