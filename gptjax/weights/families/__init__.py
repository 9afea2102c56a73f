"""The families of models that foreign files hold: how their attributes and tensor names map to ours, both ways.

A family is one file here, with Hugging Face's names and llama.cpp's, and one entry in `FAMILIES`. Every attribute of a
config.json is used, known to change nothing here, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptjax import config
from gptjax.config import ModelConfig
from gptjax.errors import UserError, refuse
from gptjax.weights.families import gemma3, gpt2, llama, mistral, olmo2, qwen2, qwen3
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf
from gptjax.weights.families.gpt2 import OPENAI_RULES
from gptjax.weights.rules import Rule, transposed

__all__ = [
    "FAMILIES", "OPENAI_RULES", "SCORE", "Attributes", "Family", "Gguf", "class_names", "differences", "explained",
    "family_of", "from_hf", "model_config",
]  # fmt: skip

# In this order, where several hold a model: a Llama is no Mistral with a window of nothing.
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (gpt2, llama, mistral, qwen2, qwen3, gemma3, olmo2)
}
SCORE = Rule("cls_head/kernel", "score.weight", transposed)  # of transformers' classifiers, whichever the family
MAX_CLASSES = 1 << 16
MAX_SIZE = 1 << 24  # of anything in a model that comes from elsewhere; the longest contexts are 10 million


def from_hf(values: dict[str, Any], where: str) -> tuple[Family, ModelConfig, str]:
    """The family and the ModelConfig of a config.json, and what it says of sizes, for `explained`.

    Raises:
        UserError: a model type that is not known, or attributes that cannot be followed; all of them.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(values).__name__}")
    if "auto_map" in values:
        raise UserError(f"{where}: auto_map names code that would have to be run; only known model types are read")
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"{where}: model_type={kind!r:.60} is unknown; known are {', '.join(FAMILIES)}")
    named = values.get("architectures")
    if named not in (None, [], [family.architecture], [family.classifier]):
        raise UserError(
            f"{where}: architectures={named!r:.60}, expected [{family.architecture!r}], a model with an LM head, or "
            f"[{family.classifier!r}]"
        )
    attributes = Attributes(values, defaults=family.defaults)
    for name, off in (("is_encoder_decoder", False), ("add_cross_attention", False), ("pruned_heads", {})):
        attributes.must(name, off)
    fields = family.to_config(attributes)
    if named == [family.classifier]:  # which has no LM head, so that none is looked for
        fields |= dict(n_classes=len(class_names(values, where)), cls_bias=False, tie_embeddings=True)
    attributes.end(where)
    with explained(attributes.said(), where):
        return family, model_config(fields, where), attributes.said()


@contextmanager
def explained(said: str, where: str) -> Iterator[None]:
    """Adds to an error what the config.json said, in its own words."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}\n  {where} says {said}") from error


def class_names(values: dict[str, Any], where: str) -> list[str]:
    """The classes of a config.json with id2label, in their order; without it transformers calls them LABEL_0, .."""
    n = values.get("num_labels")
    table = values.get("id2label")
    if table is None and (n is None or (type(n) is int and 1 <= n <= MAX_CLASSES)):
        table = {str(i): f"LABEL_{i}" for i in range(2 if n is None else n)}
    ids = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if (
        not isinstance(table, dict)
        or not 1 <= len(ids) <= MAX_CLASSES
        or sorted(table) != sorted(ids)
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise UserError(
            f"{where}: id2label={table!r:.60}, num_labels={n!r:.60}: expected the names of up to {MAX_CLASSES} "
            "classes, numbered from 0"
        )
    return [table[i] for i in ids]


def model_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """A checked ModelConfig; what is out of range is said with the name of the file."""
    sizes = {key: value for key, value in fields.items() if type(value) is int}
    problems = [f"{key}={size}, expected at most {MAX_SIZE}" for key, size in sizes.items() if size > MAX_SIZE]
    problems += ["n_kv_head=0, expected 1 or more"] * (sizes.get("n_kv_head") == 0)
    refuse(where, problems)
    try:
        return config.from_dict({"model": {key: value for key, value in fields.items() if value is not None}}).model
    except UserError as error:
        raise UserError(f"{where}:\n{error}") from error


# how a model starts, trains and is computed: no file format holds it, and none needs to
_NOT_STORED = {
    "arch", "init", "embed_std", "zero_init_proj", "zero_init_head", "dropout", "dtype", "precision", "remat",
    "unroll", "sliding_window", "window_pattern", "d_head",
}  # fmt: skip


def _stored(cfg: ModelConfig) -> dict[str, Any]:
    """What decides the logits, in one way of saying it."""
    fields = {key: value for key, value in config.flat(cfg).items() if key not in _NOT_STORED}
    fields["head_dim"] = cfg.head_dim
    whole = cfg.context_length if cfg.rope_local_base is None else math.inf  # else a window has another base too
    fields["windows"] = tuple(0 if w >= whole else w for w in cfg.windows)
    fields["attention_scale"] = round((cfg.attention_scale or cfg.head_dim**-0.5) ** -2, 6)
    if not any(cfg.windows):
        fields["rope_local_base"] = None
    if not cfg.qk_norm:
        fields |= dict(qk_gain=1.0, qk_norm_over="head")
    if cfg.position != "rope":
        fields |= {key: None for key in fields if key.startswith("rope_")}
    elif cfg.rope_scaling != "llama3":
        fields |= dict(rope_slow=None, rope_fast=None, rope_original_context=None)
    if cfg.norm == "rmsnorm":
        fields["norm_bias"] = False
    return fields


def differences(cfg: ModelConfig, other: ModelConfig, allowed: frozenset[str] = frozenset()) -> list[str]:
    """["qk_gain=1.2", ..]: what `cfg` has and the other has not."""
    ours, theirs = _stored(cfg), _stored(other)
    return [
        f"model.{key}={ours[key]}"
        for key in ours
        if ours[key] != theirs[key] and not (key in allowed and ours[key] is False)
    ]


def family_of(cfg: ModelConfig) -> Family:
    """The family that holds this model exactly.

    Raises:
        UserError: none does; it names what the nearest one lacks.
    """
    lacking: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        attributes = Attributes(family.to_hf(cfg), defaults=family.defaults)
        fields = family.to_config(attributes)
        if attributes.problems:
            continue
        back = ModelConfig(**{key: value for key, value in fields.items() if value is not None})
        lacking[family.name] = differences(cfg, back, family.fills)
        if not lacking[family.name]:
            return family
    name = min(lacking, key=lambda name: len(lacking[name]))
    raise UserError(
        f"no model type of Hugging Face holds this model (arch={cfg.arch}); the nearest, {name}, lacks "
        f"{', '.join(lacking[name])}. Its own folder (model.safetensors with model.json) keeps everything"
    )
