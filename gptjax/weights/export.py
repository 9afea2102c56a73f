"""Exports a model to the formats of other tools: a Hugging Face folder, a GGUF file or a StableHLO program."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.formats import safetensors
from gptjax.formats.gguf import write as write_gguf
from gptjax.model.gpt import forward, refuse_classifier
from gptjax.tokenizers import Tokenizer, stop_ids
from gptjax.tokenizers.chat import answer_ends
from gptjax.types import Params
from gptjax.weights import families, gguf, native
from gptjax.weights.load import CONFIG, LABELS
from gptjax.weights.native import check_vocabulary
from gptjax.weights.rules import write


def export_hf(
    folder: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer | None = None,
    labels: dict[str, Any] | None = None,
) -> Path:
    """Writes a model folder that transformers loads, with config.json, model.safetensors and, if given, the tokenizer.

    Args:
        labels: description of a classifier, as returned by `read_labels`. A classifier is exported as the class
            ...ForSequenceClassification of transformers.

    Raises:
        UserError: no model type of Hugging Face can represent the model or its tokenizer, or the folder is not empty.
    """
    folder = Path(folder)
    family = families.family_of(dataclasses.replace(cfg, n_classes=0, cls_bias=True))
    values = {"architectures": [family.architecture], "model_type": family.name, **family.to_hf(cfg)}
    rules = family.rules
    if cfg.n_classes:
        refuse_bias(params["cls_head"])
        params = {name: node for name, node in params.items() if name != "lm_head"}
        params["cls_head"] = {"kernel": params["cls_head"]["kernel"]}
        rules = [*family.rules, families.SCORE]
        tokenizer, class_values = _class_values(cfg, tokenizer, labels)
        values |= class_values | {"architectures": [family.classifier]}
    dtype = jax.tree.leaves(params)[0].dtype
    values["dtype"] = dtype.name
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    texts: dict[str, str] = {}
    if tokenizer is not None:
        from gptjax.tokenizers import hf

        check_vocabulary(tokenizer, cfg)
        texts = hf.to_hf(tokenizer)
        stops = stop_ids(tokenizer)
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    if cfg.n_classes and labels is not None:
        texts[LABELS] = json.dumps(labels, indent=1) + "\n"
    texts[CONFIG] = json.dumps(values | ends, indent=2) + "\n"
    texts["generation_config.json"] = json.dumps(ends, indent=2) + "\n"
    new_folder(folder)
    try:
        safetensors.save(folder, write(params, rules, cfg), dtype)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def refuse_bias(head: Params) -> None:
    """Raises UserError if the classification head has a non-zero bias."""
    if np.asarray(head.get("bias", 0)).any():
        raise UserError("transformers' classifiers have no bias: train the head with classify.bias=false to export it")


def _class_values(
    cfg: ModelConfig, tokenizer: Tokenizer | None, labels: dict[str, Any] | None
) -> tuple[Tokenizer | None, dict[str, Any]]:
    """Returns the tokenizer with a padding token, and the config.json attributes of a classifier.

    The classifiers of transformers read the last token that is not pad_token_id, regardless of the attention mask, so
    that any token that never ends a text can be the padding token.
    """
    if labels is not None and labels["pooling"] != "last":
        raise UserError(
            f"transformers' classifiers read the last token of a text, this model has classify.pooling="
            f"{labels['pooling']}: train it with classify.pooling=last to export it"
        )
    names = labels["labels"] if labels is not None else [f"LABEL_{i}" for i in range(cfg.n_classes)]
    if len(names) != cfg.n_classes or len(set(names)) != cfg.n_classes:
        raise UserError(f"labels: expected {cfg.n_classes} different names, got {names!r:.60}")
    pad = None
    if tokenizer is not None:
        stops = stop_ids(tokenizer)
        spare = tokenizer.vocab_size if cfg.vocab_size > tokenizer.vocab_size else None
        named = {*tokenizer.special_tokens.values(), *tokenizer.added_tokens.values()}
        candidates: list[int | None] = [tokenizer.pad_id, *stops, spare]
        # A reward model reads the end token of an answer, so that an end token cannot be the padding token.
        if cfg.n_classes == 1:
            ends = answer_ends(tokenizer)
            candidates = [i for i in (tokenizer.pad_id, spare, *sorted(named), *range(len(ends) + 1)) if i not in ends]
        pad = next((i for i in candidates if i is not None), None)
        tokenizer = tokenizer.replace(pad_id=pad) if pad in named else tokenizer
    table = {str(i): name for i, name in enumerate(names)}
    return tokenizer, {
        "id2label": table, "label2id": {name: int(i) for i, name in table.items()},
        "pad_token_id": pad,
    }  # fmt: skip


def export_gguf(
    path: str | os.PathLike[str], params: Params, cfg: ModelConfig, tokenizer: Tokenizer, type: str = "F32"
) -> Path:
    """Writes a GGUF file that llama.cpp loads, including the tokenizer and its chat template.

    Args:
        type: storage type of the matrices, F32, F16, BF16 or Q8_0. Vectors are stored as F32, and so are, for Q8_0,
            matrices whose row length is not a multiple of 32.

    Raises:
        UserError: the file exists, no llama.cpp architecture can represent the model, the vocabulary cannot be written,
            or the tokenizer has more ids than the model has embeddings.
    """
    from gptjax.tokenizers import gguf as vocabulary

    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: name a new file")
    check_vocabulary(tokenizer, cfg)
    name = gguf.family_of(cfg)
    if not stop_ids(tokenizer):
        raise UserError(
            f"a GGUF vocabulary has an end token (llama.cpp defaults to id 11), and {tokenizer.name} has none: "
            "train with tokenizer.name=bpe or gpt2"
        )
    vocabulary_metadata = vocabulary.padded(vocabulary.to_metadata(tokenizer), cfg.vocab_size)
    metadata = gguf.to_metadata(cfg, name) | vocabulary_metadata
    metadata["general.name"] = _name_for_llama_cpp(path.stem, metadata["tokenizer.ggml.tokens"])
    block = 32 if type == "Q8_0" else 1
    tensors = [
        (t.name, t.shape, type if len(t.shape) > 1 and t.shape[-1] % block == 0 else "F32", t.array)
        for t in write(params, gguf.ARCHITECTURES[name].rules(cfg), cfg)
    ]
    if cfg.rope_scaling == "llama3":
        factors = gguf.rope_factors(cfg)
        tensors.append(("rope_freqs.weight", factors.shape, "F32", lambda: factors))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, metadata, tensors)
    return path


def _name_for_llama_cpp(name: str, tokens: list[str]) -> str:
    """Returns the model name, which is changed if llama.cpp would reject the name for a model with the vocabulary
    `tokens`.

    If the name contains "phi-3" or "phi3", llama.cpp requires Phi-3's special tokens. If the vocabulary lacks one of
    Phi-3's special tokens, "phi-3" and "phi3" are replaced by "phi".
    """
    if {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= {*tokens}:
        return name
    return re.sub("(phi)-?3", r"\1", name, flags=re.IGNORECASE)


def export_stablehlo(
    folder: str | os.PathLike[str], params: Params, cfg: ModelConfig, tokenizer: Tokenizer | None = None
) -> Path:
    """Writes a gptjax model folder with the additional file forward.stablehlo, which holds the function `forward`
    lowered to StableHLO for CPUs, NVIDIA GPUs and TPUs.

        program = jax.export.deserialize(open("DIR/forward.stablehlo", "rb").read())
        logits = program.call(params, tokens)

    The StableHLO program computes logits [B, T, V] float32 from tokens [B, T] int32, for any B, with
    T = cfg.context_length.

    Raises:
        UserError: flatbuffers is not installed, the model is a classifier, the tokenizer has more ids than the model
            has embeddings, or the folder is not empty.
    """
    refuse_classifier(cfg, way_out="export_hf keeps its classes")
    if tokenizer is not None:
        check_vocabulary(tokenizer, cfg)
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError("stablehlo needs flatbuffers: pip install -e '.[export]' in the checkout") from error
    folder = Path(folder)
    (rows,) = jax.export.symbolic_shape("b")
    tokens = jax.ShapeDtypeStruct((rows, cfg.context_length), jnp.int32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    run = jax.jit(lambda params, tokens: forward(params, tokens, cfg))
    program = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(shapes, tokens).serialize()
    new_folder(folder)
    native.save(folder, params, cfg, tokenizer)
    (folder / "forward.stablehlo").write_bytes(program)
    return folder


def new_folder(folder: Path) -> None:
    """Creates the folder. Raises UserError if the folder exists already and is not empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder")
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}") from error
