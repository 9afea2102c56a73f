"""tokenizer.json of Hugging Face: the same ids as `tokenizers` and transformers; invalid files are refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import random
import time

import pytest
from tokenizers import Tokenizer, trainers

from gptjax import tokenizers
from gptjax.errors import UserError
from gptjax.tokenizers import bpe, hf
from gptjax.tokenizers.patterns import SCHEMES

END, TURN = "<|endoftext|>", "<|im_end|>"
HARD = [
    "The capital of France is", " ", "   a", "a   ", "\n\n", "a\r\nb\r\n\r\nc", " \n \n x", "\t\tx\t", "x \n\n  1",
    "\n\n42", "12345678901234567890 3.14159 1,000 x1y22z333 4444", "½ ¼ Ⅷ ٣٤٥ 一二三 ²³", "   7", "a  9 b",
    "\u00a05 \u30005",
    "It's, they'RE, we'Ll I'D you'vE can'T 'S '\u017f o'clock ''",
    "naïve Straße żółć Ελληνικά русский עברית हिन्दी ไทย",
    "日本語 中文 한국어 \u1100\u1161\u11a8", "e\u0301 vs é  A\u030a \u212b", "😀👩‍👩‍👧‍👦🏳️‍🌈🇫🇷👍🏽 ok",
    "\U0001d518\U0001d52b\U0001d526 𐍈 \U000e0001 \U00040001x\U000c0000", "a!\n\nb?\r\n\r\n", " !\n", "x\x04y",
 
 
 
    'def f(x):\n    return x**2  # ok\n\n\tif x>=1:\n\t\tprint(f"{x:>10}")\n',
    "for (int i=0;i<n;++i){a[i]+=b[i]<<2;}\n/*c*/",
    "https://example.com/a?b=c&d=%20#frag C:\\dir\\file.txt",
    "\u2028\u2029\u200b\u200d\ufeff x\u00a0y \x85x \x0b\x0c y",
    "\x00\x01\x04\x06\x1b[0m\x7f", "_snake_case__ CamelCase", "!!!???...---***", "<|im_end", "<| endoftext |>",
    f"{END}", f"x<|im_start|>user\nhi{TURN}\n", f"{TURN}{TURN}", f"{TURN}\u0338 x", "<think>a <think>", "a" * 300,
    " " * 100 + "x", "\n" * 50 + "x", "\u0301\u0301a", "\uff46\uff55\uff4c\u3000\uff11\uff12", "ǅ ǈ ʰ ª º",
    "I\u0307 \u0131 İ K", " " * 700 + "5", "!" + "\n" * 600 + "x", "a" + " \n" * 400 + " x", "\u3000" * 600 + "é",
    "\t" * 520, " " * 600 + "\r",
]  # fmt: skip


def _texts(seed: int, n: int) -> list[str]:
    """n random texts that mix pieces of many alphabets."""
    rng = random.Random(seed)
    pools = [
        "abcdefgABC", " \t\n\r", "0123456789", ".,;:!?'\"(){}<>|/\\-_=+*&", "éüñßç", "абв", "日本한", "😀👍🏽\u200d",
        "\u0301\u0308", "\u00a0\u3000\u2028", "٣½Ⅻ²",
    ]  # fmt: skip
    words = ["'s", "'LL", " the", "ing", TURN, END, "<think>", "    "]

    def piece() -> str:
        return "".join(rng.choices(rng.choice(pools), k=rng.randint(1, 6))) + (rng.random() < 0.2) * rng.choice(words)

    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(n)]


@functools.cache
def trained(scheme: str, nfc: bool = False) -> str:
    """A tokenizer.json with 700 tokens, the first three of them special, and two added tokens after them."""
    components = hf.byte_level_parts(scheme, nfc)
    learner = Tokenizer.from_str(json.dumps({"added_tokens": [], **components, "model": hf.bpe_model({}, [], False)}))
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=list(bpe.alphabet()), special_tokens=[END, "<|im_start|>", TURN],
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator([text.replace("<|", "") for text in HARD * 3 + _texts(1, 300)], trainer)
    data = json.loads(learner.to_str())
    size = len(data["model"]["vocab"])
    data["added_tokens"] += [hf.added_token("<think>", size, False), hf.added_token("    ", size + 1, False)]
    return json.dumps(data)


def assert_same_ids(tokenizer, reference, texts) -> None:
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, allowed_special="all") == ids, text
        assert tokenizer.encode_array(text, allowed_special="all").tolist() == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("scheme", "nfc"), [("gpt2", False), ("smollm", False), ("llama3", False), ("qwen2", True), ("gpt2", True)]
)
def test_byte_level_bpe_runs_in_tiktoken_with_the_same_ids(scheme, nfc):
    text = trained(scheme, nfc)
    tok = hf.from_hf(text, {"eos_token": TURN})
    assert tok.kind == "bpe" and tok.scheme == scheme
    assert (tok.eot_id, tok.eos_ids) == (0, (2,)) and dict(tok.added_tokens) == {"<think>": 700, "    ": 701}
    assert_same_ids(tok, Tokenizer.from_str(text), HARD + _texts(2, 400))


def test_every_block_of_unicode_is_cut_the_same_way():
    pairs = [(hf.from_hf(trained(s)), Tokenizer.from_str(trained(s))) for s in ("gpt2", "smollm", "llama3", "qwen2")]
    ranges = [(1, 0x800, 1), (0x800, 0x3000, 7), (0x3000, 0xD800, 101), (0xE000, 0x110000, 997)]
    points = [point for where in ranges for point in range(*where)]
    for start in range(0, len(points), 100):
        text = "".join(f"a{c}a {c} {c}{c}1{c}!{c}\n{c}  x" for c in map(chr, points[start : start + 100]))
        for tok, reference in pairs:
            assert tok.encode(text) == reference.encode(text, add_special_tokens=False).ids, hex(points[start])


def test_bytes_that_are_no_token_are_left_out_as_tokenizers_does():
    data = json.loads(trained("smollm"))
    vocab = data["model"]["vocab"]
    gone = [char for char, byte in bpe.alphabet().items() if byte in (*b"\x04\x06\x1b", 0xF1)]
    kept = [token for token in sorted(vocab, key=vocab.get) if not set(gone) & set(token)]
    data["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if "".join(pair) in data["model"]["vocab"]]
    for token in data["added_tokens"][3:]:
        token["id"] -= len(vocab) - len(kept)
    tok = hf.from_hf(json.dumps(data))
    assert tok.kind == "bpe" and tok.encode("\x04") == []
    assert_same_ids(
        tok, Tokenizer.from_str(json.dumps(data)), [*HARD, "!\x04!", "\x04\x04 \x04\n", " \x04x\x06", "\U00040000"]
    )


def _random_vocabulary(rng: random.Random) -> dict:
    """A random BPE vocabulary over a and b: its merges are in order, redundant, exhaustive or shuffled, and some tokens
    are formed by no merge."""
    vocab = {char: i for i, char in enumerate(bpe.alphabet())}
    pieces, merges = ["a", "b"], []
    mode = rng.choice(["in order", "doubled", "all", "any order"])
    for _ in range(rng.randint(1, 10)):
        left, right = rng.choice(pieces), rng.choice(pieces)
        if len(left + right) <= 7 and (left + right not in vocab or mode in ("doubled", "any order")):
            vocab.setdefault(left + right, len(vocab))
            pieces.append(left + right)
            merges += [[left, right]] if [left, right] not in merges else []
    for word in {"".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(rng.randint(0, 2))} - vocab.keys():
        vocab[word] = len(vocab)
    if mode == "all":
        cuts = [(word[:position], word[position:]) for word in vocab for position in range(1, len(word))]
        merges = [[left, right] for left, right in cuts if left in vocab and right in vocab]
    if mode == "any order":
        rng.shuffle(merges)
    model = hf.bpe_model(vocab, merges, rng.random() < 0.5)
    return {"added_tokens": [], **hf.byte_level_parts("gpt2", False), "model": model}


def test_tiktoken_is_used_only_where_it_is_the_same():
    """Checks the three conditions in hf.py, and the merges derived in an export, on all words of up to 7 letters."""
    words = ["".join(letters) for n in range(1, 8) for letters in itertools.product("ab", repeat=n)]
    kinds = {"bpe": 0, "hf": 0}
    for seed in range(200):
        data = _random_vocabulary(random.Random(seed))
        tok, reference = hf.from_hf(json.dumps(data)), Tokenizer.from_str(json.dumps(data))
        kinds[tok.kind] += 1
        if tok.kind == "bpe":
            expected = [ids.ids for ids in reference.encode_batch(words, add_special_tokens=False)]
            assert [tok.encode(word) for word in words] == expected, seed
            exported = Tokenizer.from_str(hf.to_hf(tok)["tokenizer.json"])
            assert [ids.ids for ids in exported.encode_batch(words, add_special_tokens=False)] == expected, seed
    assert min(kinds.values()) > 50


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"decoder": None},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"byte_fallback": True}},
        {"added_tokens": {"lstrip": True}},
        {"added_tokens": {"rstrip": True}},
        {"added_tokens": {"single_word": True}},
    ],
    ids=str,
)
def test_everything_else_runs_in_tokenizers(change):
    data = json.loads(trained("gpt2"))
    for key, value in change.items():
        if key == "model":
            data["model"] |= value
        elif key == "added_tokens":
            data["added_tokens"][2] |= value
        else:
            data[key] = value
    tok = hf.from_hf(json.dumps(data))
    assert tok.kind == "hf" and tokenizers.loads(tok.dumps()) == tok
    assert_same_ids(tok, Tokenizer.from_str(json.dumps(data)), HARD[:40])


def _replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


TEN = _replace({"String": "a"}, "a" * 10)
NESTED = {"type": "Sequence", "normalizers": [TEN]}
for _ in range(11):
    NESTED = {"type": "Sequence", "normalizers": [TEN, NESTED]}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("normalizer", NESTED, "nested"),
        ("normalizer", {"type": "Sequence", "normalizers": [TEN] * 12}, "2,000,000,000,000 characters per"),
        ("normalizer", _replace({"Regex": ""}, "b" * 5000), "10,002 characters"),
        ("normalizer", {"type": "Prepend", "prepend": "b" * 5000}, "10,002 characters"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}, "at most 32"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 12}, "4,096 characters"),
        ("decoder", {"type": "Sequence", "decoders": [TEN] * 12}, "decoder: 1,000,000,000,000 characters"),
    ],
)
def test_chains_that_blow_texts_up_are_refused(key, value, words):
    data = json.loads(trained("gpt2")) | {key: value}
    with pytest.raises(UserError) as error:
        hf.from_hf(json.dumps(data))
    assert words in str(error.value)


def test_chains_of_real_tokenizers_are_read():
    """The normalizers of Llama 2, Gemma and XLM-R, with a decoder that replaces their space marker."""
    chains = {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, _replace({"String": " "}, "\u2581"), {"type": "NFKC"},
            _replace({"Regex": " {2,}"}, "\u2581"),
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            _replace({"String": "\u2581"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
    }  # fmt: skip
    data = json.loads(trained("gpt2")) | chains
    assert hf.from_hf(json.dumps(data)).kind == "hf"


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_other_models_run_in_tokenizers_too(kind):
    words = ["[UNK]", "low", "er", "##er", "the"]
    vocab = (
        [[word, -float(i)] for i, word in enumerate(words)]
        if kind == "Unigram"
        else {w: i for i, w in enumerate(words)}
    )
    more = {"unk_id": 0} if kind == "Unigram" else {"unk_token": "[UNK]"}
    more |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    data = {"added_tokens": [hf.added_token("[UNK]", 0, True)], "pre_tokenizer": {"type": "Whitespace"}}
    tok = hf.from_hf(json.dumps(data | {"model": {"type": kind, "vocab": vocab, **more}}))
    assert (tok.kind, tok.vocab_size) == ("hf", 5)
    assert tok.encode("the low nothing")[:2] == [4, 1] and tokenizers.loads(tok.dumps()) == tok


def test_some_special_tokens_as_ids_and_others_as_text():
    data = json.loads(trained("gpt2")) | {"decoder": None}
    tok = hf.from_hf(json.dumps(data))
    assert tok.kind == "hf"
    for allowed in ((), {END}, {END, TURN}, "all"):
        ids = tok.encode(f"a{END}b{TURN}c", allowed_special=allowed, disallowed_special=())
        assert (0 in ids, 2 in ids) == (END in allowed or allowed == "all", TURN in allowed or allowed == "all")


# --- folders


def write(folder, **files) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_folder_says_what_begins_and_ends(tmp_path):
    write(
        tmp_path,
        tokenizer_json=trained("llama3"),
        special_tokens_map_json={"pad_token": {"content": "<|im_start|>"}, "eos_token": END},
        tokenizer_config_json={
            "bos_token": END,
            "eos_token": {"content": TURN},
            "add_bos_token": True,
            "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}],
        },
        config_json={"eos_token_id": 5},
        generation_config_json={"eos_token_id": [2, 0]},
    )
    tok = tokenizers.load(tmp_path)
    assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.add_bos, tok.chat_template) == (0, (2, 0), 1, True, "yes")
    assert tokenizers.load(tmp_path / "tokenizer.json") == tok
    write(tmp_path, chat_template_jinja="{{ 1 }}\n")
    assert tokenizers.load(tmp_path).chat_template == "{{ 1 }}\n"
    tok.save(tmp_path / "ours")
    assert tokenizers.load(tmp_path / "ours") == tok


def test_the_begin_token_may_be_named_by_the_last_step_only():
    data = json.loads(trained("llama3"))
    begin = {"SpecialToken": {"id": END, "type_id": 0}}
    step = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    for after, adds in [
        (step, True),
        ({"type": "Sequence", "processors": [byte_level, step]}, True),
        (byte_level, False),
    ]:
        tok = hf.from_hf(json.dumps(data | {"post_processor": after}), {"bos_token": END})
        assert (tok.bos_id, tok.add_bos) == (0, adds)
    assert hf.from_hf(json.dumps(data), generation_config={"bos_token_id": 1}).bos_id == 1
    assert hf.from_hf(json.dumps(data), {"bos_token": None}, generation_config={"bos_token_id": 1}).bos_id is None


def test_gpt2_files_without_a_tokenizer_json(tmp_path, gpt2):
    names = sorted(gpt2.ranks, key=gpt2.ranks.get)
    vocab = {bpe.printable(name): i for i, name in enumerate(names)} | {END: 50256}
    write(
        tmp_path,
        vocab_json=vocab,
        merges_txt="#version: 0.2\n" + "\n".join(gpt2.merges) + "\n",
        config_json={"eos_token_id": 50256},
    )
    tok = tokenizers.load(tmp_path)
    assert (tok.kind, tok.vocab_size, tok.eot_id, tok.eos_ids) == ("bpe", 50257, 50256, (50256,))
    assert tok.merges == gpt2.merges
    for text in HARD:
        assert tok.encode(text, allowed_special="all") == gpt2.encode(text, allowed_special="all")


def test_merges_are_cut_at_line_feeds_alone(tmp_path):
    """merges.txt is not split at U+2028 or U+0085, which tokens may contain; a UTF-16 file is refused by name."""
    pieces = ["a", "\u2028", "\x85", "a\u2028", "a\u2028\x85"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = "#version: 0.2\r\na \u2028\r\na\u2028 \x85\r\n"
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(merges.encode())
    assert hf._slow_files(tmp_path, {}, "gpt2")["model"]["merges"] == [["a", "\u2028"], ["a\u2028", "\x85"]]
    (tmp_path / "vocab.json").write_bytes(json.dumps(vocab).encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16 by its byte order mark FF FE"):
        tokenizers.load(tmp_path)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b")
    with pytest.raises(UserError, match="save_pretrained"):
        tokenizers.load(tmp_path)


# --- out


OUT = {
    "gpt2-like": lambda: tokenizers.train("bpe", HARD, 400),
    "extended": lambda: tokenizers.extend(tokenizers.train("bpe", HARD, 400), ["<|im_start|>", TURN]),
    "loaded": lambda: hf.from_hf(trained("smollm"), {"bos_token": "<|im_start|>", "eos_token": TURN, "pad_token": END}),
    "begins": lambda: hf.from_hf(trained("llama3"), {"bos_token": "<|im_start|>", "add_bos_token": True}),
    "qwen2": lambda: hf.from_hf(trained("qwen2", True), {"eos_token": END, "chat_template": "{{ messages }}"}),
    "bytes": lambda: tokenizers.load("bytes"),
    "chars": lambda: tokenizers.train("chars", HARD),
    "chars-extended": lambda: tokenizers.extend(tokenizers.train("chars", HARD), [END]),
    "hf": lambda: hf.from_hf(json.dumps(json.loads(trained("gpt2")) | {"decoder": None}), {"eos_token": TURN}),
}


@pytest.mark.parametrize("kind", OUT)
def test_out_is_the_same_in_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = OUT[kind]()
    for name, content in hf.to_hf(tok).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = tokenizers.load(tmp_path)
    for text in HARD:
        ids = tok.encode(text, allowed_special="all")
        assert theirs.encode(text, add_special_tokens=False) == ids == back.encode(text, allowed_special="all"), text
        if kind != "hf":  # this one has no decoder
            assert theirs.decode(ids) == tok.decode(ids) == back.decode(ids)
    begin = [tok.bos_id] if tok.add_bos else []
    assert theirs.encode("The low") == [*begin, *tok.encode("The low", disallowed_special=())]
    assert len(theirs) == tok.vocab_size and theirs.chat_template == tok.chat_template
    assert theirs.eos_token_id == (tok.eos_ids[0] if tok.eos_ids else tok.eot_id)
    assert (theirs.bos_token_id, theirs.pad_token_id) == (tok.bos_id, tok.pad_id)
    assert (back.bos_id, back.pad_id, back.add_bos, back.eot_id) == (tok.bos_id, tok.pad_id, tok.add_bos, tok.eot_id)


def test_tokens_out_of_the_vocabulary_stay_an_error_for_characters(tmp_path):
    for name, content in hf.to_hf(tokenizers.train("chars", ["abc"])).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="WordLevel"):
        tokenizers.load(tmp_path).encode("abcd")


def test_an_ordinary_token_does_not_become_a_special_one():
    tok = OUT["hf"]()
    assert tok.kind == "hf"
    word = next(name for name in ("th", "er", "in", "an", "e") if len(tok.encode(name)) == 1)
    with pytest.raises(UserError, match="is a token already"):
        tokenizers.extend(tok, [word])
    assert tokenizers.extend(tok, ["<|new|>"]).special_tokens["<|new|>"] == tok.vocab_size


@pytest.mark.parametrize("kind", ["words", "wordpiece", "unigram"])
def test_kinds_that_no_tokenizer_json_describes_are_refused(kind):
    with pytest.raises(UserError, match=f"{kind} tokenizer has no exact.*tokenizer.name=bpe"):
        hf.to_hf(tokenizers.train(kind, ["low lower lowest"] * 3, 600))


# --- hostile files


@functools.cache
def small() -> dict:
    """The data of a small byte-level BPE tokenizer: a few letters and merges, two special tokens."""
    merges = [["l", "o"], ["lo", "w"], ["e", "r"], ["Ġ", "low"], ["e", "s"], ["es", "t"]]
    tokens = [*"lowerst!aĠ", *map("".join, merges), END, TURN]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    data = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    data["added_tokens"] = [hf.added_token(name, vocab.pop(name), True) for name in (END, TURN)]
    return data | hf.byte_level_parts("gpt2", False) | {"model": hf.bpe_model(vocab, merges, False)}


def _with(**changes):
    data = copy.deepcopy(small())
    for path, value in changes.items():
        *parents, last = path.split("__")
        functools.reduce(dict.__getitem__, parents, data)[last] = value
    return data


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _vocab(**entries) -> dict:
    return _with(model__vocab=small()["model"]["vocab"] | entries)


BAD = {
    "no model": (_with(model=None), "object with a model"),
    "a list": ([], "expected an object"),
    "no vocab": (_with(model__vocab=None), "model.vocab"),
    "vocab of texts": (_with(model__vocab={"a": "1"}), "model.vocab"),
    "true as id": (_vocab(x=True), "model.vocab"),
    "id twice": (_vocab(xx=5), "duplicate"),
    "id -1": (_vocab(xx=-1), "gaps"),
    "id 2^32-1": (_vocab(xx=2**32 - 1), "gaps.*4294967295"),
    "id 2^63": (_vocab(xx=2**63), "gaps"),
    "a gap": (_vocab(xx=len(small()["model"]["vocab"]) + 9), "gaps"),
    "lone surrogate": (_vocab(**{"\ud800": len(small()["model"]["vocab"]) + 2}), "."),
    "merge of unknown": (_with(model__merges=[["l", "Q9"]]), "merges\\[0\\]"),
    "merge to unknown": (_with(model__merges=[["w", "l"]]), "merges\\[0\\].*not in the vocabulary"),
    "merge of three": (_with(model__merges=[["l", "o", "w"]]), "merges\\[0\\]"),
    "merges of numbers": (_with(model__merges=[1, None]), "merges\\[1\\]"),
    "merges no list": (_with(model__merges={}), "merges"),
    "dropout": (_with(model__dropout=0.1), "dropout"),
    "added no list": (_with(added_tokens={}), "added_tokens"),
    "added without id": (_with(added_tokens=[{"content": "x"}]), "added_tokens"),
    "added twice": (_with(added_tokens=[hf.added_token("x", 18, True)] * 2), "duplicate"),
    "added with another id": (_with(added_tokens=[hf.added_token("!", 18, True)]), "another"),
    "unknown parts": (_with(pre_tokenizer={"type": "Rot13"}), "."),
    "bad regex": (_with(pre_tokenizer=_split("(")), "."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name, tmp_path):
    data, says = BAD[name]
    with pytest.raises(UserError, match=says):
        hf.from_hf(json.dumps(data))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizers.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[" * 100_000, '{"model": {}, "model": {}}', json.dumps(small())[:-9]]
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(UserError):
        hf.from_hf(text)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as caught:
        hf.from_hf(json.dumps(_with(added_tokens={}, model__dropout=0.5, model__vocab={"a": 0, "b": 0})))
    assert all(word in str(caught.value) for word in ("added_tokens", "dropout", "duplicate"))


@pytest.mark.parametrize(
    ("config", "generation", "says"),
    [
        ({"eos_token": "</s>"}, {}, "eos_token '</s>' is not in the vocabulary"),
        ({}, {"eos_token_id": 10**6}, "eos_ids"),
        ({}, {"eos_token_id": [[1]]}, "eos_ids"),
        ({}, {"bos_token_id": "1"}, "bos_id"),
        ({"chat_template": 3}, {}, "chat_template"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, generation, says):
    with pytest.raises(UserError, match=says):
        hf.from_hf(json.dumps(small()), config, generation_config=generation)


def test_settings_that_cut_or_fill_texts_are_not_taken_over():
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 2**40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END,
    }
    tok = hf.from_hf(json.dumps(_with(truncation=cut, padding=fill, decoder=None)))
    assert tok.kind == "hf" and tok.encode("low lower") == hf.from_hf(json.dumps(small())).encode("low lower")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)*x"])
def test_a_pattern_that_never_ends_is_cut_short(pattern):
    tok = hf.from_hf(json.dumps(_with(pre_tokenizer=_split(pattern))))
    assert tok.kind == "hf"
    start = time.process_time()
    with contextlib.suppress(UserError):
        tok.encode("a" * 3000 + "!")
    assert time.process_time() - start < 15


def test_where_tokenizers_gives_up_an_error_comes():
    with pytest.raises(UserError, match="encode"):
        hf.from_hf(json.dumps(_with(pre_tokenizer=_split("(a+)+$")))).encode("a" * 3000 + "!")


@pytest.mark.parametrize(
    ("scheme", "text"),
    [("llama3", "a" * 2_000_000), ("smollm", "\n " * 1_000_000 + "1"), ("llama3", " " * 2_000_000 + "x")],
    ids=["letters", "lines", "blanks"],
)
def test_two_megabytes_without_a_break(scheme, text):
    tok = hf.from_hf(trained(scheme))
    start = time.process_time()
    ids = tok.encode_array(text)
    assert time.process_time() - start < 15 and tok.decode(ids) == text


# values that replace a random value of the file
VALUES = [
    None, True, 0, -1, 2**31, 2**32 - 1, 2**63, 1e308, float("nan"), "", "a", "\ud800", "Ġ" * 50, [], {}, [[]], [None],
    "x" * 999, {"type": "Sequence"}, {"type": "BPE"}, {"type": "ByteLevel"}, {"id": 1},
]  # fmt: skip
SNIPPETS = [b"null", b"[", b"}", b"1e999", b'"', b"\\ud800", b"4294967295"]


def _paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _change(data: dict, path: tuple, rng: random.Random) -> str:
    """The file's text with one value replaced, removed, duplicated or renamed, or with bytes changed."""
    data = copy.deepcopy(data)
    parent = functools.reduce(lambda inner, key: inner[key], path[:-1], data)
    key, what = path[-1], rng.randrange(4)
    if what == 0:
        parent[key] = rng.choice(VALUES)
    elif what == 1 and isinstance(parent, list):
        parent.insert(key, parent[rng.randrange(len(parent))])
    elif what == 2 and isinstance(parent, dict):
        parent[rng.choice(["type", "vocab", "merges", "normalized", "lstrip", "id"])] = parent.pop(key)
    else:
        del parent[key]
    return json.dumps(data)


def _scramble(text: str, rng: random.Random) -> str:
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 5)):
        position, what = rng.randrange(len(raw)), rng.randrange(4)
        if what == 0:
            raw[position] = rng.randrange(256)
        elif what == 1:
            del raw[position : position + rng.randint(1, 30)]
        else:
            raw[position:position] = (
                rng.choice(SNIPPETS) if what == 2 else raw[position : position + rng.randint(1, 40)]
            )
    return raw.decode(errors="replace")


@pytest.mark.slow
def test_ten_thousand_changed_files_load_or_are_refused(capfd):
    rng = random.Random(7)
    data, text = small(), json.dumps(small())
    paths = sorted(_paths(data), key=len)[1:]
    loaded, slowest = 0, 0.0
    for i in range(10_000):
        path = rng.choice(paths)
        changed = _change(data, path, rng) if i % 2 else _scramble(text, rng)
        start = time.process_time()
        try:
            tok = hf.from_hf(changed)
            loaded += 1
            tok.decode(tok.encode(f"low lower éa! {TURN}", disallowed_special=()))
        except UserError:
            pass
        slowest = max(slowest, time.process_time() - start)
    assert 1000 < loaded < 9000 and slowest < 2
    capfd.readouterr()  # `tokenizers` prints a message when it panics


def qwen_folder(folder, added_file: bool, **config):
    """The files of Qwen's slow tokenizer: vocab.json, merges.txt, and special tokens in other files."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SCHEMES["qwen2"].split), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["low lower lowest caf\u00e9 caf\u00e9 it's IT'S 12345 \n\n x = [1, 2]"] * 9,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False),
    )
    folder.mkdir()
    made.model.save(str(folder))
    n, names = made.get_vocab_size(), ["<|endoftext|>", "<|im_end|>", "<tool_call>"]
    body = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    body |= {"unk_token": None, "bos_token": None}
    if added_file:
        (folder / "added_tokens.json").write_text(json.dumps({name: n + i for i, name in enumerate(names)}))
    else:
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        body["added_tokens_decoder"] = {
            str(n + i): {"content": name, "special": i < 2} | flags for i, name in enumerate(names)
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(body | config))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("added_file", [True, False])
def test_the_slow_files_of_qwen(added_file, tmp_path):
    """Qwen's regular expression, NFC, and tokens that only tokenizer_config.json lists."""
    folder = qwen_folder(tmp_path / "q", added_file)
    tok = tokenizers.load(folder)
    assert tok.scheme == "qwen2" and tok.nfc
    assert tok.encode("e\u0301") == tok.encode("\u00e9") and len(tok.encode("12345")) == 5
    end, call = tok.vocab_size - 2, tok.vocab_size - 1
    assert tok.eos_ids == (end,) and tok.encode("a<tool_call>")[-1] == call
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (
        "e\u0301 caf\u0065\u0301",
        "12345 lower",
        "it's IT'S\n\n  x",
        " low\t\r\n",
        "a<tool_call>b<|im_end|>c",
    ):
        assert tok.encode(text, allowed_special="all") == theirs.encode(text, add_special_tokens=False), text


def test_other_slow_files_are_refused_by_their_class(tmp_path):
    folder = qwen_folder(tmp_path / "q", False, tokenizer_class="RobertaTokenizer")
    with pytest.raises(UserError, match="tokenizer_class='RobertaTokenizer'"):
        tokenizers.load(folder)
    prefix = qwen_folder(tmp_path / "p", False, add_prefix_space=True)
    with pytest.raises(UserError, match="add_prefix_space"):
        tokenizers.load(prefix)
    unnamed = qwen_folder(tmp_path / "u", False, tokenizer_class=None)
    (unnamed / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert tokenizers.load(unnamed).scheme == "qwen2"
    (unnamed / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    with pytest.raises(UserError, match="no tokenizer_class, and model_type='roberta'"):
        tokenizers.load(unnamed)
    wrong = qwen_folder(tmp_path / "w", False, added_tokens_decoder={"x": {"content": "<a>"}})
    with pytest.raises(UserError, match="added_tokens_decoder"):
        tokenizers.load(wrong)
