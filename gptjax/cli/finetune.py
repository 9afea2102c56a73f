"""`gptjax finetune TASK`: fine-tunes a model, or with --dry-run prints a report of what the run would do."""

from __future__ import annotations

from gptjax.cli import options
from gptjax.config.uses import TUNINGS
from gptjax.errors import UserError, did_you_mean


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=2)
    task, *rest = parsed.words or [""]
    if task not in TUNINGS:
        problem = f"finetune {task}: no such task" if task else "finetune: no task is named"
        raise UserError(f"{problem}; expected one of {', '.join(TUNINGS)}{did_you_mean(task, TUNINGS)}")
    cfg, provenance = options.configure(parsed._replace(words=rest), task, f"finetune {task}", task)
    from gptjax.tasks import find, finetune

    if options.show_only(parsed, cfg, provenance, lambda cfg: options.report(cfg, find(task).plan)):
        return 0
    return finetune(cfg).exit_code
