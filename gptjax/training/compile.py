"""Compiles the training step, chooses the number of training steps per compiled call, and explains memory errors."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gptjax import parallel, tree
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.signals import Stopped, signal_name
from gptjax.training.memory import GIB, what_fits
from gptjax.training.run import Run
from gptjax.training.step import TrainState, make_multi_step, make_train_step
from gptjax.types import Metrics

# By default, models with more than SMALL_MODEL parameters run one training step per compiled call.
SMALL_MODEL = 20_000_000
MOST_STEPS_PER_CALL = 10


def steps_per_call(cfg: Config, n_params: int, start: int = 0, hooks: Sequence[int] = ()) -> int:
    """Returns the number of training steps per compiled call.

    Evaluations, checkpoints and hooks run only between two compiled calls. The number of steps per call must divide
    max_steps and all intervals shorter than max_steps: eval_every, checkpoint_every, log_every and the intervals of the
    hooks. If train.steps_per_call is None, the number of steps per call is 1 for models with more than 20 million
    parameters. For models with at most 20 million parameters, the default number of steps per call is the largest
    number up to 10 that divides `start`, max_steps and every interval shorter than max_steps. In reward tuning, the
    number of steps per call is reward.updates, the number of steps on the same rollouts. If distill.on_policy is set,
    the number of steps per call is 1.

    Args:
        start: the step from which the run is resumed.
        hooks: the intervals of the hooks, in steps.

    Raises:
        UserError: train.steps_per_call does not divide max_steps, or one of the intervals (of evaluation, checkpoints,
            logging, hooks) that are shorter than the run.
    """
    settings, updates = cfg.train, cfg.steps_per_rollout
    names = ("eval_every", "checkpoint_every") if updates else ("eval_every", "checkpoint_every", "log_every")
    every = {f"train.{name}": getattr(settings, name) for name in names}
    every |= {f"hooks[{i}]": n for i, n in enumerate(hooks)}
    every = {name: n for name, n in every.items() if n < settings.max_steps} | {"train.max_steps": settings.max_steps}
    if (k := updates or settings.steps_per_call) is not None:
        bad = [f"{name} ({n})" for name, n in every.items() if n % k]
        if bad:
            common = math.gcd(*every.values())
            fits = ", ".join(str(n) for n in range(1, min(common, 100) + 1) if common % n == 0)
            key = "reward.updates" if updates else "train.steps_per_call"
            raise UserError(f"{key} ({k}) must divide {', '.join(bad)}: use one of {fits}")
        return k
    if n_params > SMALL_MODEL:
        return 1
    common = math.gcd(start, *every.values())
    return max(k for k in range(1, MOST_STEPS_PER_CALL + 1) if common % k == 0)


def make_call(run: Run) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns a jitted function that runs `run.k` training steps per call.

    The jitted function takes the state and the batches of the k steps, and returns the new state and the metrics.
    """
    loss, combine, optimizer = run.rules
    step = make_train_step(loss, optimizer, combine=combine, accumulation=run.cfg.train.accumulation)
    return parallel.jit_step(step if run.k == 1 else make_multi_step(step), run.mesh, run.state)


def first_call(run: Run, call: Callable[[TrainState, Any], tuple[TrainState, Metrics]], batch: Any) -> Metrics:
    """Calls the jitted training step for the first time, which compiles the step, and returns the metrics of the call.

    The first call of the training step runs in a thread, so that a signal can end the process while XLA compiles the
    step.
    """
    start, result = time.monotonic(), []
    run.progress.say("compiling the training step ...")

    def compile_and_run() -> None:
        try:
            result.append(jax.block_until_ready(call(run.state, batch)))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=compile_and_run, daemon=True, name="gptjax-compile")
    with run.progress.phase("compiling the training step"):
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if run.signals.code and thread.is_alive():
                _leave(run)
    if isinstance(result[0], BaseException):
        raise result[0]
    run.state, metrics = result[0]
    steps = f"{run.k} step{'' if run.k == 1 else 's'}"
    run.progress.say(f"compiled, first {steps} done in {time.monotonic() - start:.1f} s")
    return metrics


def _leave(run: Run) -> None:
    """Ends the process after a signal during compilation, because compilation by XLA cannot be interrupted.

    In a notebook, the function raises `Stopped` instead of ending the process. Ending the process during compilation
    loses no training steps, because compilation precedes the first step of the process, so the last checkpoint is still
    up to date.

    Raises:
        Stopped: the process runs in a notebook.
    """
    code = run.signals.code
    run.progress.say(f"{signal_name(code)} while compiling: nothing to save, {run.saved:,} steps are on disk")
    if "ipykernel" in sys.modules:
        raise Stopped(code, "stopped while compiling")
    sys.stdout.flush()
    os._exit(code)


def too_large(run: Run, error: Exception) -> UserError:
    """Returns the UserError for a training step that does not fit into device memory.

    The error message lists changes of the config that should make the training step fit into memory.
    """
    settings, device = run.cfg.train, jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    rows = settings.batch_size // settings.accumulation
    width = run.tokens_per_step // settings.batch_size
    axes = dict(run.mesh.shape) if run.mesh is not None else {}
    weights = sum(leaf.nbytes for leaf in tree.flatten(run.state.params).values())
    lasting = sum(leaf.nbytes for leaf in jax.tree.leaves((run.state.opt_state, run.state.frozen)))
    lines = what_fits(
        run.cfg, width, rows_per_device=max(1, rows // (axes.get("data", 1) * axes.get("fsdp", 1))),
        lasting_bytes=(3 * weights + lasting) // axes.get("fsdp", 1), limit=limit,
    )  # fmt: skip
    size = f" with {limit / GIB:.1f} GiB" if limit else ""
    kept = f"the checkpoint of step {run.saved:,} is kept" if run.saved else "nothing was trained yet"
    return UserError(
        f"out of memory: micro-batches of {rows} row{'' if rows == 1 else 's'} of {width} tokens do not fit into the "
        f"memory of the {device.device_kind}{size} ({str(error).splitlines()[0]})\n"
        f"  {kept}; each of these changes is estimated to fit, with another run_dir:\n"
        + "\n".join(f"    {line}" for line in lines or ["a smaller model, or more devices (mesh.fsdp)"])
    )
