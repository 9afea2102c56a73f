"""Traces programs for meshes of eight devices; `test_trace.py` runs this script in a process that has them.

`python eight.py all|some` prints JSON, {"programs": number of programs, "complaints": {program: [..]}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import traced_dtypes
import traced_programs as programs

from gptjax import parallel
from gptjax.ops.device import AXES
from gptjax.parallel.mesh import mesh_of

MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2))
USES = ("gradient", "cached step", "generate", "lora", "int8", "classify", "dpo")
ROWS = 8 * programs.ROWS  # the number of rows per device is a multiple of 11


def placed(arg: Any, mesh: jax.sharding.Mesh) -> Any:
    """The argument with shardings: parameters and adapters by the sharding rules, batches by row."""
    if isinstance(arg, dict):
        shardings = parallel.shardings(arg, mesh)
    elif jax.dtypes.issubdtype(getattr(arg, "dtype", None), jax.dtypes.prng_key):
        return arg
    else:
        shardings = parallel.batch_shardings(arg, mesh, context_length=programs.Setting().length)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arg, shardings)


def complaints(arch: str, dtype: str, use: str, platform: str, shape: tuple[int, ...]) -> list[str]:
    cfg, setting = programs.model(arch, dtype=dtype, vocab_size=128), programs.Setting(rows=ROWS)
    mesh = mesh_of(shape, jax.devices())
    program = programs.USES[use](cfg, setting)
    program = program._replace(args=tuple(placed(arg, mesh) for arg in program.args))
    with jax.set_mesh(mesh):
        traced = programs.trace(program, platform)
        programs.lower(traced, platform)
    return traced_dtypes.complaints(traced, cfg, program, rows=programs.ROWS, tokens=8 * setting.length)


def main(which: str) -> None:
    if which == "some":
        cases = [("llama", "bfloat16", "gradient", "tpu", (2, 2, 2, 1))]
    else:
        archs, dtypes = ("gpt2", "llama", "modern"), ("float32", "bfloat16")
        cases = [
            (a, d, u, p, s) for a in archs for d in dtypes for u in USES for p in programs.LOWERING for s in MESHES
        ]
    results = {" ".join(map(str, (*case, dict(zip(AXES, case[-1], strict=True))))): complaints(*case) for case in cases}
    print(json.dumps({"programs": len(cases), "complaints": {name: lines for name, lines in results.items() if lines}}))


if __name__ == "__main__":
    main(sys.argv[1])
