"""Memory of a training step as predicted by XLA and as measured, on a CPU, for three sizes.

    python tests/bench/memory.py

Predicted: arguments, outputs that do not alias arguments, and temporaries, from `memory_analysis`. Measured: growth of
the maximum resident set size of the process (getrusage) from before the train state is created until after two steps.
Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

SIZES = {
    "28M, 8 x 256": ("model.n_layer=6", "model.d_model=384", "model.n_head=6", "model.context_length=256", 8),
    "51M, 8 x 512": ("model.n_layer=8", "model.d_model=512", "model.n_head=8", "model.context_length=512", 8),
    "124M, 4 x 512": ("model.n_layer=12", "model.d_model=768", "model.n_head=12", "model.context_length=512", 4),
}  # fmt: skip


def measure(name: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from gptjax.config import load_config
    from gptjax.losses import next_token
    from gptjax.model.gpt import init_params
    from gptjax.optim import make_optimizer
    from gptjax.training.step import TrainState, make_train_step
    from gptjax.types import Batch

    *shape, rows = SIZES[name]
    cfg = load_config("gpt2-124m", *shape, "model.dtype=float32")
    tx = make_optimizer(cfg.optim, 100)
    step = jax.jit(make_train_step(next_token(cfg.model), tx), donate_argnums=0)
    create = jax.jit(lambda key: TrainState.create(init_params(key, cfg.model), tx=tx, key=key))
    ids = jnp.zeros((rows, cfg.model.context_length), jnp.int32)
    key = jax.random.key(0)
    compiled = step.lower(jax.eval_shape(create, key), Batch(ids, ids)).compile()
    memory = compiled.memory_analysis()
    predicted = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )  # fmt: skip
    made = create.lower(key).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = made(key)
    for _ in range(2):
        state, metrics = compiled(state, Batch(ids, ids))
    metrics["loss"].block_until_ready()
    return {"predicted": predicted, "measured": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'':<16}{'predicted MiB':>15}{'measured MiB':>14}{'error':>9}")
    for name in SIZES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        result = json.loads(done.stdout)
        error = result["predicted"] / result["measured"] - 1
        print(
            f"{name:<16}{result['predicted'] / 2**20:>15,.0f}{result['measured'] / 2**20:>14,.0f}{error:>+9.1%}",
            flush=True,
        )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1]))) if sys.argv[-1] in SIZES else main()
