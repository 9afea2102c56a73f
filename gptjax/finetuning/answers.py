"""What answers are worth: beside the expected ones, and beside another model's."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gptjax.types import UserError

Row = dict[str, Any]  # where, prompt, expected, answer, nats, tokens


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over rows: exact, but for blanks around; normalised, but for case, blanks and a full stop at the end;
    token_f1 (arXiv:1606.05250, 4.1, articles kept); and nats_per_token of the expected answers."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(".")

    n = len(rows)
    return {
        "n": n,
        "exact": sum(row["answer"].strip() == row["expected"].strip() for row in rows) / n,
        "normalised": sum(plain(row["answer"]) == plain(row["expected"]) for row in rows) / n,
        "token_f1": sum(token_f1(row["answer"], row["expected"]) for row in rows) / n,
        "nats_per_token": sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows),
    }


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
        UserError: no question is in both.
    """
    theirs = {(row["where"], row["prompt"]): row["nats"] for row in others}
    both = [(row["nats"], theirs[key]) for row in rows if (key := (row["where"], row["prompt"])) in theirs]
    if not both:
        raise UserError("the two runs answered no question in common: the same data and fractions are needed")
    return {"n": len(both), "win_rate": sum((a < b) + (a == b) / 2 for a, b in both) / len(both)}
