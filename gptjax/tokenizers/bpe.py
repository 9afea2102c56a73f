"""Byte-level byte-pair encoding: GPT-2's vocabulary, that of a loaded model, or one learned from any text.

The text is cut into words by a regular expression; a word starts as its bytes, and the pair of neighbours that was
learned first is joined again and again until no neighbours are a known pair:

    "lower"   l o w e r  ->  lo w e r  ->  low e r  ->  low er  ->  lower

A vocabulary is the list of merges in the order they were learned. Bytes are written in GPT-2's printable alphabet
(a space is `Ġ`), ids are: the 256 bytes in the order of that alphabet, one a merge, the special tokens. A model that
is loaded may order them otherwise, so there the tokens themselves are kept, in the order of their ids.

tiktoken runs all of them. It knows tokens, not merges: it joins any two neighbours that make a token, lowest id first,
and a word that is a token is not cut at all. `hf.py` says when that is the same as following a list of merges.

Source: Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from gptjax import assets
from gptjax.errors import UserError
from gptjax.tokenizers.base import END_OF_TEXT, Base, refuse, string_list
from gptjax.tokenizers.patterns import SCHEMES

PATTERN = SCHEMES["gpt2"].pattern
MAX_VOCAB = 1 << 24

# tiktoken's regular expressions give up on a million blanks before a letter. The same ids come out when the text is
# cut before the last blank, because a word takes at most that one with it.
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


def printable(token: bytes) -> str:
    """`token_bytes` the other way: b" the" -> `Ġthe`."""
    return token.decode("latin-1").translate(_printable())


@functools.cache
def _printable() -> dict[int, str]:
    return {byte: char for char, byte in alphabet().items()}


def foreign(tokens: Iterable[str], what: str) -> list[str]:
    """One line for each token that is not written in GPT-2's alphabet."""
    known = set(alphabet())
    bad = ((i, token) for i, token in enumerate(tokens) if not known >= set(token))
    return [f"{what}[{i}]: {token!r:.60} is not in the byte alphabet" for i, token in bad]


def last_merges(ranks: Mapping[bytes, int]) -> dict[bytes, tuple[bytes, bytes]]:
    """The two parts that tiktoken's rule joins last to make each token; a token that it cannot make is left out.

    A list of exactly these merges, in the order of the ids, gives the ids that tiktoken gives.
    """
    made = {}
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [(ranks[pair], i) for i in range(len(parts) - 1) if (pair := parts[i] + parts[i + 1]) in ranks]
            if not joined:
                break
            _, at = min(joined)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and parts[0] in ranks and parts[1] in ranks:
            made[token] = (parts[0], parts[1])
    return made


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
    """Merges, or tokens in the order of their ids, and special tokens."""

    kind = "bpe"

    def __init__(
        self,
        merges: Sequence[str] = (),
        *,
        name: str = "bpe",
        special: Sequence[str] | Mapping[str, int] = (END_OF_TEXT,),
        tokens: Sequence[str] | None = None,
        added: Mapping[str, int] = MappingProxyType({}),
        scheme: str = "gpt2",
        nfc: bool = False,
    ) -> None:
        """Of `merges`, or of `tokens`.

        Args:
            special: names whose ids follow the merges; with `tokens` their ids too.
            tokens: in GPT-2's alphabet; they fill the ids that `special` and `added` leave free.
            scheme: how text is cut into words, a key of `patterns.SCHEMES`.
            nfc: text is brought to Unicode's composed form first.
        """
        import tiktoken

        self.name, self.scheme, self.nfc = name, scheme, nfc
        if tokens is None:
            self.ranks = ranks(merges)
            self.special_tokens = {token: len(self.ranks) + i for i, token in enumerate(special)}
        else:
            assert isinstance(special, Mapping)
            taken = {*special.values(), *added.values()}
            free = (i for i in range(len(tokens) + len(taken)) if i not in taken)
            self.ranks = {token_bytes(token): i for token, i in zip(tokens, free, strict=True)}
            self.special_tokens = dict(special)
            self.added_tokens = MappingProxyType(dict(added))
        self._tokens = None if tokens is None else list(tokens)
        self.vocab_size = len(self.ranks) + len(self.special_tokens) + len(self.added_tokens)
        self._merges = list(merges)
        self._lacking = bytes(byte for byte in range(256) if bytes([byte]) not in self.ranks)
        self._tiktoken = tiktoken.Encoding(
            name, pat_str=SCHEMES[scheme].pattern, mergeable_ranks=self.ranks, special_tokens={}
        )

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> BPE:
        problems: list[str] = []
        scheme: Any = "gpt2" if data.get("pattern") == PATTERN else data.get("pattern")
        if scheme not in list(SCHEMES):
            problems.append(f"pattern: expected GPT-2's or one of {', '.join(SCHEMES)}, got {scheme!r:.60}")
        if "tokens" not in data:
            merges = string_list(data.get("merges"), "merges", problems)
            refuse("bpe", problems)
            return cls(merges, name=data["name"], special=list(data["special_tokens"]), scheme=scheme)
        tokens = string_list(data["tokens"], "tokens", problems)
        problems += foreign(tokens, "tokens")
        special, added = data["special_tokens"], data.get("added_tokens", {})
        if not isinstance(added, dict) or not all(type(i) is int for i in added.values()):
            problems.append(f"added_tokens: expected names with whole numbers, got {added!r:.60}")
            added = {}
        string_list([*special, *added], "special_tokens and added_tokens", problems)
        ids = [*special.values(), *added.values()]
        size = len(tokens) + len(ids)
        if len(set(ids)) < len(ids) or not all(0 <= i < size for i in ids):
            problems.append(f"special_tokens and added_tokens: expected different ids in 0 .. {size - 1}")
        if type(data.get("nfc", False)) is not bool:
            problems.append(f"nfc: expected true or false, got {data['nfc']!r:.60}")
        refuse("bpe", problems)
        nfc = data.get("nfc", False)
        return cls(name=data["name"], tokens=tokens, special=special, added=added, scheme=scheme, nfc=nfc)

    def data(self) -> dict[str, Any]:
        pattern = PATTERN if self.scheme == "gpt2" else self.scheme
        if self._tokens is None:
            return {"pattern": pattern, "merges": self._merges}
        more: dict[str, Any] = {"added_tokens": dict(self.added_tokens)} if self.added_tokens else {}
        more |= {"nfc": True} if self.nfc else {}
        return {"pattern": pattern, **more, "tokens": self._tokens}

    @functools.cached_property
    def merges(self) -> list[str]:
        """The merges as `Ġ t`, in order. Derived if it was made of tokens; one that no merge makes has none."""
        if self._tokens is None:
            return self._merges
        return [f"{printable(left)} {printable(right)}" for left, right in last_merges(self.ranks).values()]

    def _encode(self, text: str) -> list[int]:
        return [i for part in self._parts(text) for i in self._encode_part(part)]

    def _encode_array(self, text: str) -> np.ndarray:
        parts = [
            np.array(self._encode_part(part), self.dtype)
            if self._lacks(part)
            else self._tiktoken.encode_to_numpy(part, disallowed_special=())
            for part in self._parts(text)
        ]
        return np.concatenate(parts).astype(self.dtype)

    def _encode_part(self, text: str) -> list[int]:
        if not self._lacks(text):
            return self._tiktoken.encode_ordinary(text)
        words = (word.encode().translate(None, self._lacking) for word in _compiled(self.scheme).findall(text))
        return [i for word in words if word for i in self._tiktoken._encode_single_piece(word)]

    def _lacks(self, text: str) -> bool:
        """Does it hold bytes that are no token? SmolLM2 has 235 of the 256: it drops the others from a word."""
        raw = text.encode() if self._lacking else b""
        return len(raw.translate(None, self._lacking)) < len(raw)

    def _parts(self, text: str) -> list[str]:
        """The text in parts that tiktoken can take: long runs of blanks are cut before their last one."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        blocks = (text[i : i + BLANKS // 2] for i in range(0, len(text), BLANKS // 2))
        if not any(block.isspace() for block in blocks):  # quick: a long run fills one block at least
            return [text]
        cut = SCHEMES[self.scheme].cut
        runs = (run.end() for run in _BLANK_RUN.finditer(text))
        cuts = [0, *(end - 1 for end in runs if end < len(text) and cut(text[end - 1], text[end])), len(text)]
        return [text[start:end] for start, end in itertools.pairwise(cuts)]

    def _decode(self, ids: np.ndarray) -> str:
        return self._tiktoken.decode(ids.tolist(), errors="replace")


@functools.cache
def _compiled(scheme: str) -> Any:
    import regex

    return regex.compile(SCHEMES[scheme].pattern)


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
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right not in made:  # the same token can be learned from two pairs; its first line stands
            made.add(left + right)
            merges.append(f"{left} {right}")
    return BPE(merges, special=special)
