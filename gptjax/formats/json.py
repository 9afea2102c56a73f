"""JSON from elsewhere, read strictly: no object has a key twice, nothing is nested too deeply."""

from __future__ import annotations

import json
from typing import Any

from gptjax.errors import UserError
from gptjax.files import other_encoding

MAX_VALUES = 500_000  # of `parse_json`: they cost up to 600 bytes of memory each


class DuplicateKey(ValueError):
    """An object has this key twice."""

    def __init__(self, key: str):
        super().__init__(f"duplicate key {key!r:.80}")
        self.key = key


def loads(text: str, constants: bool = True) -> Any:
    """A JSON value. `constants`: NaN and Infinity are read too, which are no JSON, but which Python writes.

    Raises:
        ValueError: JSONDecodeError, DuplicateKey, or one that says what else is wrong.
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


def parse_json(text: bytes, where: str, what: str) -> dict[str, Any]:
    """A JSON object of at most MAX_VALUES values, as UTF-8.

    Raises:
        UserError: it is anything else. `where` and `what` are named: "{where}: the {what} is not JSON".
    """
    if other := other_encoding(text):
        raise UserError(f"{where}: {other}")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise UserError(f"{where}: the {what} has more than {MAX_VALUES:,} values")
    try:
        body = loads(text.decode("utf-8-sig"))
    except DuplicateKey as error:
        raise UserError(f"{where}: {error.key!r:.80} stands twice in the {what}") from None
    except ValueError as error:
        raise UserError(f"{where}: the {what} is not JSON ({str(error)[:100]})") from error
    if not isinstance(body, dict):
        raise UserError(f"{where}: the {what} must be a JSON object, got {type(body).__name__}")
    return body
