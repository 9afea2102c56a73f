"""Loads a model of any supported format from a path or by a name.

Examples:
    params, cfg = load("runs/default")              a run, or a folder that `gptjax import` wrote
    params, cfg = load("smollm2-135m-instruct")     an asset, by its name
    params, cfg = load("SmolLM2-135M")              a Hugging Face folder, or the path of a .gguf file
    params, cfg = load("hf:openai-community/gpt2")  a model on the Hugging Face Hub
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import assets, lora, tokenizers, tree
from gptjax.config import ModelConfig
from gptjax.errors import UserError, did_you_mean_path, refuse
from gptjax.files import use_json, user_path
from gptjax.formats import safetensors
from gptjax.model.gpt import abstract_params
from gptjax.ops.quant import dequantize, quantize
from gptjax.tokenizers import Tokenizer
from gptjax.types import Params
from gptjax.weights import families, gguf, native
from gptjax.weights.native import check_vocabulary
from gptjax.weights.rules import Source, read, shardings_by_path

CONFIG = "config.json"
LABELS = "labels.json"  # labels.json describes a classifier: class names, pooling, maximum length and prompt template.
MAX_CONFIG_BYTES = 16 << 20
_DTYPES = ("float32", "bfloat16", "float16")


class Model(NamedTuple):
    """A model on disk whose tensors have not been read yet."""

    location: str
    kind: str  # Kind of the model: "gptjax" or the name of the model family.
    cfg: ModelConfig
    params: Callable[[Any, Any], Params]  # Function of (dtype, shardings) that reads the parameters of the model.
    read_tokenizer: Callable[[], Tokenizer]

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer. Raises UserError if the model has no tokenizer, or if the embedding has no row for some
        ids of the tokenizer."""
        tokenizer = self.read_tokenizer()
        check_vocabulary(tokenizer, self.cfg, self.location)
        return tokenizer


def load(
    source: str | os.PathLike[str], *, dtype: Any = "float32", shardings: Any = None
) -> tuple[Params, ModelConfig]:
    """Loads the parameters and the config of a model.

    Tensors are read one at a time and put directly on their devices, so that the peak memory is the memory of the model
    and of one tensor.

    Args:
        source: a run directory, a gptjax model folder, a Hugging Face folder, a .safetensors file next to its
            config.json, a .gguf file, the name of an asset, or `hf:org/name`.
        dtype: dtype of the returned parameters, float32, bfloat16 or float16, whatever dtype the file has.
        shardings: one sharding for all parameters, or a tree of shardings, or None for the default device.

    Raises:
        UserError: there is no readable model, or tensors or attributes are missing, unknown or wrong; one message lists
            them.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise UserError(f"dtype={dtype!r}: expected {', '.join(_DTYPES)}")
    model = open_model(source)
    return model.params(dtype, shardings), model.cfg


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of the model that `load(source)` reads.

    Raises:
        UserError: the model has no tokenizer, or its embedding has no row for some ids of the tokenizer;
            `tokenizers.load` accepts such a tokenizer.
    """
    return open_model(source).tokenizer()


def open_model(source: str | os.PathLike[str]) -> Model:
    """Opens the model that `load` would read, without reading the tensors of the model."""
    name = str(source)
    if not name.startswith("hf:"):
        user_path(name)
    elif not re.fullmatch(r"hf:[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name, re.ASCII):
        raise UserError(f"{name:.200}: expected hf:org/name")
    path = _from_hub(name.removeprefix("hf:")) if name.startswith("hf:") else assets.model_file(source)
    if path.suffix == ".gguf" and path.is_file():
        tensors, kind, cfg = gguf.open_file(path)
        rules = gguf.ARCHITECTURES[kind].rules(cfg)
        return Model(
            str(path), kind, cfg,
            lambda dtype, shardings: read(tensors, rules, cfg, str(path), dtype=dtype, shardings=shardings),
            lambda: tokenizers.load(path),
        )  # fmt: skip
    if (path / "hparams.json").is_file():
        return _openai(path)
    if path.is_dir() and not (path / CONFIG).is_file():
        return _native(path)
    if path.is_dir():
        return _hugging_face(path, safetensors.open_folder(path))
    if path.suffix == ".safetensors" and path.is_file():
        if not (path.parent / CONFIG).is_file():
            raise UserError(f"{path}: expected {CONFIG} next to it, which describes the model")
        return _hugging_face(path.parent, safetensors.open_file(path))
    if path.is_file():
        raise UserError(_no_model(path))
    known = [name for name, asset in assets.ASSETS.items() if asset.file.endswith(".gguf")]
    raise UserError(
        f"{name}: no such run, folder, .safetensors or .gguf file{did_you_mean_path(path)}; named models are "
        f"{', '.join(known)}"
    )


def _no_model(path: Path) -> str:
    """Returns the error message for a file that is not a supported model: pickled weights, text, or something else."""
    expected = "expected a run or model folder, a .gguf or .safetensors file, hf:org/name, or the name of an asset"
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 12)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if start.startswith(b"GGUF"):
        return f"{path} is a GGUF file: name it .gguf"
    if path.suffix.lower() in safetensors.PICKLED or start.startswith((b"\x80", b"PK\x03\x04")):
        return safetensors.refuse_pickle(path)
    if path.name in (CONFIG, native.MODEL):
        return f"{path} is the description of a model: name its folder, {path.parent}"
    if b"\0" in start or "\ufffd" in start.decode("utf-8", "replace")[:-3]:
        return f"{path} is not a model of a known format: {expected}"
    return f"{path} is a text file: {expected}; to train on a text: gptjax pretrain data.source={path}"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
    patterns += ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    # The client of the Hub raises many types of errors: no network, no such name, no access.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"hf:{name} could not be downloaded: {reason}. Use a local folder, or "
            "smollm2-135m-instruct, which comes from a package registry"
        ) from error


def _native(path: Path) -> Model:
    folder = native.find(path)
    cfg, base = native.read_model(folder / native.MODEL), native.read_base(folder)

    def params(dtype: Any, shardings: Any) -> Params:
        if base is None:
            return native.load(folder, dtype=dtype, shardings=shardings)[0]
        return _adapted(folder, cfg, base, dtype, shardings)

    return Model(str(folder), "gptjax", cfg, params, lambda: tokenizers.load(folder))


def _adapted(folder: Path, cfg: ModelConfig, base: native.Base, dtype: Any, shardings: Any) -> Params:
    """Returns the parameters of a model that is stored as an adapter. The adapter is merged into the base model in
    float32 in host memory.

    Raises:
        UserError: the base model cannot be read, its weights have changed, or the adapter does not fit it.
    """
    trained = native.load_adapter(folder)
    try:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # With JAX_PLATFORMS=cuda, JAX has no CPU backend.
        host = None
    try:
        params = open_model(base.source).params("float32", host)
    except UserError as error:
        raise UserError(
            f"{folder} holds an adapter for {base.source}, which cannot be read:\n{error}\n"
            f"  restore it, or set base/source to its new path in {folder / native.MODEL}"
        ) from error
    if native.fingerprint(params) != base.fingerprint:
        raise UserError(
            f"{folder} holds an adapter for {base.source}, which has other weights than those it was trained on"
        )
    leaves = tree.flatten(dequantize(lora.merge(quantize(params, base.quantize), trained, base.lora)))
    expected = tree.flatten(abstract_params(cfg))
    refuse(str(folder), [f"{path} is missing" for path in expected.keys() - leaves.keys()])
    sharding_of = shardings_by_path(shardings, expected)
    return tree.unflatten(
        {path: jax.device_put(np.asarray(leaves[path], jnp.dtype(dtype)), sharding_of[path]) for path in expected}
    )


def _hugging_face(folder: Path, source: Source) -> Model:
    location = str(folder / CONFIG)
    family, cfg, summary = families.from_hf(_json(folder / CONFIG), location)
    rules = [*family.rules, families.SCORE]
    if not any(name.startswith(family.prefix) for name in source.shapes()):
        rules = [rule._replace(theirs=rule.theirs.removeprefix(family.prefix)) for rule in rules]
    tied = {"lm_head.weight"} if cfg.tie_embeddings else set()
    # If the LM head in the file differs from the embedding, the LM head is used in spite of tie_word_embeddings, as in
    # transformers 5.
    if tied & set(source.shapes()):
        table = next(rule.theirs for rule in rules if rule.ours == "wte/embedding")
        if table in source.shapes() and not np.array_equal(source.array("lm_head.weight"), source.array(table)):
            cfg, tied = dataclasses.replace(cfg, tie_embeddings=False), set()

    def params(dtype: Any, shardings: Any) -> Params:
        with families.with_summary(summary, location):
            return read(
                source, rules, cfg, str(folder), dtype=dtype, shardings=shardings,
                ignored=lambda name: name in tied or (bool(family.ignored) and name.endswith(family.ignored)),
            )  # fmt: skip

    return Model(str(folder), family.name, cfg, params, lambda: _tokenizer_of(folder, family, cfg))


def _tokenizer_of(folder: Path, family: families.Family, cfg: ModelConfig) -> Tokenizer:
    """Loads the tokenizer of a model in a Hugging Face folder.

    If the tokenizer's last token is the placeholder of the model family (Gemma 3's image token) and the embedding has
    no row for the placeholder, the placeholder is removed from the tokenizer. The text of a removed placeholder is
    encoded as ordinary text.
    """
    from gptjax.tokenizers.hf import HF, without_last

    tokenizer = tokenizers.load(folder)
    last = {**tokenizer.special_tokens, **tokenizer.added_tokens}.get(family.placeholder)
    if isinstance(tokenizer, HF) and last == cfg.vocab_size == tokenizer.vocab_size - 1:
        return without_last(tokenizer)
    return tokenizer


def _openai(folder: Path) -> Model:
    """Opens a GPT-2 model in OpenAI's format, which is a TensorFlow checkpoint with hparams.json."""
    from gptjax.formats import tensorflow

    location = folder / "hparams.json"
    a = families.Attributes(_json(location), neutral=())
    names = dict(vocab_size="n_vocab", context_length="n_ctx", d_model="n_embd", n_head="n_head", n_layer="n_layer")
    fields = {ours: a.take(theirs, int) for ours, theirs in names.items()}
    a.end(str(location))
    cfg = families.model_config(dict(arch="gpt2", **fields), str(location))
    source = tensorflow.open_checkpoint(folder)
    return Model(
        str(folder), "gpt2", cfg,
        lambda dtype, shardings: read(
            source, families.OPENAI_RULES, cfg, str(folder), dtype=dtype, shardings=shardings
        ),
        lambda: tokenizers.load("gpt2"),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_CONFIG_BYTES:,}")
    return safetensors.parse_json(path.read_bytes(), str(path), "config")


def read_labels(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the description of a classifier: {"labels": .., "pooling": .., "max_length": .., "prompt": ..}.

    The labels of a Hugging Face classifier are in the config.json of the folder. If the Hugging Face folder has no
    labels.json from gptjax, the pooling is "last", max_length is the context length, and the prompt is only the text,
    "{text}".

    Raises:
        UserError: the model is not a classifier.
    """
    path = Path(source)
    if (path / CONFIG).is_file() and not (path / native.MODEL).is_file():
        model = open_model(path)
        if not model.cfg.n_classes:
            raise UserError(f"{path} is not a classifier: its config.json names another architecture")
        names = families.class_names(_json(path / CONFIG), str(path / CONFIG))
        defaults = {"labels": names, "pooling": "last", "max_length": model.cfg.context_length, "prompt": "{text}"}
        return use_json(path / LABELS, _labels) if (path / LABELS).is_file() else defaults
    file = native.find(path) / LABELS
    if not file.is_file():
        raise UserError(f"{path} is not a classifier ({LABELS} is missing): gptjax finetune classify trains one")
    return use_json(file, _labels)


def _labels(body: dict[str, Any]) -> dict[str, Any]:
    names, length, prompt = body["labels"], body["max_length"], body["prompt"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected labels, a list of strings")
    if body["pooling"] not in ("last", "first", "mean") or type(length) is not int or length < 1:
        raise ValueError("expected pooling, one of last, first and mean, and max_length, an integer of at least 1")
    if not isinstance(prompt, str):
        raise ValueError("expected prompt, a string")
    return body
