"""This module lists TPU slices by name, and creates abstract devices for which programs can be compiled without a
TPU."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from gptjax.errors import UserError, did_you_mean
from gptjax.training.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

# ENVIRONMENT holds environment variables with TPU metadata. Without the variables in ENVIRONMENT, libtpu queries the
# network for the TPU metadata until the query times out.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip

# _FLAT and _CUBES map the number of chips of a slice to the topology of the slice. For v5e and v6e, the number in the
# name of a slice is the number of chips. For v4 and v5p, the number in the name of a slice is the number of
# TensorCores. Because a v4 or v5p chip has two TensorCores, a v5p-128 has 64 chips. Source of the topologies:
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip
SLICES: dict[str, str] = {
    **{f"{kind}-{n}": f"{kind}:{shape}" for kind in ("v5e", "v6e") for n, shape in _FLAT.items()},
    **{f"{kind}-{2 * n}": f"{kind}:{shape}" for kind in ("v5p", "v4") for n, shape in _CUBES.items()},
}


class Slice(NamedTuple):
    name: str
    topology: str  # `topology` is the topology in the notation of libtpu, such as v5e:2x4.
    chip: Chip
    n_chips: int


def slice_of(name: str) -> Slice:
    """Returns the TPU slice for a name in `SLICES`, such as v5e-8, or for a topology, such as v5p:4x4x8.

    Raises:
        UserError: no TPU slice has this name or topology.
    """
    wanted = name.lower().replace("litepod", "e").replace("trillium", "v6e")
    topology = SLICES.get(wanted, wanted)
    match = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})", topology)
    if match is None:
        kinds = (
            "v5e-1 to v5e-256, v6e-1 to v6e-256 (chips)",
            "v5p-8 to v5p-8192, v4-8 to v4-8192 (TensorCores, two per chip)",
        )
        raise UserError(
            f"--on {name}: no such TPU slice{did_you_mean(wanted, list(SLICES))}; choose {', '.join(kinds)}, "
            "in powers of two, or a topology such as v5p:4x4x8"
        )
    n_chips = 1
    for size in match[2].split("x"):
        n_chips *= int(size)
    return Slice(name, topology, CHIPS[match[1]], n_chips)


def devices_of(on: Slice) -> Sequence[jax.Device]:
    """Returns one abstract device per device of the TPU slice, for which programs can be compiled without a TPU.

    Raises:
        UserError: the TPU compiler is not installed or does not support the slice.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(
            "plan needs the TPU compiler (libtpu; no TPU is needed): pip install -e '.[tpu-plan]' in the checkout"
        ) from error
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": [1, 1, 1]} if on.n_chips == 1 else {}
    try:
        return topologies.get_topology_desc(on.topology, platform="tpu", **bounds).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--on {on.name}: the TPU compiler does not support {on.topology}: {reason}") from error
