"""Speed of training N LoRA adapters of one base in one vmapped program, compared with training one after another.

    python tests/bench/adapters.py [--shapes tiny small base] [--n 16] [--rounds 3]

Both train on the same batches and are measured alternately. Prints for each shape and batch: milliseconds per step of
all N adapters, vmapped and sequential, and the ratio (median, minimum, maximum). The last column is the ratio for whole
runs of --run-steps steps, computed from the times to compile and per step: the vmapped program is compiled once, the
sequential one once per run, as by separate commands.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import gptjax
from gptjax.losses import next_token
from gptjax.optim import make_optimizer
from gptjax.tasks.many import Many, create, make_many_step
from gptjax.training.process import ask_for_huge_pages
from gptjax.types import Batch

SHAPES = {  # n_layer, d_model, vocab_size
    "tiny": (2, 64, 512),
    "small": (4, 256, 4096),
    "base": (12, 768, 50257),  # GPT-2 124M
}
BATCHES = ((1, 16), (1, 64), (4, 128))  # rows, tokens per row


def measure(shape: str, rows: int, length: int, n: int, rounds: int, steps: int) -> tuple[list, list, tuple]:
    layers, width, vocab = SHAPES[shape]
    cfg = gptjax.ModelConfig(
        n_layer=layers, n_head=max(1, width // 64), d_model=width, vocab_size=vocab, context_length=length
    )
    params = gptjax.init_params(jax.random.key(0), cfg)
    settings, loss = gptjax.LoraConfig(rank=8), next_token(cfg)
    tx = make_optimizer(gptjax.OptimConfig(lr=1e-3), 1000)
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    many = Many.of(rates=[1.0] * n, scales=[2.0] * n, ranks=[8] * n, seeds=range(n))
    step = jax.jit(make_many_step(loss, tx, settings), donate_argnums=0)

    groups = [many, *(jax.tree.map(lambda x, i=i: x[i : i + 1], many) for i in range(n))]
    states = [create(params, group, settings, tx) for group in groups]

    def run(which: slice) -> float:
        start = time.perf_counter()
        for i in range(len(groups))[which]:
            for _ in range(steps):
                states[i], _ = step(states[i], groups[i], params, batch)
        jax.block_until_ready(states)
        return (time.perf_counter() - start) / steps

    def compile_s(i: int) -> float:
        start = time.perf_counter()
        step.lower(states[i], groups[i], params, batch).compile()
        return time.perf_counter() - start

    compiled = compile_s(0), n * compile_s(1)
    vmapped, sequential = slice(0, 1), slice(1, None)
    run(vmapped), run(sequential)  # compile, not measured
    times = [(run(vmapped), run(sequential)) for _ in range(rounds)]
    return [a for a, _ in times], [b for _, b in times], compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "small"])
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--run-steps", type=int, default=200)
    args = parser.parse_args()
    print(f"{args.n} adapters of rank 8; ms per step of all: vmapped, sequential; ratio per step; ratio of whole runs")
    for shape in args.shapes:
        for rows, length in BATCHES:
            vmapped, sequential, compiled = measure(shape, rows, length, args.n, args.rounds, args.steps)
            ratios = sorted(b / a for a, b in zip(vmapped, sequential, strict=True))
            a, b = statistics.median(vmapped), statistics.median(sequential)
            runs = (compiled[1] + args.run_steps * b) / (compiled[0] + args.run_steps * a)
            print(
                f"{shape:6} {rows} x {length:4}  {a * 1e3:9.1f} {b * 1e3:9.1f}   {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f}-{ratios[-1]:.2f})   {runs:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    ask_for_huge_pages()
    main()
