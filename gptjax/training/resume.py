"""Starts a training run, resumes a run from a checkpoint, and saves checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax import config, parallel, tokenizers, tree, weights
from gptjax.checkpoint import Checkpoints, Damaged, Restored
from gptjax.config import Config
from gptjax.errors import UserError, complaints
from gptjax.files import number, sync, use_json
from gptjax.parallel import distributed, make_mesh, place
from gptjax.signals import Signals
from gptjax.training import loggers
from gptjax.training.compile import steps_per_call
from gptjax.training.meter import Meter
from gptjax.training.progress import Progress
from gptjax.training.run import Counters, Run, TrainResult
from gptjax.training.run_dir import BITWISE, RunDir, changes, environment, longer, train_further
from gptjax.training.step import TrainState, init_state
from gptjax.training.task import Ready, Task
from gptjax.weights.native import recover_folder

# ---------------------------------------------------------------- before the run


def refuse(written: Config, missing: Callable[[Config], None]) -> bool:
    """Checks a config and its run directory, without reading data or writing files.

    Checking a config and its run directory takes about a second.

    Args:
        written: the config as the user wrote it, without the values that depend on the data.
        missing: function that raises UserError if data, tokenizer or base model do not exist; not called if the run
            is finished.

    Returns:
        True if the run is finished: final/ was written at step `train.max_steps` of the stored config or later, and
        `written` has no more steps or epochs than the stored config; or final/ was written after as many evaluations
        without a lower validation loss as the train.patience of `written` allows.

    Raises:
        UserError: a check failed; the message lists all problems.
    """
    run = RunDir(written.run_folder)
    run_problems, result = complaints(run.check, written), run.final / "result.json"
    if not run_problems and result.exists():
        (step, _), stored = use_json(result, result_of), run.stored()
        if (not longer(stored, written) and step >= stored.train.max_steps) or _stopped_early(run, written):
            return True
    settings = written.train
    rows = settings.batch_size // settings.accumulation
    problems = [*complaints(missing, written), *complaints(loggers.check, settings.loggers)]
    if written.distributed.coordinator is None or jax.distributed.is_initialized():
        problems += complaints(lambda: make_mesh(written.mesh, rows=rows, even_one=written.optim.offload))
    if settings.epochs is None:
        problems += complaints(steps_per_call, written, 0)
    if problems := [*problems, *(run_problems or complaints(run.refuse_busy))]:
        raise UserError.all(problems)
    return False


def _stopped_early(run: RunDir, written: Config) -> bool:
    """Returns whether the train.patience of the config `written` rules out further training of a finished run."""
    since_best = use_json(run.final / "result.json", lambda result: number(result.get("best/evaluations_since", 0)))
    return since_best >= written.train.patience > 0


def finished(run: RunDir, written: Config, say: Callable[[str], None]) -> TrainResult:
    """Returns the result of a finished run, and prints that the run has finished already."""
    (step, loss), cfg = use_json(run.final / "result.json", result_of), run.stored()
    params, _ = weights.load(run.final)
    early = _stopped_early(run, written)
    steps = f"{step:,} steps{' (train.patience is exhausted)' if early else ''}"
    say(f"{run.path} is finished: {steps}, validation loss {loss:.4f}. Nothing to do.")
    say(f"  for another run choose another run_dir=FOLDER; to generate text: gptjax sample {run.path}")
    if early:
        say("  to train for more steps: a larger train.patience, or train.patience=0")
    elif cfg.optim.open_ended:
        say("  to train for more steps: train.max_steps=N")
    else:
        say(f"  {train_further(cfg, run.path)}")
    return TrainResult(run.path, params, cfg, tokenizers.load(run.final), step, loss)


def result_of(result: dict[str, Any]) -> tuple[int, float]:
    """Returns the training step and the validation loss from the contents of a result.json file.

    Raises:
        TypeError, ValueError, LookupError: the contents of the file are invalid.
    """
    step, loss = number(result["step"]), float(number(result["val/loss"]))
    if type(step) is not int or step < 0:
        raise ValueError(f"step: expected a non-negative integer, got {step}")
    return step, loss


# ---------------------------------------------------------------- checkpoints


def begin(ready: Ready, dir: RunDir, mesh: Mesh | None, progress: Progress, signals: Signals) -> Run:
    """Creates a training run, with a newly initialised state or with the state of the newest checkpoint."""
    cfg, task, _ = ready
    functions, (init, start) = task.functions(cfg), task.initial()

    def new_state(start: Any) -> TrainState:
        return init_state(init, functions.optimizer, cfg.seed, start)

    abstract = parallel.abstract_on(new_state, mesh, start, offload=cfg.optim.offload)
    run = Run(
        cfg, task._replace(start=None, frozen=None), functions, dir, mesh, progress, signals,
        Checkpoints(dir.checkpoints, cfg.train.keep_checkpoints, progress.say), environment(), distributed.is_writer(),
        abstract, tree.size(abstract.params), task.batches(0, 1, None).tokens.size,
    )  # fmt: skip
    progress.say(f"run     {dir.path}, seed {cfg.seed}, {run.environment['device']}")
    if mesh is not None:
        progress.say("mesh    " + " x ".join(f"{name} {n}" for name, n in mesh.shape.items()) + " devices")
    for line in task.describe(run.n_params):
        progress.say(line)
    restored = run.checkpoints.restore(abstract, lambda meta: accept(dir, cfg, task, meta))
    if run.writes:
        dir.begin(cfg, run.environment)
        recover_folder(dir.best)
    if restored:
        go_on(run, restored, abstract)
    else:
        # The initial params are sharded first, so that no array is donated to an array with another sharding.
        start = parallel.place_params(start, mesh)
        with progress.phase("compiling the initialisation"):
            run.state = parallel.init_on(new_state, mesh, start, donate=(0,), offload=cfg.optim.offload)
        if run.writes:
            dir.cut_metrics(-1, progress.say)
            (dir.path / "samples.txt").unlink(missing_ok=True)
    run.state = run.state.replace(frozen=parallel.place_params(task.frozen, mesh))
    run.began = time.monotonic() - run.counters.seconds
    return run


def checkpointer(meter: Meter) -> Callable[[Run], None]:
    """Returns a hook function that saves a checkpoint of the run.

    A checkpoint contains the state, the counters, the data hashes, the config and the environment. When a run is
    resumed, the hashes, the config and the environment in the checkpoint are compared with the current values.
    """

    def save(run: Run) -> None:
        if run.saved == run.step:
            return
        with run.progress.phase("saving a checkpoint"):
            meter.drain()
            if meter.file:
                meter.file.sync()
            if run.writes and run.task.rollouts:
                sync(run.dir.rollouts)
            run.counters.seconds = run.seconds()
            meta = {
                "identity": hashes(run.task),
                "counters": {  # Infinity and NaN are stored as text, because JSON cannot represent them as numbers.
                    name: value if math.isfinite(value) else str(value)
                    for name, value in dataclasses.asdict(run.counters).items()
                },
                "environment": run.environment,
                "config": config.to_yaml(run.cfg),
            }
            run.checkpoints.save(run.step, run.state.replace(frozen=None), meta)
        run.saved = run.step

    return save


def hashes(task: Task) -> dict[str, str]:
    """Returns the hashes of the data and weights that a checkpoint depends on, as a dict from name to hash."""
    return {name: digest for name, (digest, _) in task.fingerprints.items()}


def accept(dir: RunDir, cfg: Config, task: Task, meta: dict[str, Any]) -> None:
    """Checks that a checkpoint was saved with the same data, tokenizer and settings as the current run.

    Raises:
        UserError: the data, the tokenizer or the settings differ.
    """
    stored = meta_config(meta)
    if bad := [name for name, (digest, _) in task.fingerprints.items() if meta["identity"].get(name) != digest]:
        settings = dict.fromkeys(task.fingerprints[name][1] for name in bad)
        raise UserError(
            f"{dir.path} was trained with another {' and another '.join(bad)}: the files of "
            f"{' or '.join(settings)} have changed\n"
            "  nothing was overwritten. Restore the old files, or choose another run_dir=FOLDER"
        )
    if changed := changes(stored, cfg):
        raise UserError.all(
            [
                f"{dir.checkpoints}: the newest checkpoint is from a run with other settings (checkpoint -> now):",
                *(f"  {line}" for line in changed),
                "  nothing was overwritten. Move that checkpoint back to its own run, or choose another run_dir=FOLDER",
            ]
        )


def meta_config(meta: dict[str, Any]) -> Config:
    """Validates the metadata of a checkpoint, and returns the config that the metadata contain.

    Raises:
        Damaged: a field is missing or has the wrong type.
    """
    for key, kind in (("identity", dict), ("counters", dict), ("environment", dict), ("config", str)):
        if not isinstance(meta.get(key), kind):
            raise Damaged(f"meta.json: expected {'text' if kind is str else 'an object'} at meta/{key}")
    try:
        _counters(meta["counters"])
        return config.from_yaml(meta["config"], "its settings")
    except (TypeError, ValueError, OverflowError) as error:  # ValueError includes its subclass UserError.
        raise Damaged(f"meta.json: {error}") from error


def go_on(run: Run, restored: Restored, abstract: TrainState) -> None:
    """Resumes a run from the state and the counters in a checkpoint.

    The metrics and samples of steps after the checkpoint are deleted.
    """
    run.step = run.saved = restored.step
    run.state = restored.state
    if run.mesh is not None:
        run.state = place(restored.state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    run.counters = _counters(restored.meta["counters"])
    samples = run.dir.path / "samples.txt"
    if run.writes:
        run.dir.cut_metrics(run.step, run.progress.say)
    if run.writes and samples.exists() and samples.stat().st_size > run.counters.samples_bytes:
        os.truncate(samples, run.counters.samples_bytes)
    run.progress.say(f"resuming from step {run.step:,} of {run.cfg.train.max_steps:,}")
    before = restored.meta["environment"]
    if changed := [name for name in BITWISE if before.get(name) != run.environment[name]]:
        run.progress.say(
            f"WARNING: {', '.join(changed)} changed since the checkpoint (environment.json): the run resumes, but "
            "its results are not bitwise equal to those of an uninterrupted run"
        )


def _counters(values: dict[str, Any]) -> Counters:
    """Validates and returns the counters in a checkpoint's metadata.

    Raises:
        ValueError, TypeError, OverflowError: the counters are invalid.
    """
    fields = {field.name: type(field.default) for field in dataclasses.fields(Counters)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown counters {', '.join(unknown)}")
    read: dict[str, Any] = {name: float(value) if isinstance(value, str) else value for name, value in values.items()}
    for name, value in read.items():
        if type(value) not in (int, fields[name]) or float(value) == -math.inf:
            raise ValueError(f"counter {name}: expected a number, got {value!r}")
    counters = Counters(**read)
    if counters.samples_bytes < 0:
        raise ValueError(f"counter samples_bytes: expected at least 0, got {counters.samples_bytes}")
    return counters
