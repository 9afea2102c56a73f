"""Many runs in one compiled program: the step, what fits into memory, and the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import config, tree
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.evaluation.intervals import t_interval
from gptjax.research.sweep.runs import Numbers, axes_of, check, programs, traceable, with_numbers
from gptjax.tasks import find
from gptjax.tasks.pretrain import EVAL_TOKENS
from gptjax.training import vmapped
from gptjax.training.memory import memory_bytes
from gptjax.training.progress import Progress
from gptjax.training.step import TrainState, make_multi_step
from gptjax.training.task import StepFunctions, Task
from gptjax.types import Mean, Metrics

WHOLE = ("optim.warmup_steps", "lora.rank")  # int32; the others are float32
MOST_STEPS_PER_CALL = 25
LAST_PART = 0.1  # of the steps, over which the final training loss is averaged


class Sweep(NamedTuple):
    """configs   as they were trained, with what only the data could tell
    axes      keys that differ, the seed's too
    rows      a dict a run: run, program, the axes' values, losses, steps skipped, whether it would have been stopped
    losses    of each run [steps] float32, the training loss of every step
    states    (runs, TrainState with leaves [len(runs), ..]), one pair a program; an adapter of a smaller rank than the
              largest of its program is filled up with zeros
    programs  a dict a program: runs, at_once, steps, seconds of compiling, of the steps and in all, bytes
    """

    configs: list[Config]
    axes: tuple[str, ...]
    rows: list[dict[str, Any]]
    losses: list[np.ndarray]
    states: list[tuple[tuple[int, ...], TrainState]]
    programs: list[dict[str, Any]]

    def state(self, run: int) -> TrainState:
        """Of one run, as `make_train_step` would have left it (but for `frozen`, which is None)."""
        runs, states = next(pair for pair in self.states if run in pair[0])
        return jax.tree.map(lambda leaf: leaf[runs.index(run)], states)


# ---------------------------------------------------------------- the step


def make_sweep_step(
    rules: Callable[[Config], StepFunctions], cfg: Config, *, batches: bool = False
) -> Callable[[TrainState, Numbers, Any, Any], tuple[TrainState, Metrics]]:
    """step(states, numbers, frozen, batch) -> (states, metrics [N]): what N steps of `make_train_step` do.

    Args:
        rules: as `Task.build`: config -> (loss, combine, optimizer).
        batches: every leaf of the batch has a leading axis N, a batch for each; otherwise all of them see the same.

    The step takes states with leaves [N, ..], numbers {key: [N]}, and `frozen`, which all of them read and none has a
    copy of.
    """
    return vmapped.make_step(
        lambda own: rules(with_numbers(cfg, own)), batches=batches, accumulation=cfg.train.accumulation
    )


def make_sweep_loss(
    rules: Callable[[Config], StepFunctions], cfg: Config, *, batches: bool = False
) -> Callable[[Any, Numbers, Any, Any], tuple[Mean, Metrics]]:
    """(params, numbers, frozen, batch) -> the losses without dropout [N], arguments as in `make_sweep_step`."""
    return vmapped.make_loss(lambda own: rules(with_numbers(cfg, own)), batches=batches)


def create(task: Task, cfg: Config, seeds: jax.Array, numbers: Numbers, start: Any = None) -> TrainState:
    """Fresh states with leaves [N, ..], each as the loop makes it. `start`: leaves [N, ..], or None."""
    init, _ = task.initial()

    def fresh(seeds: jax.Array, numbers: Numbers, start: Any) -> TrainState:
        return vmapped.create(init, lambda own: task.build(with_numbers(cfg, own)).optimizer, seeds, numbers, start)

    return jax.jit(fresh)(seeds, numbers, start)


# ---------------------------------------------------------------- memory


def bytes_a_run(cfg: Config, n_trained: int, width: int) -> int:
    """Of one run: `memory_bytes` of a step over rows of `width` tokens (20 bytes a trained number, and activations),
    and the logits of a micro-batch or, if that is more, of a batch to validate on, twice, at most 256 MiB each."""
    tokens = max(cfg.train.batch_size // cfg.train.accumulation * width, EVAL_TOKENS)
    sized = with_numbers(cfg, {"model.context_length": width})
    logits = min(4 * tokens * cfg.model.vocab_size, 2**28)
    return sum(memory_bytes(sized, n_trained, cfg.model.vocab_size).values()) + 2 * logits


def free_bytes() -> int:
    """What a sweep may take: 80 % of what the device has left; on a CPU half of the memory that nobody uses."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024 // 2
    except (OSError, StopIteration):
        return 2**31


def chunks(runs: Sequence[int], at_once: int) -> list[tuple[int, ...]]:
    """As few parts of at most `at_once` as there can be, of one size: the last ones may hold their last run twice."""
    n = -(-len(runs) // at_once)
    size = -(-len(runs) // n)
    return [(*runs[i : i + size], *[runs[-1]] * (i + size - len(runs))) for i in range(0, n * size, size)]


# ---------------------------------------------------------------- the sweep


def sweep(
    configs: Sequence[Config],
    *,
    axes: Sequence[str] | None = None,
    at_once: int | None = None,
    validate: bool = True,
    progress: Progress | None = None,
) -> Sweep:
    """Train all runs, and validate each on its whole validation set after its last step.

    Each is what `gptjax.train` (or `gptjax.finetune`) of its config does, up to rounding: the same start, order of the
    data, dropout and schedule; nothing is written. Where that run would have been stopped (`train.max_nonfinite` steps
    in a row that are not finite), its row says so and has no losses.

    Args:
        axes: of the rows; None: whatever differs.
        at_once: runs at a time; None: free_bytes() / bytes_a_run(..), less what all share.
        validate: or rows have the training loss only.
        progress: a `training.progress.Progress`; None: nothing is printed.

    Raises:
        UserError: configs that do not go together; bad data.
    """
    check(configs)
    if at_once is not None and at_once < 1:
        raise UserError(f"at_once={at_once}: expected at least 1")
    progress = progress or Progress(log=lambda line: None)
    unknown = [np.empty(0, np.float32)] * len(configs)
    done = Sweep(list(configs), tuple(axes or axes_of(configs)), [], unknown, [], [])  # filled program by program
    for runs in programs(configs):
        prepared = _prepare(configs, runs, progress)
        same_steps: dict[int, list[int]] = {}  # train.epochs can make more steps of one seed's split than of another's
        for i in runs:
            same_steps.setdefault(prepared.configs[i].train.max_steps, []).append(i)
        for part in same_steps.values():
            _train(prepared, tuple(part), done, at_once, validate, progress)
    done.rows.sort(key=lambda row: row["run"])
    return done


class _Prepared(NamedTuple):
    """Of the runs of one program: a task for each config but for its traced numbers, and who has which."""

    tasks: list[Task]
    task_of: dict[int, int]  # run -> tasks
    configs: dict[int, Config]  # run -> resolved
    frozen: Any
    most_rank: int


def _prepare(configs: Sequence[Config], runs: Sequence[int], progress: Progress) -> _Prepared:
    """Data, base and starts. A start depends on the seed and on an adapter's rank, the data on the seed."""
    first = configs[runs[0]]
    prepare = find(first.task).prepare
    keys = [key for key in traceable(first) if key != "lora.rank"]
    ready: dict[tuple[int, int], tuple[int, Config]] = {}
    tasks: list[Task] = []
    task_of, resolved, frozen = {}, {}, None
    for i in runs:
        cfg = configs[i]
        own = cfg.seed, cfg.lora.rank
        if own not in ready:
            found, task, _ = prepare(with_numbers(first, {"seed": own[0], "lora.rank": own[1]}), progress)
            frozen = frozen if tasks else task.frozen
            ready[own] = len(tasks), found
            tasks.append(task._replace(frozen=None))  # one base is enough
        task_of[i], found = ready[own]
        values = config.flat(cfg)
        resolved[i] = with_numbers(found, {key: values[key] for key in keys} | {"run_dir": cfg.run_dir})
        config.validate(resolved[i])
    return _Prepared(tasks, task_of, resolved, frozen, max(configs[i].lora.rank for i in runs))


def _train(
    prepared: _Prepared, runs: tuple[int, ...], done: Sweep, at_once: int | None, validate: bool, progress: Progress
) -> None:
    """One program: compiled once, run for each chunk of its runs."""
    began = time.perf_counter()
    cfg, task = prepared.configs[runs[0]], prepared.tasks[prepared.task_of[runs[0]]]
    every = [config.flat(prepared.configs[i]) for i in runs]
    keys = [key for key in traceable(cfg) if any(own[key] != every[0][key] for own in every)]
    init, start = task.initial()
    trained = jax.eval_shape(lambda: init(jax.random.key(0), start))
    n_trained, shared = tree.size(trained), sum(leaf.nbytes for leaf in jax.tree.leaves(prepared.frozen))
    one_run, free = bytes_a_run(cfg, n_trained, task.batches(0, 1, None).tokens.shape[-1]), free_bytes()
    devices = jax.local_devices()
    fit = max(1, (free - shared) // one_run) * len(devices)
    parts = chunks(runs, min(at_once or fit, len(runs)))
    size, steps = len(parts[0]), cfg.train.max_steps
    number = len(done.programs)
    progress.say(
        f"program {number + 1}: {len(runs)} runs, {size} at a time ({(shared + size * one_run) / 2**20:,.0f} MiB by "
        f"formula, {free / 2**20:,.0f} free), {steps:,} steps; arrays: {', '.join([*keys, 'seed'])}"
    )
    mesh = Mesh(np.array(devices), ("runs",)) if len(devices) > 1 and size % len(devices) == 0 else None
    k = next(k for k in range(min(MOST_STEPS_PER_CALL, steps), 0, -1) if steps % k == 0)
    program = _Program(task, cfg, mesh, k, validate, apart=len({prepared.configs[i].seed for i in runs}) > 1)
    states = []
    for c, part in enumerate(parts):
        state, losses, in_a_row, scores = program.run(prepared, part, keys, progress, (c, len(parts), number))
        states.append(jax.device_put(state, jax.local_devices(backend="cpu")[0]))
        for n, i in enumerate(dict.fromkeys(part)):
            done.configs[i], done.losses[i] = prepared.configs[i], losses[:, n]
            stopped = bool((in_a_row[:, n] >= cfg.train.max_nonfinite).any())
            done.rows.append(_row(i, number, done, prepared.configs[i], scores[n], int(state.skipped[n]), stopped))
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(runs)], *states)
    done.states.append((runs, whole))
    done.programs.append(
        {
            "runs": len(runs), "at_once": size, "steps": steps, "arrays": keys,
            "compile_s": program.compile_s, "steps_s": program.steps_s,
            "seconds": time.perf_counter() - began, "bytes_by_formula": shared + size * one_run,
            "bytes_by_compiler": program.compiled_bytes,
        }
    )  # fmt: skip


def _row(
    i: int, number: int, done: Sweep, cfg: Config, scores: dict[str, float], skipped: int, stopped: bool
) -> dict[str, Any]:
    values = config.flat(cfg)
    losses = done.losses[i]
    last = losses[-max(1, round(LAST_PART * len(losses))) :]
    found = {"train/loss": float(last.mean()), **scores}
    return {
        "run": i,
        "program": number,
        **{key: values[key] for key in done.axes},
        **{name: value if not stopped and math.isfinite(value) else None for name, value in found.items()},
        "skipped": skipped,
        "stopped": stopped,
    }


class _Program:
    """The step and the loss of one program, compiled when they are first run.

    k: steps a call. validate: at the end. apart: the runs differ in their seeds, and so in their batches.
    """

    def __init__(self, task: Task, cfg: Config, mesh: Mesh | None, k: int, validate: bool, apart: bool):
        self.validate, self.steps_s = validate, 0.0
        self.task, self.cfg, self.mesh, self.k, self.apart = task, cfg, mesh, k, apart
        self.eval_apart = apart and cfg.task != "pretrain"  # the held-out text is the same for every seed
        step = make_sweep_step(task.build, cfg, batches=apart)

        def steps(states: TrainState, numbers: Numbers, frozen: Any, batches: Any) -> Any:
            """`batches` [K, N, ..] or [K, ..] -> metrics [K, N]."""
            return make_multi_step(lambda s, b: step(s, numbers, frozen, b))(states, batches)

        runs, same = P("runs"), P()
        of_batch = P(None, "runs") if apart else same
        self.steps = self._over_devices(steps, (runs, runs, same, of_batch), (runs, P(None, "runs")), (0,))
        loss = make_sweep_loss(task.build, cfg, batches=self.eval_apart)
        self.loss = self._over_devices(loss, (runs, runs, same, runs if self.eval_apart else same), runs)
        self.compiled: Any = None
        self.compile_s = 0.0
        self.compiled_bytes: int | None = None

    def _over_devices(self, fn: Callable, ins: Any, outs: Any, donate: tuple[int, ...] = ()) -> jax.stages.Wrapped:
        if self.mesh is not None:
            fn = jax.shard_map(fn, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return jax.jit(fn, donate_argnums=donate)

    def run(
        self,
        prepared: _Prepared,
        part: tuple[int, ...],
        keys: Sequence[str],
        progress: Progress,
        place: tuple[int, ...],
    ) -> tuple[TrainState, np.ndarray, np.ndarray, list[dict[str, float]]]:
        """States, losses [steps, N], steps in a row that were not finite [steps, N], and what validation says."""
        cfg, (chunk, n_chunks, number) = self.cfg, place
        own = [prepared.configs[i] for i in part]
        by_seed = {prepared.configs[i].seed: prepared.tasks[prepared.task_of[i]] for i in part}  # whatever the rank
        tasks = [by_seed[c.seed] for c in own] if self.apart else [self.task]
        every = [config.flat(c) for c in own]
        numbers = {k: jnp.array([v[k] for v in every], jnp.int32 if k in WHOLE else jnp.float32) for k in keys}
        with progress.phase("compiling the initialisation"):
            starts = [prepared.tasks[prepared.task_of[i]].initial()[1] for i in part]
            start = _starts(starts, prepared.most_rank)
            states = create(self.task, cfg, jnp.array([c.seed for c in own], jnp.uint32), numbers, start)
        frozen = prepared.frozen
        if self.mesh is not None:
            states, numbers = jax.device_put((states, numbers), NamedSharding(self.mesh, P("runs")))
            frozen = jax.device_put(frozen, NamedSharding(self.mesh, P()))
        losses: list[np.ndarray] = []
        in_a_row: list[np.ndarray] = []

        def read(metrics: Metrics) -> None:
            losses.append(np.asarray(metrics["loss"]))
            in_a_row.append(np.asarray(metrics["skipped_in_a_row"]))

        before: Metrics = {}
        total = n_chunks * cfg.train.max_steps
        self._compile(progress, (states, numbers, frozen, self._batches(tasks, 0)))
        began = time.perf_counter()
        with progress.phase(f"training {len(part)} runs"):
            for step in range(0, cfg.train.max_steps, self.k):
                args = states, numbers, frozen, self._batches(tasks, step)
                states, metrics = self.compiled(*args)
                if before:
                    read(before)
                    finite = losses[-1][-1][np.isfinite(losses[-1][-1])]
                    mean = finite.mean() if len(finite) else math.nan
                    at = chunk * cfg.train.max_steps + step
                    progress.status(at, total, f"program {number + 1}: step {at:,}/{total:,}, mean loss {mean:.4f}")
                before = metrics
            read(before)
        self.steps_s += time.perf_counter() - began
        scores: list[dict[str, float]] = [{} for _ in part]
        if self.validate:
            with progress.phase("validating"):
                scores = self._validate(states.params, numbers, frozen, tasks)
        return states, np.concatenate(losses), np.concatenate(in_a_row), scores

    def _compile(self, progress: Progress, args: tuple) -> None:
        if self.compiled is None:
            with progress.phase("compiling the step of all runs"):
                began = time.perf_counter()
                self.compiled = self.steps.lower(*args).compile()
                self.compile_s = time.perf_counter() - began
            found = self.compiled.memory_analysis()
            if found is not None:
                self.compiled_bytes = found.argument_size_in_bytes + found.temp_size_in_bytes

    def _batches(self, tasks: Sequence[Task], step: int) -> Any:
        """[K, N, ..], each seed's made once; [K, ..] of a single seed."""
        if not self.apart:
            return tasks[0].batches(step, self.k, None)
        made = {id(task): task.batches(step, self.k, None) for task in tasks}
        return vmapped.stack([made[id(task)] for task in tasks], axis=1)

    def _validate(self, params: Any, numbers: Numbers, frozen: Any, tasks: Sequence[Task]) -> list[dict[str, float]]:
        """Sums over all batches on the host in float64, as `evaluate` makes them."""
        sums: dict[str, Mean] = {}
        validation = self.task.validation.batches(False)
        if self.eval_apart:
            validation = vmapped.zip_batches([task.validation.batches(False) for task in tasks])
        for batches in validation:
            mean, metrics = self.loss(params, numbers, frozen, batches)
            for name, part in {"loss": mean, **metrics}.items():
                if isinstance(part, Mean):
                    before = sums.get(name, Mean(0.0, 0.0))
                    total, weight = (np.asarray(x, np.float64) for x in part)
                    sums[name] = Mean(before.total + total, before.weight + weight)
        found = {name: mean.total / np.maximum(mean.weight, 1e-9) for name, mean in sums.items()}
        scores = []
        for n in range(len(found["loss"])):
            own = {name: float(values[n]) for name, values in found.items()}
            more = self.task.validation.derived_metrics(own["loss"]) if math.isfinite(own["loss"]) else {}
            scores.append({f"val/{name}": float(value) for name, value in {**own, **more}.items()})
        return scores


def _starts(starts: Sequence[Any], most: int) -> Any:
    """[N, ..] of each leaf; an adapter of a rank below `most` is filled up with zeros, whose gradients are zero too."""
    if starts[0] is None:
        return None

    def padded(path: str, leaf: jax.Array) -> jax.Array:
        axis = {"a": leaf.ndim - 1, "b": leaf.ndim - 2}.get(path.rpartition("/")[2])
        if axis is None or not path.startswith("adapter/"):
            return leaf
        sides = [(0, most - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
        return jnp.pad(leaf, sides)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree.map_paths(padded, start) for start in starts))


# ---------------------------------------------------------------- mean and interval


def table(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """A dict a combination of the axes but the seed: n, stopped, and of every measure its mean over the seeds with a
    95 % t interval as `NAME/low` and `NAME/high`; the lowest validation loss first.

    A measure that a run has not, because it was stopped or is not finite, has no mean either.
    """
    names = [key for key in axes if key != "seed"]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in names), []).append(row)
    out = []
    for values, group in groups.items():
        line: dict[str, Any] = dict(zip(names, values, strict=True))
        line |= {"n": len(group), "stopped": sum(row["stopped"] for row in group)}
        for name in dict.fromkeys(key for row in group for key in row if key.startswith(("train/", "val/"))):
            found = [row.get(name) for row in group]
            numbers = [value for value in found if value is not None]
            mean, low, high = (None,) * 3 if len(numbers) < len(found) else t_interval(numbers)
            line |= {name: mean, f"{name}/low": low, f"{name}/high": high}
        out.append(line)
    by = "val/loss" if "val/loss" in out[0] else "train/loss"
    return sorted(out, key=lambda line: (line[by] is None, line[by]))
