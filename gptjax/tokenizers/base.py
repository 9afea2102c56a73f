"""Defines the interface `Tokenizer` and the base class `Base` of all tokenizers.

A tokenizer maps text to token ids in 0 .. vocab_size-1, and maps token ids back to text. Special tokens such as
`<|endoftext|>` are never produced from ordinary text: `encode` raises an error for a text that contains a special
token, unless the caller specifies how to encode the special token. The vocabulary of a loaded model may have added
tokens, which are separate tokens like special tokens, but may occur in ordinary text. If a text contains an added
token, `encode` encodes the added token as its id, and never splits the added token into other tokens.

    encode("a<|endoftext|>b")                                      raises UserError, which names these two options:
    encode("a<|endoftext|>b", allowed_special={"<|endoftext|>"})   encodes <|endoftext|> as its id
    encode("a<|endoftext|>b", disallowed_special=())               encodes <|endoftext|> as ordinary text
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
END_OF_DOCUMENT = (END_OF_TEXT, "<|end_of_text|>")  # tokens that end a document, not a turn of a chat

Special = Collection[str] | Literal["all"]

# Default values of the settings that a tokenizer has in addition to its vocabulary. A saved tokenizer file holds only
# the settings that differ from the default values.
SETTINGS = {"bos_id": None, "eos_ids": (), "pad_id": None, "add_bos": False, "chat_template": None}


class Tokenizer(Protocol):
    """The interface of every tokenizer, which `tests/contracts/test_tokenizers.py` tests."""

    kind: ClassVar[str]  # A key of `tokenizers.KINDS`.
    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: Mapping[str, int]
    bos_id: int | None  # Id of the beginning-of-sequence token, which `encode` never adds.
    eos_ids: tuple[int, ...]  # Ids of the end-of-sequence tokens, each of which ends generation.
    pad_id: int | None
    add_bos: bool  # True if the model expects bos_id before every text.
    chat_template: str | None  # Jinja template that renders a conversation as text, see chat.py.

    @property
    def eot_id(self) -> int | None: ...  # id of the token that separates documents, or None
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
    """Base class of all tokenizers.

    Every subclass implements `data`. A subclass either implements `_encode`, which encodes text without special and
    added tokens, or overrides `encode` and `encode_array`. A subclass either implements `_decode`, which decodes all
    tokens except special and added tokens, or overrides `decode`.
    """

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
        """Returns the id of the token that separates documents: the id of the first name in END_OF_DOCUMENT that is a
        special token, otherwise the first id in eos_ids, otherwise None."""
        named = [self.special_tokens[name] for name in END_OF_DOCUMENT if name in self.special_tokens]
        return next(iter([*named, *self.eos_ids]), None)

    def replace(self, **settings: Any) -> Self:
        """Return a copy of the tokenizer with changed settings: bos_id, eos_ids, pad_id, add_bos or chat_template.

        Raises:
            UserError: a setting does not exist or has an invalid value, such as an id outside the vocabulary.
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
        """Add special tokens to this tokenizer in place; the new tokens get the ids after the last id. Call `grow` only
        for a tokenizer that has just been constructed; for other tokenizers, call `tokenizers.extend`, which returns a
        new tokenizer."""
        new = {name: self.vocab_size + i for i, name in enumerate(names)}
        self.special_tokens = {**self.special_tokens, **new}
        self.vocab_size += len(new)

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """Return the content of the saved tokenizer file, without the header, as JSON values."""

    def _encode_array(self, text: str) -> np.ndarray:
        return np.array(self._encode(text), self.dtype)

    # --- text to ids

    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]:
        """Encode a text as token ids.

        Args:
            text: any text without lone surrogates.
            allowed_special: special tokens whose text is encoded as their id, or "all".
            disallowed_special: special tokens whose text raises an error, unless they are in allowed_special; or "all".
                If `disallowed_special` is empty, the text of special tokens is encoded as ordinary text.

        Raises:
            UserError: the text contains a disallowed special token, or cannot be encoded with this vocabulary.
        """
        ids: list[int] = []
        for piece, special in self._split_special(text, allowed_special, disallowed_special):
            if special is None:
                ids += self._encode(piece)
            else:
                ids.append(special)
        return ids

    def encode_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray:
        """Encode a text like `encode`, but return the ids as an array [N] of `self.dtype`, which is faster for whole
        files."""
        arrays = [
            self._encode_array(piece) if special is None else np.array([special], self.dtype)
            for piece, special in self._split_special(text, allowed_special, disallowed_special)
        ]
        return np.concatenate(arrays) if arrays else np.zeros(0, self.dtype)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Returns the dtype of arrays of token ids: uint16 if every id fits in uint16, else uint32."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _split_special(self, text: str, allowed: Special, disallowed: Special) -> Iterator[tuple[str, int | None]]:
        """Split a text into special tokens, added tokens and the ordinary text between them.

        Yields the parts of the text in order as pairs: (text, None) for ordinary text, and (name, id) for a special or
        added token.
        """
        allowed = self._allowed(text, allowed, disallowed)
        whole = {**{name: self.special_tokens[name] for name in allowed}, **self.added_tokens}
        start = 0
        for match in _alternatives(frozenset(whole)).finditer(text) if whole else ():
            if match.start() > start:
                yield text[start : match.start()], None
            yield match[0], whole[match[0]]
            start = match.end()
        if start < len(text):
            yield text[start:], None

    def _allowed(self, text: str, allowed: Special, disallowed: Special) -> set[str]:
        """Return the special tokens that `encode` maps to their ids instead of encoding them as ordinary text. Raises
        UserError if the text contains a disallowed special token."""
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
                f"encode: the text contains the special token {match[0]} at character {match.start()}; pass "
                f"allowed_special={{{match[0]!r}}} for its id, or disallowed_special=() for ordinary text"
            )
        return allowed

    def _named(self, names: Special, argument: str) -> set[str]:
        if names == "all":
            return set(self.special_tokens)
        if isinstance(names, str):
            raise UserError(f'{argument}: expected a set of special tokens or "all", got {names!r}')
        if argument == "allowed_special" and (unknown := set(names) - set(self.special_tokens)):
            known = ", ".join(self.special_tokens) or "none"
            raise UserError(
                f"{argument}: {', '.join(sorted(unknown))} unknown to the {self.kind} tokenizer (has: {known})"
            )
        return set(names) & set(self.special_tokens)

    # --- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text. Special tokens are decoded to their names, and invalid UTF-8 to U+FFFD.

        Raises:
            UserError: an id is outside 0 .. vocab_size-1.
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
            raise UserError(f"decode: expected a 1-D sequence of integers, got shape {ids.shape} of {ids.dtype}")
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            i = int(np.argmax(outside))
            raise UserError(f"decode: id {ids[i]} at index {i} is outside the vocabulary, 0 .. {self.vocab_size - 1}")
        return ids.astype(np.int64)

    # --- to a file

    def dumps(self) -> str:
        """Return the text of the saved tokenizer file. The files of equal tokenizers have the same text on every
        machine."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
        }
        settings = {name: value for name, default in SETTINGS.items() if (value := getattr(self, name)) != default}
        return json.dumps(header | settings | self.data(), ensure_ascii=False, indent=0) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the tokenizer in the file `path` if `path` ends in .json, else in the file `path`/tokenizer.json."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.dumps())
        return path

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 hash of the saved tokenizer file. Two tokenizers are equal if their fingerprints are
        equal."""
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
    """Raise one UserError that lists the first ten problems of a tokenizer file and the number of further problems."""
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError.all([f"{kind} tokenizer: {line}" for line in problems[:10]] + more)


def string_list(value: Any, what: str, problems: list[str]) -> list[str]:
    """Return `value` if `value` is a list of distinct, non-empty, valid UTF-8 strings; otherwise add error messages to
    `problems` and return []."""
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
                problems.append(f"{what}[{i}]: {item!r} is a duplicate")
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
    """Return the names in `names` that occur in the text, searching the text from left to right. If several names match
    at one position, only the longest of these names is found. An occurrence of a name that overlaps the previous name
    found is ignored."""
    names = frozenset(names)
    return set(_alternatives(names).findall(text)) if names else set()


def first_of(text: str, names: Iterable[str]) -> str | None:
    """Return the name in `names` that occurs first in the text, or None if the text contains no name."""
    return next(iter(all_of(text, names)), None)


def all_of(text: str, names: Iterable[str]) -> list[str]:
    """Return all occurrences of the names in `names` in the text, in the order of the text."""
    names = frozenset(names)
    return [match[0] for match in _alternatives(names).finditer(text)] if names else []


def read_text(path: Path) -> str:
    """Return the text of a tokenizer file, decoded as UTF-8. Raises UserError if the tokenizer file is larger than
    MAX_FILE_BYTES or not UTF-8."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {size:,} bytes, but a tokenizer file may have at most {MAX_FILE_BYTES:,}")
    data = path.read_bytes()
    if other := other_encoding(data):
        raise UserError(f"{path}: {other}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a tokenizer file (byte {error.start} is not UTF-8)") from None


def parse_json(text: str, location: str) -> Any:
    """Parse a JSON text. Raises UserError if the text is not valid JSON or has duplicate keys."""
    try:
        return loads(text)
    except DuplicateKey as error:
        raise UserError(f"{location}: duplicate key {error.key:.80}") from None
    except ValueError as error:
        raise UserError(f"{location}: not valid JSON ({error}); train or copy the tokenizer again") from None


def begin_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the begin token, which starts a document in training and replaces an empty prompt in generation.

    The begin token is bos_id if add_bos is true and bos_id is not None. If add_bos is false or bos_id is None, the
    begin token is eot_id, which may be None: as in GPT-2's training data, the token that ends a document also precedes
    the next document.
    """
    return tokenizer.bos_id if tokenizer.add_bos and tokenizer.bos_id is not None else tokenizer.eot_id


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens that end generation: eos_ids, or [eot_id] if eos_ids is empty."""
    return list(tokenizer.eos_ids) or ([] if tokenizer.eot_id is None else [tokenizer.eot_id])


def whole_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return a dict that maps the names of all special tokens and added tokens to their ids."""
    return {**tokenizer.added_tokens, **tokenizer.special_tokens}
