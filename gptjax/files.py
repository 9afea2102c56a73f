"""Functions that read and write files. Files are written atomically, and existing files are not overwritten by
accident."""

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
    """Context manager for an atomic write: yields a temporary file that replaces the file `path` at the end of the
    `with` block.

    The temporary file is synced to disk, and is then renamed to `path`. If the `with` block raises an error, the file
    `path` is not changed.

    Args:
        shared: whether several processes may write the file at the same time, as in a cache. True: the temporary
            file gets a random name. False: the temporary file has a fixed name, so that a file left behind by a killed
            process is overwritten.
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
    """Write a text to a file atomically, in UTF-8."""
    data = text.encode()
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, with an indent of 1 and with non-ASCII characters unescaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_text(path, text.encode("utf-8", "backslashreplace").decode() + "\n")  # escapes lone surrogates


def sync(path: Path) -> None:
    """Flush a file, or the list of entries of a folder, to disk with fsync."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Returns the sha256 of the content of a file, as a string of hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Returns the sha256 of a JSON value; the hash does not depend on the order of keys.

    Hashes of `json_sha256` are stored on disk, so the way in which `json_sha256` serialises a value must not change.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that gptjax wrote.

    Raises:
        UserError: the file cannot be read, or is not UTF-8, not JSON, nested too deeply, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}\n  delete it to have it created again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}; delete it")
    return value


# Maps the byte order mark of each encoding to the name of the encoding. In `MARKS`, UTF-32 precedes UTF-16, because the
# byte order mark of little-endian UTF-32 starts with that of little-endian UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def other_encoding(start: bytes) -> str | None:
    """Returns an error message if a file starts with the byte order mark of an encoding other than UTF-8, else None."""
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return (
                f"expected UTF-8, found {name} by its byte order mark {mark.hex(' ').upper()}: convert the file with "
                f"iconv -f {name.lower()} -t utf-8 FILE > NEW"
            )
    return None


def one_line_end(text: str) -> str:
    """Convert the line ends of Windows (\\r\\n) and of classic Mac OS (\\r) to \\n.

    A \\r without a following \\n is converted only if the text contains no \\n at all.
    """
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")


def use_json(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    """Read a JSON object from a file that gptjax wrote, and return `make(object)`.

    Raises:
        UserError: `read_json` refuses the file, or `make` raises an error because a value is missing or invalid.
    """
    value = read_json(path)
    try:
        return make(value)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}\n  delete it to have it created again"
        ) from error


def number(value: Any) -> int | float:
    """Returns the value unchanged if the value is an int or a float; raises TypeError for any other value, including a
    bool."""
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, got {str(value)[:80]!r}")
    return value


def user_path(name: str | os.PathLike[str], setting: str = "") -> Path:
    """Converts a path that the user gave to a `Path`, and expands ~ to the home folder.

    Raises:
        UserError: the path is invalid, for example because it is too long or contains a NUL, or cannot be accessed.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        given = f"{setting}={name}" if setting else str(name)
        raise UserError(
            f"{given!s:.200}: not a path that can be used: {getattr(error, 'strerror', None) or error}"
        ) from error
    return path


def new_file(path: str | os.PathLike[str], setting: str = "out") -> Path:
    """Checks that a new file does not exist yet, creates its parent folder, and returns the path of the file.

    Call this function before the computation whose result is written to the file, so that an invalid path is reported
    early.

    Raises:
        UserError: the path exists already, or its folder cannot be created.
    """
    path = user_path(path, setting)
    refuse_existing(path, setting)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{setting}={path}: cannot create the folder {path.parent}: {error.strerror or error}"
        ) from error
    return path


def refuse_existing(path: Path, setting: str = "out") -> None:
    """Raise UserError if a file or folder exists already at `path`."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{setting}={path} exists already: name a new file")


def umask() -> int:
    """Returns the umask of the process, which callers apply to folders that `tempfile` created, because `tempfile`
    ignores the umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
