"""Training speed compared with PyTorch, which runs a copy of nanoGPT's model and training loop.

    python tests/bench/train.py                       all three shapes, f32 and bf16, 3 rounds
    python tests/bench/train.py --shape iii --rounds 1
    python tests/bench/train.py --sides torch-float32 products-float32    upper bound of any XLA program

Needs `pip install -e '.[bench]'`. Every measurement runs in a process of its own. The libraries alternate (torch,
gptjax, torch, ...), so that changes in the state of the machine affect both, and the ratio is computed per round.
Prints tokens/s from the median step after a warm-up, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from gptjax.training.process import ask_for_huge_pages

#          layers heads width context batch vocabulary steps steps_per_call
SHAPES = {
    "i": (4, 4, 128, 64, 12, 65, 200, 10),
    "ii": (6, 6, 384, 256, 16, 65, 12, 4),
    "iii": (12, 12, 768, 512, 2, 50257, 6, 1),
}
SIDES = ("torch-float32", "gptjax-float32", "torch-bfloat16", "gptjax-bfloat16", "products-float32")


def torch_trainer(shape: tuple, dtype: str = "float32", device: str = "cpu"):
    """nanoGPT's model and loop: fused qkv, flash attention, tied head, gradient clipping, AdamW with two groups.

    Eager on a CPU; on "cuda" with torch.compile, fused AdamW and TF32 matrix products, as in nanoGPT.

    Returns:
        step(windows [B, T + 1], lr) -> loss, and evaluate(windows) -> loss.
    """
    import math

    import torch
    from torch import nn
    from torch.nn import functional as F

    L, N, D, context, _, V, _, _ = shape

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (a.view(B, T, N, D // N).transpose(1, 2) for a in self.qkv(self.ln_1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.ln_2(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(context, D)
            self.blocks = nn.Sequential(*[Block() for _ in range(L)])
            self.ln_f, self.head = nn.LayerNorm(D, bias=False), nn.Linear(D, V, bias=False)
            self.head.weight = self.wte.weight
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * L) if "out." in name or "down." in name else 0.02)

        def forward(self, x, y):
            h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
            logits = self.head(self.ln_f(self.blocks(h)))
            return F.cross_entropy(logits.view(-1, V), y.reshape(-1))

    torch.manual_seed(0)
    fast = device == "cuda"
    if fast:
        torch.set_float32_matmul_precision("high")
    model = Model().to(device)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.99),
        fused=fast,
    )
    if fast:
        model = torch.compile(model)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step(windows, lr=1e-3):
        data = torch.from_numpy(windows).long().to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast:
            loss = model(data[:, :-1], data[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(windows):
        data = torch.from_numpy(windows).long().to(device)
        return model(data[:, :-1], data[:, 1:]).item()

    return step, evaluate


def torch_steps(shape: tuple, dtype: str):
    step, _ = torch_trainer(shape, dtype)
    rng = np.random.default_rng(0)
    _, _, _, T, B, V, _, _ = shape
    return lambda: step(rng.integers(0, V, (B, T + 1))), 1


def gptjax_steps(shape: tuple, dtype: str):
    """The training step of `gptjax pretrain`: the same model, clipping and AdamW, several steps per call."""
    import jax

    from gptjax.config import ModelConfig, OptimConfig
    from gptjax.losses import next_token
    from gptjax.model.gpt import init_params
    from gptjax.optim import make_optimizer
    from gptjax.training.process import keep_buffers
    from gptjax.training.step import TrainState, make_multi_step, make_train_step
    from gptjax.types import Batch

    keep_buffers()
    L, N, D, T, B, V, _, K = shape
    cfg = ModelConfig(
        vocab_size=V, context_length=T, n_layer=L, n_head=N, d_model=D, qkv_bias=False, bias=False, norm_bias=False,
        dtype=dtype,
    )  # fmt: skip
    loss = next_token(cfg)
    tx = make_optimizer(OptimConfig(beta2=0.99), 1000)
    state = TrainState.create(
        jax.jit(init_params, static_argnums=1)(jax.random.key(0), cfg), tx=tx, key=jax.random.key(1)
    )
    steps = jax.jit(make_multi_step(make_train_step(loss, tx)), donate_argnums=0)
    rng = np.random.default_rng(0)

    def call():
        nonlocal state
        data = rng.integers(0, V, (K, B, T + 1), dtype=np.int32)
        state, metrics = steps(state, Batch(data[..., :-1], data[..., 1:]))
        return float(metrics["loss"][-1])

    return call, K


def products_s(L: int, D: int, V: int, tokens: int, frozen: bool = False) -> float:
    """Time of a step's float32 matrix products with weights, measured one by one in XLA, in seconds.

    A lower bound of the time of a step in XLA: attention and everything that is not a product are not included.
    `frozen`: without the gradients of the weights.
    """
    import jax

    kernels = [*[(D, D)] * 4, (D, 4 * D), (4 * D, D)] * L + [(D, V)]
    sizes = Counter(
        size for i, o in kernels for size in ((tokens, i, o), (tokens, o, i), (i, tokens, o))[: 2 if frozen else 3]
    )
    multiply = jax.jit(jax.numpy.matmul)
    total = 0.0
    for (m, k, n), count in sizes.items():
        a, b = jax.numpy.ones((m, k)), jax.numpy.ones((k, n))
        times = []
        for _ in range(6):
            started = time.perf_counter()
            multiply(a, b).block_until_ready()
            times.append(time.perf_counter() - started)
        total += count * min(times)
    return total


def cell(side: str, shape: tuple) -> dict:
    library, dtype = side.split("-")
    if library == "products":
        L, _, D, T, B, V, _, _ = shape
        seconds = products_s(L, D, V, B * T)
        return dict(step_ms=1000 * seconds, tokens_per_s=shape[3] * shape[4] / seconds, first_call_s=0, rss_mib=0)
    call, k = {"torch": torch_steps, "gptjax": gptjax_steps}[library](shape, dtype)
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    times = []
    for _ in range(1 + shape[6] // k):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) / k)
    step_s = statistics.median(times[1:])
    return dict(
        step_ms=1000 * step_s,
        tokens_per_s=shape[3] * shape[4] / step_s,
        first_call_s=first,
        rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps per measurement; default: as in SHAPES")
    parser.add_argument(
        "--limit", type=float, default=600, help="time limit per measurement in seconds (bfloat16 may be emulated)"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:4])
    parser.add_argument("--cell", choices=SIDES, help="run one measurement in this process and print JSON")
    args = parser.parse_args()
    if args.cell:
        *shape, steps, steps_per_call = SHAPES[args.shape]
        print(json.dumps(cell(args.cell, (*shape, args.steps or steps, steps_per_call))))
        return
    for shape in SHAPES if args.shape == "all" else [args.shape]:
        results: dict[str, list[dict]] = {side: [] for side in args.sides}
        for _ in range(args.rounds):
            for side in args.sides:
                if side not in results:
                    continue
                command = [sys.executable, __file__, "--cell", side, "--shape", shape]
                command += ["--steps", str(args.steps)] if args.steps else []
                try:
                    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=args.limit)
                except subprocess.TimeoutExpired:
                    del results[side]
                    print(f"shape ({shape}): {side} stopped after {args.limit} s", flush=True)
                    continue
                results[side].append(json.loads(run.stdout.splitlines()[-1]))
        print(f"shape ({shape}): L, N, D, T, B, V = {SHAPES[shape][:6]}, {args.rounds} rounds, median")
        for side, rows in results.items():
            median = {key: statistics.median(r[key] for r in rows) for key in rows[0]}
            line = f"  {side:16} {median['step_ms']:9.1f} ms {median['tokens_per_s']:9.0f} tok/s"
            line += f" {median['rss_mib']:7.0f} MiB, first call {median['first_call_s']:.1f} s"
            peer = results.get("torch-" + side.split("-")[1])
            if not side.startswith("torch") and peer:
                ratios = [r["tokens_per_s"] / p["tokens_per_s"] for r, p in zip(rows, peer, strict=True)]
                line += f", x torch: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    ask_for_huge_pages()  # inherited by the processes of both libraries
    main()
