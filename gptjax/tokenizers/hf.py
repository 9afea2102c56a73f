"""Imports and exports Hugging Face tokenizers (tokenizer.json).

    tok = from_folder("SmolLM2-135M-Instruct")     loads the tokenizer in a model's folder
    tok = from_hf(text, tokenizer_config)          loads a tokenizer from the text of its tokenizer.json
    files = to_hf(tok)                             returns {"tokenizer.json": ..., "tokenizer_config.json": ..., ...}

A byte-level BPE tokenizer with a known pre-tokenizer is loaded as a `BPE`, which the library tiktoken runs. Every other
tokenizer is loaded as an `HF`, which keeps its tokenizer.json and is run by the library `tokenizers`. The library
tiktoken merges any adjacent pair that makes a token, whereas the library `tokenizers` merges only the pairs in the list
of merges. The libraries tiktoken and `tokenizers` give the same ids under three conditions:

    The tokens that the listed merges make have ascending ids, in the order of the list.
    Encoding a token with the listed merges never gives exactly two pieces: tiktoken would merge two such pieces,
    whereas `tokenizers` would not.
    The listed merges make every token, or `ignore_merges` is set, so that a word that is itself a token is not split.

Proof: suppose that both libraries have made the same merges so far, and that tiktoken next merges the adjacent pieces x
and y into the token t. The pieces x and y that tiktoken merges into the token t were merged from the bytes of t alone,
without a merge across the ends of t, so that encoding t alone produces the pieces x and y too. If the list of merges
lacked the merge of x and y into t, encoding t with the listed merges would give exactly the two pieces x and y, which
the second of the three conditions excludes. The list of merges contains the merge of x and y into t, and by the first
of the three conditions, the library `tokenizers` makes the same merge next as tiktoken.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.files import one_line_end
from gptjax.tokenizers.base import (
    SETTINGS,
    Base,
    Special,
    Tokenizer,
    found_in,
    parse_json,
    read_text,
    refuse,
    stop_ids,
    string_list,
    whole_tokens,
)
from gptjax.tokenizers.bpe import BPE, MAX_VOCAB, alphabet, foreign, printable
from gptjax.tokenizers.chars import Bytes, Chars
from gptjax.tokenizers.patterns import SCHEMES

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # boolean fields that an added token may have


class HF(Base):
    """A tokenizer that is stored as its tokenizer.json and run by the library `tokenizers`, which also handles the
    added tokens and the whitespace around them."""

    kind = "hf"
    name = "hf"

    def __init__(self, data: dict[str, Any]) -> None:
        """Build the tokenizer from `data`, the JSON object of a tokenizer.json that passed `check`."""
        self._data = data
        ids = check(data)
        tokens = data["added_tokens"]
        self.vocab_size = len(ids)
        self.special_tokens = {token["content"]: token["id"] for token in tokens if token["special"]}
        self.added_tokens = MappingProxyType({t["content"]: t["id"] for t in tokens if not t["special"]})
        self._runner = _runner(data)
        self._readers: dict[frozenset[str], Any] = {}
        moved = [name for name, i in ids.items() if self._runner.token_to_id(name) != i]
        problems = [f"added_tokens: {name!r:.60} gets another id than its {ids[name]}" for name in moved]
        refuse("hf", problems)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> HF:
        inner = data.get("tokenizer")
        if not isinstance(inner, dict):
            raise UserError(f"hf tokenizer: tokenizer: expected the object of a tokenizer.json, got {inner!r:.60}")
        ids = check(inner)
        other = {name: ids[name] for name, i in data["special_tokens"].items() if ids.get(name, i) != i}
        refuse("hf", [f"{name!r:.60} is a token already, its id is {i}" for name, i in other.items()])
        inner = _with_special(inner, set(), ids)
        new = [added_token(name, i, True) for name, i in data["special_tokens"].items() if name not in ids]
        return cls(inner | {"added_tokens": [*inner["added_tokens"], *sorted(new, key=lambda token: token["id"])]})

    def data(self) -> dict[str, Any]:
        return {"tokenizer": self._data}

    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]:
        allowed = self._allowed(text, allowed_special, disallowed_special)
        present = found_in(text, self.special_tokens)
        plain = present - allowed if present & allowed else set(self.special_tokens)
        runner = self._as_text(frozenset(plain)) if present - allowed else self._runner
        with rust("encode"):
            return runner.encode(text, add_special_tokens=False).ids

    def encode_array(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray:
        ids = self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return np.array(ids, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        with rust("decode"):
            return self._runner.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def _as_text(self, names: frozenset[str]) -> Any:
        """Return a `tokenizers.Tokenizer` that encodes the special tokens `names` as ordinary text."""
        if names not in self._readers:
            added = [token | {"special": token["content"] in names} for token in self._data["added_tokens"]]
            reader = _runner(self._data | {"added_tokens": added})
            reader.encode_special_tokens = True
            # Keep only the four most recently built tokenizers, because each tokenizer may take 200 MB.
            self._readers = dict([*self._readers.items()][-3:]) | {names: reader}
        return self._readers[names]


def without_last(tokenizer: HF) -> HF:
    """Return a copy of the tokenizer without its last token, which must be an added token."""
    tokens = [token for token in tokenizer._data["added_tokens"] if token["id"] != tokenizer.vocab_size - 1]
    settings = {name: getattr(tokenizer, name) for name in SETTINGS}
    return HF(tokenizer._data | {"added_tokens": tokens}).replace(**settings)


# --- in


def from_folder(folder: str | os.PathLike[str], data: dict[str, Any] | None = None) -> Base:
    """Load the tokenizer in a model's folder from tokenizer.json, or from vocab.json and merges.txt.

    The files tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
    chat_template.jinja are read if the files exist.

    Args:
        data: the content of tokenizer.json, if the caller has parsed it already.
    """
    folder = Path(folder)
    config = _object(folder / "tokenizer_config.json")
    if (template := folder / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(template)
    names = _object(folder / "special_tokens_map.json")
    generation = _object(folder / "config.json") | _object(folder / "generation_config.json")
    file = folder / "tokenizer.json"
    if data is None and file.is_file():
        data = _object(file)
    elif data is None:
        file = folder / "vocab.json"
        data = _slow_files(folder, {**names, **config}, generation.get("model_type"))
    try:
        return from_data(data, config, names, generation)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def from_hf(
    source: str | Path,
    config: dict[str, Any] | None = None,
    special_tokens_map: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
) -> Base:
    """Load a tokenizer from the text or the path of a tokenizer.json.

    Args:
        source: the text (str) or the path (Path) of a tokenizer.json.
        config: content of tokenizer_config.json, which names the special tokens and may contain the chat template.
        special_tokens_map: content of special_tokens_map.json, an older file that names the special tokens.
        generation_config: content of generation_config.json, whose eos_token_id may be a list.

    Raises:
        UserError: the tokenizer is invalid; the message lists up to ten problems.
    """
    text = read_text(source) if isinstance(source, Path) else source
    data = parse_json(text, str(source) if isinstance(source, Path) else "tokenizer.json")
    return from_data(data, config or {}, special_tokens_map or {}, generation_config or {})


def from_data(
    data: Any,
    config: Mapping[str, Any] = MappingProxyType({}),
    special_tokens_map: Mapping[str, Any] = MappingProxyType({}),
    generation_config: Mapping[str, Any] = MappingProxyType({}),
) -> Base:
    """Load a Hugging Face tokenizer like `from_hf`, but from JSON that is already parsed."""
    ids = check(data)
    named = {**special_tokens_map, **config}
    roles, special = _roles(named)
    problems = [
        f"{role} {name!r:.60} is not in the vocabulary: correct tokenizer_config.json, or remove that line"
        for role, name in roles.items()
        if name not in ids
    ]
    refuse("hf", problems)
    data = _with_special(data, special & ids.keys(), ids)
    tokenizer = _byte_level(data, ids) or HF(data)
    template = config.get("chat_template")
    if isinstance(template, list):  # Use the template named `default` from a list of templates.
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    eos = generation_config.get("eos_token_id")
    eos_ids = [ids[roles["eos_token"]]] if "eos_token" in roles else []
    eos_ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    bos_id = ids.get(roles.get("bos_token", "")) if "bos_token" in named else generation_config.get("bos_token_id")
    return tokenizer.replace(
        bos_id=bos_id,
        eos_ids=tuple(i for n, i in enumerate(eos_ids) if i not in eos_ids[:n]),
        pad_id=ids.get(roles.get("pad_token", "")),
        add_bos=bos_id is not None and _adds_bos(data, config, bos_id),
        chat_template=template,
    )


def check(data: Any) -> dict[str, int]:
    """Validate a tokenizer.json and return a dict that maps each token, including added tokens, to its id.

    Raises:
        UserError: values have wrong types, ids are missing or duplicate, model.dropout is not 0, or the normalizer, the
            pre-tokenizer, the decoder or the post-processor has too many steps or could lengthen a text too much; the
            message lists up to ten problems.
    """
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError("hf tokenizer: expected an object with a model, as `tokenizers` writes it")
    problems: list[str] = []
    ids = _model_ids(data["model"], problems)
    tokens = data.get("added_tokens", [])
    if not isinstance(tokens, list) or not all(map(_is_added, tokens)):
        problems.append("added_tokens: expected a list of objects with id, content and special")
        tokens = []
    string_list([token["content"] for token in tokens], "added_tokens", problems)
    for token in tokens:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            problems.append(f"added_tokens: {token['content']!r:.60} has id {token['id']} here, another in the model")
    if data["model"].get("dropout"):
        problems.append("model.dropout: ids would change from call to call; set it to null")
    problems += [*_id_problems(ids), *_chain_problems(data)]
    refuse("hf", problems)
    return ids


def _model_ids(model: dict[str, Any], problems: list[str]) -> dict[str, int]:
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # a Unigram model lists [piece, score] in the order of the ids
        pieces = [row[0] if isinstance(row, list) and row else None for row in vocab]
        return {piece: i for i, piece in enumerate(string_list(pieces, "model.vocab", problems))}
    if isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()):
        return dict(vocab)
    problems.append("model.vocab: expected an object of tokens with their ids")
    return {}


def _is_added(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and type(token.get("id")) is int
        and isinstance(token.get("content"), str)
        and all(type(token.get(flag, False)) is bool for flag in FLAGS)
    )


def _id_problems(ids: dict[str, int]) -> list[str]:
    if len(ids) > MAX_VOCAB:
        return [f"{len(ids):,} tokens, more than {MAX_VOCAB:,}"]
    used = set(ids.values())
    problems = []
    if len(used) < len(ids):
        problems.append(f"{len(ids) - len(used)} duplicate ids")
    outside = sorted(used - set(range(len(ids))))
    if outside and len(used) == len(ids):
        missing = min(set(range(len(ids))) - used)
        problems.append(f"the {len(ids)} ids have gaps: id {outside[-1]} is there, {missing} is not")
    return problems


MAX_STEPS, MAX_DEPTH = 32, 4  # For each entry in CHAINS, the number of steps and the nesting depth are limited.
# Largest number of characters that one character may become in the normalizer and pre-tokenizer, or in the decoder.
MAX_GROWTH = 1024
# Maps each entry of a tokenizer.json that may be a Sequence of steps to the key that lists the steps of the Sequence.
CHAINS = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders",
    "post_processor": "processors",
}  # fmt: skip
GROWTH = {"ByteLevel": 2, "Metaspace": 2, "BertNormalizer": 3, "Precompiled": 4}


def _chain_problems(data: dict[str, Any]) -> Iterator[str]:
    """Yield an error message for each normalizer, pre-tokenizer, decoder or post-processor that has too many steps or
    could give too large an output. For example, 12 steps that each replace a letter by ten letters make a terabyte from
    one letter."""
    growth = {}
    for name, key in CHAINS.items():
        steps, depth = _steps(data.get(name), key)
        if len(steps) > MAX_STEPS or depth > MAX_DEPTH:
            yield f"{name}: {len(steps)} steps, nested {depth} deep: at most {MAX_STEPS}, {MAX_DEPTH} deep, are read"
        if (n := sum(_type(step) == "Precompiled" for step in steps)) > 1:
            yield f"{name}: {n} precompiled tables, expected one"
        growth[name] = math.prod(map(_growth, steps[:MAX_STEPS]))
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        if (most := math.prod(growth[name] for name in names)) > MAX_GROWTH:
            yield f"{' and '.join(names)}: {most:,} characters per input character are possible, {MAX_GROWTH:,} allowed"


def _steps(chain: Any, key: str) -> tuple[list[Any], int]:
    """Return all steps of a normalizer, pre-tokenizer, decoder or post-processor, and the nesting depth of its
    sequences.

    The search for steps stops beyond MAX_STEPS steps or MAX_DEPTH levels.

    Args:
        chain: a single step, or a Sequence of steps, some of which may be sequences themselves.
        key: the key under which a Sequence lists its steps.
    """
    steps: list[Any] = []
    level, depth = [chain], 0
    while level and len(steps) <= MAX_STEPS and depth <= MAX_DEPTH:
        below = []
        for step in level:
            inner = step.get(key) if isinstance(step, dict) else None
            if isinstance(inner, list):
                below += inner
            elif step is not None:
                steps.append(step)
        level, depth = below, depth + 1
    return steps, depth


def _growth(step: Any) -> int:
    """Return the maximum number of output characters that a step of a normalizer, pre-tokenizer or decoder makes from
    one input character."""
    kind = _type(step)
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    if kind != "Replace":
        return GROWTH.get(kind, 1) if isinstance(kind, str) else 1
    content, pattern = str(step.get("content")), step.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1, -(-len(content) // len(literal)))
    return 1 + len(content)  # A regular expression may match the empty text before every character.


def _roles(named: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Return the special tokens that a tokenizer_config.json or a special_tokens_map.json lists.

    Args:
        named: the content of the special_tokens_map.json, updated with the content of the tokenizer_config.json.

    Returns:
        A dict from roles (see ROLES) to names of tokens, such as {"eos_token": "</s>"}; and the set of the names of all
        listed special tokens, with or without a role.
    """

    def text(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    roles = {role: name for role in ROLES if isinstance(name := text(named.get(role)), str) and name}
    more = [named.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    listed = [text(token) for tokens in more if isinstance(tokens, list) for token in tokens]
    return roles, {*roles.values(), *(name for name in listed if isinstance(name, str))}


def _with_special(data: dict[str, Any], names: set[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return a copy of the tokenizer.json in which the tokens `names` are marked as special, and truncation and padding
    are removed."""
    tokens = {t["content"]: added_token(t["content"], t["id"], False) | t for t in data.get("added_tokens", [])}
    for name in names:
        tokens[name] = tokens.get(name, added_token(name, ids[name], True)) | {"special": True}
    ordered = sorted(tokens.values(), key=lambda token: token["id"])
    return data | {"added_tokens": ordered, "truncation": None, "padding": None}


def added_token(name: str, i: int, special: bool) -> dict[str, Any]:
    return {"id": i, "content": name} | dict.fromkeys(FLAGS, False) | {"special": special}


def _byte_level(data: dict[str, Any], ids: dict[str, int]) -> BPE | None:
    """Return the `BPE` that gives the same ids as the tokenizer.json for every text, or None if no `BPE` gives the same
    ids."""
    scheme, model, listed = _scheme(data), data["model"], data["added_tokens"]
    if scheme is None or any(token[flag] for token in listed for flag in ("single_word", "lstrip", "rstrip")):
        return None
    late = {char for token in listed if token["normalized"] for char in token["content"]}
    early = {char for token in listed if not token["normalized"] for char in token["content"]}
    # A `BPE` finds all added tokens in one pass over the raw text. The library `tokenizers` finds the added tokens with
    # the flag `normalized` in a second pass over the normalised text.
    if late and (data.get("normalizer") is not None or late & early):
        return None
    special = {token["content"]: token["id"] for token in listed if token["special"]}
    added = {token["content"]: token["id"] for token in listed if not token["special"]}
    tokens = [name for name in sorted(ids, key=ids.__getitem__) if name not in special and name not in added]
    whole = model.get("unk_token") is None or set(alphabet()) <= set(tokens)
    if not tokens or not whole or foreign(tokens, "") or not _same_in_tiktoken(model, ids, tokens):
        return None
    return BPE(tokens=tokens, special=special, added=added, scheme=scheme, nfc=data.get("normalizer") is not None)


def _scheme(data: dict[str, Any]) -> str | None:
    """Return the key in SCHEMES of the pre-tokenizer in a tokenizer.json. Return None if `BPE` does not support the
    normalizer, pre-tokenizer, decoder or model of this tokenizer.json."""
    model = data["model"]
    before: Any = data.get("pre_tokenizer")
    steps = before.get("pretokenizers") if _type(before) == "Sequence" else [before]
    if (
        model.get("type", "BPE") != "BPE"
        or "merges" not in model
        or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
        or data.get("normalizer") not in (None, {"type": "NFC"})
        or _type(data.get("decoder")) != "ByteLevel"
        or not isinstance(steps, list)
        or not steps
        or _type(steps[-1]) != "ByteLevel"
        or steps[-1].get("add_prefix_space") is not False
    ):
        return None
    uses_regex = steps[-1].get("use_regex", True) is True
    if uses_regex and len(steps) == 1:
        return "gpt2"
    if uses_regex and steps[:-1] == [{"type": "Digits", "individual_digits": True}]:
        return "smollm"
    if not uses_regex and len(steps) == 2 and _type(steps[0]) == "Split":
        split = steps[0]
        regex = split.get("pattern", {}).get("Regex") if isinstance(split.get("pattern"), dict) else None
        keeps_all = (split.get("behavior"), split.get("invert")) in (("Isolated", False), ("Removed", True))
        names = (name for name, scheme in SCHEMES.items() if scheme.split == regex)
        return next(names, None) if keeps_all and regex is not None else None
    return None


def _same_in_tiktoken(model: dict[str, Any], ids: dict[str, int], tokens: list[str]) -> bool:
    """Return whether tiktoken gives the same ids as the library `tokenizers`, which the three conditions in the
    docstring of this module guarantee."""
    merges = pairs(model.get("merges"), ids)
    ordinary = {token: ids[token] for token in tokens}
    made = [ordinary.get(left + right, -1) for left, right in merges]
    if -1 in made or any(b < a for a, b in itertools.pairwise(made)) or not set("".join(tokens)) <= set(tokens):
        return False
    counts = piece_counts(ordinary, merges, tokens)
    return counts == {1} or (model.get("ignore_merges") is True and 2 not in counts)


def piece_counts(ids: dict[str, int], merges: list[tuple[str, str]], tokens: Iterable[str]) -> set[int]:
    """Encode the text of each token with the merges, and count the pieces into which the token is encoded.

    Returns:
        The set of the counts that occur; it is {1} if the merges build every token.
    """
    from tokenizers import models

    with rust("model"):
        cutter = models.BPE(vocab=ids, merges=merges)
        return {len(cutter.tokenize(token)) for token in tokens}


def pairs(merges: Any, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise UserError(f"hf tokenizer: model.merges: expected a list, got {type(merges).__name__}")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    problems = [
        f"model.merges[{i}]: {merges[i]!r:.60} is no pair of known tokens"
        for i, pair in enumerate(pairs)
        if not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(p, str) and p in ids for p in pair)
    ]
    problems = problems or [
        f"model.merges[{i}]: {merges[i]!r:.60} makes a token that is not in the vocabulary"
        for i, (left, right) in enumerate(pairs)
        if left + right not in ids
    ]
    refuse("hf", problems)
    return [(left, right) for left, right in pairs]


def _adds_bos(data: dict[str, Any], config: Mapping[str, Any], bos_id: int) -> bool:
    """Return whether the Hugging Face tokenizer adds the beginning-of-sequence token before a text."""
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    name = next((token["content"] for token in data["added_tokens"] if token["id"] == bos_id), None)
    last: Any = data.get("post_processor")
    steps = last.get("processors") if _type(last) == "Sequence" else [last]
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if _type(step) == "TemplateProcessing" else None
        first = single[0] if isinstance(single, list) and single else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(token, dict) and name is not None and token.get("id") == name:
            return True
    return False


# Maps a tokenizer class of transformers to a key in SCHEMES, and to whether the class normalises texts to Unicode NFC.
_SLOW = {"GPT2Tokenizer": ("gpt2", False), "Qwen2Tokenizer": ("qwen2", True)}
# Maps the model_type of a model to a tokenizer class of transformers.
_CLASS_OF = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def _slow_files(folder: Path, named: Mapping[str, Any], model_type: Any) -> dict[str, Any]:
    """Return a tokenizer.json that is equivalent to vocab.json and merges.txt with the pre-tokenizer of the tokenizer
    class.

    The key tokenizer_class of `named` gives the tokenizer class. If the key tokenizer_class is absent, `model_type`
    determines the tokenizer class; if `model_type` is None, the tokenizer class is GPT2Tokenizer.
    """
    kind = named.get("tokenizer_class")
    kind = kind or ("GPT2Tokenizer" if model_type is None else _CLASS_OF.get(str(model_type)))
    if str(kind).removesuffix("Fast") not in _SLOW:
        why = f"tokenizer_class={kind!r:.60}" if kind else f"no tokenizer_class, and model_type={model_type!r:.60}"
        raise UserError(
            f"{folder}: {why}: vocab.json and merges.txt are read here as {' or '.join(_SLOW)} does; save it with a "
            f"tokenizer.json: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    if named.get("add_prefix_space"):
        raise UserError(f"{folder}: add_prefix_space=true is not supported with vocab.json and merges.txt")
    scheme, nfc = _SLOW[str(kind).removesuffix("Fast")]
    vocab, added = _object(folder / "vocab.json"), _object(folder / "added_tokens.json")
    # The text is not split with str.splitlines, which would also split at characters such as U+2028 that a merge may
    # contain.
    lines = one_line_end(read_text(folder / "merges.txt")).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    listed = _listed_tokens(named.get("added_tokens_decoder"), folder)
    added |= {name: token["id"] for name, token in listed.items()}
    special = ({"<|endoftext|>"} | _roles(named)[1]) & {*vocab, *added}
    tokens = {name: i for name, i in (vocab | added).items() if name in special or name in added}
    return {
        "added_tokens": [
            added_token(name, i, name in special) | (listed.get(name, {}) if name not in special else {})
            for name, i in tokens.items()
        ],
        **byte_level_parts(scheme, nfc),
        "model": bpe_model(vocab, merges, False),
    }


def _listed_tokens(decoder: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Return a dict that maps the name of each added token to the id and the flags of the token.

    Args:
        decoder: added_tokens_decoder of a tokenizer_config.json: {"151643": {"content": "<|endoftext|>", ..}, ..}.
    """
    if decoder is None:
        return {}
    flags = (*FLAGS, "content")
    entries = decoder.items() if isinstance(decoder, dict) else [("", None)]
    tokens = [
        {"id": int(i)} | {key: value for key, value in token.items() if key in flags}
        if i.isdecimal() and len(i) < 10 and isinstance(token, dict)
        else {}
        for i, token in entries
    ]
    if not all(map(_is_added, tokens)):
        raise UserError(f"{folder}: added_tokens_decoder: expected ids with objects of content and special")
    return {token["content"]: token for token in tokens}


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = parse_json(read_text(path), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _type(step: Any) -> Any:
    return step.get("type") if isinstance(step, dict) else None


def _runner(data: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    with rust("tokenizer.json"):
        return Tokenizer.from_str(json.dumps(data))


@contextmanager
def rust(location: str) -> Iterator[None]:
    """Convert errors of the library `tokenizers` to UserError. The library `tokenizers` raises Exception, or
    PanicException, which is not a subclass of Exception."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{location}: {str(error)[:300]}") from None
        raise


# --- out


def to_hf(tokenizer: Tokenizer) -> dict[str, str]:
    """Convert a tokenizer to the files of a Hugging Face folder, as a dict from file name to text. The tokenizer that
    AutoTokenizer of transformers loads from the returned files gives the same ids as `tokenizer`.

    Raises:
        UserError: no tokenizer.json is exactly equivalent to this kind of tokenizer.
    """
    if tokenizer.kind not in MODELS:
        raise UserError(
            f"a {tokenizer.kind} tokenizer has no exact tokenizer.json: Hugging Face cuts words by other rules; "
            "train the model with tokenizer.name=bpe, gpt2, bytes or chars to export it"
        )
    names = {i: name for name, i in whole_tokens(tokenizer).items()}
    eos = next(iter(stop_ids(tokenizer)), None)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": eos, "pad_token": tokenizer.pad_id}
    roles = {role: names[i] for role, i in ids.items() if i in names}
    template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles, **template}
    files = {
        "tokenizer.json": MODELS[tokenizer.kind](tokenizer),
        "tokenizer_config.json": config,
        "special_tokens_map.json": roles,
    }
    return {name: json.dumps(content, ensure_ascii=False, indent=2) + "\n" for name, content in files.items()}


def _from_bpe(tokenizer: BPE) -> dict[str, Any]:
    ordinary = {printable(token): i for token, i in tokenizer.ranks.items()}
    merges = [merge.split(" ") for merge in tokenizer.merges]
    whole = len(set(map("".join, merges))) < sum(len(token) > 1 for token in tokenizer.ranks)
    # The library `tokenizers` gives new ids, after the last id of the model's vocabulary, to all added tokens that are
    # not in the model's vocabulary. Special tokens and added tokens whose ids are smaller than the last id of a token
    # that is neither special nor added are put into the model's vocabulary, so that they keep their ids.
    last = max(ordinary.values())
    low = {name: i for name, i in whole_tokens(tokenizer).items() if i < last}
    vocab = dict(sorted((ordinary | low).items(), key=lambda item: item[1]))
    model = bpe_model(vocab, merges, whole)
    return _file(tokenizer, byte_level_parts(tokenizer.scheme, tokenizer.nfc) | {"model": model})


def _from_bytes(tokenizer: Bytes) -> dict[str, Any]:
    model = bpe_model(dict(alphabet()), [], False)
    return _file(tokenizer, byte_level_parts("gpt2", False) | {"model": model})


def _from_chars(tokenizer: Chars) -> dict[str, Any]:
    model = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(tokenizer.chars)}, "unk_token": "<unknown>"}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    steps = {"normalizer": None, "pre_tokenizer": split, "decoder": {"type": "Fuse"}}
    return _file(tokenizer, steps | {"model": model})


# Maps each kind of tokenizer to the function that returns the tokenizer.json of the tokenizer.
MODELS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "bpe": _from_bpe,
    "bytes": _from_bytes,
    "chars": _from_chars,
    "hf": lambda tokenizer: tokenizer.data()["tokenizer"],
}


def _file(tokenizer: Base, body: dict[str, Any]) -> dict[str, Any]:
    tokens = [added_token(name, i, True) for name, i in tokenizer.special_tokens.items()]
    tokens += [added_token(name, i, False) for name, i in tokenizer.added_tokens.items()]
    after = None
    if tokenizer.add_bos and tokenizer.bos_id is not None:  # The post-processor adds bos_id before a text.
        name = tokenizer.decode([tokenizer.bos_id])
        bos = {"SpecialToken": {"id": name, "type_id": 0}}
        first, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
        special = {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}}
        pair = [bos, first, second]
        after = {"type": "TemplateProcessing", "single": [bos, first], "pair": pair, "special_tokens": special}
    start: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    start |= {"added_tokens": sorted(tokens, key=lambda token: token["id"])}
    return start | body | {"post_processor": after}


def byte_level_parts(scheme: str, nfc: bool) -> dict[str, Any]:
    """Return the JSON values of a tokenizer.json for the normalizer, pre-tokenizer and decoder of a byte-level BPE."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    before: dict[str, Any] = level
    if scheme != "gpt2":
        split = {"type": "Split", "pattern": {"Regex": SCHEMES[scheme].split}, "behavior": "Isolated", "invert": False}
        digits = {"type": "Digits", "individual_digits": True}
        smollm = scheme == "smollm"
        steps = [digits, level] if smollm else [split, level | {"use_regex": False}]
        before = {"type": "Sequence", "pretokenizers": steps}
    return {"normalizer": {"type": "NFC"} if nfc else None, "pre_tokenizer": before, "decoder": level}


def bpe_model(vocab: dict[str, int], merges: list[Any], ignore_merges: bool, **more: Any) -> dict[str, Any]:
    settings = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    settings |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges} | more
    return {"type": "BPE", **settings, "vocab": vocab, "merges": merges}
