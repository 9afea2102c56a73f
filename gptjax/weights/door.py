"""Any model that can be read, by its path or name, and what can be written.

params, cfg = load("runs/default")              a run, or a folder that `gptjax import` made
params, cfg = load("smollm2-135m-instruct")     a named asset
params, cfg = load("SmolLM2-135M")              a Hugging Face folder; a .gguf file likewise
params, cfg = load("hf:openai-community/gpt2")  from the hub, where it answers
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gptjax import assets, lora, tokenizers, tree
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import use_json, user_path
from gptjax.formats import gguf, safetensors
from gptjax.model.gpt import abstract_params, forward, refuse_classifier
from gptjax.ops.quant import dequantize, quantize
from gptjax.types import Params
from gptjax.weights import families, llama_cpp, native
from gptjax.weights.native import check_vocabulary
from gptjax.weights.rules import places_of, read, refuse, write

CONFIG = "config.json"
IMAGE = "<image_soft_token>"
LABELS = "labels.json"  # beside a classifier: the names of its classes, how a text is pooled, cut and put into a prompt
MAX_CONFIG_BYTES = 16 << 20
_DTYPES = ("float32", "bfloat16", "float16")


class Model(NamedTuple):
    """A model on disk: what it is, and how to get its parts."""

    where: str
    kind: str  # "gptjax", or the name of the family it was read as
    cfg: ModelConfig
    params: Callable[[Any, Any], Params]  # (dtype, shardings) -> params
    read_tokenizer: Callable[[], Any]

    def tokenizer(self) -> Any:
        """Raises UserError if there is none, or it has ids that the model has no row for."""
        tokenizer = self.read_tokenizer()
        check_vocabulary(tokenizer, self.cfg, self.where)
        return tokenizer


def load(
    source: str | os.PathLike[str], *, dtype: Any = "float32", shardings: Any = None
) -> tuple[Params, ModelConfig]:
    """Parameters and config of a run directory, a model folder of ours, a Hugging Face folder, a .safetensors file
    with config.json beside it, a .gguf file, a named asset, or `hf:org/name`.

    Tensors are read one at a time, straight into their place: the peak is the model in `dtype` and one tensor.

    Args:
        dtype: float32, bfloat16 or float16, of every leaf, however it is stored.
        shardings: a sharding for all leaves, or a tree of them.

    Raises:
        UserError: nothing there that can be read; or tensors or attributes that are missing, unknown or wrong; all.
    """
    if jnp.dtype(dtype).name not in _DTYPES:
        raise UserError(f"dtype={dtype!r}: expected {', '.join(_DTYPES)}")
    model = open_model(source)
    return model.params(dtype, shardings), model.cfg


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer that came with the model `load` reads there.

    Raises:
        UserError: there is none, or it has ids that the model has no row for; `tokenizers.load` takes any.
    """
    return open_model(source).tokenizer()


def open_model(source: str | os.PathLike[str]) -> Model:
    """What `load` would read, before any tensor is read."""
    name = str(source)
    if not name.startswith("hf:"):
        user_path(name)
    elif not re.fullmatch(r"hf:[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name, re.ASCII):
        raise UserError(f"{name:.200}: expected hf:org/name")
    path = _from_hub(name.removeprefix("hf:")) if name.startswith("hf:") else assets.model_file(source)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path)
    if (path / "hparams.json").is_file():
        return _openai(path)
    if path.is_dir() and not (path / CONFIG).is_file():
        return _native(path)
    if path.is_dir():
        return _hugging_face(path, safetensors.open_folder(path))
    if path.suffix == ".safetensors" and path.is_file():
        if not (path.parent / CONFIG).is_file():
            raise UserError(f"{path}: expected {CONFIG} beside it, which says what the tensors are")
        return _hugging_face(path.parent, safetensors.open_file(path))
    if path.is_file():
        raise UserError(_no_model(path))
    known = [name for name, asset in assets.ASSETS.items() if asset.file.endswith(".gguf")]
    raise UserError(f"{name}: no such run, folder, .safetensors or .gguf file; named models are {', '.join(known)}")


def _no_model(path: Path) -> str:
    """What a file is that holds no model: pickled weights, text, or neither."""
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
        return f"{path} is no kind of model that is known here: {expected}"
    return f"{path} is a text file: {expected}; to train on a text: gptjax pretrain data.source={path}"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
    patterns += ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # many kinds: no network, no such name, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"hf:{name} could not be fetched: {reason}. Give a local folder instead, or "
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
    """The parameters of a model that is kept as an adapter, merged in float32 in the host's memory.

    Raises:
        UserError: the base cannot be read or has other weights by now, or the adapter does not fit it.
    """
    trained = native.load_adapter(folder)
    try:
        model = open_model(base.source)
        params = model.params("float32", _in_host_memory())
    except UserError as error:
        raise UserError(
            f"{folder} holds an adapter for {base.source}, which cannot be read:\n{error}\n"
            f"  bring it back, or write its new place at base/source in {folder / native.MODEL}"
        ) from error
    if native.fingerprint(params) != base.fingerprint:
        raise UserError(
            f"{folder} holds an adapter for {base.source}, which has other weights than those it was trained on"
        )
    leaves = tree.flatten(dequantize(lora.merge(quantize(params, base.quantize), trained, base.lora)))
    wanted = tree.flatten(abstract_params(cfg))
    refuse(str(folder), [f"{path} is missing" for path in wanted.keys() - leaves.keys()])
    places = places_of(shardings, wanted)
    return tree.unflatten(
        {path: jax.device_put(np.asarray(leaves[path], jnp.dtype(dtype)), places[path]) for path in wanted}
    )


def _in_host_memory() -> jax.sharding.Sharding | None:
    """The CPU's; None where jax was told to have no CPU (JAX_PLATFORMS=cuda)."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return None


def _hugging_face(folder: Path, source: Any) -> Model:
    where = str(folder / CONFIG)
    family, cfg, said = families.from_hf(_json(folder / CONFIG), where)
    rules = [*family.rules, families.SCORE]
    if family.name == "gpt2" and not any(name.startswith("transformer.") for name in source.shapes()):
        rules = [rule._replace(theirs=rule.theirs.removeprefix("transformer.")) for rule in rules]
    tied = {"lm_head.weight"} if cfg.tie_embeddings else set()
    if tied & set(source.shapes()):  # a head of its own, whatever the flag says: transformers 5 keeps it too
        table = next(rule.theirs for rule in rules if rule.ours == "wte/embedding")
        if table in source.shapes() and not np.array_equal(source.array("lm_head.weight"), source.array(table)):
            cfg, tied = dataclasses.replace(cfg, tie_embeddings=False), set()

    def params(dtype: Any, shardings: Any) -> Params:
        with families.explained(said, where):
            return read(
                source, rules, cfg, str(folder), dtype=dtype, shardings=shardings,
                ignored=lambda name: name in tied or (bool(family.ignored) and name.endswith(family.ignored)),
            )  # fmt: skip

    return Model(str(folder), family.name, cfg, params, lambda: _fitting(tokenizers.load(folder), cfg))


def _fitting(tokenizer: Any, cfg: ModelConfig) -> Any:
    """Without the placeholder of images, where the model has rows for all tokens before it and none for it: the text
    models of Gemma 3 and their tokenizer are published so. Its text is plain text then."""
    from gptjax.tokenizers.hf import HF, without_last

    last = {**tokenizer.special_tokens, **tokenizer.added_tokens}.get(IMAGE)
    if isinstance(tokenizer, HF) and last == cfg.vocab_size == tokenizer.vocab_size - 1:
        return without_last(tokenizer)
    return tokenizer


def _openai(folder: Path) -> Model:
    """GPT-2 as OpenAI published it: a TensorFlow checkpoint with hparams.json."""
    from gptjax.formats import tensorflow

    where = folder / "hparams.json"
    a = families.Attributes(_json(where), neutral=())
    names = dict(vocab_size="n_vocab", context_length="n_ctx", d_model="n_embd", n_head="n_head", n_layer="n_layer")
    fields = {ours: a.take(theirs, int) for ours, theirs in names.items()}
    a.end(str(where))
    cfg = families.model_config(dict(arch="gpt2", **fields), str(where))
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
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than a config has ({MAX_CONFIG_BYTES:,})")
    return safetensors.parse_json(path.read_bytes(), str(path), "config")


@dataclasses.dataclass(frozen=True)
class _GGUFSource:
    file: gguf.File

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.file.tensors.items() if name != "rope_freqs.weight"}

    def array(self, name: str) -> np.ndarray:
        return self.file.array(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self.file.tensors[name]
        row = tensor.size_bytes // tensor.shape[0]
        part = dataclasses.replace(
            tensor, shape=(stop - start, tensor.shape[1]), offset=tensor.offset + start * row,
            size_bytes=row * (stop - start),
        )  # fmt: skip
        return gguf.File(self.file.path, {}, {name: part}).array(name)


def _gguf(path: Path) -> Model:
    file = gguf.read(path)
    source = _GGUFSource(file)
    parts = file.metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts != 1:
        raise UserError(f"{path} is one of {parts!r:.60} parts: join them with llama.cpp's gguf-split")
    cfg = llama_cpp.from_metadata(file.metadata, source.shapes(), str(path))
    if "rope_freqs.weight" in file.tensors:
        cfg = llama_cpp.with_rope_factors(cfg, file.array("rope_freqs.weight"), str(path))
    name = file.metadata["general.architecture"]
    return Model(
        str(path), name, cfg,
        lambda dtype, shardings: read(
            source, llama_cpp.rules(cfg, name), cfg, str(path), dtype=dtype, shardings=shardings
        ),
        lambda: tokenizers.load(path),
    )  # fmt: skip


def read_labels(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What a classifier's folder says of its classes: labels, pooling, max_length, prompt.

    One of Hugging Face has the names in its config.json, and reads the last token; the rest is what gptjax added to it,
    or the whole context and the text alone.

    Raises:
        UserError: the model is none.
    """
    path = Path(source)
    if (path / CONFIG).is_file() and not (path / native.MODEL).is_file():
        model = open_model(path)
        if not model.cfg.n_classes:
            raise UserError(f"{path} is no classifier: its config.json names another architecture")
        names = families.class_names(_json(path / CONFIG), str(path / CONFIG))
        usual = {"labels": names, "pooling": "last", "max_length": model.cfg.context_length, "prompt": "{text}"}
        return use_json(path / LABELS, _labels) if (path / LABELS).is_file() else usual
    file = native.find(path) / LABELS
    if not file.is_file():
        raise UserError(f"{path} is no classifier ({LABELS} is missing): gptjax finetune classify makes one")
    return use_json(file, _labels)


def _labels(about: dict[str, Any]) -> dict[str, Any]:
    names, length, prompt = about["labels"], about["max_length"], about["prompt"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected labels, a list of texts")
    if about["pooling"] not in ("last", "first", "mean") or type(length) is not int or length < 1:
        raise ValueError("expected a pooling, last, first or mean, and max_length, a whole number")
    if not isinstance(prompt, str):
        raise ValueError("expected prompt, a text")
    return about


# ---------------------------------------------------------------- out


def export_hf(
    folder: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: Any = None,
    labels: dict[str, Any] | None = None,
) -> Path:
    """A folder that transformers loads: config.json, model.safetensors and, where one is given, the tokenizer.

    Args:
        labels: of a classifier, as `read_labels` gives it; the model becomes one ForSequenceClassification.

    Raises:
        UserError: no model type of Hugging Face holds this model or its tokenizer, or the folder is not empty.
    """
    folder = Path(folder)
    family = families.family_of(dataclasses.replace(cfg, n_classes=0, cls_bias=True))
    values = {"architectures": [family.architecture], "model_type": family.name, **family.to_hf(cfg)}
    rules = [*family.rules]
    if cfg.n_classes:
        params, rules = _class_params(params), [*family.rules, families.SCORE]
        tokenizer, more = _class_values(cfg, tokenizer, labels)
        values |= more | {"architectures": [family.classifier]}
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


def _class_params(params: Params) -> Params:
    """As transformers' classifiers have them: no LM head, and no bias in the other."""
    if np.asarray(params["cls_head"].get("bias", 0)).any():
        raise UserError("transformers' classifiers have no bias: train the head with classify.bias=false to export it")
    body = {name: node for name, node in params.items() if name != "lm_head"}
    return body | {"cls_head": {"kernel": params["cls_head"]["kernel"]}}


def _class_values(cfg: ModelConfig, tokenizer: Any, labels: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with a token that fills rows, and the attributes of a classifier.

    transformers reads the last token that is not pad_token_id, whatever the mask says: any that no text ends with.
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
        pad = next((i for i in (tokenizer.pad_id, *stops, spare) if i is not None), None)
        named = {*tokenizer.special_tokens.values(), *tokenizer.added_tokens.values()}
        tokenizer = tokenizer.replace(pad_id=pad) if pad in named else tokenizer
    table = {str(i): name for i, name in enumerate(names)}
    return tokenizer, {
        "id2label": table, "label2id": {name: int(i) for i, name in table.items()},
        "pad_token_id": pad,
    }  # fmt: skip


def export_gguf(
    path: str | os.PathLike[str], params: Params, cfg: ModelConfig, tokenizer: Any, type: str = "F32"
) -> Path:
    """A file that llama.cpp loads, with the tokenizer and its chat template inside.

    Args:
        type: F32, F16, BF16 or Q8_0, of the matrices; vectors stay F32.

    Raises:
        UserError: no architecture of llama.cpp holds this model, or its vocabulary cannot be written; the tokenizer has
            more ids than the model rows.
    """
    from gptjax.tokenizers import gguf as vocabulary

    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: name a new file")
    check_vocabulary(tokenizer, cfg)
    name = llama_cpp.family_of(cfg)
    if not stop_ids(tokenizer):
        raise UserError(
            f"a GGUF vocabulary has an end token, and llama.cpp takes id 11 where none is named; {tokenizer.name} has "
            "none: train with tokenizer.name=bpe or gpt2"
        )
    words = vocabulary.padded(vocabulary.to_metadata(tokenizer), cfg.vocab_size)
    metadata = llama_cpp.to_metadata(cfg, name) | words
    metadata["general.name"] = _name_for_llama_cpp(path.stem, metadata["tokenizer.ggml.tokens"])
    block = 32 if type == "Q8_0" else 1
    tensors = [
        (t.name, t.shape, type if len(t.shape) > 1 and t.shape[-1] % block == 0 else "F32", t.array)
        for t in write(params, llama_cpp.rules(cfg, name), cfg)
    ]
    if cfg.rope_scaling == "llama3":
        factors = llama_cpp.rope_factors(cfg)
        tensors.append(("rope_freqs.weight", factors.shape, "F32", lambda: factors))
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf.write(path, metadata, tensors)
    return path


def _name_for_llama_cpp(name: str, tokens: list[str]) -> str:
    """llama.cpp looks up tokens of Phi-3 in every model of that name, and loads none that lacks them."""
    if {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= {*tokens}:
        return name
    return re.sub("(phi)-?3", r"\1", name, flags=re.IGNORECASE)


def export_stablehlo(folder: str | os.PathLike[str], params: Params, cfg: ModelConfig, tokenizer: Any = None) -> Path:
    """Our own folder, and in it `forward.stablehlo`: `forward` as one program for CPUs, NVIDIA GPUs and TPUs.

        program = jax.export.deserialize(open("DIR/forward.stablehlo", "rb").read())
        logits = program.call(params, tokens)     # tokens [any, cfg.context_length] int32 -> [.., V] float32

    Raises:
        UserError: flatbuffers is not installed, the model is a classifier, the tokenizer has more ids than the model
            rows, or the folder is not empty.
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


def stop_ids(tokenizer: Any) -> list[int]:
    """Where a continuation of this tokenizer's model ends."""
    ids = list(getattr(tokenizer, "eos_ids", ()))
    return ids or ([tokenizer.eot_id] if tokenizer.eot_id is not None else [])


def new_folder(folder: Path) -> None:
    """Made if it is not there; one with anything in it is left alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder")
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}") from error
