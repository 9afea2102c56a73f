"""Properties that every kind of tokenizer has."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import UserError
from gptjax.tokenizers import bpe, gguf, hf

TEXT = (
    "Every effort moves you.\nThe lower the newer, the wider -- said he; (who?)\n\n"
    'Low, lower, lowest: the lowest price. "It\'s the low one", she said!\n'
) * 3
STRANGE = "naïve café 日本 😀\x00\r\n\u2028 \t\n\n  x ## ##a ###b _ __init__ Ġ ½ e\u0301 <|unk|> 12345678901234567890"


def loaded_bpe():
    """A BPE tokenizer as loaded with a model: special tokens first, then bytes and merges, then an added token."""
    learned = tokenizers.train("bpe", [TEXT], 300, special=())
    pieces = [bpe.printable(token) for token in learned.ranks]
    ids = {token: i for i, token in enumerate(["<|endoftext|>", "<|im_end|>", *pieces, "<think>"])}
    data = {
        "added_tokens": [
            hf.added_token(token, ids[token], token != "<think>") for token in (*list(ids)[:2], "<think>")
        ],
        **hf.byte_level_parts("llama3", nfc=False),
        "model": hf.bpe_model(ids, [merge.split(" ") for merge in learned.merges], False),
    }
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": True, "chat_template": "{{ 1 }}"}
    return hf.from_hf(json.dumps(data), names)


def sentencepiece():
    """A SentencePiece tokenizer as in Llama 2: spaces are `▁`, unknown characters are encoded as bytes."""
    pieces = ["▁", *sorted(set(TEXT) - {" ", "\n"}), "▁t", "he", "▁the", "lo", "low", "▁low", "er", "lower", "est"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return gguf.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )


KINDS = {
    "chars": lambda: tokenizers.train("chars", [TEXT]),
    "words": lambda: tokenizers.train("words", [TEXT]),
    "words-v1": lambda: tokenizers.train("words", [TEXT], special=()),
    "bpe": lambda: tokenizers.train("bpe", [TEXT], 300),
    "wordpiece": lambda: tokenizers.train("wordpiece", [TEXT], 560),
    "unigram": lambda: tokenizers.train("unigram", [TEXT], 300),
    "bytes": lambda: tokenizers.load("bytes"),
    "loaded-bpe": loaded_bpe,
    "sentencepiece": sentencepiece,
    "extended": lambda: tokenizers.extend(tokenizers.load("bytes"), ["<|im_start|>", "<|im_end|>"]),
    "words-extended": lambda: tokenizers.extend(tokenizers.train("words", [TEXT]), ["<|im_end|>"]),
    "gpt2": None,
}
LOADED = ("loaded-bpe", "sentencepiece")
OF_BYTES = (  # byte-level kinds: encode any text and decode it exactly
    "bpe", "wordpiece", "unigram", "bytes", "gpt2", "loaded-bpe", "sentencepiece", "extended",
)  # fmt: skip
made: dict[str, tokenizers.Tokenizer] = {}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def tok(kind, request):
    if kind not in made:
        made[kind] = KINDS[kind]() if KINDS[kind] else request.getfixturevalue("gpt2")
    return made[kind]


def test_ids_are_whole_numbers_inside_the_vocabulary(tok):
    ids = tok.encode(TEXT)
    assert ids and all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)


def test_array_is_the_list(tok):
    array = tok.encode_array(TEXT)
    assert array.tolist() == tok.encode(TEXT)
    assert array.dtype == (np.uint16 if tok.vocab_size <= 65_536 else np.uint32)


def test_text_comes_back(tok, kind):
    back = tok.decode(tok.encode(TEXT))
    if kind.startswith("words"):  # whitespace is not preserved, but everything else is
        assert tok.encode(back) == tok.encode(TEXT)
    else:
        assert back == TEXT
    assert tok.decode(tok.encode_array(TEXT)) == back


def test_strange_text_comes_back_from_the_kinds_made_of_bytes(tok, kind):
    if kind in OF_BYTES:
        assert tok.decode(tok.encode(STRANGE)) == STRANGE
        assert tok.encode_array(STRANGE).tolist() == tok.encode(STRANGE)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
@pytest.mark.parametrize("of_bytes", [k for k in OF_BYTES if k != "gpt2"])
def test_any_text_comes_back(of_bytes, text):
    if of_bytes not in made:
        made[of_bytes] = KINDS[of_bytes]()
    assert made[of_bytes].decode(made[of_bytes].encode(text, disallowed_special=())) == text


def test_nothing_gives_nothing(tok):
    assert tok.encode("") == [] and tok.encode_array("").shape == (0,)
    assert tok.decode([]) == "" and tok.decode(np.zeros(0, np.uint16)) == ""


def test_every_id_decodes(tok):
    for i in {0, tok.vocab_size // 2, tok.vocab_size - 1}:
        assert isinstance(tok.decode([i]), str)


@pytest.mark.parametrize("ids", [[-1], [10**6], [2**32 - 1], [0, 2**63 - 1], [0.5], [[0]], ["a"]])
def test_decode_refuses_what_is_no_id(tok, ids):
    with pytest.raises(UserError, match="decode:"):
        tok.decode(ids)


def test_special_tokens_are_the_last_ids_and_decode_to_their_name(tok, kind):
    ids = sorted(tok.special_tokens.values())
    if kind not in LOADED:
        assert ids == list(range(tok.vocab_size - len(ids), tok.vocab_size))
    assert tok.eot_id is None or tok.eot_id in ids
    for name, i in tok.special_tokens.items():
        assert tok.decode([i]) == name


def test_special_text_is_refused_until_its_meaning_is_said(tok, kind):
    for name, i in tok.special_tokens.items():
        text = f"the {name} lowest"
        with pytest.raises(UserError, match=r"allowed_special=.*disallowed_special=\(\)"):
            tok.encode(text)
        with pytest.raises(UserError, match="special token"):
            tok.encode_array(text)
        for allowed in ({name}, [name], "all"):
            assert tok.encode(text, allowed_special=allowed).count(i) == 1
        assert tok.encode_array(text, allowed_special="all").tolist() == tok.encode(text, allowed_special="all")
        plain = tok.encode(text, disallowed_special=())
        if not kind.startswith("words"):  # these encode an unknown word as [UNK]
            assert i not in plain and tok.decode(plain) == text
        others = set(tok.special_tokens) - {name}
        assert tok.encode(text, disallowed_special=others) == plain


def test_special_tokens_cut_the_text(tok):
    if tok.eot_id is not None:
        name = next(n for n, i in tok.special_tokens.items() if i == tok.eot_id)
        assert tok.encode(f"the{name}{name}low", allowed_special="all") == [
            *tok.encode("the"), tok.eot_id, tok.eot_id, *tok.encode("low"),
        ]  # fmt: skip


def test_added_tokens_are_ids_in_any_text(tok):
    for name, i in tok.added_tokens.items():
        assert tok.encode(f"the{name}low", disallowed_special=()) == [*tok.encode("the"), i, *tok.encode("low")]
        assert tok.encode_array(f"the{name}low").tolist() == tok.encode(f"the{name}low") and tok.decode([i]) == name


def test_what_a_model_says_of_its_tokenizer(tok, kind):
    if kind in LOADED:
        assert tok.bos_id in tok.special_tokens.values() and len(tok.eos_ids) == 1 and tok.add_bos
        assert tok.encode("the")[0] != tok.bos_id  # encode does not add it by itself
    else:
        assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.add_bos, tok.chat_template) == (None, (), None, False, None)
    other = tok.replace(bos_id=1, eos_ids=[0, 2], pad_id=3, add_bos=True, chat_template="{{ 2 }}")
    assert other != tok and other.encode("the") == tok.encode("the") and tok.chat_template != "{{ 2 }}"
    reloaded = tokenizers.loads(other.dumps())
    assert reloaded == other and reloaded.replace() == other
    settings = (reloaded.bos_id, reloaded.eos_ids, reloaded.pad_id, reloaded.add_bos, reloaded.chat_template)
    assert settings == (1, (0, 2), 3, True, "{{ 2 }}")
    with pytest.raises(UserError) as caught:
        tok.replace(bos_id=-1, eos_ids=[tok.vocab_size], pad_id="1", add_bos=1, chat_template=b"", nonsense=3)
    assert all(f"{name}:" in str(caught.value) for name in ("bos_id", "eos_ids", "pad_id", "add_bos", "chat_template"))


def test_more_special_tokens_follow_and_change_no_id(tok, tmp_path):
    more = tokenizers.extend(tok, ["<|new|>", "<|more|>"])
    assert more.vocab_size == tok.vocab_size + 2
    assert more.special_tokens == {**tok.special_tokens, "<|new|>": tok.vocab_size, "<|more|>": tok.vocab_size + 1}
    assert more.encode(TEXT) == tok.encode(TEXT) and more.eot_id == tok.eot_id and more.eos_ids == tok.eos_ids
    ids = more.encode("the<|more|>low", allowed_special="all")
    assert tok.vocab_size + 1 in ids and more.decode([tok.vocab_size]) == "<|new|>"
    more.save(tmp_path)
    assert tokenizers.load(tmp_path) == more
    for names, says in [(["<|new|>"], "a token already"), ([""], "non-empty"), (["<|a|>"] * 2, "duplicate")]:
        with pytest.raises(UserError, match=says):
            tokenizers.extend(more, names)
    with pytest.raises(UserError, match="one string"):
        tokenizers.extend(more, "<|a|>")


def test_unknown_special_tokens_are_refused(tok):
    with pytest.raises(UserError, match="unknown"):
        tok.encode("the", allowed_special={"<|nonsense|>"})
    with pytest.raises(UserError, match="expected a set"):
        tok.encode("the", allowed_special="<|endoftext|>")


def test_what_is_not_text_is_refused(tok):
    with pytest.raises(UserError, match="lone surrogate"):
        tok.encode("the \ud800")
    with pytest.raises(UserError, match="expected text"):
        tok.encode(b"the")


def test_saved_is_loaded(tok, tmp_path):
    path = tok.save(tmp_path)
    assert path == tmp_path / "tokenizer.json" and [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for place in (path, tmp_path, str(tmp_path)):
        reloaded = tokenizers.load(place)
        assert reloaded == tok and reloaded.fingerprint == tok.fingerprint
        assert (reloaded.name, reloaded.vocab_size, reloaded.special_tokens) == (
            tok.name,
            tok.vocab_size,
            tok.special_tokens,
        )
        assert reloaded.eot_id == tok.eot_id and reloaded.encode(TEXT) == tok.encode(TEXT)
    assert tok.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_directory_is_a_tokenizer_too(tok, tmp_path):
    tok.save(tmp_path / "final")
    assert tokenizers.load(tmp_path) == tok


def test_same_text_same_tokenizer(kind, tok):
    if KINDS[kind]:
        assert KINDS[kind]().fingerprint == tok.fingerprint


# --- hostile files


def _entries(data: dict) -> str:
    return next((key for key in ("chars", "words", "merges", "vocab", "pieces", "tokens") if key in data), "")


def test_a_truncated_file_is_refused(tok, tmp_path):
    path = tok.save(tmp_path)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            tokenizers.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"version": 2}, {"version": None}, {"kind": "nonsense"}, {"kind": None}, {"kind": ["bpe"]},
        {"name": 3}, {"vocab_size": 7}, {"vocab_size": "7"}, {"vocab_size": 2**32 - 1}, {"vocab_size": True},
        {"special_tokens": []}, {"special_tokens": {"<|new|>": 3}}, {"special_tokens": {"<|endoftext|>": 0}},
        {"special_tokens": {"<|endoftext|>": -1}}, {"special_tokens": {"<|endoftext|>": "1"}},
        {"special_tokens": {"": 5}}, {"special_tokens": {"\ud800": 5}}, {"name": ""}, {"name": "\ud800"},
    ],
    ids=ascii,
)  # fmt: skip
def test_a_wrong_header_is_refused(tok, tmp_path, change):
    path = tok.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizers.load(path)


def test_wrong_entries_are_refused(tok, tmp_path):
    path = tok.save(tmp_path)
    data = json.loads(path.read_text())
    key = _entries(data)
    for value in [None, 3, {}, [1], [""], ["a", "a"], ["\ud800"], [["a"]], data[key][:-1]] if key else []:
        path.write_text(json.dumps(data | {key: value}))
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            tokenizers.load(path)


def test_an_entry_twice_is_refused(tok, tmp_path):
    path = tok.save(tmp_path)
    data = json.loads(path.read_text())
    if key := _entries(data):
        data[key] = data[key] + data[key][-1:]
        path.write_text(json.dumps(data | {"vocab_size": data["vocab_size"] + 1}))
        with pytest.raises(UserError, match="duplicate"):
            tokenizers.load(path)


def test_a_key_twice_is_refused(tok, tmp_path):
    path = tok.save(tmp_path)
    path.write_text(path.read_text().replace("{", '{"kind": "bytes",', 1))
    with pytest.raises(UserError, match="duplicate key kind"):
        tokenizers.load(path)
