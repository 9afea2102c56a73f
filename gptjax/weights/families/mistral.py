"""Defines the Mistral family: Mistral is Llama with a sliding window. GGUF files give Mistral the architecture name
llama."""

from __future__ import annotations

from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families import hf
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family


def _to_config(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    fields = hf.sizes(a)
    return fields | hf.rope(a, fields["context_length"]) | dict(sliding_window=hf.window(a))


def _to_hf(cfg: ModelConfig) -> dict[str, Any]:
    values = dict(rope_parameters=hf.to_rope(cfg), hidden_act="silu", sliding_window=cfg.sliding_window or None)
    return hf.to_sizes(cfg) | values


FAMILY = Family(
    "mistral", "MistralForCausalLM",
    hf.SIZES | dict(
        intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096,
        head_dim=None,
    ),
    _to_config, _to_hf, hf.LLAMA_RULES, ignored=hf.ROTARY,
)  # fmt: skip
