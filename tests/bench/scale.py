"""Weak and strong scaling of a training step from 8 to 4,096 TPU v5p chips, compiled ahead of time without TPUs.

    python tests/bench/scale.py [chips ...]

weak     one row of 2,048 tokens per chip; fsdp over 8 chips, data parallel over the rest
strong   4,096 rows per step for any number of chips; fewer chips use more micro-batches

Memory per chip is reported by the compiler; FLOPs and bytes sent per chip are counted in the HLO text, loops included.
Each line is computed in a process of its own, so that the memory of the compiler is freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

CHIPS = (8, 64, 512, 4096)
SHAPE = (
    "model.vocab_size=32768", "model.context_length=2048", "model.n_layer=8", "model.n_head=16", "model.n_kv_head=8",
    "model.d_model=2048", "model.d_ff=8192", "model.dtype=bfloat16", "model.remat=full",
)  # fmt: skip
ROWS = 4096  # rows per step for strong scaling


def plan_for(chips: int, kind: str) -> dict:
    """The plan for one number of chips, as parsed JSON."""
    from gptjax.config import load_config
    from gptjax.planning.plan import plan

    rows = chips if kind == "weak" else ROWS
    cfg = load_config(
        "tiny-llama", *SHAPE, f"train.batch_size={rows}", f"train.accumulation={rows // chips}", "mesh.fsdp=8",
        "mesh.data=-1",
    )  # fmt: skip
    return json.loads(plan(cfg, f"v5p-{2 * chips}").to_json())


def row(kind: str, chips: int, plan: dict) -> str:
    sent = plan["collectives"]
    kinds = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sorted(sent.items(), key=lambda item: -item[1]))
    return (
        f"{kind:<7}{chips:>6}{plan['rows']:>7}{plan['accumulation']:>6}{plan['needed_bytes'] / 2**30:>10.2f}"
        f"{plan['flops'] / 1e12:>12.3f}{sum(sent.values()) / 1e9:>10.2f}"
        f"{1e3 * plan['roofline']['compute_s']:>12.1f}{1e3 * plan['roofline']['ici_s']:>10.1f}"
        f"{plan['compile_s']:>11.0f}   {kinds}"
    )


def main(chips: list[int]) -> None:
    print(
        f"{'':<7}{'chips':>6}{'rows':>7}{'micro':>6}{'GiB':>10}{'TFLOP':>12}{'GB sent':>10}{'ms compute':>12}"
        f"{'ms sent':>10}{'s compile':>11}   GB by kind; per chip and step, except rows"
    )
    for kind in ("weak", "strong"):
        for n in chips:
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(n), kind], capture_output=True, text=True, check=True
            )
            print(row(kind, n, json.loads(done.stdout)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
        print(json.dumps(plan_for(int(sys.argv[2]), sys.argv[3])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("chips", nargs="*", type=int, default=list(CHIPS))
        main(parser.parse_args().chips)
