from __future__ import annotations

import pytest

from gptjax import tokenizers
from gptjax.errors import UserError
from gptjax.tokenizers import words


def test_split_keeps_marks_and_drops_white_space():
    assert words.split("Hello, world. Is this-- a test?") == [
        "Hello", ",", "world", ".", "Is", "this", "--", "a", "test", "?",
    ]  # fmt: skip


def test_unknown_words():
    known = ["the low one"]
    assert words.train(known).decode(words.train(known).encode("the high one")) == "the [UNK] one"
    with pytest.raises(UserError, match="'high'"):
        words.train(known, special=()).encode("the high one")


def test_the_four_special_tokens_follow_the_words():
    tok = words.train(["b a c"])
    assert tok.special_tokens == {"[BOS]": 3, "[EOS]": 4, "[PAD]": 5, "[UNK]": 6}
    assert tok.eot_id == 4 and tok.unk_id == 6
    ids = tok.encode("[BOS] a b [EOS] [PAD]", allowed_special="all")
    assert ids == [3, 0, 1, 4, 5]


def test_vocab_size_keeps_the_frequent_words():
    assert tokenizers.train("words", ["b b a a c"], 2, special=()).words == ["a", "b"]
    with pytest.raises(UserError, match="vocab_size=4"):
        tokenizers.train("words", ["a"], 4)
