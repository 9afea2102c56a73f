"""What is said to a person whose input is bad."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

MAX_SHOWN = 20  # problems that `refuse` lists
MAX_LINE = 300  # characters of one of them: names come out of files


class UserError(ValueError):
    """Bad input from a person: the command line prints it without a traceback and exits with code 2.

    Say what was expected, what came, where, and the way out. Collect every problem before raising:
    `UserError.all(["...", "..."])` joins them one to a line.
    """

    @classmethod
    def all(cls, problems: list[str]) -> UserError:
        return cls("\n".join(problems))


class Problems(list[str]):
    """Complaints, collected so that a person sees all of them at once."""

    def raise_if_any(self) -> None:
        if self:
            raise UserError.all(self)


def refuse(where: str, problems: list[str]) -> None:
    """Raises one UserError for all the problems, in order; the first MAX_SHOWN are spelled out."""
    if problems:
        shown = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in sorted(problems)[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            shown.append(f"... and {len(problems) - MAX_SHOWN} more")
        raise UserError.all([f"{where}:", *(f"  {line}" for line in shown)])


def complaints(check: Callable[..., Any], *args: Any) -> list[str]:
    """What the check raises for a person, or nothing: for several checks whose problems are said at once."""
    try:
        check(*args)
    except UserError as error:
        return [str(error)]
    return []


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is spelled most like this one; None if none is at all like it."""
    import difflib  # only when something is wrong

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str], form: str = "; did you mean {}?") -> str:
    """The hint with the nearest of the known words, or nothing."""
    near = nearest(word, known)
    return form.format(near) if near else ""
