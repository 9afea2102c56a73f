"""`gptjax finetune TASK`: tune a model; `gptjax classify RUN "TEXT"`: use one."""

from __future__ import annotations

import importlib

from gptjax.cli import options
from gptjax.config import Config, resolve
from gptjax.config_io import Leaf, did_you_mean
from gptjax.types import UserError

TASKS = ("classify", "instruct", "prefer")
GROUPS = ("", "finetune", "lora", *TASKS, "optim", "train", "sample", "model")


def run_finetune(args: list[str]) -> int:
    parsed = options.parse(args, words=2)
    task, *rest = parsed.words or [""]
    if task not in TASKS:
        raise UserError(f"finetune {task or 'what'}: expected one of {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    source = rest[0] if rest else task
    cfg, provenance = resolve(source, leaves=parsed.leaves, under=[Leaf("task", task, f"gptjax finetune {task}")])
    if cfg.task != task:
        verb = "pretrain" if cfg.task == "pretrain" else f"finetune {cfg.task}"
        raise UserError(f"{source} is for task={cfg.task}: gptjax {verb} {source}")
    if options.show_only(parsed, cfg, provenance, report):
        return 0
    from gptjax.finetuning import finetune

    return finetune(cfg).exit_code


def run_classify(args: list[str]) -> int:
    folder, *texts = args or [""]
    if not folder or not texts:
        raise UserError('expected: gptjax classify RUN "TEXT" ["TEXT" ...]')
    from gptjax.finetuning.classify import classify_texts

    for text, row in zip(texts, classify_texts(folder, texts), strict=True):
        best = max(row, key=row.get)
        others = ", ".join(f"{name} {p:.1%}" for name, p in row.items() if name != best)
        print(f"{best} {row[best]:.1%} ({others})  {text if len(text) <= 60 else text[:57] + '...'}")
    return 0


def more_help() -> str:
    settings = options.settings_help(GROUPS)
    return f"Without a preset it is the one named like the task. Settings, with their defaults:\n\n{settings}"


def report(cfg: Config) -> list[str]:
    """What a run would do and need: data and base are looked at, no tensor is read."""
    plan = importlib.import_module(f"gptjax.finetuning.{cfg.task}").plan
    return [f"run directory      {cfg.run_dir}", *plan(cfg), "dry run: no step was taken"]
