"""Implements byte-level byte-pair encoding (BPE) with the vocabulary of GPT-2, of a loaded model or of a training text.

A regular expression splits the text into words. BPE splits each word into its bytes. Among all adjacent pairs of tokens
in a word, BPE merges the pair whose merge was learned first, and repeats this step until no adjacent pair is in the
list of merges:

    "lower"   l o w e r  ->  lo w e r  ->  low e r  ->  low er  ->  lower

A BPE tokenizer is saved as the list of its merges in the order in which the merges were learned. In the list of merges,
each byte is written as one character of GPT-2's printable alphabet; a space is `Ġ`. The first 256 ids of a BPE
tokenizer that is saved as merges are the bytes in the order of GPT-2's printable alphabet, the next ids are the tokens
that the merges make, and the last ids are the special tokens. If the ids of a loaded BPE tokenizer do not have the
order of bytes, merged tokens and special tokens, the tokenizer is saved as the list of its tokens in the order of their
ids.

The library tiktoken encodes the text without a list of merges. If a word is itself a token, tiktoken does not split the
word. If a word is not a token, tiktoken splits the word into bytes, and repeatedly merges the adjacent pair whose
concatenation is the token with the smallest id. `hf.py` states the conditions under which tiktoken and a list of merges
give the same ids.

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

# The regular expressions of tiktoken fail on a run of a million whitespace characters before a letter. Before tiktoken
# encodes a text, the text is split before the last character of each run of BLANKS or more whitespace characters.
# Splitting a run of whitespace before its last character does not change the token ids, because a word includes at most
# the last of the whitespace characters before the word, so that the text has a word boundary at the same place without
# the split. `Scheme.cut` returns False for runs of whitespace that must not be split, such as whitespace before a digit
# with the pre-tokenizer smollm.
BLANKS = 512
_BLANK_RUN = re.compile(rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{BLANKS},}}")


@functools.cache
def alphabet() -> dict[str, int]:
    """Return a dict that maps each character of GPT-2's printable alphabet to its byte, in the order of the token ids:
    {"!": 33, .., "Ġ": 32, ..}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token that is written in GPT-2's printable alphabet: `Ġthe` -> b" the"."""
    table = alphabet()
    return bytes([table[char] for char in token])


def printable(token: bytes) -> str:
    """Convert the bytes of a token to GPT-2's printable alphabet, which is the inverse of `token_bytes`: b" the" ->
    `Ġthe`."""
    return token.decode("latin-1").translate(_printable())


@functools.cache
def _printable() -> dict[int, str]:
    return {byte: char for char, byte in alphabet().items()}


def foreign(tokens: Iterable[str], what: str) -> list[str]:
    """Return one error message per token that contains a character outside GPT-2's printable alphabet."""
    known = set(alphabet())
    bad = ((i, token) for i, token in enumerate(tokens) if not known >= set(token))
    return [f"{what}[{i}]: {token!r:.60} is not in the byte alphabet" for i, token in bad]


def last_merges(ranks: Mapping[bytes, int]) -> dict[bytes, tuple[bytes, bytes]]:
    """Return a dict that maps each token to the pair (left, right) of tokens that tiktoken merges last when it builds
    the token from bytes. Tokens that tiktoken cannot build by merges are omitted.

    The pairs are sorted by the id of the merged token. Byte-pair encoding with the returned pairs as the list of merges
    gives the same ids as tiktoken, if a word that is itself a token is not split, as in tiktoken.
    """
    merges = {}
    for token in sorted(ranks, key=ranks.__getitem__):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [(ranks[pair], i) for i in range(len(pieces) - 1) if (pair := pieces[i] + pieces[i + 1]) in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        if len(pieces) == 2 and pieces[0] in ranks and pieces[1] in ranks:
            merges[token] = (pieces[0], pieces[1])
    return merges


def ranks(merges: Sequence[str]) -> dict[bytes, int]:
    """Return a dict that maps the 256 bytes and the tokens that the merges build to their ids. A merge is written as
    its two tokens, such as `Ġ t`.

    Raises:
        UserError: a merge uses a token that no earlier merge makes, or makes a token a second time; the message lists
            the first ten such merges.
    """
    ids = {char: i for i, char in enumerate(alphabet())}
    problems = []
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        token = left + right
        if left not in ids or right not in ids:
            problems.append(f"merges[{number}]: {merge!r:.60} merges tokens that no earlier line makes")
        elif token in ids:
            problems.append(f"merges[{number}]: {merge!r:.60} makes the token {token!r:.60} a second time")
        else:
            ids[token] = len(ids)
    refuse("bpe", problems)
    return {token_bytes(token): i for token, i in ids.items()}


class BPE(Base):
    """A byte-level BPE tokenizer, which is defined by its merges or by its tokens in the order of their ids."""

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
        """Build the tokenizer from either `merges` or `tokens`.

        Args:
            special: with `merges`, the names of the special tokens, whose ids follow the ids of all other tokens; with
                `tokens`, a dict from the name of each special token to its id.
            tokens: all tokens except the special and added ones, written in GPT-2's alphabet and sorted by id. They
                get all ids that are not in `special` or `added`, in ascending order.
            added: the added tokens, as a dict from names to ids; only with `tokens`.
            scheme: the pre-tokenizer, a key of `patterns.SCHEMES`.
            nfc: whether a text is normalised to Unicode NFC before it is encoded.
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
            problems.append(f"added_tokens: expected names with integer ids, got {added!r:.60}")
            added = {}
        string_list([*special, *added], "special_tokens and added_tokens", problems)
        ids = [*special.values(), *added.values()]
        size = len(tokens) + len(ids)
        if len(set(ids)) < len(ids) or not all(0 <= i < size for i in ids):
            problems.append(f"special_tokens and added_tokens: expected distinct ids in 0 .. {size - 1}")
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
        """Returns the merges in the order in which the merges were learned; a merge is written as its two tokens, such
        as `Ġ t`. If the tokenizer was built from tokens, `last_merges` derives the merges from the tokens."""
        if self._tokens is None:
            return self._merges
        return [f"{printable(left)} {printable(right)}" for left, right in last_merges(self.ranks).values()]

    def _encode(self, text: str) -> list[int]:
        return [i for chunk in self._chunks(text) for i in self._encode_chunk(chunk)]

    def _encode_array(self, text: str) -> np.ndarray:
        arrays = [
            np.array(self._encode_chunk(chunk), self.dtype)
            if self._lacks(chunk)
            else self._tiktoken.encode_to_numpy(chunk, disallowed_special=())
            for chunk in self._chunks(text)
        ]
        return np.concatenate(arrays).astype(self.dtype)

    def _encode_chunk(self, text: str) -> list[int]:
        if not self._lacks(text):
            return self._tiktoken.encode_ordinary(text)
        words = (word.encode().translate(None, self._lacking) for word in _compiled(self.scheme).findall(text))
        return [i for word in words if word for i in self._tiktoken._encode_single_piece(word)]

    def _lacks(self, text: str) -> bool:
        """Return whether the text has bytes that are not in the vocabulary. For example, SmolLM2's vocabulary has only
        235 of the 256 bytes, and SmolLM2's tokenizer drops the 21 missing bytes from a word."""
        raw = text.encode() if self._lacking else b""
        return len(raw.translate(None, self._lacking)) < len(raw)

    def _chunks(self, text: str) -> list[str]:
        """Split a text into chunks that tiktoken can encode, by splitting long runs of whitespace before their last
        character."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        blocks = (text[i : i + BLANKS // 2] for i in range(0, len(text), BLANKS // 2))
        # A run of BLANKS whitespace characters always contains at least one of the blocks of BLANKS // 2 characters
        # entirely. If no block of BLANKS // 2 characters consists only of whitespace, the text has no run of BLANKS
        # whitespace characters.
        if not any(block.isspace() for block in blocks):
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
    """Return GPT-2's tokenizer, which has 50,257 ids. GPT-2's tokenizer is built from the asset `gpt2`, so that
    tiktoken downloads nothing."""
    lines = assets.fetch("gpt2").read_text(encoding="utf-8").splitlines()
    return BPE(lines[1:], name="gpt2")  # The first line of GPT-2's file of merges is "#version: 0.2".


def train(texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = (END_OF_TEXT,)) -> BPE:
    """Learn merges until the vocabulary has `vocab_size` ids or no pair of adjacent tokens occurs twice in the
    texts."""
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
        if left + right not in made:  # If two pairs make the same token, keep the first merge.
            made.add(left + right)
            merges.append(f"{left} {right}")
    return BPE(merges, special=special)
