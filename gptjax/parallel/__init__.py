"""One program over many devices: a mesh by name, rules over paths, and nothing in the model, the losses or the loop."""

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
