"""Which settings a task reads. On a command line one that nothing reads is refused, from whatever layer it came:
a setting that is ignored in silence looks like one that does not help.

reads("classify", "lora.rank")          True
reads("classify", "model.n_layer")      False: the model is that of finetune.base
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields

from gptjax.config.leaves import Leaf, Provenance
from gptjax.config.load import build, config_file, file_layers, layer, presets, short
from gptjax.config.schema import Computation, Config, schema
from gptjax.errors import UserError

TUNINGS = ("classify", "instruct", "prefer")
_RUN, _LOOP = ("run_dir", "task", "seed"), ("optim.*", "train.*", "mesh.*", "distributed.*")
_COMPUTATION = [item.name for item in fields(Computation)]
_TUNED = (*_RUN, "finetune.*", "lora.*", *_LOOP, *(f"model.{name}" for name in _COMPUTATION))
# task -> patterns of settings, in the order of `--help`; sample.* is where `gptjax sample RUN` starts from
USES: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain.*", *_RUN, "data.*", "tokenizer.*", "model.*", *_LOOP, "sample.*"),
    "classify": ("classify.*", *_TUNED),
    "instruct": ("instruct.*", *_TUNED, "sample.*"),
    "prefer": ("prefer.*", *_TUNED, "sample.*"),
}


def reads(task: str, key: str, also: Sequence[str] = ()) -> bool:
    return any(matches(pattern, key) for pattern in (*USES[task], *also))


def keys_of(cfg: Config, also: Sequence[str] = ()) -> list[str]:
    """The settings that a run of `cfg` reads, in the order of the schema."""
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
    """`load.resolve` for a verb of the command line.

    Args:
        task: what the verb is for; None: any, as the preset says. also: patterns of what the verb reads beside it.

    Raises:
        UserError: a preset of another task; settings that the task does not read, in the user's own files or on the
            command line, at their defaults too; and what `load.resolve` refuses. All of the latter two at once.
    """
    layers, leaves = file_layers(source), list(leaves)
    wanted = _task(source, layers, leaves, verb, task)
    under = [Leaf("task", wanted, f"gptjax {verb}")]
    run_dir = None if source is None else f"runs/{config_file(source).stem}"
    # what the user wrote: neither a preset of the house nor a config.yaml, which holds the settings of all tasks
    house = {short(path) for path in presets().values()}
    groups: dict[str, set[str]] = {}
    for leaf in layers:
        groups.setdefault(layer(leaf.where), set()).add(leaf.key.partition(".")[0])
    whole = {name for name, found in groups.items() if found.issuperset(TUNINGS)}
    own = [*(leaf for leaf in layers if layer(leaf.where) not in house | whole), *leaves]
    unread = [*_unread(own, wanted, verb, also), *_without_adapter(own, [*layers, *leaves], wanted)]
    return build([*under, *layers, *leaves], run_dir or "runs/default", unread)


def _task(source: object, layers: list[Leaf], leaves: list[Leaf], verb: str, task: str | None) -> str:
    """What is to be trained; a wrong word for it is left to the schema."""
    stated = [leaf.value for leaf in layers if leaf.key == "task" and leaf.value in USES][-1:]
    given = [leaf.value for leaf in leaves if leaf.key == "task" and leaf.value in USES][-1:]
    wanted = [task] if task else given or stated or ["pretrain"]
    if stated and stated != wanted:
        hint = f": gptjax {verb_of(stated[0])} {source}" if task else f", not for task={wanted[0]}"
        raise UserError(f"{source} is for task={stated[0]}{hint}")
    if given and given != wanted:
        raise UserError(f"task={given[0]}: this is gptjax {verb}; use gptjax {verb_of(given[0])}")
    return wanted[0]


def _unread(leaves: list[Leaf], task: str, verb: str, also: Sequence[str]) -> list[str]:
    why = {
        "model": f"whose model is finetune.base (of model.* it reads {', '.join(_COMPUTATION)})",
        "tokenizer": "whose tokenizer is that of finetune.base",
        "data": f"whose data is {task}.source",
        "sample": "which writes no text",
        "pretrain": "only of gptjax pretrain",
    }
    found: dict[tuple[str, str], list[str]] = {}
    for leaf in leaves:
        if leaf.key in schema() and not reads(task, leaf.key, also):
            group = leaf.key.partition(".")[0]
            tuning = f"only of gptjax finetune{f' {group}' if group in TUNINGS else ''}"
            reason = tuning if task == "pretrain" else why.get(group, f"only of gptjax finetune {group}")
            found.setdefault((leaf.where, reason), []).append(leaf.key)
    return [
        f"{where}: {', '.join(dict.fromkeys(keys))}: not a setting of gptjax {verb}, {reason}"
        for (where, reason), keys in found.items()
    ]


def _without_adapter(own: list[Leaf], every: list[Leaf], task: str) -> list[str]:
    """The user's lora.* beside or after a finetune.trainable that trains no adapter; what a later layer rules is none
    of them."""
    trainable = next((leaf for leaf in reversed(every) if leaf.key == "finetune.trainable"), None)
    if trainable is None or _reads_lora(task, trainable.value):
        return []
    names = list(dict.fromkeys(layer(leaf.where) for leaf in every))
    first = names.index(layer(trainable.where))
    return [
        f"{leaf.where}: {leaf.key}: finetune.trainable={trainable.value} has no adapter"
        for leaf in own
        if matches("lora.*", leaf.key) and leaf.key in schema() and names.index(layer(leaf.where)) >= first
    ]
