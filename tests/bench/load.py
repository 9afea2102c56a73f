"""Peak memory of loading a model, as a multiple of the model itself.

    python tests/bench/load.py

For GPT-2's 124M and 355M shapes (random weights, written as a Hugging Face folder in float32) and SmolLM2 from its GGUF
file, into float32 and bfloat16. Each load is its own process; counted is what its peak exceeds that of a process that
has only loaded a model of one layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time


def write(folder: str, n_layer: int, n_head: int, d_model: int) -> None:
    import jax

    import gptjax
    from gptjax.weights import export_hf

    cfg = gptjax.ModelConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, d_model=d_model)
    export_hf(folder, jax.jit(lambda key: gptjax.init_params(key, cfg))(jax.random.key(0)), cfg)


def measure(small: str, source: str, dtype: str) -> dict:
    import jax

    import gptjax

    gptjax.load(small)
    before = peak_kib()
    started = time.perf_counter()
    params, _ = gptjax.load(source, dtype=dtype)
    seconds = time.perf_counter() - started
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return dict(size_mib=size / 2**20, peak_mib=(peak_kib() - before) / 1024, seconds=seconds)


def peak_kib() -> int:
    """Of this process alone; getrusage would count what the process that started it once had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        shapes = {"tiny": (1, 2, 8), "124M": (12, 12, 768), "355M": (24, 16, 1024)}
        for name, shape in shapes.items():
            write(os.path.join(scratch, name), *shape)
        places = {name: os.path.join(scratch, name) for name in shapes} | {"SmolLM2": "smollm2-135m-instruct"}
        for name in ("124M", "355M", "SmolLM2"):
            for dtype in ("float32", "bfloat16"):
                command = [sys.executable, __file__, places["tiny"], places[name], dtype]
                out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{name:8} {dtype:9} {out['size_mib']:7.0f} MiB, peak {out['peak_mib']:7.0f} MiB = "
                    f"{out['peak_mib'] / out['size_mib']:.2f} x, {out['seconds']:.1f} s"
                )


if __name__ == "__main__":
    main()
