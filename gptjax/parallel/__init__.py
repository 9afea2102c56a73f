"""Data, tensor and context parallelism and FSDP on a device mesh, with arrays sharded by rules over parameter paths.

The model, the losses and the training step are the same functions with and without a mesh: without a mesh, functions
such as `gptjax.ops.device.constrain` do nothing.
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
