"""Defines the error for invalid user input, and functions that write its error messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAX_SHOWN = 20  # Maximum number of problems that `refuse` lists.
MAX_LINE = 300  # Maximum number of characters per problem, because names that are read from files may be long.


class UserError(ValueError):
    """The error for invalid user input. The command line prints the error message without a traceback, and exits with
    code 2.

    The error message should say what was expected, what was given, where the invalid value was set, and how to fix the
    problem. Code that checks user input should collect all problems before raising an error: `UserError.all(["...",
    "..."])` joins several messages, one per line.
    """

    @classmethod
    def all(cls, problems: list[str]) -> UserError:
        return cls("\n".join(problems))


class Problems(list[str]):
    """A list of error messages, which `raise_if_any` reports together in one UserError."""

    def raise_if_any(self) -> None:
        if self:
            raise UserError.all(self)


def refuse(location: str, problems: list[str]) -> None:
    """If `problems` is not empty, raise a UserError that lists the problems in sorted order, up to MAX_SHOWN of
    them."""
    if problems:
        shown = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in sorted(problems)[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            shown.append(f"... and {len(problems) - MAX_SHOWN} more")
        raise UserError.all([f"{location}:", *(f"  {line}" for line in shown)])


def complaints(check: Callable[..., Any], *args: Any) -> list[str]:
    """Returns a list with the message of the UserError that `check(*args)` raises; the list is empty if `check` raises
    no UserError.

    The lists that `complaints` returns for several checks can be concatenated, in order to report all problems at once.
    """
    try:
        check(*args)
    except UserError as error:
        return [str(error)]
    return []


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known word with the most similar spelling, or None if no word is similar."""
    import difflib  # difflib is imported only here, because only error messages need difflib

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str], form: str = "; did you mean {}?") -> str:
    """Returns the template `form` with the most similar known word in place of {}, or "" if no word is similar."""
    near = nearest(word, known)
    return form.format(near) if near else ""


def did_you_mean_path(path: str | os.PathLike[str]) -> str:
    """Returns a hint that names the existing file or folder whose name is most similar to that of the missing path, or
    "" if no name is similar."""
    path = Path(path)
    try:
        near = nearest(path.name, [item.name for item in path.parent.iterdir()])
    except OSError:  # the parent folder of the path is also missing
        return ""
    return f"; did you mean {path.with_name(near)}?" if near else ""
