from __future__ import annotations

import pytest

from gptjax.errors import UserError
from gptjax.tokenizers import bpe


def test_merges_are_applied_in_the_order_they_were_learned():
    tok = bpe.BPE(["l o", "lo w", "e r"])
    assert [tok.decode([i]) for i in tok.encode("lower")] == ["low", "er"]
    assert tok.vocab_size == 256 + 3 + 1


def test_the_alphabet_is_gpt2s():
    assert len(bpe.alphabet()) == 256 and sorted(bpe.alphabet().values()) == list(range(256))
    assert bpe.token_bytes("Ġthe") == b" the" and bpe.token_bytes("Ċ") == b"\n"
    assert bpe.BPE([]).encode("!~") == [0, 93]


@pytest.mark.parametrize(
    ("merges", "says"),
    [
        (["lo w"], "no earlier line"),
        (["l o", "l o"], "second time"),
        (["lo"], "no earlier line"),
        (["l  o"], "no earlier line"),
        (["日 本"], "no earlier line"),
        (["a b", "ab c", "b c", "a bc"], "second time"),
    ],
)
def test_impossible_merges_are_refused(merges, says):
    with pytest.raises(UserError, match=says):
        bpe.BPE(merges)


def test_every_bad_line_is_named():
    with pytest.raises(UserError) as caught:
        bpe.BPE(["xx y", "a b", "zz y"])
    assert "merges[0]" in str(caught.value) and "merges[2]" in str(caught.value)


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character():
    tok = bpe.BPE([])
    assert tok.decode(tok.encode("é")[:1]) == "\ufffd"


def test_trained_bpe_learns_the_frequent_pairs_first():
    tok = bpe.train(["low low low lower lower newest"], 300)
    assert tok.merges[:2] == ["l o", "lo w"]
    assert len(tok.encode("low")) == 1
    assert bpe.train(["low low"], 300, special=["<|a|>", "<|b|>"]).special_tokens == {"<|a|>": 258, "<|b|>": 259}


@pytest.mark.parametrize("blanks", [" " * 600, " \n" * 400, "\n" * 700, "\u3000" * 600, "\t" * 512, "\x1c" * 600])
@pytest.mark.parametrize("after", ["", "x", "\x00", " x"])
def test_long_runs_of_blanks_are_cut_without_changing_an_id(gpt2, blanks, after):
    text = "a" + blanks + after
    assert gpt2.encode(text) == gpt2._tiktoken.encode_ordinary(text)
    assert gpt2.encode_array(text).tolist() == gpt2.encode(text)


def test_two_million_blanks_before_a_letter(gpt2):
    """More than tiktoken's regular expressions can process at once."""
    text = " " * 2_000_000 + "x"
    assert gpt2.decode(gpt2.encode_array(text)) == text


@pytest.mark.parametrize("char", ["a", "7", "!", "é"])
def test_a_word_of_200_000_characters(gpt2, char):
    text = char * 200_000
    assert gpt2.decode(gpt2.encode_array(text)) == text
