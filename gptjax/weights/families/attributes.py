"""Reads the attributes of a config.json or of GGUF metadata. Each attribute is either read, or known not to affect the
model's outputs, or reported as an error."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from gptjax.errors import refuse

# The attributes in NEUTRAL do not affect the logits in inference.
NEUTRAL = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "_name_or_path",
    "name_or_path", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "n_ctx", "gradient_checkpointing", "max_window_layers", "cache_implementation",
    "_attn_implementation_autoset", "reorder_and_upcast_attn", "is_llama_config", "transformers.js_config",
    "label2id", "id2label", "output_past", "unsloth_version", "unsloth_fixed",
    # Before version 5, transformers wrote the following attributes for labels, outputs and generation into every
    # config.json.
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


class Attributes:
    """Reads attributes, such as the attributes of a config.json, one at a time. Reading an attribute removes the
    attribute from `left`; attributes that remain in `left` when `end` is called are errors.

    Args:
        neutral: names of attributes that are ignored, unless they are in `defaults`.
        defaults: default values of attributes that are absent from the file.
    """

    def __init__(
        self,
        values: dict[str, Any],
        neutral: Collection[str] = NEUTRAL,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.left = {key: value for key, value in values.items() if key not in neutral or key in defaults}
        self.defaults = defaults
        self.used: dict[str, Any] = {}
        self.problems: list[str] = []

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Removes an attribute from `left` and returns its value, or `default` if the attribute is null, or absent from
        the file and from `defaults`."""
        value = self.used[name] = self.left.pop(name, self.defaults.get(name))
        if value is None:
            if default is _REQUIRED:
                self.problems.append(f"{name} is missing or null")
                return kind()
            return default
        valid = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not valid or (isinstance(value, bool) and kind is not bool):
            self.problems.append(f"{name}: expected {kind.__name__}, got {value!r:.60}")
            return kind()
        if kind is float and not math.isfinite(value):
            self.problems.append(f"{name}: {value} is not a finite number")
            return kind()
        return kind(value) if kind is float else value

    def must(self, name: str, *allowed: Any) -> None:
        """Removes an attribute from `left`, and records an error unless the attribute is absent, null or one of the
        values `allowed`."""
        value = self.left.pop(name, None)
        if value is not None and value not in allowed:
            self.problems.append(f"{name}={value!r:.60} is not supported here: only {' or '.join(map(repr, allowed))}")

    def summary(self) -> str:
        """Returns the sizes and boolean attributes that determine the shapes of a model's tensors, as text:
        "hidden_size=16, .."."""
        listed = {k: v for k, v in self.used.items() if k in self.defaults or v is not None}
        return ", ".join(f"{k}={json.dumps(v)}" for k, v in listed.items() if v is None or type(v) in (int, bool))

    def end(self, location: str) -> None:
        """Raises UserError that lists all recorded problems and all attributes that were not read, if there are any."""
        self.problems += [f"{name}={value!r:.60} is unknown to this kind of model" for name, value in self.left.items()]
        refuse(location, self.problems)
