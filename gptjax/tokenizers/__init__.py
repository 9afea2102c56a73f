"""Loads, trains and saves tokenizers, which convert text to token ids and token ids to text.

Examples:
    tok = tokenizers.load("gpt2")               loads a built-in tokenizer: gpt2 or bytes
    tok = tokenizers.train("bpe", texts, 4096)  trains a new tokenizer: chars, words, bpe, wordpiece or unigram
    tok.save("here"); tokenizers.load("here")   saves and loads one file, here/tokenizer.json
    tok = tokenizers.load("SmolLM2-135M")       loads a Hugging Face folder: tokenizer.json, or vocab.json and
                                                merges.txt
    tok = tokenizers.load("model.gguf")         loads the tokenizer of a GGUF file: a path, or a model of
                                                `gptjax.assets`
    ids = tok.encode("Every effort moves you")  -> [6109, 3626, 6100, 345]
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gptjax import assets
from gptjax.config import TokenizerConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.files import user_path
from gptjax.tokenizers.base import (
    FILE,
    FORMAT,
    SETTINGS,
    VERSION,
    Tokenizer,
    begin_id,
    parse_json,
    read_text,
    refuse,
    stop_ids,
    string_list,
    whole_tokens,
)

__all__ = [
    "KINDS", "READY", "TRAINED", "Tokenizer", "begin_id", "build", "extend", "load", "loads", "stop_ids", "train",
]  # fmt: skip

READY = ("gpt2", "bytes")
TRAINED = ("chars", "words", "bpe", "wordpiece", "unigram")
# Maps each kind of tokenizer to the names of its module and its class. The module of a tokenizer is imported on first
# use.
KINDS: dict[str, tuple[str, str]] = {
    "chars": ("chars", "Chars"),
    "bytes": ("chars", "Bytes"),
    "words": ("words", "Words"),
    "bpe": ("bpe", "BPE"),
    "wordpiece": ("subwords", "WordPiece"),
    "unigram": ("subwords", "Unigram"),
    "hf": ("hf", "HF"),
}


def load(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """Load a built-in tokenizer, or load a tokenizer from a saved file, a run directory, a Hugging Face folder or a
    GGUF file.

    Args:
        name_or_path: "gpt2", "bytes", the name of an asset, or a path.

    Raises:
        UserError: there is no such tokenizer, or the file is incomplete or inconsistent.
    """
    if name_or_path == "gpt2":
        return _module("bpe").gpt2()
    if name_or_path == "bytes":
        return _module("chars").Bytes()
    user_path(name_or_path)
    path = assets.model_file(name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        from gptjax.formats import gguf

        return _module("gguf").from_metadata(gguf.read(path).metadata)
    candidates = [path / "final" / FILE, path / FILE] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            data = parse_json(read_text(candidate), str(candidate))
            if _is_hf(data):
                return _module("hf").from_folder(candidate.parent, data)
            return _from_data(data, str(candidate))
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _module("hf").from_folder(path)
    raise UserError(_not_found(str(name_or_path), path))


def train(name: str, texts: Iterable[str], vocab_size: int | None = None, **options: Any) -> Tokenizer:
    """Train a new tokenizer.

    Args:
        name: the kind of tokenizer: chars, words, bpe, wordpiece or unigram.
        texts: the documents to train on; they are read once.
        vocab_size: size of the vocabulary, special tokens included. bpe, wordpiece and unigram tokenizers require it. A
            `words` tokenizer keeps every word if `vocab_size` is None. A `chars` tokenizer ignores `vocab_size` and
            keeps every character.
        options: `special`, the names of the special tokens; only for `words` and `bpe`.
    """
    texts = _strings(texts)
    if name == "chars":
        return _module("chars").train(texts)
    if name == "words":
        return _module("words").train(texts, vocab_size, **options)
    if name not in TRAINED:
        raise UserError(f"cannot train a tokenizer called {name!r}{_near(name, TRAINED)}")
    if vocab_size is None:
        raise UserError(f"training a {name} tokenizer needs a vocab_size, for instance 4096")
    if name == "bpe":
        return _module("bpe").train(texts, vocab_size, **options)
    return _module("subwords").train(name, texts, vocab_size)


def build(cfg: TokenizerConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Load the tokenizer that a config names, or train a new tokenizer on the documents that the function `texts`
    returns. The function `texts` is called only for training."""
    if cfg.name not in TRAINED:
        return load(cfg.name)
    return train(cfg.name, texts(), None if cfg.name in ("chars", "words") else cfg.vocab_size)


def loads(text: str, location: str = "tokenizer") -> Tokenizer:
    """Load a tokenizer from the text of its tokenizer.json."""
    return _from_data(parse_json(text, location), location)


def extend(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Return a copy of the tokenizer with additional special tokens, which get the next free ids. The tokens that the
    tokenizer already has keep their ids.

    Raises:
        UserError: a name is a special or added token already, is an ordinary token of a `words` tokenizer or of one
            from Hugging Face, is empty, or is repeated.
    """
    problems: list[str] = []
    string_list(list(_strings(names)), "names", problems)
    known = whole_tokens(tokenizer)
    problems += [f"{name!r:.60} is a token already, its id is {known[name]}" for name in names if name in known]
    refuse(tokenizer.kind, problems)
    data = json.loads(tokenizer.dumps())
    data["special_tokens"] |= {name: tokenizer.vocab_size + i for i, name in enumerate(names)}
    data["vocab_size"] += len(names)
    return _from_data(data, "extend")


def _is_hf(data: Any) -> bool:
    return isinstance(data, dict) and "format" not in data and "model" in data


def _from_data(data: Any, location: str) -> Tokenizer:
    try:
        if _is_hf(data):
            return _module("hf").from_data(data)
        _check_header(data)
        tokenizer = getattr(_module(KINDS[data["kind"]][0]), KINDS[data["kind"]][1]).from_data(data)
        tokenizer.grow([name for name in data["special_tokens"] if name not in tokenizer.special_tokens])
        problems = []  # The header of a tokenizer file must agree with the vocabulary in the file.
        if type(data.get("vocab_size")) is not int or data["vocab_size"] != tokenizer.vocab_size:
            stated = f"{data.get('vocab_size')!r:.40}"
            problems.append(f"vocab_size: the header says {stated}, the entries give {tokenizer.vocab_size}")
        for name, i in data["special_tokens"].items():
            if i != (expected := tokenizer.special_tokens.get(name)):
                problems.append(f"special_tokens: {name!r:.60} has id {i}, expected {expected}")
        refuse(tokenizer.kind, problems)
        return tokenizer.replace(**{name: data[name] for name in SETTINGS if name in data})
    except UserError as error:
        raise UserError(f"{location}: {error}") from None


def _check_header(data: Any) -> None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f'not a tokenizer file of gptjax ("format": "{FORMAT}" is missing)')
    if data.get("version") != VERSION:
        raise UserError(f"version {data.get('version')!r:.40} of the file format; this gptjax reads version {VERSION}")
    problems = []
    if data.get("kind") not in list(KINDS):
        problems.append(f"kind: expected one of {', '.join(KINDS)}, got {data.get('kind')!r:.60}")
    if not isinstance(data.get("name"), str) or not string_list([data["name"]], "name", []):
        problems.append(f"name: expected a name, got {data.get('name')!r:.60}")
    special = data.get("special_tokens")
    if not isinstance(special, dict) or not all(type(i) is int for i in special.values()):
        problems.append(f"special_tokens: expected names with integer ids, got {special!r:.60}")
    else:
        string_list(list(special), "special_tokens", problems)
    refuse("this", problems)


def _strings(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise UserError("texts: expected an iterable of texts (a list, a generator), got one string; write [text]")
    return texts


def _not_found(name: str, path: Path) -> str:
    if name in TRAINED:
        return f"a {name} tokenizer has to be trained: tokenizers.train({name!r}, texts), or `gptjax tokenizer train`"
    if (path / "tokenizer.model").is_file():
        return (
            f"{path}: a tokenizer.model without tokenizer.json is not supported; transformers writes one: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        )
    if path.is_dir():
        return f"{path}: no {FILE} and no final/{FILE} in this folder"
    return f"no tokenizer called {name!r} and no such file{_near(name, READY + TRAINED)}"


def _near(name: str, known: tuple[str, ...]) -> str:
    return did_you_mean(name, known, ", did you mean {!r}?") + f" (known: {', '.join(known)})"


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"gptjax.tokenizers.{name}")
