"""Fine-tunes a model with several seeds, either sequentially or vmapped in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import config, tasks, weights
from gptjax._moved import moved_name
from gptjax.config import Config
from gptjax.config.leaves import read_text
from gptjax.evaluation.intervals import t_interval
from gptjax.files import number, use_json, write_json
from gptjax.parallel.distributed import is_writer
from gptjax.training import resume, vmapped
from gptjax.training.loop import Prepare, run_task
from gptjax.training.progress import Progress
from gptjax.training.run import Hook, TrainResult
from gptjax.training.run_dir import RunDir, refuse_foreign, refuse_unwritable
from gptjax.training.task import Ready, Task, Validation


def over_seeds(cfg: Config, say: Callable[[str], None], hooks: Sequence[Hook] = ()) -> TrainResult:
    """Trains one run per seed, each in its own folder.

    The mean and the 95 % t interval of each test score are written to seeds.json.
    """
    folder = Path(cfg.run_folder)
    refuse(cfg)
    seeds = _seeds(cfg)
    if is_vmapped(cfg):
        result = _train_vmapped(cfg, folder, say, hooks)
    else:
        for seed in seeds:
            result = tasks.train(_seed_config(cfg, seed), log=say, hooks=hooks)
    if not is_writer():
        return result
    files = [folder / f"seed-{seed}" / "test.json" for seed in seeds]
    scores = [use_json(files[0], _numbers)]
    scores += [use_json(file, lambda table: {name: number(table[name]) for name in scores[0]}) for file in files[1:]]
    table = {}
    for name in scores[0]:
        values = [score[name] for score in scores]
        mean, low, high = t_interval(values)
        table[name] = {"mean": mean, "interval": [low, high], "values": values}
        say(f"seeds   {name:20} {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    write_json(folder / "seeds.json", table)
    return result


def refuse(cfg: Config) -> bool:
    """Runs those checks of `over_seeds` that need no data, and returns whether all runs have finished already.

    Raises:
        UserError: `resume.refuse` finds a problem in the config or in a run directory; or the folder of all seeds is
            not writable, or holds files other than seeds.json and the run directories of the seeds.
    """
    folder, missing = RunDir(cfg.run_folder), tasks.find(cfg.task).refuse_missing
    if not folder.exists():
        refuse_unwritable(folder.path)
        refuse_foreign(folder.path, allowed=r"seed-\d+|seeds\.json")
    if is_vmapped(cfg):
        return resume.refuse(cfg, missing)
    # The results of `resume.refuse` are collected in a list, so that all seeds are checked. With a generator in place
    # of the list, `all` would stop at the first run that has not finished, without checking the later seeds.
    finished = [resume.refuse(_seed_config(cfg, seed), missing) for seed in _seeds(cfg)]
    return all(finished)


def _numbers(scores: dict[str, Any]) -> dict[str, Any]:
    numeric = {name: value for name, value in scores.items() if type(value) in (int, float)}
    if not numeric:
        raise ValueError("expected numeric scores, got none")
    return numeric


def is_vmapped(cfg: Config) -> bool:
    """Returns whether the seeds are trained in one vmapped program, as set by finetune.together.

    If finetune.together is null, the seeds are vmapped only if the trained params are adapters, the device is a GPU or
    TPU, and train.patience is not set. On a CPU, one vmapped program is no faster than sequential runs. If
    train.patience is set, runs with different seeds end at different steps.
    """
    if cfg.finetune.together is not None:
        return cfg.finetune.together
    one_program = not cfg.steps_per_rollout and not cfg.train.patience and cfg.finetune.trainable == "lora"
    return one_program and jax.default_backend() != "cpu"


def _seeds(cfg: Config) -> range:
    return range(cfg.seed, cfg.seed + cfg.finetune.seeds)


def _seed_config(cfg: Config, seed: int) -> Config:
    run_dir = str(Path(cfg.run_folder) / f"seed-{seed}")
    once = dataclasses.replace(cfg.finetune, seeds=1, together=None)
    return dataclasses.replace(cfg, seed=seed, run_dir=run_dir, finetune=once)


def _train_vmapped(cfg: Config, folder: Path, say: Callable[[str], None], hooks: Sequence[Hook]) -> TrainResult:
    task = tasks.find(cfg.task)

    result, _ = run_task(
        cfg, lambda cfg, progress: stacked(cfg, task.prepare, progress), say, task.refuse_missing, hooks
    )
    for seed in _seeds(cfg) if is_writer() else ():
        seed_dir = folder / f"seed-{seed}"
        file = seed_dir / "final" / "config.yaml"
        settings = config.from_yaml(read_text(file, "config"), str(file))
        params, _ = weights.load(seed_dir / "final")
        result = result._replace(run_dir=seed_dir, params=params, cfg=settings)
        task.evaluate(result, None, say)
    return result


def stacked(cfg: Config, prepare: Prepare, progress: Progress) -> Ready:
    """Combines the tasks of all seeds into one task.

    The trained params and the batches of the combined task have a leading axis over seeds. The frozen params have no
    axis over seeds, because all seeds share the frozen params.

    The initialisation, data split, data order, gradient, gradient clipping and optimizer state are computed per seed,
    as in a separate run. If the loss or gradient of one seed is not finite, all seeds skip the step. All seeds train
    for as many steps as the first seed.
    """
    seed_tasks: list[Task] = []
    configs: list[Config] = []
    for seed in _seeds(cfg):
        resolved, task, _ = prepare(_seed_config(cfg, seed), progress)
        # Only the first task keeps its frozen params, so that only one copy of the base model is in memory.
        seed_tasks.append(task._replace(frozen=None) if seed_tasks else task)
        configs.append(resolved)
    first, n = seed_tasks[0], len(seed_tasks)
    configs = [dataclasses.replace(resolved, train=configs[0].train) for resolved in configs]

    # A closure over `seed_tasks` would keep the initial params in memory after training has replaced these params.
    batch_fns, validations, write_fns = zip(
        *((task.batches, task.validation, task.write) for task in seed_tasks), strict=True
    )
    build, describe = first.build, first.describe

    def batches(step: int, k: int, rows: slice | None) -> Any:
        return vmapped.stack([batches(step, k, rows) for batches in batch_fns], axis=1)

    def write(folder: Path, trained: Any, frozen: Any, files: dict[str, str]) -> None:
        runs = [(i, folder.parent / f"seed-{resolved.seed}" / folder.name) for i, resolved in enumerate(configs)]
        # The folder that all seeds share is written last, because its existence means that the folders of all seeds are
        # complete.
        for i, run_folder in [*runs, (0, folder)]:
            params = jax.tree.map(lambda leaf, i=i: leaf[i], trained)
            write_fns[i](run_folder, params, frozen, files | {"config.yaml": config.to_yaml(configs[i])})

    shared = dataclasses.replace(configs[0], seed=cfg.seed, run_dir=cfg.run_dir, finetune=cfg.finetune)
    return Ready(shared, first._replace(
        batches=batches,
        validation=Validation(lambda first: vmapped.zip_batches([val.batches(first) for val in validations])),
        build=lambda cfg: vmapped.as_one(build(cfg), n),
        start=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(task.start for task in seed_tasks)),
        fingerprints={
            name: (" ".join(task.fingerprints[name][0] for task in seed_tasks), setting)
            for name, (_, setting) in first.fingerprints.items()
        },
        describe=lambda size: [*describe(size // n), f"seeds   {n} adapters in one program"],
        write=write,
    ))  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
