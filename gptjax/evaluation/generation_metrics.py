"""What answers are worth: beside the expected ones, and beside another model's."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.data.split import normalized
from gptjax.errors import UserError
from gptjax.evaluation.intervals import interval
from gptjax.formats import tables

Row = dict[str, Any]  # where, prompt, expected, answer, nats, tokens; perhaps system, history, constraints
MAX_PROBLEMS = 20


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


# What can be checked of an answer without judging it, after IFEval (arXiv:2311.07911, table 3):
# kind -> (the kind of its value, (answer, value) -> whether it holds)
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


def check_constraints(constraints: Any, where: str) -> list[str]:
    """What is wrong with them; a list of {"kind": .., "value": ..}."""
    if not isinstance(constraints, list | tuple):
        return [f"{where}: constraints: expected a list of objects, got {constraints!r:.60}"]
    problems = []
    for one in constraints:
        kind = one.get("kind") if isinstance(one, dict) else None
        if not isinstance(kind, str) or kind not in CONSTRAINTS:
            problems.append(f"{where}: no constraint {one!r:.60}; kinds are {', '.join(CONSTRAINTS)}")
        elif type(one.get("value")) is not CONSTRAINTS[kind][0]:
            problems.append(f"{where}: {kind} needs a value of type {CONSTRAINTS[kind][0].__name__}, got {one!r:.60}")
    return problems


def held(answer: str, constraint: dict[str, Any]) -> bool:
    return CONSTRAINTS[constraint["kind"]][1](answer, constraint["value"])


def read(path: str) -> list[Row]:
    """The rows of a responses.jsonl.

    Raises:
        UserError: no such file, or lines that are no answers: the first 20.
    """
    rows, problems = [], []
    for where, row in tables.read(path):
        if isinstance(row, UserError):
            problems.append(f"{where}: {row}")
        elif lacking := [key for key in ("where", "prompt", "expected", "answer") if not isinstance(row.get(key), str)]:
            problems.append(f"{where}: no text {', '.join(lacking)}")
        else:
            problems += check_constraints(row.get("constraints", []), where) + _check_more(row, where)
            rows.append(row)
    if problems:
        raise UserError.all(problems[:MAX_PROBLEMS])
    if not rows:
        raise UserError(f"{path}: no answers")
    return rows


def _check_more(row: Row, where: str) -> list[str]:
    """What is wrong with what older files have not: nats and tokens, both or neither; history and system."""
    problems, turns = [], row.get("history", [])
    nats: Any = row.get("nats")
    tokens: Any = row.get("tokens")
    counted = type(nats) in (int, float) and 0 <= nats < math.inf and type(tokens) is int and tokens > 0
    if ("nats" in row or "tokens" in row) and not counted:
        got = f"{nats!r:.30} and {tokens!r:.30}"
        problems.append(f"{where}: expected nats of at least 0 and a whole number of tokens, got {got}")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    ):
        problems.append(f"{where}: history: expected a list of objects with role and content")
    if not isinstance(row.get("system", ""), str):
        problems.append(f"{where}: system: expected a text")
    return problems


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over rows: exact, but for blanks around; normalised, but for case, blanks and a full stop at the end;
    token_f1 (arXiv:1606.05250, 4.1, articles kept); and where rows have them: nats_per_token of the expected answers,
    constraints, the share of them that holds, and all_constraints, of the rows where all do. Each share has its 95 %
    interval as NAME_interval."""

    def plain(text: str) -> str:
        return normalized(text).rstrip(".")

    n = len(rows)
    found = {
        "n": n,
        **_share("exact", [row["answer"].strip() == row["expected"].strip() for row in rows]),
        **_share("normalised", [plain(row["answer"]) == plain(row["expected"]) for row in rows]),
        "token_f1": sum(token_f1(row["answer"], row["expected"]) for row in rows) / n,
    }
    if all("nats" in row for row in rows):
        found["nats_per_token"] = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    if checked := [[held(row["answer"], one) for one in row["constraints"]] for row in rows if row.get("constraints")]:
        found |= _share("constraints", [holds for row in checked for holds in row])
        found |= _share("all_constraints", [all(row) for row in checked])
    return found


def _share(name: str, wins: Sequence[float]) -> dict[str, Any]:
    """{name: their mean, name_interval: Wilson's}; half a win counts half."""
    return {name: sum(wins) / len(wins), f"{name}_interval": list(interval(sum(wins), len(wins)))}


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words, as bags; case and punctuation do not count."""
    one, two = (
        Counter(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())
        for text in (answer, expected)
    )
    if not one or not two:
        return float(one == two)
    return 2 * (one & two).total() / (one.total() + two.total())


def win_rate(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    """How often the expected answer is likelier in `rows` than in `others`; a tie is half a win.

    Raises:
        UserError: no question is in both, or one of them has no nats.
    """
    if not all("nats" in row for row in (*rows, *others)):
        raise UserError("no win rate: answers without nats, from an older gptjax finetune instruct: run it again")
    theirs = {(row["where"], row["prompt"]): row["nats"] for row in others}
    both = [(row["nats"], theirs[key]) for row in rows if (key := (row["where"], row["prompt"])) in theirs]
    if not both:
        raise UserError("the two runs answered no question in common: the same data and fractions are needed")
    return {"n": len(both), **_share("win_rate", [(a < b) + (a == b) / 2 for a, b in both])}


def side_by_side(names: Sequence[str], runs: Sequence[Sequence[Row]]) -> str:
    """A Markdown table: a question a row, its expected answer, and each run's, in bold where exact."""

    def cell(text: str) -> str:
        return text.strip().replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")

    def answer(row: Row | None) -> str:
        if row is None:
            return ""
        text = cell(row["answer"])
        return f"**{text}**" if text and row["answer"].strip() == row["expected"].strip() else text

    others = [{(row["where"], row["prompt"]): row for row in rows} for rows in runs]
    lines = [["question", "expected", *map(cell, names)], ["---"] * (2 + len(names))]
    for row in runs[0]:
        key = row["where"], row["prompt"]
        lines.append([cell(row["prompt"]), cell(row["expected"]), *(answer(own.get(key)) for own in others)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
