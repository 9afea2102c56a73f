from __future__ import annotations

import json

import pytest

from gptjax import tokenizers
from gptjax.errors import UserError
from gptjax.tokenizers import subwords
from gptjax.tokenizers.bpe import alphabet

SINGLE = list(alphabet())


def test_wordpiece_takes_the_longest_piece_first():
    tok = subwords.WordPiece([*SINGLE, *("##" + c for c in SINGLE), "low", "lowe", "##er", "##r", "##est"])
    assert [tok.vocab[i] for i in tok.encode("lower")] == ["lowe", "##r"]
    assert [tok.vocab[i] for i in tok.encode("slower")] == ["s", "##l", "##o", "##w", "##er"]


def test_wordpiece_marks_do_not_mix_with_the_text():
    tok = subwords.WordPiece([*SINGLE, *("##" + c for c in SINGLE)])
    for text in ("##a", "###", "a##b", " ## #"):
        assert tok.decode(tok.encode(text)) == text


def test_unigram_takes_the_most_probable_cut():
    pieces = [*SINGLE, "low", "lo", "wer", "er"]
    tok = subwords.Unigram(pieces, [-10.0] * 256 + [-2.0, -2.5, -2.0, -3.0])
    assert [tok.pieces[i] for i in tok.encode("lower")] == ["lo", "wer"]  # score -4.5; low + er has -5


@pytest.mark.parametrize("scores", [None, [], [-1.0], [float("-inf")] * 256, [1.0] * 256, ["a"] * 256, [True] * 256])
def test_unigram_scores_are_checked(tmp_path, scores):
    path = subwords.Unigram(SINGLE, [-1.0] * 256).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": scores}))
    with pytest.raises(UserError, match="scores: expected 256"):
        tokenizers.load(path)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_vocabulary_without_every_byte_is_refused(tmp_path, kind):
    path = tokenizers.train(kind, ["the lowest of the low"], 600).save(tmp_path)
    data = json.loads(path.read_text())
    key = "vocab" if kind == "wordpiece" else "pieces"
    data[key] = [piece for piece in data[key] if piece not in ("Ġ", "##Ġ")]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="of the single bytes are missing"):
        tokenizers.load(path)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
@pytest.mark.parametrize("text", ["abcdefgh" * 20_000, " " * 300_000 + "x", "é" * 50_000])
def test_long_words(kind, text):
    tok = tokenizers.train(kind, ["the lowest of the low"], 600)
    assert tok.decode(tok.encode(text)) == text
