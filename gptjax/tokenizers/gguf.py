"""Imports and exports the tokenizer of a GGUF file, which is stored under the keys `tokenizer.*` of the metadata.

    tok = from_metadata(gguf.read("model.gguf").metadata)
    gguf.write(path, {**model_metadata, **to_metadata(tok)}, tensors)

Two tokenizer models of llama.cpp are supported. The tokenizer model `gpt2` is byte-level BPE: the metadata hold the
tokens in GPT-2's alphabet, a list of merges, and the name of a pre-tokenizer (`pre`). The tokenizer model `llama` is
SentencePiece BPE without a list of merges. Among all adjacent pairs that make a token, the tokenizer model `llama`
first merges the pair whose token has the highest score. A `llama` vocabulary writes a space as `▁`, and writes a
character that is not in the vocabulary as tokens for the bytes of the character, such as `<0xE2>`.

Source: docs/gguf.md of ggml; src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizers import hf
from gptjax.tokenizers.base import Base, Tokenizer, refuse, stop_ids, string_list, whole_tokens
from gptjax.tokenizers.bpe import BPE, alphabet, foreign, printable, token_bytes
from gptjax.tokenizers.chars import Chars

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
SPECIAL = (UNKNOWN, CONTROL, UNUSED)
BLANK = "▁"
# MAX_TOKEN limits the number of characters in one token, and MAX_TEXT limits the number of characters in all tokens
# together. MAX_TEXT is twice the size of a large vocabulary: 262,144 tokens of 8 characters are 2 million characters.
MAX_TOKEN, MAX_TEXT = 512, 4 << 20
MAX_PAIRS = 1 << 20  # Largest number of pairs of tokens that make a token; Gemma has 0.6 million.
# In llama.cpp, the special tokens in END_OF_TURN end generation even if the metadata do not list the tokens.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


class Pre(NamedTuple):
    """The equivalent in gptjax of a llama.cpp pre-tokenizer. `scheme` is a key of `patterns.SCHEMES`, and the other two
    fields are settings that a GGUF file does not store."""

    scheme: str
    nfc: bool = False  # True if the original tokenizer, unlike llama.cpp, normalises texts to Unicode NFC.
    ignore_merges: bool = False


PRE = {
    "gpt-2": Pre("gpt2"),
    "default": Pre("gpt2"),
    "olmo": Pre("gpt2", nfc=True),
    "smollm": Pre("smollm"),
    "llama-bpe": Pre("llama3", ignore_merges=True),
    "llama3": Pre("llama3", ignore_merges=True),
    "llama-v3": Pre("llama3", ignore_merges=True),
    "dbrx": Pre("llama3"),
    "qwen2": Pre("qwen2", nfc=True),
}


# --- in


def from_metadata(metadata: Mapping[str, Any]) -> Base:
    """Return the tokenizer that the metadata of a GGUF file describe.

    Raises:
        UserError: entries of the metadata are invalid, or the tokenizer model or the pre-tokenizer is not supported.
    """
    kinds: dict[str, type] = {"model": str, "pre": str, "add_bos_token": bool, "add_space_prefix": bool}
    kinds |= {f"{role}_token_id": int for role in ("bos", "eos", "eot", "padding")}
    kinds = {f"tokenizer.ggml.{key}": kind for key, kind in kinds.items()} | {"tokenizer.chat_template": str}
    problems = [
        f"{key}: expected {kind.__name__}, got {metadata[key]!r:.60}"
        for key, kind in kinds.items()
        if key in metadata and type(metadata[key]) is not kind
    ]
    refuse("gguf", problems)
    metadata = _without_padding(metadata)
    tokens, types = _tokens(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"tokenizer.ggml.model: expected gpt2 or llama, got {kind!r:.60}")
    tokenizer: Base | None = _chars(tokens, types) if kind == "gpt2" else None
    if tokenizer is None:
        data = _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens, types)
        added = [i for i in range(len(tokens)) if types[i] in (*SPECIAL, USER_DEFINED)]
        data["added_tokens"] = [hf.added_token(tokens[i], i, types[i] in SPECIAL) for i in added]
        tokenizer = hf.from_data(data)
    default_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _ADD_BOS
    turn = [tokenizer.special_tokens[name] for name in END_OF_TURN if name in tokenizer.special_tokens]
    bos, *eos, pad = (metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding"))
    return tokenizer.replace(
        bos_id=bos,
        eos_ids=tuple(i for i in dict.fromkeys([*eos, *turn]) if i is not None),
        pad_id=pad,
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", default_bos) and bos is not None,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


# For the pre-tokenizers in _ADD_BOS, add_bos is true if the metadata have no key tokenizer.ggml.add_bos_token.
_ADD_BOS = [name for name, pre in PRE.items() if pre.ignore_merges]


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    problems: list[str] = []
    tokens = string_list(metadata.get("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens", problems)
    if not tokens and not problems:
        problems.append("tokenizer.ggml.tokens: the vocabulary is empty")
    types = _per_token(metadata, "token_type", "iu", len(tokens), problems)
    sizes = [len(token) for token in tokens]
    if max(sizes, default=0) > MAX_TOKEN or sum(sizes) > MAX_TEXT:
        problems.append(
            f"tokenizer.ggml.tokens: {max(sizes)} characters in one token and {sum(sizes)} in total, at most "
            f"{MAX_TOKEN} and {MAX_TEXT} are supported"
        )
    refuse("gguf", problems)
    return tokens, [NORMAL] * len(tokens) if types is None else types


_PADDING = "[PAD{i}]"  # llama.cpp's name for padding rows of the embedding matrix
_PER_TOKEN = ("tokens", "token_type", "scores")


def _without_padding(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata without padding tokens, which are unused tokens named [PAD{id}] at the end of the
    vocabulary."""
    lists: list[Any] = [metadata.get(f"tokenizer.ggml.{key}") for key in _PER_TOKEN]
    tokens, types, _ = lists
    flat = all(isinstance(items, list) or (isinstance(items, np.ndarray) and items.ndim == 1) for items in lists[:2])
    n = len(tokens) if flat else 0
    if not flat or any(np.shape(items)[:1] != (n,) for items in lists[1:] if items is not None):
        # One of the lists in the GGUF metadata has the wrong type or length, which `_tokens` and `_per_token` will
        # report as an error.
        return dict(metadata)
    while n and tokens[n - 1] == _PADDING.format(i=n - 1) and types[n - 1] == UNUSED:
        n -= 1
    entries = zip(_PER_TOKEN, lists, strict=True)
    shortened = {f"tokenizer.ggml.{key}": items[:n] for key, items in entries if items is not None}
    return {**metadata, **shortened}


def padded(metadata: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the metadata with unused tokens appended, so that the vocabulary has one token per row of the embedding
    matrix.

    The number of tokens must equal the number of rows of the embedding matrix in llama.cpp. The argument `metadata` is
    the result of `to_metadata`.

    Raises:
        UserError: the vocabulary has a token with the name of a padding token.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    more = [_PADDING.format(i=i) for i in range(len(tokens), rows)]
    if twice := sorted(set(more) & set(tokens))[:3]:
        raise UserError(f"{twice} are tokens already: the padding rows of the embedding need these names")
    types = np.append(metadata["tokenizer.ggml.token_type"], np.full(len(more), UNUSED, np.int32))
    out = {**metadata, "tokenizer.ggml.tokens": [*tokens, *more], "tokenizer.ggml.token_type": types}
    if (scores := metadata.get("tokenizer.ggml.scores")) is not None:
        lowest = np.full(len(more), scores.min() - 1, np.float32)
        out["tokenizer.ggml.scores"] = np.append(scores, lowest)
    return out


def _per_token(metadata: Mapping[str, Any], key: str, kinds: str, n: int, problems: list[str]) -> list[Any] | None:
    """Return the list tokenizer.ggml.`key`, which has one number per token, or None if the list is missing or invalid.
    If the list tokenizer.ggml.`key` is invalid, an error message is added to `problems`."""
    key = f"tokenizer.ggml.{key}"
    if key not in metadata:
        return None
    try:
        values = np.asarray(metadata[key])
    except ValueError:
        values = np.array("ragged")
    if values.shape != (n,) or values.dtype.kind not in kinds or not np.isfinite(values).all():
        problems.append(f"{key}: expected {n} numbers, one per token, got {values.dtype}{list(values.shape)}")
        return None
    return values.tolist()


def _chars(tokens: list[str], types: list[int]) -> Chars | None:
    """Return a `Chars` tokenizer if the vocabulary consists of single characters followed by special tokens, as in the
    metadata that `to_metadata` writes for a `Chars` tokenizer; otherwise None."""
    n = types.count(NORMAL)
    if types[:n] != [NORMAL] * n or not set(types[n:]) <= set(SPECIAL) or foreign(tokens[:n], ""):
        return None
    chars = [token_bytes(token).decode(errors="replace") for token in tokens[:n]]
    if n == 0 or any(len(char) != 1 or printable(char.encode()) != tokens[i] for i, char in enumerate(chars)):
        return None
    tokenizer = Chars("".join(chars))
    tokenizer.grow(tokens[n:])
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE:
        raise UserError(f"tokenizer.ggml.pre: expected one of {', '.join(PRE)}, got {name!r:.60}")
    problems: list[str] = []
    merges = string_list(metadata.get("tokenizer.ggml.merges"), "tokenizer.ggml.merges", problems)
    refuse("gguf", problems)
    pre, vocab = PRE[name], {token: i for i, token in enumerate(tokens)}
    model = hf.bpe_model(vocab, merges, pre.ignore_merges)
    return {**hf.byte_level_parts(pre.scheme, pre.nfc), "model": model}


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    problems: list[str] = []
    scores = _per_token(metadata, "scores", "f", len(tokens), problems)
    if scores is None and not problems:
        problems.append("tokenizer.ggml.scores is missing: it decides which pairs are merged first")
    refuse("gguf", problems)
    assert scores is not None
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
    pieces = {token: scores[i] for i, token in enumerate(tokens) if types[i] == NORMAL}
    model = hf.bpe_model(
        vocab, _by_score(pieces), False,
        unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types,
    )  # fmt: skip
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return {**_blanks(prefix), "pre_tokenizer": None, "model": model}


def _by_score(pieces: Mapping[str, float]) -> list[list[str]]:
    """Return the list of merges that the token scores imply: all pairs of tokens whose concatenation is a token, in
    descending order of the score of the concatenation.

    Raises:
        UserError: there are more than MAX_PAIRS pairs of tokens whose concatenation is a token.
    """
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])
    cuts = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    interned = {piece: piece for piece in pieces}  # Share one string object per piece to save memory.
    pairs = ([interned[left], interned[right]] for left, right in cuts if left in interned and right in interned)
    merges = list(itertools.islice(pairs, MAX_PAIRS + 1))
    if len(merges) > MAX_PAIRS:
        raise UserError(f"tokenizer.ggml.tokens: more than {MAX_PAIRS} pairs of pieces make a piece: not supported")
    return merges


def _blanks(prefix: bool) -> dict[str, Any]:
    """Return the JSON values of a tokenizer.json for a normalizer that replaces spaces by `▁`, and for a decoder that
    replaces `▁` by spaces.

    Args:
        prefix: whether the normalizer adds a space before the text, and the decoder removes this space again.
    """
    before = [{"type": "Prepend", "prepend": BLANK}] * prefix
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    to_blank = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    back = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, to_blank]},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
    }


# --- out


def to_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return GGUF metadata with which llama.cpp encodes a text to the same ids as the tokenizer. Each value of the
    returned metadata is a list of str, a numpy array, an int, a bool or a str.

    If the tokenizer normalises texts to Unicode NFC, llama.cpp gives the same ids only for texts in NFC, because
    llama.cpp does not normalise texts to NFC.

    If the tokenizer has no end-of-text token, llama.cpp ends generation at the token with id 11, which is the default
    of llama.cpp for the tokenizer model `gpt2`. A chars tokenizer has no end-of-text token, but `tokenizers.extend` can
    add one.

    Raises:
        UserError: llama.cpp does not support this tokenizer, or a name is both an ordinary and a special token.
    """
    if tokenizer.kind not in MODELS:
        raise UserError(
            f"a {tokenizer.kind} tokenizer cannot go into a GGUF file: llama.cpp cuts words by other rules; "
            "train the model with tokenizer.name=bpe, gpt2, bytes or chars to export it"
        )
    metadata, ordinary = MODELS[tokenizer.kind](tokenizer)
    special = whole_tokens(tokenizer)
    if twice := sorted(ordinary.keys() & special.keys())[:3]:
        raise UserError(f"GGUF needs distinct tokens; these are both ordinary and special tokens: {twice}")
    ids = ordinary | special
    types = np.full(len(ids), NORMAL, np.int32)
    types[list(tokenizer.special_tokens.values())] = CONTROL
    types[list(tokenizer.added_tokens.values())] = USER_DEFINED
    if metadata["tokenizer.ggml.model"] == "llama":
        types[[i for token, i in ids.items() if _BYTE.fullmatch(token)]] = BYTE
    if (unknown := metadata.get("tokenizer.ggml.unknown_token_id")) is not None:
        types[unknown] = UNKNOWN
    eos, eot, *_ = *stop_ids(tokenizer), None, None
    roles = {"bos": tokenizer.bos_id, "eos": eos, "eot": eot, "padding": tokenizer.pad_id}
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {
        **metadata,
        "tokenizer.ggml.tokens": sorted(ids, key=ids.__getitem__),
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items() if i is not None},
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        **template,
    }


_BYTE = re.compile("<0x[0-9A-F]{2}>")

# A `Vocabulary` is a pair of GGUF metadata and a dict that maps every token, except special and added tokens, to its
# id.
Vocabulary = tuple[dict[str, Any], dict[str, int]]


def _gpt2(pre: str, merges: list[str], ids: dict[str, int]) -> Vocabulary:
    names = {"model": "gpt2", "pre": pre, "merges": merges}
    return {f"tokenizer.ggml.{key}": value for key, value in names.items()}, ids


def _from_bpe(tokenizer: BPE) -> Vocabulary:
    pre = next(name for name, known in PRE.items() if known.scheme == tokenizer.scheme)
    made = {merge.replace(" ", "") for merge in tokenizer.merges}
    whole = [token for token in map(printable, tokenizer.ranks) if len(token) > 1 and token not in made]
    if whole and not PRE[pre].ignore_merges:
        raise UserError(
            f"{len(whole)} tokens, first {whole[0]!r}, are words that no merges make; llama.cpp supports them only "
            f"with the pre-tokenizers {', '.join(_ADD_BOS)}"
        )
    return _gpt2(pre, tokenizer.merges, {printable(token): i for token, i in tokenizer.ranks.items()})


def _from_chars(tokenizer: Chars) -> Vocabulary:
    """Return the GGUF metadata and the token ids of a chars tokenizer. A character of several bytes becomes a token of
    several characters of GPT-2's alphabet, and merges that build the token from its bytes are added."""
    ids = {printable(char.encode()): i for i, char in enumerate(tokenizer.chars)}
    merges = {f"{token[:i]} {token[i]}": None for token in ids for i in range(1, len(token))}
    return _gpt2("gpt-2", list(merges), ids)


def _from_hf(tokenizer: hf.HF) -> Vocabulary:
    """Return the GGUF metadata and the token ids of a SentencePiece BPE tokenizer.

    The tokens that merges build have the scores 0, -1, -2, .. in the order of the merges; all other tokens have the
    lowest score.
    """
    data = tokenizer.data()["tokenizer"]
    model, prefix, ids = data["model"], _prefix(data), hf.check(data)
    refusal = UserError(
        "this tokenizer cannot go into a GGUF file: no tokenizer model of llama.cpp gives the same ids; "
        "export with `gptjax export hf` instead"
    )
    if model.get("type") != "BPE" or model.get("byte_fallback") is not True or prefix is None:
        raise refusal
    merges = hf.pairs(model.get("merges"), ids)
    made = [left + right for left, right in merges]
    rank = {token: i for i, token in enumerate(dict.fromkeys(made))}
    special = {*tokenizer.special_tokens, *tokenizer.added_tokens}
    ordinary = {token: i for token, i in ids.items() if token not in special}
    pieces = [token for token in ordinary if not _BYTE.fullmatch(token)]
    in_order = all(rank[a] <= rank[b] for a, b in itertools.pairwise(made))
    if not in_order or not set("".join(pieces)) <= set(pieces) or 2 in hf.piece_counts(ids, merges, pieces):
        raise refusal
    tokens = sorted(ids, key=ids.__getitem__)
    scores = np.array([-rank.get(t, len(rank)) for t in tokens], np.float32)
    names: dict[str, Any] = {"model": "llama", "scores": scores, "pre": "default", "add_space_prefix": prefix}
    if model.get("unk_token") in ids:
        names["unknown_token_id"] = ids[model["unk_token"]]
    return {f"tokenizer.ggml.{key}": value for key, value in names.items()}, ordinary


# Maps each kind of tokenizer to the function that returns the `Vocabulary` of the tokenizer.
MODELS: dict[str, Callable[[Any], Vocabulary]] = {
    "bpe": _from_bpe,
    "bytes": lambda tokenizer: _gpt2("gpt-2", [], dict(alphabet())),
    "chars": _from_chars,
    "hf": _from_hf,
}


def _prefix(data: Mapping[str, Any]) -> bool | None:
    """Return whether the tokenizer adds a space before a text. Return None if the normalizer and pre-tokenizer have no
    equivalent in llama.cpp, for example because spaces are not replaced by `▁`, or because the text is split at spaces.

    The pre-tokenizer Metaspace differs from llama.cpp and SentencePiece: Metaspace adds no space to a text that begins
    with a space, and with the prepend_scheme "first" Metaspace adds no space after a special token.
    """
    normalizer, before = data.get("normalizer"), data.get("pre_tokenizer")
    with_blank, without = (_blanks(prefix)["normalizer"] for prefix in (True, False))
    if before in (None, _AT_BLANKS) and normalizer in (with_blank, without, without["normalizers"][0]):
        return normalizer == with_blank
    if normalizer is None and before in [_METASPACE | {"prepend_scheme": scheme} for scheme in _PREFIX]:
        return _PREFIX[before["prepend_scheme"]]
    return None


# Gemma's pre-tokenizer splits a text at spaces, which has no effect, because Gemma's normalizer has already replaced
# all spaces by `▁`.
_AT_BLANKS = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_METASPACE = {"type": "Metaspace", "replacement": BLANK, "split": False}
_PREFIX = {"never": False, "first": True, "always": True}
