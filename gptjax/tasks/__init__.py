"""What a model can be trained for. Each task is one file, with these functions:

prepare(cfg, progress) -> Ready         what the loop runs, the config as the data complete it, what is held out
evaluate(result, held_out, say)         scores the trained model on what is held out; None: read again
refuse_missing(cfg)                     raises UserError for data or a base that are not there; nothing is fetched
loss(cfg) -> (params, batch, key) -> (Mean, metrics)
batch_shapes(cfg, rows, width)          shapes of a batch, for plans
plan(cfg) -> lines                      what a fine-tuning would do, for --dry-run

A new task is such a file, its line in `TASKS`, and the dataclass of its settings in `Config`.
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
    """Train as `cfg` says, for `cfg.task`; or go on where the run directory stands (train.resume=auto).

    A run that is finished already is not trained again: its result is returned. Resumed is bitwise the same as
    uninterrupted, on the same versions and devices.

    Args:
        log: gets each line that would be printed.
        hooks: (every, fn): fn(run) is called after every so many steps and after the last, with the `training.run.Run`:
            its state, step, counters, config and run directory.

    Raises:
        UserError: bad config or data, a run directory of another run, no checkpoint that can be read, a full disk.
        Stopped: (a SystemExit) Ctrl-C or SIGTERM, after saving; or `max_nonfinite` steps without a finite loss.
    """
    if cfg.task != "pretrain" and cfg.finetune.seeds > 1:
        from gptjax.tasks.seeds import several

        return several(cfg, log or print, hooks)
    from gptjax.parallel.distributed import is_writer
    from gptjax.training.loop import run_task

    task = find(cfg.task)
    result, held_out = run_task(cfg, task.prepare, log, task.refuse_missing, hooks)
    if is_writer():
        task.evaluate(result, held_out, log or print)
    return result


def finetune(cfg: Config, *, log: Callable[[str], None] | None = None, hooks: Sequence[Hook] = ()) -> TrainResult:
    """`train`, of everything but pretraining."""
    if cfg.task == "pretrain":
        raise UserError("task=pretrain is no fine-tuning: use gptjax pretrain, or task=classify, instruct or prefer")
    return train(cfg, log=log, hooks=hooks)


def refuse(cfg: Config) -> bool:
    """What `train` refuses before any data is read; whether the run is finished already.

    Raises:
        UserError: all that it finds, at once.
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
