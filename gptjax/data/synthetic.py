"""Small synthetic tasks with exact answers: the instruction data of a run that names none.

    skills(4, seed=0)                   user: "What is the plural of lamp?"   assistant: "lamps"
    skills(4, seed=0, held_out=True)    the same tasks about words, sums and measures that training never shows

Every word, every pair of numbers and every measure belongs to one of the two sides by its hash, whatever the seed.
Letters are given one by one: how a word that is one token is spelled, a small model does not learn from other words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

from gptjax.data.conversations import Conversation
from gptjax.data.split import is_held_out
from gptjax.errors import UserError

ATTEMPTS = 100  # to find a question that was not asked yet
VOWELS = "aeiou"
LETTERS = 5  # to count, at most
LARGEST = 12  # number to add or subtract

# Nouns of 3 to 8 letters whose plural follows the rule; none that a question uses, such as "letter".
NOUNS = """
ant army artist aunt baby badge bag baker ball banana basket bath bay beach bean bear beaver bed bee bell belt bench
berry bike bird boat book boot bottle bowl box boy branch brick bridge broom brush bucket bug bus bush button cabin
cable cake camel camera camp candle canyon cap captain car card carpet carrot castle cat cave chain chair cherry city
clock cloud club coach coat coin color comb cookie corner cousin cow crab creek crown cup curtain dancer day desk
diary dish doctor dog doll donkey door dragon drawer dream dress drill driver drum duck eagle egg engine fairy family
farm farmer fence field fig finger flag flower forest fork fox frame friend frog game garden gate ghost giant girl
glass glove goat grape guest guitar hammer hand harbor hat hawk helmet hen hill hook horn horse hotel house idea
island jacket jar jewel job joke judge jug kettle key king kitchen kite kitten lady ladder lake lamp lantern lawyer
leg lemon lesson lion lizard lobby lock machine magnet map market mask match meadow medal melon mirror mole
moon month monkey motor mountain mouth museum nail name napkin neck needle nest net night number nurse nut ocean
office olive onion orange otter oven owl page painter palace panda paper parcel park parrot party path peach peanut
pear pen pencil pepper pet picture pig pillow pilot pipe pirate planet plant plate pocket poem poet pond pony
pot prize pupil puppy purse puzzle queen rabbit ray ring river road robot rock rocket roof room rope ruler sack sailor
saw school screen seal season seat secret seed shark ship shirt shoe shop shoulder shovel singer sink sister skirt
snail snake sock song spider spoon square stamp star station stone stool storm story stove stream street sunset swan
sweater table tail teacher temple tent ticket tiger toad tool towel tower town toy train tray tree truck trumpet
tube tunnel turkey turtle uncle valley vase vest village violin wagon wall wallet watch wave week whale wheel window
wing wire witch world worm year zebra
"""
WORDS = tuple(NOUNS.split())
MEASURES = (  # many, big, small, how many small are one big
    ("meters", "centimeters", 100),
    ("kilometers", "meters", 1000),
    ("kilograms", "grams", 1000),
    ("centimeters", "millimeters", 10),
    ("dollars", "cents", 100),
)


class Task(NamedTuple):
    """What a question is about: `key` says on which side it belongs, where its words do not."""

    slots: dict[str, str]
    answer: str
    key: str = ""


class Skill(NamedTuple):
    make: Callable[[random.Random, list[str]], Task]
    phrasings: tuple[str, ...]


def plural(noun: str) -> str:
    """By the rule: cats, boxes, ladies."""
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _of_word(answer: Callable[[str], str]) -> Callable[[random.Random, list[str]], Task]:
    def make(rng: random.Random, words: list[str]) -> Task:
        word = rng.choice(words)
        return Task({"word": word, "letters": " ".join(word), "hyphens": "-".join(word)}, answer(word))

    return make


def _of_list(answer: Callable[[list[str]], str], least: int, most: int) -> Callable[[random.Random, list[str]], Task]:
    def make(rng: random.Random, words: list[str]) -> Task:
        some = rng.sample(words, rng.randint(least, most))
        return Task({"list": ", ".join(some)}, answer(some))

    return make


def _count(rng: random.Random, words: list[str]) -> Task:
    word = rng.choice([word for word in words if len(word) <= LETTERS])
    return Task({"letters": " ".join(word)}, str(len(word)))


def _sort(rng: random.Random, words: list[str]) -> Task:
    some = rng.sample(range(10, 100), 3)
    key = ", ".join(map(str, sorted(some)))
    return Task({"list": ", ".join(map(str, some))}, key, key)


def _add(rng: random.Random, words: list[str]) -> Task:
    a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    return Task({"a": str(a), "b": str(b)}, str(a + b), f"{min(a, b)} + {max(a, b)}")


def _subtract(rng: random.Random, words: list[str]) -> Task:
    a = rng.randint(2, LARGEST)
    b = rng.randint(1, a - 1)
    return Task({"a": str(a), "b": str(b)}, str(a - b), f"{a} - {b}")


def _convert(rng: random.Random, words: list[str]) -> Task:
    big, small, times = rng.choice(MEASURES)
    n = rng.randint(2, 99)
    return Task({"n": str(n), "big": big, "small": small}, str(n * times), f"{n} {big}")


SKILLS: dict[str, Skill] = {
    "uppercase": Skill(
        _of_word(lambda word: " ".join(word.upper())),
        ("Write {letters} in capital letters.", "Turn {letters} into uppercase.", "What is {letters} in all caps?"),
    ),
    "spell": Skill(
        _of_word(" ".join),
        (
            "Spell {hyphens} with spaces.",
            "Write {hyphens} with a space in place of each hyphen.",
            "Take the hyphens out of {hyphens} and leave spaces.",
        ),
    ),
    "reverse": Skill(
        _of_word(lambda word: " ".join(word[::-1])),
        (
            "Reverse these letters: {letters}",
            "Write the letters {letters} from the last to the first.",
            "What is {letters} backwards?",
        ),
    ),
    "count_letters": Skill(
        _count,
        (
            "How many letters are in {letters}?",
            "Count these letters: {letters}",
            "{letters}: how many letters?",
        ),
    ),
    "plural": Skill(
        _of_word(plural),
        ("What is the plural of {word}?", "One {word}, two ...?", "Give the plural form of the noun {word}."),
    ),
    "sort": Skill(
        _sort,
        (
            "Sort these numbers: {list}",
            "Put {list} in order.",
            "Write these numbers from the smallest to the largest: {list}",
        ),
    ),
    "first_word": Skill(
        _of_list(lambda words: words[0], 3, 5),
        (
            "What is the first word in this list? {list}",
            "Which word comes first here: {list}",
            "Give only the first of these words: {list}",
        ),
    ),
    "last_word": Skill(
        _of_list(lambda words: words[-1], 3, 5),
        (
            "What is the last word in this list? {list}",
            "Which word comes last here: {list}",
            "Give only the last of these words: {list}",
        ),
    ),
    "add": Skill(_add, ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?")),
    "subtract": Skill(_subtract, ("What is {a} - {b}?", "Take {b} away from {a}.", "How much is {a} minus {b}?")),
    "convert": Skill(
        _convert,
        ("How many {small} are {n} {big}?", "Convert {n} {big} to {small}.", "Express {n} {big} in {small}."),
    ),
}


def skills(n: int, seed: int, held_out: bool = False, turns: int = 1) -> list[Conversation]:
    """n questions with their answers, as many of each skill as of any other (give or take one).

    `where` names the skills: "plural:17" is question 17. A question comes twice only where few others are left.

    Args:
        turns: the most that a conversation asks, one after the other; every number from 1 on is as likely.
    """
    if n < 1:
        raise UserError(f"skills: expected at least 1 example, got {n}")
    rng, lengths = random.Random(f"{seed} {held_out}"), random.Random(f"{seed} turns")
    words = [word for word in WORDS if is_held_out(word) == held_out]
    names, asked = list(SKILLS), set()
    single_turns = []
    for i in range(n):
        name = names[i % len(names)]
        for _ in range(ATTEMPTS):
            question, answer = _draw(name, rng, words, held_out)
            if question not in asked:
                break
        asked.add(question)
        turn = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        single_turns.append(Conversation(turn, f"{name}:{i + 1}"))
    found, left = [], iter(single_turns)
    while some := list(itertools.islice(left, lengths.randint(1, turns))):
        messages = tuple(message for one in some for message in one.messages)
        found.append(Conversation(messages, " ".join(one.where for one in some)))
    return found


def _draw(name: str, rng: random.Random, words: list[str], held_out: bool) -> tuple[str, str]:
    skill = SKILLS[name]
    while True:
        task = skill.make(rng, words)
        if not task.key or is_held_out(task.key) == held_out:
            return rng.choice(skill.phrasings).format(**task.slots), task.answer
