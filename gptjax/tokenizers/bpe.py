"""Byte-level byte-pair encoding: GPT-2's vocabulary, or one learned from any text. tiktoken runs both.

The text is cut into words by a regular expression; a word starts as its bytes, and the pair of neighbours that was
learned first is joined again and again until no neighbours are a known pair:

    "lower"   l o w e r  ->  lo w e r  ->  low e r  ->  low er  ->  lower

A vocabulary is the list of merges in the order they were learned. Bytes are written in GPT-2's printable alphabet
(a space is `Ġ`), ids are: the 256 bytes in the order of that alphabet, one a merge, the special tokens.

Source: Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax import assets
from gptjax.tokenizers.base import END_OF_TEXT, Base, refuse, string_list
from gptjax.types import UserError

# GPT-2's words: contractions, letters, digits, the rest (each with the space before it), white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MAX_VOCAB = 1 << 24

# tiktoken's regular expressions give up on a million blanks before a letter. The same ids come out when the text is
# cut before the last blank, because a word takes exactly that one with it.
BLANKS = 512
_BLANK_RUN = re.compile(rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{BLANKS},}}")


@functools.cache
def alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, in the order of the ids: `!` -> 33 ... `Ġ` -> 32 ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_bytes(token: str) -> bytes:
    """The bytes behind a token in the printable alphabet: `Ġthe` -> b" the"."""
    table = alphabet()
    return bytes([table[char] for char in token])


def ranks(merges: Sequence[str]) -> dict[bytes, int]:
    """The id of every token, from merges written as `Ġ t`.

    Raises:
        UserError: a merge of unknown parts, or of a token that exists; all such lines.
    """
    ids = {char: i for i, char in enumerate(alphabet())}
    problems = []
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        token = left + right
        if left not in ids or right not in ids:
            problems.append(f"merges[{number}]: {merge!r:.60} joins parts that no earlier line made")
        elif token in ids:
            problems.append(f"merges[{number}]: {merge!r:.60} makes the token {token!r:.60} a second time")
        else:
            ids[token] = len(ids)
    refuse("bpe", problems)
    return {token_bytes(token): i for token, i in ids.items()}


class BPE(Base):
    """Merges and special tokens; the ids of the special tokens follow those of the merges."""

    kind = "bpe"

    def __init__(self, merges: Sequence[str], *, name: str = "bpe", special: Sequence[str] = (END_OF_TEXT,)) -> None:
        import tiktoken

        self.name = name
        self.merges = list(merges)
        self.ranks = ranks(self.merges)
        self.special_tokens = {token: len(self.ranks) + i for i, token in enumerate(special)}
        self.vocab_size = len(self.ranks) + len(self.special_tokens)
        self.eot_id = self.special_tokens.get(END_OF_TEXT)
        self._tiktoken = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={})

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> BPE:
        problems: list[str] = []
        merges = string_list(data.get("merges"), "merges", problems)
        if data.get("pattern") != PATTERN:
            problems.append(f"pattern: only GPT-2's is supported, got {data.get('pattern')!r:.60}")
        refuse("bpe", problems)
        return cls(merges, name=data["name"], special=list(data["special_tokens"]))

    def data(self) -> dict[str, Any]:
        return {"pattern": PATTERN, "merges": self.merges}

    def _encode(self, text: str) -> list[int]:
        return [i for part in _parts(text) for i in self._tiktoken.encode_ordinary(part)]

    def _encode_array(self, text: str) -> np.ndarray:
        parts = [self._tiktoken.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        return np.concatenate(parts).astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> str:
        return self._tiktoken.decode(ids.tolist(), errors="replace")


def _parts(text: str) -> list[str]:
    """The text in parts that tiktoken can take: cut before the last blank of each long run of blanks."""
    blocks = (text[i : i + BLANKS // 2] for i in range(0, len(text), BLANKS // 2))
    if not any(block.isspace() for block in blocks):  # quick: a long run fills one block at least
        return [text]
    cuts = [0, *(run.end() - 1 for run in _BLANK_RUN.finditer(text) if run.end() < len(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


@functools.cache
def gpt2() -> BPE:
    """GPT-2's vocabulary, 50,257 ids: asset `gpt2`, read without any other network access."""
    lines = assets.fetch("gpt2").read_text(encoding="utf-8").splitlines()
    return BPE(lines[1:], name="gpt2")  # the first line is "#version: 0.2"


def train(texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = (END_OF_TEXT,)) -> BPE:
    """Learns merges until the vocabulary has `vocab_size` ids, or the text has no pair left that occurs twice."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    least = 256 + len(special)
    if not least <= vocab_size <= MAX_VOCAB:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: bpe needs {least} or more (256 bytes, {len(special)} special)"
        )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=list(alphabet()), min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    made, merges = set(alphabet()), []
    for left, right in _merges_of(learner):
        if left + right not in made:  # the same token can be learned from two pairs; its first line stands
            made.add(left + right)
            merges.append(f"{left} {right}")
    return BPE(merges, special=special)


def _merges_of(learner: Any) -> list[tuple[str, str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
