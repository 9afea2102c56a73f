"""`gptjax data check`: what it reports, what it does not report, and that its time is linear on adversarial text."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax import UserError
from gptjax.__main__ import main
from gptjax.data import quality

LONG = "the quick brown fox jumps over the lazy dog near the old stone bridge at noon on a bright day in May"


@pytest.fixture
def files(tmp_path):
    train = [LONG, "Hello  there", "other text altogether", LONG.replace("bright", "rainy")]
    test = ["hello there", "mail a.b@example.org now", "key AKIA" + "A1B2C3D4E5F6G7H8"]
    for name, texts in (("train.jsonl", train), ("test.jsonl", test)):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(tmp_path / name) for name in ("train.jsonl", "test.jsonl")]


def test_duplicates_within_and_across_files(files):
    report = quality.check([quality.records_of(file) for file in files], threshold=0.6)
    assert [(len(row["where"]), row["across"]) for row in report["exact"]] == [(2, True)]
    (near,) = report["near"]
    assert near["where"] == [f"{files[0]}:1", f"{files[0]}:4"] or near["where"] == [f"{files[0]}:4", f"{files[0]}:1"]
    assert near["similarity"] == pytest.approx(17 / 23) and not near["across"]
    assert {row["kind"] for row in report["sensitive"]} == {"e-mail address", "AWS key"}
    assert report["files"][0]["records"] == 4
    assert report["files"][0]["sha256"] == hashlib.sha256(Path(files[0]).read_bytes()).hexdigest()
    assert "near" in quality.check([quality.records_of(files[0])], threshold=None)


SECRETS = {
    "AWS key": "AKIAIOSFODNN7EXAMPLE",
    "GitHub token": "ghp_" + "a1B2" * 9,
    "OpenAI or Anthropic key": "sk-" + "abcd1234" * 4,
    "Slack token": "xoxb-123456789012-abcdef",
    "Google key": "AIza" + "Sy0-_" * 7,
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "JSON web token": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4",
    "e-mail address": "first.last+tag@mail.example.org",
    "IBAN": "GB82 WEST 1234 5698 7654 32",
    "card number": "4111 1111 1111 1111",
    "US social security number": "123-45-6789",
    "phone number": "+44 20 7946 0958",
    "public IP address": "8.8.4.4",
}


@pytest.mark.parametrize("kind", quality.PATTERNS)
def test_patterns(kind):
    text = f"before {SECRETS[kind]} after"
    findings = quality.sensitive([quality.Texts("f", [("f:1", text)])])
    assert [row[0] for row in findings] == [kind]
    assert SECRETS[kind] not in findings[0][2] and "*" in findings[0][2]


def test_ordinary_numbers_are_not_reported():
    text = (
        "On 2024-05-17 at 12:30 version 1.2.3 cost 1,234,567.89; 4111 1111 1111 1112, 192.168.0.1, 10.0.0.1, 999.1.1.1"
    )
    assert quality.sensitive([quality.Texts("f", [("f:1", text)])]) == []


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("unit", ["a", "1", "1 ", "a@", "a.", "eyJ", "+1", "GB82 "])
def test_time_on_adversarial_text_is_linear(unit):
    """A regular expression with quadratic time would exceed the test's time limit on one megabyte."""
    findings = quality.sensitive([quality.Texts("f", [("f:1", unit * (10**6 // len(unit)))])])
    assert {kind for kind, _, _ in findings} <= {"card number", "IBAN"}


def test_records_of_many_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n")
    assert [location.rsplit(":")[-1] for location, _ in quality.records_of(str(tmp_path / "a.txt")).records] == [
        "1",
        "5",
    ]
    (tmp_path / "a.tsv").write_text("ham\thello\n")
    assert quality.records_of(str(tmp_path / "a.tsv"), "text").records[0][1] == "hello"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "n": 3}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert quality.records_of(str(tmp_path / "a.json")).records[0][1] == "user\nhi\nassistant\nho"
    for name, text in (("b.jsonl", "{"), ("c.jsonl", '{"n": 1}'), ("d.xyz", "x")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError):
            quality.records_of(str(tmp_path / name))


def test_manifest_of_a_hub_data_set_has_no_bytes():
    report = quality.check([quality.Texts("hf:org/name", [("hf:org/name:1", "One."), ("hf:org/name:2", "Two.")])])
    assert report["files"] == [{"file": "hf:org/name", "records": 2, "characters": 8}]


def test_outliers():
    losses = np.array([2.0, 2.1, 1.9, 2.05, 9.0, 0.01, np.nan, 2.0])
    assert quality.outliers(losses) == [4, 5] and quality.outliers(np.ones(4)) == []


@pytest.fixture
def model(tmp_path):
    cfg = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=16, context_length=32, vocab_size=257)
    gptjax.save(tmp_path / "model", gptjax.init_params(jax.random.key(0), cfg), cfg, gptjax.tokenizers.load("bytes"))
    return tmp_path / "model"


@pytest.mark.slow
def test_losses_equal_those_of_each_text_alone(model):
    from gptjax.evaluation.perplexity import losses

    params, cfg = gptjax.load(model)
    tok = gptjax.tokenizers.load("bytes")
    texts = ["hello", "a", "a text longer than the context length, so that it is truncated", "hi there", "x"]
    packed_losses = losses(params, cfg, tok, texts)
    for text, loss in zip(texts, packed_losses, strict=True):
        ids = np.array(tok.encode(text)[:33])[None]
        if ids.shape[1] == 1:
            assert np.isnan(loss)
            continue
        logp = jax.nn.log_softmax(gptjax.forward(params, ids[:, :-1], cfg))
        expected = -np.take_along_axis(np.asarray(logp), ids[:, 1:, None], -1).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_verb(files, model, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main(["data", "check", *files, f"model={model}", "threshold=0.6", f"out={out}"]) == 0
    text = capsys.readouterr().out
    assert "1 groups of exact duplicates, 1 of them across files" in text and "1 pairs of near duplicates" in text
    assert "AKIAA1B2" not in text and "texts of unusual loss" in text
    report = json.loads(out.read_text())
    assert set(report) == {"files", "exact", "near", "sensitive", "outliers"}
    assert main(["data", "check", *files, "near=false"]) == 0
    assert "0 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected: gptjax data check FILE"),
        (["absent.jsonl"], "absent.jsonl: no such file"),
        (["x.txt", "treshold=1"], "unknown setting treshold"),
        (["x.txt", "threshold=2"], "at most 1, got '2'"),
        (["x.txt", "near=maybe"], "expected true or false"),
    ],
)
def test_mistakes(args, message, capsys):
    assert main(["data", "check", *args]) == 2
    assert message in capsys.readouterr().err
