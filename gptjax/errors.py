"""Defines the error for invalid user input, and functions that write its error messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAX_SHOWN = 20 # Maximum number of problems that `refuse` lists. MAX_LINE = 300 # maximum number of characters per
problem, because names from files may be long


class UserError(ValueError):
    """Invalid user input. The command line prints the message without a traceback and exits with code 2.

    A message says what was expected, what was given, where, and how to fix it. Collect all problems before raising:
    `UserError.all(["...", "..."])` joins them, one per line.
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
    """If there are problems, raise one UserError that lists up to MAX_SHOWN of the problems, sorted."""
    if problems:
        shown = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in sorted(problems)[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            shown.append(f"... and {len(problems) - MAX_SHOWN} more")
        raise UserError.all([f"{location}:", *(f"  {line}" for line in shown)])


def complaints(check: Callable[..., Any], *args: Any) -> list[str]:
    """Returns a list with the message of the UserError that `check(*args)` raises; the list is empty if it raises none.

    The lists of several checks can be added, to report all problems at once.
    """
    try:
        check(*args)
    except UserError as error:
        return [str(error)]
    return []


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known word with the most similar spelling, or None if no word is similar."""
    import difflib  # imported here, because only error messages need it

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str], form: str = "; did you mean {}?") -> str:
    """Returns the template `form` with the most similar known word in place of {}, or "" if no word is similar."""
    near = nearest(word, known)
    return form.format(near) if near else ""


def did_you_mean_path(path: str | os.PathLike[str]) -> str:
    """Returns a hint that names the file or folder beside a missing path with the most similar name, or ""."""
    path = Path(path)
    try:
        near = nearest(path.name, [item.name for item in path.parent.iterdir()])
    except OSError:  # the parent folder is missing, too
        return ""
    return f"; did you mean {path.with_name(near)}?" if near else ""
