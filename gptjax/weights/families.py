"""The families of models that Hugging Face folders hold: how their config.json and tensor names map to ours.

A family has its attributes (`to_config`, `to_hf`) and its table of rules, and both work both ways. Every attribute
of a config.json is used, known to change nothing here, or refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from gptjax import config
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.weights.rules import Rule, boxed, one_more, refuse, same, turned

# Attributes that say nothing about the logits of a model at rest.
_NEUTRAL = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "_name_or_path",
    "name_or_path", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "n_ctx", "gradient_checkpointing", "max_window_layers", "cache_implementation",
    "_attn_implementation_autoset", "reorder_and_upcast_attn", "is_llama_config", "transformers.js_config",
    "label2id", "id2label", "output_past", "unsloth_version", "unsloth_fixed",
    # what transformers before 5 wrote into every config.json: classes, outputs, and settings of its generate
    "num_labels", "_num_labels", "problem_type", "finetuning_task", "output_attentions", "output_hidden_states",
    "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss", "tokenizer_class", "prefix", "is_decoder",
    "chunk_size_feed_forward", "tie_encoder_decoder", "cross_attention_hidden_size", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip
_REQUIRED = object()

# What transformers' config classes take where a config.json has no such attribute; None is computed from the others.
_SIZES = dict(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
_QWEN = _SIZES | dict(
    vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32, max_position_embeddings=32_768,
    use_sliding_window=False, sliding_window=4096, max_window_layers=28,
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        vocab_size=50_257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None,
        layer_norm_epsilon=1e-5, tie_word_embeddings=True,
    ),
    "llama": _SIZES | dict(max_position_embeddings=2048, attention_bias=False, mlp_bias=False, head_dim=None),
    "mistral": _SIZES | dict(
        intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096,
        head_dim=None,
    ),
    "qwen2": _QWEN,
    "qwen3": _QWEN | dict(head_dim=128),
    "gemma3_text": _SIZES | dict(
        vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, max_position_embeddings=131_072, tie_word_embeddings=True,
        query_pre_attn_scalar=256, sliding_window=4096, final_logit_softcapping=None,
    ),
    "olmo2": _SIZES | dict(vocab_size=50_304, max_position_embeddings=2048, rms_norm_eps=1e-5),
}  # fmt: skip


class Attributes:
    """A config.json that is taken apart: what is left at the end was not understood.

    Args:
        defaults: what an attribute is that is not there.
    """

    def __init__(
        self,
        values: dict[str, Any],
        neutral: Collection[str] = _NEUTRAL,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.left = {key: value for key, value in values.items() if key not in neutral or key in defaults}
        self.defaults = defaults
        self.used: dict[str, Any] = {}
        self.problems: list[str] = []

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of an attribute; null, and one that neither file nor `defaults` have, stand for `default`."""
        value = self.used[name] = self.left.pop(name, self.defaults.get(name))
        if value is None:
            if default is _REQUIRED:
                self.problems.append(f"{name} is missing or null")
                return kind()
            return default
        good = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not good or (isinstance(value, bool) and kind is not bool):
            self.problems.append(f"{name}: expected {kind.__name__}, got {value!r:.60}")
            return kind()
        if kind is float and not math.isfinite(value):
            self.problems.append(f"{name}: {value} is not a finite number")
            return kind()
        return kind(value) if kind is float else value

    def must(self, name: str, *allowed: Any) -> None:
        """An attribute that this project can follow only at these values; null and absent are fine."""
        value = self.left.pop(name, None)
        if value is not None and value not in allowed:
            self.problems.append(f"{name}={value!r:.60} is not supported here: only {' or '.join(map(repr, allowed))}")

    def said(self) -> str:
        """`hidden_size=16, ..`: the sizes and switches that decide which tensors there are."""
        listed = {k: v for k, v in self.used.items() if k in self.defaults or v is not None}
        return ", ".join(f"{k}={json.dumps(v)}" for k, v in listed.items() if v is None or type(v) in (int, bool))

    def end(self, where: str) -> None:
        self.problems += [f"{name}={value!r:.60} is unknown to this kind of model" for name, value in self.left.items()]
        refuse(where, self.problems)


class Family(NamedTuple):
    name: str  # of model_type
    architecture: str
    to_config: Callable[[Attributes], dict[str, Any]]  # -> fields of ModelConfig
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: Sequence[Rule]
    fills: frozenset[str] = frozenset()  # switches that may be off here although the family has them on
    ignored: tuple[str, ...] = ()  # endings of tensors without parameters

    @property
    def classifier(self) -> str:
        """transformers' class of the same body with a head `score` that tells texts apart."""
        body = self.architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        return f"{body}{'Text' * self.name.endswith('_text')}ForSequenceClassification"


# ---------------------------------------------------------------- shared parts


def _sizes(a: Attributes) -> dict[str, Any]:
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
    )


def _hf_sizes(cfg: ModelConfig) -> dict[str, Any]:
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


def _rope(a: Attributes, context: int, default_base: float = 10_000.0) -> dict[str, Any]:
    """transformers 5 writes one `rope_parameters`; of earlier releases' `rope_theta` and `rope_scaling` it prefers the
    latter."""
    scaling, rope = a.take("rope_scaling", dict, None), a.take("rope_parameters", dict, None)
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = {"rope_theta": _theta(a, "rope_theta", default_base)} | (scaling or rope or {})
    a.must("rope_interleaved", False)
    a.must("partial_rotary_factor", 1, 1.0)
    return _rope_fields(a, rope, context, name)


def _theta(a: Attributes, name: str, default: float) -> float:
    return a.take(name, float) if name in a.left else default


def _rope_fields(a: Attributes, rope: dict[str, Any], context: int, name: str) -> dict[str, Any]:
    inner = Attributes(rope)
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


def _hf_rope(cfg: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = dict(rope_theta=cfg.rope_base, rope_type="default")
    if cfg.rope_scaling == "linear":
        rope |= dict(rope_type="linear", factor=cfg.rope_factor)
    if cfg.rope_scaling == "llama3":
        rope |= dict(
            rope_type="llama3", factor=cfg.rope_factor, low_freq_factor=cfg.rope_slow, high_freq_factor=cfg.rope_fast,
            original_max_position_embeddings=cfg.rope_original_context,
        )  # fmt: skip
    return rope


def _layer_types(a: Attributes, n_layer: int, default: str) -> str:
    """The window pattern: `default`, or that of layer_types, one letter a layer, shortened to what repeats."""
    types = a.take("layer_types", list, None)
    if types is None:
        return default
    letters = {"full_attention": "L", "sliding_attention": "S"}
    if len(types) != n_layer or not all(isinstance(t, str) and t in letters for t in types):
        a.problems.append(
            f"layer_types: expected num_hidden_layers={n_layer} of {', '.join(letters)}, got {types!r:.60}"
        )
        return default
    return _shortened("".join(letters[t] for t in types))


def _shortened(marks: str) -> str:
    n_layer = len(marks)
    return next((marks[:n] for n in range(1, n_layer + 1) if (marks[:n] * n_layer)[:n_layer] == marks), "L")


def _window(a: Attributes) -> int:
    """sliding_window; 0 where it is null."""
    window = a.take("sliding_window", int, None)
    if window is not None and window < 1:
        a.problems.append(f"sliding_window: expected 1 or more tokens, or null, got {window}")
    return window or 0


def _hf_layer_types(cfg: ModelConfig) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in cfg.windows]


_BLOCK = "model.layers.{i}."
_ENDS = [
    Rule("wte/embedding", "model.embed_tokens.weight"),
    Rule("lm_head/kernel", "lm_head.weight", turned),
]
_MATRICES = [
    *(Rule(f"blocks/attn/{x}/kernel", f"{_BLOCK}self_attn.{x}_proj.weight", turned) for x in "qkvo"),
    *(Rule(f"blocks/mlp/{x}/kernel", f"{_BLOCK}mlp.{x}_proj.weight", turned) for x in ("gate", "up", "down")),
]


def _norms(form: Any, **names: str) -> list[Rule]:
    """Rules for norm scales: ln_1="input_layernorm", ..; and the last norm."""
    rules = [Rule(f"blocks/{ours}/scale", f"{_BLOCK}{theirs}.weight", form) for ours, theirs in names.items()]
    return [*rules, Rule("ln_f/scale", "model.norm.weight", form)]


def _qk_norms(form: Any) -> list[Rule]:
    return [Rule(f"blocks/attn/{x}_norm", f"{_BLOCK}self_attn.{x}_norm.weight", form) for x in "qk"]


_PRE = dict(ln_1="input_layernorm", ln_2="post_attention_layernorm")
_BIASES = [
    *(Rule(f"blocks/attn/{x}/bias", f"{_BLOCK}self_attn.{x}_proj.bias") for x in "qkvo"),
    *(Rule(f"blocks/mlp/{x}/bias", f"{_BLOCK}mlp.{x}_proj.bias") for x in ("gate", "up", "down")),
]

# ---------------------------------------------------------------- GPT-2


def _gpt2(a: Attributes) -> dict[str, Any]:
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


def _gpt2_hf(cfg: ModelConfig) -> dict[str, Any]:
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


def _gpt2_rules(
    prefix: str, names: dict[str, str], kernel: Any, head: list[Rule], vectors: tuple[str, str]
) -> list[Rule]:
    """`names` gives each place's name, `kernel` the form of a matrix, `vectors` what weight and bias are called."""
    w, b = vectors
    rules = [
        Rule("wte/embedding", f"{prefix}{names['wte']}"),
        Rule("wpe/embedding", f"{prefix}{names['wpe']}"),
        *head,
    ]
    block = f"{prefix}{names['block']}"
    for ours in ("ln_1", "ln_2", "ln_f"):
        at = f"{prefix}{names[ours]}" if ours == "ln_f" else f"{block}{names[ours]}"
        place = ours if ours == "ln_f" else f"blocks/{ours}"
        scale = "g" if w == "w" else w
        rules += [Rule(f"{place}/scale", f"{at}{scale}", fill=1.0), Rule(f"{place}/bias", f"{at}{b}", fill=0.0)]
    for k, x in enumerate("qkv"):
        rules.append(Rule(f"blocks/attn/{x}/kernel", f"{block}{names['qkv']}{w}", kernel, (k, 3)))
        rules.append(Rule(f"blocks/attn/{x}/bias", f"{block}{names['qkv']}{b}", same, (k, 3), fill=0.0))
    for ours in ("attn/o", "mlp/up", "mlp/down"):
        rules.append(Rule(f"blocks/{ours}/kernel", f"{block}{names[ours]}{w}", kernel))
        rules.append(Rule(f"blocks/{ours}/bias", f"{block}{names[ours]}{b}", fill=0.0))
    return rules


_GPT2_NAMES = {
    "wte": "wte.weight", "wpe": "wpe.weight", "block": "h.{i}.", "ln_1": "ln_1.", "ln_2": "ln_2.", "ln_f": "ln_f.",
    "qkv": "attn.c_attn.", "attn/o": "attn.c_proj.", "mlp/up": "mlp.c_fc.", "mlp/down": "mlp.c_proj.",
}  # fmt: skip
_TENSORFLOW_NAMES = {
    "wte": "wte", "wpe": "wpe", "block": "h{i}/", "ln_1": "ln_1/", "ln_2": "ln_2/", "ln_f": "ln_f/",
    "qkv": "attn/c_attn/", "attn/o": "attn/c_proj/", "mlp/up": "mlp/c_fc/", "mlp/down": "mlp/c_proj/",
}  # fmt: skip
_GPT2_HEAD = [Rule("lm_head/kernel", "lm_head.weight", turned)]

# OpenAI's own checkpoints: kernels are [1, in, out]
OPENAI_RULES = _gpt2_rules("model/", _TENSORFLOW_NAMES, boxed, [], ("w", "b"))

# ---------------------------------------------------------------- Llama and its relatives


def _llama_like(a: Attributes) -> dict[str, Any]:
    """What the families after GPT-2 share."""
    fields = _sizes(a)
    return fields | dict(tie_embeddings=a.take("tie_word_embeddings", bool))


def _llama(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    a.must("pretraining_tp", 1)
    bias = a.take("attention_bias", bool)
    if a.take("mlp_bias", bool) != bias:
        a.problems.append("attention_bias and mlp_bias differ: that is not supported here, only both or neither")
    fields = _llama_like(a)
    return fields | _rope(a, fields["context_length"]) | dict(qkv_bias=bias, bias=bias)


def _llama_hf(cfg: ModelConfig) -> dict[str, Any]:
    return _hf_sizes(cfg) | dict(
        hidden_act="silu", attention_bias=cfg.qkv_bias, mlp_bias=cfg.bias, rope_parameters=_hf_rope(cfg)
    )


def _mistral(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    fields = _llama_like(a)
    return fields | _rope(a, fields["context_length"]) | dict(sliding_window=_window(a))


def _mistral_hf(cfg: ModelConfig) -> dict[str, Any]:
    rope = dict(rope_parameters=_hf_rope(cfg))
    return _hf_sizes(cfg) | rope | dict(hidden_act="silu", sliding_window=cfg.sliding_window or None)


def _qwen(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    a.must("use_mrope", False)
    fields = _llama_like(a)
    n_layer, window, used = fields["n_layer"], _window(a), a.take("use_sliding_window", bool)
    full = a.take("max_window_layers", int)  # so many layers, from the first, see everything
    size = window if used else 0
    marks = "".join("S" if size and i >= full else "L" for i in range(min(n_layer, MAX_LAYERS)))
    pattern = _layer_types(a, n_layer, _shortened(marks))
    if "S" in pattern and not size:
        a.problems.append(
            f"layer_types has sliding_attention, use_sliding_window={used} and sliding_window={window} give no window"
        )
    window_fields = dict(sliding_window=size if "S" in pattern else 0, window_pattern=pattern)
    return fields | _rope(a, fields["context_length"]) | window_fields


def _qwen_hf(cfg: ModelConfig) -> dict[str, Any]:
    sliding = any(cfg.windows)
    return _hf_sizes(cfg) | dict(
        hidden_act="silu", rope_parameters=_hf_rope(cfg), layer_types=_hf_layer_types(cfg), use_sliding_window=sliding,
        sliding_window=cfg.sliding_window if sliding else None, max_window_layers=0,
    )  # fmt: skip


def _qwen2(a: Attributes) -> dict[str, Any]:
    return _qwen(a) | dict(qkv_bias=True, bias=False)


def _qwen3(a: Attributes) -> dict[str, Any]:
    a.must("attention_bias", False)
    fields = _qwen(a)
    return fields | dict(qk_norm=True)


def _gemma3(a: Attributes) -> dict[str, Any]:
    a.must("hidden_activation", "gelu_pytorch_tanh")
    a.must("hidden_act", "gelu_pytorch_tanh")
    a.must("attention_bias", False)
    a.must("use_bidirectional_attention", False)
    a.left.pop("attn_logit_softcapping", None)  # transformers' Gemma 3 does not apply it either
    window = _window(a)
    # every n-th layer sees everything; layer_types, where it stands, says it of each layer
    every = a.take("sliding_window_pattern", int) if "sliding_window_pattern" in a.left else 6
    a.left.pop("_sliding_window_pattern", None)  # transformers writes it and does not read it
    if not 1 <= every <= 1000:
        a.problems.append(f"sliding_window_pattern: expected a number of layers, got {every}")
        every = 6
    fields = _llama_like(a)
    pattern = _layer_types(a, fields["n_layer"], "S" * (every - 1) + "L")
    if "S" in pattern and not window:
        a.problems.append("sliding_window is null, but layers with sliding_attention need one")
    softcap = a.take("final_logit_softcapping", float, None)
    if softcap is not None and softcap <= 0:
        a.problems.append(f"final_logit_softcapping: expected a positive number or null, got {softcap}")
    scalar = a.take("query_pre_attn_scalar", int)
    if scalar <= 0:
        a.problems.append(f"query_pre_attn_scalar: expected a positive number, got {scalar}")
    return (
        fields
        | _gemma3_rope(a, fields["context_length"])
        | dict(
            activation="geglu",
            norm_position="both",
            qk_norm=True,
            sliding_window=window,
            window_pattern=pattern,
            attention_scale=max(scalar, 1e-30) ** -0.5,
            logit_softcap=softcap or 0.0,
            embed_gain=math.sqrt(max(fields["d_model"], 0)),
        )
    )


def _gemma3_rope(a: Attributes, context: int) -> dict[str, Any]:
    """`rope_parameters` by kind of layer; `rope_scaling` adds to those of the full layers, whichever form there is."""
    rope, scaling = dict(a.take("rope_parameters", dict, {})), a.take("rope_scaling", dict, {})
    full, local = rope.pop("full_attention", None) or {}, rope.pop("sliding_attention", None) or {}
    if rope or not isinstance(full, dict) or not isinstance(local, dict):
        a.problems.append("rope_parameters: expected objects for full_attention and sliding_attention only")
        full, local = {}, {}
    a.must("partial_rotary_factor", 1, 1.0)
    full = {"rope_theta": _theta(a, "rope_theta", 1_000_000.0)} | full | scaling
    local = {"rope_theta": _theta(a, "rope_local_base_freq", 10_000.0)} | local
    name = "rope_scaling" if scaling else "rope_parameters"
    windows = _rope_fields(a, local, context, "rope_parameters: sliding_attention")
    if windows.get("rope_scaling"):
        a.problems.append("rope_parameters: sliding_attention: only rope_type=default is supported here")
    return _rope_fields(a, full, context, name) | dict(rope_local_base=windows["rope_base"])


def _gemma3_hf(cfg: ModelConfig) -> dict[str, Any]:
    return _hf_sizes(cfg) | dict(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        query_pre_attn_scalar=_whole((cfg.attention_scale or cfg.head_dim**-0.5) ** -2),
        sliding_window=cfg.sliding_window,
        layer_types=_hf_layer_types(cfg),
        rope_parameters={
            "full_attention": _hf_rope(cfg),
            "sliding_attention": {"rope_theta": cfg.rope_local_base or cfg.rope_base, "rope_type": "default"},
        },
        final_logit_softcapping=cfg.logit_softcap or None,
    )


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _olmo2(a: Attributes) -> dict[str, Any]:
    a.must("hidden_act", "silu")
    a.must("attention_bias", False)
    fields = _llama_like(a)
    return fields | _rope(a, fields["context_length"]) | dict(norm_position="post", qk_norm=True, qk_norm_over="all")


def _olmo2_hf(cfg: ModelConfig) -> dict[str, Any]:
    sizes = {key: value for key, value in _hf_sizes(cfg).items() if key != "head_dim"}
    return sizes | dict(hidden_act="silu", attention_bias=False, rope_parameters=_hf_rope(cfg))


_LLAMA_RULES = [*_ENDS, *_MATRICES, *_BIASES, *_norms(same, **_PRE)]
_SANDWICH = dict(
    ln_1="input_layernorm", ln_1_post="post_attention_layernorm", ln_2="pre_feedforward_layernorm",
    ln_2_post="post_feedforward_layernorm",
)  # fmt: skip
_POST = dict(ln_1_post="post_attention_layernorm", ln_2_post="post_feedforward_layernorm")
_ROTARY = (".rotary_emb.inv_freq",)

SCORE = Rule("cls_head/kernel", "score.weight", turned)  # of transformers' classifiers, whichever the family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "gpt2", "GPT2LMHeadModel", _gpt2, _gpt2_hf,
            _gpt2_rules("transformer.", _GPT2_NAMES, same, _GPT2_HEAD, ("weight", "bias")),
            frozenset({"bias", "qkv_bias", "norm_bias", "norm_scale"}), (".attn.bias", ".attn.masked_bias"),
        ),
        Family("llama", "LlamaForCausalLM", _llama, _llama_hf, _LLAMA_RULES, ignored=_ROTARY),
        Family("mistral", "MistralForCausalLM", _mistral, _mistral_hf, _LLAMA_RULES, ignored=_ROTARY),
        Family("qwen2", "Qwen2ForCausalLM", _qwen2, _qwen_hf, _LLAMA_RULES, ignored=_ROTARY),
        Family("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen_hf, [*_LLAMA_RULES, *_qk_norms(same)]),
        Family(
            "gemma3_text", "Gemma3ForCausalLM", _gemma3, _gemma3_hf,
            [*_ENDS, *_MATRICES, *_norms(one_more, **_SANDWICH), *_qk_norms(one_more)],
        ),
        Family(
            "olmo2", "Olmo2ForCausalLM", _olmo2, _olmo2_hf,
            [*_ENDS, *_MATRICES, *_norms(same, **_POST), *_qk_norms(same)],
        ),
    )
}  # fmt: skip

# ---------------------------------------------------------------- doors


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
    attributes = Attributes(values, defaults=DEFAULTS[family.name])
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
        not ids
        or len(ids) > MAX_CLASSES
        or sorted(table) != sorted(ids)
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise UserError(
            f"{where}: id2label={table!r:.60}, num_labels={n!r:.60}: expected the names of up to {MAX_CLASSES} "
            "classes, numbered from 0"
        )
    return [table[i] for i in ids]


MAX_CLASSES = 1 << 16
MAX_LAYERS = 1 << 12  # whose kinds are looked at
MAX_SIZE = 1 << 24  # of anything in a model that comes from elsewhere; the longest contexts are 10 million


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
        back = _round_trip(family, cfg)
        if back is None:
            continue
        lacking[family.name] = differences(cfg, back, family.fills)
        if not lacking[family.name]:
            return family
    name = min(lacking, key=lambda name: len(lacking[name]))
    raise UserError(
        f"no model type of Hugging Face holds this model (arch={cfg.arch}); the nearest, {name}, lacks "
        f"{', '.join(lacking[name])}. Its own folder (model.safetensors with model.json) keeps everything"
    )


def _round_trip(family: Family, cfg: ModelConfig) -> ModelConfig | None:
    attributes = Attributes(family.to_hf(cfg), defaults=DEFAULTS[family.name])
    fields = family.to_config(attributes)
    if attributes.problems:
        return None
    return ModelConfig(**{key: value for key, value in fields.items() if value is not None})
