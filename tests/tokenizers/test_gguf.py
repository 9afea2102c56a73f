"""Vocabularies of GGUF files, reading and writing, compared with llama.cpp."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from gptjax import assets, tokenizers
from gptjax.errors import UserError
from gptjax.formats import gguf
from gptjax.tokenizers import bpe, chat, hf
from gptjax.tokenizers import gguf as gguf_tokenizer
from gptjax.tokenizers.gguf import PRE, from_metadata, to_metadata

KEY = "tokenizer.ggml."
TEXTS = [
    "The capital of France is", "   a  b ", "\n\n", "a\r\nb\r\n\r\nc", " \n \n x", "x \n\n  1",
    "12345 3.14 1,000 x1y22z333",
    "½ Ⅷ ٣٤٥ 一二三", "It's, they'RE o'clock ''", "naïve Straße żółć Ελληνικά русский עברית हिन्दी ไทย",
    "日本語 中文 한국어",
    "e\u0301 vs é",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ok", 'def f(x):\n    return x**2  # ok\n\n\tprint(f"{x:>10}")\n', "\u2028\u200b\ufeff x\u00a0y",
    "!!!???...---***", "a!\n\nb?\r\n\r\n", "x<|im_start|>user\nhi<|im_end|>\n", "<|im_end|><|im_end|>", "<|im_end",
    "a" * 99,
    " " * 99 + "x", "low lower lowest", "<s>low</s> lower",
]  # fmt: skip


def _more_texts(n: int) -> list[str]:
    rng = random.Random(3)
    pools = [
        "abcdefgABC",
        " \t\n\r",
        "0123456789",
        ".,;:!?'\"(){}<>|/\\-=+*&",
        "éüñßç",
        "абв",
        "日本한",
        "😀👍🏽\u200d",
        "\u00a0\u3000",
    ]
    words = ["'s", " the", "ing", "<|im_end|>"]

    def piece() -> str:
        return "".join(rng.choices(rng.choice(pools), k=rng.randint(1, 6))) + (rng.random() < 0.2) * rng.choice(words)

    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(n)]


@functools.cache
def learned() -> bpe.BPE:
    return bpe.train([text.replace("<|", "") for text in TEXTS * 3 + _more_texts(100)], 500, special=())


def byte_level(name: str, **more) -> dict:
    """GGUF metadata of a byte-level BPE: special tokens, learned tokens, one user-defined token, one unused token."""
    pieces = [bpe.printable(token) for token in learned().ranks]
    return {
        KEY + "model": "gpt2",
        KEY + "pre": name,
        KEY + "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *pieces, "<think>", "[PAD0]"],
        KEY + "token_type": np.array([3] * 3 + [1] * len(pieces) + [4, 5], np.int32),
        KEY + "merges": learned().merges,
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 0,
        **{KEY + key: value for key, value in more.items()},
    }


def sentencepiece(prefix: bool = True) -> dict:
    letters = sorted({char for text in TEXTS for char in text if char < "\u0400"} - {" "})
    pieces = ["▁l", "lo", "▁lo", "low", "▁low", "er", "lower", "es", "▁▁", "▁a", "st", "est", "in", "▁", *letters]
    return {
        KEY + "model": "llama",
        KEY + "pre": "default",
        KEY + "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<think>"],
        KEY + "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4], np.int32),
        KEY + "scores": np.array([0] * 259 + [-i for i in range(len(pieces))] + [0], np.float32),
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
        KEY + "unknown_token_id": 0,
        KEY + "add_bos_token": True,
        KEY + "add_space_prefix": prefix,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize("pre", PRE)
def test_a_byte_level_vocabulary_becomes_bpe(pre):
    tok = from_metadata(byte_level(pre))
    assert (tok.kind, tok.scheme, tok.nfc) == ("bpe", PRE[pre].scheme, PRE[pre].nfc)
    assert (tok.bos_id, tok.eos_ids, tok.eot_id, tok.add_bos) == (1, (0, 2), 0, PRE[pre].ignore_merges)
    assert dict(tok.added_tokens) == {"<think>": tok.vocab_size - 2} and "[PAD0]" in tok.special_tokens
    for text in TEXTS[:16]:
        assert tok.decode(tok.encode(text)) == text.replace("e\u0301", "é" if tok.nfc else "e\u0301")
    assert from_metadata(to_metadata(tok)).encode(TEXTS[7]) == tok.encode(TEXTS[7])


def test_ids_are_read_from_the_file():
    metadata = byte_level("smollm", eot_token_id=4, padding_token_id=3, add_bos_token=True)
    tok = from_metadata(metadata | {"tokenizer.chat_template": "{{ 1 }}"})
    assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.add_bos) == (1, (0, 4, 2), 3, True)
    assert tok.chat_template == "{{ 1 }}"
    back = to_metadata(tok)
    for key in (
        "tokens",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "eot_token_id",
        "padding_token_id",
        "add_bos_token",
    ):
        assert back[KEY + key] == metadata[KEY + key], key
    types = metadata[KEY + "token_type"].copy()
    types[-1] = 3  # unused tokens are written as control tokens, which text cannot contain either
    assert back[KEY + "token_type"].tolist() == types.tolist() and back["tokenizer.chat_template"] == "{{ 1 }}"


def test_a_vocabulary_with_scores_is_sentencepiece():
    tok = from_metadata(sentencepiece())
    assert (tok.kind, tok.bos_id, tok.eos_ids, tok.add_bos) == ("hf", 1, (2,), True)
    assert list(tok.special_tokens) == ["<unk>", "<s>", "</s>"] and list(tok.added_tokens) == ["<think>"]
    vocab = sentencepiece()[KEY + "tokens"]
    assert [vocab[i] for i in tok.encode("low lowest")] == ["▁low", "▁low", "est"]
    assert [vocab[i] for i in tok.encode("\u05d0")] == ["▁", "<0xD7>", "<0x90>"]
    assert [vocab[i] for i in from_metadata(sentencepiece(False)).encode("low")] == ["low"]
    assert tok.decode(tok.encode(" low  lower 日本")) == " low  lower 日本"


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_goes_out_as_it_came(prefix):
    metadata = sentencepiece(prefix)
    tok = from_metadata(metadata)
    back = to_metadata(tok)
    assert back.keys() == metadata.keys()
    for key, value in metadata.items():
        if key != KEY + "scores":
            assert np.array_equal(back[key], value), key
    reloaded = from_metadata(back)
    for text in TEXTS:
        assert reloaded.encode(text, allowed_special="all") == tok.encode(text, allowed_special="all")


@pytest.mark.parametrize("where", [None, "first", "always", "never"])
def test_the_other_ways_to_write_sentencepiece(where):
    data = from_metadata(sentencepiece(where not in (None, "never"))).data()["tokenizer"]
    if where:
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": where, "split": False}
        data = data | {"normalizer": None, "pre_tokenizer": metaspace}
    else:  # the form of Gemma
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        data = data | {"normalizer": data["normalizer"]["normalizers"][0], "pre_tokenizer": split}
    tok = hf.from_hf(json.dumps(data))
    back = from_metadata(to_metadata(tok))
    for text in (text.lstrip() for text in TEXTS[:17]):  # Metaspace adds no space before text that begins with one
        assert back.encode(text, disallowed_special=()) == tok.encode(text, disallowed_special=()), text


def test_characters_come_back_as_characters():
    chars = tokenizers.train("chars", TEXTS)
    assert from_metadata(to_metadata(chars)) == chars
    more = tokenizers.extend(chars, ["<|im_end|>"]).replace(eos_ids=(chars.vocab_size,))
    assert from_metadata(to_metadata(more)) == more
    assert to_metadata(more)[KEY + "eos_token_id"] == chars.vocab_size


def test_kinds_without_a_place_in_a_gguf_file_are_refused():
    for kind in ("words", "wordpiece", "unigram"):
        with pytest.raises(UserError, match=f"{kind} tokenizer cannot go into.*tokenizer.name=bpe"):
            to_metadata(tokenizers.train(kind, ["low lower lowest"] * 3, 600))
    data = from_metadata(sentencepiece()).data()["tokenizer"]
    for change in ({"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": {"type": "NFKC"}}):
        with pytest.raises(UserError, match="cannot go into a GGUF file"):
            to_metadata(hf.from_hf(json.dumps(data | change)))
    model = data["model"] | {"merges": data["model"]["merges"][1:]}  # the only merge that forms "▁l"
    with pytest.raises(UserError, match="cannot go into a GGUF file"):
        to_metadata(hf.from_hf(json.dumps(data | {"model": model})))


def test_a_special_token_spelled_like_a_piece_is_refused():
    tok = tokenizers.extend(learned(), [learned().merges[0].replace(" ", "")])
    with pytest.raises(UserError, match="needs distinct tokens"):
        to_metadata(tok)


def test_words_that_no_merge_makes_need_llama3s_way():
    tokens = [*bpe.alphabet(), "low"]
    for scheme in ("llama3", "gpt2"):
        tok = bpe.BPE(tokens=tokens, special={}, scheme=scheme)
        if scheme == "llama3":
            assert from_metadata(to_metadata(tok)).encode("low") == [256] and tok.encode("low") == [256]
        else:
            with pytest.raises(UserError, match="'low'"):
                to_metadata(tok)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "bert"}, "expected gpt2 or llama, got 'bert'"),
        ({"model": None}, "model: expected str"),
        ({"pre": "tekken"}, "expected one of gpt-2, .*got 'tekken'"),
        ({"pre": 3}, "pre: expected str"),
        ({"tokens": None}, "tokens: expected a list"),
        ({"tokens": []}, "empty"),
        ({"tokens": ["a", "a"]}, "duplicate"),
        ({"tokens": np.zeros(4)}, "tokens: expected a list"),
        ({"token_type": np.zeros(3, np.int32)}, "token_type: expected 505 numbers"),
        ({"token_type": ["a"] * 505}, "token_type: expected 505 numbers"),
        ({"merges": None}, "merges: expected a list"),
        ({"merges": ["a b", "zzz y"]}, "merges"),
        ({"bos_token_id": 505}, "bos_id: expected an id in 0 .. 504"),
        ({"eos_token_id": 2**32 - 1}, "eos_ids"),
        ({"eos_token_id": "0"}, "eos_token_id: expected int"),
        ({"add_bos_token": np.zeros(2)}, "add_bos_token: expected bool"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        from_metadata(byte_level("gpt-2", **change))


def test_sentencepiece_without_scores_is_refused():
    metadata = sentencepiece()
    with pytest.raises(UserError, match="scores: expected"):
        from_metadata(metadata | {KEY + "scores": np.full(len(metadata[KEY + "tokens"]), np.nan)})
    del metadata[KEY + "scores"]
    with pytest.raises(UserError, match="scores is missing"):
        from_metadata(metadata)


@pytest.mark.parametrize("make", [lambda: byte_level("gpt-2"), sentencepiece], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [["a" * 513], ["a" * 510 + chr(0x4E00 + i) for i in range(10_000)]])
def test_more_text_than_any_vocabulary_has_is_refused(make, tokens):
    with pytest.raises(UserError, match="at most 512 and 4194304 are supported"):
        from_metadata(make() | {KEY + "tokens": tokens, KEY + "token_type": np.ones(len(tokens), np.int32)})


def test_more_ways_to_join_than_any_vocabulary_has_are_refused():
    tokens = [char * i for char in "abcdefghijklmn" for i in range(1, 400)]
    metadata = {KEY + "model": "llama", KEY + "tokens": tokens, KEY + "scores": np.zeros(len(tokens), np.float32)}
    with pytest.raises(UserError, match="more than 1048576 pairs of pieces"):
        from_metadata(metadata)


VALUES = [None, 1, -1, 2**32, 0.5, "", "a", "\ud800", [], ["a"], ["a b"], [1], np.zeros(3), np.array(["a"]), True, b"x"]


@pytest.mark.parametrize("make", [lambda: byte_level("llama-bpe"), sentencepiece], ids=["gpt2", "llama"])
def test_changed_metadata_load_or_are_refused(make, capfd):
    rng, loaded = random.Random(1), 0
    for _ in range(700):
        metadata = make()
        for key in rng.sample(sorted(metadata), rng.randint(1, 2)):
            value = metadata[key]
            if not isinstance(value, list | np.ndarray) or rng.random() < 0.3:
                metadata[key] = rng.choice(VALUES)
            elif isinstance(value, list):
                metadata[key] = value.copy()
                metadata[key][rng.randrange(len(value))] = rng.choice([*VALUES, value[0], value[-1]])
            else:
                metadata[key] = np.roll(value, rng.randint(0, 2))
        try:
            tok = from_metadata(metadata)
            loaded += 1
            tok.decode(tok.encode("low lower é", disallowed_special=()))
        except UserError:
            pass
    assert 0 < loaded < 700
    capfd.readouterr()


# --- llama.cpp


class LlamaCpp:
    """llama.cpp's tokenizer, through the HTTP server of `xllamacpp`."""

    def __init__(self, path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.warmup = str(path), 64, False
        self.server = xllamacpp.Server(params)

    def encode(self, text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
        request = urllib.request.Request(self.server.listening_address + "/tokenize", body)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]


def agrees(tokenizer, path, texts) -> None:
    theirs = LlamaCpp(path)
    for text in texts:
        try:
            ids = tokenizer.encode(text, allowed_special="all")
        except UserError:
            assert tokenizer.kind == "chars"
            continue
        assert theirs.encode(text, True) == ids, text
        assert theirs.encode(text, False) == tokenizer.encode(text, disallowed_special=()), text


def write(path, tokenizer) -> None:
    """Write a GGUF model with this vocabulary and one narrow layer."""
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 1, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in sizes.items()}}
    square = [
        f"blk.0.{name}.weight"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]
    rows = [f"{name}.weight" for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")]
    shapes = (
        {"token_embd.weight": (tokenizer.vocab_size, 32)} | dict.fromkeys(square, (32, 32)) | dict.fromkeys(rows, (32,))
    )
    tensors = [(name, shape, "F32", functools.partial(np.ones, shape, np.float32)) for name, shape in shapes.items()]
    gguf.write(path, metadata | to_metadata(tokenizer), tensors)


OUT = {
    "bpe": lambda: tokenizers.extend(learned(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "smollm": lambda: from_metadata(byte_level("smollm")),
    "llama3": lambda: from_metadata(byte_level("llama-bpe")),
    "bytes": lambda: tokenizers.load("bytes"),
    "chars": lambda: tokenizers.extend(tokenizers.train("chars", TEXTS), ["<|endoftext|>", "<|im_end|>"]),
    "sentencepiece": lambda: from_metadata(sentencepiece()),
    "sentencepiece-without-prefix": lambda: from_metadata(sentencepiece(False)),
}


@pytest.mark.parametrize("kind", OUT)
def test_llama_cpp_gives_the_same_ids(kind, tmp_path):
    tok, path = OUT[kind](), tmp_path / "model.gguf"
    write(path, tok)
    agrees(tok, path, TEXTS + _more_texts(60))
    back = tokenizers.load(path)
    assert (back.kind == "chars") == (kind == "chars")
    assert back.encode("low 12345 lower") == tok.encode("low 12345 lower")


@pytest.fixture(scope="module")
def smollm2():
    try:
        return assets.fetch("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"asset smollm2-135m-instruct is neither cached nor reachable here: {str(error).splitlines()[0]}")


def test_smollm2(smollm2):
    metadata = gguf.read(smollm2).metadata
    tok = tokenizers.load(smollm2)
    assert (tok.kind, tok.scheme, tok.vocab_size) == ("bpe", "smollm", 49152)
    assert (tok.bos_id, tok.eos_ids, tok.eot_id, tok.pad_id, tok.add_bos) == (1, (2,), 0, 2, False)
    assert tok.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tok.encode(" Paris") == [7042] and tok.encode(" the") == [260] and tok.encode(" London") == [4528]
    assert tok.merges == metadata[KEY + "merges"]  # merges are derived from the tokens
    assert tokenizers.loads(tok.dumps()) == tok
    back = to_metadata(tok)
    for key, value in back.items():
        assert np.array_equal(metadata[key], value), key


def test_smollm2_in_llama_cpp(smollm2):
    agrees(tokenizers.load(smollm2), smollm2, TEXTS + _more_texts(150))


# Run in a subprocess: after much work by JAX in one process, shutting down the server hangs (xllamacpp 2026.10).
CHAT = """
import os, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 64, False
server = xllamacpp.Server(params)
request = urllib.request.Request(server.listening_address + "/apply-template", sys.argv[2].encode())
print("\\n" + urllib.request.urlopen(request, timeout=30).read().decode(), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("style", ["alpaca", "chatml", "phi3"])
def test_llama_cpp_writes_the_style_that_a_tuned_model_keeps(style, tmp_path):
    """Template markers that the vocabulary lacks are plain text, and every answer ends with end-of-text. This also
    works for a file named phi3, a name for which llama.cpp requires certain tokens."""
    pytest.importorskip("xllamacpp")
    import jax

    import gptjax
    from gptjax.tokenizers.chat import styled

    cfg = gptjax.ModelConfig(arch="llama", n_layer=1, n_head=2, d_model=32, d_ff=32, context_length=64, vocab_size=257)
    tokenizer = styled(tokenizers.load("bytes"), style)
    path = gptjax.weights.export_gguf(
        tmp_path / f"{style}.gguf", gptjax.init_params(jax.random.key(0), cfg), cfg, tokenizer
    )
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc", strict=True)]
    command = [sys.executable, "-c", CHAT, path, json.dumps({"messages": talk})]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1])["prompt"] == chat.apply(tokenizer, talk), done.stderr.decode()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_model_with_more_rows_than_tokens(kind, tiny, tmp_path):
    """llama.cpp loads the file and gives the same ids; loaded again, the tokenizer has no padding tokens."""
    from gptjax.weights import export_gguf, load

    tok, path = OUT[kind](), tmp_path / "model.gguf"
    tok = tok.replace(eos_ids=(2,)) if kind == "sentencepiece" else tok
    cfg, params = tiny("llama", vocab_size=tok.vocab_size + 9, context_length=64)
    export_gguf(path, params, cfg, tok)
    assert load(path)[1].vocab_size == cfg.vocab_size
    back = tokenizers.load(path)
    assert back.vocab_size == tok.vocab_size and not any("[PAD" in name for name in back.special_tokens)
    for text in TEXTS[:5]:
        assert back.encode(text) == tok.encode(text)
    smaller_cfg, smaller = tiny("llama", vocab_size=tok.vocab_size - 1, context_length=64)
    with pytest.raises(UserError, match=f"the tokenizer has {tok.vocab_size} ids, the model {tok.vocab_size - 1} rows"):
        export_gguf(tmp_path / "small.gguf", smaller, smaller_cfg, tok)
    agrees(tok, path, TEXTS)


def test_only_unused_tokens_called_after_their_ids_are_padding():
    tok = tokenizers.extend(learned(), ["<|endoftext|>", "[PAD7]"])
    assert (
        from_metadata(gguf_tokenizer.padded(to_metadata(tok), tok.vocab_size + 3)).special_tokens == tok.special_tokens
    )
    clash = tokenizers.extend(learned(), ["<|endoftext|>", f"[PAD{tok.vocab_size}]"])
    with pytest.raises(UserError, match="are tokens already"):
        gguf_tokenizer.padded(to_metadata(clash), tok.vocab_size + 3)
