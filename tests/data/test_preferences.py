"""Preference pairs: formats, invalid records, and rows with the chosen and the rejected answer of every pair."""

import json

import numpy as np
import pytest

from gptjax import UserError, tokenizers
from gptjax.data import preferences, synthetic

TOK = tokenizers.load("bytes")


def saved(tmp_path, records):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def talk(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, contents, strict=False)]


RECORDS = {
    "prompt": {"prompt": "Hi?", "chosen": "yes", "rejected": "no", "score": 3},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "x", "chosen": "yes", "rejected": "no"},
    "messages": {"chosen": talk("Hi?", "yes"), "rejected": talk("Hi?", "no")},
    "lists": {"prompt": talk("Hi?"), "chosen": talk("Hi?", "yes")[1:], "rejected": talk("Hi?", "no")[1:]},
    "prompt and lists": {"prompt": "Hi?", "chosen": talk("Hi?", "yes")[1:], "rejected": talk("Hi?", "no")[1:]},
    "list and texts": {"prompt": talk("Hi?"), "chosen": "yes", "rejected": "no"},
    "lists again": {"prompt": talk("Hi?"), "chosen": talk("Hi?", "yes"), "rejected": talk("Hi?", "no")},
    "both": {"prompt": "Hi?", "chosen": talk("Hi?", "yes"), "rejected": talk("Hi?", "no")},
}


@pytest.mark.parametrize("name", RECORDS)
def test_formats(tmp_path, name):
    (pair,) = preferences.read(saved(tmp_path, [RECORDS[name]]), [])
    assert [talk.messages[-1]["content"] for talk in pair] == ["yes", "no"]
    assert pair.chosen.messages[:-1] == ({"role": "user", "content": "Hi?"},)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi?", "chosen": "yes"}, "no known format"),
        ({"prompt": "Hi?", "chosen": "yes", "rejected": " "}, "the response is empty"),
        ({"prompt": "Hi?", "chosen": "yes", "rejected": "yes"}, "the same answer"),
        ({"chosen": talk("a", "b"), "rejected": talk("c", "d")}, "different questions"),
        ({"chosen": talk("a", "b"), "rejected": "d"}, "rejected: expected a list"),
        (
            {"prompt": "x", "chosen": talk("a", "b"), "rejected": talk("a", "c")},
            "chosen: expected messages that begin with those of prompt, or the answer of role assistant alone",
        ),
        ({"prompt": [{"a": 1}], "chosen": "b", "rejected": "d"}, r"prompt\[0\]: expected role and content"),
        ({"prompt": "Hi?", "chosen": "b", "rejected": "d", "images": ["x.png"]}, "images: pictures"),
        ({"prompt": 3, "chosen": "b", "rejected": "d"}, "must be text"),
    ],
)
def test_invalid_records(tmp_path, record, message):
    with pytest.raises(UserError, match=message) as error:
        preferences.read(saved(tmp_path, [RECORDS["prompt"], record]))
    assert "pairs.jsonl:2" in str(error.value)


def encoded(width=1000):
    answers = [talk("a", "first", "bc", "de"), talk("a", "first", "bc", "f")], [talk("gh", "i"), talk("gh", "jkl")]
    pairs = [
        preferences.Pair(*(preferences.Conversation(tuple(messages), "here") for messages in pair))
        for pair in [*answers] * 2
    ]
    return preferences.encode(pairs, TOK, style="phi3", context_length=width)


def test_only_the_last_answer_and_its_end_token_are_in_the_loss():
    for ids, weights in (example for pair in encoded().pairs for example in pair):
        learned = ids[weights > 0].tolist()
        assert learned[-1] == TOK.eot_id and TOK.decode(learned[:-1]) in ("de", "f", "i", "jkl")


@pytest.mark.parametrize(("width", "packed"), [(None, False), (None, True), (400, True)])
def test_rows_contain_both_answers_of_every_pair(width, packed):
    pairs = encoded()
    rows = preferences.rows(pairs, width, packed)
    assert sorted(rows.pairs[rows.pairs >= 0]) == [0, 1, 2, 3]
    assert (len(rows.tokens) < 4) == packed
    for row, p in zip(*np.nonzero(rows.pairs >= 0), strict=True):
        for rejected, (ids, weights) in enumerate(pairs.pairs[rows.pairs[row, p]]):
            mask = rows.segment_ids[row] == 2 * p + 1 + rejected
            assert rows.tokens[row][mask].tolist() == ids[:-1].tolist()
            assert rows.targets[row][mask].tolist() == ids[1:].tolist()
            assert rows.weights[row][mask].tolist() == weights[1:].tolist()
    padding = rows.segment_ids == 0
    assert not rows.weights[padding].any()


def test_pairs_that_do_not_fit_are_counted():
    fitting = encoded(100)
    assert fitting.dropped == 2 and len(fitting.pairs) == 2
    with pytest.raises(UserError, match="no pair fits a context of 8 tokens: .* the shortest needs 70"):
        encoded(8)


def test_batches_contain_the_reference_log_probs_of_their_pairs():
    rows = preferences.rows(encoded(), None, False)
    reference = np.arange(8, dtype=np.float32).reshape(4, 2)
    batches = [preferences.batch(rows, step, batch_size=2, seed=1, reference=reference) for step in range(2)]
    assert sorted(np.concatenate([b.reference[:, 0, 0] for b in batches]).tolist()) == [0, 2, 4, 6]
    *_, last = preferences.eval_batches(rows, 3, reference)
    assert last.present.tolist() == [[1], [0], [0]] and last.reference[0, 0].tolist() == [6, 7]


def test_synthetic_pairs():
    pairs = preferences.of_skills(60, seed=0)
    assert len(pairs) >= 58 and pairs == preferences.of_skills(60, seed=0)
    for chosen, rejected in pairs:
        assert chosen.messages[:-1] == rejected.messages[:-1] and chosen.messages[-1] != rejected.messages[-1]
    held_out = {pair.chosen.messages[0]["content"] for pair in preferences.of_skills(60, seed=0, held_out=True)}
    assert not held_out & {pair.chosen.messages[0]["content"] for pair in pairs}


@pytest.mark.parametrize("held_out", [False, True])
def test_synthetic_pairs_with_mistakes(held_out):
    pairs = preferences.of_mistakes(660, 0, held_out)
    assert pairs == preferences.of_mistakes(660, 0, held_out) != preferences.of_mistakes(660, 1, held_out)
    assert [pair.chosen for pair in pairs] == synthetic.skills(660, 0, held_out)
    for chosen, rejected in pairs:
        assert chosen.messages[:-1] == rejected.messages[:-1] and chosen.messages[-1] != rejected.messages[-1]


def scored(prompt, *answers, **more):
    return [{"prompt": prompt, "answer": answer, "reward": reward, **more} for answer, reward in answers]


def texts(pairs):
    return [[talk.messages[-1]["content"] for talk in pair] for pair in pairs]


def test_scored_answers_become_pairs(tmp_path):
    """A wrong answer is rejected once; the best ones are chosen in turn; equal answers have the mean of their rewards,
    and answers that are empty or have no reward are left out."""
    rows = [
        *scored("a", ("1", 0.0), ("2", 1.0), ("3 ", 0.0), (" ", 0.0), ("4", None), step=1, advantage=0.5),
        *scored("b", ("7", 1.0)),
        *scored("a", ("3", 0), ("5", 0.5), ("2", 1), ("6", 1)),
        RECORDS["prompt"],
    ]
    pairs = preferences.read(saved(tmp_path, rows), notes := [])
    assert texts(pairs) == [["yes", "no"], ["2", "1"], ["6", "3"], ["2", "5"]] and len(notes) == 0
    assert {pair.chosen.messages[0]["content"] for pair in pairs[1:]} == {"a"}
    assert pairs[1].chosen.where.endswith("pairs.jsonl:1")
    rows = scored("a", ("1", 1), ("2<|end|>", 0), ("3", 0))
    assert texts(preferences.read(saved(tmp_path, rows), special={"<|end|>"})) == [["1", "3"]]
    rows = scored("a", ("x", 0.9), ("y", 0.0), ("x", 0.0), ("y", 0.5))
    assert texts(preferences.read(saved(tmp_path, rows))) == [["x", "y"]]


def test_the_expected_answer_is_chosen_if_none_is_right(tmp_path):
    rows = scored("a", ("1", 0.0), ("2", -1.0), expected="3") + scored("b", ("1", 0.0), ("2", 0.5), expected="3")
    assert texts(preferences.read(saved(tmp_path, rows))) == [["3", "1"], ["3", "2"], ["2", "1"]]
    rows = scored("a", ("1", 0.0), ("2", -1.0)) + scored("b", ("3", 0.0), ("1", 0.0), expected="3")
    assert texts(preferences.read(saved(tmp_path, rows))) == [["1", "2"], ["3", "1"]]


def test_scored_answers_in_a_conversation(tmp_path):
    """The system message and the earlier messages are those that the model saw; a prompt with others is another one."""
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = scored("a", ("1", 1), ("2", 0), system="Be brief.", history=history) + scored("a", ("3", 1), ("4", 0))
    first, second = preferences.read(saved(tmp_path, rows))
    question = {"role": "user", "content": "a"}
    assert list(first.rejected.messages[:-1]) == [{"role": "system", "content": "Be brief."}, *history, question]
    assert texts([first, second]) == [["1", "2"], ["3", "4"]] and second.chosen.messages[0] == question


def test_scored_answers_of_a_table(tmp_path):
    (tmp_path / "answers.csv").write_text("prompt,answer,reward\na,1,0.0\na,2,1\na,3,\n")
    assert texts(preferences.read(str(tmp_path / "answers.csv"))) == [["2", "1"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (scored("a", ("1", 1), ("2", "good")), "jsonl:2: reward: expected a finite number, or null .* found 'good'"),
        (scored("a", ("1", 1), ("2", [1])), r"jsonl:2: reward: expected a finite number, or null .* found \[1\]"),
        (scored("a", ("1", 1), (2, 0)), "jsonl:2: prompt and answer: expected texts"),
        (scored("a", ("1", 1), ("2", 1)), "no pair can be made: all answers to a prompt have the same reward"),
        ([{"prompt": "a", "answer": "1"}], "no known format(.|\n)*scored answers"),
    ],
)
def test_invalid_scored_answers(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        preferences.read(saved(tmp_path, rows))


def test_the_system_message_of_a_pair_precedes_both_answers(tmp_path):
    (pair,) = preferences.read(saved(tmp_path, [RECORDS["prompt"] | {"system": "Be brief."}]))
    assert [talk.messages[0] for talk in pair] == [{"role": "system", "content": "Be brief."}] * 2
