"""Defines the OLMo 2 family: OLMo 2 is Llama with post-norm, and with QK-norm over the channels of all heads
together."""

from __future__ import annotations

from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families import gguf, hf
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf
from gptjax.weights.rules import identity

_NORMS = dict(norm_position="post", qk_norm=True, qk_norm_over="all")


def _to_config(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    a.must("attention_bias", False)
    fields = hf.sizes(a)
    return fields | hf.rope(a, fields["context_length"]) | _NORMS


def _to_hf(cfg: ModelConfig) -> dict[str, Any]:
    values = {key: value for key, value in hf.to_sizes(cfg).items() if key != "head_dim"}
    return values | dict(hidden_act="silu", attention_bias=False, rope_parameters=hf.to_rope(cfg))


FAMILY = Family(
    "olmo2", "Olmo2ForCausalLM",
    hf.SIZES | dict(vocab_size=50_304, max_position_embeddings=2048, rms_norm_eps=1e-5),
    _to_config, _to_hf,
    [
        *hf.ENDS, *hf.MATRICES,
        *hf.norms(identity, ln_1_post="post_attention_layernorm", ln_2_post="post_feedforward_layernorm"),
        *hf.qk_norms(identity),
    ],
    Gguf(
        "olmo2", dict(arch="llama", **_NORMS),
        lambda cfg: [*gguf.ENDS, *gguf.QKV, *gguf.OUT, *gguf.MLP, *gguf.POST, *gguf.QK_NORMS],
    ),
)  # fmt: skip
