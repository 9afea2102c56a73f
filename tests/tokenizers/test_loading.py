"""tokenizers.load, train and build: names, paths, and error messages for missing files."""

from __future__ import annotations

import json

import pytest

from gptjax import tokenizers
from gptjax.config import TokenizerConfig
from gptjax.errors import UserError


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gtp2", "did you mean 'gpt2'"),
        ("bpe", "has to be trained"),
        ("nowhere/tokenizer.json", "no such file"),
    ],
)
def test_load_says_what_is_missing(name, says):
    with pytest.raises(UserError, match=says):
        tokenizers.load(name)


def test_load_of_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": {"type": "BPE"}}', b"\x80\x04pickle", b"NaN"],
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizers.load(path)


def test_train_refuses_what_cannot_be_meant():
    with pytest.raises(UserError, match="got one string"):
        tokenizers.train("chars", "some text")
    with pytest.raises(UserError, match="cannot train"):
        tokenizers.train("gpt2", ["some text"])
    with pytest.raises(UserError, match="needs a vocab_size"):
        tokenizers.train("bpe", ["some text"])
    for name in ("chars", "words"):
        with pytest.raises(UserError, match="texts"):
            tokenizers.train(name, [""])
    for name in ("bpe", "wordpiece", "unigram"):
        with pytest.raises(UserError, match="or more"):
            tokenizers.train(name, ["some text"], 10)


def test_build_trains_or_loads(tmp_path):
    def texts():
        return iter(["the lowest of the low"])

    def never():
        raise AssertionError("a tokenizer that is loaded needs no text")

    chars = tokenizers.build(TokenizerConfig(name="chars"), texts)
    assert chars.vocab_size == len(set("the lowest of the low"))
    assert tokenizers.build(TokenizerConfig(name="words"), texts).vocab_size == 4 + 4
    assert tokenizers.build(TokenizerConfig(name="bpe", vocab_size=260), texts).vocab_size <= 260
    assert tokenizers.build(TokenizerConfig(name="bytes"), never).vocab_size == 257
    path = chars.save(tmp_path / "mine.json")
    assert path.name == "mine.json"
    assert tokenizers.build(TokenizerConfig(name=str(path)), never) == chars


def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path):
    path = tokenizers.load("bytes").save(tmp_path)
    data = json.loads(path.read_text()) | {"kind": "byte", "name": None, "special_tokens": 3}
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        tokenizers.load(path)
    assert all(word in str(caught.value) for word in ("kind:", "name:", "special_tokens:"))
