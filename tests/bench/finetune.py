"""Speed of a LoRA step compared with peft on PyTorch, and memory of LoRA, QLoRA and full fine-tuning.

    python tests/bench/finetune.py               tokens/s with GPT-2 124M, float32, 3 rounds
    python tests/bench/finetune.py --memory      peak memory: full and LoRA at 124M, LoRA and QLoRA at 355M
    python tests/bench/finetune.py --packing F   seconds per epoch on the conversations in F, padded and packed into
                                                 rows of 128, 256 and 512 tokens

Needs `pip install -e '.[parity]'`. Random weights; LoRA of rank 16 on every linear layer of the blocks, AdamW, batches
of 4 x 256 tokens. `products` measures only the matrix products with frozen weights, one by one in XLA. Every
measurement runs in a process of its own. The libraries alternate, so that changes in the state of the machine affect
both, and the ratio is computed per round. Prints tokens/s from the median step after the first, and the peak memory of
the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from gptjax.training.process import ask_for_huge_pages

SIZES = {"124M": dict(n_layer=12, n_head=12, d_model=768), "355M": dict(n_layer=24, n_head=16, d_model=1024)}
B, T, V, RANK, STEPS = 4, 256, 50257, 16, 5
SPEED = ("peft-124M", "lora-124M", "products-124M", "full-124M")
MEMORY = ("full-124M", "lora-124M", "full-355M", "lora-355M", "qlora-355M")


def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)


def peft_call(size: dict):
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import peft
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(n_layer=size["n_layer"], n_head=size["n_head"], n_embd=size["d_model"])
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data = torch.from_numpy(windows()).long()

    def call():
        loss = model(input_ids=data[:, :-1], labels=data[:, :-1]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def gptjax_call(kind: str, size: dict):
    import jax
    import optax

    import gptjax
    from gptjax import LoraConfig, lora
    from gptjax.losses import next_token
    from gptjax.training.process import keep_buffers
    from gptjax.types import Batch

    keep_buffers()
    cfg = gptjax.ModelConfig(vocab_size=V, **size)
    settings = LoraConfig(rank=RANK)
    key = jax.random.key(0)
    params = jax.jit(lambda key: gptjax.init_params(key, cfg))(key)
    if kind == "qlora":
        params = gptjax.quantize(params, "nf4")
    loss, tx = next_token(cfg, chunk=None if kind == "full" else 128), optax.adamw(1e-4)
    if kind == "full":
        state = gptjax.TrainState.create(params, tx=tx, key=key)
        step = gptjax.make_train_step(loss, tx)
    else:
        state = gptjax.TrainState.create(lora.init(key, params, settings), frozen=params, tx=tx, key=key)
        step = gptjax.make_train_step(loss, tx, combine=lambda a, base: lora.attach(base, a, settings))
    del params
    step = jax.jit(step, donate_argnums=0)
    data = windows()

    def call():
        nonlocal state
        state, metrics = step(state, Batch(data[:, :-1], data[:, 1:]))
        return float(metrics["loss"])

    return call


def packing(source: str, rounds: int) -> None:
    """Time of an epoch with LoRA on SmolLM2-135M for padded and packed rows, from the time per step."""
    import jax
    import optax

    import gptjax
    from gptjax import LoraConfig, lora, weights
    from gptjax.data import conversations
    from gptjax.data import packing as rows_of
    from gptjax.losses import next_token

    base = weights.open_model("smollm2-135m-instruct")
    params, cfg, settings = base.params("float32", None), base.cfg, LoraConfig(rank=RANK)
    encoded = conversations.encode(conversations.read(source), base.tokenizer(), context_length=512)
    longest = rows_of.padded(encoded)
    lengths = [length for length in (128, 256, 512) if length >= longest.tokens.shape[1]]
    kinds = {"padded": longest, **{f"packed-{length}": rows_of.packed(encoded, length) for length in lengths}}
    tx = optax.adamw(1e-4)
    adapter = lora.init(jax.random.key(0), params, settings)
    step = gptjax.make_train_step(
        next_token(cfg, chunk=256), tx, combine=lambda a, base: lora.attach(base, a, settings)
    )
    step = jax.jit(step)
    state = gptjax.TrainState.create(adapter, frozen=params, tx=tx, key=jax.random.key(1))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(rounds + 1):
        for kind, rows in kinds.items():
            size = max(1, 1024 // rows.tokens.shape[1])
            started = time.perf_counter()
            float(step(state, rows_of.batch(rows, i, batch_size=size, seed=0))[1]["loss"])
            seconds[kind].append((time.perf_counter() - started) * len(rows.tokens) / size)
    for kind, rows in kinds.items():
        full = (rows.segment_ids > 0).mean()
        n, T = rows.tokens.shape
        print(f"{kind:12} {n:5} rows of {T}, {full:.0%} full: {statistics.median(seconds[kind][1:]):.0f} s per epoch")
    for kind in list(kinds)[1:]:
        ratios = [a / b for a, b in zip(seconds["padded"][1:], seconds[kind][1:], strict=True)]
        print(f"{kind} is {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) times as fast")


def cell(name: str) -> dict:
    kind, size = name.split("-")
    if kind == "products":
        from train import products_s

        shape = SIZES[size]
        seconds = products_s(shape["n_layer"], shape["d_model"], V, B * T, frozen=True)
        return dict(tokens_per_s=B * T / seconds, rss_mib=0)
    call = peft_call(SIZES[size]) if kind == "peft" else gptjax_call(kind, SIZES[size])
    call()
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(tokens_per_s=B * T / statistics.median(times), rss_mib=rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--packing", metavar="FILE")
    parser.add_argument(
        "--cell", choices=sorted({*SPEED, *MEMORY}), help="run one measurement in this process and print JSON"
    )
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.cell)))
        return
    if args.packing:
        packing(args.packing, args.rounds)
        return
    names = MEMORY if args.memory else SPEED
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(1 if args.memory else args.rounds):
        for name in names:
            run = subprocess.run(
                [sys.executable, __file__, "--cell", name], check=True, stdout=subprocess.PIPE, text=True
            )
            results[name].append(measured := json.loads(run.stdout.splitlines()[-1]))
            print(f"  {name:13} {measured['tokens_per_s']:7.0f} tok/s {measured['rss_mib']:7.0f} MiB", flush=True)
    for name, rows in results.items():
        rate, rss = (statistics.median(row[key] for row in rows) for key in ("tokens_per_s", "rss_mib"))
        line = f"{name:15} {rate:7.0f} tok/s {rss:7.0f} MiB"
        if "peft-124M" in results and name != "peft-124M":
            peers = results["peft-124M"]
            ratios = [r["tokens_per_s"] / p["tokens_per_s"] for r, p in zip(rows, peers, strict=True)]
            line += f", x peft: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(line)


if __name__ == "__main__":
    ask_for_huge_pages()  # inherited by the processes of both libraries
    main()
