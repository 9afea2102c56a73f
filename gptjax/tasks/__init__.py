"""The training tasks: pretraining and the fine-tuning tasks.

Each task is a Python module that defines the following functions:

    prepare(cfg, progress)            reads the data and the base model; returns a `Ready`, which holds the resolved
                                      config, the `Task` and the test data
    evaluate(result, held_out, say)   scores the trained model on the test data `held_out`; if `held_out` is None,
                                      reads the test data again
    refuse_missing(cfg)               raises UserError if the data or the base model do not exist; downloads nothing
    loss(cfg)                         returns the loss function, which takes (params, batch, key) and returns
                                      (`gptjax.types.Mean`, metrics)
    batch_shapes(cfg, rows, width)    returns the shapes of a batch, for `gptjax plan`
    plan(cfg)                         returns lines of text that summarise the run, for --dry-run; only fine-tuning
                                      tasks have this function

To add a task, write a module with the functions that the docstring of `gptjax.tasks` lists, add the module to `TASKS`,
and add the dataclass of the task's settings to `Config`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from gptjax.config import Config
from gptjax.config.uses import TUNINGS
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.training.run import Hook, TrainResult

__all__ = ["TASKS", "find", "finetune", "refuse", "train"]

TASKS = {name: f"gptjax.tasks.{name}" for name in ("pretrain", *TUNINGS)}


def find(name: str) -> ModuleType:
    """Imports and returns the module that defines the task `name`."""
    return importlib.import_module(TASKS[name])


def train(cfg: Config, *, log: Callable[[str], None] | None = None, hooks: Sequence[Hook] = ()) -> TrainResult:
    """Trains the model that `cfg` describes, or resumes the run in its run directory (train.resume=auto).

    If the run has finished already, the result of the finished run is returned. With the same versions and devices, a
    resumed run is bitwise equal to an uninterrupted run.

    Args:
        log: function that is called with each line of output, or None to print the lines.
        hooks: pairs (every, fn): fn(run) is called every `every` steps and after the last step. `run` is a
            `training.run.Run`, with the state, step, counters, config and run directory.

    Raises:
        UserError: the config or the data are invalid, the run directory holds another run, no checkpoint can be read,
            or the disk is full.
        Stopped: training ended early. The reason is Ctrl-C or SIGTERM, after which all finished steps are saved, or
            train.max_nonfinite consecutive steps with a loss or gradient that is not finite. `Stopped` is a SystemExit.
    """
    if cfg.task != "pretrain" and cfg.finetune.seeds > 1:
        from gptjax.tasks.seeds import over_seeds

        return over_seeds(cfg, log or print, hooks)
    from gptjax.parallel.distributed import is_writer
    from gptjax.training.loop import run_task

    task = find(cfg.task)
    result, held_out = run_task(cfg, task.prepare, log, task.refuse_missing, hooks)
    if cfg.task == "distill":
        result = result._replace(params=task.student(result.params))
    if is_writer():
        task.evaluate(result, held_out, log or print)
    return result


def finetune(cfg: Config, *, log: Callable[[str], None] | None = None, hooks: Sequence[Hook] = ()) -> TrainResult:
    """Fine-tunes the model that `cfg` describes: calls `train`, but refuses the task pretrain.

    Raises:
        UserError: the task is pretrain, or `train` raises a UserError.
    """
    if cfg.task == "pretrain":
        raise UserError(
            f"task=pretrain is not fine-tuning: use gptjax pretrain, or task={', '.join(TUNINGS[:-1])} or {TUNINGS[-1]}"
        )
    return train(cfg, log=log, hooks=hooks)


def refuse(cfg: Config) -> bool:
    """Runs those checks of `train` that need no data, and returns whether the run has finished already.

    Raises:
        UserError: at least one check failed; the message lists all problems.
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
