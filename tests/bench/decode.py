"""Generation speed compared with transformers on PyTorch (GPT-2 124M, random weights) and with llama.cpp.

    python tests/bench/decode.py                 batch 1, batch 8 and a prompt of 512, float32 and bfloat16, 3 rounds
    python tests/bench/decode.py --sides transformers-float32 products-float32    upper bound of prefill speed
    python tests/bench/decode.py --llama-cpp     SmolLM2-135M-Instruct, both from the same GGUF file

Needs `pip install -e '.[parity]'`. Every measurement runs in a process of its own. The libraries alternate, so that
changes in the state of the machine affect both, and the ratio is computed per round. transformers runs in eager mode
with each of its caches and attention implementations; the fastest counts. Decoding is timed over 64 new tokens after a
prompt of 16 tokens. Prefill is timed as one new token after a prompt of 512 tokens, so it includes one decode step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

#               batch, prompt, new tokens
CASES = {"batch 1": (1, 16, 64), "batch 8": (8, 16, 64), "prompt": (1, 512, 1)}
SIDES = ("transformers-float32", "gptjax-float32", "transformers-bfloat16", "gptjax-bfloat16")
PRODUCTS = "products-float32"
REPEATS = 2


def fastest(call) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def prompt_ids(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50257, (batch, size))


def transformers_cell(dtype: str) -> dict:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    out: dict[str, float] = {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        cfg = GPT2Config(attn_implementation=attention, eos_token_id=None, bos_token_id=None)
        model = GPT2LMHeadModel(cfg).to(getattr(torch, dtype)).eval()
        for cache in ("dynamic", "static"):
            for name, (batch, size, new) in CASES.items():
                ids = torch.from_numpy(prompt_ids(batch, size))

                def call(ids=ids, new=new, cache=cache, model=model):
                    model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                        do_sample=False, cache_implementation=cache, disable_compile=True, pad_token_id=0,
                    )  # fmt: skip

                out[name] = min(out.get(name, 1e9), fastest(call))
    return out


def gptjax_cell(dtype: str) -> dict:
    import jax

    from gptjax import ModelConfig, generate, init_params
    from gptjax.generation import for_decoding

    cfg = ModelConfig(vocab_size=50257, dtype=dtype)
    params = for_decoding(jax.jit(lambda key: init_params(key, cfg))(jax.random.key(0)), cfg)
    out = {}
    for name, (batch, size, new) in CASES.items():
        prompts = prompt_ids(batch, size).tolist()
        out[name] = fastest(
            lambda prompts=prompts, new=new: generate(
                params, prompts, cfg, max_new_tokens=new, key=jax.random.key(0), cache_dtype=dtype
            )
        )
    return out


def products_cell(dtype: str) -> dict:
    """Time of the matrix products of the prefill, measured one by one in XLA: a lower bound of the prefill time."""
    import jax

    rows, D = CASES["prompt"][1], 768
    total = 0.0
    for count, d_in, d_out in ((48, D, D), (12, D, 4 * D), (12, 4 * D, D)):
        multiply, a, b = jax.jit(jax.numpy.matmul), *(jax.numpy.ones(s, dtype) for s in ((rows, d_in), (d_in, d_out)))
        total += count * fastest(lambda multiply=multiply, a=a, b=b: multiply(a, b).block_until_ready())
    return {"prompt": total}


def run_cell(side: str, limit_s: float) -> dict | None:
    command = [sys.executable, __file__, "--cell", side]
    try:
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(run.stdout.splitlines()[-1])


def against_llama_cpp() -> None:
    """Compare greedy decoding and the prefill of a prompt of 512 tokens with llama.cpp, in tokens per second."""
    import jax
    import xllamacpp

    import gptjax
    from gptjax import assets
    from gptjax.generation import for_decoding

    path = assets.fetch("smollm2-135m-instruct")
    params, cfg = gptjax.load(path)
    decode_params = for_decoding(params, cfg)
    ids = np.random.default_rng(0).integers(100, 49000, 512).tolist()
    key = jax.random.key(0)
    decode = fastest(lambda: gptjax.generate(decode_params, [ids[:16]], cfg, max_new_tokens=128, key=key))
    prefill = fastest(lambda: gptjax.generate(decode_params, [ids], cfg, max_new_tokens=1, key=key))
    ours = dict(decode=128 / decode, prefill=512 / prefill)

    common = xllamacpp.CommonParams()
    common.model.path = str(path)
    common.n_ctx, common.n_parallel, common.warmup = 1024, 1, True
    common.cpuparams.n_threads = common.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(common)
    request = dict(temperature=0.0, cache_prompt=False, ignore_eos=True)
    theirs = {"decode": 0.0, "prefill": 0.0}
    for _ in range(REPEATS):
        for name, prompt, new in (("decode", ids[:16], 128), ("prefill", ids, 1)):
            reply = server.handle_completions({**request, "prompt": prompt, "max_tokens": new, "n_predict": new})
            rate = reply["timings"]["predicted_per_second" if name == "decode" else "prompt_per_second"]
            theirs[name] = max(theirs[name], rate)
    for name, rate in ours.items():
        other = theirs[name]
        print(f"{name:8} gptjax {rate:7.1f} tok/s, llama.cpp {other:7.1f} tok/s, ratio {rate / other:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, PRODUCTS], default=SIDES)
    parser.add_argument(
        "--limit", type=float, default=600, help="time limit per measurement in seconds (bfloat16 may be emulated)"
    )
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--cell", choices=[*SIDES, PRODUCTS], help="run one measurement in this process and print JSON")
    args = parser.parse_args()
    if args.cell:
        library, dtype = args.cell.split("-")
        cells = {"transformers": transformers_cell, "gptjax": gptjax_cell, "products": products_cell}
        print(json.dumps(cells[library](dtype)))
        return
    if args.llama_cpp:
        against_llama_cpp()
        return
    results: dict[str, list[dict | None]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            if None not in results[side]:
                results[side].append(run_cell(side, args.limit))
    for side, rounds in results.items():
        if None in rounds:
            print(f"{side}: stopped after {args.limit:.0f} s")
            continue
        for name in rounds[0]:
            batch, size, new = CASES[name]
            seconds = statistics.median(r[name] for r in rounds)
            rate = batch * (size if new == 1 else new) / seconds
            line = f"{name:8} {side:22} {seconds:7.3f} s {rate:8.1f} tok/s"
            peer = results.get(f"transformers-{side.split('-')[1]}", [])
            if not side.startswith("transformers") and peer and None not in peer:
                ratios = [p[name] / r[name] for p, r in zip(peer, rounds, strict=True)]
                line += f", x transformers: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(line)


if __name__ == "__main__":
    main()
