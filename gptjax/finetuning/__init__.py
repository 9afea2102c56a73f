"""From a model that exists to one that does something: `finetune` puts data, adapter, loss and loop together."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path

from gptjax.config import Config
from gptjax.training.loop import TrainResult
from gptjax.types import UserError

__all__ = ["finetune"]


def finetune(cfg: Config, *, log: Callable[[str], None] | None = None) -> TrainResult:
    """What `gptjax finetune` does, for `cfg.task`; or go on where the run directory stands.

    Raises:
        UserError, Stopped: as `gptjax.train`.
    """
    if cfg.task == "pretrain":
        raise UserError("task=pretrain is no fine-tuning: use gptjax pretrain, or task=classify, instruct or prefer")
    run = importlib.import_module(f"gptjax.finetuning.{cfg.task}").run
    return run(cfg, log) if cfg.finetune.seeds == 1 else _several(cfg, run, log or print)


def _several(cfg: Config, run: Callable[..., TrainResult], say: Callable[[str], None]) -> TrainResult:
    """A run for each seed, then seeds.json: of every score of the test part the mean and a 95 % t interval."""
    import numpy as np
    from scipy import stats

    folder, found = Path(cfg.run_dir or "runs/default"), {}
    for seed in range(cfg.seed, cfg.seed + cfg.finetune.seeds):
        own = folder / f"seed-{seed}"
        once = dataclasses.replace(cfg.finetune, seeds=1)
        result = run(dataclasses.replace(cfg, seed=seed, run_dir=str(own), finetune=once), say)
        scores = json.loads((own / "test.json").read_text(encoding="utf-8"))
        found[seed] = {k: v for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    n, table = len(found), {}
    for name in found[cfg.seed]:
        values = [scores[name] for scores in found.values()]
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
        mean = sum(values) / n
        table[name] = {"mean": mean, "interval": [mean - half, mean + half], "values": values}
        say(f"seeds   {name:20} {mean:.4f}, 95 % interval {mean - half:.4f} to {mean + half:.4f}")
    (folder / "seeds.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return result
