"""Reads and writes the config.json attributes that most Hugging Face families share, and defines the shared rules for
tensor names."""

from __future__ import annotations

from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import biases, kernels, scales
from gptjax.weights.rules import Form, Rule, identity, transposed

# The window pattern is computed for at most MAX_LAYERS layers, because a file may give a huge num_hidden_layers.
MAX_LAYERS = 1 << 12

# SIZES holds the default values of transformers' config classes. The value of an attribute with the default None is
# computed from other attributes.
SIZES: dict[str, Any] = dict(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip


def sizes(a: Attributes) -> dict[str, Any]:
    """Reads the dimensions of a model from a config.json, by the attribute names that all families except GPT-2
    share."""
    n_head = a.take("num_attention_heads", int)
    return dict(
        arch="llama",
        vocab_size=a.take("vocab_size", int),
        context_length=a.take("max_position_embeddings", int),
        n_layer=a.take("num_hidden_layers", int),
        n_head=n_head,
        n_kv_head=a.take("num_key_value_heads", int, n_head),
        d_head=a.take("head_dim", int, None),
        d_model=a.take("hidden_size", int),
        d_ff=a.take("intermediate_size", int),
        norm_eps=a.take("rms_norm_eps", float),
        tie_embeddings=a.take("tie_word_embeddings", bool),
    )


def to_sizes(cfg: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.context_length,
        num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_kv_head,
        head_dim=cfg.head_dim,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tie_embeddings,
        attention_dropout=0.0,
    )


def rope(a: Attributes, context: int) -> dict[str, Any]:
    """Reads the RoPE fields of ModelConfig from a config.json. Version 5 of transformers writes `rope_parameters`, and
    earlier versions write `rope_theta` and `rope_scaling`. If `rope_parameters` and `rope_scaling` are both present,
    transformers uses `rope_scaling`."""
    scaling, values = a.take("rope_scaling", dict, None), a.take("rope_parameters", dict, None)
    name = "rope_scaling" if scaling else "rope_parameters"
    values = {"rope_theta": theta(a, "rope_theta", 10_000.0)} | (scaling or values or {})
    a.must("rope_interleaved", False)
    a.must("partial_rotary_factor", 1, 1.0)
    return rope_fields(a, values, context, name)


def theta(a: Attributes, name: str, default: float) -> float:
    return a.take(name, float) if name in a.left else default


def rope_fields(a: Attributes, values: dict[str, Any], context: int, name: str) -> dict[str, Any]:
    inner = Attributes(values)
    kind = inner.take("rope_type", str, None) or inner.take("type", str, "default")
    inner.left.pop("type", None)
    inner.must("partial_rotary_factor", 1, 1.0)
    fields = dict(rope_base=inner.take("rope_theta", float))
    if kind == "linear":
        fields |= dict(rope_scaling="linear", rope_factor=inner.take("factor", float))
    elif kind == "llama3":
        fields |= dict(
            rope_scaling="llama3",
            rope_factor=inner.take("factor", float),
            rope_slow=inner.take("low_freq_factor", float),
            rope_fast=inner.take("high_freq_factor", float),
            rope_original_context=inner.take("original_max_position_embeddings", int, context),
        )
    elif kind != "default":
        a.problems.append(f"{name}: rope_type={kind!r:.60} is not supported here: only default, linear and llama3")
        return fields
    a.problems += [f"{name}: {line}" for line in inner.problems]
    a.problems += [f"{name}: {key}={value!r:.60} is unknown to rope_type={kind}" for key, value in inner.left.items()]
    return fields


def to_rope(cfg: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = dict(rope_theta=cfg.rope_base, rope_type="default")
    if cfg.rope_scaling == "linear":
        values |= dict(rope_type="linear", factor=cfg.rope_factor)
    if cfg.rope_scaling == "llama3":
        values |= dict(
            rope_type="llama3", factor=cfg.rope_factor, low_freq_factor=cfg.rope_slow, high_freq_factor=cfg.rope_fast,
            original_max_position_embeddings=cfg.rope_original_context,
        )  # fmt: skip
    return values


def layer_types(a: Attributes, n_layer: int, default: str) -> str:
    """Returns the window pattern of the attribute layer_types, with one letter per layer and shortened to the period of
    the pattern, or `default` if layer_types is absent."""
    types = a.take("layer_types", list, None)
    if types is None:
        return default
    letters = {"full_attention": "L", "sliding_attention": "S"}
    if len(types) != n_layer or not all(isinstance(t, str) and t in letters for t in types):
        a.problems.append(
            f"layer_types: expected num_hidden_layers={n_layer} of {', '.join(letters)}, got {types!r:.60}"
        )
        return default
    return shortened("".join(letters[t] for t in types))


def shortened(pattern: str) -> str:
    """Returns the shortest string whose repetition begins with `pattern`: "SL" for "SLSLS"."""
    n_layer = len(pattern)
    return next((pattern[:n] for n in range(1, n_layer + 1) if (pattern[:n] * n_layer)[:n_layer] == pattern), "L")


def to_layer_types(cfg: ModelConfig) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in cfg.windows]


def window(a: Attributes) -> int:
    """Returns the attribute sliding_window, which is the number of tokens in a window, or 0 if sliding_window is
    null."""
    size = a.take("sliding_window", int, None)
    if size is not None and size < 1:
        a.problems.append(f"sliding_window: expected 1 or more tokens, or null, got {size}")
    return size or 0


# ---------------------------------------------------------------- tensor names

_BLOCK = "model.layers.{i}."
_LINEARS = {f"attn/{x}": f"self_attn.{x}_proj" for x in "qkvo"} | {
    f"mlp/{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")
}
ENDS = [Rule("wte/embedding", "model.embed_tokens.weight"), Rule("lm_head/kernel", "lm_head.weight", transposed)]
MATRICES = kernels(_BLOCK, _LINEARS)
ROTARY = (".rotary_emb.inv_freq",)


def norms(form: Form, **names: str) -> list[Rule]:
    """Returns the rules for the norm scales of a block and for the scale of the final norm.

    The argument `names` maps gptjax's names of the norms in a block to the names in the file, such as
    ln_1="input_layernorm".
    """
    return [*scales(_BLOCK, names, form), Rule("ln_f/scale", "model.norm.weight", form)]


def qk_norms(form: Form) -> list[Rule]:
    return [Rule(f"blocks/attn/{x}_norm", f"{_BLOCK}self_attn.{x}_norm.weight", form) for x in "qk"]


LLAMA_RULES = [
    *ENDS, *MATRICES, *biases(_BLOCK, _LINEARS),
    *norms(identity, ln_1="input_layernorm", ln_2="post_attention_layernorm"),
]  # fmt: skip
