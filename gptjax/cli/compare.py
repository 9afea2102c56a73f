"""`gptjax compare RUN [RUN ...]`: compares the answers of several runs to the same questions. `gptjax compare` prints
metrics of the answers, and writes a table of the answers of all runs to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptjax.cli.options import note
from gptjax.errors import UserError, did_you_mean
from gptjax.files import new_file, write_text

COLUMNS = {
    "n": "answers", "exact": "exact", "normalised": "normalised", "token_f1": "token F1",
    "nats_per_token": "nats/token", "constraints": "constraints", "all_constraints": "all met",
    "judge": "judge", "win_rate": "win rate",
}  # fmt: skip
SETTINGS = ("out", "judge", "judge_model")
USAGE = "expected: gptjax compare RUN [RUN ...] [out=TABLE.md] [judge=URL judge_model=NAME]"


def run(args: list[str]) -> int:
    settings = {
        name: value for name, is_set, value in (arg.partition("=") for arg in args) if name in SETTINGS and is_set
    }
    sources = [arg for arg in args if "=" not in arg or arg.partition("=")[0] not in settings]
    out = Path(settings["out"]) if "out" in settings else None
    for name, is_set, _ in (arg.partition("=") for arg in sources if not Path(arg).exists()):
        if is_set:
            raise UserError(f"unknown setting {name}{did_you_mean(name, SETTINGS)}; {USAGE}")
    if not sources or any(arg.startswith("-") for arg in sources):
        raise UserError(USAGE)
    if bool(settings.get("judge")) != bool(settings.get("judge_model")):
        raise UserError(f"judge=URL and judge_model=NAME go together; {USAGE}")
    if out is not None:
        new_file(out)
    from gptjax.evaluation.generation_metrics import read, scores, side_by_side, win_rate
    from gptjax.evaluation.judge import judge

    runs = [read(str(_file(source))) for source in sources]
    results: list[dict[str, Any]] = []
    for i, rows in enumerate(runs):
        metrics = scores(rows)
        if i and "nats_per_token" in metrics and "nats_per_token" in results[0]:
            metrics["win_rate"] = win_rate(rows, runs[0])["win_rate"]
        results.append(metrics)
    # The judge model is called after all other metrics are computed, because calls of the judge model may cost money,
    # and computing the other metrics may fail.
    for metrics, rows in zip(results, runs if settings.get("judge") else (), strict=False):
        verdicts = judge(rows, settings["judge"], settings["judge_model"], log=note)
        if valid := [score for score in verdicts if score is not None]:
            metrics["judge"] = sum(valid) / len(valid)
    keys = [key for key in COLUMNS if any(key in metrics for metrics in results)]
    width = max(map(len, sources))
    print(" " * width, *(f"{COLUMNS[key]:>12}" for key in keys))
    for source, metrics in zip(sources, results, strict=True):
        cells = (
            "" if key not in metrics else f"{metrics[key]:d}" if key == "n" else f"{metrics[key]:.3f}" for key in keys
        )
        print(f"{source:{width}}", *(f"{cell:>12}" for cell in cells))
    if out is not None:
        write_text(out, side_by_side(sources, runs))
        print(f"answers side by side: {out}")
    return 0


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    from gptjax.tasks.instruct import RESPONSES

    if not (path / RESPONSES).is_file():
        raise UserError(f"{source} holds no {RESPONSES}: gptjax finetune instruct writes it")
    return path / RESPONSES
