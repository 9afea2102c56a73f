"""Defines the Qwen3 family: Qwen3 is Qwen2 with QK-norm instead of biases on q, k and v."""

from __future__ import annotations

from typing import Any

from gptjax.weights.families import gguf, hf, qwen2
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf
from gptjax.weights.rules import identity


def _to_config(a: Attributes) -> dict[str, Any]:
    a.must("attention_bias", False)
    return qwen2.to_config(a) | dict(qk_norm=True)


FAMILY = Family(
    "qwen3", "Qwen3ForCausalLM", qwen2.DEFAULTS | dict(head_dim=128), _to_config, qwen2.to_hf,
    [*hf.LLAMA_RULES, *hf.qk_norms(identity)],
    Gguf(
        "qwen3", dict(arch="llama", qk_norm=True),
        lambda cfg: [*gguf.ENDS, *gguf.QKV, *gguf.OUT, *gguf.MLP, *gguf.PRE, *gguf.QK_NORMS],
    ),
)  # fmt: skip
