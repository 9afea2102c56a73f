"""Metrics of generated answers: scores, win rate, constraints, and what `gptjax compare` writes."""

import json

import pytest

from gptjax import UserError
from gptjax.__main__ import main
from gptjax.evaluation.generation_metrics import (
    check_constraints,
    is_met,
    read,
    scores,
    side_by_side,
    token_f1,
    win_rate,
)


def rows(*answers, nats=1.0):
    return [
        {"where": str(i), "prompt": "p", "expected": "Two cats", "answer": a, "nats": nats, "tokens": 2}
        for i, a in enumerate(answers)
    ]


def test_scores():
    metrics = scores(rows("Two cats", " Two cats\n", "two  cats.", "three"))
    assert metrics.pop("exact_interval") == pytest.approx([0.15, 0.85], abs=1e-3)  # Wilson interval of 2 out of 4
    assert metrics.pop("normalised_interval")[1] < 1
    assert metrics == {"n": 4, "exact": 0.5, "normalised": 0.75, "token_f1": 0.75, "nats_per_token": 0.5}


@pytest.mark.parametrize(
    ("answer", "f1"), [("two cats", 1), ("cats", 2 / 3), ("Two, two cats!", 0.8), ("a dog", 0), ("", 0)]
)
def test_token_f1(answer, f1):
    assert token_f1(answer, "Two cats") == pytest.approx(f1)


def test_win_rate():
    better, worse = rows("x", "x", "x"), rows("x", "x", "x", nats=2.0)
    result = win_rate(better, worse)
    assert (result["n"], result["win_rate"]) == (3, 1) and result["win_rate_interval"][0] < 0.5
    assert win_rate(better, better)["win_rate"] == 0.5
    with pytest.raises(UserError, match="without nats"):
        win_rate(better, [{k: v for k, v in row.items() if k != "nats"} for row in better])
    worse[0]["nats"] = 0.5
    assert win_rate(better, worse)["win_rate"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no question in common"):
        win_rate(better, [row | {"where": "elsewhere"} for row in worse])


@pytest.mark.parametrize(
    ("kind", "value", "yes", "no"),
    [
        ("min_words", 2, "two words", "one"),
        ("max_words", 2, "two words", "these are three"),
        ("min_sentences", 2, "One. Two!", "One."),
        ("max_sentences", 1, "Pi is 3.14.", "One. Two."),
        ("paragraphs", 2, "one\nstill one\n\ntwo", "one\ntwo"),
        ("bullets", 2, "* a\n- b", "* a"),
        ("contains", "Cat", "a cat", "a dog"),
        ("excludes", "cat", "a dog", "a Cat"),
        ("starts_with", "Dear", " Dear you", "Oh dear"),
        ("ends_with", "Bye.", "And Bye. ", "Bye. And"),
        ("lowercase", True, "abc", "Abc"),
        ("uppercase", True, "ABC", "Abc"),
        ("json", True, ' {"a": 1}', "{'a': 1}"),
        ("commas", False, "one two", "one, two"),
    ],
)
def test_constraints(kind, value, yes, no):
    constraint = {"kind": kind, "value": value}
    assert is_met(yes, constraint) and not is_met(no, constraint)
    assert not check_constraints([constraint], "here")
    assert check_constraints([constraint | {"value": [value]}], "a.jsonl:3")[0].startswith(
        f"a.jsonl:3: {kind} needs a value"
    )


def test_proportions_of_constraints_that_are_met():
    answers = rows("one two", "one")
    for row in answers:
        row["constraints"] = [{"kind": "min_words", "value": 2}, {"kind": "lowercase", "value": True}]
    metrics = scores(answers)
    assert metrics["constraints"] == 0.75 and metrics["all_constraints"] == 0.5
    assert 0 < metrics["all_constraints_interval"][0] < 0.5
    assert "unknown constraint" in check_constraints([{"kind": "max_word", "value": 1}], "here")[0]


def test_compare(tmp_path, capsys):
    for name, answers, nats in (("one", ("Two cats", "a|b\nc"), 2.0), ("two", ("no", "Two cats"), 1.0)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows(*answers, nats=nats))
        (tmp_path / name / "responses.jsonl").write_text(text)
    first, second, out = (str(tmp_path / name) for name in ("one", "two", "table.md"))
    assert main(["compare", first, second, f"out={out}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[1:] == ["2", "0.500", "0.500", "0.500", "1.000"] and table[2].split()[-1] == "1.000"
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| p | Two cats | **Two cats** | no |" and "a\\|b<br>c" in lines[3]
    assert side_by_side(["x"], [rows("a")]).count("\n") == 3
    assert main(["compare", first, f"out={out}"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "invalid",
    [
        {"history": "x"}, {"history": [{"role": "user"}]}, {"system": 3}, {"constraints": 3},
        {"constraints": None}, {"constraints": [{"kind": ["json"], "value": True}]},
        {"nats": "1", "tokens": 1}, {"nats": 1.0}, {"tokens": 1}, {"nats": 1.0, "tokens": 0},
        {"nats": 1.0, "tokens": True}, {"nats": -1.0, "tokens": 1},
    ],
)  # fmt: skip
def test_invalid_values_are_reported_with_their_line(tmp_path, invalid):
    row = {"where": "a", "prompt": "b", "expected": "c", "answer": "d"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | invalid) + "\n")
    with pytest.raises(UserError, match="x.jsonl:2: "):
        read(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"where": "a", "prompt": "b", "expected": "c"}\n', "x.jsonl:1: expected texts under the keys answer"),
        ('{"where": \n', "x.jsonl:1: not valid JSON"),
        ("", "no answers"),
    ],
)
def test_files_without_valid_answers(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "x.jsonl"))
    assert main(["compare", str(tmp_path)]) == 2
