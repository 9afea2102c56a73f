"""Traces and lowers programs with one changed field of ModelConfig for a GPU and a TPU; see `test_trace.py`."""

import pytest
import traced_dtypes
import traced_programs as programs
from traced_programs import Setting

CASES = programs.switch_cases()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "platform", "dtype", "uses"), CASES, ids=[" ".join(case[:3]) for case in CASES])
def test_a_switch(name, platform, dtype, uses):
    arch, switch = name.split(" ", 1)
    cfg = programs.switches(programs.model(arch, dtype=dtype))[switch]
    complaints = []
    for use in uses:
        program = programs.USES[use](cfg, Setting())
        traced = programs.trace(program, platform)
        programs.lower(traced, platform)
        lines = traced_dtypes.complaints(traced, cfg, program, rows=programs.ROWS, tokens=Setting().length)
        complaints += [f"{use}: {line}" for line in lines]
    assert not complaints, "\n".join(complaints)
