"""Defines the GPT-2 family in the formats of Hugging Face, OpenAI (TensorFlow checkpoints) and GGUF."""

from __future__ import annotations

from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families import gguf
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf
from gptjax.weights.rules import Form, Rule, identity, squeeze_leading, transposed


def _to_config(a: Attributes) -> dict[str, Any]:
    a.must("activation_function", "gelu_new", "gelu_pytorch_tanh")
    a.must("scale_attn_weights", True)
    a.must("scale_attn_by_inverse_layer_idx", False)
    a.must("add_cross_attention", False)
    d_model = a.take("n_embd", int)
    return dict(
        arch="gpt2",
        vocab_size=a.take("vocab_size", int),
        context_length=a.take("n_positions", int),
        n_layer=a.take("n_layer", int),
        n_head=a.take("n_head", int),
        d_model=d_model,
        d_ff=a.take("n_inner", int, 4 * d_model),
        norm_eps=a.take("layer_norm_epsilon", float),
        tie_embeddings=a.take("tie_word_embeddings", bool),
    )


def _to_hf(cfg: ModelConfig) -> dict[str, Any]:
    return dict(
        activation_function="gelu_new",
        vocab_size=cfg.vocab_size,
        n_positions=cfg.context_length,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_embd=cfg.d_model,
        n_inner=cfg.d_ff,
        layer_norm_epsilon=cfg.norm_eps,
        tie_word_embeddings=cfg.tie_embeddings,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


def _rules(
    prefix: str, names: dict[str, str], kernel: Form, head: list[Rule], vectors: tuple[str, str, str]
) -> list[Rule]:
    """Returns the rules that map GPT-2's parameters to the tensors of one file format.

    Args:
        prefix: common prefix of all tensor names.
        names: dict that maps gptjax's module names to those in the file.
        kernel: how the file stores weight matrices.
        head: rules for the LM head.
        vectors: names of a module's weight matrix, bias and norm scale in the file.
    """
    w, b, g = vectors
    rules = [
        Rule("wte/embedding", f"{prefix}{names['wte']}"),
        Rule("wpe/embedding", f"{prefix}{names['wpe']}"),
        *head,
    ]
    block = f"{prefix}{names['block']}"
    for ours, parent in (("blocks/ln_1", block), ("blocks/ln_2", block), ("ln_f", prefix)):
        norm = f"{parent}{names[ours.removeprefix('blocks/')]}"
        rules += [Rule(f"{ours}/scale", f"{norm}{g}", fill=1.0), Rule(f"{ours}/bias", f"{norm}{b}", fill=0.0)]
    for k, x in enumerate("qkv"):
        rules.append(Rule(f"blocks/attn/{x}/kernel", f"{block}{names['qkv']}{w}", kernel, (k, 3)))
        rules.append(Rule(f"blocks/attn/{x}/bias", f"{block}{names['qkv']}{b}", identity, (k, 3), fill=0.0))
    for ours in ("attn/o", "mlp/up", "mlp/down"):
        rules.append(Rule(f"blocks/{ours}/kernel", f"{block}{names[ours]}{w}", kernel))
        rules.append(Rule(f"blocks/{ours}/bias", f"{block}{names[ours]}{b}", fill=0.0))
    return rules


_PREFIX = "transformer."
_HF_NAMES = {
    "wte": "wte.weight", "wpe": "wpe.weight", "block": "h.{i}.", "ln_1": "ln_1.", "ln_2": "ln_2.", "ln_f": "ln_f.",
    "qkv": "attn.c_attn.", "attn/o": "attn.c_proj.", "mlp/up": "mlp.c_fc.", "mlp/down": "mlp.c_proj.",
}  # fmt: skip
_TENSORFLOW_NAMES = {
    "wte": "wte", "wpe": "wpe", "block": "h{i}/", "ln_1": "ln_1/", "ln_2": "ln_2/", "ln_f": "ln_f/",
    "qkv": "attn/c_attn/", "attn/o": "attn/c_proj/", "mlp/up": "mlp/c_fc/", "mlp/down": "mlp/c_proj/",
}  # fmt: skip
_HEAD = [Rule("lm_head/kernel", "lm_head.weight", transposed)]

# OPENAI_RULES are the rules for OpenAI's TensorFlow checkpoints, in which kernels have the shape [1, in, out].
OPENAI_RULES = _rules("model/", _TENSORFLOW_NAMES, squeeze_leading, [], ("w", "b", "g"))


def _gguf_rules(cfg: ModelConfig) -> list[Rule]:
    rules = [*gguf.TABLES, Rule("wpe/embedding", "position_embd.weight")]
    rules += [Rule("ln_f/scale", "output_norm.weight", fill=1.0), Rule("ln_f/bias", "output_norm.bias", fill=0.0)]
    for k, x in enumerate("qkv"):
        rules.append(Rule(f"blocks/attn/{x}/kernel", f"{gguf.BLOCK}attn_qkv.weight", transposed, (k, 3)))
        rules.append(Rule(f"blocks/attn/{x}/bias", f"{gguf.BLOCK}attn_qkv.bias", identity, (k, 3), fill=0.0))
    for ours, theirs in (("attn/o", "attn_output"), ("mlp/up", "ffn_up"), ("mlp/down", "ffn_down")):
        rules.append(Rule(f"blocks/{ours}/kernel", f"{gguf.BLOCK}{theirs}.weight", transposed))
        rules.append(Rule(f"blocks/{ours}/bias", f"{gguf.BLOCK}{theirs}.bias", fill=0.0))
    for ours, theirs in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
        rules.append(Rule(f"blocks/{ours}/scale", f"{gguf.BLOCK}{theirs}.weight", fill=1.0))
        rules.append(Rule(f"blocks/{ours}/bias", f"{gguf.BLOCK}{theirs}.bias", fill=0.0))
    return rules


FAMILY = Family(
    "gpt2", "GPT2LMHeadModel",
    dict(
        vocab_size=50_257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None, layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    ),
    _to_config, _to_hf, _rules(_PREFIX, _HF_NAMES, identity, _HEAD, ("weight", "bias", "weight")),
    Gguf("gpt2", dict(arch="gpt2"), _gguf_rules, norm="attention.layer_norm_epsilon"),
    fills=frozenset({"bias", "qkv_bias", "norm_bias", "norm_scale"}),
    ignored=(".attn.bias", ".attn.masked_bias"), prefix=_PREFIX,
)  # fmt: skip
