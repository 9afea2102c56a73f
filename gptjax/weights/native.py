"""Saves and loads gptjax model folders.

    final/  model.safetensors   parameters, named by their paths: "blocks/attn/q/kernel"
            model.json          the ModelConfig and the sha256 of every file
            tokenizer.json      the tokenizer

Instead of model.safetensors, a folder may hold adapter.safetensors, which contains a LoRA adapter and all other trained
parameters, such as the head of a classifier. In a folder with adapter.safetensors, the file model.json names the base
model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config, tree
from gptjax.config import LoraConfig, ModelConfig, flat
from gptjax.errors import UserError, did_you_mean_path
from gptjax.files import json_sha256, sha256, sync, use_json, user_path
from gptjax.formats import safetensors
from gptjax.model.gpt import abstract_params
from gptjax.tokenizers import Tokenizer
from gptjax.types import Params
from gptjax.weights.rules import Out, Rule, read

FORMAT, VERSION = "gptjax model", 1
WEIGHTS, ADAPTER, MODEL = "model.safetensors", "adapter.safetensors", "model.json"
_UNLISTED = (  # files in a model folder of version 0.1.0, whose model.json does not list its files
    WEIGHTS, "tokenizer.json", "config.yaml", "result.json", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)  # fmt: skip


def save(
    folder: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] = MappingProxyType({}),
    add: Callable[[Path], None] | None = None,
    twin: Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the parameters, the config and the tokenizer of a model to a self-contained folder. A folder that `save`
    wrote earlier is replaced.

    The model folder is written atomically: the new folder is renamed into place when the folder is complete.

    Args:
        files: dict that maps the names of additional text files to their texts.
        add: function (folder) that writes more files to the temporary folder, called before this folder is renamed.
        twin: another folder written by `save`. If its weights file has the same bytes as the new one, the new one
            becomes a hard link to it.
        base: the `Base` of an adapter, as a dict, if `params` holds only the adapter and the other trained parameters,
            such as a classification head.

    Raises:
        UserError: a parameter is not an array, the tokenizer has more ids than the model has embeddings, the folder has
            files that `save` did not write, or the folder cannot be written.
    """
    folder = Path(folder)
    user_path(folder)
    if tokenizer is not None:
        check_vocabulary(tokenizer, cfg)
    _refuse_foreign(folder)
    leaves = tree.flatten_nodes(params)
    if unsupported := {type(leaf).__name__ for leaf in leaves.values() if not hasattr(leaf, "dtype")}:
        raise UserError(f"leaves of {', '.join(sorted(unsupported))} cannot be saved: use gptjax.dequantize(params)")
    new = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        out = [Out(name, leaf.shape, partial(np.asarray, leaf)) for name, leaf in leaves.items()]
        weights = WEIGHTS if base is None else ADAPTER
        dtype = np.result_type(*(leaf.dtype for leaf in leaves.values()))
        safetensors.write_file(new / weights, out, dtype)
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer.json")
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        if add is not None:
            add(new)
        written = sorted(path for path in new.rglob("*") if path.is_file())
        hashes = {path.relative_to(new).as_posix(): sha256(path) for path in written}
        if twin not in (None, folder):  # Do not link to a file of `folder`, which `new` replaces.
            _hard_link(new / weights, hashes[weights], twin / weights)
        model = json.loads(json.dumps(flat(cfg)))
        body = {
            "format": FORMAT, "version": VERSION, "files": hashes, "model_sha256": json_sha256(model), "model": model,
        }  # fmt: skip
        if base is not None:
            body |= {"base": dict(base), "base_sha256": _base_sha256(base)}
        (new / MODEL).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        for path in (*written, new / MODEL):
            sync(path)
        replace_folder(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"cannot write the model to {folder}: {error.strerror or error}") from error
    return folder


def check_vocabulary(tokenizer: Tokenizer, cfg: ModelConfig, location: str = "") -> None:
    """Raises UserError if the embedding of the model has no row for some ids of the tokenizer. The error message begins
    with `location` if `location` is not empty."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"{location}{': ' * bool(location)}the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{cfg.vocab_size} rows: they do not belong together, or gptjax.grow_vocabulary was not called"
        )


def _hard_link(file: Path, digest: str, twin: Path) -> None:
    """Replaces `file` with a hard link to `twin` if both files have the same bytes. A hard link is safe, because gptjax
    never modifies `file` or `twin` in place."""
    try:
        if twin.stat().st_size != file.stat().st_size or sha256(twin) != digest:
            return
        link = file.with_name(f".{file.name}.link")
        os.link(twin, link)
        os.replace(link, file)
    except OSError:  # The file `twin` does not exist, or the file system supports no hard links.
        return


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError if `folder` exists and contains files or folders that `save` did not write."""
    if not folder.name:
        raise UserError(f"cannot save a model as {str(folder)!r}: name a new folder")
    if not (folder.exists() or folder.is_symlink()):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a new folder for the model")
    names = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    names |= {path.name for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())}
    if not names:
        return
    try:
        body = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        ours = {*body.get("files", _UNLISTED), MODEL} if body["format"] == FORMAT else set()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        ours = set()
    if foreign := sorted(names - ours):
        listed = ", ".join(foreign[:3]) + (", .." if len(foreign) > 3 else "")
        raise UserError(
            f"{folder} has files that gptjax.save did not write ({listed}): nothing was overwritten; name a new folder"
        )


def verify(folder: Path) -> None:
    """Compares the files of a saved model with the SHA-256 hashes in the model.json of the model.

    Missing files are ignored. The environment variable GPTJAX_VERIFY=0 disables the check.

    Raises:
        UserError: files are damaged or were replaced; one message lists them.
    """
    body = json.loads((folder / MODEL).read_text(encoding="utf-8"))
    files = body.get("files")
    if os.environ.get("GPTJAX_VERIFY") == "0" or not isinstance(files, dict):
        return
    wrong = [name for name, digest in files.items() if (folder / name).is_file() and sha256(folder / name) != digest]
    if body.get("model_sha256") not in (None, json_sha256(body.get("model"))):
        wrong.append(f"{MODEL} (the settings of the model)")
    if isinstance(body.get("base"), dict) and body.get("base_sha256") != _base_sha256(body["base"]):
        wrong.append(f"{MODEL} (the settings of the adapter)")
    if wrong:
        raise UserError(
            f"{folder}: {', '.join(wrong)}: not as gptjax.save wrote it (sha256 differs): damaged or replaced\n"
            "  restore a good copy; GPTJAX_VERIFY=0 disables this check"
        )


def _base_sha256(base: Mapping[str, Any]) -> str:
    """Returns the SHA-256 hash of `base` without the key `source`, which users may edit if the base model has moved."""
    return json_sha256({key: value for key, value in base.items() if key != "source"})


def replace_folder(new: Path, folder: Path) -> None:
    """Replaces the folder `folder` with the folder `new` by renaming both folders. If the process ends between the two
    renames, `recover_folder` restores the old folder."""
    old = folder.with_name(f".{folder.name}.old")
    recover_folder(folder)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Restores the old folder if a process ended between the two renames of `replace_folder`."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(path: str | os.PathLike[str], *, dtype: Any = np.float32, shardings: Any = None) -> tuple[Params, ModelConfig]:
    """Loads the parameters and the config of a gptjax model folder, or of final/ or best/ in a run directory.

    Raises:
        UserError: there is no model, tensors do not fit the config, or files are damaged; one message lists the
            problems.
    """
    folder = find(path)
    cfg = read_model(folder / MODEL)
    if read_base(folder) is not None:
        raise UserError(f"{folder} holds an adapter without its base model: gptjax.load reads both")
    rules = [Rule(path, path) for path in tree.flatten(abstract_params(cfg))]
    source = safetensors.open_file(folder / WEIGHTS)
    verify(folder)
    return read(source, rules, cfg, str(folder / WEIGHTS), dtype=dtype, shardings=shardings), cfg


def find(path: str | os.PathLike[str]) -> Path:
    """Returns the first folder of `path`, path/final and path/best that holds a model.json."""
    path = user_path(path)
    for folder in (path, path / "final", path / "best"):
        if (folder / MODEL).is_file():
            return folder
    if not path.exists():
        raise UserError(f"{path}: no such run directory or model folder{did_you_mean_path(path)}")
    hint = "; the run has checkpoints only: let it finish" if (path / "checkpoints").is_dir() else ""
    raise UserError(f"{path} holds no model: expected {MODEL} and {WEIGHTS} in it, in final/ or in best/{hint}")


def read_model(path: Path) -> ModelConfig:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("model"), dict):
        raise UserError(f"{path}: expected a JSON object with format {FORMAT!r} and a model")
    if body.get("version") != VERSION:
        raise UserError(f"{path}: version {body.get('version')!r}; this release reads version {VERSION}")
    try:
        cfg = config.from_dict({"model": body["model"]}).model
    except UserError as error:
        raise UserError(f"{path}:\n{error}") from error
    if cfg.vocab_size < 1:
        raise UserError(f"{path}: model.vocab_size ({cfg.vocab_size}) must be at least 1")
    return cfg


def fingerprint(params: Params) -> str:
    """Returns a hash of the path, the shape and up to 1,024 elements of every parameter. The hashed elements are
    rounded to bfloat16, so that the hash does not depend on the stored dtype."""
    digest = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        sample = leaf.reshape(-1)[:: max(1, leaf.size // 1024)][:1024]
        sample = np.asarray(jax.device_get(sample)).astype(jnp.bfloat16)
        digest.update(f"{path} {leaf.shape}".encode() + sample.tobytes())
    return digest.hexdigest()


class Base(NamedTuple):
    """Describes an adapter by the path or name of the base model, the `fingerprint` of the base model's parameters, the
    quantisation of the base model's matrices in training (finetune.quantize), and the config of the adapter."""

    source: str
    fingerprint: str
    quantize: str
    lora: LoraConfig


def read_base(folder: Path) -> Base | None:
    """Reads the `Base` of a model that is stored as an adapter, or returns None if the folder holds all weights of the
    model."""
    return use_json(folder / MODEL, _base)


def _base(body: dict[str, Any]) -> Base | None:
    if "base" not in body:
        return None
    base = body["base"]
    cfg = config.from_dict({"task": "instruct", "finetune": {"quantize": base["quantize"]}, "lora": base["lora"]})
    if not isinstance(base["source"], str) or not isinstance(base["fingerprint"], str):
        raise TypeError("expected strings at base/source and base/fingerprint")
    return Base(base["source"], base["fingerprint"], cfg.finetune.quantize, cfg.lora)


def load_adapter(folder: Path) -> Params:
    """Loads an adapter and all other trained parameters, such as a classification head, as float32 arrays from a folder
    that `save(.., base=..)` wrote.

    Raises:
        UserError: files are missing or damaged.
    """
    source = safetensors.open_file(folder / ADAPTER)
    verify(folder)
    return tree.unflatten({name: source.array(name).astype(np.float32, copy=False) for name in source.shapes()})
