"""The device type and the mesh for which a program is traced.

The mesh is that of `jax.set_mesh`, with the axis names below; without one, functions such as `constrain` do nothing. An
array axis that is not divisible by its mesh axis is not sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jax.typing import DTypeLike

DATA, FSDP, TENSOR, CONTEXT = AXES = ("data", "fsdp", "tensor", "context")
ROWS = (DATA, FSDP)  # mesh axes over which the rows of a batch are sharded

_target: ContextVar[tuple[str, float] | None] = ContextVar("target", default=None)


def platform() -> str:
    """The target platform, "cpu", "gpu" or "tpu": that of `compiling_for` if inside it, else this process's backend."""
    target = _target.get()
    return target[0] if target else jax.default_backend()


def capability() -> float:
    """Compute capability of the target NVIDIA GPU, such as 7.5 (T4), 8.0 (A100) or 9.0 (H100); 0 for other devices."""
    if target := _target.get():
        return target[1] if target[0] == "gpu" else 0.0
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0.0))
    except ValueError:  # AMD GPUs have a name instead, such as gfx90a
        return 0.0


@contextmanager
def compiling_for(platform: str, *, capability: float = 8.0) -> Iterator[None]:
    """Trace and lower programs for a platform that this process need not have.

    Args:
        platform: "cpu", "gpu" or "tpu".
        capability: compute capability of a GPU; ignored for other platforms.
    """
    token = _target.set((platform, capability))
    try:
        with _abstract_gpu(capability) if platform == "gpu" else nullcontext():
            yield
    finally:
        _target.reset(token)


def activation_dtype(dtype: str) -> DTypeLike:
    """Dtype of the activations between matrix products, for a model with cfg.dtype `dtype`.

    float32 on CPUs, which have no bfloat16 arithmetic outside products.
    """
    return jnp.float32 if platform() == "cpu" else jnp.dtype(dtype)


def _abstract_gpu(capability: float) -> AbstractContextManager:
    """A mesh context that tells Pallas the GPU model; from jax 0.11 on it needs one if the process has no GPU."""
    if jax.__version_info__ < (0, 11) or jax.default_backend() == "gpu":
        return nullcontext()
    kinds = {7.5: "Tesla T4", 8.0: "NVIDIA A100", 8.6: "NVIDIA A10", 8.9: "NVIDIA L4", 9.0: "NVIDIA H100"}
    kind = kinds.get(capability, "NVIDIA B200")
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    current_mesh = jax.sharding.get_abstract_mesh()
    if current_mesh.empty:
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))
    return jax.sharding.use_abstract_mesh(current_mesh.update(abstract_device=gpu))


def mesh() -> AbstractMesh | None:
    """The mesh for which the program is traced; None without one, or inside `shard_map`."""
    current_mesh = jax.sharding.get_abstract_mesh()
    if current_mesh.empty or current_mesh.axis_names != AXES or AxisType.Manual in current_mesh.axis_types:
        return None
    return current_mesh


def fit(spec: Sequence[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without mesh axes that do not divide `shape`; of several axes for a dimension, the first ones that do."""

    def fit_dim(axes: Any, size: int) -> Any:
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        return axes or None

    return PartitionSpec(*(fit_dim(axes, size) for axes, size in zip(spec, shape, strict=False)))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Shard x on the current mesh; `spec` has a mesh axis, a tuple of them or None per axis of x."""
    current_mesh = mesh()
    return x if current_mesh is None else jax.lax.with_sharding_constraint(x, fit(spec, x.shape, current_mesh))


ProductAxes = tuple[str | None, ...] | None  # mesh axes of a kernel [in, out] during the matrix product
_product_axes: Callable[[str], ProductAxes] | None = None


def product_axes_by(rule: Callable[[str], ProductAxes]) -> None:
    """Set the rule of `product_axes`; `gptjax.parallel` sets one derived from its sharding rules."""
    global _product_axes
    _product_axes = rule


def product_axes(path: str) -> ProductAxes:
    """Mesh axes of the kernel at `path` during the matrix product.

    None if the kernel keeps its sharding, and always without a mesh.
    """
    return None if _product_axes is None or mesh() is None else _product_axes(path)


def by_device(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` of `fn` over the current mesh."""
    return jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)
