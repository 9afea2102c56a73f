"""Our own folder of a finished model, and how it is read.

final/  model.safetensors   parameters, named by their paths: "blocks/attn/q/kernel"
        model.json          the ModelConfig
        tokenizer.json      the tokenizer
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gptjax import config, tree
from gptjax.config import ModelConfig
from gptjax.model.gpt import abstract_params
from gptjax.types import Params, UserError
from gptjax.weights import safetensors
from gptjax.weights.rules import Out, Rule, read

FORMAT, VERSION = "gptjax model", 1
WEIGHTS, MODEL = "model.safetensors", "model.json"


def save(
    folder: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: Any = None,
    files: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write params, config and tokenizer as a folder that needs nothing else; an older one there is replaced.

    The folder appears by one rename, complete or not at all.

    Args:
        files: more text files, by name.

    Raises:
        UserError: a leaf that is no plain array, or the folder cannot be written.
    """
    folder = Path(folder)
    leaves = tree.flatten_nodes(params)
    if other := {type(leaf).__name__ for leaf in leaves.values() if not hasattr(leaf, "dtype")}:
        raise UserError(f"leaves of {', '.join(sorted(other))} cannot be saved: gptjax.dequantize(params) first")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        out = [Out(name, leaf.shape, lambda leaf=leaf: np.asarray(leaf)) for name, leaf in leaves.items()]
        safetensors.save(partial, out, np.result_type(*(leaf.dtype for leaf in leaves.values())), shard_bytes=math.inf)
        body = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(cfg)}
        (partial / MODEL).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer.json")
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        replace_folder(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the model to {folder}: {error.strerror or error}") from error
    return folder


def replace_folder(new: Path, folder: Path) -> None:
    """`new` becomes `folder`; whoever dies in between leaves the old one for `recover_folder`."""
    old = folder.with_name(f".{folder.name}.old")
    recover_folder(folder)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was cut off."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(path: str | os.PathLike[str], *, dtype: Any = np.float32, shardings: Any = None) -> tuple[Params, ModelConfig]:
    """Parameters and model of a run directory (its final/, else its best/) or of such a folder itself.

    Raises:
        UserError: no model there, or its tensors are not those of its config; all of them are named.
    """
    folder = find(path)
    cfg = read_model(folder / MODEL)
    rules = [Rule(path, path) for path in tree.flatten(abstract_params(cfg))]
    source = safetensors.open_file(folder / WEIGHTS)
    return read(source, rules, cfg, str(folder / WEIGHTS), dtype=dtype, shardings=shardings), cfg


def find(path: str | os.PathLike[str]) -> Path:
    """The folder with model.json: `path` itself, its final/ or its best/."""
    path = Path(path)
    for folder in (path, path / "final", path / "best"):
        if (folder / MODEL).is_file():
            return folder
    if not path.exists():
        raise UserError(f"{path}: no such run directory or model folder")
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
        return config.from_dict({"model": body["model"]}).model
    except UserError as error:
        raise UserError(f"{path}:\n{error}") from error


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
