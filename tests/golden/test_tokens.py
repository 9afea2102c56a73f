"""Token ids from chapter 2 of the book, and well-known token ids and counts of GPT-2."""

from __future__ import annotations

import base64
import hashlib
import inspect

from gptjax import tokenizers
from gptjax.tokenizers import words

V1_TEXT = """"It's the last he painted, you know,"
           Mrs. Gisburn said with pardonable pride."""
V1_IDS = [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]
V2_TEXT = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
V2_IDS = [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
GPT2_TEXT = "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace."
GPT2_IDS = [
    15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114, 1659, 617, 34680, 27271, 13,
]  # fmt: skip


def test_the_story_has_20479_characters_and_4690_words(verdict):
    assert len(verdict) == 20_479
    assert len(words.split(verdict)) == 4690


def test_words_without_special_tokens_is_the_books_first_tokenizer(verdict):
    tok = tokenizers.train("words", [verdict], special=())
    assert tok.vocab_size == 1130
    assert tok.encode(V1_TEXT) == V1_IDS
    assert tok.decode(V1_IDS) == '" It\' s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'


def test_words_with_two_special_tokens_is_the_books_second_tokenizer(verdict):
    tok = tokenizers.train("words", [verdict], special=words.BOOK_SPECIAL)
    assert tok.vocab_size == 1132
    assert tok.special_tokens == {"<|endoftext|>": 1130, "<|unk|>": 1131}
    assert tok.encode(V2_TEXT, allowed_special={"<|endoftext|>"}) == V2_IDS
    assert tok.decode(V2_IDS) == "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."


def test_gpt2_ids(gpt2, verdict):
    assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256)
    assert gpt2.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt2.encode(GPT2_TEXT, allowed_special={"<|endoftext|>"}) == GPT2_IDS
    assert gpt2.decode(GPT2_IDS) == GPT2_TEXT
    assert gpt2.encode("Akwirw ier") == [33901, 86, 343, 86, 220, 959]
    ids = gpt2.encode(verdict)
    assert len(ids) == 5145
    assert ids[:5] == [40, 367, 2885, 1464, 1807]
    assert ids[50:55] == [290, 4920, 2241, 287, 257]


def test_gpt2_tokens_of_tiny_shakespeare(gpt2, tiny_shakespeare):
    """nanoGPT reports 301,966 and 36,059 tokens for its split at 90 % of the characters."""
    cut = int(len(tiny_shakespeare) * 0.9)
    assert len(gpt2.encode_array(tiny_shakespeare[:cut])) == 301_966
    assert len(gpt2.encode_array(tiny_shakespeare[cut:])) == 36_059


def test_tiny_shakespeare_has_65_characters(tiny_shakespeare):
    tok = tokenizers.train("chars", [tiny_shakespeare])
    assert tok.vocab_size == 65
    assert tok.encode("First Citizen") == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52]


def test_gpt2_ranks_are_the_ones_tiktoken_pins(gpt2):
    from tiktoken_ext import openai_public

    ranked = sorted(gpt2.ranks.items(), key=lambda item: item[1])
    text = b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranked)
    pinned = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert pinned in inspect.getsource(openai_public.r50k_base)
    assert hashlib.sha256(text).hexdigest() == pinned
