r"""Reward functions for reinforcement learning: `gptjax finetune reward` trains a model to maximise their weighted sum.

A reward function is a plain function (prompt, answer, example) -> float. `prompt` is the prompt of the model, `answer`
is the text that the model generated, and `example` is the row of the data file, a dict. Built-in reward functions read
the expected answer, a text or a number, from the key `expected` of the example or, if this key is missing, from its key
`answer`. The names of reward functions are:

    exact         1 if the answer equals the expected answer, ignoring leading and trailing whitespace, else 0
    normalised    like exact, but also ignoring case, differences in whitespace, and final full stops
    number        1 if the last number of the answer equals the expected number, else 0; see `number`
    boxed         1 if the text in the last \boxed{..} of the answer equals the expected text, else 0
    format        1 if the answer is <think>, reasoning, </think> and then an answer, else 0
    format:REGEX  1 if the regular expression matches somewhere in the answer (as re.search does: ^ and $ anchor it, and
                  (?s) at its start lets . match the ends of lines), else 0
    length:N      1 for up to N words, decreasing linearly to 0 for 2 N words or more; whitespace separates words
    constraints   the proportion of the row's constraints that are met (see `generation_metrics.CONSTRAINTS`); 1 if the
                  row has none
    judge:MODEL@URL
                  the score that a model gives, from 0 to 1. It runs on a server with OpenAI's API, as in
                  judge:qwen2.5:7b@http://localhost:11434/v1; the environment variable OPENAI_API_KEY holds the API key.
                  The time limit of rewards must allow for the server's replies
    path/to/mine.py:score
                  the function `score` of a Python file

The reasoning of a model is not part of its answer: if the generated text contains </think>, all built-in reward
functions except format and length read only the text after the last </think>.

The value of a user's reward function must depend only on the function's arguments, because reward functions run in
several processes, which are restarted after a failure (see `workers`). Before each call of a reward function, the
modules `random` and `numpy.random` are seeded with the prompt and the answer.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import operator
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import Problems, UserError, complaints, did_you_mean, did_you_mean_path, refuse
from gptjax.evaluation.generation_metrics import check_constraints, is_exact, is_met, is_normalised
from gptjax.files import user_path
from gptjax.processes import Child

Example = dict[str, Any]
RewardFunction = Callable[[str, str, Example], float]

SETTING = "reward.functions"
PROGRAM = "gptjax.evaluation._scoring"  # Module of the program that runs reward functions in a child process.
START_TIMEOUT_S = 60.0  # Seconds in which the child process must start and import the user's files.
MAX_DIGITS = 400  # Maximum number of characters of a number, and maximum absolute value of its exponent.
MAX_EXPRESSION = 200  # Maximum number of characters of an arithmetic expression.
MAX_BITS = 10_000  # Maximum size in bits of a value in an arithmetic expression.


# --- the built-in reward functions


def exact(prompt: str, answer: str, example: Example) -> float:
    """Returns 1 if the answer equals the expected answer according to `generation_metrics.is_exact`, else 0."""
    return float(is_exact(final(answer), expected(example)))


def normalised(prompt: str, answer: str, example: Example) -> float:
    """Returns 1 if the answer equals the expected answer according to `generation_metrics.is_normalised`, else 0."""
    return float(is_normalised(final(answer), expected(example)))


def boxed(prompt: str, answer: str, example: Example) -> float:
    r"""Returns 1 if the text in the answer's last \boxed{..} equals the expected text, else 0.

    Differences in whitespace between the two texts are ignored. The expected text may also be written as \boxed{..}.
    """
    text, wanted = in_box(final(answer)), expected(example)
    if (inner := in_box(wanted)) is not None:
        wanted = inner
    return float(text is not None and text.split() == wanted.split())


def number(prompt: str, answer: str, example: Example) -> float:
    r"""Returns 1 if the number in the answer equals the expected number, else 0.

    If the answer contains \boxed{..}, the content of the last \boxed{..} must be a single number, which a unit may
    follow and "x =" may precede. In an answer without \boxed{..}, the last number counts. The expected number is read
    from the expected answer as the number in the answer is, but may also be given as an arithmetic expression such as
    12 + 7. Arithmetic expressions in the answer are not evaluated, because the model would otherwise learn to repeat
    the question.

    Numbers are compared exactly, as fractions: 0.5, .50, 1/2, \frac{1}{2} and 2/4 are equal, and 0.33 is not 1/3.
        1,234.5  -3  $5  1/2  1 1/2  \frac{1}{2}  6e3  50%  1{,}234     digits of ASCII only
    A percentage such as 50% is equal to the fraction 0.5, and also to the number 50 without the percent sign.

    Raises:
        UserError: the row has no expected number.
    """
    text = expected(example)
    wanted = _number_of(text)
    if wanted is None:
        raise UserError(f"the expected answer {text!r:.60} contains no number")
    found = read_number(final(answer))
    return float(found is not None and _equal(found, wanted))


def reasoning_format(prompt: str, answer: str, example: Example) -> float:
    """Returns 1 if the generated text consists of <think>, the reasoning, </think> and the answer, and each tag occurs
    once, else 0.

    If the prompt already ends with <think>, as in some chat templates, the generated text must begin with the
    reasoning, without <think>.
    """
    text = answer.strip()
    if not prompt.rstrip().endswith("<think>"):
        if not text.startswith("<think>"):
            return 0.0
        text = text.removeprefix("<think>")
    reasoning, _, rest = text.partition("</think>")
    tags = "<think>" in text or "</think>" in rest
    return float(bool(reasoning.strip() and rest.strip()) and not tags)


def constraints(prompt: str, answer: str, example: Example) -> float:
    """Returns the proportion of the row's constraints that the answer meets, or 1 if the row has no constraints.

    Raises:
        UserError: the row's constraints are invalid.
    """
    items = example.get("constraints") or []
    if problems := check_constraints(items, "constraints"):
        raise UserError.all(problems)
    met = [is_met(final(answer), item) for item in items]
    return sum(met) / len(met) if met else 1.0


def matches(pattern: str) -> RewardFunction:
    """Returns a reward function whose value is 1 if the regular expression `pattern` matches anywhere in the answer,
    else 0.

    Raises:
        UserError: the pattern is empty or not a valid regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"not a valid regular expression: {error}") from None
    if not pattern:
        raise UserError("expected a regular expression after format:")
    return lambda prompt, answer, example: float(compiled.search(answer) is not None)


def at_most_words(limit: str) -> RewardFunction:
    """Returns a reward function whose value is 1 for an answer of up to `limit` words, and decreases linearly to 0 at
    twice as many words.

    Raises:
        UserError: `limit` is not a positive whole number.
    """
    if not re.fullmatch("0*[1-9][0-9]{0,8}", limit):
        raise UserError(f"expected a positive number of words, as in length:200, got {limit!r:.60}")
    n = int(limit)
    return lambda prompt, answer, example: min(1.0, max(0.0, 2 - len(answer.split()) / n))


def judged(address: str) -> RewardFunction:
    """Returns a reward function whose value is the score of the answer by a judge model, from 0 to 1. `address` is
    MODEL@URL.

    Raises:
        UserError: there is no model or URL, or the URL or the API key is invalid. The function raises it if the server
            cannot be reached or gives no score.
    """
    # The module `judge` is imported only here, because it imports network libraries.
    from gptjax.evaluation.judge import judge

    model, at, url = address.rpartition("@")
    if not (model and at and url):
        raise UserError("expected judge:MODEL@URL, as in judge:qwen2.5:7b@http://localhost:11434/v1")
    judge([], url, model, log=print)  # called without answers, `judge` only checks the URL and the API key

    def score(prompt: str, answer: str, example: Example) -> float:
        row = {**example, "prompt": prompt, "expected": expected(example), "answer": final(answer)}
        (points,) = judge([row], url, model, log=lambda message: None)
        if points is None:
            raise UserError(f"{model} gave no number from 0 to 100")
        return points / 100

    return score


FUNCTIONS: dict[str, RewardFunction] = {
    "exact": exact,
    "normalised": normalised,
    "number": number,
    "boxed": boxed,
    "format": reasoning_format,
    "constraints": constraints,
}
WITH_ARGUMENT: dict[str, Callable[[str], RewardFunction]] = {
    "format": matches,
    "length": at_most_words,
    "judge": judged,
}
KNOWN = f"{', '.join(FUNCTIONS)}, format:REGEX, length:N, judge:MODEL@URL, path/to/file.py:function"


# --- functions that read answers and rows


def final(answer: str) -> str:
    """Returns the answer without its reasoning: the text after the last </think>, or the whole text if it contains no
    </think>."""
    return answer.rpartition("</think>")[2]


def expected(example: Example) -> str:
    """Returns the expected answer of a row, as a text.

    Raises:
        UserError: there is no text or number under the key `expected`, nor, if that is missing, `answer`.
    """
    value = example.get("expected")
    value = example.get("answer") if value is None else value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"expected a text or a number under the key expected or answer, got {value!r:.60}")
    return str(value)


def in_box(text: str) -> str | None:
    r"""Returns the content of the last complete \boxed{..} in a text, or None if there is none. If a \boxed{..}
    contains another \boxed{..}, the content of the inner one is returned."""
    found, last = None, -1
    begins: list[int] = []  # for each open brace, the position after \boxed{, or -1 if the brace does not follow \boxed
    for match in re.finditer(r"\\boxed\s*+\{|\\[\\{}]|[{}]", text):
        if match[0].startswith("\\boxed"):
            begins.append(match.end())
        elif match[0] == "{":
            begins.append(-1)
        elif match[0] == "}" and begins and (begin := begins.pop()) > last:
            found, last = text[begin : match.start()], begin
    return found


class Number(NamedTuple):
    value: Fraction
    percent: bool = False  # True if the number is followed by a percent sign, which is not included in `value`


_SIGN = "[-\u2212\u2013]"  # The sign of a negative number is a hyphen, a minus sign or an en dash.
# Possessive quantifiers, such as ++, never backtrack, so that matching takes linear time.
NUMBER = re.compile(
    rf"""
    (?:(?<![A-Za-z0-9_)\]}}.%])(?P<sign>{_SIGN}))?   # 3-5 has no sign
    (?:\\?[$£€¥][ ]?(?P<second_sign>{_SIGN})?)?
    (?<![A-Za-z_])(?<!\d)(?<!\d\.)                   # no part of a word or of a version such as 1.2.3
    (?P<digits>(?:[0-9]{{1,3}}(?:,[0-9]{{3}})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)(?!\d)
    (?P<exponent>[eE][-+]?[0-9]++(?![A-Za-z]))?
    (?:[ ](?P<numerator>[0-9]++)(?=[ ]?/[ ]?[0-9]))?        # of 1 1/2
    (?:[ ]?/[ ]?(?P<denominator>[0-9]++)(?![.,]?[0-9]))?
    (?P<percent>\s?(?:\\?%|percent\b|per\ cent\b))?
    """,
    re.VERBOSE,
)


def read_number(text: str) -> Number | None:
    r"""Returns the number in \boxed{..}, or the last number of the text if the text has no \boxed{..}. Returns None if
    there is no number.

    Returns None if \boxed{..} contains anything besides a single number with its unit, or if the number has more than
    MAX_DIGITS characters.
    """
    box = in_box(text)
    plain = _without_latex(text if box is None else box)
    if box is None:
        last = max(NUMBER.finditer(plain), key=re.Match.start, default=None)
        return None if last is None else _value(last)
    match = NUMBER.match(re.sub(r"^\s*(?:[A-Za-z]\w*\s*=)?\s*", "", plain))
    if match is None:
        return None
    unit = re.sub(r"\^\{?[0-9]\}?", "", match.string[match.end() :])  # of cm^2
    return None if re.search(r"^\s*/|[\d\\^*+=<>(){}\u2212-]", unit) else _value(match)


def _without_latex(text: str) -> str:
    """Converts LaTeX to plain text: fractions become a/b, and spacing and text commands are removed."""
    if "\\" not in text and "{" not in text:
        return text
    text = text.replace("{,}", ",")
    text = re.sub(r"\\[,!;: ]|\\(?:left|right)\b|\^\{?\\circ\}?", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}\\]*+)\}", r" \1 ", text)
    number = r"(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))"
    return re.sub(
        rf"(?P<whole>(?<=[0-9]))?\\[dt]?frac\s*{number}\s*{number}",
        lambda m: f"{' ' if m['whole'] is not None else ''}{m[2] or m[3]}/{m[4] or m[5]}",
        text,
    )


def _value(match: re.Match[str]) -> Number | None:
    if len(match[0]) > MAX_DIGITS or abs(int((match["exponent"] or "e0")[1:])) > MAX_DIGITS:
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["denominator"]:
        denominator = int(match["denominator"])
        if not denominator:
            return None
        if match["numerator"] is None:
            value /= denominator
        else:
            part = Fraction(int(match["numerator"]), denominator)
            value = value + part if value.denominator == 1 and part < 1 else part
    negative = bool(match["sign"]) != bool(match["second_sign"])
    return Number(-value if negative else value, match["percent"] is not None)


def _equal(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    return a.percent != b.percent and (a.value / 100 if a.percent else a.value) == (
        b.value / 100 if b.percent else b.value
    )


def _number_of(text: str) -> Number | None:
    """Returns the number in an expected answer: the value of the text if it is an arithmetic expression, otherwise the
    number that `read_number` finds in the text."""
    try:
        return Number(evaluate(text))
    except ArithmeticError as error:
        raise UserError(f"the expected answer {text!r:.60} has no value: {error}") from None
    except ValueError:
        return read_number(text)


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


# `_SIGNS` maps the code points of × · ÷, the minus sign and ^ to Python's operators.
_SIGNS = {0xD7: "*", 0xB7: "*", 0xF7: "/", 0x2212: "-", ord("^"): "**"}


def evaluate(expression: str) -> Fraction:
    """Returns the exact value of an arithmetic expression such as 2 * (3 + 4) / 5, written as in Python.

    The argument `expression` may contain decimal numbers, parentheses and the operators + - * / // % **. The characters
    ^ × · ÷ stand for the operators ** * * /. The argument `expression` is not executed as Python code, and evaluating
    any expression takes little time and memory.

    Raises:
        ValueError: the text is not an arithmetic expression of at most MAX_EXPRESSION characters.
        ArithmeticError: it divides by zero, has an exponent that is not a whole number, or has a value of more than
            MAX_BITS bits.
    """
    text = expression.strip().translate(_SIGNS)
    if len(text) > MAX_EXPRESSION or not re.fullmatch(r"[-+*/%().0-9eE ]+", text):
        raise ValueError(f"{expression!r:.60} is not a plain arithmetic expression")
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r:.60} is not a plain arithmetic expression: {error}") from None


def _evaluate(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # A float is converted by its decimal digits, so that 0.1 is 1/10; inf raises a ValueError.
        value = Fraction(repr(node.value))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_evaluate(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _evaluate(node.left), _evaluate(node.right)
        if exponent.denominator != 1 or abs(exponent) * _bits(base) > MAX_BITS:
            raise OverflowError("an exponent is too large, or not a whole number")
        value = base ** int(exponent)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = Fraction(_OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right)))
    else:
        raise ValueError(f"not arithmetic: {type(node).__name__}")
    if _bits(value) > MAX_BITS:
        raise OverflowError("a value is too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


# --- names


def parse(names: Sequence[str]) -> tuple[str, ...]:
    """Checks the names of reward functions, and returns them as a tuple.

    The Python files of users are imported in a child process, which checks that each named function exists and has the
    expected parameters.

    Raises:
        UserError: there are no names, a name occurs twice or is unknown, an argument is missing or invalid, or a file
            or its function is missing or cannot be used. The message lists all problems.
    """
    problems = Problems()
    if not names:
        problems.append(f"{SETTING}: expected at least one of {KNOWN}")
    problems += [f"{SETTING}: {name} occurs {n} times" for name, n in Counter(names).items() if n > 1]
    files = [name for name in names if _is_file(name)]
    for name in names:
        if name not in files:
            problems += complaints(load, name)
    if files:
        with Child.module(PROGRAM) as child:
            problems += start(child, files)
    problems.raise_if_any()
    return tuple(names)


def start(child: Child, names: Sequence[str]) -> list[str]:
    """Makes a new child process, which runs PROGRAM, load reward functions, and returns the error messages of the child
    process."""
    try:
        return child.ask({"names": list(names), "timeout_s": START_TIMEOUT_S}, START_TIMEOUT_S)
    except TimeoutError:
        return [f"{SETTING}: {', '.join(names)}: loading takes longer than {START_TIMEOUT_S:g} s"]
    except (EOFError, ValueError) as error:
        return [f"{SETTING}: {', '.join(names)}: the import {error}"]


def check_rows(names: Sequence[str], rows: Iterable[tuple[str, Example]]) -> None:
    """Checks that each row has the data that the built-in reward functions in `names` need, such as an expected number.

    Args:
        names: names of reward functions, which `parse` accepts.
        rows: pairs (location, example).

    Raises:
        UserError: rows lack something. The message lists the first of them.
    """
    functions = {name: FUNCTIONS[name] for name in names if name in FUNCTIONS}
    functions |= {name: exact for name in names if name.startswith("judge:")}
    problems = [
        f"{location}: {name}: {problem}"
        for location, example in rows
        for name, function in functions.items()
        for problem in complaints(function, "", "", example)
    ]
    refuse(SETTING, problems)


def load(name: str) -> RewardFunction:
    """Returns the reward function that has the given name. If the name of a reward function contains the path of a
    Python file, the file is imported into the calling process.

    Raises:
        UserError: the name is unknown, its argument is missing or invalid, or a file or its function is missing or
            cannot be used.
    """
    kind, colon, argument = name.partition(":")
    try:
        if _is_file(name):
            return _from_file(name)
        if kind in WITH_ARGUMENT and (colon or kind not in FUNCTIONS):
            return WITH_ARGUMENT[kind](argument)
        if kind in FUNCTIONS:
            if colon:
                raise UserError(f"{kind} takes no argument")
            return FUNCTIONS[kind]
        raise UserError(f"unknown{did_you_mean(kind, {**FUNCTIONS, **WITH_ARGUMENT})}; expected one of {KNOWN}")
    except UserError as error:
        raise UserError(f"{SETTING}: {name}: {error}") from None


def _is_file(name: str) -> bool:
    kind = name.partition(":")[0]
    return ".py" in name and kind not in FUNCTIONS and kind not in WITH_ARGUMENT


def _from_file(name: str) -> RewardFunction:
    if name.endswith(".py"):
        raise UserError("expected the name of a function after the file, as in mine.py:score")
    file, _, function_name = name.rpartition(":")
    path = user_path(file)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{file}: no such file{did_you_mean_path(path)}")
    module = _import(path.resolve())
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
        known = [key for key, value in functions.items() if value.__module__ == module.__name__]
        has = f"it has {', '.join(known)}" if known else "it has no functions"
        raise UserError(f"no such function{did_you_mean(function_name, known)}; {has}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function in C
        return function
    try:
        signature.bind("", "", {})
    except TypeError:
        raise UserError(f"expected a function (prompt, answer, example), got {signature}") from None
    if any(check(function) for check in (inspect.iscoroutinefunction, inspect.isgeneratorfunction)):
        raise UserError("expected a plain function, got one with async or yield")
    return function


def _import(path: Path) -> Any:
    """Imports a Python file as a module whose name is the file's path. The folder of the file is appended to
    `sys.path`, so that the file can import other files in its folder."""
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # also SystemExit
        del sys.modules[name]
        raise UserError(f"the import raised {describe(error, name)}") from None
    return module


def describe(error: BaseException, path: str) -> str:
    """Returns one line of text with the type and the message of an error, and the number of the line of the file `path`
    in which the error was raised."""
    try:
        message = str(error)
    except Exception:
        message = "an error whose text cannot be read"
    message = " ".join("".join(c if c.isprintable() else " " for c in message[:1000]).split())[:200]
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"
