"""A sweep of 32 small runs in one vmapped program, compared with the same runs one after another.

    python tests/bench/sweep.py [--steps 200] [--lrs 4] [--seeds 8] [--sizes tiny small] [a.b=c ...]

Both train on the same batches. Prints for each size the time of whole runs (data, initialisation, compilation, steps;
no validation), of compilation and of the steps alone, with ratios, and for each learning rate the largest difference of
a loss. The first ten steps show whether both compute the same; later, rounding differences grow, faster with a higher
learning rate.

The sequential runs are measured in three ways: whole runs as in separate processes without a compilation cache (each
run compiles its step), with every different program compiled once (the learning rate is a constant of a program, the
seed is not), and the steps alone. As in the training loop, one compiled call runs `train.steps_per_call` steps.
"""

import argparse
import time

import jax
import numpy as np

from gptjax.research import sweep
from gptjax.tasks import pretrain
from gptjax.training.compile import steps_per_call
from gptjax.training.process import ask_for_huge_pages, keep_buffers
from gptjax.training.progress import Progress
from gptjax.training.step import TrainState, make_multi_step, make_train_step

SIZES = {  # changes to tiny-gpt2, which has 2 layers, 2 heads, d_model 32, 8 rows of 32 tokens, 36k parameters
    "tiny": [],
    "small": ["model.d_model=64", "model.context_length=64"],
    "medium": ["model.n_layer=4", "model.n_head=4", "model.d_model=128", "model.context_length=64"],
}


def one_after_another(configs: list, k: int) -> tuple[dict[str, float], list[np.ndarray]]:
    """(seconds by phase, losses of each run)."""
    seconds = {"rest": 0.0, "compile": 0.0, "compile once": 0.0, "steps": 0.0}
    seen, losses = set(), []
    for cfg in configs:
        began = time.perf_counter()
        with Progress(log=lambda line: None) as progress:
            cfg, task, _ = pretrain.prepare(cfg, progress)
        loss, _, tx = task.build(cfg)
        init_key, key = jax.random.split(jax.random.key(cfg.seed))
        state = jax.jit(lambda a, b, task=task, tx=tx: TrainState.create(task.start(a), tx=tx, key=b))(init_key, key)
        jax.block_until_ready(state)
        ready = time.perf_counter()
        step = jax.jit(make_multi_step(make_train_step(loss, tx)), donate_argnums=0)
        compiled = step.lower(state, task.batches(0, k, None)).compile()
        done = time.perf_counter()
        run_losses = []
        for i in range(0, cfg.train.max_steps, k):
            state, metrics = compiled(state, task.batches(i, k, None))
            run_losses.append(metrics["loss"])
        jax.block_until_ready(state)
        seconds["steps"] += time.perf_counter() - done
        seconds["compile"] += done - ready
        seconds["rest"] += ready - began
        if cfg.optim.lr not in seen:
            seen.add(cfg.optim.lr)
            seconds["compile once"] += done - ready
        losses.append(np.concatenate(run_losses))
    return seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lrs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    args, settings = parser.parse_known_args()
    rates = ",".join(f"{lr:.3g}" for lr in np.geomspace(3e-4, 3e-3, args.lrs))
    for size in args.sizes:
        configs = sweep.grid(
            "tiny-gpt2", *SIZES[size], f"train.max_steps={args.steps}", f"optim.lr=[{rates}]",
            f"seed=range({args.seeds})", *settings,
        )  # fmt: skip
        began = time.perf_counter()
        result = sweep.sweep(configs, validate=False)
        vmapped_s = time.perf_counter() - began
        (program,) = result.programs
        a = {"whole": vmapped_s, "compile": program["compile_s"], "steps": program["steps_s"]}
        k = steps_per_call(configs[0], 0)
        b, losses = one_after_another(configs, k)
        whole = b["rest"] + b["compile"] + b["steps"]
        once = b["rest"] + b["compile once"] + b["steps"]
        print(
            f"{size}: {len(configs)} runs of {args.steps} steps, {program['at_once']} at a time\n"
            f"  vmapped            {a['whole']:7.1f} s = compilation {a['compile']:.1f}, steps {a['steps']:.1f}, rest\n"
            f"  sequential         {whole:7.1f} s = compilation {b['compile']:.1f}, steps {b['steps']:.1f}, rest; with "
            f"each different program compiled once {once:.1f} s\n"
            f"  whole runs {whole / a['whole']:.2f} x, with programs compiled once {once / a['whole']:.2f} x, steps "
            f"alone {b['steps'] / a['steps']:.2f} x",
            flush=True,
        )
        apart: dict[float, list[np.ndarray]] = {}
        for cfg, x, y in zip(configs, losses, result.losses, strict=True):
            apart.setdefault(cfg.optim.lr, []).append(np.abs(x - y))
        for lr, steps in apart.items():
            print(
                f"  lr {lr:<8g} largest difference of a loss in the first 10 steps "
                f"{np.max(steps, 0)[:10].max():.1e}, in {args.steps} {np.max(steps):.1e}"
            )
        print(
            f"  memory: {program['bytes_by_formula'] / 2**20:.1f} MiB by formula, "
            f"{program['bytes_by_compiler'] / 2**20:.1f} by the compiler",
            flush=True,
        )


if __name__ == "__main__":
    ask_for_huge_pages()
    keep_buffers()
    main()
