"""Many runs in one compiled program. A sweep is a list of configs, each of which is a run by itself:

configs = sweep.grid("tiny-gpt2", "optim.lr=[1e-3,3e-3,1e-2]", "seed=range(8)")     24 runs
found   = sweep.sweep(configs)                          trained side by side, each as if it were alone
found.rows                                              a dict a run: what differs, losses
sweep.table(found.rows, found.axes)                     a dict a combination: mean and interval over seeds
found.state(5).params                                   of one run

Numbers (`TRACED`: rates, decay, warmup, clip, dropout, an adapter's scale and rank, the seed) are arrays with an entry
a run, and the step of `make_train_step` is vmapped over them. Whatever else differs changes the program: runs are
grouped, one program a group. What fits into memory goes at a time.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import config, tree
from gptjax.config import Config, DistributedConfig, MeshConfig, uses
from gptjax.config.leaves import Leaf, from_args, split_list
from gptjax.errors import Problems, UserError
from gptjax.evaluation.intervals import t_interval
from gptjax.files import write_json, write_text
from gptjax.tasks import find
from gptjax.tasks.pretrain import EVAL_TOKENS
from gptjax.tasks.seeds import stack
from gptjax.training.memory import memory_bytes
from gptjax.training.progress import Progress
from gptjax.training.run_dir import may_change
from gptjax.training.step import TrainState, make_multi_step, make_train_step
from gptjax.training.task import Rules, Task
from gptjax.types import Mean, Metrics

# What a program can take as an array.
TRACED = (
    "optim.lr", "optim.embed_lr", "optim.head_lr", "optim.vector_lr", "optim.warmup_steps", "optim.initial_lr_ratio",
    "optim.min_lr_ratio", "optim.weight_decay", "optim.clip_norm", "model.dropout",
)  # fmt: skip
TRACED_OF_ADAPTERS = ("lora.alpha", "lora.rank", "lora.dropout")  # of those that do not start from the weights
WHOLE = ("optim.warmup_steps", "lora.rank")  # int32; the others are float32
MOST_STEPS_PER_CALL = 25
MOST_COMPLAINTS = 20
MOST_RUNS = 10_000
LAST_PART = 0.1  # of the steps, over which the final training loss is averaged

Numbers = dict[str, Any]  # "optim.lr" -> [N]


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


# ---------------------------------------------------------------- which runs


def grid(source: str | os.PathLike[str] | None = None, *overrides: str) -> list[Config]:
    """Every combination of `"optim.lr=[1e-4,3e-4]"` and `"seed=range(8)"`, the last axis fastest; what has one value is
    as in `load_config`.

    Raises:
        UserError: all mistakes of all runs; an axis that cannot be swept.
    """
    return combinations(source, *split_axes(from_args(overrides, "grid")))


def split_axes(leaves: Iterable[Leaf]) -> tuple[dict[str, list[str]], list[Leaf]]:
    """{key: values} of the settings that have several, and the others.

    Raises:
        UserError: an axis without values, with one twice, or that cannot be swept.
    """
    axes: dict[str, list[str]] = {}
    fixed, problems = [], Problems()
    for leaf in leaves:
        try:
            values = _values(leaf)
        except ValueError as error:
            problems.append(f"{leaf.key}={leaf.value}: {error}")
            continue
        if values is None:
            fixed.append(leaf)
            axes.pop(leaf.key, None)
            continue
        axes[leaf.key] = values
        if not values:
            problems.append(f"{leaf.key}={leaf.value}: no values; expected such as [1e-4,3e-4] or range(8)")
        elif len(set(values)) < len(values):
            problems.append(f"{leaf.key}={leaf.value}: a value stands there twice, and the runs would be the same")
    problems += [text for key in axes if (text := _unfit(key))]
    problems.raise_if_any()
    return axes, fixed


def _values(leaf: Leaf) -> list[str] | None:
    """The values of an axis as text; None of a setting with one. Raises ValueError."""
    text = leaf.value.strip() if isinstance(leaf.value, str) else ""
    if found := re.fullmatch(r"range\(\s*(-?\d+(?:\s*,\s*-?\d+){0,2})\s*\)", text):
        values = range(*map(int, found[1].split(",")))
        if values[MOST_RUNS:]:
            raise ValueError(f"more than {MOST_RUNS:,} values")
        return list(map(str, values))
    if text.startswith("range("):
        raise ValueError("expected range(stop), range(start,stop) or range(start,stop,step) of whole numbers")
    if not text.startswith(("[", "(")):
        return None
    if get_origin(config.schema().get(leaf.key)) is tuple:
        if re.match(r"[\[(]\s*[\[(]", text):
            raise ValueError("takes a list itself and cannot be swept: sweep once for each")
        return None
    return split_list(text)


def _unfit(key: str) -> str:
    """Why nothing can be learned from sweeping this key; nothing where something can."""
    if key.startswith("finetune.") and key.rpartition(".")[2] in ("seeds", "together"):
        return f"{key} cannot be swept: seed=range(8) is what repeats a run"
    if key == "task":
        return "task cannot be swept: their losses are not the same thing; sweep once for each"
    if may_change(key) or key == "train.steps_per_call":
        return f"{key} cannot be swept: it says when or where a run is computed or written, not what it learns"
    return ""


def combinations(
    source: str | os.PathLike[str] | None, axes: dict[str, list[str]], fixed: Sequence[Leaf] = ()
) -> list[Config]:
    """A config for each combination, each looked at as `load_config` does."""
    configs, problems = [], {}
    if (n := math.prod(map(len, axes.values()))) > MOST_RUNS:
        raise UserError(f"{n:,} runs: a sweep has at most {MOST_RUNS:,}; give fewer values, or several sweeps")
    for values in itertools.product(*axes.values()):
        own = [Leaf(key, value, "sweep") for key, value in zip(axes, values, strict=True)]
        try:
            configs.append(uses.resolve(source, [*fixed, *own], verb="sweep")[0])
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    Problems(list(problems)[:MOST_COMPLAINTS]).raise_if_any()
    return configs


def axes_of(configs: Sequence[Config]) -> tuple[str, ...]:
    """The keys that differ between the configs, in the schema's order; where they lie does not count."""
    every = [config.flat(cfg) for cfg in configs]
    return tuple(key for key, value in every[0].items() if any(own[key] != value for own in every) and key != "run_dir")


def programs(configs: Sequence[Config]) -> list[tuple[int, ...]]:
    """Which runs can share a program: those that differ in `TRACED` numbers and the seed only."""
    groups: dict[Any, list[int]] = {}
    for i, cfg in enumerate(configs):
        groups.setdefault(_program_of(cfg), []).append(i)
    return [tuple(group) for group in groups.values()]


def _program_of(cfg: Config) -> tuple:
    """The config without what may differ inside a program."""
    values = config.flat(cfg) | {"run_dir": None, "seed": 0}
    for key in traceable(cfg):
        absent = values[key] is None or (key == "optim.clip_norm" and values[key] == 0)
        values[key] = values[key] if absent else "an array"
    return tuple(values.items())


def traceable(cfg: Config) -> tuple[str, ...]:
    adapters = cfg.task != "pretrain" and cfg.finetune.trainable == "lora" and cfg.lora.init == "lora"
    return TRACED + (TRACED_OF_ADAPTERS if adapters else ())


def _check(configs: Sequence[Config]) -> None:
    if not configs:
        raise UserError("a sweep of no runs: give at least one config")
    problems = Problems()
    for cfg in configs:
        if cfg.mesh != MeshConfig() or cfg.distributed != DistributedConfig():
            problems.append("mesh.* and distributed.*: a sweep lays whole runs over this process's devices; leave out")
        if cfg.task != "pretrain" and cfg.finetune.seeds != 1:
            problems.append(f"finetune.seeds={cfg.finetune.seeds}: in a sweep it is seed=range({cfg.finetune.seeds})")
        if cfg.task != "pretrain" and cfg.finetune.trainable != "lora":
            idle = [key for key in axes_of(configs) if key.startswith("lora.")]
            problems += [f"{key}: finetune.trainable={cfg.finetune.trainable} has no adapter" for key in idle]
        if cfg.task != configs[0].task:
            problems.append(f"task={cfg.task} and task={configs[0].task}: their losses are not the same thing")
    Problems(dict.fromkeys(problems)).raise_if_any()


# ---------------------------------------------------------------- the step


def with_numbers(cfg: Config, numbers: Numbers) -> Config:
    """`cfg` with other values, which may be traced: nothing is looked at, and the result is not hashable then."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in numbers.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    parts = {group: dataclasses.replace(getattr(cfg, group), **own) for group, own in groups.items() if group}
    return dataclasses.replace(cfg, **groups.get("", {}), **parts)


def make_sweep_step(
    rules: Callable[[Config], Rules], cfg: Config, *, batches: bool = False
) -> Callable[[TrainState, Numbers, Any, Any], tuple[TrainState, Metrics]]:
    """step(states, numbers, frozen, batch) -> (states, metrics [N]): what N steps of `make_train_step` do.

    Args:
        rules: as `Task.build`: config -> (loss, combine, optimizer).
        batches: every leaf of the batch has a leading axis N, a batch for each; otherwise all of them see the same.

    The step takes states with leaves [N, ..], numbers {key: [N]}, and `frozen`, which all of them read and none has a
    copy of.
    """

    def one(state: TrainState, own: Numbers, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        loss, combine, tx = rules(with_numbers(cfg, own))
        step = make_train_step(loss, tx, combine=combine, accumulation=cfg.train.accumulation)
        state, metrics = step(state.replace(frozen=frozen), batch)
        return state.replace(frozen=None), metrics

    return jax.vmap(one, in_axes=(0, 0, None, 0 if batches else None))


def make_sweep_loss(
    rules: Callable[[Config], Rules], cfg: Config, *, batches: bool = False
) -> Callable[[Any, Numbers, Any, Any], tuple[Mean, Metrics]]:
    """(params, numbers, frozen, batch) -> the losses without dropout [N], arguments as in `make_sweep_step`."""

    def one(params: Any, own: Numbers, frozen: Any, batch: Any) -> tuple[Mean, Metrics]:
        loss, combine, _ = rules(with_numbers(cfg, own))
        return loss(combine(params, frozen), batch, None)

    return jax.vmap(one, in_axes=(0, 0, None, 0 if batches else None))


def create(task: Task, cfg: Config, seeds: jax.Array, numbers: Numbers, start: Any = None) -> TrainState:
    """Fresh states with leaves [N, ..], each as the loop makes it. `start`: leaves [N, ..], or None."""

    init, _ = task.initial()

    def one(seed: jax.Array, own: Numbers, start: Any) -> TrainState:
        init_key, key = jax.random.split(jax.random.key(seed))
        tx = task.build(with_numbers(cfg, own)).optimizer
        return TrainState.create(init(init_key, start), tx=tx, key=key)

    return jax.jit(jax.vmap(one))(seeds, numbers, start)


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
    progress: Any = None,
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
    _check(configs)
    if at_once is not None and at_once < 1:
        raise UserError(f"at_once={at_once}: expected at least 1")
    progress = progress or Progress(log=lambda line: None)
    done = _Done(list(configs), tuple(axes or axes_of(configs)))
    for runs in programs(configs):
        prepared = _prepare(configs, runs, progress)
        for part in _same_steps(prepared, runs):
            _train(prepared, part, done, at_once, validate, progress)
    order = sorted(done.rows, key=lambda row: row["run"])
    losses = [done.losses[i] for i in range(len(configs))]
    return Sweep(done.configs, done.axes, order, losses, done.states, done.programs)


class _Done:
    """What has been found so far."""

    def __init__(self, configs: list[Config], axes: tuple[str, ...]):
        self.configs, self.axes = configs, axes
        self.rows: list[dict[str, Any]] = []
        self.losses: dict[int, np.ndarray] = {}
        self.states: list[tuple[tuple[int, ...], TrainState]] = []
        self.programs: list[dict[str, Any]] = []


class _Prepared(NamedTuple):
    """Of the runs of one program: a task for each config but for its traced numbers, and who has which."""

    tasks: list[Task]
    task_of: dict[int, int]  # run -> tasks
    configs: dict[int, Config]  # run -> resolved
    frozen: Any
    most_rank: int


def _prepare(configs: Sequence[Config], runs: Sequence[int], progress: Any) -> _Prepared:
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


def _same_steps(prepared: _Prepared, runs: Sequence[int]) -> list[tuple[int, ...]]:
    """train.epochs can make more steps of one seed's split than of another's: these are programs of their own."""
    groups: dict[int, list[int]] = {}
    for i in runs:
        groups.setdefault(prepared.configs[i].train.max_steps, []).append(i)
    return [tuple(group) for group in groups.values()]


def _numbers(configs: Sequence[Config], keys: Sequence[str]) -> Numbers:
    """{key: [N]} of the keys, as arrays."""
    every = [config.flat(cfg) for cfg in configs]
    return {key: jnp.array([v[key] for v in every], jnp.int32 if key in WHOLE else jnp.float32) for key in keys}


def _train(
    prepared: _Prepared, runs: tuple[int, ...], done: _Done, at_once: int | None, validate: bool, progress: Any
) -> None:
    """One program: compiled once, run for each chunk of its runs."""
    began = time.perf_counter()
    cfg, task = prepared.configs[runs[0]], prepared.tasks[prepared.task_of[runs[0]]]
    every = [config.flat(prepared.configs[i]) for i in runs]
    keys = [key for key in traceable(cfg) if any(own[key] != every[0][key] for own in every)]
    init, start = task.initial()
    trained = jax.eval_shape(lambda: init(jax.random.key(0), start))
    n_trained, shared = tree.size(trained), _size_bytes(prepared.frozen)
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
    i: int, number: int, done: _Done, cfg: Config, scores: dict[str, float], skipped: int, stopped: bool
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

    def _over_devices(self, fn: Callable, ins: Any, outs: Any, donate: tuple[int, ...] = ()) -> Callable:
        if self.mesh is not None:
            fn = jax.shard_map(fn, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return jax.jit(fn, donate_argnums=donate)

    def run(
        self, prepared: _Prepared, part: tuple[int, ...], keys: Sequence[str], progress: Any, place: tuple[int, ...]
    ) -> tuple[TrainState, np.ndarray, np.ndarray, list[dict[str, float]]]:
        """States, losses [steps, N], steps in a row that were not finite [steps, N], and what validation says."""
        cfg, (chunk, n_chunks, number) = self.cfg, place
        own = [prepared.configs[i] for i in part]
        by_seed = {prepared.configs[i].seed: prepared.tasks[prepared.task_of[i]] for i in part}  # whatever the rank
        tasks = [by_seed[c.seed] for c in own] if self.apart else [self.task]
        numbers = _numbers(own, keys)
        with progress.phase("compiling the initialisation"):
            starts = [prepared.tasks[prepared.task_of[i]].initial()[1] for i in part]
            start = _starts(starts, prepared.most_rank)
            states = create(self.task, cfg, jnp.array([c.seed for c in own], jnp.uint32), numbers, start)
        frozen = prepared.frozen
        if self.mesh is not None:
            states, numbers = jax.device_put((states, numbers), NamedSharding(self.mesh, P("runs")))
            frozen = jax.device_put(frozen, NamedSharding(self.mesh, P()))
        losses, in_a_row, before = [], [], None
        total = n_chunks * cfg.train.max_steps
        self._compiled(progress, (states, numbers, frozen, self._batches(tasks, 0)))
        began = time.perf_counter()
        with progress.phase(f"training {len(part)} runs"):
            for step in range(0, cfg.train.max_steps, self.k):
                args = states, numbers, frozen, self._batches(tasks, step)
                states, metrics = self.compiled(*args)
                if before is not None:
                    _keep(before, losses, in_a_row)
                    finite = losses[-1][-1][np.isfinite(losses[-1][-1])]
                    mean = finite.mean() if len(finite) else math.nan
                    at = chunk * cfg.train.max_steps + step
                    progress.status(at, total, f"program {number + 1}: step {at:,}/{total:,}, mean loss {mean:.4f}")
                before = metrics["loss"], metrics["skipped_in_a_row"]
            _keep(before, losses, in_a_row)
        self.steps_s += time.perf_counter() - began
        scores: list[dict[str, float]] = [{} for _ in part]
        if self.validate:
            with progress.phase("validating"):
                scores = self._validate(states.params, numbers, frozen, tasks)
        return states, np.concatenate(losses), np.concatenate(in_a_row), scores

    def _compiled(self, progress: Any, args: tuple) -> None:
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
        return jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), stack([made[id(task)] for task in tasks]))

    def _validate(self, params: Any, numbers: Numbers, frozen: Any, tasks: Sequence[Task]) -> list[dict[str, float]]:
        """Sums over all batches on the host in float64, as `evaluate` makes them."""
        sums: dict[str, list[np.ndarray]] = {}
        for batches in _eval_batches(tasks) if self.eval_apart else self.task.validation.batches(False):
            mean, metrics = self.loss(params, numbers, frozen, batches)
            for name, part in {"loss": mean, **metrics}.items():
                if isinstance(part, Mean):
                    pair = [np.asarray(x, np.float64) for x in part]
                    sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), pair, strict=True)]
        found = {name: total / np.maximum(weight, 1e-9) for name, (total, weight) in sums.items()}
        scores = []
        for n in range(len(found["loss"])):
            own = {name: float(values[n]) for name, values in found.items()}
            more = self.task.validation.more(own["loss"]) if math.isfinite(own["loss"]) else {}
            scores.append({f"val/{name}": float(value) for name, value in {**own, **more}.items()})
        return scores


def _keep(metrics: tuple[jax.Array, jax.Array], losses: list[np.ndarray], in_a_row: list[np.ndarray]) -> None:
    losses.append(np.asarray(metrics[0]))
    in_a_row.append(np.asarray(metrics[1]))


def _eval_batches(tasks: Sequence[Task]) -> Iterator[Any]:
    """[N, ..] each; a validation set that is shorter than another's ends in batches of nothing."""
    for group in itertools.zip_longest(*(task.validation.batches(False) for task in tasks)):
        blank = jax.tree.map(np.zeros_like, next(some for some in group if some is not None))
        yield stack([blank if some is None else some for some in group])


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


def _size_bytes(leaves: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))


# ---------------------------------------------------------------- what it says


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
            mean, low, high = (None,) * 3 if None in found else t_interval(found)
            line |= {name: mean, f"{name}/low": low, f"{name}/high": high}
        out.append(line)
    by = "val/loss" if "val/loss" in out[0] else "train/loss"
    return sorted(out, key=lambda line: (line[by] is None, line[by]))


def lines(summary: Sequence[dict[str, Any]], axes: Sequence[str]) -> Iterator[str]:
    """`table` for people: mean +- half of the interval."""
    names = [key for key in axes if key != "seed"]
    measures = [key for key in summary[0] if f"{key}/low" in summary[0]]
    cells = [[*names, "n", *measures]]
    for line in summary:
        cells.append(
            [*(_cell(line[key]) for key in names), str(line["n"]), *(_with_half(line, key) for key in measures)]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_half(line: dict[str, Any], key: str) -> str:
    mean, high = line[key], line[f"{key}/high"]
    if mean is None:
        return f"{line['stopped']} stopped" if line["stopped"] else "not finite"
    return f"{mean:.4f}" if high is None else f"{mean:.4f} +- {high - mean:.4f}"


WRITING = ".sweep.partial"  # while it is there, sweep.csv and sweep.png are those of a sweep that was killed


def write(found: Sweep, folder: str | os.PathLike[str]) -> None:
    """sweep.csv (a line a run), sweep.json (rows, table, programs, config of run 0) and sweep.png, in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WRITING).touch()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in found.rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    write_text(folder / "sweep.csv", out.getvalue())
    summary = table(found.rows, found.axes)
    draw(found, folder / "sweep.png")
    whole = {
        "axes": list(found.axes), "rows": found.rows, "table": summary, "programs": found.programs,
        "config": config.to_yaml(found.configs[0]),
    }  # fmt: skip
    write_json(folder / "sweep.json", whole)  # last: with it the sweep is done
    (folder / WRITING).unlink(missing_ok=True)


def draw(found: Sweep, path: Path) -> None:
    """On the left the validation loss over the first axis with several numbers, a dot a run, mean and interval a line;
    on the right the training losses, a curve a combination, the mean over its seeds."""
    from gptjax.training.plot import draw_sweep

    names = [key for key in found.axes if key != "seed"]
    curves: dict[tuple, list[np.ndarray]] = {}
    for row, losses in zip(found.rows, found.losses, strict=True):
        curves.setdefault(tuple(row[key] for key in names), []).append(losses)
    draw_sweep(found.rows, table(found.rows, found.axes), names, curves, path)
