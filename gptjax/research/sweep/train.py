"""Trains the runs of a sweep: defines the vmapped training step, the memory estimate per run, and the training loop."""

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
from gptjax.optim import average_of
from gptjax.research.sweep.runs import Hyperparameters, axes_of, check, programs, traceable, with_hyperparameters
from gptjax.tasks import find
from gptjax.tasks.pretrain import EVAL_TOKENS
from gptjax.training import vmapped
from gptjax.training.memory import memory_bytes
from gptjax.training.progress import Progress
from gptjax.training.step import TrainState, make_multi_step
from gptjax.training.task import StepFunctions, Task
from gptjax.types import Mean, Metrics

# INTEGERS lists the hyperparameters whose arrays have dtype int32. The arrays of hyperparameters that are not in
# INTEGERS have dtype float32.
INTEGERS = ("optim.warmup_steps", "lora.rank")
MAX_STEPS_PER_CALL = 25
FINAL_FRACTION = 0.1  # The final training loss of a run is the average over the last 10 % of the run's steps.


class Sweep(NamedTuple):
    """The result of `sweep`.

    Attributes:
        configs: config of each run, in which settings that are derived from the data, such as the number of steps, are
            filled in.
        axes: config keys that the rows list. By default, the keys that differ between runs, including the seed.
        rows: one dict per run: the index of the run, the index of its program, the axes' values, final losses, number
            of skipped steps, and whether training would have been stopped.
        losses: training loss of every step, one array [steps] float32 per run.
        states: one pair per program: (indices of its runs, TrainState with leaves [len(runs), ..]). Adapters are
            zero-padded to the largest rank in the program.
        programs: one dict per program: number of runs, number of runs at a time, number of steps, keys of the
            hyperparameters that are passed as arrays, compile time, time of all steps and total time (in seconds),
            memory estimated with `bytes_per_run` and memory reported by the compiler (in bytes).
    """

    configs: list[Config]
    axes: tuple[str, ...]
    rows: list[dict[str, Any]]
    losses: list[np.ndarray]
    states: list[tuple[tuple[int, ...], TrainState]]
    programs: list[dict[str, Any]]

    def state(self, run: int) -> TrainState:
        """Returns the final state of one run.

        Up to rounding, the final state of a run in a sweep equals the final state of a run that is trained alone, with
        two exceptions: `frozen` is None, and an adapter is zero-padded to the largest rank in the program.
        """
        runs, states = next(pair for pair in self.states if run in pair[0])
        return jax.tree.map(lambda leaf: leaf[runs.index(run)], states)


# ---------------------------------------------------------------- the step


def make_sweep_step(
    build: Callable[[Config], StepFunctions], cfg: Config, *, batches: bool = False
) -> Callable[[TrainState, Hyperparameters, Any, Any], tuple[TrainState, Metrics]]:
    """Returns the training step of `make_train_step`, vmapped over N runs.

    The training step is a function `step(states, values, frozen, batch)` that returns the new states and the metrics,
    [N] each. The leaves of `states` have shape [N, ..]. The dict `values` maps the key of each hyperparameter to an
    array [N]. The tree `frozen` holds the frozen parameters, of which all runs share one copy.

    Args:
        build: function that takes a config and returns `StepFunctions`, such as `Task.functions`.
        batches: whether every leaf of `batch` has a leading axis N, with one batch per run. False: all runs share one
            batch.
    """
    return vmapped.make_step(
        lambda values: build(with_hyperparameters(cfg, values)), batches=batches, accumulation=cfg.train.accumulation
    )


def make_sweep_loss(
    build: Callable[[Config], StepFunctions], cfg: Config, *, batches: bool = False
) -> Callable[[Any, Hyperparameters, Any, Any], tuple[Mean, Metrics]]:
    """Returns a function `loss(params, values, frozen, batch)` that computes the losses of N runs, without dropout.

    The function `loss` returns the losses and the metrics, [N] each. The argument `params` holds the trained
    parameters, with leaves [N, ..]. The arguments `values`, `frozen` and `batch` are described in `make_sweep_step`.
    """
    return vmapped.make_loss(lambda values: build(with_hyperparameters(cfg, values)), batches=batches)


def create(task: Task, cfg: Config, seeds: jax.Array, values: Hyperparameters, start: Any = None) -> TrainState:
    """Creates the initial states of N runs, stacked into leaves [N, ..].

    The initial state of a run in a sweep equals the initial state of a run that is trained alone. If `start` is None,
    the parameters are initialised from the seeds. If `start` is not None, it holds the initial parameters, with leaves
    [N, ..].
    """
    init, _ = task.initial()

    def fresh(seeds: jax.Array, values: Hyperparameters, start: Any) -> TrainState:
        return vmapped.create(
            init, lambda values: task.functions(with_hyperparameters(cfg, values)).optimizer, seeds, values, start
        )

    return jax.jit(fresh)(seeds, values, start)


# ---------------------------------------------------------------- memory


def bytes_per_run(cfg: Config, n_trained: int, width: int) -> int:
    """Estimates the device memory that one run of a sweep needs, in bytes.

    The memory estimate of a run is the sum of three terms: the trained parameters with their gradients, updates and
    optimizer state (20 bytes per parameter with AdamW), the activations of a micro-batch with rows of `width` tokens,
    and twice the size of the logits. The function `training.memory.memory_bytes` computes the memory of the parameters
    and the activations.

    The logits are counted for a micro-batch or for a validation batch, whichever is larger. The memory estimate counts
    at most 256 MiB of logits, because the loss computes larger logits in chunks of at most 256 MiB. If JAX may use more
    than 8 GiB of a GPU's memory, the memory estimate is too low, because on such a GPU a chunk of logits takes 1/32 of
    the usable memory, but at most 1 GiB.
    """
    tokens = max(cfg.train.batch_size // cfg.train.accumulation * width, EVAL_TOKENS)
    sized = with_hyperparameters(cfg, {"model.context_length": width})
    logits = min(4 * tokens * cfg.model.vocab_size, 2**28)
    return sum(memory_bytes(sized, n_trained, cfg.model.vocab_size).values()) + 2 * logits


def free_bytes() -> int:
    """Returns the number of bytes of memory that a sweep may use on one device.

    A sweep may use 80 % of the free memory of a GPU or TPU. On a CPU, a sweep may use half of the available RAM, or 2
    GiB if the available RAM is unknown.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024 // 2
    except (OSError, StopIteration):
        return 2**31


def chunks(runs: Sequence[int], at_once: int) -> list[tuple[int, ...]]:
    """Splits the runs into as few chunks of equal size as possible, with at most `at_once` runs in a chunk.

    The last chunk of runs is padded with copies of the last run, so that all chunks have the same size.
    """
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
    """Trains all runs of a sweep, and evaluates each run on its whole validation set after its last step.

    Up to rounding, each run of a sweep gives the result of `gptjax.train` (or `gptjax.finetune`) with its config: the
    initialisation, data order, dropout and schedule are the same. No files are written. `gptjax.train` stops a run
    after `train.max_nonfinite` consecutive non-finite steps. A sweep trains every run to its last step; in the row of
    results of a run that `gptjax.train` would have stopped, `stopped` is True and all metrics are None.

    Args:
        axes: config keys to list in the rows of the result. None: all keys that differ between runs.
        at_once: number of runs to train at the same time. None: as many runs as fit into memory, at least one per
            device. The runs on a device share the `free_bytes()` of the device with one copy of the frozen parameters;
            every run takes `bytes_per_run(..)`.
        validate: whether to evaluate on the validation set. False: the rows of the result have only the training loss.
        progress: a `training.progress.Progress`. None: nothing is printed.

    Raises:
        UserError: the configs cannot be swept together, or the data are invalid.
    """
    check(configs)
    if at_once is not None and at_once < 1:
        raise UserError(f"at_once={at_once}: expected at least 1")
    progress = progress or Progress(log=lambda line: None)
    no_losses = [np.empty(0, np.float32)] * len(configs)
    # The lists in `result` are filled group by group: results are added when a program has trained its group of runs.
    result = Sweep(list(configs), tuple(axes or axes_of(configs)), [], no_losses, [], [])
    for runs in programs(configs):
        prepared = _prepare(configs, runs, progress)
        # The dict `same_steps` maps a number of steps to all runs that take this number of steps. If train.epochs is
        # set, the number of steps depends on how the seed splits the data.
        same_steps: dict[int, list[int]] = {}
        for i in runs:
            same_steps.setdefault(prepared.configs[i].train.max_steps, []).append(i)
        for group in same_steps.values():
            _train(prepared, tuple(group), result, at_once, validate, progress)
    result.rows.sort(key=lambda row: row["run"])
    return result


class _Prepared(NamedTuple):
    """The prepared runs of one compiled program.

    Attributes:
        tasks: one task for each combination of seed and adapter rank.
        task_of: dict from the index of a run to the index of its task in `tasks`.
        configs: dict from the index of a run to its config, in which settings derived from the data are filled in.
        frozen: frozen parameters, which all runs share.
        max_rank: largest adapter rank of the runs.
    """

    tasks: list[Task]
    task_of: dict[int, int]
    configs: dict[int, Config]
    frozen: Any
    max_rank: int


def _prepare(configs: Sequence[Config], runs: Sequence[int], progress: Progress) -> _Prepared:
    """Prepares the data, the base model and the initial parameters of a group of runs that share a compiled program.

    The data of a run depend on its seed. The initial parameters of a run depend on its seed and on the adapter's rank.
    """
    first = configs[runs[0]]
    prepare = find(first.task).prepare
    keys = [key for key in traceable(first) if key != "lora.rank"]
    ready: dict[tuple[int, int], tuple[int, Config]] = {}
    tasks: list[Task] = []
    task_of, resolved, frozen = {}, {}, None
    for i in runs:
        cfg = configs[i]
        variant = cfg.seed, cfg.lora.rank
        if variant not in ready:
            changes = {"seed": cfg.seed, "lora.rank": cfg.lora.rank}
            ready_cfg, task, _ = prepare(with_hyperparameters(first, changes), progress)
            frozen = frozen if tasks else task.frozen
            ready[variant] = len(tasks), ready_cfg
            tasks.append(task._replace(frozen=None))  # The variable `frozen` holds the base model for all runs.
        task_of[i], ready_cfg = ready[variant]
        values = config.flat(cfg)
        resolved[i] = with_hyperparameters(ready_cfg, {key: values[key] for key in keys} | {"run_dir": cfg.run_dir})
        config.validate(resolved[i])
    return _Prepared(tasks, task_of, resolved, frozen, max(configs[i].lora.rank for i in runs))


def _train(
    prepared: _Prepared, runs: tuple[int, ...], result: Sweep, at_once: int | None, validate: bool, progress: Progress
) -> None:
    """Compiles the program of a group of runs once, then trains the runs chunk by chunk."""
    began = time.perf_counter()
    cfg, task = prepared.configs[runs[0]], prepared.tasks[prepared.task_of[runs[0]]]
    flat = [config.flat(prepared.configs[i]) for i in runs]
    keys = [key for key in traceable(cfg) if any(row[key] != flat[0][key] for row in flat)]
    init, start = task.initial()
    trained = jax.eval_shape(lambda: init(jax.random.key(0), start))
    n_trained, shared = tree.size(trained), sum(leaf.nbytes for leaf in jax.tree.leaves(prepared.frozen))
    run_bytes, free = bytes_per_run(cfg, n_trained, task.batches(0, 1, None).tokens.shape[-1]), free_bytes()
    devices = jax.local_devices()
    fit = max(1, (free - shared) // run_bytes) * len(devices)
    groups = chunks(runs, min(at_once or fit, len(runs)))
    size, steps = len(groups[0]), cfg.train.max_steps
    number = len(result.programs)
    progress.say(
        f"program {number + 1}: {len(runs)} runs, {size} at a time ({(shared + size * run_bytes) / 2**20:,.0f} MiB "
        f"estimated, {free / 2**20:,.0f} free), {steps:,} steps; arrays: {', '.join([*keys, 'seed'])}"
    )
    mesh = Mesh(np.array(devices), ("runs",)) if len(devices) > 1 and size % len(devices) == 0 else None
    k = next(k for k in range(min(MAX_STEPS_PER_CALL, steps), 0, -1) if steps % k == 0)
    program = _Program(task, cfg, mesh, k, validate, by_seed=len({prepared.configs[i].seed for i in runs}) > 1)
    states = []
    for c, group in enumerate(groups):
        state, losses, in_a_row, scores = program.run(prepared, group, keys, progress, (c, len(groups), number))
        states.append(jax.device_put(state, jax.local_devices(backend="cpu")[0]))
        for n, i in enumerate(dict.fromkeys(group)):
            result.configs[i], result.losses[i] = prepared.configs[i], losses[:, n]
            stopped = bool((in_a_row[:, n] >= cfg.train.max_nonfinite).any())
            result.rows.append(_row(i, number, result, prepared.configs[i], scores[n], int(state.skipped[n]), stopped))
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(runs)], *states)
    result.states.append((runs, stacked))
    result.programs.append(
        {
            "runs": len(runs), "at_once": size, "steps": steps, "arrays": keys,
            "compile_s": program.compile_s, "steps_s": program.steps_s,
            "seconds": time.perf_counter() - began, "bytes_by_formula": shared + size * run_bytes,
            "bytes_by_compiler": program.compiled_bytes,
        }
    )  # fmt: skip


def _row(
    i: int, number: int, result: Sweep, cfg: Config, scores: dict[str, float], skipped: int, stopped: bool
) -> dict[str, Any]:
    values = config.flat(cfg)
    losses = result.losses[i]
    last = losses[-max(1, round(FINAL_FRACTION * len(losses))) :]
    measures = {"train/loss": float(last.mean()), **scores}
    return {
        "run": i,
        "program": number,
        **{key: values[key] for key in result.axes},
        **{name: value if not stopped and math.isfinite(value) else None for name, value in measures.items()},
        "skipped": skipped,
        "stopped": stopped,
    }


class _Program:
    """The vmapped training step and the vmapped loss of one group of runs, which are compiled on first use.

    Args:
        k: number of training steps per call of the compiled step.
        validate: whether to evaluate the runs after their last step.
        by_seed: whether the runs differ in their seeds, and therefore in their batches.
    """

    def __init__(self, task: Task, cfg: Config, mesh: Mesh | None, k: int, validate: bool, by_seed: bool):
        self.validate, self.steps_s = validate, 0.0
        self.task, self.cfg, self.mesh, self.k, self.by_seed = task, cfg, mesh, k, by_seed
        # Pretraining runs share the validation text even if their seeds differ.
        self.eval_by_seed = by_seed and cfg.task != "pretrain"
        step = make_sweep_step(task.functions, cfg, batches=by_seed)

        def steps(states: TrainState, values: Hyperparameters, frozen: Any, batches: Any) -> Any:
            """Trains N runs for K steps.

            The leaves of `batches` have shape [K, N, ..] for K steps and N runs, or [K, ..] if all runs share one batch
            per step. The metrics have shape [K, N].
            """
            return make_multi_step(lambda s, b: step(s, values, frozen, b))(states, batches)

        runs, replicated = P("runs"), P()
        batch_spec = P(None, "runs") if by_seed else replicated
        self.steps = self._over_devices(steps, (runs, runs, replicated, batch_spec), (runs, P(None, "runs")), (0,))
        loss = make_sweep_loss(task.build, cfg, batches=self.eval_by_seed)
        self.loss = self._over_devices(loss, (runs, runs, replicated, runs if self.eval_by_seed else replicated), runs)
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
        group: tuple[int, ...],
        keys: Sequence[str],
        progress: Progress,
        place: tuple[int, ...],
    ) -> tuple[TrainState, np.ndarray, np.ndarray, list[dict[str, float]]]:
        """Trains the N runs of `group`, and computes the validation metrics of the runs if `validate` is set.

        Returns:
            (states, losses [steps, N], number of consecutive non-finite steps [steps, N], validation metrics of each
            run).
        """
        cfg, (chunk, n_chunks, number) = self.cfg, place
        configs = [prepared.configs[i] for i in group]
        # Runs with the same seed are trained on the same batches, so all runs with the same seed can share one task.
        seed_tasks = {prepared.configs[i].seed: prepared.tasks[prepared.task_of[i]] for i in group}
        tasks = [seed_tasks[c.seed] for c in configs] if self.by_seed else [self.task]
        flat = [config.flat(c) for c in configs]
        values = {k: jnp.array([row[k] for row in flat], jnp.int32 if k in INTEGERS else jnp.float32) for k in keys}
        with progress.phase("compiling the initialisation"):
            starts = [prepared.tasks[prepared.task_of[i]].initial()[1] for i in group]
            start = _starts(starts, prepared.max_rank)
            states = create(self.task, cfg, jnp.array([c.seed for c in configs], jnp.uint32), values, start)
        frozen = prepared.frozen
        if self.mesh is not None:
            states, values = jax.device_put((states, values), NamedSharding(self.mesh, P("runs")))
            frozen = jax.device_put(frozen, NamedSharding(self.mesh, P()))
        losses: list[np.ndarray] = []
        in_a_row: list[np.ndarray] = []

        def read(metrics: Metrics) -> None:
            losses.append(np.asarray(metrics["loss"]))
            in_a_row.append(np.asarray(metrics["skipped_in_a_row"]))

        # The variable `previous` holds the metrics of the previous call of the compiled step. The metrics of a compiled
        # call are read only after the next compiled call has started, so that the device stays busy.
        previous: Metrics = {}
        total = n_chunks * cfg.train.max_steps
        self._compile(progress, (states, values, frozen, self._batches(tasks, 0)))
        began = time.perf_counter()
        with progress.phase(f"training {len(group)} runs"):
            for step in range(0, cfg.train.max_steps, self.k):
                args = states, values, frozen, self._batches(tasks, step)
                states, metrics = self.compiled(*args)
                if previous:
                    read(previous)
                    finite = losses[-1][-1][np.isfinite(losses[-1][-1])]
                    mean = finite.mean() if len(finite) else math.nan
                    done = chunk * cfg.train.max_steps + step
                    progress.status(done, total, f"program {number + 1}: step {done:,}/{total:,}, mean loss {mean:.4f}")
                previous = metrics
            read(previous)
        self.steps_s += time.perf_counter() - began
        scores: list[dict[str, float]] = [{} for _ in group]
        if self.validate:
            with progress.phase("validating"):
                scores = self._validate(average_of(states.params, states.opt_state), values, frozen, tasks)
        return states, np.concatenate(losses), np.concatenate(in_a_row), scores

    def _compile(self, progress: Progress, args: tuple) -> None:
        if self.compiled is None:
            with progress.phase("compiling the step of all runs"):
                began = time.perf_counter()
                self.compiled = self.steps.lower(*args).compile()
                self.compile_s = time.perf_counter() - began
            memory = self.compiled.memory_analysis()
            if memory is not None:
                self.compiled_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def _batches(self, tasks: Sequence[Task], step: int) -> Any:
        """Returns the batches of K steps, stacked into leaves [K, N, ..], or [K, ..] if all N runs have the same seed.

        The batches of runs with the same seed are equal, and are made only once per seed.
        """
        if not self.by_seed:
            return tasks[0].batches(step, self.k, None)
        made = {id(task): task.batches(step, self.k, None) for task in tasks}
        return vmapped.stack([made[id(task)] for task in tasks], axis=1)

    def _validate(
        self, params: Any, values: Hyperparameters, frozen: Any, tasks: Sequence[Task]
    ) -> list[dict[str, float]]:
        """Returns each run's validation metrics, averaged over all batches as in `training.step.evaluate`.

        The averages of the metrics are computed on the host in float64.
        """
        sums: dict[str, Mean] = {}
        validation = self.task.validation.batches(False)
        if self.eval_by_seed:
            validation = vmapped.zip_batches([task.validation.batches(False) for task in tasks])
        for batches in validation:
            mean, metrics = self.loss(params, values, frozen, batches)
            for name, metric in {"loss": mean, **metrics}.items():
                if isinstance(metric, Mean):
                    so_far = sums.get(name, Mean(0.0, 0.0))
                    total, weight = (np.asarray(x, np.float64) for x in metric)
                    sums[name] = Mean(so_far.total + total, so_far.weight + weight)
        means = {name: mean.total / np.maximum(mean.weight, 1e-9) for name, mean in sums.items()}
        scores = []
        for n in range(len(means["loss"])):
            row = {name: float(column[n]) for name, column in means.items()}
            more = self.task.validation.derived_metrics(row["loss"]) if math.isfinite(row["loss"]) else {}
            scores.append({f"val/{name}": float(value) for name, value in {**row, **more}.items()})
        return scores


def _starts(starts: Sequence[Any], max_rank: int) -> Any:
    """Stacks the initial parameters of N runs into leaves [N, ..], with adapters zero-padded to rank `max_rank`.

    The zero padding of an adapter stays zero during training, because the gradient of the padding is zero.
    """
    if starts[0] is None:
        return None

    def padded(path: str, leaf: jax.Array) -> jax.Array:
        axis = {"a": leaf.ndim - 1, "b": leaf.ndim - 2}.get(path.rpartition("/")[2])
        if axis is None or not path.startswith("adapter/"):
            return leaf
        widths = [(0, max_rank - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
        return jnp.pad(leaf, widths)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree.map_paths(padded, start) for start in starts))


# ---------------------------------------------------------------- mean and interval


def table(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Averages the metrics of the runs of a sweep over seeds.

    The returned list has one dict per combination of the values of all axes except the seed, sorted by validation loss.
    The entries `n` and `stopped` of a returned dict are the number of runs and the number of stopped runs. For every
    metric, a returned dict has the mean over the seeds under the name of the metric, and the ends of the 95 % t
    confidence interval of the mean under `NAME/low` and `NAME/high`. The mean of a metric is None if any of the
    averaged runs was stopped or has a non-finite value of the metric.
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
            values_or_none = [row.get(name) for row in group]
            finite = [value for value in values_or_none if value is not None]
            mean, low, high = (None,) * 3 if len(finite) < len(group) else t_interval(finite)
            line |= {name: mean, f"{name}/low": low, f"{name}/high": high}
        out.append(line)
    by = "val/loss" if "val/loss" in out[0] else "train/loss"
    return sorted(out, key=lambda line: (line[by] is None, line[by]))
