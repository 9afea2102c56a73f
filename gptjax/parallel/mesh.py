"""This module creates the device mesh with the axes data (data parallel), fsdp, tensor (tensor parallel) and context
(context parallel)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.ops.device import AXES


def sizes(cfg: MeshConfig, n_devices: int) -> tuple[int, int, int, int]:
    """Returns the sizes of the mesh axes data, fsdp, tensor and context, where a -1 in `cfg` means all remaining
    devices.

    Raises:
        UserError: the product of the sizes is not `n_devices`, or more than one size is -1.
    """
    shape = [getattr(cfg, name) for name in AXES]
    requested = ", ".join(f"mesh.{name}={n}" for name, n in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise UserError(f"{requested}: only one of them can be -1 (all remaining devices)")
    fixed = math.prod(n for n in shape if n != -1)
    if -1 in shape and n_devices % fixed == 0:
        shape[shape.index(-1)] = n_devices // fixed
    if math.prod(shape) != n_devices:
        raise UserError(
            f"{requested}: {'a multiple of ' if -1 in shape else ''}{fixed} devices, and there are {n_devices}; their "
            f"product must be {n_devices}, and one may be -1 (all remaining devices)"
        )
    return tuple(shape)


def make_mesh(
    cfg: MeshConfig, devices: Sequence[jax.Device] | None = None, *, rows: int = 0, even_one: bool = False
) -> Mesh | None:
    """Returns the device mesh that `cfg` describes over `devices` (default: all devices), or None for a single device.

    Args:
        even_one: whether to return a mesh even for a single device. Arrays that are offloaded to host memory require a
            mesh, because the NamedSharding of an offloaded array sets the memory kind.
        rows: number of rows of a (micro-)batch, which must be divisible by `data` x `fsdp`. On a single host, a `data`
            or `fsdp` of -1 is reduced until `data` x `fsdp` divides the number of rows. After the reduction, some
            devices may stay idle.

    Raises:
        UserError: the sizes in `cfg` are invalid, as in `sizes`, or `data` x `fsdp` does not divide the number of rows.
    """
    if not isinstance(cfg, MeshConfig):
        raise UserError(f"make_mesh: expected a MeshConfig, such as MeshConfig(data=-1), got {type(cfg).__name__}")
    devices = jax.devices() if devices is None else list(devices)
    if even_one and devices[0].platform == "cpu" and jax.__version_info__ < (0, 8):
        raise UserError("optim.offload=true: before jax 0.8 a CPU has only one memory kind: leave it out")
    shape: tuple[int, ...] = sizes(cfg, len(devices))
    batch_shards = shape[0] * shape[1]
    if rows % batch_shards:
        one_host = len({device.process_index for device in devices}) == 1
        free = [i for i in (0, 1) if getattr(cfg, AXES[i]) == -1]
        if not (free and one_host):
            raise UserError(
                f"train.batch_size / train.accumulation ({rows} rows) must be divisible by mesh.data x mesh.fsdp "
                f"({batch_shards}): use {-(-rows // batch_shards) * batch_shards} rows, or another mesh"
            )
        others = batch_shards // shape[free[0]]
        largest = max((n for n in range(1, shape[free[0]] + 1) if rows % (n * others) == 0), default=0)
        if not largest:
            return make_mesh(dataclasses.replace(cfg, **{AXES[free[0]]: 1}), devices, rows=rows)  # raises
        shape = (*shape[: free[0]], largest, *shape[free[0] + 1 :])
        devices = devices[: math.prod(shape)]
    return None if len(devices) == 1 and not even_one else mesh_of(shape, devices)


def mesh_of(shape: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    """Returns a mesh of the given shape over devices, which may be abstract devices of
    `jax.experimental.topologies`."""
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu" or len({device.process_index for device in devices}) > 1:
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_device_mesh(tuple(shape), devices=list(devices), allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=types)
