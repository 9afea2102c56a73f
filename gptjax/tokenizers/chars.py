"""Implements a character-level tokenizer and a byte-level tokenizer.

Tokenizers:
    chars  one id per distinct character of the training text, in the order of their code points: a small, lossless
           vocabulary, but encoding a character that is not in the training text raises an error.
    bytes  one id per byte of UTF-8, and one for <|endoftext|>: encodes any text, with up to four ids per character.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizers.base import END_OF_TEXT, Base, refuse


class Chars(Base):
    """A tokenizer with one id per character and no special tokens."""

    kind = "chars"
    name = "chars"

    def __init__(self, chars: str) -> None:
        """Build the tokenizer from `chars`, a string of the distinct characters in the order of their ids."""
        self.chars = chars
        self.vocab_size = len(chars)
        self.special_tokens = {}
        self._code_points = _code_points(chars)  # Code point of each id, [V] uint32.
        # The id of each code point, or -1 if the code point is not in the vocabulary.
        self._ids = np.full(int(self._code_points.max()) + 2, -1, np.int32)
        self._ids[self._code_points] = np.arange(self.vocab_size)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Chars:
        chars: Any = data.get("chars")
        problems = []
        if not isinstance(chars, str) or not chars:
            problems.append(f"chars: expected the characters as one string, got {chars!r:.60}")
        elif len(set(chars)) < len(chars):
            problems.append("chars: duplicate characters")
        elif any(0xD800 <= ord(c) < 0xE000 for c in chars):
            problems.append("chars: lone surrogates are not characters")
        refuse("chars", problems)
        return cls(chars)

    def data(self) -> dict[str, Any]:
        return {"chars": self.chars}

    def _encode(self, text: str) -> list[int]:
        return self._encode_array(text).tolist()

    def _encode_array(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            i = int(np.argmax(ids < 0))
            raise UserError(
                f"the chars tokenizer has no {text[i]!r} (U+{ord(text[i]):04X}, character {i} of the text): "
                f"it knows only the {self.vocab_size} characters it was trained on; leave that one out, "
                "or train a model with tokenizer.name=bytes or bpe, which know every character"
            )
        return ids.astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> str:
        return self._code_points[ids].astype("<u4").tobytes().decode("utf-32-le")


class Bytes(Base):
    """A tokenizer with one id per UTF-8 byte, 0-255, and id 256 for <|endoftext|>."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 257

    def __init__(self) -> None:
        self.special_tokens = {END_OF_TEXT: 256}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Bytes:
        return cls()

    def data(self) -> dict[str, Any]:
        return {}

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")


def train(texts: Iterable[str]) -> Chars:
    """Return a character-level tokenizer of all distinct characters in the texts, sorted by code point."""
    chars: set[str] = set()
    for text in texts:
        chars.update(text)
    if not chars:
        raise UserError("cannot train a chars tokenizer: the texts are empty")
    return Chars("".join(sorted(chars)))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
