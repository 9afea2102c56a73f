"""Training time to a validation loss of 1.90 on tiny-shakespeare: nanoGPT's model in PyTorch, then gptjax.

    python tests/bench/learn.py [path/to/tiny-shakespeare.txt]

Both train on the first 90 % of the characters and are evaluated on the last 10 %, in non-overlapping windows of 64.
PyTorch uses the settings of nanoGPT's CPU quick start (4 layers, 4 heads, d_model 128, 12 windows per step, 2,000
steps, learning rate 1e-3 to 1e-4) and is evaluated every 100 steps from step 1,000 on. gptjax uses
configs/pretrain/tiny-shakespeare-250.yaml and is evaluated at the end. The time to train is measured without
evaluation; gptjax's compilation is reported separately. Needs `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import numpy as np
from train import torch_trainer

from gptjax import data, load_config

GOAL = 1.90


def torch_run(ids: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    T, B, steps = 64, 12, 2000
    step, evaluate = torch_trainer((4, 4, 128, T, B, vocab_size, 0, 0))
    n = (len(held_out) - 1) // T
    windows = np.stack([held_out[i * T : i * T + T + 1] for i in range(n)])
    rng = np.random.default_rng(1337)
    seconds = 0.0
    for i in range(steps):
        started = time.perf_counter()
        cosine = 0.5 * (1 + math.cos(math.pi * (i - 100) / (steps - 100)))
        lr = 1e-3 * (i + 1) / 101 if i < 100 else 1e-4 + cosine * 9e-4
        starts = rng.integers(0, len(ids) - T, B)
        step(np.stack([ids[s : s + T + 1] for s in starts]), lr)
        seconds += time.perf_counter() - started
        done = i + 1
        if done >= 1000 and done % 100 == 0:
            loss = evaluate(windows)
            print(f"torch   step {done:5}  {seconds:6.1f} s  validation loss {loss:.4f}", flush=True)
            if loss <= GOAL:
                break
    return seconds


def gptjax_run(source: str) -> tuple[float, float, float]:
    import jax

    from gptjax.losses import next_token
    from gptjax.model.gpt import init_params
    from gptjax.optim import make_optimizer
    from gptjax.training.process import keep_buffers
    from gptjax.training.step import TrainState, evaluate, make_multi_step, make_train_step

    keep_buffers()
    cfg = load_config("tiny-shakespeare-250", f"data.source={source}")
    ready = data.prepare(cfg)
    model = dataclasses.replace(cfg.model, vocab_size=ready.tokenizer.vocab_size)
    loss, tx, k = next_token(model), make_optimizer(cfg.optim, cfg.train.max_steps), 10
    state = TrainState.create(
        jax.jit(init_params, static_argnums=1)(jax.random.key(0), model), tx=tx, key=jax.random.key(1)
    )
    loader = data.Loader(
        ready.train, cfg.data, batch_size=cfg.train.batch_size, context_length=model.context_length, seed=0,
        vocab_size=model.vocab_size,
    )  # fmt: skip
    started = time.perf_counter()
    call = jax.jit(make_multi_step(make_train_step(loss, tx)), donate_argnums=0)
    call = call.lower(state, loader.batches(0, k)).compile()
    compiled = time.perf_counter()
    for step in range(0, cfg.train.max_steps, k):
        state, metrics = call(state, loader.batches(step, k))
    jax.block_until_ready(metrics)
    ended = time.perf_counter()
    batches = data.eval_batches(ready.val, context_length=model.context_length, batch_size=64)
    return ended - compiled, compiled - started, float(evaluate(jax.jit(loss), state.params, batches)[0].value())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="tiny-shakespeare")
    source = parser.parse_args().source
    ready = data.prepare(load_config("nanogpt-cpu", f"data.source={source}"))
    ids, held_out = (np.asarray(store.tokens) for store in (ready.train, ready.val))
    theirs = torch_run(ids, held_out, ready.tokenizer.vocab_size)
    ours, compile_s, loss = gptjax_run(source)
    print(f"gptjax  250 steps  {ours:6.1f} s  validation loss {loss:.4f}  (and {compile_s:.1f} s to compile)")
    print(f"gptjax / torch: {ours / theirs:.3f} of the time, {(ours + compile_s) / theirs:.3f} with compilation")


if __name__ == "__main__":
    main()
