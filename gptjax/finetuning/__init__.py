"""From a model that exists to one that does something: `finetune` puts data, adapter, loss and loop together."""

from __future__ import annotations

from collections.abc import Callable

from gptjax.config import Config
from gptjax.training.loop import TrainResult
from gptjax.types import UserError

__all__ = ["finetune"]


def finetune(cfg: Config, *, log: Callable[[str], None] | None = None) -> TrainResult:
    """What `gptjax finetune` does, for `cfg.task`; or go on where the run directory stands.

    Raises:
        UserError, Stopped: as `gptjax.train`.
    """
    if cfg.task == "classify":
        from gptjax.finetuning import classify

        return classify.run(cfg, log)
    if cfg.task == "instruct":
        from gptjax.finetuning import instruct

        return instruct.run(cfg, log)
    raise UserError(f"task={cfg.task} is no fine-tuning: use gptjax pretrain, or task=classify or instruct")
