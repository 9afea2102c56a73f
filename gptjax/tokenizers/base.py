"""What every tokenizer promises, and the parts they share.

A tokenizer turns text into ids in 0 .. vocab_size-1 and back. Special tokens (`<|endoftext|>`) are ids that no
ordinary text produces: their text inside an input is refused unless the caller says what is meant.

    tok.encode("a<|endoftext|>b")                                       UserError: says the two ways out
    tok.encode("a<|endoftext|>b", allowed_special={"<|endoftext|>"})    the special id
    tok.encode("a<|endoftext|>b", disallowed_special=())                plain text like any other
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from gptjax.types import UserError

FILE = "tokenizer.json"
VERSION = 1
END_OF_TEXT = "<|endoftext|>"

Special = Collection[str] | Literal["all"]


class Tokenizer(Protocol):
    """The promise. `tests/contracts/test_tokenizers.py` holds every kind to it."""

    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    eot_id: int | None  # put between documents; None: this kind has no special tokens
    fingerprint: str  # sha256 of its file

    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]: ...
    def encode_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def save(self, path: str | Path) -> Path: ...


class Base:
    """The shared half. A kind adds `data`, `_encode` (text without special tokens) and `_decode` (ids without them)."""

    kind: ClassVar[str]
    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    eot_id: int | None = None

    def data(self) -> dict[str, Any]:
        """What the file holds beside kind and version: plain JSON values."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int] | np.ndarray:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    # --- text to ids

    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]:
        """Ids of the text.

        Args:
            allowed_special: special tokens whose text stands for their id, or "all".
            disallowed_special: special tokens whose text is refused unless allowed, or "all"; () refuses none.

        Raises:
            UserError: a special token's text that is not allowed, a character the vocabulary cannot hold.
        """
        parts = self._parts(text, allowed_special, disallowed_special)
        return [int(i) if part is None else i for part, ids in parts for i in ids]

    def encode_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray:
        """Like `encode`, as an array [N] of `self.dtype`: the quick way for whole files."""
        parts = [np.asarray(ids, self.dtype) for _, ids in self._parts(text, allowed_special, disallowed_special)]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)
