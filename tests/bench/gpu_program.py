"""Memory traffic and kernels of GPU programs of GPT-2 124M, compiled ahead of time without a GPU.

    python tests/bench/gpu_program.py                 the training step with and without documents, and decoding
    python tests/bench/gpu_program.py decode --text DIR

Needs jax's CUDA plugin ([cuda]). XLA compiles for an abstract H100. It cannot time kernels there, so matrix products
always become Triton kernels, while on a GPU cuBLAS is tried as well. Prints for the training step: time to compile,
memory in GiB, traffic in GB and TFLOP. For decoding at batch size 1: number of kernels and MB of traffic per token, for
parameters as loaded, in the layout of `for_decoding`, and quantised; the weights are 248 MB in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "accelerators"))
ROWS, T, NEW = 16, 1024, 64
CHUNK_BYTES = 2**30  # size of the logits per chunk of the loss on an 80 GB GPU


def train(documents: bool) -> Any:
    import jax
    import jax.numpy as jnp
    from described import placed

    from gptjax.config import load_config
    from gptjax.losses import next_token
    from gptjax.model.gpt import init_params
    from gptjax.ops import loss
    from gptjax.ops.device import compiling_for
    from gptjax.optim import make_optimizer
    from gptjax.training.step import TrainState, make_train_step
    from gptjax.types import Batch

    loss._chunk_bytes = lambda: CHUNK_BYTES
    cfg = load_config("gpt2-124m", "model.vocab_size=50257")
    tx = make_optimizer(cfg.optim, 1000)
    step = make_train_step(next_token(cfg.model), tx)
    with compiling_for("gpu", capability=9.0):
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(lambda key: TrainState.create(init_params(key, cfg.model), tx=tx, key=key), key)
        ids, weights = (jax.ShapeDtypeStruct((ROWS, T), dtype) for dtype in (jnp.int32, jnp.float32))
        batch = Batch(ids, ids, weights, ids, ids) if documents else Batch(ids, ids)
        return jax.jit(step, donate_argnums=0).lower(placed(state), placed(batch)).compile()


def decode(kind: str) -> Any:
    import jax
    import jax.numpy as jnp
    from described import placed

    from gptjax import tree
    from gptjax.config import load_config
    from gptjax.generation import for_decoding
    from gptjax.model.cache import init_cache
    from gptjax.model.gpt import abstract_params, extend
    from gptjax.ops.device import compiling_for
    from gptjax.ops.quant import WORDS, _quantized

    cfg = load_config("gpt2-124m", "model.vocab_size=50257").model

    def laid(params):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        if kind in ("int8", "nf4"):
            low = tree.map_paths(
                lambda path, leaf: _quantized(path, leaf, kind if tree.matches(WORDS[kind], path) else "none"), low
            )
        return low if kind == "as loaded" else for_decoding(low, cfg)

    def many(params, token, cache):
        def body(carry, _):
            logits, cache = extend(params, carry[0][:, None], cfg, carry[1])
            token = logits[:, 0].argmax(-1).astype(jnp.int32)
            return (token, cache), token

        return jax.lax.scan(body, (token, cache), None, length=NEW)

    with compiling_for("gpu", capability=9.0):
        params = jax.eval_shape(laid, abstract_params(cfg))
        cache = jax.eval_shape(lambda: init_cache(cfg, 1, 256).replace(empty=False))
        token = jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.jit(many, donate_argnums=2).lower(placed(params), placed(token), placed(cache)).compile()


def largest(text: str, least_times: int = 1, most: int = 12) -> list[str]:
    """The kernels with the most memory traffic per step (decoding: per token); equal kernels are added up."""
    from gptjax.planning import hlo

    computations, size, count = hlo.parse(text), Counter(), Counter()
    for home, i, times in hlo.executed(computations, into_fusions=False):
        if times < least_times or i.op in hlo._NO_WORK or i.op.endswith("-done"):
            continue
        named = re.search(r'op_name="([^"]*)"', i.rest)
        where = re.sub(r"blocks_\d+", "blocks", named[1].split("closed_call/")[-1])[-60:] if named else ""
        made = " ".join(f"{a.dtype}{list(a.shape)}" for a in i.results[:2])
        kernel = re.sub(r"[\d.]+$", "", i.name)
        key = f"{kernel:<32} {made:<46} {where}"
        size[key] += hlo._traffic(i, computations[home], computations) * times / least_times
        count[key] += times / least_times
    lines = [f"    {n / 1e6:9.1f} MB x{count[key]:<4g} {key}" for key, n in size.most_common(most)]
    return [f"  {sum(count.values()):,.0f} kernels, {sum(size.values()) / 1e6:,.1f} MB", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("train", "decode"))
    parser.add_argument("--text", type=Path, help="folder for the HLO text of the programs")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gptjax.planning import hlo

    cells = {f"train, {name}": (train, documents) for name, documents in (("rows", False), ("documents", True))}
    cells |= {f"decode, {kind}": (decode, kind) for kind in ("as loaded", "for_decoding", "int8", "nf4")}
    for name, (make, option) in cells.items():
        if args.what and not name.startswith(args.what):
            continue
        started = time.monotonic()
        compiled = make(option)
        seconds, memory, text = time.monotonic() - started, compiled.memory_analysis(), compiled.as_text()
        held = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
        kernels = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
        print(f"{name}: compiled in {seconds:.1f} s, {held:.2f} GiB, {dict(kernels)}", flush=True)
        if name.startswith("train"):
            print(f"  {hlo.work(text).flops / 1e12:.2f} TFLOP")
        print("\n".join(largest(text, NEW if name.startswith("decode") else 1)), flush=True)
        if args.text:
            args.text.mkdir(parents=True, exist_ok=True)
            (args.text / f"{name.replace(', ', '-').replace(' ', '-')}.txt").write_text(text)


if __name__ == "__main__":
    main()
