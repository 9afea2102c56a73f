"""`gptjax finetune TASK`: one tuning of a model, or with --dry-run what it would be."""

from __future__ import annotations

from gptjax.cli import options
from gptjax.config import Config
from gptjax.config.uses import TUNINGS
from gptjax.errors import UserError, did_you_mean


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=2)
    task, *rest = parsed.words or [""]
    if task not in TUNINGS:
        raise UserError(f"finetune {task or 'what'}: expected one of {', '.join(TUNINGS)}{did_you_mean(task, TUNINGS)}")
    cfg, provenance = options.configure(parsed._replace(words=rest), task, f"finetune {task}", task)
    if options.show_only(parsed, cfg, provenance, report):
        return 0
    from gptjax.tasks import finetune

    return finetune(cfg).exit_code


def more_help(args: list[str]) -> str:
    task = args[0] if args else ""
    if task not in TUNINGS:
        return f"`gptjax finetune TASK --help` lists the settings of a task: {', '.join(TUNINGS)}."
    return f"Without a preset it is {task}.\n\n{options.values_help(args[1:], task, task)}"


def report(cfg: Config) -> list[str]:
    """What a run would do and need: data and base are looked at, no tensor is read.

    Raises:
        UserError: what the run would refuse.
    """
    from gptjax.tasks import find, refuse

    if refuse(cfg):
        return [f"run directory      {cfg.run_dir} is finished: a run would do nothing", "dry run: no step was taken"]
    return [f"run directory      {cfg.run_dir}", *find(cfg.task).plan(cfg), "dry run: no step was taken"]
