"""Computes metrics that compare generated answers with the expected answers and with the answers of another model."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gptjax._moved import moved_name
from gptjax.data.split import normalized
from gptjax.errors import UserError
from gptjax.evaluation.intervals import interval
from gptjax.formats import tables

# A `Row` is a question with its expected answer and its generated answer: a dict with the keys where, prompt, expected
# and answer, and the optional keys nats, tokens, system, history and constraints.
Row = dict[str, Any]
MAX_PROBLEMS = 20


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


# `CONSTRAINTS` defines verifiable constraints on an answer, as in IFEval (arXiv:2311.07911, table 3). `CONSTRAINTS`
# maps the kind of a constraint to the type of its value, and a function (answer, value) that returns True if the answer
# meets the constraint.
CONSTRAINTS: dict[str, tuple[type, Callable[[str, Any], bool]]] = {
    "min_words": (int, lambda text, n: len(text.split()) >= n),
    "max_words": (int, lambda text, n: len(text.split()) <= n),
    "min_sentences": (int, lambda text, n: _count(r"[.!?](?=\s|$)", text) >= n),
    "max_sentences": (int, lambda text, n: _count(r"[.!?](?=\s|$)", text) <= n),
    "paragraphs": (int, lambda text, n: _count(r"\S[^\n]*", re.sub(r"\n(?!\n)", " ", text)) == n),
    "bullets": (int, lambda text, n: _count(r"(?m)^\s*[*-] ", text) == n),
    "contains": (str, lambda text, word: word.casefold() in text.casefold()),
    "excludes": (str, lambda text, word: word.casefold() not in text.casefold()),
    "starts_with": (str, lambda text, start: text.strip().startswith(start)),
    "ends_with": (str, lambda text, end: text.strip().endswith(end)),
    "lowercase": (bool, lambda text, yes: (text == text.lower()) == yes),
    "uppercase": (bool, lambda text, yes: (text == text.upper()) == yes),
    "json": (bool, lambda text, yes: isinstance(tables.loads(text.strip()), UserError) != yes),
    "commas": (bool, lambda text, yes: ("," in text) == yes),
}


def check_constraints(constraints: Any, location: str) -> list[str]:
    """Returns an error message for each invalid item of `constraints`, a list of dicts with the keys kind and value."""
    if not isinstance(constraints, list | tuple):
        return [f"{location}: constraints: expected a list of objects, got {constraints!r:.60}"]
    problems = []
    for item in constraints:
        kind = item.get("kind") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in CONSTRAINTS:
            problems.append(f"{location}: unknown constraint {item!r:.60}; kinds are {', '.join(CONSTRAINTS)}")
        elif type(item.get("value")) is not CONSTRAINTS[kind][0]:
            problems.append(
                f"{location}: {kind} needs a value of type {CONSTRAINTS[kind][0].__name__}, got {item!r:.60}"
            )
    return problems


def is_met(answer: str, constraint: dict[str, Any]) -> bool:
    """Returns True if the answer meets the constraint, a dict with the keys kind and value."""
    return CONSTRAINTS[constraint["kind"]][1](answer, constraint["value"])


def is_exact(answer: str, expected: str) -> bool:
    """Returns True if the answer equals the expected answer, ignoring leading and trailing whitespace."""
    return answer.strip() == expected.strip()


def is_normalised(answer: str, expected: str) -> bool:
    """Returns True if the answer equals the expected answer, ignoring case, differences in whitespace, and final full
    stops."""
    return normalized(answer).rstrip(".") == normalized(expected).rstrip(".")


def read(path: str) -> list[Row]:
    """Reads the answers in a file responses.jsonl, which `gptjax finetune instruct` writes.

    Raises:
        UserError: the file does not exist, has no answers, or has invalid lines (the message lists the first 20
            problems).
    """
    rows, problems = [], []
    for location, row in tables.read(path):
        if isinstance(row, UserError):
            problems.append(f"{location}: {row}")
        elif missing := [key for key in ("where", "prompt", "expected", "answer") if not isinstance(row.get(key), str)]:
            problems.append(f"{location}: expected texts under the keys {', '.join(missing)}")
        else:
            problems += check_constraints(row.get("constraints", []), location) + _check_optional(row, location)
            rows.append(row)
    if problems:
        raise UserError.all(problems[:MAX_PROBLEMS])
    if not rows:
        raise UserError(f"{path}: no answers")
    return rows


def _check_optional(row: Row, location: str) -> list[str]:
    """Returns an error message for each invalid optional key of a row: nats and tokens (a row has both or neither),
    history, and system."""
    problems, turns = [], row.get("history", [])
    nats: Any = row.get("nats")
    tokens: Any = row.get("tokens")
    valid = type(nats) in (int, float) and 0 <= nats < math.inf and type(tokens) is int and tokens > 0
    if ("nats" in row or "tokens" in row) and not valid:
        got = f"{nats!r:.30} and {tokens!r:.30}"
        problems.append(f"{location}: nats must be at least 0 and tokens a positive whole number, got {got}")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    ):
        problems.append(f"{location}: history: expected a list of objects with role and content")
    if not isinstance(row.get("system", ""), str):
        problems.append(f"{location}: system: expected a text")
    return problems


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns a dict of metrics of the answers, averaged over all rows.

    The 95 % confidence interval of a proportion NAME is under the key NAME_interval.

    exact: Proportion of answers that equal the expected answer, ignoring leading and trailing whitespace.
    normalised: Proportion of answers that equal the expected answer, ignoring case, differences in whitespace, and
    final full stops.
    token_f1: Mean F1 score of the answers' words (arXiv:1606.05250, section 4.1, except that articles count).
    nats_per_token: Mean loss of the expected answers' tokens, in nats, if all rows have the keys nats and tokens.
    constraints: Proportion of all constraints that the answers meet, if there are rows with constraints.
    all_constraints: Proportion of rows whose answer meets all constraints, among the rows that have constraints.
    """
    n = len(rows)
    metrics = {
        "n": n,
        **_mean_and_interval("exact", [is_exact(row["answer"], row["expected"]) for row in rows]),
        **_mean_and_interval("normalised", [is_normalised(row["answer"], row["expected"]) for row in rows]),
        "token_f1": sum(token_f1(row["answer"], row["expected"]) for row in rows) / n,
    }
    if all("nats" in row for row in rows):
        metrics["nats_per_token"] = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    if met := [[is_met(row["answer"], item) for item in row["constraints"]] for row in rows if row.get("constraints")]:
        metrics |= _mean_and_interval("constraints", [value for row in met for value in row])
        metrics |= _mean_and_interval("all_constraints", [all(row) for row in met])
    return metrics


def _mean_and_interval(name: str, wins: Sequence[float]) -> dict[str, Any]:
    """Returns a dict with the mean of `wins` under the key `name`, and its Wilson interval under `name`_interval.

    In `wins`, the value 1 stands for a win, 0 for a loss and 0.5 for a tie.
    """
    return {name: sum(wins) / len(wins), f"{name}_interval": list(interval(sum(wins), len(wins)))}


def token_f1(answer: str, expected: str) -> float:
    """Returns the F1 score of the bag of words of the answer against the bag of words of the expected answer.

    Case and punctuation are ignored in the answer and in the expected answer.
    """
    actual, wanted = (
        Counter(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())
        for text in (answer, expected)
    )
    if not actual or not wanted:
        return float(actual == wanted)
    return 2 * (actual & wanted).total() / (actual.total() + wanted.total())


def win_rate(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    """Compares the model of `rows` with the model of `others` on the questions that both models have answered.

    On each question, the model that gives the expected answer the higher probability wins; a tie counts as half a win.

    Returns:
        A dict with the number of questions n, the proportion win_rate of questions that the model of `rows` wins, and
        the confidence interval win_rate_interval of this proportion.

    Raises:
        UserError: `rows` and `others` have no question in common, or a row lacks the key nats.
    """
    if not all("nats" in row for row in (*rows, *others)):
        raise UserError(
            "no win rate: answers without nats, from an older version of gptjax: run gptjax finetune instruct again"
        )
    other_nats = {(row["where"], row["prompt"]): row["nats"] for row in others}
    pairs = [(row["nats"], other_nats[key]) for row in rows if (key := (row["where"], row["prompt"])) in other_nats]
    if not pairs:
        raise UserError("the two runs have no question in common: they need the same data and the same split fractions")
    return {"n": len(pairs), **_mean_and_interval("win_rate", [(a < b) + (a == b) / 2 for a, b in pairs])}


def side_by_side(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> str:
    """Returns a Markdown table with a row per question: the question, the expected answer and the answer of each run.

    An answer that equals the expected answer is in bold.
    """

    def cell(text: str) -> str:
        return text.strip().replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")

    def answer(row: Row | None) -> str:
        if row is None:
            return ""
        text = cell(row["answer"])
        return f"**{text}**" if text and is_exact(row["answer"], row["expected"]) else text

    by_question = [{(row["where"], row["prompt"]): row for row in rows} for rows in runs]
    lines = [["question", "expected", *map(cell, names)], ["---"] * (2 + len(names))]
    for row in runs[0]:
        key = row["where"], row["prompt"]
        lines.append([cell(row["prompt"]), cell(row["expected"]), *(answer(run.get(key)) for run in by_question)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
