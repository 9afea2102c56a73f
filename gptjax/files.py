"""Files of a run: written whole or not at all, read with a clear error, never in the place of somebody else's."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from gptjax.errors import UserError

T = TypeVar("T")


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` at the end of the block: by one rename, when all of it is
    on the disk. Where the block raises, nothing has changed.

    Args:
        shared: several processes may do this at once, as in a cache: each has a partial file of its own, and readers
            see a whole file of one of them. Otherwise the partial file of a process that was killed is written anew.
    """
    partial = path.with_name(f".{os.urandom(4).hex() if shared else path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """All of it as UTF-8, or nothing: see `replacing`."""
    data = text.encode()
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, indented by one; letters stay letters."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_text(path, text.encode("utf-8", "backslashreplace").decode() + "\n")  # half a character as JSON escapes it


def sync(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys. These hashes are kept on disk: the text must stay as it is."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that gptjax wrote.

    Raises:
        UserError: the file is damaged: not UTF-8, not JSON, nested too deep, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}\n  delete it to have it made again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}; delete it")
    return value


MARKS = {  # the longer ones first: that of UTF-32 begins as that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def other_encoding(start: bytes) -> str | None:
    """What to say of a file with this beginning, if its byte order mark says that it is not UTF-8."""
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return (
                f"expected UTF-8, found {name} by its byte order mark {mark.hex(' ').upper()}: convert the file with "
                f"iconv -f {name.lower()} -t utf-8 FILE > NEW"
            )
    return None


def one_line_end(text: str) -> str:
    """The text with \\n for the line ends of Windows and of old Macs (a carriage return, and no line feed anywhere)."""
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")


def use_json(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of a JSON object that gptjax wrote.

    Raises:
        UserError: the file is damaged: `read_json` refuses it, or a part is missing or another than `make` needs.
    """
    value = read_json(path)
    try:
        return make(value)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}\n  delete it to have it made again"
        ) from error


def number(value: Any) -> int | float:
    """The value. Raises TypeError if it is no number; a bool is none."""
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, got {str(value)[:80]!r}")
    return value


def user_path(name: str | os.PathLike[str], setting: str = "") -> Path:
    """A path as a person writes it, ~ being the home.

    Raises:
        UserError: no file system takes that name (too long, a NUL), or it cannot be looked at.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        where = f"{setting}={name}" if setting else str(name)
        raise UserError(
            f"{where!s:.200}: not a path that can be used: {getattr(error, 'strerror', None) or error}"
        ) from error
    return path


def new_file(path: str | os.PathLike[str], setting: str = "out") -> Path:
    """The path, after its folder was made. Called before the work whose result goes there.

    Raises:
        UserError: something is there already, or its folder cannot be made.
    """
    path = user_path(path, setting)
    refuse_existing(path, setting)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}={path}: cannot make the folder {path.parent}: {error.strerror or error}") from error
    return path


def refuse_existing(path: Path, setting: str = "out") -> None:
    """Raises UserError if something is there already; makes nothing."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{setting}={path} exists already: name a new file")


def umask() -> int:
    """The permissions that the user's new files shall not have; folders of `tempfile` ignore it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
