"""The type `Family`, and rules for the tensors of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.config import ModelConfig
from gptjax.weights.families.attributes import Attributes
from gptjax.weights.rules import Form, Rule, identity, transposed


class Gguf(NamedTuple):
    """How llama.cpp holds a family.

    name          `general.architecture`
    implied       fields of ModelConfig that no metadata say
    rules         ModelConfig -> rules of the tensors
    norm          the key of norm_eps
    rope_base     where `rope.freq_base` is missing
    rope_factors  Llama 3's scaling has a place, in the tensor rope_freqs.weight
    to_config     (metadata, fields so far) -> more fields of ModelConfig; None: a sliding window is refused
    to_metadata   ModelConfig -> more metadata
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
    """A model type of Hugging Face, and the architecture of llama.cpp that holds it.

    defaults  what transformers' config class takes where a config.json has no such attribute; None is computed from
              the others
    gguf      None: llama.cpp has it under another family's name, or not at all
    """

    name: str  # of model_type
    architecture: str
    defaults: Mapping[str, Any]
    to_config: Callable[[Attributes], dict[str, Any]]  # -> fields of ModelConfig
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rules: Sequence[Rule]
    gguf: Gguf | None = None
    fills: frozenset[str] = frozenset()  # switches that may be off here although the family has them on
    ignored: tuple[str, ...] = ()  # endings of tensors without parameters
    prefix: str = ""  # of all tensors' names, in `rules`; a folder without it is read too
    placeholder: str = ""  # a token that the tokenizer may have as its last, without a row in the model

    @property
    def classifier(self) -> str:
        """transformers' class of the same body with a head `score` that tells texts apart."""
        body = self.architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        return f"{body}{'Text' * self.name.endswith('_text')}ForSequenceClassification"


def kernels(block: str, names: Mapping[str, str]) -> list[Rule]:
    return [Rule(f"blocks/{ours}/kernel", f"{block}{theirs}.weight", transposed) for ours, theirs in names.items()]


def biases(block: str, names: Mapping[str, str]) -> list[Rule]:
    return [Rule(f"blocks/{ours}/bias", f"{block}{theirs}.bias") for ours, theirs in names.items()]


def scales(block: str, names: Mapping[str, str], form: Form = identity) -> list[Rule]:
    return [Rule(f"blocks/{ours}/scale", f"{block}{theirs}.weight", form) for ours, theirs in names.items()]
