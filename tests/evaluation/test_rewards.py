"""Reward functions: verdicts of the built-in functions, arithmetic, hostile answers, and names that are refused."""

import sys
from fractions import Fraction

import pytest

from gptjax import UserError
from gptjax.evaluation import rewards
from gptjax.evaluation.rewards import check_rows, evaluate, in_box, load, parse


def value(name, answer, prompt="p", **example):
    return load(name)(prompt, answer, example)


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        ("42", "42", True),
        ("The answer is 42.", 42, True),
        ("I have 3 apples and 4 pears, so 7", "7", True),
        ("7 apples: 3 and 4", "7", False),
        ("no idea", "7", False),
        ("", "0", False),
        ("1,234,567", 1234567, True),
        ("1,23", "123", False),
        ("3.50", 3.5, True),
        (".5", "0.5", True),
        ("0.33", "1/3", False),
        ("1/2", 0.5, True),
        ("2 / 4 of it", "1/2", True),
        ("1 1/2 cups", "3/2", True),
        ("1 1/2 cups", "1/2", False),
        ("1/0", "1", False),
        ("it is -3", "-3", True),
        ("it is \u22123", "-3", True),
        ("it is 3", "-3", False),
        ("10-3", "3", True),
        ("- 3", "3", True),
        ("-$1,000.00", -1000, True),
        ("$-5", "-5", True),
        ("costs $18", "#### 18", True),
        ("so 20 - 2 = 18 dollars", "20 - 2 = 18\n#### 18", True),
        ("50%", "0.5", True),
        ("50 percent", "50", True),
        ("50\\%", "1/2", True),
        ("0.5", "50%", True),
        ("5%", "0.5", False),
        ("6e3", "6000", True),
        ("1e999999999", "1", False),
        ("\\boxed{42} and 7", "42", True),
        ("\\boxed{41} then \\boxed{42}", "42", True),
        ("\\boxed{\\boxed{42}}", "42", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("$\\boxed{-\\dfrac12}$", "-1/2", True),
        ("\\boxed{\\frac{-1}{2}}", "-0.5", True),
        ("\\boxed{2\\tfrac{1}{2}}", "5/2", True),
        ("\\boxed{1{,}200\\text{ cm}^2}", "1200", True),
        ("\\boxed{x = 90^\\circ}", "90", True),
        ("\\boxed{\\frac{\\sqrt{3}}{2}}", "2", False),
        ("\\boxed{12 + 7}", "19", False),
        ("\\boxed{3, 4}", "4", False),
        ("\\boxed{}, so 5", "5", False),
        ("cut off: \\boxed{42", "42", True),
        ("19", "12 + 7", True),
        ("12 + 7", "12 + 7", False),
        ("<think>so 19</think> 20", "19", False),
        ("<think>so 20 \\boxed{20}</think> It is 19", "19", True),
        ("答案是42", "42", True),
        ("\u0664\u0662", "42", False),
        ("\u06644", "4", False),
        ("\uff14\uff12", "42", False),
        ("42\u0664", "42", False),
        ("H2 x_3 and 1.2.9", "9", False),
        ("9" * 5000, "9", False),
    ],
)
def test_numbers(answer, expected, equal):
    assert value("number", answer, expected=expected) == equal


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12 + 7", 19), ("-(2 + 3) * 4", -20), ("1 / 3 + 1/6", Fraction(1, 2)), ("0.1 + 0.2", Fraction(3, 10)),
        ("7 // 2", 3), ("-7 % 3", 2), ("2 ** -2", Fraction(1, 4)), ("3 \u00d7 4 ÷ 6", 2), ("2^10", 1024), (" 5 ", 5),
    ],
)  # fmt: skip
def test_evaluate(expression, result):
    assert evaluate(expression) == result and isinstance(evaluate(expression), Fraction)


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("9**9**9", OverflowError), ("2**0.5", OverflowError), ("9**99**99", OverflowError),
        ("9" * 150 + "**99", OverflowError), ("1/0", ZeroDivisionError), ("0**-1", ZeroDivisionError),
        ("", ValueError), ("1 +", ValueError), ("1(2)", ValueError), ("()", ValueError), ("x", ValueError),
        ("(" * 199, ValueError), ("1" * 201, ValueError), ("1e999", ValueError), ("0x10", ValueError),
        ("1_000", ValueError), ("٣ + 1", ValueError), ("True", ValueError), ("__import__('os')", ValueError),
        ("1e4e4", ValueError), ("05", ValueError),
    ],
)  # fmt: skip
def test_evaluate_refuses(expression, error):
    with pytest.raises(error):
        evaluate(expression)


def test_an_expected_number_must_exist():
    for expected in ("none", "9**9**9", "1/0", None, True, ["1"]):
        with pytest.raises(UserError, match="expected"):
            value("number", "9", expected=expected)
    for example in ({"answer": "9"}, {"expected": None, "answer": 9}):
        assert rewards.number("", "9", example) == 1


@pytest.mark.parametrize(
    ("name", "answer", "verdict"),
    [
        ("exact", " New York\n", 1), ("exact", "new york", 0), ("exact", "<think>Rome?</think>\nNew York", 1),
        ("normalised", "new  york.", 1), ("normalised", "York", 0),
        ("boxed", "It is \\boxed{New\n York}.", 1), ("boxed", "New York", 0), ("boxed", "\\boxed{Rome}", 0),
        ("format", "<think>a\nb</think>\nc", 1), ("format", " <think>a</think>c ", 1), ("format", "c", 0),
        ("format", "<think> </think>c", 0), ("format", "<think>a</think> ", 0), ("format", "<think>a", 0),
        ("format", "x <think>a</think>c", 0), ("format", "<think>a</think>b</think>c", 0),
        ("format", "<think>a<think>b</think>c", 0),
        ("format:^A: [0-9]+$", "A: 12", 1), ("format:^A: [0-9]+$", "So A: 12", 0), ("format:b:c", "ab:cd", 1),
        ("length:2", "", 1), ("length:2", "a b", 1), ("length:2", "a b c", 0.5), ("length:2", "a b c d e", 0),
        ("constraints", "anything", 1),
    ],
)  # fmt: skip
def test_verdicts(name, answer, verdict):
    assert value(name, answer, expected="New York") == verdict


def test_format_when_the_prompt_begins_the_reasoning():
    assert value("format", "a</think>b", prompt="user: Hi\n<think>\n") == 1
    assert value("format", "<think>a</think>b", prompt="user: Hi\n<think>\n") == 0


def test_constraints():
    items = [{"kind": "min_words", "value": 2}, {"kind": "lowercase", "value": True}]
    assert value("constraints", "One two", constraints=items) == 0.5
    assert value("constraints", "<think>One</think>one two", constraints=items) == 1
    with pytest.raises(UserError, match="unknown constraint"):
        value("constraints", "x", constraints=[{"kind": "words", "value": 2}])


def test_boxes():
    assert in_box("\\boxed{a{b}\\}c} {") == "a{b}\\}c"
    assert in_box("{ \\boxed {a} \\boxed{b") == "a"
    assert in_box("} \\\\boxed} {boxed}") is None


@pytest.mark.parametrize(
    "answer",
    [
        "1" * 1_000_000, "1," * 500_000, "1 " * 500_000, "1/" * 500_000, "-$" * 500_000, "1 1/" * 250_000,
        "\\boxed{" * 140_000, "\\boxed{" * 70_000 + "}" * 70_000, "\\boxed{1}" * 100_000, "\\frac{1}" * 120_000,
        "{" * 1_000_000, "\\text{" * 160_000, "\\boxed" + " " * 1_000_000, "<think>" * 140_000, "1e" * 500_000,
        "\\boxed{1" + "a" * 1_000_000 + "}", "\\boxed{" + "a" * 1_000_000 + "}", "\ud800" * 1_000_000,
    ],
)  # fmt: skip
def test_a_long_answer_takes_linear_time(answer):
    """With quadratic time a case takes hours, and pytest's limit ends it."""
    for name in ("exact", "normalised", "number", "boxed", "format", "length:5"):
        assert value(name, answer, expected="2") in (0, 1)


# --- names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected at least one of exact, normalised"),
        (["exact", "exact"], "exact occurs 2 times"),
        (["numbr"], "numbr: unknown; did you mean number[?]; expected one of exact"),
        (["number:3"], "number takes no argument"),
        (["format:("], "not a valid regular expression: missing"),
        (["format:"], "expected a regular expression"),
        (["length"], "expected a positive number of words, as in length:200"),
        (["length:0"], "expected a positive number"),
        (["length:-1"], "expected a positive number"),
        (["length:٣"], "expected a positive number"),
        (["judge"], "expected judge:MODEL@URL"),
        (["judge:m"], "expected judge:MODEL@URL"),
        (["judge:m@localhost"], "the judge's URL"),
    ],
)
def test_refused_names(names, message):
    with pytest.raises(UserError, match=message):
        parse(names)


def test_all_problems_are_reported_together(tmp_path):
    with pytest.raises(UserError) as error:
        parse(["exat", "length:x", f"{tmp_path}/a.py:score"])
    assert len(str(error.value).splitlines()) == 3


FILE = """
import asyncio, os, helper
from dataclasses import dataclass

def score(prompt, answer, example):
    return helper.ONE

def optional(prompt, answer, example, weight=2, *, more=None): return weight
def anything(*args): return 1
def two(prompt, answer): return 1
def lists(prompts, completions, *, scores): return [1]
async def later(prompt, answer, example): return 1
def steps(prompt, answer, example): yield 1

@dataclass
class Score:
    n: int
    def __call__(self, prompt, answer, example): return self.n

one = Score(1)
number = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "helper.py").write_text("ONE = 1\nprint('x' * 100_000)\n")
    return f"{tmp_path}/mine.py"


def test_functions_of_a_file(mine):
    names = [f"{mine}:{name}" for name in ("score", "optional", "anything", "one")]
    assert parse(["exact", *names]) == ("exact", *names)
    assert "helper" not in sys.modules  # files of users are not imported here


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scor", "no such function; did you mean score[?]; it has score, optional"),
        ("number", "no such function"),
        ("two", r"expected a function \(prompt, answer, example\), got \(prompt, answer\)"),
        ("lists", r"expected a function .* got \(prompts, completions, \*, scores\)"),
        ("later", "expected a plain function"),
        ("steps", "expected a plain function"),
        ("", "no such function"),
    ],
)
def test_refused_functions(mine, name, message):
    with pytest.raises(UserError, match=message):
        parse([f"{mine}:{name}"])


def test_a_file_without_a_function_or_with_another_name(mine):
    with pytest.raises(UserError, match="expected the name of a function after the file"):
        parse([mine])
    with pytest.raises(UserError, match="no such file; did you mean .*mine.py"):
        parse([mine.replace("mine", "mien") + ":score"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(", "the import raised SyntaxError: .* line 1"),
        ("import nowhere_at_all", r"the import raised ModuleNotFoundError: No module named .* \(line 1\)"),
        ("\nraise SystemExit(3)", r"the import raised SystemExit: 3 \(line 2\)"),
        ("raise ValueError", r"the import raised ValueError \(line 1\)"),
        ("import os; os._exit(3)", "the import ended its process with exit code 3"),
        ("import time; time.sleep(1000)", "loading takes longer than 2 s"),
        ("input()", "the import raised EOFError"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, monkeypatch, text, message):
    if "sleep" in text:
        monkeypatch.setattr(rewards, "START_TIMEOUT_S", 2.0)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        parse([f"{tmp_path}/mine.py:score"])


def test_rows():
    rows = [("a.jsonl:1", {"expected": "1"}), ("a.jsonl:2", {"expected": "one"}), ("a.jsonl:3", {"constraints": 3})]
    check_rows(["number", "mine.py:score", "format:x"], rows[:1])
    with pytest.raises(UserError) as error:
        check_rows(["number", "constraints"], rows)
    lines = str(error.value).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["a.jsonl:2:", "number:"], ["a.jsonl:3:", "constraints:"], ["a.jsonl:3:", "number:"],
    ]  # fmt: skip
    with pytest.raises(UserError, match="judge:m@http"):
        check_rows(["judge:m@http://h/v1"], [("a", {})])
