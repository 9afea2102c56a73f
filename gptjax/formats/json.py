"""Parses untrusted JSON text strictly: duplicate keys and values that are nested too deeply are errors."""

from __future__ import annotations

import json
from typing import Any

from gptjax.errors import UserError
from gptjax.files import other_encoding

MAX_VALUES = 500_000  # Maximum number of values that `parse_json` reads; each value takes up to 600 bytes of memory.


class DuplicateKey(ValueError):
    """The error that is raised if a key occurs twice in a JSON object."""

    def __init__(self, key: str):
        super().__init__(f"duplicate key {key!r:.80}")
        self.key = key


def loads(text: str, constants: bool = True) -> Any:
    """Parse a JSON value.

    Args:
        constants: whether to accept NaN and Infinity, which are not valid JSON, but which Python's json module writes.

    Raises:
        ValueError: the text is not valid JSON (JSONDecodeError), a key is duplicate (DuplicateKey), NaN or Infinity is
            not accepted, or values are nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: bytes, location: str, what: str) -> dict[str, Any]:
    """Parse UTF-8 text that is a JSON object of at most MAX_VALUES values, and return it as a dict.

    Args:
        location: name of the file, for error messages such as "{location}: the {what} is not JSON".
        what: what the text is, for these messages, such as "header".

    Raises:
        UserError: the text is not a JSON object, or has too many values.
    """
    if other := other_encoding(text):
        raise UserError(f"{location}: {other}")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise UserError(f"{location}: the {what} has more than {MAX_VALUES:,} values")
    try:
        body = loads(text.decode("utf-8-sig"))
    except DuplicateKey as error:
        raise UserError(f"{location}: duplicate key {error.key!r:.80} in the {what}") from None
    except ValueError as error:
        raise UserError(f"{location}: the {what} is not JSON ({str(error)[:100]})") from error
    if not isinstance(body, dict):
        raise UserError(f"{location}: the {what} must be a JSON object, got {type(body).__name__}")
    return body
