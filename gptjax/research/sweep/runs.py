"""Parses the axes of a sweep into one config per run, and groups configs that can share a compiled program."""

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

# TRACED lists the hyperparameters that a compiled program takes as arrays (tracers) with one value per run.
TRACED = (
    "optim.lr", "optim.embed_lr", "optim.head_lr", "optim.vector_lr", "optim.warmup_steps", "optim.initial_lr_ratio",
    "optim.min_lr_ratio", "optim.weight_decay", "optim.clip_norm", "model.dropout",
)  # fmt: skip
# TRACED_OF_ADAPTERS lists the hyperparameters of an adapter that a compiled program takes as arrays if lora.init=lora.
# If lora.init is not lora, the initial adapter is computed from the weights of the base model.
TRACED_OF_ADAPTERS = ("lora.alpha", "lora.rank", "lora.dropout")
MAX_PROBLEMS = 20  # The maximum number of problems that one error message lists.
MAX_RUNS = 10_000

# A dict from config keys such as "optim.lr" to an array [N] with the values of N runs, or to the value of one run.
Hyperparameters = dict[str, Any]


def grid(source: str | os.PathLike[str] | None = None, *overrides: str) -> list[Config]:
    """Returns the configs of a sweep, one config per combination of the values of all axes.

    An axis is an override with several values, such as `"optim.lr=[1e-4,3e-4]"` or `"seed=range(8)"`. In the returned
    list of configs, the values of the last override with several values vary fastest. Overrides with one value apply to
    all configs of the sweep, as in `load_config`.

    Raises:
        UserError: the config of a run is invalid (the message lists the mistakes of all runs), or an axis cannot be
            swept.
    """
    return combinations(source, *split_axes(from_args(overrides, "grid")))


def split_axes(leaves: Iterable[Leaf]) -> tuple[dict[str, list[str]], list[Leaf]]:
    """Separates the settings with several values (the axes of the sweep) from the settings with one value.

    Returns:
        A dict from the key of each axis to its values, and a list of the settings with one value.

    Raises:
        UserError: an axis has no values, contains the same value twice, or cannot be swept.
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
            problems.append(f"{leaf.key}={leaf.value}: no values; expected a list such as [1e-4,3e-4] or range(8)")
        elif len(set(values)) < len(values):
            problems.append(f"{leaf.key}={leaf.value}: a value is given twice, and both runs would be the same")
    problems += [text for key in axes if (text := _why_not(key))]
    problems.raise_if_any()
    return axes, fixed


def _values(leaf: Leaf) -> list[str] | None:
    """Returns the values of an axis as strings, or None if the setting has a single value.

    Raises:
        ValueError: the values cannot be parsed.
    """
    text = leaf.value.strip() if isinstance(leaf.value, str) else ""
    if match := re.fullmatch(r"range\(\s*(-?\d+(?:\s*,\s*-?\d+){0,2})\s*\)", text):
        values = range(*map(int, match[1].split(",")))
        if values[MAX_RUNS:]:
            raise ValueError(f"more than {MAX_RUNS:,} values")
        return list(map(str, values))
    if text.startswith("range("):
        raise ValueError("expected range(stop), range(start,stop) or range(start,stop,step) of whole numbers")
    if not text.startswith(("[", "(")):
        return None
    if get_origin(config.schema().get(leaf.key)) is tuple:
        if re.match(r"[\[(]\s*[\[(]", text):
            raise ValueError("its value is itself a list, so it cannot be swept: run one sweep for each value")
        return None
    return split_list(text)


def _why_not(key: str) -> str:
    """Returns the reason why a config key cannot be swept, or an empty string if the key can be swept."""
    if key.startswith("finetune.") and key.rpartition(".")[2] in ("seeds", "together"):
        return f"{key} cannot be swept: use seed=range(8) to repeat a run"
    if key == "task":
        return "task cannot be swept: losses of different tasks are not comparable; run one sweep for each"
    if may_change(key) or key == "train.steps_per_call":
        return f"{key} cannot be swept: it sets when or where a run is computed or written, not what it learns"
    return ""


def combinations(
    source: str | os.PathLike[str] | None, axes: dict[str, list[str]], fixed: Sequence[Leaf] = ()
) -> list[Config]:
    """Returns one config for each combination of the axes' values; each config is validated as in `load_config`."""
    configs, problems = [], dict[str, None]()
    if (n := math.prod(map(len, axes.values()))) > MAX_RUNS:
        raise UserError(f"{n:,} runs: a sweep has at most {MAX_RUNS:,}; give fewer values, or several sweeps")
    for values in itertools.product(*axes.values()):
        leaves = [Leaf(key, value, "sweep") for key, value in zip(axes, values, strict=True)]
        try:
            configs.append(uses.resolve(source, [*fixed, *leaves], verb="sweep")[0])
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    Problems(list(problems)[:MAX_PROBLEMS]).raise_if_any()
    return configs


def axes_of(configs: Sequence[Config]) -> tuple[str, ...]:
    """Returns the config keys, except run_dir, whose values differ between the configs.

    The returned keys are in the order of the config schema.
    """
    flat = [config.flat(cfg) for cfg in configs]
    return tuple(key for key, value in flat[0].items() if any(row[key] != value for row in flat) and key != "run_dir")


def programs(configs: Sequence[Config]) -> list[tuple[int, ...]]:
    """Groups the runs of a sweep by config, and returns the indices of the runs in each group.

    Runs of one group differ only in the hyperparameters that `traceable` returns, the seed and run_dir. Runs of one
    group can share a compiled program if they take the same number of steps.
    """
    groups: dict[Any, list[int]] = {}
    for i, cfg in enumerate(configs):
        values = config.flat(cfg) | {"run_dir": None, "seed": 0}
        for key in traceable(cfg):
            absent = values[key] is None or (key == "optim.clip_norm" and values[key] == 0)
            values[key] = values[key] if absent else "an array"
        groups.setdefault(tuple(values.items()), []).append(i)
    return [tuple(group) for group in groups.values()]


def traceable(cfg: Config) -> tuple[str, ...]:
    """Returns the keys of the hyperparameters that the compiled program for a config can take as arrays."""
    adapters = cfg.task != "pretrain" and cfg.finetune.trainable == "lora" and cfg.lora.init == "lora"
    # The rank and alpha of MiSS adapters are not traced, because the rank is a block size, and because alpha does not
    # scale MiSS adapters.
    adapters = adapters and not cfg.lora.miss
    return TRACED + (TRACED_OF_ADAPTERS if adapters else ())


def check(configs: Sequence[Config]) -> None:
    if not configs:
        raise UserError("a sweep without runs: give at least one config")
    problems = Problems()
    for cfg in configs:
        if cfg.mesh != MeshConfig() or cfg.distributed != DistributedConfig():
            problems.append(
                "mesh.* and distributed.*: leave out; a sweep distributes whole runs over the local devices"
            )
        if cfg.steps_per_rollout:
            what = "task=reward" if cfg.task == "reward" else "distill.on_policy"
            problems.append(f"{what}: a sweep trains on fixed data; run gptjax finetune {cfg.task} for each setting")
        if cfg.train.patience:
            problems.append("train.patience: leave out; a sweep evaluates its runs only after their last step")
        if cfg.task != "pretrain" and cfg.finetune.seeds != 1:
            problems.append(f"finetune.seeds={cfg.finetune.seeds}: in a sweep, write seed=range({cfg.finetune.seeds})")
        if cfg.task != "pretrain" and cfg.finetune.trainable != "lora":
            unused = [key for key in axes_of(configs) if key.startswith("lora.")]
            problems += [f"{key}: finetune.trainable={cfg.finetune.trainable} has no adapter" for key in unused]
        if cfg.task != configs[0].task:
            problems.append(f"task={cfg.task} and task={configs[0].task}: losses of different tasks are not comparable")
    Problems(dict.fromkeys(problems)).raise_if_any()


def with_hyperparameters(cfg: Config, values: Hyperparameters) -> Config:
    """Returns a copy of the config `cfg` with other hyperparameter values, which are not validated.

    The hyperparameter values may be tracers, but a config that contains tracers is not hashable.
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    sections = {name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in groups.items() if name}
    return dataclasses.replace(cfg, **groups.get("", {}), **sections)
