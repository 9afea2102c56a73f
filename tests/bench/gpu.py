"""Training, LoRA and decoding on one GPU, compared with torch.compile, peft and transformers on the same GPU.

    python tests/bench/gpu.py                        all benchmarks
    python tests/bench/gpu.py --json cells.jsonl     also write one JSON line per benchmark
    python tests/bench/gpu.py --only 'train-124M*'   only those that match the pattern
    python tests/bench/gpu.py --small                models of two layers, few steps: try the script on a CPU

Needs torch, transformers, peft and jax's CUDA plugin; a benchmark whose other library is not installed prints an error.
Every benchmark runs in a process of its own with a time limit. All use bfloat16 and random weights.

    train-124M, -355M     16 (8) x 1,024 tokens, AdamW, gradient clipping. Compared with nanoGPT's model in PyTorch:
                          torch.compile, fused AdamW, SDPA, autocast, vocabulary of 50,304 (gptjax: 50,257)
      -documents          with segment_ids, documents of about 300 tokens; compared with PyTorch without documents
      -curve              200 steps on a small text in bfloat16 and in float32: largest difference of the losses
    lora-documents        SmolLM2-135M, rank 16 on every linear layer, 8 x 1,024 tokens in documents. Compared with peft
                          with SDPA, without documents
    decode-1, -8, -64     new tokens per second after a prompt of 64; decode-1-int8 and -nf4 with quantised weights
    read-512              prefill tokens per second of a prompt of 512, batch size 1

Prints tokens/s of the median step, MFU (6 N + 12 L D T FLOPs per token divided by the GPU's peak), peak memory of the
device if known, and the time of the first call. The ratio is the tokens/s of gptjax divided by that of the other
library.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"124M": (12, 12, 768, 16), "355M": (24, 16, 1024, 8)}  # n_layer, n_head, d_model, rows
T, V, V_PEER, DOCUMENT = 1024, 50257, 50304, 300
STEPS, CURVE_STEPS = 20, 200
SMOLLM = dict(n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536)
CELLS = {  # name: libraries
    **{f"train-{size}": ("torch", "gptjax") for size in SIZES},
    **{f"train-{size}-documents": ("gptjax",) for size in SIZES},
    "train-124M-curve": ("gptjax",),
    "lora-documents": ("peft", "gptjax"),
    **{f"decode-{n}": ("transformers", "gptjax") for n in (1, 8, 64)},
    "decode-1-int8": ("gptjax",),
    "decode-1-nf4": ("gptjax",),
    "read-512": ("transformers", "gptjax"),
}
PEER_OF = {"train-124M-documents": "train-124M", "train-355M-documents": "train-355M"}  # decode-1-int8: decode-1


def shrink() -> None:
    """Make all sizes small enough for a CPU, to test the script; its numbers are then meaningless."""
    global SIZES, T, V, V_PEER, DOCUMENT, STEPS, CURVE_STEPS, SMOLLM
    SIZES = {"124M": (2, 2, 32, 2), "355M": (2, 2, 64, 2)}
    T, V, V_PEER, DOCUMENT, STEPS, CURVE_STEPS = 64, 257, 384, 20, 3, 6
    SMOLLM = dict(n_layer=2, n_head=3, n_kv_head=1, d_model=48, d_ff=96)


def windows(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, T + 1), dtype=np.int32)


def documents(rows: int) -> np.ndarray:
    """[rows, T] segment ids; a document ends after each token with probability 1 / DOCUMENT."""
    ends = np.random.default_rng(1).random((rows, T)) < 1 / DOCUMENT
    return (1 + np.cumsum(ends, 1) - ends).astype(np.int32)


def timed(call: Callable[[], Any], tokens: int, steps: int) -> dict[str, float]:
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    return {"ms": 1000 * seconds, "tokens_per_s": tokens / seconds, "first_call_s": first}


# ---------------------------------------------------------------- other libraries


def _cuda() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_peak() -> dict[str, float]:
    import torch

    return {"gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}


def torch_train(size: str) -> dict[str, float]:
    from train import torch_trainer

    L, N, D, B = SIZES[size]
    step, _ = torch_trainer((L, N, D, T, B, V_PEER, 0, 0), "bfloat16", _cuda())
    data = windows(B, V_PEER)
    return timed(lambda: step(data), B * T, STEPS) | _torch_peak()


def _peer(size: dict | None = None):
    """GPT-2 124M, or a Llama with the shape of SmolLM2, in transformers and bfloat16."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    import transformers

    torch.manual_seed(0)
    if size is None:
        L, N, D, _ = SIZES["124M"]
        cfg = transformers.GPT2Config(
            vocab_size=V, n_layer=L, n_head=N, n_embd=D, attn_implementation="sdpa", eos_token_id=None,
            bos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(cfg)
    else:
        cfg = transformers.LlamaConfig(
            vocab_size=49152 if V > 1000 else V, num_hidden_layers=size["n_layer"], hidden_size=size["d_model"],
            num_attention_heads=size["n_head"], num_key_value_heads=size["n_kv_head"], use_cache=False,
            intermediate_size=size["d_ff"], tie_word_embeddings=True, attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(cfg)
    return model.to(_cuda(), torch.bfloat16)


def peft_lora() -> dict[str, float]:
    import peft
    import torch

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(_peer(SMOLLM), peft.LoraConfig(r=16, lora_alpha=32, target_modules=names)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data = torch.from_numpy(windows(8, V)).long().to(_cuda())

    def call():
        loss = model(input_ids=data[:, :-1], labels=data[:, :-1]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed(call, 8 * T, STEPS) | _torch_peak()


def transformers_decode(batch: int, prompt: int, new: int) -> dict[str, float]:
    import torch

    model = _peer().eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, V, (batch, prompt))).to(_cuda())

    def call():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return out[0, -1].item()

    return timed(call, batch * (prompt if new == 1 else new), 3) | _torch_peak()


# ---------------------------------------------------------------- gptjax


def _jax_peak() -> dict[str, float]:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return {"gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def _gpt2(size: str, dtype: str = "bfloat16"):
    from gptjax import ModelConfig

    L, N, D, B = SIZES[size]
    shape = dict(vocab_size=V, context_length=T, n_layer=L, n_head=N, d_model=D)
    return ModelConfig(**shape, qkv_bias=False, bias=False, norm_bias=False, dtype=dtype), B


def _trainer(cfg, segment_ids=None, lr: float = 1e-3):
    """step(windows) -> loss, the training step that `gptjax pretrain` compiles."""
    import jax

    from gptjax.config import OptimConfig
    from gptjax.losses import next_token
    from gptjax.model.gpt import init_params
    from gptjax.optim import make_optimizer
    from gptjax.training.process import keep_buffers
    from gptjax.training.step import TrainState, make_train_step
    from gptjax.types import Batch

    keep_buffers()
    loss, tx = next_token(cfg), make_optimizer(OptimConfig(lr=lr, beta2=0.99, schedule="constant"), 1000)
    state = TrainState.create(
        jax.jit(init_params, static_argnums=1)(jax.random.key(0), cfg), tx=tx, key=jax.random.key(1)
    )
    step = jax.jit(make_train_step(loss, tx), donate_argnums=0)

    def call(data: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, Batch(data[:, :-1], data[:, 1:], segment_ids=segment_ids))
        return float(metrics["loss"])

    return call


def gptjax_train(size: str, with_documents: bool) -> dict[str, float]:
    import jax

    from gptjax.model.gpt import abstract_params
    from gptjax.training.chips import peak_flops
    from gptjax.training.flops import flops_per_token

    cfg, B = _gpt2(size)
    step, data = _trainer(cfg, documents(B) if with_documents else None), windows(B, V)
    result = timed(lambda: step(data), B * T, STEPS) | _jax_peak()
    device = jax.devices()[0]
    if peak := peak_flops(device.platform, device.device_kind):
        result["mfu"] = result["tokens_per_s"] * flops_per_token(cfg, abstract_params(cfg), width=T) / peak
    return result


def gptjax_curve(size: str) -> dict[str, float]:
    curves = []
    for dtype in ("bfloat16", "float32"):
        cfg, B = _gpt2(size, dtype)
        step = _trainer(cfg, lr=3e-4)
        data = windows(4 * B, 64).reshape(4, B, T + 1)  # only 64 different tokens, so that the loss decreases
        curves.append([step(data[i % 4]) for i in range(CURVE_STEPS)])
    low, full = map(np.array, curves)
    return {"largest_difference": float(np.max(np.abs(low - full) / full)), "last_loss": float(full[-1])}


def gptjax_lora() -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import optax

    import gptjax
    from gptjax import LoraConfig, lora
    from gptjax.losses import next_token
    from gptjax.tasks.instruct import CHUNK
    from gptjax.types import Batch

    shape = dict(vocab_size=49152 if V > 1000 else V, context_length=T, tie_embeddings=True, **SMOLLM)
    cfg = gptjax.ModelConfig(arch="llama", dtype="bfloat16", **shape)
    settings, key = LoraConfig(rank=16), jax.random.key(0)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jax.jit(lambda k: gptjax.init_params(k, cfg))(key))
    tx = optax.adamw(1e-4)
    state = gptjax.TrainState.create(lora.init(key, params, settings), frozen=params, tx=tx, key=key)
    chunk = CHUNK if jax.default_backend() == "cpu" else None
    step = gptjax.make_train_step(
        next_token(cfg, chunk=chunk), tx, combine=lambda a, base: lora.attach(base, a, settings)
    )
    step, data, ids = jax.jit(step, donate_argnums=0), windows(8, V), documents(8)

    def call():
        nonlocal state
        state, metrics = step(state, Batch(data[:, :-1], data[:, 1:], segment_ids=ids))
        return float(metrics["loss"])

    return timed(call, 8 * T, STEPS) | _jax_peak()


def gptjax_decode(batch: int, prompt: int, new: int, quantised: str = "") -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    import gptjax
    from gptjax.generation import for_decoding

    cfg, _ = _gpt2("124M")
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), jax.jit(lambda k: gptjax.init_params(k, cfg))(jax.random.key(0))
    )
    params = for_decoding(gptjax.quantize(params, quantised) if quantised else params, cfg)
    prompts = np.random.default_rng(0).integers(0, V, (batch, prompt)).tolist()

    def call():
        out = gptjax.generate(params, prompts, cfg, max_new_tokens=new, key=jax.random.key(0), cache_dtype="bfloat16")
        return out[0][-1]

    return timed(call, batch * (prompt if new == 1 else new), 3) | _jax_peak()


# ---------------------------------------------------------------- running the benchmarks


def cell(name: str, side: str) -> dict[str, float]:
    kind, *rest = name.split("-")
    if kind == "train":
        if side == "torch":
            return torch_train(rest[0])
        return gptjax_curve(rest[0]) if "curve" in rest else gptjax_train(rest[0], "documents" in rest)
    if kind == "lora":
        return peft_lora() if side == "peft" else gptjax_lora()
    half = T // 2
    batch, prompt, new = (1, half, 1) if kind == "read" else (int(rest[0]), T // 16, T // 4)
    if side == "transformers":
        return transformers_decode(batch, prompt, new)
    return gptjax_decode(batch, prompt, new, rest[1] if len(rest) > 1 else "")


def run(name: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", name, side, *(["--small"] if args.small else [])]
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    about = {"cell": name, "side": side}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.limit, check=False)
    except subprocess.TimeoutExpired:
        return about | {"error": f"stopped after {args.limit:.0f} s"}
    if done.returncode:
        return about | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return about | json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any], peer: dict[str, Any] | None) -> str:
    start = f"{row['cell']:22} {row['side']:13}"
    if "error" in row:
        return f"{start} {row['error']}"
    if "largest_difference" in row:
        return f"{start} bfloat16 within {row['largest_difference']:.2%} of float32, last loss {row['last_loss']:.3f}"
    text = f"{start} {row['ms']:9.2f} ms {row['tokens_per_s']:11,.0f} tok/s"
    text += f" {row['gib']:6.2f} GiB" if "gib" in row else ""
    text += f" MFU {row['mfu']:.1%}" if "mfu" in row else ""
    text += f", first call {row['first_call_s']:.1f} s"
    if peer and "tokens_per_s" in peer:
        text += f", {row['tokens_per_s'] / peer['tokens_per_s']:.2f} x {peer['side']}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="glob pattern of benchmarks to run")
    parser.add_argument("--small", action="store_true", help="small models and few steps, for a CPU")
    parser.add_argument("--limit", type=float, default=120, help="time limit per benchmark in seconds")
    parser.add_argument("--json", type=Path, help="append one JSON line per benchmark to this file")
    parser.add_argument(
        "--cell", nargs=2, metavar=("CELL", "SIDE"), help="run one benchmark in this process and print JSON"
    )
    args = parser.parse_args()
    if args.small:
        shrink()
    if args.cell:
        print(json.dumps(cell(*args.cell)))
        return
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, libraries in CELLS.items():
        for side in libraries if fnmatch.fnmatch(name, args.only) else ():
            rows[name, side] = row = run(name, side, args)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            peers = [row for (cell, side), row in rows.items() if cell == _peer_of(name) and side != "gptjax"]
            print(line(row, peers[0] if peers and side == "gptjax" else None), flush=True)


def _peer_of(name: str) -> str:
    return PEER_OF.get(name, name.removesuffix("-int8").removesuffix("-nf4"))


if __name__ == "__main__":
    main()
