"""Defines the class `Family`, and functions that return the rules for the tensors of a transformer block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.config import ModelConfig
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.rules import Form, Rule, identity, transposed


class Gguf(NamedTuple):
    """The llama.cpp architecture of a model family.

    Attributes:
        name          value of `general.architecture`
        implied       fields of ModelConfig that are the same in all models of the architecture and not in the metadata
        rules         function (cfg) that returns the rules for the tensors of a model
        norm          key of norm_eps in the metadata
        rope_base     default value of `rope.freq_base`
        rope_factors  whether Llama 3's RoPE scaling can be stored, in the tensor rope_freqs.weight
        to_config     function (metadata, fields) that returns further fields of ModelConfig, given the fields read so
                      far; if None, a sliding window in the metadata is an error
        to_metadata   function (cfg) that returns the metadata that only this architecture has
    """

    name: str
    implied: dict[str, Any]
    rules: Callable[[ModelConfig], Sequence[Rule]]
    norm: str = "attention.layer_norm_rms_epsilon"
    rope_base: float = 10_000.0
    rope_factors: bool = False
    to_config: Callable[[Attributes, Mapping[str, Any]], dict[str, Any]] | None = None
    to_metadata: Callable[[ModelConfig], dict[str, Any]] = lambda cfg: {}


class Family(NamedTuple):
    """A model family: a model type of Hugging Face, and the llama.cpp architecture of the same models.

    Attributes:
        defaults  default values of transformers' config class; a value None is computed from other attributes
        gguf      llama.cpp's architecture for the family; None if llama.cpp has none for it, or if the architecture is
                  already the `gguf` of another family
    """

    name: str  # model_type
    architecture: str
    defaults: Mapping[str, Any]
    to_config: Callable[[Attributes], dict[str, Any]]  # Converts config.json to fields of ModelConfig.
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: Sequence[Rule]
    gguf: Gguf | None = None
    # `fills` names boolean fields of ModelConfig that may be False in an exported model. The biases and norm scales
    # that the exported model lacks are written as zeros and ones.
    fills: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()  # Name suffixes of tensors that hold no parameters.
    prefix: str = ""  # Common prefix of the names in `rules`, which the tensor names in a file may lack.
    placeholder: str = ""  # Text of the tokenizer's last token, for which the embedding may have no row.

    @property
    def classifier(self) -> str:
        """Returns the name of the family's ...ForSequenceClassification class in transformers, whose head is named
        `score`."""
        body = self.architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        return f"{body}{'Text' * self.name.endswith('_text')}ForSequenceClassification"


def kernels(block: str, names: Mapping[str, str]) -> list[Rule]:
    return [Rule(f"blocks/{ours}/kernel", f"{block}{theirs}.weight", transposed) for ours, theirs in names.items()]


def biases(block: str, names: Mapping[str, str]) -> list[Rule]:
    return [Rule(f"blocks/{ours}/bias", f"{block}{theirs}.bias") for ours, theirs in names.items()]


def scales(block: str, names: Mapping[str, str], form: Form = identity) -> list[Rule]:
    return [Rule(f"blocks/{ours}/scale", f"{block}{theirs}.weight", form) for ours, theirs in names.items()]
