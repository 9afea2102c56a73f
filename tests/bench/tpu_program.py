"""Memory traffic and FLOPs of a TPU training step by kind of operation, compiled ahead of time without a TPU.

    python tests/bench/tpu_program.py                        GPT-2 124M on v5e-1, 1558M on v5e-8
    python tests/bench/tpu_program.py gpt2-124m --on v5e-1 [model.remat=dots ...]

Counts in the HLO text, with the body of a loop once per iteration: FLOPs of matrix products (without those in attention
kernels), bytes of HBM read and written, and number of executions. Then lists the largest results, and every transpose
and copy of at least 1/10 of the residual stream [rows x T x D] with the code that it comes from, which show the cost of
a bad layout.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from typing import Any

CELLS = (
    ("gpt2-124m", "v5e-1", ()),
    ("gpt2-1558m", "v5e-8", ("mesh.fsdp=8", "model.remat=full", "train.batch_size=64", "train.accumulation=1")),
)
MOVES = ("copy", "transpose", "copy-start")


def kind_of(instruction: Any, computations: dict) -> str:
    """Kind of an operation; for a fusion, that of the most expensive operation in it."""
    from gptjax.planning import hlo

    ops = {instruction.op}
    if instruction.op == "fusion":
        names = instruction.called("calls")
        ops = {inner.op for _, inner, _ in hlo.executed(computations, names[0])} - {"parameter", "constant", "bitcast"}
    if instruction.op == "custom-call":
        return "attention kernel" if hlo._is_kernel(instruction) else "room"
    if any(op.startswith(hlo.COLLECTIVES) for op in ops):
        return "collective"
    if ops & {"convolution", "dot"}:
        return "product"
    if ops <= {*MOVES, "copy-done", "reshape"}:
        return "copy or transpose"
    if ops & {"gather", "scatter"}:
        return "look up"
    if ops & {"reduce", "reduce-window"}:
        return "sum"
    if ops & {"dynamic-update-slice", "dynamic-slice", "slice", "slice-start"} and len(ops) < 4:
        return "slice"
    return "elementwise"


def origin(instruction: Any, computations: dict) -> str:
    """Origin in the JAX code: the end of its op_name; for a fusion without one, of an operation in it."""
    match = re.search(r'op_name="([^"]*)"', instruction.rest)
    if match is None and instruction.op == "fusion":
        inner = computations[instruction.called("calls")[0]].values()
        names = [m[1] for m in (re.search(r'op_name="([^"]*)"', i.rest) for i in inner) if m]
        return names[-1][-90:] if names else ""
    return match[1][-90:] if match else ""


def report(text: str, stream_bytes: int) -> list[str]:
    """The report as lines of text; `stream_bytes` is the size of the residual stream on one chip."""
    from gptjax.planning import hlo

    computations = hlo.parse(text)
    count: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    traffic: dict[str, float] = defaultdict(float)
    made, moved = [], []
    for home, instruction, times in hlo.executed(computations, into_fusions=False):
        if instruction.op in hlo._NO_WORK or instruction.op.endswith("-done"):
            continue
        kind = kind_of(instruction, computations)
        if kind == "room":
            continue
        count[kind] += times
        traffic[kind] += times * hlo._traffic(instruction, computations[home], computations)
        inner = [(home, instruction)]
        if instruction.op == "fusion":
            inner = [(place, i) for place, i, _ in hlo.executed(computations, instruction.called("calls")[0])]
        for place, i in inner:
            if i.op in ("convolution", "dot"):
                flops[kind] += times * hlo._product_flops(i, computations[place])
        size = max((a.size_bytes for a in instruction.results if a.in_hbm), default=0)
        what = " ".join(f"{a.dtype}{list(a.shape)}" for a in instruction.results[:1])
        line = f"{size / 2**20:9.1f} MiB x {times:<5g} {what:<28} {kind:<18} {origin(instruction, computations)}"
        made.append((size, line))
        if kind == "copy or transpose" and size * 10 >= stream_bytes:
            moved.append((size * times, line))
    lines = [f"  {'':<18}{'times':>9}{'TFLOP':>9}{'GB':>9}{'% of bytes':>12}"]
    whole = sum(traffic.values())
    for kind in sorted(traffic, key=traffic.get, reverse=True):
        lines.append(
            f"  {kind:<18}{count[kind]:>9,.0f}{flops[kind] / 1e12:>9.2f}{traffic[kind] / 1e9:>9.2f}"
            f"{traffic[kind] / whole:>12.1%}"
        )
    lines.append(f"  {'all':<18}{sum(count.values()):>9,.0f}{sum(flops.values()) / 1e12:>9.2f}{whole / 1e9:>9.2f}")
    unlike = list(dict.fromkeys(line for _, line in sorted(made, reverse=True)))
    lines += ["  largest results", *(f"  {line}" for line in unlike[:8])]
    lines.append(
        f"  transposes and copies of >= 1/10 of the residual stream ({stream_bytes / 2**20:.1f} MiB): {len(moved)}"
    )
    lines += [f"  {line}" for _, line in sorted(moved, reverse=True)[:20]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--on", default="v5e-1")
    parser.add_argument("--text", help="folder for the HLO text of the programs")
    args, overrides = parser.parse_known_args()
    from gptjax.planning.slices import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from gptjax.config import load_config
    from gptjax.planning.plan import plan

    for name, on, settings in [(args.config, args.on, ())] if args.config else CELLS:
        cfg = load_config(name, "model.vocab_size=50257", *settings, *overrides)
        texts: list[str] = []
        result = plan(cfg, on, keep_text=texts.append)
        print(
            f"{name} on {on}: {result.rows} rows, remat {result.remat}, accumulation {result.accumulation}", flush=True
        )
        if not texts:
            print(f"  does not fit: {result.needed_bytes / 2**30:.1f} GiB; {'; '.join(result.advice)}")
            continue
        if args.text:
            os.makedirs(args.text, exist_ok=True)
            with open(f"{args.text}/{name}-{on}.txt", "w") as file:
                file.write(texts[0])
        tokens = result.tokens // result.accumulation // result.chips
        size = 2 if cfg.model.dtype == "bfloat16" else 4
        print("\n".join(report(texts[0], tokens * cfg.model.d_model * size)), flush=True)


if __name__ == "__main__":
    main()
