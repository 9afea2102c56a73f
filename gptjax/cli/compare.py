"""`gptjax compare RUN [RUN ...]`: the answers of runs to the same questions, in numbers and side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptjax.cli.options import note
from gptjax.errors import UserError, did_you_mean
from gptjax.files import new_file, write_text

COLUMNS = {
    "n": "answers", "exact": "exact", "normalised": "but case", "token_f1": "token F1",
    "nats_per_token": "loss a token", "constraints": "constraints", "all_constraints": "all of them",
    "judge": "judge", "win_rate": "likelier",
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
    found: list[dict[str, Any]] = []
    for i, rows in enumerate(runs):
        own = scores(rows)
        if i and "nats_per_token" in own and "nats_per_token" in found[0]:
            own["win_rate"] = win_rate(rows, runs[0])["win_rate"]
        found.append(own)
    for own, rows in zip(found, runs if settings.get("judge") else (), strict=False):  # last, as it may cost money
        given = judge(rows, settings["judge"], settings["judge_model"], log=note)
        if numbers := [score for score in given if score is not None]:
            own["judge"] = sum(numbers) / len(numbers)
    keys = [key for key in COLUMNS if any(key in own for own in found)]
    width = max(map(len, sources))
    print(" " * width, *(f"{COLUMNS[key]:>12}" for key in keys))
    for source, own in zip(sources, found, strict=True):
        cells = ("" if key not in own else f"{own[key]:d}" if key == "n" else f"{own[key]:.3f}" for key in keys)
        print(f"{source:{width}}", *(f"{cell:>12}" for cell in cells))
    if out is not None:
        write_text(out, side_by_side(sources, runs))
        print(f"side by side in {out}")
    return 0


def more_help(args: list[str]) -> str:
    return (
        "RUN is the run directory of gptjax finetune instruct, or a .jsonl file of answers such as its\n"
        "responses-before.jsonl. likelier: how often the expected answer has a larger probability than in the first.\n"
        "judge: the mean score, 0 to 100, that the model judge_model gives at judge=URL, any server of OpenAI's chat\n"
        "completions such as http://localhost:11434/v1; prompts and answers are sent there, with the key in\n"
        "OPENAI_API_KEY if that is set."
    )


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    from gptjax.tasks.instruct import RESPONSES

    if not (path / RESPONSES).is_file():
        raise UserError(f"{source} holds no {RESPONSES}: gptjax finetune instruct writes it")
    return path / RESPONSES
