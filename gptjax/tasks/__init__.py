"""The training tasks. Each task is one module with these functions:

prepare(cfg, progress) -> Ready         reads data and base; returns the resolved config, the `Task` and the test data
evaluate(result, held_out, say)         scores the trained model on the test data; None: read it again
refuse_missing(cfg)                     raises UserError if data or base do not exist; downloads nothing
loss(cfg) -> (params, batch, key) -> (Mean, metrics)
batch_shapes(cfg, rows, width)          shapes of a batch, for `gptjax plan`
plan(cfg) -> lines                      summary of a fine-tuning, for --dry-run

To add a task, write such a module, add it to `TASKS`, and add the dataclass of its settings to `Config`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from gptjax.config import Config
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.training.run import Hook, TrainResult

__all__ = ["TASKS", "find", "finetune", "refuse", "train"]

TASKS = {name: f"gptjax.tasks.{name}" for name in ("pretrain", "classify", "instruct", "prefer")}


def find(name: str) -> ModuleType:
    """The module of a task."""
    return importlib.import_module(TASKS[name])


def train(cfg: Config, *, log: Callable[[str], None] | None = None, hooks: Sequence[Hook] = ()) -> TrainResult:
    """Train a model by `cfg`, or resume the run in its run directory (train.resume=auto).

    If the run is finished already, its result is returned. A resumed run is bitwise equal to an uninterrupted one on
    the same versions and devices.

    Args:
        log: gets each line that would be printed.
        hooks: pairs (every, fn): fn(run) is called every `every` steps and after the last step. `run` is a
            `training.run.Run`, with the state, step, counters, config and run directory.

    Raises:
        UserError: invalid config or data, a run directory of another run, no readable checkpoint, or a full disk.
        Stopped: (a SystemExit) Ctrl-C or SIGTERM, after a checkpoint is saved; or train.max_nonfinite consecutive
            steps with a loss or gradient that is not finite.
    """
    if cfg.task != "pretrain" and cfg.finetune.seeds > 1:
        from gptjax.tasks.seeds import over_seeds

        return over_seeds(cfg, log or print, hooks)
    from gptjax.parallel.distributed import is_writer
    from gptjax.training.loop import run_task

    task = find(cfg.task)
    result, held_out = run_task(cfg, task.prepare, log, task.refuse_missing, hooks)
    if is_writer():
        task.evaluate(result, held_out, log or print)
    return result


def finetune(cfg: Config, *, log: Callable[[str], None] | None = None, hooks: Sequence[Hook] = ()) -> TrainResult:
    """`train` for all tasks except pretraining."""
    if cfg.task == "pretrain":
        raise UserError("task=pretrain is not fine-tuning: use gptjax pretrain, or task=classify, instruct or prefer")
    return train(cfg, log=log, hooks=hooks)


def refuse(cfg: Config) -> bool:
    """Run the checks of `train` that need no data. Returns whether the run is finished already.

    Raises:
        UserError: lists all problems.
    """
    if cfg.task != "pretrain" and cfg.finetune.seeds > 1:
        from gptjax.tasks.seeds import refuse as refuse_seeds

        return refuse_seeds(cfg)
    from gptjax.training.resume import refuse as refuse_run

    return refuse_run(cfg, find(cfg.task).refuse_missing)


def __getattr__(name: str) -> ModuleType:
    if name in TASKS:
        return find(name)
    raise AttributeError(f"module 'gptjax.tasks' has no attribute {name!r}; it has {', '.join(TASKS)}")
