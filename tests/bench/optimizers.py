"""Switches of the optimizer and averages of the weights, each alone, on tiny-shakespeare.

    python tests/bench/optimizers.py [--steps 500] [--seeds 5] [--base adamw|muon] [a.b=c ...]
    python tests/bench/optimizers.py --base muon --switch optim.normuon=0.9 --switch "optim.normuon=0.95 optim.lr=1e-2"

Trains the preset `nanogpt-cpu` (AdamW) or `tiny-shakespeare-modern` (Muon) without a switch and with each switch, with
a model of 2 layers of width 64 (0.1 M parameters) unless a setting model.* is given. The seeds of a row are one vmapped
program. Prints one Markdown row per switch: the mean validation loss over the seeds; the mean difference to the run
with the same seed, and thus the same initialisation and batches, without the switch, with its 95 % t interval; and the
time of compilation, training and validation. Settings a.b=c apply to all rows. Learning rates are those of the presets,
so a switch that needs another one is not at its best.
"""

import argparse
import time
from collections.abc import Sequence

from gptjax.evaluation.intervals import t_interval
from gptjax.research import sweep
from gptjax.training.process import ask_for_huge_pages, keep_buffers

SIZE = ("model.n_layer=2", "model.d_model=64")
PRESETS = {"adamw": "nanogpt-cpu", "muon": "tiny-shakespeare-modern"}
BOTH = (
    "optim.cautious=true", "optim.cautious_decay=true", "optim.weight_decay_schedule=lr",
    "optim.weight_decay_schedule=linear", "optim.weight_decay_schedule=cosine", "train.ema=0.98",
    "train.average_last=0.1", "optim.schedule=constant", "optim.schedule=constant train.ema=0.98",
    "optim.schedule=constant train.average_last=0.1",
)  # fmt: skip
SWITCHES = {
    "adamw": BOTH,
    "muon": (
        "optim.normuon=0.95", "optim.nesterov=false", "optim.preconditioning=aol", "optim.preconditioning=schatten",
        "optim.muon_scale=width optim.lr=8e-3",  # the update of a [64, 64] matrix is as large as with rms
        *BOTH,
    ),
}  # fmt: skip


def losses(preset: str, settings: Sequence[str], seeds: int) -> list[float | None]:
    """The validation loss of each seed, or None if it is not finite."""
    result = sweep.sweep(sweep.grid(preset, *settings, f"seed=range({seeds})"), axes=["seed"])
    return [row["val/loss"] for row in result.rows]


def cells(values: Sequence[float | None], default: Sequence[float | None]) -> tuple[str, str]:
    """The mean of the values, and the mean and interval of their differences to `default`, as text."""
    pairs = [(a, b) for a, b in zip(values, default, strict=True) if a is not None and b is not None]
    if len(pairs) < len(values):
        return "not finite", ""
    mean, low, high = t_interval([a - b for a, b in pairs])
    interval = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
    return f"{sum(a for a, _ in pairs) / len(pairs):.4f}", f"{mean:+.4f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", choices=PRESETS, help="only this optimizer, instead of both")
    parser.add_argument("--switch", action="append", help="a row to print, instead of the built-in ones")
    args, more = parser.parse_known_args()
    size = () if any(setting.startswith("model.") for setting in more) else SIZE
    for base in [args.base] if args.base else PRESETS:
        common = (f"train.max_steps={args.steps}", f"optim.warmup_steps={args.steps // 20}", *size, *more)
        print(f"\n{PRESETS[base]}, {args.steps} steps, {args.seeds} seeds\n")
        print("| switch | validation loss | difference (95 % interval) | time |\n|---|---|---|---|", flush=True)
        default: list[float | None] = []
        for switch in ("", *(args.switch or SWITCHES[base])):
            began = time.perf_counter()
            values = losses(PRESETS[base], (*common, *switch.split()), args.seeds)
            default = default or values
            mean, difference = cells(values, default)
            seconds = time.perf_counter() - began
            print(f"| {switch or 'none'} | {mean} | {difference if switch else ''} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    ask_for_huge_pages()
    keep_buffers()
    main()
