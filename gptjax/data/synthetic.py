"""Makes synthetic questions with exact answers, which instruction fine-tuning uses if `instruct.source` is not set.

    skills(4, seed=0)[2]                user: "What is g i r l backwards?"   assistant: "l r i g"
    skills(4, seed=0, held_out=True)    similar questions, about other words and sums than the training data
    wrong_answer(talk, rng)             a wrong answer to such a question: "l i r g", "r i g", "g i r l", ..

A skill is a type of question, such as forming a plural. A synthetic question is about words, a sum, a difference, three
numbers to sort, or a measure such as 7 meters. A hash of the subject of a question (such as the word or the sum)
decides, independently of the seed, whether the subject occurs only in training questions or only in held-out questions.
In a question about spelling, the letters of the word are separated by spaces or hyphens. A word that is a single token
would not show its letters, and a small model cannot infer the letters from other words.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from gptjax.data.conversations import Conversation
from gptjax.data.split import is_held_out
from gptjax.errors import UserError

ATTEMPTS = 100  # maximum number of random draws in search of a question that is not used yet
VOWELS = "aeiou"
LETTERS = 5  # Length of the longest word in a question that asks for the number of letters.
LARGEST = 12  # Largest number in a question that asks for a sum or difference.

# The synthetic questions use nouns of 3 to 8 letters whose plural is regular. Words that occur in the wording of the
# questions, such as "letter", are left out.
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
MEASURES = (  # Each entry holds a larger unit, a smaller unit, and the number of smaller units per larger unit.
    ("meters", "centimeters", 100),
    ("kilometers", "meters", 1000),
    ("kilograms", "grams", 1000),
    ("centimeters", "millimeters", 10),
    ("dollars", "cents", 100),
)


class Task(NamedTuple):
    """A question and its answer: `slots` holds the values that are inserted into the wording of the question.

    The hash of `key` decides whether the question is held out. If `key` is "", the question is always accepted, because
    the words of the question were drawn from the right list, which is either the words for training or the held-out
    words.
    """

    slots: dict[str, str]
    answer: str
    key: str = ""


class Skill(NamedTuple):
    """A type of question. The function `make` draws a random `Task`, `phrasings` holds different wordings of the
    question, and the function `mistakes` returns wrong answers to the question, such as a small model gives. The wrong
    answers that `mistakes` returns may include the right answer.
    """

    make: Callable[[random.Random, list[str]], Task]
    phrasings: tuple[str, ...]
    mistakes: Callable[[str, str, random.Random], list[str]]


def plural(noun: str) -> str:
    """Returns the regular plural of a noun, such as cats, boxes or ladies."""
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _word_task(answer: Callable[[str], str]) -> Callable[[random.Random, list[str]], Task]:
    def make(rng: random.Random, words: list[str]) -> Task:
        word = rng.choice(words)
        return Task({"word": word, "letters": " ".join(word), "hyphens": "-".join(word)}, answer(word))

    return make


def _list_task(answer: Callable[[list[str]], str], least: int, most: int) -> Callable[[random.Random, list[str]], Task]:
    def make(rng: random.Random, words: list[str]) -> Task:
        items = rng.sample(words, rng.randint(least, most))
        return Task({"list": ", ".join(items)}, answer(items))

    return make


def _count(rng: random.Random, words: list[str]) -> Task:
    word = rng.choice([word for word in words if len(word) <= LETTERS])
    return Task({"letters": " ".join(word)}, str(len(word)))


def _sort(rng: random.Random, words: list[str]) -> Task:
    integers = rng.sample(range(10, 100), 3)
    answer = ", ".join(map(str, sorted(integers)))
    return Task({"list": ", ".join(map(str, integers))}, answer, key=answer)


def _add(rng: random.Random, words: list[str]) -> Task:
    a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    return Task({"a": str(a), "b": str(b)}, str(a + b), f"{min(a, b)} + {max(a, b)}")


def _subtract(rng: random.Random, words: list[str]) -> Task:
    a = rng.randint(2, LARGEST)
    b = rng.randint(1, a - 1)
    return Task({"a": str(a), "b": str(b)}, str(a - b), f"{a} - {b}")


def _convert(rng: random.Random, words: list[str]) -> Task:
    big, small, factor = rng.choice(MEASURES)
    n = rng.randint(2, 99)
    return Task({"n": str(n), "big": big, "small": small}, str(n * factor), f"{n} {big}")


# --- wrong answers


def _slips(items: list[str], others: list[str], rng: random.Random) -> list[list[str]]:
    """Returns four changed copies of `items`: one item is removed, one item is doubled, two neighbours are swapped, and
    one item is replaced by an element of `others`."""
    i, j = rng.randrange(len(items)), rng.randrange(len(items) - 1)
    before, item, after = items[:i], items[i], items[i + 1 :]
    swapped = [*items[:j], items[j + 1], items[j], *items[j + 2 :]]
    return [before + after, [*before, item, item, *after], swapped, [*before, rng.choice(others), *after]]


def _spelled(question: str, answer: str, rng: random.Random) -> list[str]:
    letters = answer.split()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if answer.isupper() else "abcdefghijklmnopqrstuvwxyz"
    return [" ".join(slip) for slip in _slips(letters, list(alphabet), rng)]


def _in_capitals(question: str, answer: str, rng: random.Random) -> list[str]:
    letters = answer.split()
    i = rng.randrange(len(letters))
    letters[i] = letters[i].lower()
    return [*_spelled(question, answer, rng), answer.lower(), " ".join(letters), answer.replace(" ", "")]


def _spaced(question: str, answer: str, rng: random.Random) -> list[str]:
    return [*_spelled(question, answer, rng), answer.replace(" ", "-"), answer.replace(" ", "")]


def _backwards(question: str, answer: str, rng: random.Random) -> list[str]:
    i = rng.randrange(1, len(answer), 2)  # index of a space
    half_reversed = answer[: i + 1] + answer[i + 1 :][::-1]
    return [*_spelled(question, answer, rng), *_spelled(question, answer, rng), answer[::-1], half_reversed]


def _pluralised(question: str, answer: str, rng: random.Random) -> list[str]:
    noun = next(word for word in re.findall("[a-z]+", question) if plural(word) == answer)
    slips = ["".join(slip) for slip in _slips(list(answer), list(VOWELS), rng)]
    return [*slips, noun, noun + "s", noun + "es", answer + "s", f"{noun} {answer}"]


def _unsorted(question: str, answer: str, rng: random.Random) -> list[str]:
    integers = answer.split(", ")
    orders = [list(order) for order in itertools.permutations(integers)]
    near = [str(int(integer) + rng.choice([-10, -1, 1, 10])) for integer in integers]
    return [", ".join(order) for order in [*orders, *_slips(integers, near, rng)]]


def _other_word(question: str, answer: str, rng: random.Random) -> list[str]:
    words = re.split("[:?] ", question)[-1].split(", ")
    slips = ["".join(slip) for slip in _slips(list(answer), list(VOWELS), rng)]
    return [*words, *words, *slips, plural(answer), ", ".join(words[:2])]


def _miscounted(question: str, answer: str, rng: random.Random) -> list[str]:
    n = int(answer)
    return [str(n + off) for off in (-2, -1, -1, 1, 1, 2)]


def _miscalculated(question: str, answer: str, rng: random.Random) -> list[str]:
    a, b = sorted(map(int, re.findall(r"\d+", question)), reverse=True)
    n = int(answer)
    near = [n + off for off in (-3, -2, -1, 1, 2, 3, 10)] + [a + b, a - b, a, b]
    return [str(value) for value in near if value >= 0]


def _misconverted(question: str, answer: str, rng: random.Random) -> list[str]:
    (n,) = re.findall(r"\d+", question)
    factor = int(answer) // int(n)
    near = [(int(n) + off) * factor for off in (-10, -1, 1, 10) if int(n) + off > 0]
    return [n + "0" * zeros for zeros in range(5)] + [str(value) for value in near]


def wrong_answer(talk: Conversation, rng: random.Random) -> str:
    """Returns a random wrong answer to a question of `skills`, which is often close to the right answer.

    Args:
        talk: a conversation of one question, made by `skills(.., turns=1)`.
    """
    question, answer = (message["content"] for message in talk.messages)
    mistakes = SKILLS[talk.where.split(":")[0]].mistakes(question, answer, rng)
    return rng.choice([mistake for mistake in mistakes if mistake != answer])


SKILLS: dict[str, Skill] = {
    "uppercase": Skill(
        _word_task(lambda word: " ".join(word.upper())),
        ("Write {letters} in capital letters.", "Turn {letters} into uppercase.", "What is {letters} in all caps?"),
        _in_capitals,
    ),
    "spell": Skill(
        _word_task(" ".join),
        (
            "Spell {hyphens} with spaces.",
            "Write {hyphens} with a space in place of each hyphen.",
            "Take the hyphens out of {hyphens} and leave spaces.",
        ),
        _spaced,
    ),
    "reverse": Skill(
        _word_task(lambda word: " ".join(word[::-1])),
        (
            "Reverse these letters: {letters}",
            "Write the letters {letters} from the last to the first.",
            "What is {letters} backwards?",
        ),
        _backwards,
    ),
    "count_letters": Skill(
        _count,
        (
            "How many letters are in {letters}?",
            "Count these letters: {letters}",
            "{letters}: how many letters?",
        ),
        _miscounted,
    ),
    "plural": Skill(
        _word_task(plural),
        ("What is the plural of {word}?", "One {word}, two ...?", "Give the plural form of the noun {word}."),
        _pluralised,
    ),
    "sort": Skill(
        _sort,
        (
            "Sort these numbers: {list}",
            "Put {list} in order.",
            "Write these numbers from the smallest to the largest: {list}",
        ),
        _unsorted,
    ),
    "first_word": Skill(
        _list_task(lambda words: words[0], 3, 5),
        (
            "What is the first word in this list? {list}",
            "Which word comes first here: {list}",
            "Give only the first of these words: {list}",
        ),
        _other_word,
    ),
    "last_word": Skill(
        _list_task(lambda words: words[-1], 3, 5),
        (
            "What is the last word in this list? {list}",
            "Which word comes last here: {list}",
            "Give only the last of these words: {list}",
        ),
        _other_word,
    ),
    "add": Skill(_add, ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"), _miscalculated),
    "subtract": Skill(
        _subtract, ("What is {a} - {b}?", "Take {b} away from {a}.", "How much is {a} minus {b}?"), _miscalculated
    ),
    "convert": Skill(
        _convert,
        ("How many {small} are {n} {big}?", "Convert {n} {big} to {small}.", "Express {n} {big} in {small}."),
        _misconverted,
    ),
}


def skills(n: int, seed: int, held_out: bool = False, turns: int = 1) -> list[Conversation]:
    """Returns conversations that contain n synthetic questions in total, with the answers to the questions.

    The numbers of questions of any two skills differ by at most one. The attribute `where` of a conversation lists the
    skill and the index, from 1, of each question: "plural:16" is the 16th question, which asks for a plural. A question
    is repeated only if `ATTEMPTS` consecutive random draws gave questions that are already used.

    Args:
        held_out: whether to ask about the held-out subjects (words, sums, measures) instead of those for training.
        turns: maximum number of questions per conversation; the number is drawn uniformly from 1 .. turns.

    Raises:
        UserError: n is below 1.
    """
    if n < 1:
        raise UserError(f"skills: expected at least 1 example, got {n}")
    rng, lengths = random.Random(f"{seed} {held_out}"), random.Random(f"{seed} turns")
    words = [word for word in WORDS if is_held_out(word) == held_out]
    names, used = list(SKILLS), set()
    single_turns = []
    for i in range(n):
        name = names[i % len(names)]
        for _ in range(ATTEMPTS):
            question, answer = _draw(name, rng, words, held_out)
            if question not in used:
                break
        used.add(question)
        turn = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        single_turns.append(Conversation(turn, f"{name}:{i + 1}"))
    conversations, remaining = [], iter(single_turns)
    while group := list(itertools.islice(remaining, lengths.randint(1, turns))):
        messages = tuple(message for conversation in group for message in conversation.messages)
        conversations.append(Conversation(messages, " ".join(conversation.where for conversation in group)))
    return conversations


def _draw(name: str, rng: random.Random, words: list[str], held_out: bool) -> tuple[str, str]:
    skill = SKILLS[name]
    while True:
        task = skill.make(rng, words)
        if not task.key or is_held_out(task.key) == held_out:
            return rng.choice(skill.phrasings).format(**task.slots), task.answer
