"""This module tells other modules the device type and the mesh for which a program is traced.

The current mesh is the mesh set by `jax.set_mesh`, provided that the axis names of the mesh are `AXES`. Without a
current mesh, functions such as `constrain` return their argument unchanged. An array axis is not sharded over a mesh
axis if the size of the array axis is not divisible by the size of the mesh axis.
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
ROWS = (DATA, FSDP)  # ROWS holds the mesh axes over which the rows of a batch are sharded.

_target: ContextVar[tuple[str, float] | None] = ContextVar("target", default=None)


def platform() -> str:
    """Returns the target platform ("cpu", "gpu" or "tpu"): the platform of `compiling_for`, or else JAX's default
    backend."""
    target = _target.get()
    return target[0] if target else jax.default_backend()


def capability() -> float:
    """Returns the compute capability of the target NVIDIA GPU, such as 7.5 (T4) or 9.0 (H100), or 0 for other
    devices."""
    if target := _target.get():
        return target[1] if target[0] == "gpu" else 0.0
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0.0))
    except ValueError:  # The compute capability of an AMD GPU is a name, such as gfx90a.
        return 0.0


@contextmanager
def compiling_for(platform: str, *, capability: float = 8.0) -> Iterator[None]:
    """Context manager that makes JAX trace and lower programs for `platform`, even if this machine has no such device.

    Args:
        platform: "cpu", "gpu" or "tpu".
        capability: compute capability of the target GPU; ignored for other platforms.
    """
    token = _target.set((platform, capability))
    try:
        with _abstract_gpu(capability) if platform == "gpu" else nullcontext():
            yield
    finally:
        _target.reset(token)


def activation_dtype(dtype: str) -> DTypeLike:
    """Returns the dtype of activations between matrix products for a model with `cfg.dtype` equal to `dtype`.

    On a CPU, the dtype of activations is always float32, because the only bfloat16 instructions of CPUs are for matrix
    products.
    """
    return jnp.float32 if platform() == "cpu" else jnp.dtype(dtype)


def _abstract_gpu(capability: float) -> AbstractContextManager:
    """Context manager that tells Pallas the GPU model, which Pallas requires since jax 0.11 if no GPU is present."""
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
    """Returns the mesh for which the program is traced, or None if no mesh is set or if the caller is inside
    `shard_map`."""
    current_mesh = jax.sharding.get_abstract_mesh()
    if current_mesh.empty or current_mesh.axis_names != AXES or AxisType.Manual in current_mesh.axis_types:
        return None
    return current_mesh


def fit(spec: Sequence[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the partition spec `spec` without the mesh axes that cannot shard a dimension of `shape` evenly.

    If several mesh axes shard a dimension, mesh axes are dropped from the end until the product of the sizes of the
    remaining mesh axes divides the dimension.
    """

    def fit_dim(axes: Any, size: int) -> Any:
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        return axes or None

    return PartitionSpec(*(fit_dim(axes, size) for axes, size in zip(spec, shape, strict=False)))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Returns x with a sharding constraint over the current mesh, or x unchanged if there is no mesh.

    The argument `spec` has one entry per axis of x: a mesh axis, a tuple of mesh axes, or None.
    """
    current_mesh = mesh()
    return x if current_mesh is None else jax.lax.with_sharding_constraint(x, fit(spec, x.shape, current_mesh))


# ProductAxes are the mesh axes that shard a weight [in, out] during a matrix product.
ProductAxes = tuple[str | None, ...] | None
_product_axes: Callable[[str], ProductAxes] | None = None


def product_axes_by(rule: Callable[[str], ProductAxes]) -> None:
    """Registers the function `rule`, which `product_axes` calls to map the path of a weight matrix to mesh axes.

    `gptjax.parallel` passes a function that reads the mesh axes from the sharding rules.
    """
    global _product_axes
    _product_axes = rule


def product_axes(path: str) -> ProductAxes:
    """Returns the mesh axes that shard the weight matrix at `path` during the matrix product with this weight.

    `product_axes` returns None if there is no mesh, or if the sharding rules give no mesh axes for the path. If
    `product_axes` returns None, XLA chooses the sharding of the matrix product.
    """
    return None if _product_axes is None or mesh() is None else _product_axes(path)


def by_device(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns `jax.shard_map` of `fn` over the current mesh."""
    return jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)
