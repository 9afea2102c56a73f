"""Defines the family of Llama and other models of the Llama architecture (Llama 3.2, SmolLM2, TinyLlama).

RoPE rotates pairs of the H channels of a head. For Llama, llama.cpp pairs the adjacent channels 2i and 2i + 1, whereas
gptjax and transformers pair the channels i and i + H/2. Because llama.cpp pairs adjacent channels, the GGUF files of
Llama models store the rows of q and k interleaved.
"""

from __future__ import annotations

from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families import gguf, hf
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf
from gptjax.weights.rules import Rule, interleaved, transposed


def _to_config(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    a.must("pretraining_tp", 1)
    bias = a.take("attention_bias", bool)
    if a.take("mlp_bias", bool) != bias:
        a.problems.append("attention_bias and mlp_bias differ: that is not supported here, only both or neither")
    fields = hf.sizes(a)
    return fields | hf.rope(a, fields["context_length"]) | dict(qkv_bias=bias, bias=bias)


def _to_hf(cfg: ModelConfig) -> dict[str, Any]:
    return hf.to_sizes(cfg) | dict(
        hidden_act="silu", attention_bias=cfg.qkv_bias, mlp_bias=cfg.bias, rope_parameters=hf.to_rope(cfg)
    )


def _gguf_rules(cfg: ModelConfig) -> list[Rule]:
    """Returns the rules for the tensors in a GGUF file of a Llama model. The rules omit biases, because the biases of q
    and k would have to be interleaved like the matrices of q and k. `gptjax.weights.gguf.family_of` raises an error for
    Llama models with biases."""
    heads = {"q": interleaved(cfg.n_head), "k": interleaved(cfg.n_kv_head), "v": transposed}
    qkv = [Rule(f"blocks/attn/{x}/kernel", f"{gguf.BLOCK}attn_{x}.weight", form) for x, form in heads.items()]
    return [*gguf.ENDS, *qkv, *gguf.OUT, *gguf.MLP, *gguf.PRE]


FAMILY = Family(
    "llama", "LlamaForCausalLM",
    hf.SIZES | dict(max_position_embeddings=2048, attention_bias=False, mlp_bias=False, head_dim=None),
    _to_config, _to_hf, hf.LLAMA_RULES, Gguf("llama", dict(arch="llama"), _gguf_rules, rope_factors=True),
    ignored=hf.ROTARY,
)  # fmt: skip
