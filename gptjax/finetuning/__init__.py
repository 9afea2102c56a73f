"""From a model that exists to one that does something: `finetune` puts data, adapter, loss and loop together."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.training.loop import TrainResult

__all__ = ["finetune", "refuse"]


def refuse(cfg: Config) -> bool:
    """What `finetune` refuses before any data is read; whether the run is finished already.

    Raises:
        UserError: all that it finds, at once.
    """
    if cfg.finetune.seeds == 1:
        from gptjax.finetuning.base import refuse_missing
        from gptjax.training.loop import refuse as refuse_run

        return refuse_run(cfg, refuse_missing)
    from gptjax.finetuning.seeds import refuse as refuse_seeds

    return refuse_seeds(cfg)


def finetune(cfg: Config, *, log: Callable[[str], None] | None = None) -> TrainResult:
    """What `gptjax finetune` does, for `cfg.task`; or go on where the run directory stands.

    Raises:
        UserError, Stopped: as `gptjax.train`.
    """
    if cfg.task == "pretrain":
        raise UserError("task=pretrain is no fine-tuning: use gptjax pretrain, or task=classify, instruct or prefer")
    task = importlib.import_module(f"gptjax.finetuning.{cfg.task}")
    if cfg.finetune.seeds == 1:
        return task.run(cfg, log)
    from gptjax.finetuning.seeds import several

    return several(cfg, task, log or print)
