"""Peak memory of loading a model, relative to the size of its parameters.

    python tests/bench/load.py

Loads GPT-2 124M and 355M (random weights in a float32 Hugging Face folder) and SmolLM2 (GGUF file) into float32 and
bfloat16, each in a process of its own. The peak is measured relative to that after loading a model of one layer in the
same process.
"""

from __future__ import annotations

import argparse
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
    """Peak memory of this process in KiB; getrusage would include that of the parent process before exec."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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
