"""Converts the config attributes of Hugging Face and llama.cpp models to a ModelConfig and back, and maps the tensor
names of these models to gptjax's parameter paths.

A model family is one file in this package and one entry in `FAMILIES`. Every attribute of a config.json is either read,
or known not to affect the model's outputs, or reported as an error.
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
    "FAMILIES", "OPENAI_RULES", "SCORE", "Attributes", "Family", "Gguf", "class_names", "differences", "family_of",
    "from_hf", "model_config", "with_summary",
]  # fmt: skip

# The order of the families matters, because the first family that can represent a model is used: Llama comes before
# Mistral, because Mistral is Llama with a sliding window.
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (gpt2, llama, mistral, qwen2, qwen3, gemma3, olmo2)
}
SCORE = Rule(
    "cls_head/kernel", "score.weight", transposed
)  # the head of transformers' ...ForSequenceClassification classes
MAX_CLASSES = 1 << 16
MAX_SIZE = 1 << 24  # Largest size accepted in a file of another tool; the longest contexts are 10 million tokens.


def from_hf(values: dict[str, Any], location: str) -> tuple[Family, ModelConfig, str]:
    """Returns the model family and the ModelConfig that a config.json describes, and a summary of the model's sizes,
    which `with_summary` adds to error messages.

    Raises:
        UserError: the model type is unknown, or attributes are not supported; one message lists them.
    """
    if not isinstance(values, dict):
        raise UserError(f"{location}: expected a JSON object, got {type(values).__name__}")
    if "auto_map" in values:
        raise UserError(f"{location}: auto_map needs remote code, which is not run; only known model types are read")
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"{location}: model_type={kind!r:.60} is unknown; known are {', '.join(FAMILIES)}")
    named = values.get("architectures")
    if named not in (None, [], [family.architecture], [family.classifier]):
        raise UserError(
            f"{location}: architectures={named!r:.60}, expected [{family.architecture!r}], a model with an LM head, or "
            f"[{family.classifier!r}]"
        )
    attributes = Attributes(values, defaults=family.defaults)
    for name, allowed in (("is_encoder_decoder", False), ("add_cross_attention", False), ("pruned_heads", {})):
        attributes.must(name, allowed)
    fields = family.to_config(attributes)
    if named == [family.classifier]:  # A classifier's file has no LM head, so tie_embeddings is set.
        fields |= dict(n_classes=len(class_names(values, location)), cls_bias=False, tie_embeddings=True)
    attributes.end(location)
    with with_summary(attributes.summary(), location):
        return family, model_config(fields, location), attributes.summary()


@contextmanager
def with_summary(summary: str, location: str) -> Iterator[None]:
    """Adds `summary`, the sizes in the config.json, to the message of a UserError that is raised inside the `with`
    block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}\n  {location} says {summary}") from error


def class_names(values: dict[str, Any], location: str) -> list[str]:
    """Returns the class names in id2label of a config.json, in the order of the class ids. If id2label is absent, the
    class names are LABEL_0, LABEL_1, .., as in transformers."""
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
            f"{location}: id2label={table!r:.60}, num_labels={n!r:.60}: expected the names of up to {MAX_CLASSES} "
            "classes, numbered from 0"
        )
    return [table[i] for i in ids]


def model_config(fields: dict[str, Any], location: str) -> ModelConfig:
    """Builds a ModelConfig from a dict of its fields. Raises UserError, which names the file, if a field has an invalid
    value."""
    sizes = {key: value for key, value in fields.items() if type(value) is int}
    problems = [f"{key}={size}, expected at most {MAX_SIZE}" for key, size in sizes.items() if size > MAX_SIZE]
    problems += ["n_kv_head=0, expected 1 or more"] * (sizes.get("n_kv_head") == 0)
    refuse(location, problems)
    try:
        return config.from_dict({"model": {key: value for key, value in fields.items() if value is not None}}).model
    except UserError as error:
        raise UserError(f"{location}:\n{error}") from error


# The function `_stored` omits the fields of ModelConfig in _NOT_STORED. Most of the fields of ModelConfig in
# _NOT_STORED are for initialisation, training or computation, which no file format stores. Other fields in _NOT_STORED,
# such as sliding_window, are expressed by fields that `_stored` returns, such as windows.
_NOT_STORED = {
    "arch", "init", "embed_std", "zero_init_proj", "zero_init_head", "dropout", "dtype", "precision", "remat",
    "unroll", "sliding_window", "window_pattern", "d_head",
}  # fmt: skip


def _stored(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a ModelConfig that determine the logits, in a canonical form in which equivalent configs
    have equal fields."""
    fields = {key: value for key, value in config.flat(cfg).items() if key not in _NOT_STORED}
    fields["head_dim"] = cfg.head_dim
    # A sliding window that is at least as long as the context has no effect, so that the window becomes 0, which means
    # no window. If the model has a local RoPE base, the window is kept, because the layers with a window use the local
    # RoPE base.
    full = cfg.context_length if cfg.rope_local_base is None else math.inf
    fields["windows"] = tuple(0 if w >= full else w for w in cfg.windows)
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
    """Returns the fields of `cfg` that have a different value in `other`, as strings such as "model.qk_gain=1.2".

    Fields in `allowed` that are False in `cfg` are not returned.
    """
    ours, theirs = _stored(cfg), _stored(other)
    return [
        f"model.{key}={ours[key]}"
        for key in ours
        if ours[key] != theirs[key] and not (key in allowed and ours[key] is False)
    ]


def family_of(cfg: ModelConfig) -> Family:
    """Returns the `Family`, which is a Hugging Face architecture, that computes the same function as the model of
    `cfg`.

    Raises:
        UserError: no family represents the model; the message lists the fields that the closest family cannot
            represent.
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
