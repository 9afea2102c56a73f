"""`gptjax compare RUN [RUN ...]`: the answers of runs to the same questions, in numbers and side by side."""

from __future__ import annotations

from pathlib import Path

from gptjax.types import UserError

COLUMNS = {
    "n": "answers", "exact": "exact", "normalised": "but case", "token_f1": "token F1",
    "nats_per_token": "loss a token", "constraints": "constraints", "all_constraints": "all of them",
    "win_rate": "likelier",
}  # fmt: skip


def run(args: list[str]) -> int:
    sources = [arg for arg in args if not arg.startswith("out=")]
    out = next((Path(arg.removeprefix("out=")) for arg in args if arg.startswith("out=")), None)
    if not sources or any(arg.startswith("-") for arg in sources):
        raise UserError("expected: gptjax compare RUN [RUN ...] [out=TABLE.md]")
    if out is not None and out.exists():
        raise UserError(f"out={out} exists already: name a new file")
    from gptjax.finetuning.answers import read, scores, side_by_side, win_rate

    runs = [read(str(_file(source))) for source in sources]
    found = []
    for i, rows in enumerate(runs):
        own = scores(rows)
        if i and "nats_per_token" in own and "nats_per_token" in found[0]:
            own["win_rate"] = win_rate(rows, runs[0])["win_rate"]
        found.append(own)
    keys = [key for key in COLUMNS if any(key in own for own in found)]
    width = max(map(len, sources))
    print(" " * width, *(f"{COLUMNS[key]:>12}" for key in keys))
    for source, own in zip(sources, found, strict=True):
        cells = ("" if key not in own else f"{own[key]:d}" if key == "n" else f"{own[key]:.3f}" for key in keys)
        print(f"{source:{width}}", *(f"{cell:>12}" for cell in cells))
    if out is not None:
        out.write_text(side_by_side(sources, runs), encoding="utf-8")
        print(f"side by side in {out}")
    return 0


def more_help() -> str:
    return (
        "RUN is the run directory of gptjax finetune instruct, or a .jsonl file of answers such as its\n"
        "responses-before.jsonl. likelier: how often the expected answer has a larger probability than in the first."
    )


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    from gptjax.finetuning.instruct import RESPONSES

    if not (path / RESPONSES).is_file():
        raise UserError(f"{source} holds no {RESPONSES}: gptjax finetune instruct writes it")
    return path / RESPONSES
