"""What a program is compiled for: a kind of device, and perhaps a mesh of them.

The mesh is the one that `jax.set_mesh` names while the program is traced, with the axes below; without it nothing here
does anything. A mesh axis that does not divide an array's axis leaves it whole.
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
ROWS = (DATA, FSDP)  # what the rows of a batch are divided by

_target: ContextVar[tuple[str, float] | None] = ContextVar("target", default=None)


def platform() -> str:
    """cpu, gpu or tpu: of this process, or what `compiling_for` says."""
    target = _target.get()
    return target[0] if target else jax.default_backend()


def capability() -> float:
    """The compute capability of the NVIDIA GPU that is compiled for: 7.5 is a T4, 8.0 an A100, 9.0 an H100. 0 for any
    other device."""
    if target := _target.get():
        return target[1] if target[0] == "gpu" else 0.0
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0.0))
    except ValueError:  # an AMD GPU: gfx90a
        return 0.0


@contextmanager
def compiling_for(platform: str, *, capability: float = 8.0) -> Iterator[None]:
    """Programs traced and lowered inside are for another kind of device than this process has.

    Args:
        capability: the compute capability, if it is a GPU.
    """
    token = _target.set((platform, capability))
    try:
        with _gpu_named_to_jax(capability) if platform == "gpu" else nullcontext():
            yield
    finally:
        _target.reset(token)


def activation_dtype(dtype: str) -> DTypeLike:
    """What flows between the products of a model that computes in `dtype`. CPUs keep float32: they have no bfloat16
    arithmetic outside products."""
    return jnp.float32 if platform() == "cpu" else jnp.dtype(dtype)


def _gpu_named_to_jax(capability: float) -> AbstractContextManager:
    """From jax 0.11 on Pallas asks the mesh for a GPU where the process has none."""
    if jax.__version_info__ < (0, 11) or jax.default_backend() == "gpu":
        return nullcontext()
    kinds = {7.5: "Tesla T4", 8.0: "NVIDIA A100", 8.6: "NVIDIA A10", 8.9: "NVIDIA L4", 9.0: "NVIDIA H100"}
    kind = kinds.get(capability, "NVIDIA B200")
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    here = jax.sharding.get_abstract_mesh()
    if here.empty:
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))
    return jax.sharding.use_abstract_mesh(here.update(abstract_device=gpu))


def mesh() -> AbstractMesh | None:
    """The mesh that the program is traced for; None without one, or inside a part that is one device's own."""
    found = jax.sharding.get_abstract_mesh()
    if found.empty or found.axis_names != AXES or AxisType.Manual in found.axis_types:
        return None
    return found


def fit(spec: Sequence[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the mesh axes that do not divide `shape`; of several for one array axis the first ones that do."""

    def one(axes: Any, size: int) -> Any:
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        return axes or None

    return PartitionSpec(*(one(axes, size) for axes, size in zip(spec, shape, strict=False)))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """`x` laid on the mesh as `spec` says, a mesh axis, several or None for each axis of `x`."""
    here = mesh()
    return x if here is None else jax.lax.with_sharding_constraint(x, fit(spec, x.shape, here))


ProductAxes = tuple[str | None, ...] | None  # the mesh axes of a kernel's [in, out] while it is multiplied
_product_axes: Callable[[str], ProductAxes] | None = None


def product_axes_by(rule: Callable[[str], ProductAxes]) -> None:
    """`rule` is what `product_axes` asks: that of `gptjax.parallel`, from the table that lays out the parameters."""
    global _product_axes
    _product_axes = rule


def product_axes(path: str) -> ProductAxes:
    """The mesh axes of the kernel at `path` while it is multiplied. None: the kernel keeps its sharding; always None
    without a mesh."""
    return None if _product_axes is None or mesh() is None else _product_axes(path)


def by_device(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`fn` on each device's own part of its arguments; inside, `jax.lax.psum` over axes adds devices up."""
    return jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)
