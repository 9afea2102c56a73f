"""Defines the settings that each task reads. A setting that a task does not read is refused on the command line and in
the user's files: if the setting were silently ignored, the user might conclude that the setting does not change the
results.

For example, reads("classify", "lora.rank") is True, and reads("classify", "model.n_layer") is False, because
fine-tuning takes the number of layers from the base model, finetune.base.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields

from gptjax.config.leaves import Leaf, Provenance
from gptjax.config.load import build, config_file, file_layers, layer, presets, short
from gptjax.config.schema import RUN_FOLDER, TUNINGS, Computation, Config, schema
from gptjax.errors import UserError

_RUN, _LOOP = ("run_dir", "task", "seed"), ("optim.*", "train.*", "mesh.*", "distributed.*")
_COMPUTATION = [item.name for item in fields(Computation)]
_TUNED = (*_RUN, "finetune.*", "lora.*", *_LOOP, *(f"model.{name}" for name in _COMPUTATION))
# `USES` maps each task to the patterns of the settings that the task reads, in the order of `--help`. The tasks that
# train a language model also read sample.*, because `gptjax sample RUN` takes its defaults from the settings of the
# run.
USES: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain.*", *_RUN, "data.*", "tokenizer.*", "model.*", *_LOOP, "sample.*"),
    "classify": ("classify.*", *_TUNED),
    "instruct": ("instruct.*", *_TUNED, "sample.*"),
    "prefer": ("prefer.*", *_TUNED, "sample.*"),
    "reward": ("reward.*", *_TUNED, "sample.*"),
    "distill": ("distill.*", *_TUNED, "sample.*"),
    "reward_model": ("reward_model.*", *_TUNED),
}


def reads(task: str, key: str, also: Sequence[str] = ()) -> bool:
    """Returns True if the task reads the setting `key`, or if `key` matches one of the additional patterns in
    `also`."""
    return any(matches(pattern, key) for pattern in (*USES[task], *also))


def keys_of(cfg: Config, also: Sequence[str] = ()) -> list[str]:
    """Returns the keys of the settings that a run of `cfg` reads, in the order of the schema."""
    adapter = _reads_lora(cfg.task, cfg.finetune.trainable)
    return [key for key in schema() if reads(cfg.task, key, also) and (adapter or not matches("lora.*", key))]


def _reads_lora(task: str, trainable: object) -> bool:
    return task == "pretrain" or trainable == "lora"


def matches(pattern: str, key: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def verb_of(task: str) -> str:
    return "pretrain" if task == "pretrain" else f"finetune {task}"


def resolve(
    source: str | os.PathLike[str] | None,
    leaves: Iterable[Leaf],
    *,
    verb: str,
    task: str | None = None,
    also: Sequence[str] = (),
) -> tuple[Config, Provenance]:
    """Loads the config for a command like `load.resolve`, but raises UserError for settings that the command's task
    does not read.

    Args:
        source: a preset, YAML file or run directory, or None for the default settings of gptjax.
        leaves: the settings given on the command line.
        verb: name of the command, for error messages.
        task: the task of the command. None: the command takes any task; the task is read from `leaves` or, if they do
            not set it, from `source`; if neither sets it, the task is pretrain.
        also: patterns of settings that the command reads besides those of its task.

    Raises:
        UserError: `task`, `source` and `leaves` do not agree on the task; or the user's files or `leaves` contain
            settings that the task does not read, even if they are set to their default values; or `load.resolve`
            reports problems. If the tasks do not agree, the message reports only that; otherwise it lists all problems.
    """
    layers, leaves = file_layers(source), list(leaves)
    resolved_task = _task(source, layers, leaves, verb, task)
    defaults = [Leaf("task", resolved_task, f"gptjax {verb}")]
    run_dir = None if source is None else f"runs/{config_file(source).stem}"
    # Only settings that the user wrote are refused. The presets of gptjax, and the config.yaml of a run, may contain
    # settings that the task does not read; a config.yaml contains the settings of all tasks.
    preset_files = {short(path) for path in presets().values()}
    groups: dict[str, set[str]] = {}
    for leaf in layers:
        groups.setdefault(layer(leaf.where), set()).add(leaf.key.partition(".")[0])
    # a file with settings of all three oldest fine-tuning tasks counts as the config.yaml of a run; older runs lack the
    # newer tasks
    tunings = ("classify", "instruct", "prefer")
    complete_files = {name for name, names in groups.items() if names.issuperset(tunings)}
    user_leaves = [*(leaf for leaf in layers if layer(leaf.where) not in preset_files | complete_files), *leaves]
    unread = [
        *_unread(user_leaves, resolved_task, verb, also),
        *_without_adapter(user_leaves, [*layers, *leaves], resolved_task),
    ]
    return build([*defaults, *layers, *leaves], run_dir or RUN_FOLDER, unread)


def _task(source: object, layers: list[Leaf], leaves: list[Leaf], verb: str, task: str | None) -> str:
    """Returns the name of the command's task. Names of unknown tasks are ignored here, because `load.build` reports
    unknown tasks."""
    in_files, given = task_of(layers), task_of(leaves)
    expected = task or given or in_files or "pretrain"
    if in_files and in_files != expected:
        hint = f": gptjax {verb_of(in_files)} {source}" if task else f", not for task={expected}"
        raise UserError(f"{source} is for task={in_files}{hint}")
    if given and given != expected:
        raise UserError(f"task={given}: this is gptjax {verb}; use gptjax {verb_of(given)}")
    return expected


def task_of(leaves: Iterable[Leaf]) -> str | None:
    """Returns the name of the task in the last setting `task` in `leaves`, or None if there is no such setting. Names
    of unknown tasks are ignored."""
    return next(iter([leaf.value for leaf in leaves if leaf.key == "task" and leaf.value in USES][-1:]), None)


def _unread(leaves: list[Leaf], task: str, verb: str, also: Sequence[str]) -> list[str]:
    """Returns error texts for the settings in `leaves` that the task does not read.

    Settings that were set in the same place, and that the task ignores for the same reason, share one error text.
    """
    reasons = {
        "model": f"whose model is finetune.base (it reads only model.{', model.'.join(_COMPUTATION)})",
        "tokenizer": "whose tokenizer is that of finetune.base",
        "data": f"whose data is {task}.source",
        "sample": "which writes no text",
        "pretrain": "only of gptjax pretrain",
    }
    unread: dict[tuple[str, str], list[str]] = {}
    for leaf in leaves:
        if leaf.key in schema() and not reads(task, leaf.key, also):
            group = leaf.key.partition(".")[0]
            tuning = f"only of gptjax finetune{f' {group}' if group in TUNINGS else ''}"
            reason = tuning if task == "pretrain" else reasons.get(group, f"only of gptjax finetune {group}")
            unread.setdefault((leaf.where, reason), []).append(leaf.key)
    return [
        f"{location}: {', '.join(dict.fromkeys(keys))}: not a setting of gptjax {verb}, {reason}"
        for (location, reason), keys in unread.items()
    ]


def _without_adapter(user_leaves: list[Leaf], all_leaves: list[Leaf], task: str) -> list[str]:
    """Returns an error text for each lora.* setting of the user if the value of finetune.trainable selects no adapter.

    A lora.* setting is not an error if a later file or the command line sets finetune.trainable to a value without an
    adapter. For example, a file may set finetune.trainable=lora and lora.rank, while the command line sets
    finetune.trainable=all.
    """
    trainable = next((leaf for leaf in reversed(all_leaves) if leaf.key == "finetune.trainable"), None)
    if trainable is None or _reads_lora(task, trainable.value):
        return []
    layers = list(dict.fromkeys(layer(leaf.where) for leaf in all_leaves))
    first = layers.index(layer(trainable.where))
    return [
        f"{leaf.where}: {leaf.key}: finetune.trainable={trainable.value} has no adapter"
        for leaf in user_leaves
        if matches("lora.*", leaf.key) and leaf.key in schema() and layers.index(layer(leaf.where)) >= first
    ]
