"""Implements WordPiece and Unigram subword tokenizers. The library `tokenizers` trains the vocabulary, and this module
encodes and decodes texts.

    WordPiece  greedy longest match: the next piece is the longest piece that is a prefix of the rest of the word.
               A piece that does not begin a word is written with `##`:   "lower" -> low ##er
    Unigram    every piece has a probability, and a word is split in the most probable way (Viterbi algorithm):
                                                           "lower" -> lo wer   if log p(lo) + log p(wer) is the largest

The WordPiece and Unigram tokenizers work on bytes in GPT-2's printable alphabet (`bpe.alphabet`). Every single byte is
a piece of both vocabularies, WordPiece and Unigram, so that every text can be encoded and decoding is exact. In
contrast to the tokenizers in this module, the tokenizers of BERT (WordPiece) and T5 (Unigram) drop whitespace and have
an unknown token. A word has at most 64 characters plus the space before the word, so that encoding takes linear time
even for a text without spaces.

Source: Schuster and Nakajima 2012 (WordPiece); Kudo 2018, arXiv:1804.10959 (Unigram).
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizers.base import END_OF_TEXT, Base, refuse, string_list
from gptjax.tokenizers.bpe import MAX_VOCAB, alphabet, printable, token_bytes
from gptjax.tokenizers.patterns import SUBWORDS

INSIDE = "##"
MAX_PIECE = 16  # maximum number of bytes in a piece that Unigram training may create
CACHE_WORDS = 1 << 18
# Maximum number of bytes of a piece in a tokenizer file: a word has up to 65 characters of up to 4 bytes each.
LONGEST_PIECE = 260


class _Pieces(Base):
    """Base class of the WordPiece and Unigram tokenizers. Encoding splits each word into pieces with `_cut` and caches
    the pieces; decoding joins the bytes of the pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.name = self.kind
        self.vocab_size = len(pieces) + 1
        self.special_tokens = {END_OF_TEXT: len(pieces)}
        self._bytes = list(pieces)
        self._longest = max(map(len, pieces))
        self._cache: dict[str, list[int]] = {}

    @abstractmethod
    def _cut(self, word: bytes) -> list[int]:
        """Split one word into pieces and return the ids of the pieces."""

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        cache = self._cache
        for word in SUBWORDS.findall(text):
            word_ids = cache.get(word)
            if word_ids is None:
                if len(cache) >= CACHE_WORDS:
                    cache.clear()
                word_ids = cache[word] = self._cut(word.encode())
            ids += word_ids
        return ids

    def _decode(self, ids: np.ndarray) -> str:
        return b"".join([self._bytes[i] for i in ids]).decode(errors="replace")


class WordPiece(_Pieces):
    """A WordPiece tokenizer. The list `vocab` holds the pieces in the order of their ids; a piece that does not begin a
    word is written with `##`."""

    kind = "wordpiece"

    def __init__(self, vocab: Sequence[str]) -> None:
        self.vocab = list(vocab)
        super().__init__(
            [token_bytes(piece.removeprefix(INSIDE) if _is_inside(piece) else piece) for piece in self.vocab]
        )
        self._first: dict[bytes, int] = {}
        self._inside: dict[bytes, int] = {}
        for i, piece in enumerate(self.vocab):
            (self._inside if _is_inside(piece) else self._first)[self._bytes[i]] = i

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> WordPiece:
        problems: list[str] = []
        vocab = string_list(data.get("vocab"), "vocab", problems)
        problems += _foreign(vocab, "vocab") if vocab else []
        if not problems:
            problems += _lacking(vocab, [*alphabet(), *(INSIDE + char for char in alphabet())])
        refuse("wordpiece", problems)
        return cls(vocab)

    def data(self) -> dict[str, Any]:
        return {"vocab": self.vocab}

    def _cut(self, word: bytes) -> list[int]:
        ids, start, table = [], 0, self._first
        while start < len(word):
            end = min(len(word), start + self._longest)
            while (piece := table.get(word[start:end])) is None:
                end -= 1
            ids.append(piece)
            start, table = end, self._inside
        return ids


class Unigram(_Pieces):
    """A Unigram tokenizer. The list `pieces` holds the pieces in the order of their ids, and the list `scores` holds
    the log probabilities of the pieces."""

    kind = "unigram"

    def __init__(self, pieces: Sequence[str], scores: Sequence[float]) -> None:
        self.pieces, self.scores = list(pieces), list(scores)
        super().__init__([token_bytes(piece) for piece in self.pieces])
        # The table maps each piece to (log probability, id). To let `_cut` stop as soon as no piece begins with the
        # bytes read so far, the table holds the prefixes of all pieces as well.
        self._table: dict[bytes, tuple[float, int]] = {}
        for piece in self._bytes:
            self._table |= {piece[:end]: (-math.inf, -1) for end in range(1, len(piece))}
        self._table |= {piece: (self.scores[i], i) for i, piece in enumerate(self._bytes)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Unigram:
        problems: list[str] = []
        pieces = string_list(data.get("pieces"), "pieces", problems)
        scores: Any = data.get("scores")
        problems += _foreign(pieces, "pieces") if pieces else []
        if not problems:
            problems += _lacking(pieces, list(alphabet()))
        if (
            not isinstance(scores, list)
            or len(scores) != len(pieces)
            or not all(type(score) in (int, float) and -1e6 < score <= 0 for score in scores)
        ):
            problems.append(f"scores: expected {len(pieces)} finite log probabilities, one per piece")
        refuse("unigram", problems)
        return cls(pieces, scores)

    def data(self) -> dict[str, Any]:
        return {"pieces": self.pieces, "scores": self.scores}

    def _cut(self, word: bytes) -> list[int]:
        # best[end] is the log probability of the best segmentation of word[:end], and last[end] is the pair (start, id)
        # of the last piece in this segmentation.
        best = [0.0] + [-math.inf] * len(word)
        last = [(0, 0)] * (len(word) + 1)
        for start in range(len(word)):
            for end in range(start + 1, len(word) + 1):
                piece = self._table.get(word[start:end])
                if piece is None:
                    break
                score = best[start] + piece[0]
                if score > best[end]:
                    best[end], last[end] = score, (start, piece[1])
        ids, end = [], len(word)
        while end:
            end, piece_id = last[end]
            ids.append(piece_id)
        return ids[::-1]


def train(kind: str, texts: Iterable[str], vocab_size: int) -> WordPiece | Unigram:
    """Train a WordPiece or Unigram vocabulary of at most `vocab_size` ids; a small text may give fewer ids."""
    least = {"wordpiece": 513, "unigram": 257}[kind]
    if not least <= vocab_size <= MAX_VOCAB:
        raise UserError(f"tokenizer.vocab_size={vocab_size}: {kind} needs {least} or more (every byte is a piece)")
    words = (printable(word.encode()) for text in texts for word in SUBWORDS.findall(text))
    return (_train_wordpiece if kind == "wordpiece" else _train_unigram)(words, vocab_size - 1)


def _train_wordpiece(words: Iterable[str], size: int) -> WordPiece:
    from tokenizers import Tokenizer, models, trainers

    # The single bytes are passed as special tokens, so that the ids of the bytes have the order of the list `single`.
    # The order that the trainer would choose differs between runs, and decides which of two equally frequent pairs is
    # merged first.
    single = [*alphabet(), *(INSIDE + char for char in alphabet())]
    learner = Tokenizer(models.WordPiece())
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=single, continuing_subword_prefix=INSIDE, min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    vocab = json.loads(learner.to_str())["model"]["vocab"]
    return WordPiece(sorted(vocab, key=vocab.get))


def _train_unigram(words: Iterable[str], size: int) -> Unigram:
    from tokenizers import Tokenizer, models, trainers

    learner = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=size, initial_alphabet=list(alphabet()), max_piece_length=MAX_PIECE, show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    scores = {piece: round(score, 6) for piece, score in json.loads(learner.to_str())["model"]["vocab"]}
    # The trainer gives rarely used single-byte pieces scores that differ between runs, so all rarely used single-byte
    # pieces get the same score.
    floor = min((score for piece, score in scores.items() if len(piece) > 1), default=-10.0) - 1
    scores = {piece: floor if len(piece) == 1 and score < floor + 1 else score for piece, score in scores.items()}
    scores |= {char: floor for char in alphabet() if char not in scores}
    ranked = sorted(scores, key=lambda piece: (-scores[piece], piece))
    return Unigram(ranked, [scores[piece] for piece in ranked])


def _is_inside(piece: str) -> bool:
    return piece.startswith(INSIDE) and len(piece) > len(INSIDE)


def _foreign(pieces: list[str], what: str) -> list[str]:
    known = set(alphabet())
    bad = [i for i, piece in enumerate(pieces) if len(piece) > LONGEST_PIECE or not known >= set(piece)]
    return [f"{what}[{i}]: {pieces[i]!r:.60} is longer than {LONGEST_PIECE} or not in the byte alphabet" for i in bad]


def _lacking(pieces: list[str], needed: list[str]) -> list[str]:
    lacking = sorted(set(needed) - set(pieces))
    return [f"{len(lacking)} of the single bytes are missing, first {lacking[0]!r}"] if lacking else []
