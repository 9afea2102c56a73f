"""Implements the word-level tokenizer of the book "Build a Large Language Model (From Scratch)", in which a regular
expression splits a text into words and punctuation marks.

    "Hello, do you like tea?"  ->  Hello | , | do | you | like | tea | ?

The word-level tokenizer does not keep whitespace: decoding joins the words with one space, but puts no space before
closing punctuation. Without special tokens, the word-level tokenizer equals SimpleTokenizerV1 of the book, which raises
an error for an unknown word. With the special tokens `<|endoftext|>` and `<|unk|>`, the word-level tokenizer equals
SimpleTokenizerV2 of the book. By default, the special tokens of the word-level tokenizer are [BOS], [EOS], [PAD] and
[UNK].

Source: Sebastian Raschka, "Build a Large Language Model (From Scratch)", chapter 2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizers.base import Base, refuse, string_list

SPECIAL = ("[BOS]", "[EOS]", "[PAD]", "[UNK]")
BOOK_SPECIAL = ("<|endoftext|>", "<|unk|>")

_SPLIT = re.compile(r"""([,.:;?_!"()']|--|\s)""")
_SPACE_BEFORE = re.compile(r"""\s+([,.?!"()'])""")


def split(text: str) -> list[str]:
    """Split a text into words and punctuation marks, without whitespace."""
    return [piece.strip() for piece in _SPLIT.split(text) if piece.strip()]


class Words(Base):
    """A word-level tokenizer. The n words have the ids 0 .. n-1, and the special tokens have ids from n upwards."""

    kind = "words"
    name = "words"

    def __init__(self, words: Sequence[str], special: Sequence[str] = SPECIAL) -> None:
        self.words = list(words)
        self.special_tokens = {token: len(self.words) + i for i, token in enumerate(special)}
        self.vocab_size = len(self.words) + len(self.special_tokens)
        self.unk_id = self._first("<|unk|>", "[UNK]")
        self._ids = {word: i for i, word in enumerate(self.words)}
        self._texts = np.array([*self.words, *special], dtype=object)

    @property
    def eot_id(self) -> int | None:
        return self._first("<|endoftext|>", "[EOS]")

    def _first(self, *names: str) -> int | None:
        return next((self.special_tokens[name] for name in names if name in self.special_tokens), None)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Words:
        problems: list[str] = []
        words = string_list(data.get("words"), "words", problems)
        problems += [
            f"words[{i}]: {word!r:.60} is not one word" for i, word in enumerate(words) if split(word) != [word]
        ]
        both = sorted(set(words) & set(data["special_tokens"]))
        problems += [f"words: {word!r} is a special token too" for word in both]
        refuse("words", problems)
        return cls(words, list(data["special_tokens"]))

    def data(self) -> dict[str, Any]:
        return {"words": self.words}

    def _encode(self, text: str) -> list[int]:
        words = split(text)
        if self.unk_id is not None:
            return [self._ids.get(word, self.unk_id) for word in words]
        try:
            return [self._ids[word] for word in words]
        except KeyError as error:
            raise UserError(
                f"the words tokenizer has no {error.args[0]!r:.60} and no token for unknown words: "
                "train it with special tokens, or use tokenizer.name=bpe"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Join the words and special tokens with one space, but with no space before closing punctuation."""
        return _SPACE_BEFORE.sub(r"\1", " ".join(self._texts[self._checked(ids)]))


def train(texts: Iterable[str], vocab_size: int | None = None, *, special: Sequence[str] = SPECIAL) -> Words:
    """Return a word-level tokenizer with the distinct words of the texts in sorted order. If `vocab_size` is too small
    for all words, only the most frequent words are kept."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
    for name in special:
        counts.pop(name, None)
    if not counts:
        raise UserError("cannot train a words tokenizer: the texts contain no words")
    words = sorted(counts)
    if vocab_size is not None:
        max_words = vocab_size - len(special)
        if max_words < 1:
            raise UserError(f"tokenizer.vocab_size={vocab_size}: words needs {len(special) + 1} or more")
        words = sorted(sorted(words, key=lambda word: -counts[word])[:max_words])
    return Words(words, special)
