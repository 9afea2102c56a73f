"""Validates a config: checks the range of each setting, combinations of settings, and settings without effect.

A complaint is a pair (keys of the invalid settings, error text). The function `complaints` looks up where the invalid
settings were set, such as in a line of a file, and adds these places to the error text.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, Literal, Optional, get_args, get_origin

from gptjax.config.leaves import Provenance
from gptjax.config.schema import (
    CHECKS,
    TUNINGS,
    Config,
    DistributedConfig,
    ModelConfig,
    PretrainConfig,
    flat,
    leaf_fields,
    schema,
    type_name,
    without_null,
)
from gptjax.errors import Problems

Complaint = tuple[tuple[str, ...], str]
Keys = tuple[str, ...] | Callable[[Any], tuple[str, ...]]
Text = str | Callable[[Any], str]
# A `Rule` is a tuple of the keys of the settings that the rule is about, a function that returns True if a config
# violates the rule, and the error text.
Rule = tuple[Keys, Callable[[Any], object], Text]


def validate(cfg: Config) -> None:
    """Checks the ranges of all settings of a config, and the rules about combinations of settings. Raises one UserError
    that lists all invalid values and combinations."""
    Problems(text for _, text in complaints(cfg, {})).raise_if_any()


def validate_model(model: ModelConfig) -> None:
    """Checks the ranges of the settings of a model config, and the rules about combinations of these settings. Raises
    one UserError that lists all invalid values and combinations of the model config."""
    Problems(text for _, text in (*_ranges(flat(model, "model.")), *_broken(MODEL_RULES, model))).raise_if_any()


def complaints(cfg: Config, provenance: Provenance) -> Iterator[Complaint]:
    """Yields a complaint for each problem of a config: a pair of the keys of the invalid settings, and the error text,
    which includes the places where these settings were set."""
    for keys, text in (*_ranges(flat(cfg)), *_broken(MODEL_RULES, cfg.model), *_broken(RULES, cfg)):
        places = dict.fromkeys(provenance[key] for key in keys if provenance.get(key, "default") != "default")
        yield keys, text + (f"  [{'; '.join(places)}]" if places else "")


def _broken(rules: Iterable[Rule], cfg: Config | ModelConfig) -> Iterator[Complaint]:
    for keys, broken, text in rules:
        if broken(cfg):
            yield keys(cfg) if callable(keys) else keys, text(cfg) if callable(text) else text


def _ranges(values: dict[str, object]) -> Iterator[Complaint]:
    for key, value in values.items():
        setting = leaf_fields()[key].metadata
        items = value if isinstance(value, tuple) else (value,)
        for number in items:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            limits = setting["range"]
            # Integers above 2**32 - 1 overflow a uint32 array, and very large integers cannot be converted to a float.
            if isinstance(number, int):
                limits = dataclasses.replace(limits, high=min(limits.high, 2**32 - 1))
            if number not in limits or number == math.inf:
                yield (key,), f"{key} ({shown(number)}) must be {limits}"
        if choices := setting["choices"]:
            for name in sorted({*items} - {*choices}):
                yield (key,), f"{key}: {name!r} is unknown: use {', '.join(choices)} or []"


def validate_types(model: ModelConfig) -> None:
    """Checks the types of the values in a model config that is constructed in Python. Raises UserError if a value has
    the wrong type. Tracers are not checked, because tracers have no concrete value."""
    problems = Problems()
    for key, hint in schema().items():
        if not key.startswith("model."):
            continue
        value, kind = getattr(model, key.removeprefix("model.")), without_null(hint)
        if hasattr(value, "aval") or (value is None and kind is not hint):
            continue
        expected = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
        fits = value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, expected)
        if not fits or (isinstance(value, bool) and kind is not bool):
            problems.append(f"{key}: expected {type_name(hint)}, got {value!r:.80}")
    problems.raise_if_any()


def shown(value: object) -> str:
    """Formats a value for an error message. If the text of the value has more than 200 characters, the result is the
    beginning of the text and the length of the text."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # `repr` raises an error for a very long integer or a recursive list
        return "something very large"
    return text if len(text) <= 200 else f"{text[:40]}.. ({len(text):,} characters)"


# ---------------------------------------------------------------- conditions that several rules use


def _divisors(number: int, most: Optional[int] = None) -> str:
    divisors = [n for n in range(1, min(number, most or 1024) + 1) if number % n == 0]
    return ", ".join(map(str, divisors))


def _has_heads(model: ModelConfig) -> bool:
    return min(model.d_model, model.n_head, model.n_kv_head) >= 1


def _has_head_dim(model: ModelConfig) -> bool:
    """Returns True if the head dimension is defined: d_head is given, or n_head divides d_model."""
    return bool(model.d_head) or model.d_model % model.n_head == 0


def _is_manual(distributed: DistributedConfig) -> bool:
    return distributed.coordinator not in (None, "auto")


def _is_complete(distributed: DistributedConfig) -> bool:
    given = None not in (distributed.num_processes, distributed.process_id)
    return given and ":" in (distributed.coordinator or "")


def _axes(cfg: Config, size: int) -> tuple[str, ...]:
    """Returns the keys of the mesh axes whose size is set to `size`, for example to -1."""
    return tuple(key for key, value in flat(cfg.mesh, "mesh.").items() if value == size)


def _earliest_stop(cfg: Config) -> int:
    """Returns the earliest step at which early stopping (train.patience) can end a run, which is the case if the first
    evaluation is the best."""
    return (cfg.train.patience + 1) * cfg.train.eval_every


def _on_answers(cfg: Config) -> str:
    """Returns the name of the training method that trains the model on generated answers, for an error message."""
    return "reward tuning" if cfg.task == "reward" else "on-policy distillation (distill.on_policy)"


def _local(cfg: Config) -> list[str]:
    return [source for source in (*cfg.data.source, *cfg.data.val_source) if not source.startswith("hf:")]


def _finetuning_keys(cfg: Config) -> tuple[str, ...]:
    """Returns the keys of the fine-tuning settings that differ from their defaults."""
    defaults, values = flat(Config()), flat(cfg)
    groups = ("finetune.", "lora.", *(f"{task}." for task in TUNINGS))
    return tuple(key for key in values if key.startswith(groups) and values[key] != defaults[key])


# ---------------------------------------------------------------- the rules

MODEL_RULES: tuple[Rule, ...] = (
    (("model.d_model", "model.n_head"),
     lambda m: _has_heads(m) and not _has_head_dim(m),
     lambda m: f"model.d_model ({m.d_model}) must be divisible by model.n_head ({m.n_head}): "
     f"n_head can be {_divisors(m.d_model, 64)}"),
    (("model.d_model", "model.n_head", "model.d_head", "model.position"),
     lambda m: _has_heads(m) and _has_head_dim(m) and m.position == "rope" and m.head_dim % 2,
     lambda m: f"model.position=rope rotates pairs of channels: the head dimension ({m.head_dim}) must be even; "
     "it is d_head, or d_model / n_head"),
    (("model.n_head", "model.n_kv_head"),
     lambda m: _has_heads(m) and m.n_head % m.n_kv_head,
     lambda m: f"model.n_head ({m.n_head}) must be divisible by model.n_kv_head ({m.n_kv_head}): "
     f"use one of {_divisors(m.n_head)}"),
    (("model.window_pattern",),
     lambda m: not m.window_pattern or m.window_pattern.strip("SL"),
     lambda m: f"model.window_pattern ({m.window_pattern!r}) must consist of S (sliding window) and "
     "L (full attention), such as SSSL"),
    (("model.rope_fast", "model.rope_slow"),
     lambda m: m.rope_fast <= m.rope_slow,
     lambda m: f"model.rope_fast ({m.rope_fast}) must be above model.rope_slow ({m.rope_slow})"),
    (("model.position", "model.d_model"),
     lambda m: m.position == "sinusoidal" and m.d_model % 2,
     lambda m: f"model.position=sinusoidal needs an even model.d_model, got {m.d_model}"),
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    (("sample.stop",),
     lambda c: "" in c.sample.stop,
     "sample.stop contains an empty string, which would stop generation at once: remove it"),
    (("sample.pick", "sample.n"),
     lambda c: c.sample.pick and c.sample.n == 1,
     lambda c: f"sample.pick={c.sample.pick} chooses one of several samples, but sample.n=1: set sample.n=8, or "
     "sample.pick=null"),
    (("sample.pick", "sample.temperature"),
     lambda c: c.sample.pick and c.sample.temperature == 0,
     lambda c: f"sample.pick={c.sample.pick} chooses one of several samples, but with sample.temperature=0 all samples "
     "are the same: set a temperature above 0"),
    (("sample.pick", "sample.reward_model"),
     lambda c: c.sample.pick == "reward" and not c.sample.reward_model,
     "sample.pick=reward needs sample.reward_model=RUN, which gptjax finetune reward_model trains"),
    (("sample.pick", "sample.draft"),
     lambda c: c.sample.pick == "logprob" and c.sample.draft,
     "sample.pick=logprob needs log-probabilities, which speculative decoding does not return: set sample.draft=null"),
    (("train.batch_size", "train.accumulation"),
     lambda c: min(c.train.batch_size, c.train.accumulation) >= 1 and c.train.batch_size % c.train.accumulation,
     lambda c: f"train.accumulation ({c.train.accumulation}) must divide train.batch_size ({c.train.batch_size}): "
     f"use one of {_divisors(c.train.batch_size)}"),
    (("optim.warmup_steps", "train.max_steps"),
     lambda c: c.train.epochs is None and c.optim.warmup_steps >= c.train.max_steps >= 1,
     lambda c: f"optim.warmup_steps ({c.optim.warmup_steps}) must be below train.max_steps ({c.train.max_steps}): "
     "use more steps, or optim.warmup_steps=0"),
    (("train.ema", "train.average_last"),
     lambda c: c.train.ema and c.train.average_last,
     "train.ema and train.average_last are two averages of the same weights: set one of them to 0"),
    (("train.average_last",),
     lambda c: c.train.average_last > 1 and c.train.average_last % 1,
     lambda c: f"train.average_last ({c.train.average_last}) must be a whole number of steps, or a fraction below 1"),
    (("train.average_last", "train.max_steps"),
     lambda c: c.train.epochs is None and c.train.average_last > c.train.max_steps >= 1,
     lambda c: f"train.average_last ({c.train.average_last:g}) must be at most train.max_steps ({c.train.max_steps})"),
    (("train.patience", "train.average_last"),
     lambda c: c.train.patience and c.train.average_last,
     "train.patience may end the run before the last steps, which train.average_last averages: use train.ema"),
    (("train.patience", "train.eval_every", "train.max_steps"),
     lambda c: c.train.epochs is None and c.train.patience and _earliest_stop(c) >= c.train.max_steps >= 1,
     lambda c: f"train.patience={c.train.patience} could not end the run before train.max_steps "
     f"({c.train.max_steps}): with train.eval_every={c.train.eval_every} the earliest stop is at step "
     f"{_earliest_stop(c)}; evaluate more often"),
    (("train.patience", "finetune.together"),
     lambda c: c.task != "pretrain" and c.train.patience and c.finetune.seeds > 1 and c.finetune.together,
     "train.patience cannot stop seeds at different steps in one program: use finetune.together=false"),
    (("distributed.coordinator", "distributed.num_processes", "distributed.process_id"),
     lambda c: _is_manual(c.distributed) and not _is_complete(c.distributed),
     lambda c: f"distributed.coordinator={c.distributed.coordinator} must be HOST:PORT, and needs "
     "distributed.num_processes=N and distributed.process_id=0 to N-1"),
    (("distributed.process_id", "distributed.num_processes"),
     lambda c: _is_manual(c.distributed) and _is_complete(c.distributed)
     and c.distributed.process_id >= c.distributed.num_processes,
     lambda c: f"distributed.process_id ({c.distributed.process_id}) must be below distributed.num_processes "
     f"({c.distributed.num_processes})"),
    (lambda c: _axes(c, 0),
     lambda c: _axes(c, 0),
     lambda c: f"{', '.join(_axes(c, 0))} must be at least 1, or -1 for all remaining devices"),
    (lambda c: _axes(c, -1),
     lambda c: len(_axes(c, -1)) > 1,
     lambda c: f"only one of {', '.join(_axes(c, -1))} can be -1 (all remaining devices)"),
    (("mesh.context", "model.context_length"),
     lambda c: c.window >= 1 and c.mesh.context > 1 and c.window % c.mesh.context,
     lambda c: f"mesh.context ({c.mesh.context}) must divide model.context_length ({c.window})"),
    (("pretrain.context_length", "model.context_length"),
     lambda c: c.window > c.model.context_length >= 1 and (c.model.vocab_size or not c.pretrain.base),
     lambda c: f"pretrain.context_length ({c.window}) must be at most model.context_length ({c.model.context_length})"),
    (("data.source",),
     lambda c: not c.data.source or not all(c.data.source),
     "data.source is empty: name an asset, a file, a folder, or hf:org/name"),
    (("data.weights", "data.source"),
     lambda c: c.data.weights and len(c.data.weights) != len(c.data.source),
     lambda c: f"data.weights has {len(c.data.weights)} values for {len(c.data.source)} sources: "
     "give one per source, or [] to weight them by their number of tokens"),
    (("data.weights",),
     lambda c: c.data.weights and not sum(c.data.weights) > 0,
     lambda c: f"data.weights ({list(c.data.weights)}) must have a positive sum"),
    (("data.streaming", "data.source"),
     lambda c: c.data.streaming and _local(c),
     lambda c: f"data.streaming reads hf: sources only, not {', '.join(_local(c))}"),
    (("pretrain.base", "pretrain.context_length"),
     lambda c: c.task != "pretrain" and c.pretrain != PretrainConfig(),
     lambda c: f"pretrain.base and pretrain.context_length are settings of gptjax pretrain, but task={c.task}; "
     "the base model of fine-tuning is finetune.base"),
    (_finetuning_keys,
     lambda c: c.task == "pretrain" and _finetuning_keys(c),
     lambda c: f"{', '.join(_finetuning_keys(c))}: settings of gptjax finetune, but task=pretrain"),
    (("finetune.quantize", "finetune.trainable"),
     lambda c: c.task != "pretrain" and c.finetune.quantize != "none" and c.finetune.trainable != "lora",
     lambda c: f"finetune.quantize={c.finetune.quantize} needs finetune.trainable=lora: "
     "quantised weights cannot be trained"),
    (("finetune.save_merged", "finetune.trainable", "lora.init"),
     lambda c: c.task != "pretrain" and c.finetune.save_merged is False
     and (c.finetune.trainable, c.lora.init) != ("lora", "lora"),
     lambda c: "finetune.save_merged=false needs finetune.trainable=lora and lora.init=lora, got "
     f"{c.finetune.trainable} and {c.lora.init}: these change the weights of the base"),
    (("lora.miss", "lora.dora", "lora.init", "lora.lr_ratio"),
     lambda c: c.task != "pretrain" and c.lora.miss
     and (c.lora.dora, c.lora.init, c.lora.lr_ratio) != (False, "lora", 1),
     lambda c: "lora.miss=true trains one matrix, initialised to zero: it needs lora.dora=false, lora.init=lora and "
     f"lora.lr_ratio=1, got {str(c.lora.dora).lower()}, {c.lora.init} and {c.lora.lr_ratio:g}"),
    (("finetune.together", "finetune.trainable"),
     lambda c: c.task != "pretrain" and c.finetune.together and c.finetune.trainable != "lora",
     "finetune.together=true needs finetune.trainable=lora: only adapters can share one frozen base"),
    *(
        (
            (f"{name}.val_fraction", f"{name}.test_fraction"),
            lambda c, n=name: c.task != "pretrain" and getattr(c, n).val_fraction + getattr(c, n).test_fraction >= 1,
            lambda c, n=name: f"{n}.val_fraction ({getattr(c, n).val_fraction}) and {n}.test_fraction "
            f"({getattr(c, n).test_fraction}) leave no data to train on",
        )
        for name in TUNINGS
    ),
    (("train.batch_size", "reward.group"),
     lambda c: c.task == "reward" and c.reward.group >= 2 and c.train.batch_size % c.reward.group,
     lambda c: f"reward.group ({c.reward.group}) must divide train.batch_size ({c.train.batch_size}), the number of "
     f"answers per step: use a multiple of {c.reward.group}, such as "
     f"train.batch_size={-(-c.train.batch_size // c.reward.group) * c.reward.group}, or another group"),
    (("reward.functions", "reward.weights"),
     lambda c: not c.reward.functions or (c.reward.weights and len(c.reward.weights) != len(c.reward.functions)),
     lambda c: f"reward.weights has {len(c.reward.weights)} values for {len(c.reward.functions)} reward functions: "
     "give one per function, or [] to weight them equally" if c.reward.functions
     else "reward.functions is empty: name at least one function, such as exact"),
    (("reward.weights",),
     lambda c: c.reward.weights and not any(c.reward.weights),
     "reward.weights are all 0: no answer would have another reward than the others"),
    (("reward.max_new_tokens", "reward.context_length"),
     lambda c: c.task == "reward" and c.reward.max_new_tokens >= c.reward.context_length,
     lambda c: f"reward.max_new_tokens ({c.reward.max_new_tokens}) must be below reward.context_length "
     f"({c.reward.context_length}), which is the length of prompt and answer together"),
    (("distill.max_new_tokens", "distill.context_length", "distill.on_policy"),
     lambda c: c.task == "distill" and c.distill.on_policy and c.distill.max_new_tokens >= c.distill.context_length,
     lambda c: f"distill.max_new_tokens ({c.distill.max_new_tokens}) must be below distill.context_length "
     f"({c.distill.context_length}), which is the length of prompt and answer together"),
    (("distill.on_policy", "distill.top_k"),
     lambda c: c.distill.on_policy and c.distill.top_k,
     lambda c: f"distill.on_policy={c.distill.on_policy:g} needs the teacher in every step, because the student's "
     f"answers are not known before training: set distill.top_k=null, got {c.distill.top_k}"),
    (("finetune.together", "task", "distill.on_policy"),
     lambda c: c.steps_per_rollout and c.finetune.seeds > 1 and c.finetune.together,
     lambda c: f"finetune.together=true: {_on_answers(c)} trains several seeds one after the other"),
    (("distributed.coordinator", "task", "distill.on_policy"),
     lambda c: c.steps_per_rollout and c.distributed.coordinator is not None,
     lambda c: f"distributed.coordinator: {_on_answers(c)} runs in one process, on all of its devices"),
    (("train.eval_train_batches", "task"),
     lambda c: c.task == "reward" and c.train.eval_train_batches,
     "train.eval_train_batches: reward tuning has no loss to compute on training batches without generating answers"),
    (("train.steps_per_call", "task", "distill.on_policy"),
     lambda c: c.steps_per_rollout and c.train.steps_per_call is not None,
     lambda c: f"train.steps_per_call: {_on_answers(c)} runs "
     f"{'reward.updates steps' if c.task == 'reward' else 'one step'} per call"),
    (("data.mask_tokens", "model.context_length"),
     lambda c: c.data.mask_tokens and c.data.mask_tokens >= c.model.context_length >= 1,
     lambda c: f"data.mask_tokens ({c.data.mask_tokens}) must be below model.context_length "
     f"({c.model.context_length})"),
    *(
        ((key,), lambda c, value=attrgetter(key): value(c) == "", f"{key} is empty")
        for key in ("run_dir", "tokenizer.name", "data.text_field", "data.cache_dir")
    ),
)  # fmt: skip

# `WITHOUT_EFFECT` is a tuple of (keys or prefixes of keys, key of another setting, function). The function in each
# tuple takes the value of the other setting, and returns True if the settings with the keys in the tuple have no effect
# at this value. A config is refused if a setting without effect was set on the command line or in the overrides of
# `load_config`.
WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("optim.momentum", "optim.nesterov", "optim.preconditioning", "optim.muon_scale", "optim.normuon"),
        "optim.name",
        lambda value: value != "muon",
    ),
    (("optim.weight_decay_schedule", "optim.cautious_decay"), "optim.weight_decay", lambda value: value == 0),
    (("optim.decay_fraction",), "optim.schedule", lambda value: value != "wsd"),
    (("optim.min_lr_ratio",), "optim.schedule", lambda value: value == "constant"),
    (("optim.initial_lr_ratio",), "optim.warmup_steps", lambda value: value == 0),
    (("lora.alpha", "lora.scaling"), "lora.miss", bool),
    (("prefer.margin",), "prefer.loss", lambda value: value != "simpo"),
    (("distill.beta",), "distill.divergence", lambda value: value != "js"),
    (("distill.packing",), "distill.on_policy", bool),
    (("distill.sampling_temperature", "distill.max_new_tokens"), "distill.on_policy", lambda value: value == 0),
    (("sample.top_k", "sample.top_p", "sample.min_p"), "sample.temperature", lambda value: value == 0),
    (("model.rope_",), "model.position", lambda value: value != "rope"),
    (("model.window_pattern",), "model.sliding_window", lambda value: value == 0),
    (("model.embed_std",), "model.init", lambda value: value == "torch"),
    (("model.qk_gain",), "model.qk_norm", lambda value: not value),
    (("data.split", "data.val_fraction"), "data.val_source", bool),
    (("sample.ahead",), "sample.draft", lambda value: value is None),
    (("sample.reward_model",), "sample.pick", lambda value: value != "reward"),
)


def without_effect(cfg: Config, provenance: Provenance) -> Iterator[str]:
    """Yields an error text for settings on the command line, or in the overrides of `load_config`, that have no effect
    because of the value of another setting."""
    values = flat(cfg)
    for keys, other, disables in WITHOUT_EFFECT:
        requested = [
            key for key, place in provenance.items()
            if key.startswith(keys) and place in ("command line", "load_config")
        ]  # fmt: skip
        if requested and disables(values[other]):
            value = values[other] if values[other] is not None else "null"
            yield (
                f"{provenance[requested[0]]}: {', '.join(requested)} would have no effect: {other}={value} "
                f"({provenance.get(other, 'default')})"
            )


CHECKS.update(types=validate_types, model=validate_model)
