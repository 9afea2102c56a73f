"""Synthetic instructions: their answers are exact, and held-out words, sums and measures never occur in training."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from gptjax.data.split import ONE_OF, is_held_out
from gptjax.data.synthetic import SKILLS, WORDS, plural, skills, wrong_answer
from gptjax.errors import UserError


def question_of(talk):
    """(skill, question, answer) of a conversation with one question."""
    user, assistant = talk.messages
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return talk.where.partition(":")[0], user["content"], assistant["content"]


def words_in(question):
    return [word for word in re.findall(r"\b[a-z]{3,}\b", question) if word in WORDS]


def spaced_letters(question):
    return re.search(r"\b([a-z](?: [a-z]){2,})\b", question)[1]


def hyphenated(question):
    return re.search(r"\b[a-z](?:-[a-z]){2,}\b", question)[0]


def integers_in(question):
    return [int(n) for n in re.findall(r"\d+", question)]


FACTORS = {("meters", "centimeters"): 100, ("kilometers", "meters"): 1000, ("kilograms", "grams"): 1000}
FACTORS |= {("centimeters", "millimeters"): 10, ("dollars", "cents"): 100}


def convert(question):
    [n] = integers_in(question)
    big = re.search(r"\d+ (\w+)", question)[1]
    [factor] = [factor for (b, small), factor in FACTORS.items() if b == big and re.search(rf"\b{small}\b", question)]
    return str(n * factor)


def the_word(question):
    [word] = words_in(question)
    return word


def the_list(question):
    return re.search(r"[a-z]+(?:, [a-z]+){2,}", question)[0].split(", ")


ANSWERS = {  # computed from the text of the question
    "uppercase": lambda q: spaced_letters(q).upper(),
    "spell": lambda q: hyphenated(q).replace("-", " "),
    "reverse": lambda q: spaced_letters(q)[::-1],
    "count_letters": lambda q: str(len(spaced_letters(q).split())),
    "plural": lambda q: plural(the_word(q)),
    "sort": lambda q: ", ".join(map(str, sorted(integers_in(q)))),
    "first_word": lambda q: the_list(q)[0],
    "last_word": lambda q: the_list(q)[-1],
    "add": lambda q: str(sum(integers_in(q))),
    "subtract": lambda q: str(abs(integers_in(q)[0] - integers_in(q)[1])),
    "convert": convert,
}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_exact(seed, held_out):
    for talk in skills(1300, seed, held_out):
        name, question, answer = question_of(talk)
        assert answer == ANSWERS[name](question), (name, question)


@pytest.mark.parametrize("held_out", [False, True])
def test_wrong_answers_are_wrong_varied_and_close(held_out):
    """By the functions of this file. Most wrong answers to a question of one skill have the characters of an answer."""
    talks, rng = skills(1100, 0, held_out) * 3, random.Random(0)
    answers = [wrong_answer(talk, rng) for talk in talks]
    assert answers == [wrong_answer(talk, again) for again in [random.Random(0)] for talk in talks]
    form, similar = {True: r"\d+", False: "[A-Za-z0-9, -]+"}, Counter()
    for talk, wrong in zip(talks, answers, strict=True):
        name, question, right = question_of(talk)
        assert wrong.split() != ANSWERS[name](question).split(), (question, wrong)
        assert wrong == wrong.strip() and re.fullmatch(form[right.isdigit()], wrong), (question, wrong)
        similar[name] += abs(len(wrong) - len(right)) <= 2
    assert similar.keys() == SKILLS.keys() and min(similar.values()) > 100  # of 300 each
    of_one = [wrong_answer(talk, random.Random(i)) for talk in talks[:11] for i in range(60)]
    assert all(len(set(of_one[i : i + 60])) >= 4 for i in range(0, 660, 60))


def test_the_list_of_words():
    assert len(set(WORDS)) == len(WORDS) > 300
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in WORDS)
    assert not any(
        re.search("(f|fe|o|man|foot|sheep|fish|child|mouse|goose)$", word.removesuffix("roof")) for word in WORDS
    )
    assert [plural(word) for word in ("cat", "box", "lady", "toy", "watch", "dish", "glass", "valley", "baby")] == [
        *("cats", "boxes", "ladies", "toys", "watches", "dishes", "glasses", "valleys", "babies"),
    ]
    assert 0.15 < sum(map(is_held_out, WORDS)) / len(WORDS) < 0.3


def keys(talk):
    """What a question is about: its words, its pair of numbers or its measure."""
    name, question, _ = question_of(talk)
    if name == "add":
        return {"{} + {}".format(*sorted(integers_in(question)))}
    if name == "subtract":
        return {"{} - {}".format(*sorted(integers_in(question), reverse=True))}
    if name == "convert":
        return {re.search(r"\d+ \w+", question)[0]}
    if name == "sort":
        return {", ".join(map(str, sorted(integers_in(question))))}
    if name == "spell":
        return {hyphenated(question).replace("-", "")}
    if name in ("uppercase", "reverse", "count_letters"):
        return {spaced_letters(question).replace(" ", "")}
    if name in ("first_word", "last_word"):
        return set(the_list(question))
    return {the_word(question)}


def test_held_out_words_and_numbers_are_not_in_training():
    train = set().union(*(keys(talk) for seed in range(5) for talk in skills(2600, seed)))
    test = set().union(*(keys(talk) for seed in range(5) for talk in skills(650, seed, held_out=True)))
    assert not train & test and len(test) > 150 and len(train) > 800
    assert all(is_held_out(key) for key in test) and not any(is_held_out(key) for key in train)


def test_questions_depend_on_the_seed_only():
    assert skills(100, 0) == skills(100, 0) and skills(50, 0) == skills(100, 0)[:50]
    assert skills(100, 0) != skills(100, 1)
    assert [question_of(talk) for talk in skills(3, 0)] == FIRST


FIRST = [
    ("uppercase", "Turn p a i n t e r into uppercase.", "P A I N T E R"),
    ("spell", "Write c-r-o-w-n with a space in place of each hyphen.", "c r o w n"),
    ("reverse", "What is g i r l backwards?", "l r i g"),
]


@pytest.mark.parametrize("held_out", [False, True])
def test_skills_are_equally_frequent_and_questions_are_not_repeated(held_out):
    questions = [question_of(talk) for talk in skills(330, 0, held_out)]
    assert set(Counter(name for name, _, _ in questions).values()) == {30} and len(SKILLS) == 11
    assert len({question for _, question, _ in questions}) == 330
    phrasings = Counter(re.sub(r"\d+", "#", question) for name, question, _ in questions if name == "add")
    assert len(phrasings) == 3


def test_several_questions_per_conversation():
    single, multi = skills(100, 0), skills(100, 0, turns=4)
    assert [m for talk in multi for m in talk.messages] == [m for talk in single for m in talk.messages]
    assert {len(talk.messages) for talk in multi} == {2, 4, 6, 8} and multi[0].where.startswith(single[0].where)


@pytest.mark.slow
def test_more_questions_than_exist():
    assert len(skills(6_000, 0, held_out=True)) == 6_000


def test_no_questions():
    with pytest.raises(UserError, match="at least 1"):
        skills(0, 0)
    assert ONE_OF == 5
