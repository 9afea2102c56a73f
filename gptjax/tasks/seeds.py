"""One fine-tuning with several seeds: run after run, or all of them in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import config, tasks, weights
from gptjax.config import Config
from gptjax.config.leaves import read_text
from gptjax.evaluation.intervals import t_interval
from gptjax.files import number, use_json, write_json
from gptjax.parallel.distributed import is_writer
from gptjax.tasks import tuning
from gptjax.training import resume, vmapped
from gptjax.training.loop import Prepare, run_task
from gptjax.training.progress import Progress
from gptjax.training.run import Hook, TrainResult
from gptjax.training.run_dir import RunDir, refuse_foreign, refuse_unwritable
from gptjax.training.task import Ready, Task, Validation


def several(cfg: Config, say: Callable[[str], None], hooks: Sequence[Hook] = ()) -> TrainResult:
    """A folder for each seed, then seeds.json: of every score of the test part the mean and a 95 % t interval."""
    folder = Path(cfg.run_dir or "runs/default")
    refuse(cfg)
    seeds = _seeds(cfg)
    if together(cfg):
        result = _in_one_program(cfg, folder, say, hooks)
    else:
        for seed in seeds:
            result = tasks.train(_alone(cfg, seed), log=say, hooks=hooks)
    if not is_writer():
        return result
    files = [folder / f"seed-{seed}" / "test.json" for seed in seeds]
    scores = [use_json(files[0], _numbers)]
    scores += [use_json(file, lambda found: {name: number(found[name]) for name in scores[0]}) for file in files[1:]]
    table = {}
    for name in scores[0]:
        values = [score[name] for score in scores]
        mean, low, high = t_interval(values)
        table[name] = {"mean": mean, "interval": [low, high], "values": values}
        say(f"seeds   {name:20} {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    write_json(folder / "seeds.json", table)
    return result


def refuse(cfg: Config) -> bool:
    """What `several` refuses before any data is read; whether all of it is finished already.

    Raises:
        UserError: as `resume.refuse`; and a folder that holds something else than the runs of seeds.
    """
    folder = RunDir(cfg.run_dir or "runs/default")
    if not folder.exists():
        refuse_unwritable(folder.path)
        refuse_foreign(folder.path, own=r"seed-\d+|seeds\.json")
    if together(cfg):
        return resume.refuse(cfg, tuning.refuse_missing)
    finished = [resume.refuse(_alone(cfg, seed), tuning.refuse_missing) for seed in _seeds(cfg)]  # each is looked at
    return all(finished)


def _numbers(scores: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in scores.items() if type(value) in (int, float)}
    if not found:
        raise ValueError("expected numbers, there are none")
    return found


def together(cfg: Config) -> bool:
    """finetune.together, or what pays: many adapters share one base, but a CPU has no units that wait for them."""
    if cfg.finetune.together is not None:
        return cfg.finetune.together
    return cfg.finetune.trainable == "lora" and jax.default_backend() != "cpu"


def _seeds(cfg: Config) -> range:
    return range(cfg.seed, cfg.seed + cfg.finetune.seeds)


def _alone(cfg: Config, seed: int) -> Config:
    run_dir = str(Path(cfg.run_dir or "runs/default") / f"seed-{seed}")
    once = dataclasses.replace(cfg.finetune, seeds=1, together=None)
    return dataclasses.replace(cfg, seed=seed, run_dir=run_dir, finetune=once)


def _in_one_program(cfg: Config, folder: Path, say: Callable[[str], None], hooks: Sequence[Hook]) -> TrainResult:
    task = tasks.find(cfg.task)

    result, _ = run_task(
        cfg, lambda cfg, progress: stacked(cfg, task.prepare, progress), say, tuning.refuse_missing, hooks
    )
    for seed in _seeds(cfg) if is_writer() else ():
        own = folder / f"seed-{seed}"
        file = own / "final" / "config.yaml"
        settings = config.from_yaml(read_text(file, "config"), str(file))
        params, _ = weights.load(own / "final")
        result = result._replace(run_dir=own, params=params, cfg=settings)
        task.evaluate(result, None, say)
    return result


def stacked(cfg: Config, prepare: Prepare, progress: Progress) -> Ready:
    """The tasks of all seeds as one, whose trained leaves and batches have a leading axis of them; the base has none.

    Each adapter has its own start, data order and split, gradient, clipping and optimizer state, as it has alone; only
    a step that is not finite for one is skipped by all. All take as many steps as the first.
    """
    every: list[Task] = []
    configs: list[Config] = []
    for seed in _seeds(cfg):
        own, task, _ = prepare(_alone(cfg, seed), progress)
        every.append(task._replace(frozen=None) if every else task)  # one base is enough
        configs.append(own)
    first, n = every[0], len(every)
    configs = [dataclasses.replace(own, train=configs[0].train) for own in configs]

    # not of `every`, whose trees training replaces
    batches_of, validations, write_of = zip(*((one.batches, one.validation, one.write) for one in every), strict=True)
    build, describe_one = first.build, first.describe

    def batches(step: int, k: int, rows: slice | None) -> Any:
        return vmapped.stack([one(step, k, rows) for one in batches_of], axis=1)

    def write(folder: Path, trained: Any, frozen: Any, files: dict[str, str]) -> None:
        runs = [(i, folder.parent / f"seed-{own.seed}" / folder.name) for i, own in enumerate(configs)]
        for i, place in [*runs, (0, folder)]:  # the run's own last: with it the run is complete
            own = jax.tree.map(lambda leaf, i=i: leaf[i], trained)
            write_of[i](place, own, frozen, files | {"config.yaml": config.to_yaml(configs[i])})

    shared = dataclasses.replace(configs[0], seed=cfg.seed, run_dir=cfg.run_dir, finetune=cfg.finetune)
    return Ready(shared, first._replace(
        batches=batches,
        validation=Validation(lambda early: vmapped.zip_batches([one.batches(early) for one in validations])),
        build=lambda cfg: vmapped.as_one(build(cfg), n),
        start=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(task.start for task in every)),
        identity={
            name: (" ".join(task.identity[name][0] for task in every), source)
            for name, (_, source) in first.identity.items()
        },
        describe=lambda size: [*describe_one(size // n), f"seeds   {n} adapters in one program"],
        write=write,
    ))  # fmt: skip
