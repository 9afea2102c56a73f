"""The mesh: devices laid out along four axes, by name."""

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
    """data, fsdp, tensor, context; one that is -1 takes what the others leave.

    Raises:
        UserError: they do not make up `n_devices`, or two are -1.
    """
    found = [getattr(cfg, name) for name in AXES]
    asked = ", ".join(f"mesh.{name}={n}" for name, n in zip(AXES, found, strict=True))
    if found.count(-1) > 1:
        raise UserError(f"{asked}: only one of them can take what the others leave (-1)")
    rest = math.prod(n for n in found if n != -1)
    if -1 in found and n_devices % rest == 0:
        found[found.index(-1)] = n_devices // rest
    if math.prod(found) != n_devices:
        raise UserError(
            f"{asked}: {'a multiple of ' if -1 in found else ''}{rest} devices, and there are {n_devices}; their "
            f"product must be {n_devices}, and one may be -1 for what the others leave"
        )
    return tuple(found)


def make_mesh(
    cfg: MeshConfig, devices: Sequence[jax.Device] | None = None, *, rows: int = 0, even_one: bool = False
) -> Mesh | None:
    """The mesh that `cfg` asks for over all devices; None for one device alone, which needs none.

    Args:
        even_one: a mesh of one device too, for what names the memory it lies in.
        rows: of a (micro-)batch. `data` and `fsdp` must divide them; where one of the two is -1 it takes the most
            that do, and on a single host some devices may be left idle.

    Raises:
        UserError: see `sizes`; or rows that cannot be divided so.
    """
    if not isinstance(cfg, MeshConfig):
        raise UserError(f"make_mesh: expected a MeshConfig, such as MeshConfig(data=-1), got {type(cfg).__name__}")
    devices = jax.devices() if devices is None else list(devices)
    if even_one and devices[0].platform == "cpu" and jax.__version_info__ < (0, 8):
        raise UserError("optim.offload=true: before jax 0.8 a CPU has one kind of memory; leave it out here")
    shape: tuple[int, ...] = sizes(cfg, len(devices))
    by_rows = shape[0] * shape[1]
    if rows % by_rows:
        one_host = len({device.process_index for device in devices}) == 1
        free = [i for i in (0, 1) if getattr(cfg, AXES[i]) == -1]
        if not (free and one_host):
            raise UserError(
                f"train.batch_size / train.accumulation ({rows} rows) must be divisible by mesh.data x mesh.fsdp "
                f"({by_rows}): take {-(-rows // by_rows) * by_rows} rows, or other sizes of the mesh"
            )
        others = by_rows // shape[free[0]]
        most = max((n for n in range(1, shape[free[0]] + 1) if rows % (n * others) == 0), default=0)
        if not most:
            return make_mesh(dataclasses.replace(cfg, **{AXES[free[0]]: 1}), devices, rows=rows)  # says what is wrong
        shape = (*shape[: free[0]], most, *shape[free[0] + 1 :])
        devices = devices[: math.prod(shape)]
    return None if len(devices) == 1 and not even_one else mesh_of(shape, devices)


def mesh_of(shape: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    """Of any devices, those of a machine that is only described (`jax.experimental.topologies`) too."""
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu" or len({device.process_index for device in devices}) > 1:
        from jax.experimental import mesh_utils

        laid = mesh_utils.create_device_mesh(tuple(shape), devices=list(devices), allow_split_physical_axes=True)
    else:
        laid = np.asarray(devices).reshape(shape)
    return Mesh(laid, AXES, axis_types=types)
