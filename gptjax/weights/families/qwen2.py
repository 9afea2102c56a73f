"""Defines the Qwen2 family: Qwen2 and Qwen2.5 are Llama with biases on q, k and v, and optionally with a sliding window
in the upper layers."""

from __future__ import annotations

from typing import Any

from gptjax.config import ModelConfig
from gptjax.weights.families import gguf, hf
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.families.family import Family, Gguf

DEFAULTS = hf.SIZES | dict(
    vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32, max_position_embeddings=32_768,
    use_sliding_window=False, sliding_window=4096, max_window_layers=28,
)  # fmt: skip


def to_config(a: Attributes) -> dict[str, Any]:
    """Reads the fields of ModelConfig that Qwen2 and Qwen3 share from the attributes of a config.json."""
    a.must("hidden_act", "silu")
    a.must("use_mrope", False)
    fields = hf.sizes(a)
    n_layer, width, used = fields["n_layer"], hf.window(a), a.take("use_sliding_window", bool)
    full = a.take("max_window_layers", int)  # The first max_window_layers layers of Qwen2 have full attention.
    size = width if used else 0
    letters = "".join("S" if size and i >= full else "L" for i in range(min(n_layer, hf.MAX_LAYERS)))
    pattern = hf.layer_types(a, n_layer, hf.shortened(letters))
    if "S" in pattern and not size:
        a.problems.append(
            f"layer_types has sliding_attention, use_sliding_window={used} and sliding_window={width} give no window"
        )
    windows = dict(sliding_window=size if "S" in pattern else 0, window_pattern=pattern)
    return fields | hf.rope(a, fields["context_length"]) | windows


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    sliding = any(cfg.windows)
    return hf.to_sizes(cfg) | dict(
        hidden_act="silu", rope_parameters=hf.to_rope(cfg), layer_types=hf.to_layer_types(cfg),
        use_sliding_window=sliding, sliding_window=cfg.sliding_window if sliding else None, max_window_layers=0,
    )  # fmt: skip


FAMILY = Family(
    "qwen2", "Qwen2ForCausalLM", DEFAULTS, lambda a: to_config(a) | dict(qkv_bias=True, bias=False), to_hf,
    hf.LLAMA_RULES,
    Gguf(
        "qwen2", dict(arch="llama", qkv_bias=True),
        lambda cfg: [*gguf.ENDS, *gguf.QKV, *gguf.OUT, *gguf.MLP, *gguf.PRE],
    ),
    ignored=hf.ROTARY,
)  # fmt: skip
