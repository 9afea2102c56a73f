"""Hyperparameter sweeps: many training runs are vmapped in one compiled program.

A sweep is a list of configs, with one config per run:

    configs = sweep.grid("tiny-gpt2", "optim.lr=[1e-3,3e-3,1e-2]", "seed=range(8)")     24 runs
    result  = sweep.sweep(configs)                          trains all runs together, with the same results as alone
    result.rows                                             one dict per run: its hyperparameters and losses
    sweep.table(result.rows, result.axes)                   one dict per combination: mean and interval over seeds
    result.state(5).params                                  params of run 5

The training step of `make_train_step` is vmapped over the runs of a sweep. The seed and the hyperparameters in `TRACED`
and `TRACED_OF_ADAPTERS` (learning rates, weight decay, warmup, clipping, dropout, an adapter's alpha and rank) are
passed to the compiled program as arrays with one element per run. Two runs can share a compiled program if they take
the same number of steps and their configs differ only in the seed and in the hyperparameters that are passed as arrays.
The runs of a sweep are divided into groups that can share a program, and one program is compiled per group. A compiled
program trains as many runs of the sweep at the same time as fit into device memory.
"""

from typing import Any

from gptjax._moved import moved_name
from gptjax.research.sweep.results import WRITING, draw, lines, write
from gptjax.research.sweep.runs import (
    MAX_PROBLEMS,
    MAX_RUNS,
    TRACED,
    TRACED_OF_ADAPTERS,
    Hyperparameters,
    axes_of,
    combinations,
    grid,
    programs,
    split_axes,
    traceable,
    with_hyperparameters,
)
from gptjax.research.sweep.train import (
    FINAL_FRACTION,
    INTEGERS,
    MAX_STEPS_PER_CALL,
    Sweep,
    bytes_per_run,
    chunks,
    create,
    free_bytes,
    make_sweep_loss,
    make_sweep_step,
    sweep,
    table,
)

__all__ = [
    "FINAL_FRACTION",
    "INTEGERS",
    "MAX_PROBLEMS",
    "MAX_RUNS",
    "MAX_STEPS_PER_CALL",
    "TRACED",
    "TRACED_OF_ADAPTERS",
    "WRITING",
    "Hyperparameters",
    "Sweep",
    "axes_of",
    "bytes_per_run",
    "chunks",
    "combinations",
    "create",
    "draw",
    "free_bytes",
    "grid",
    "lines",
    "make_sweep_loss",
    "make_sweep_step",
    "programs",
    "split_axes",
    "sweep",
    "table",
    "traceable",
    "with_hyperparameters",
    "write",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
