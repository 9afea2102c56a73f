"""How a step grows from 8 to 4,096 chips of TPU v5p, compiled for them one by one: no TPU is needed.

    python tests/bench/scale.py [chips ...]

weak     one row of 2,048 tokens a chip, the weights over 8 chips (fsdp), as many copies as there are chips for
strong   4,096 rows a step whatever the chips: fewer chips take more micro-batches

A chip's memory is the compiler's; its FLOPs, and the bytes that it sends, are read from the program with its loops.
Each line is a process of its own: the compiler's own memory does not add up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

CHIPS = (8, 64, 512, 4096)
SHAPE = (
    "model.vocab_size=32768", "model.context_length=2048", "model.n_layer=8", "model.n_head=16", "model.n_kv_head=8",
    "model.d_model=2048", "model.d_ff=8192", "model.dtype=bfloat16", "model.remat=full",
)  # fmt: skip
ROWS = 4096  # of strong scaling


def one(chips: int, kind: str) -> dict:
    """The plan of one point, in this process."""
    from gptjax.config import load_config
    from gptjax.planning.plan import plan

    rows = chips if kind == "weak" else ROWS
    cfg = load_config(
        "tiny-llama", *SHAPE, f"train.batch_size={rows}", f"train.accumulation={rows // chips}", "mesh.fsdp=8",
        "mesh.data=-1",
    )  # fmt: skip
    return json.loads(plan(cfg, f"v5p-{2 * chips}").to_json())


def row(kind: str, chips: int, found: dict) -> str:
    sent = found["collectives"]
    kinds = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sorted(sent.items(), key=lambda item: -item[1]))
    return (
        f"{kind:<7}{chips:>6}{found['rows']:>7}{found['accumulation']:>6}{found['needed_bytes'] / 2**30:>10.2f}"
        f"{found['flops'] / 1e12:>12.3f}{sum(sent.values()) / 1e9:>10.2f}"
        f"{1e3 * found['roofline']['compute_s']:>12.1f}{1e3 * found['roofline']['ici_s']:>10.1f}"
        f"{found['compile_s']:>11.0f}   {kinds}"
    )


def main(chips: list[int]) -> None:
    print(
        f"{'':<7}{'chips':>6}{'rows':>7}{'micro':>6}{'GiB':>10}{'TFLOP':>12}{'GB sent':>10}{'ms compute':>12}"
        f"{'ms sent':>10}{'s compile':>11}   GB by kind; all but rows of one chip and step"
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
        print(json.dumps(one(int(sys.argv[2]), sys.argv[3])))
    else:
        main([int(n) for n in sys.argv[1:]] or list(CHIPS))
