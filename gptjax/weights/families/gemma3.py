"""Defines the family of Gemma 3 text models, which have norms before and after each sublayer. In Gemma 3, five of every
six layers have a sliding window and a local RoPE base; the sixth layer has full attention.

Hugging Face files of Gemma 3 store the scale of a norm minus 1, whereas GGUF files store the scale itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families import gguf, hf
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf
from gptjax.weights.rules import plus_one

IMAGE = "<image_soft_token>"
_LOCAL_BASE = 10_000.0


def _to_config(a: Attributes) -> dict[str, Any]:
    a.must("hidden_activation", "gelu_pytorch_tanh")
    a.must("hidden_act", "gelu_pytorch_tanh")
    a.must("attention_bias", False)
    a.must("use_bidirectional_attention", False)
    a.left.pop("attn_logit_softcapping", None)  # Gemma 3 in transformers ignores attn_logit_softcapping
    size = hf.window(a)
    # Every n-th layer has full attention, where n is the attribute sliding_window_pattern. If the attribute layer_types
    # is present, layer_types overrides sliding_window_pattern.
    every = a.take("sliding_window_pattern", int) if "sliding_window_pattern" in a.left else 6
    # The library transformers writes _sliding_window_pattern but never reads it.
    a.left.pop("_sliding_window_pattern", None)
    if not 1 <= every <= 1000:
        a.problems.append(f"sliding_window_pattern: expected a number of layers, got {every}")
        every = 6
    fields = hf.sizes(a)
    pattern = hf.layer_types(a, fields["n_layer"], "S" * (every - 1) + "L")
    if "S" in pattern and not size:
        a.problems.append("sliding_window is null, but layers with sliding_attention need one")
    softcap = a.take("final_logit_softcapping", float, None)
    if softcap is not None and softcap <= 0:
        a.problems.append(f"final_logit_softcapping: expected a positive number or null, got {softcap}")
    scalar = a.take("query_pre_attn_scalar", int)
    if scalar <= 0:
        a.problems.append(f"query_pre_attn_scalar: expected a positive number, got {scalar}")
    return (
        fields
        | _rope(a, fields["context_length"])
        | dict(
            activation="geglu",
            norm_position="both",
            qk_norm=True,
            sliding_window=size,
            window_pattern=pattern,
            attention_scale=max(scalar, 1e-30) ** -0.5,
            logit_softcap=softcap or 0.0,
            embed_gain=_embed_gain(fields["d_model"]),
        )
    )


def _embed_gain(d_model: int) -> float:
    return math.sqrt(max(d_model, 0))


def _rope(a: Attributes, context: int) -> dict[str, Any]:
    """Reads the RoPE fields of ModelConfig from a config.json. The attribute `rope_parameters` has one entry for full
    attention and one entry for sliding-window attention. If the attribute `rope_scaling` is present, `rope_scaling`
    applies to the layers with full attention."""
    rope, scaling = dict(a.take("rope_parameters", dict, {})), a.take("rope_scaling", dict, {})
    full, local = rope.pop("full_attention", None) or {}, rope.pop("sliding_attention", None) or {}
    if rope or not isinstance(full, dict) or not isinstance(local, dict):
        a.problems.append("rope_parameters: expected objects for full_attention and sliding_attention only")
        full, local = {}, {}
    a.must("partial_rotary_factor", 1, 1.0)
    full = {"rope_theta": hf.theta(a, "rope_theta", 1_000_000.0)} | full | scaling
    local = {"rope_theta": hf.theta(a, "rope_local_base_freq", _LOCAL_BASE)} | local
    name = "rope_scaling" if scaling else "rope_parameters"
    windows = hf.rope_fields(a, local, context, "rope_parameters: sliding_attention")
    if windows.get("rope_scaling"):
        a.problems.append("rope_parameters: sliding_attention: only rope_type=default is supported here")
    return hf.rope_fields(a, full, context, name) | dict(rope_local_base=windows["rope_base"])


def _to_hf(cfg: ModelConfig) -> dict[str, Any]:
    scalar = (cfg.attention_scale or cfg.head_dim**-0.5) ** -2
    return hf.to_sizes(cfg) | dict(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        query_pre_attn_scalar=round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        sliding_window=cfg.sliding_window,
        layer_types=hf.to_layer_types(cfg),
        rope_parameters={
            "full_attention": hf.to_rope(cfg),
            "sliding_attention": {"rope_theta": cfg.rope_local_base or cfg.rope_base, "rope_type": "default"},
        },
        final_logit_softcapping=cfg.logit_softcap or None,
    )


def _from_metadata(a: Attributes, fields: Mapping[str, Any]) -> dict[str, Any]:
    a.must("attention.sliding_window_pattern", 6)
    a.must("rope.freq_base_swa", _LOCAL_BASE)
    more = dict(
        sliding_window=a.take("attention.sliding_window", int, 0),
        embed_gain=_embed_gain(fields["d_model"]),
        logit_softcap=a.take("final_logit_softcapping", float, 0.0),
    )
    # Gemma 3 27B, which llama.cpp recognises by its 62 layers, has the attention scale (d_model / n_head)**-0.5.
    if fields["n_layer"] == 62:
        more["attention_scale"] = max(fields["d_model"] // max(fields["n_head"], 1), 1) ** -0.5
    return more


def _to_metadata(cfg: ModelConfig) -> dict[str, Any]:
    window = {"attention.sliding_window": cfg.sliding_window} if cfg.sliding_window else {}
    return window | ({"final_logit_softcapping": float(cfg.logit_softcap)} if cfg.logit_softcap else {})


FAMILY = Family(
    "gemma3_text", "Gemma3ForCausalLM",
    hf.SIZES | dict(
        vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, max_position_embeddings=131_072, tie_word_embeddings=True,
        query_pre_attn_scalar=256, sliding_window=4096, final_logit_softcapping=None,
    ),
    _to_config, _to_hf,
    [
        *hf.ENDS, *hf.MATRICES, *hf.norms(
            plus_one, ln_1="input_layernorm", ln_1_post="post_attention_layernorm", ln_2="pre_feedforward_layernorm",
            ln_2_post="post_feedforward_layernorm",
        ), *hf.qk_norms(plus_one),
    ],
    Gguf(
        "gemma3",
        dict(
            arch="llama", qk_norm=True, norm_position="both", activation="geglu", window_pattern="SSSSSL",
            rope_local_base=_LOCAL_BASE,
        ),
        lambda cfg: [*gguf.ENDS, *gguf.QKV, *gguf.OUT, *gguf.MLP, *gguf.PRE, *gguf.POST, *gguf.QK_NORMS],
        rope_base=1_000_000.0, to_config=_from_metadata, to_metadata=_to_metadata,
    ),
    # The text models of Gemma 3 use the tokenizer of the multimodal models. The last token of Gemma 3's tokenizer is
    # the placeholder for images, for which the embedding of a text model may have no row.
    placeholder=IMAGE,
)  # fmt: skip
