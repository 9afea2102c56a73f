"""Which runs a sweep is made of, and which of them can share a program."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_origin

from gptjax import config
from gptjax.config import Config, DistributedConfig, MeshConfig, uses
from gptjax.config.leaves import Leaf, Problems, from_args, split_list
from gptjax.errors import UserError
from gptjax.training.run_dir import may_change

# What a program can take as an array.
TRACED = (
    "optim.lr", "optim.embed_lr", "optim.head_lr", "optim.vector_lr", "optim.warmup_steps", "optim.initial_lr_ratio",
    "optim.min_lr_ratio", "optim.weight_decay", "optim.clip_norm", "model.dropout",
)  # fmt: skip
TRACED_OF_ADAPTERS = ("lora.alpha", "lora.rank", "lora.dropout")  # of those that do not start from the weights
MOST_COMPLAINTS = 20
MOST_RUNS = 10_000

Numbers = dict[str, Any]  # "optim.lr" -> [N]


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
    configs, problems = [], dict[str, None]()
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
        values = config.flat(cfg) | {"run_dir": None, "seed": 0}
        for key in traceable(cfg):
            absent = values[key] is None or (key == "optim.clip_norm" and values[key] == 0)
            values[key] = values[key] if absent else "an array"
        groups.setdefault(tuple(values.items()), []).append(i)
    return [tuple(group) for group in groups.values()]


def traceable(cfg: Config) -> tuple[str, ...]:
    adapters = cfg.task != "pretrain" and cfg.finetune.trainable == "lora" and cfg.lora.init == "lora"
    return TRACED + (TRACED_OF_ADAPTERS if adapters else ())


def check(configs: Sequence[Config]) -> None:
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


def with_numbers(cfg: Config, numbers: Numbers) -> Config:
    """`cfg` with other values, which may be traced: nothing is looked at, and the result is not hashable then."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in numbers.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    parts = {group: dataclasses.replace(getattr(cfg, group), **own) for group, own in groups.items() if group}
    return dataclasses.replace(cfg, **groups.get("", {}), **parts)
