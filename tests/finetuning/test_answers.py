"""What answers are worth."""

import pytest

from gptjax import UserError
from gptjax.finetuning.answers import scores, token_f1, win_rate


def rows(*answers, nats=1.0):
    return [
        {"where": str(i), "prompt": "p", "expected": "Two cats", "answer": a, "nats": nats, "tokens": 2}
        for i, a in enumerate(answers)
    ]


def test_scores():
    found = scores(rows("Two cats", " Two cats\n", "two  cats.", "three"))
    assert found == {"n": 4, "exact": 0.5, "normalised": 0.75, "token_f1": 0.75, "nats_per_token": 0.5}


@pytest.mark.parametrize(
    ("answer", "f1"), [("two cats", 1), ("cats", 2 / 3), ("Two, two cats!", 0.8), ("a dog", 0), ("", 0)]
)
def test_token_f1(answer, f1):
    assert token_f1(answer, "Two cats") == pytest.approx(f1)


def test_win_rate():
    one, two = rows("x", "x", "x"), rows("x", "x", "x", nats=2.0)
    assert win_rate(one, two) == {"n": 3, "win_rate": 1} and win_rate(one, one)["win_rate"] == 0.5
    two[0]["nats"] = 0.5
    assert win_rate(one, two)["win_rate"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no question in common"):
        win_rate(one, [row | {"where": "elsewhere"} for row in two])
