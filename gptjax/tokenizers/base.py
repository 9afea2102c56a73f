"""What every tokenizer promises, and the parts they share.

A tokenizer turns text into ids in 0 .. vocab_size-1 and back. Special tokens such as `<|endoftext|>` are ids that no
ordinary text produces: their text inside an input is refused until the caller says what is meant. Added tokens, which
only vocabularies of loaded models have, are whole pieces too, but their text always means their id.

    encode("a<|endoftext|>b")                                      UserError, it names the two ways out:
    encode("a<|endoftext|>b", allowed_special={"<|endoftext|>"})   the id of the special token
    encode("a<|endoftext|>b", disallowed_special=())               plain text like any other
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from gptjax.errors import UserError
from gptjax.files import other_encoding, write_text
from gptjax.formats.json import DuplicateKey, loads

FILE = "tokenizer.json"
FORMAT = "gptjax-tokenizer"
VERSION = 1
MAX_FILE_BYTES = 256 << 20
END_OF_TEXT = "<|endoftext|>"
END_OF_DOCUMENT = (END_OF_TEXT, "<|end_of_text|>")  # models that chat end a turn with another token

Special = Collection[str] | Literal["all"]

# What a model says of its tokenizer, beside the vocabulary; saved when it is not this.
SETTINGS = {"bos_id": None, "eos_ids": (), "pad_id": None, "add_bos": False, "chat_template": None}


class Tokenizer(Protocol):
    """The promise that every kind keeps; `tests/contracts/test_tokenizers.py` is its long form."""

    kind: ClassVar[str]  # a key of `tokenizers.KINDS`
    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: Mapping[str, int]
    bos_id: int | None  # `encode` never writes it
    eos_ids: tuple[int, ...]  # any of them ends what the model says
    pad_id: int | None
    add_bos: bool  # the model's texts begin with bos_id
    chat_template: str | None  # Jinja, see chat.py

    @property
    def eot_id(self) -> int | None: ...  # stands between documents; None: this kind has no special tokens
    @property
    def dtype(self) -> type[np.unsignedinteger]: ...
    @property
    def fingerprint(self) -> str: ...
    def replace(self, **settings: Any) -> Self: ...
    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]: ...
    def encode_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def data(self) -> dict[str, Any]: ...
    def dumps(self) -> str: ...
    def save(self, path: str | os.PathLike[str]) -> Path: ...


class Base(ABC):
    """The half that all kinds share. A kind adds `data`, and either `_encode` and `_decode`, which see no special
    tokens, or its own `encode`, `encode_array` and `decode`."""

    _encode: Callable[[str], list[int]]
    _decode: Callable[[np.ndarray], str]
    kind: ClassVar[str]
    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: Mapping[str, int] = MappingProxyType({})
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    @property
    def eot_id(self) -> int | None:
        """The id that stands between documents: by its name, else the one that ends what the model says."""
        named = [self.special_tokens[name] for name in END_OF_DOCUMENT if name in self.special_tokens]
        return next(iter([*named, *self.eos_ids]), None)

    def replace(self, **settings: Any) -> Self:
        """The same tokenizer with other settings: bos_id, eos_ids, pad_id, add_bos, chat_template.

        Raises:
            UserError: no such setting, an id outside the vocabulary, a template that is no text.
        """

        def is_id(value: Any) -> bool:
            return type(value) is int and 0 <= value < self.vocab_size

        has = ", ".join(SETTINGS)
        problems = [f"no setting {name!r:.60} (has: {has})" for name in settings if name not in SETTINGS]
        problems += [
            f"{name}: expected an id in 0 .. {self.vocab_size - 1}, got {settings[name]!r:.60}"
            for name in ("bos_id", "pad_id")
            if settings.get(name) is not None and not is_id(settings[name])
        ]
        eos = settings.get("eos_ids", ())
        if not isinstance(eos, list | tuple) or not all(map(is_id, eos)):
            problems.append(f"eos_ids: expected a list of ids in 0 .. {self.vocab_size - 1}, got {eos!r:.60}")
        if type(settings.get("add_bos", False)) is not bool:
            problems.append(f"add_bos: expected true or false, got {settings['add_bos']!r:.60}")
        template = settings.get("chat_template")
        if template is not None and not (isinstance(template, str) and _is_utf8(template)):
            problems.append(f"chat_template: expected a text, got {template!r:.60}")
        refuse(self.kind, problems)
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        other.__dict__.update(settings)
        other.eos_ids = tuple(other.eos_ids)
        return other

    def grow(self, names: Iterable[str]) -> None:
        """More special tokens after the last id, in place: for one that was made just now. See `extend`."""
        new = {name: self.vocab_size + i for i, name in enumerate(names)}
        self.special_tokens = {**self.special_tokens, **new}
        self.vocab_size += len(new)

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """What the saved file holds beside the header, as plain JSON values."""

    def _encode_array(self, text: str) -> np.ndarray:
        return np.array(self._encode(text), self.dtype)

    # --- text to ids

    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]:
        """The ids of a text.

        Args:
            text: any text without lone surrogates.
            allowed_special: special tokens that mean their id wherever their text stands, or "all".
            disallowed_special: special tokens that are refused unless allowed, or "all"; () refuses none.

        Raises:
            UserError: a special token that is not allowed, or text that the vocabulary cannot hold.
        """
        ids: list[int] = []
        for piece, special in self._pieces(text, allowed_special, disallowed_special):
            if special is None:
                ids += self._encode(piece)
            else:
                ids.append(special)
        return ids

    def encode_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray:
        """Like `encode`, but as an array [N] of `self.dtype`: the quick way through whole files."""
        parts = [
            self._encode_array(piece) if special is None else np.array([special], self.dtype)
            for piece, special in self._pieces(text, allowed_special, disallowed_special)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _pieces(self, text: str, allowed: Special, disallowed: Special) -> Iterator[tuple[str, int | None]]:
        """(plain text, None) and (special or added token, its id), in order."""
        allowed = self._allowed(text, allowed, disallowed)
        whole = {**{name: self.special_tokens[name] for name in allowed}, **self.added_tokens}
        start = 0
        for found in _alternatives(frozenset(whole)).finditer(text) if whole else ():
            if found.start() > start:
                yield text[start : found.start()], None
            yield found[0], whole[found[0]]
            start = found.end()
        if start < len(text):
            yield text[start:], None

    def _allowed(self, text: str, allowed: Special, disallowed: Special) -> set[str]:
        """The special tokens that mean their id; refuses a text that holds a disallowed one, or that is none."""
        if not isinstance(text, str):
            raise UserError(f"encode: expected text (str), got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"encode: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), not text; "
                'read the file as UTF-8, or use text.encode("utf-8", "replace").decode()'
            ) from None
        allowed = self._named(allowed, "allowed_special")
        refused = self._named(disallowed, "disallowed_special") - allowed
        if refused and (match := _alternatives(frozenset(refused)).search(text)):
            raise UserError(
                f"encode: the text holds the special token {match[0]} at character {match.start()}; say what it means: "
                f"allowed_special={{{match[0]!r}}} for its id, disallowed_special=() for plain text"
            )
        return allowed

    def _named(self, names: Special, where: str) -> set[str]:
        if names == "all":
            return set(self.special_tokens)
        if isinstance(names, str):
            raise UserError(f'{where}: expected a set of special tokens or "all", got {names!r}')
        if where == "allowed_special" and (unknown := set(names) - set(self.special_tokens)):
            known = ", ".join(self.special_tokens) or "none"
            raise UserError(
                f"{where}: {', '.join(sorted(unknown))} unknown to the {self.kind} tokenizer (has: {known})"
            )
        return set(names) & set(self.special_tokens)

    # --- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens give their name, bytes that are no UTF-8 give U+FFFD.

        Raises:
            UserError: an id outside 0 .. vocab_size-1.
        """
        ids = self._checked(ids)
        names = {i: name for name, i in whole_tokens(self).items()}
        cuts = np.flatnonzero(np.isin(ids, list(names))).tolist() if names else []
        text, start = "", 0
        for cut in cuts:
            text += self._decode(ids[start:cut]) + names[int(ids[cut])]
            start = cut + 1
        return text + self._decode(ids[start:])

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if ids.size == 0:
            return np.zeros(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"decode: expected one row of whole numbers, got shape {ids.shape} of {ids.dtype}")
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            raise UserError(f"decode: id {ids[at]} at place {at} is outside the vocabulary, 0 .. {self.vocab_size - 1}")
        return ids.astype(np.int64)

    # --- to a file

    def dumps(self) -> str:
        """The text of the saved file: the same tokenizer gives the same text everywhere."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
        }
        settings = {name: value for name, usual in SETTINGS.items() if (value := getattr(self, name)) != usual}
        return json.dumps(header | settings | self.data(), ensure_ascii=False, indent=0) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the tokenizer as one file: `path` itself if it ends in .json, else `path`/tokenizer.json."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.dumps())
        return path

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the saved file; two tokenizers are equal when these are."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Base) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<{self.kind} tokenizer {self.name}: {self.vocab_size} ids>"


@functools.lru_cache(maxsize=64)
def _alternatives(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))))


def refuse(kind: str, problems: list[str]) -> None:
    """Raises one UserError for all that is wrong with a tokenizer file, the first ten in full."""
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError.all([f"{kind} tokenizer: {line}" for line in problems[:10]] + more)


def string_list(value: Any, what: str, problems: list[str]) -> list[str]:
    """The value if it is a list of different non-empty strings that UTF-8 can hold; else a note in `problems`."""
    if not isinstance(value, list):
        problems.append(f"{what}: expected a list of strings, got {type(value).__name__}")
        return []
    bad = [i for i, item in enumerate(value) if not isinstance(item, str) or not item or not _is_utf8(item)]
    problems += [f"{what}[{i}]: expected a non-empty string, got {value[i]!r:.60}" for i in bad]
    if bad:
        return []
    if len(set(value)) < len(value):
        seen: set[str] = set()
        for i, item in enumerate(value):
            if item in seen:
                problems.append(f"{what}[{i}]: {item!r} stands there twice")
            seen.add(item)
        return []
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def found_in(text: str, names: Iterable[str]) -> set[str]:
    """Those of the names that stand in the text, the longest where several would fit."""
    names = frozenset(names)
    return set(_alternatives(names).findall(text)) if names else set()


def first_of(text: str, names: Iterable[str]) -> str | None:
    """The first of the names that stands in the text; None if none does."""
    names = frozenset(names)
    match = _alternatives(names).search(text) if names else None
    return match and match[0]


def read_text(path: Path) -> str:
    """The text of a tokenizer's file, UTF-8 and not too large."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {size:,} bytes, more than a tokenizer file can have ({MAX_FILE_BYTES:,})")
    data = path.read_bytes()
    if other := other_encoding(data):
        raise UserError(f"{path}: {other}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a tokenizer file (byte {error.start} is not UTF-8)") from None


def parse_json(text: str, where: str) -> Any:
    """The JSON value of a text, where no object has a key twice."""
    try:
        return loads(text)
    except DuplicateKey as error:
        raise UserError(f"{where}: {error.key:.80} stands there twice") from None
    except ValueError as error:
        raise UserError(f"{where}: not a whole JSON file ({error}); train or copy it again") from None


def begin_id(tokenizer: Tokenizer) -> int | None:
    """The token that a text begins with in training, and what an empty prompt stands for: the beginning-of-text token
    of tokenizers that write one, else the end-of-text token of the document before (GPT-2). None: there is neither."""
    return tokenizer.bos_id if tokenizer.add_bos and tokenizer.bos_id is not None else tokenizer.eot_id


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end what the model writes: its eos_ids, else the end-of-text token."""
    return list(tokenizer.eos_ids) or ([] if tokenizer.eot_id is None else [tokenizer.eot_id])


def whole_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens whose name is one id wherever it stands: special tokens and added ones."""
    return {**tokenizer.added_tokens, **tokenizer.special_tokens}
