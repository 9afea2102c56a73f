"""This package implements data, tensor and context parallelism and FSDP on a device mesh.

Sharding rules map patterns of parameter paths to the mesh axes that shard each array. The model, the losses and the
training step are the same functions with and without a mesh, because functions such as `gptjax.ops.device.constrain`
return their argument unchanged if there is no mesh.
"""

from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.rules import RULES, batch_shardings, cache_shardings, shardings, spec_of
from gptjax.parallel.step import (
    abstract_on,
    init_on,
    jit_on,
    jit_step,
    on_mesh,
    place,
    place_batch,
    place_params,
    pmap_step,
)

__all__ = [
    "RULES", "abstract_on", "batch_shardings", "cache_shardings", "init_on", "jit_on", "jit_step", "make_mesh",
    "on_mesh", "place", "place_batch", "place_params", "pmap_step", "shardings", "spec_of",
]  # fmt: skip
