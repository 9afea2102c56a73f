"""Scale of LoRA by rank: rsLoRA (alpha / sqrt(r), arXiv:2312.03732) against alpha / r, on the synthetic skills.

    python tests/bench/lora.py [--base MODEL] [--ranks 16 32 64] [--seeds 3] [--lr 2e-3] [--out DIR] [SETTING=VALUE ..]

Each row is one `gptjax finetune instruct` of the preset's settings with --seeds random seeds. Prints a Markdown table
with the exact answers to the held-out questions and the loss per response token: mean over the seeds, and 95 % t
interval. Both formulas have the scale --scale at rank --equal-at, so that at other ranks they differ by how the scale
depends on the rank only. A larger learning rate can make up for a small scale; give several to --lr to compare each
formula at its best.

The run directories are kept in --out; a second call with the same arguments reads the finished ones. Settings are
passed to every run, such as train.max_steps=100. Without --base the base model is that of the preset,
smollm2-135m-instruct, and each run takes about 15 minutes on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from gptjax import load_config, tasks

FORMULAS = {"alpha/r": 1.0, "alpha/sqrt(r)": 0.5}  # lora.scaling: power of r by which alpha is divided


def measure(args: argparse.Namespace, formula: str, rank: int, lr: float) -> dict:
    """Trains one row of the table, or reads it if it is finished. Returns the contents of seeds.json."""
    folder = Path(args.out) / f"{formula.replace('/', '-over-')}-{rank}-{lr:g}"
    alpha = args.scale * args.equal_at ** FORMULAS[formula]
    cfg = load_config(
        "instruct", *([f"finetune.base={args.base}"] if args.base else []), *args.settings,
        f"lora.rank={rank}", f"lora.scaling={formula}", f"lora.alpha={alpha:g}", f"optim.lr={lr:g}",
        f"finetune.seeds={args.seeds}", "instruct.compare=false", f"run_dir={folder}",
    )  # fmt: skip
    tasks.train(cfg, log=lambda line: None)
    file = folder / ("seeds.json" if args.seeds > 1 else "test.json")
    scores = json.loads(file.read_text(encoding="utf-8"))
    return scores if args.seeds > 1 else {name: {"mean": x, "interval": (None, None)} for name, x in scores.items()}


def cell(row: dict, form: str) -> str:
    low, high = row["interval"]
    return form.format(row["mean"]) + ("" if low is None else f" ({form.format(low)} to {form.format(high)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="base model (default: that of the preset)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--equal-at", type=int, default=16, help="rank at which both formulas have the scale --scale")
    parser.add_argument("--out", default="runs/bench-lora")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    args = parser.parse_args()
    print("| rank | lora.scaling | scale | optim.lr | exact answers | loss per response token |")
    print("|---|---|---|---|---|---|")
    for rank in args.ranks:
        for formula in FORMULAS:
            for lr in args.lr:
                scores = measure(args, formula, rank, lr)
                scale = args.scale * (args.equal_at / rank) ** FORMULAS[formula]
                exact, loss = cell(scores["exact"], "{:.1%}"), cell(scores["nats_per_token"], "{:.3f}")
                print(f"| {rank} | {formula} | {scale:.3g} | {lr:g} | {exact} | {loss} |", flush=True)


if __name__ == "__main__":
    main()
