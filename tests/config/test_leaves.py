"""Reading settings from YAML, command lines and dicts: mistakes and malicious files."""

import time

import pytest

from gptjax.config import from_dict, load_config
from gptjax.errors import UserError


def test_a_flag_takes_the_next_argument():
    assert load_config(None, "--optim.lr", "2e-3", "seed=4").optim.lr == 2e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  n_layer: 2\n n_head: 3\n", "x.yaml:3"),
        ("optim: {lr: 1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "x.yaml:2: seed is set twice, first in line 1"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("just words\n", "expected `key: value` lines"),
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("seed: \x01\n", "x.yaml:1: a control character"),
        ("data:\n  source: {a: b}\n", "unknown key data.source.a"),
        ("data:\n  source: [[a]]\n", "flat list"),
        ("optim: 3\n", "group of settings"),
        ("? [a]\n: 1\n", "expected a name"),
        ("base: [a, b]\n", "one preset or file"),
        ("base: nothing-here\n", "no preset"),
        ("seed: !!python/object:os.system 1\n", "is not supported"),
    ],
)
def test_bad_yaml(complaint, write, tmp_path, text, words):
    assert words in complaint(write(tmp_path, "x.yaml", text))


LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases expand to"),
        (MERGES, "aliases expand to"),
        ("a: &a {b: *a}\n", "an alias that contains itself"),
        ("a: &a [*a]\n", "an alias that contains itself"),
        ("".join(" " * i + "a:\n" for i in range(600)), "more than 16 levels"),
        ("".join(" " * i + "a:\n" for i in range(40)), "more than 16 levels"),
        ("data: {source: " + "[" * 2000, "more than 16 levels"),
        ("data: {source: " + "[" * 20 + "]" * 20 + "}", "more than 16 levels"),
        ("{" * 2000, "more than 16 levels"),
        ("<<: 5\n", "not valid YAML: expected a mapping"),
        ("<<: [5]\n", "not valid YAML: expected a mapping"),
        ("".join(f"key{i}: 1\n" for i in range(800)), "more than 500 settings"),
        ("a" * 1000 + ": 1\n", "expected a name of at most 200 characters"),
        ("seed: " + "1" * (1 << 18), "a config can have at most 262,144"),
        ("train: {batch_size: " + "9" * 400 + "}", "train.batch_size (9"),
        ("train: {batch_size: " + "9" * 9000 + "}", "expected int"),
        ("optim: {lr: " + "9" * 400 + "}", "optim.lr"),
    ],
    ids=range(17),
)
def test_malicious_yaml_gives_an_error_within_a_second(write, tmp_path, text, words):
    path = write(tmp_path, "x.yaml", text)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        load_config(path)
    assert time.process_time() - start < 1.0
    assert words in str(error.value) and len(str(error.value)) < 2000


def test_aliases_and_merge_keys_are_supported(write, tmp_path):
    text = "optim: &o {lr: 1e-2}\nmodel: {n_layer: &n 3, n_head: *n, d_model: 12}\n"
    cfg = load_config(write(tmp_path, "x.yaml", text))
    assert (cfg.optim.lr, cfg.model.n_layer, cfg.model.n_head) == (1e-2, 3, 3)


def test_deeply_nested_dicts_are_refused():
    deep: dict = {"n_layer": 1}
    for _ in range(900):
        deep = {"model": deep}
    with pytest.raises(UserError, match="more than 16 levels"):
        from_dict(deep)


def test_files_that_are_not_utf8_or_missing_are_refused(complaint, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    assert "UTF-8" in complaint(path)
    path.write_bytes("seed: 1\n".encode("utf-16"))
    assert "UTF-16 by its byte order mark FF FE" in complaint(path)
    assert "no such config file" in complaint(tmp_path / "absent.yaml")
    assert "did you mean tiny-gpt2?" in complaint("tiny-gpt3")
