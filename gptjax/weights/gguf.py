"""Reads and writes the GGUF metadata and tensors of llama.cpp's architectures.

The package `families` has one file for the details of each model family. Sources: llama.cpp's constants.py and
convert_hf_to_gguf.py (names and layouts), llama-model.cpp (values that are not in the metadata).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.formats import gguf as file_format
from gptjax.ops.position import llama3_ramp
from gptjax.weights import families
from gptjax.weights.families import Attributes, Gguf, differences, model_config
from gptjax.weights.rules import Source

ARCHITECTURES: dict[str, Gguf] = {family.gguf.name: family.gguf for family in families.FAMILIES.values() if family.gguf}

# The metadata keys in _NEUTRAL, written without the prefix of the architecture, do not change the outputs of a model in
# gptjax.
_NEUTRAL = ("vocab_size", "attention.value_length", "rope.dimension_count", "attention.causal", "tensor_data_layout")


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class _Source:
    file: file_format.File

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.file.tensors.items() if name != "rope_freqs.weight"}

    def array(self, name: str) -> np.ndarray:
        return self.file.array(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self.file.tensors[name]
        row_bytes = tensor.size_bytes // tensor.shape[0]
        rows = dataclasses.replace(
            tensor, shape=(stop - start, tensor.shape[1]), offset=tensor.offset + start * row_bytes,
            size_bytes=row_bytes * (stop - start),
        )  # fmt: skip
        return file_format.File(self.file.path, {}, {name: rows}).array(name)


def open_file(path: Path) -> tuple[Source, str, ModelConfig]:
    """Opens a GGUF file and returns the tensors, the `general.architecture` and the ModelConfig of the file."""
    file = file_format.read(path)
    source = _Source(file)
    n_splits = file.metadata.get("split.count", 1)
    if not isinstance(n_splits, int) or n_splits != 1:
        raise UserError(f"{path} is one of {n_splits!r:.60} files of a model: join them with llama.cpp's gguf-split")
    cfg = from_metadata(file.metadata, source.shapes(), str(path))
    if "rope_freqs.weight" in file.tensors:
        cfg = with_rope_factors(cfg, file.array("rope_freqs.weight"), str(path))
    return source, file.metadata["general.architecture"], cfg


def from_metadata(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], location: str) -> ModelConfig:
    """Returns the ModelConfig that GGUF metadata describe.

    Args:
        shapes: shapes of the tensors in the file, which determine the values that are not in the metadata: the
            vocabulary size, and whether the LM head is tied.
        location: path of the file, for error messages.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{location}: general.architecture={name!r:.60} is unknown, known: {', '.join(ARCHITECTURES)}")
    gguf = ARCHITECTURES[name]
    # An attribute that is an array is not supported: `Attributes` reports an array as an error. Arrays are converted to
    # lists, because a comparison of numpy arrays returns an array instead of a bool. For the error message, the first
    # nine elements of an array are enough.
    values = {
        key.removeprefix(f"{name}."): value[:9].tolist() if isinstance(value, np.ndarray) else value
        for key, value in metadata.items()
        if key.startswith(f"{name}.")
    }
    a = Attributes({key: value for key, value in values.items() if key not in _NEUTRAL})
    D, n_head = a.take("embedding_length", int), a.take("attention.head_count", int)
    head_dim = a.take("attention.key_length", int, D // max(n_head, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim and _has_rope(gguf):
            a.problems.append(f"{key}={values[key]!r:.60}, expected the head dimension {head_dim}")
    fields = gguf.implied | dict(
        vocab_size=shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else 1,
        context_length=a.take("context_length", int),
        n_layer=a.take("block_count", int),
        n_head=n_head,
        n_kv_head=a.take("attention.head_count_kv", int, n_head),
        d_head=head_dim,
        d_model=D,
        d_ff=a.take("feed_forward_length", int),
        norm_eps=_rounded(a.take(gguf.norm, float, 1e-5)),
        tie_embeddings="output.weight" not in shapes,
        rope_base=_rounded(a.take("rope.freq_base", float, gguf.rope_base)),
    )
    scaling = a.take("rope.scaling.type", str, "none")
    factor = a.take("rope.scaling.factor", float, 1.0)
    if scaling == "linear":
        fields |= dict(rope_scaling="linear", rope_factor=factor)
    elif scaling != "none":
        a.problems.append(f"rope.scaling.type={scaling!r:.60} is not supported here: only none and linear")
    if gguf.to_config is not None:
        fields |= gguf.to_config(a, fields)
    elif window := a.take("attention.sliding_window", int, 0):
        a.problems.append(
            f"attention.sliding_window={window}: llama.cpp gives {name} models no window, only gemma3 ones; "
            "load the Hugging Face folder that the file was made from"
        )
    a.end(location)
    return model_config(fields, location)


def _rounded(x: float) -> float:
    """Returns the shortest decimal number that equals `x` in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def with_rope_factors(cfg: ModelConfig, factors: np.ndarray, location: str) -> ModelConfig:
    """Returns a copy of the config with the four parameters of Llama 3's RoPE scaling.

    A GGUF file does not store the four parameters of Llama 3's RoPE scaling, but only `factors`, the divisors of the
    RoPE frequencies. The values rope_slow = 1 and rope_fast = 4 are assumed. Common values of rope_factor and
    rope_original_context are tried until the RoPE scaling gives the divisors in `factors`.
    """
    if factors.shape != (cfg.head_dim // 2,):
        raise UserError(f"{location}: rope_freqs.weight is {list(factors.shape)}, expected [{cfg.head_dim // 2}]")
    if cfg.rope_scaling != "none":
        raise UserError(f"{location}: rope_freqs.weight with rope.scaling.type={cfg.rope_scaling} is not supported")
    for factor in sorted({float(np.round(factors.max(), 4)), 8.0, 32.0}):
        for original in (8192, *(2**power for power in range(4, 18))):
            tried = dataclasses.replace(
                cfg, rope_scaling="llama3", rope_factor=factor, rope_slow=1.0, rope_fast=4.0,
                rope_original_context=original,
            )  # fmt: skip
            if np.allclose(rope_factors(tried), factors, rtol=1e-3):
                return tried
    raise UserError(f"{location}: rope_freqs.weight is not Llama 3's scaling of any context that is a power of two")


def rope_factors(cfg: ModelConfig) -> np.ndarray:
    """Returns the divisor of each RoPE frequency, [H/2] float32, where H is the head dimension."""
    frequencies = cfg.rope_base ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    keep = llama3_ramp(frequencies, cfg.rope_slow, cfg.rope_fast, cfg.rope_original_context)
    return (1 / (keep + (1 - keep) / cfg.rope_factor)).astype(np.float32)


def _has_rope(gguf: Gguf) -> bool:
    """Returns True if the architecture uses RoPE. All architectures except GPT-2, which has learned position
    embeddings, use RoPE."""
    return gguf.implied["arch"] != "gpt2"


# ---------------------------------------------------------------- writing


def to_metadata(cfg: ModelConfig, name: str) -> dict[str, Any]:
    """Returns the GGUF metadata that describe a model in llama.cpp's architecture `name`.

    The returned metadata do not include the metadata of the tokenizer.
    """
    gguf = ARCHITECTURES[name]
    values: dict[str, Any] = {
        "context_length": cfg.context_length,
        "embedding_length": cfg.d_model,
        "block_count": cfg.n_layer,
        "feed_forward_length": cfg.d_ff,
        "attention.head_count": cfg.n_head,
        gguf.norm: float(cfg.norm_eps),
    }
    if _has_rope(gguf):
        values |= {
            "attention.head_count_kv": cfg.n_kv_head,
            "attention.key_length": cfg.head_dim,
            "attention.value_length": cfg.head_dim,
            "rope.dimension_count": cfg.head_dim,
            "rope.freq_base": float(cfg.rope_base),
            "vocab_size": cfg.vocab_size,
        }
    if cfg.rope_scaling == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(cfg.rope_factor)}
    values |= gguf.to_metadata(cfg)
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in values.items()}}


def family_of(cfg: ModelConfig) -> str:
    """Returns the name of the llama.cpp architecture that computes the same function as the model of `cfg`.

    Raises:
        UserError: no architecture represents the model; the message lists the fields that the closest one cannot
            represent.
    """
    shapes = {"token_embd.weight": (cfg.vocab_size, cfg.d_model)} | (
        {} if cfg.tie_embeddings else {"output.weight": ()}
    )
    scaling = ("rope_scaling", "rope_factor", "rope_slow", "rope_fast", "rope_original_context")
    lacking: dict[str, list[str]] = {}
    for family in families.FAMILIES.values():
        if (gguf := family.gguf) is None:
            continue
        back = from_metadata(to_metadata(cfg, gguf.name), shapes, "this model")
        if cfg.rope_scaling == "llama3" and gguf.rope_factors:
            back = dataclasses.replace(back, **{key: getattr(cfg, key) for key in scaling})
        lacking[gguf.name] = differences(cfg, back, family.fills)
    # Choose the architecture that fails to represent the fewest fields, and in a tie the first such architecture.
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    if not lacking[nearest]:
        return nearest
    raise UserError(
        f"no architecture of llama.cpp holds this model (arch={cfg.arch}); the nearest, {nearest}, lacks "
        f"{', '.join(lacking[nearest])}. Its own folder (model.safetensors with model.json) keeps everything"
    )
