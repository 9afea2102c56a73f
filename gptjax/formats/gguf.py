"""Reads and writes GGUF files, the model format of llama.cpp.

    file = gguf.read("model.gguf")             # reads and validates the header only
    file.metadata["general.architecture"]      # "llama"
    file.array("token_embd.weight")            # [49152, 576] float32, dequantised

All values in a GGUF file are little-endian. A GGUF file consists of a header with typed key-value pairs (the metadata)
and the list of tensors, padding to the alignment, and the data of each tensor at an aligned offset. A quantised tensor
is stored in blocks of values along its last axis, and each block has its own scale; `TYPES` defines the block layout of
each tensor type.

GGUF files are untrusted: every count and length is compared with the remaining size of the file before memory is
allocated, so that an invalid file raises an error. The tensor data is read, not memory-mapped, because this process
would be killed if another process truncated a memory-mapped file.

Sources: the file format is specified in docs/gguf.md of ggml, and the block layouts are defined in ggml-quants.c of
ggml. The dequantised values of GGUF tensors are bit-identical to those of the package gguf-py.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from gptjax.errors import UserError, did_you_mean
from gptjax.files import replacing

MAGIC, VERSION, READABLE = b"GGUF", 3, (2, 3)
ALIGNMENT = 32  # Alignment of the tensor data in bytes if the metadata has no key general.alignment.

MAX_HEADER_BYTES = 64 << 20  # Maximum size of metadata and tensor list in bytes; the largest vocabularies need 20 MB.
MAX_STRING_BYTES = 1 << 20
# Maximum total number of strings in all arrays of the metadata; the largest tokenizers have 0.65 million tokens and
# merges.
MAX_STRINGS = 1 << 20
MAX_METADATA, MAX_TENSORS, MAX_DIMS = 10_000, 20_000, 4
MAX_ALIGNMENT = 64 << 10
# Maximum size of a tensor name in bytes when a file is written, because llama.cpp refuses longer names.
MAX_NAME_BYTES = 63
MAX_SHOWN = 20  # Maximum number of problems that an error message lists.

CHUNK = 1 << 16  # Number of values that are converted at once; this many values fit in the CPU cache.

# A `NewTensor` is a tensor to be written: its name, shape, type, and a function that computes its values.
NewTensor = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Tensor:
    """The name, shape, type and location of a tensor in a GGUF file.

    The dimensions in `shape` are in numpy's order, which is the reverse of their order in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str  # Name of the tensor type, a key of TYPES.
    offset: int  # Byte offset of the tensor's data from the start of the file.
    size_bytes: int  # Size of the tensor's data in the file, in bytes.


@dataclass(frozen=True, eq=False)
class File:
    """The header of a GGUF file, with a method that reads a tensor.

    metadata: Dict from each metadata key to its value: a bool, int, float, str, list of str, or a numpy array of
      numbers or bools with the dtype in the file.
    tensors: Dict from the name of each tensor to its `Tensor`, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def array(self, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Read one tensor, dequantise it to float32 and cast it to `dtype`.

        Reading a tensor takes 1 MB of memory in addition to the memory of the returned array.

        Raises:
            UserError: no tensor has this name, or the file has changed since the header was read.
        """
        if name not in self.tensors:
            hint = did_you_mean(name, self.tensors, ", did you mean {!r}?")
            raise UserError(f"{self.path}: no tensor is called {_quote(name)}{hint}")
        tensor = self.tensors[name]
        try:
            with open(self.path, "rb") as file:
                file.seek(tensor.offset)
                return _decode(lambda start, stop: file.read(stop - start), TYPES[tensor.type], tensor.shape, dtype)
        except (OSError, UserError) as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}") from error


def read(path: str | os.PathLike[str]) -> File:
    """Read the metadata and the tensor list of a GGUF file, version 2 or 3.

    Raises:
        UserError: the file is not a GGUF file or is truncated, or its header is invalid, too large or uses a type that
            is not supported. The error message lists up to MAX_SHOWN invalid tensors.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError("not a file" if path.exists() else "no such file")
        with open(path, "rb") as file:
            return File(path, *_parse(file, os.fstat(file.fileno()).st_size))
    except (OSError, UserError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def write(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[NewTensor]) -> None:
    """Write a GGUF file, version 3, atomically.

    Args:
        metadata: maps each key to its value: a bool, int, float or str, a list of one of these types, or a numpy
            scalar or 1-d array, which keeps its dtype. An int is written in the first of the types uint32, int32,
            int64 and uint64 that can hold it. A list of ints is written in the first of int32, int64 and uint64 that
            can hold all of them. Floats are written as float32. The key "general.alignment" sets the alignment of the
            tensors' data in bytes.
        tensors: a tuple (name, shape, type, values) for each tensor. `type` is F32, F16, BF16 or Q8_0. `values` is a
            function without arguments that returns the array; it is called when the tensor is written, and the array
            is freed before the next call.

    Raises:
        UserError: the metadata, or the names, types and shapes of the tensors, violate the format or a limit of `read`
            or llama.cpp (raised before `values` of any tensor is called); an array does not have the given shape, or
            has values that are too large for its type; or the file cannot be written.
    """
    path, tensors = Path(path), list(tensors)
    try:
        header, alignment = _header(metadata, tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(header)
            for name, shape, type_, values in tensors:
                _write_tensor(file, name, shape, type_, values)
                file.write(bytes(-file.tell() % alignment))
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def quantize(array: np.ndarray, type: str) -> np.ndarray:
    """Encode an array in a GGUF type (F32, F16, BF16 or Q8_0), and return its bytes, [N] uint8.

    Raises:
        UserError: the type cannot be written or cannot represent the values, or the last axis is not a multiple of the
            block size.
    """
    array, kind = np.asarray(array), _writable(type)
    _check_rows(kind, array.shape)
    return np.frombuffer(b"".join(_encode(array, kind)), np.uint8)


def dequantize(raw: Any, type: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.ndarray:
    """Decode the bytes of a tensor, of any type in TYPES, to an array of the given shape and dtype. `dequantize` is the
    inverse of `quantize`."""
    kind, raw = _known(type), memoryview(raw).cast("B")
    _check_rows(kind, shape)
    if len(raw) != _size_bytes(kind, shape):
        raise UserError(f"{type}{list(shape)} takes {_size_bytes(kind, shape)} bytes, got {len(raw)}")
    return _decode(lambda start, stop: raw[start:stop], kind, shape, dtype)


# --- reading the header


def _parse(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor = _Cursor(file, size)
    _check_magic(cursor)
    n_tensors = cursor.count("tensors", MAX_TENSORS)
    n_metadata = cursor.count("metadata entries", MAX_METADATA)
    metadata: dict[str, Any] = {}
    for index in range(n_metadata):
        key = cursor.text(f"the key of metadata entry {index}")
        if key in metadata:
            raise UserError(f"duplicate metadata key {_quote(key)}")
        metadata[key] = _value(cursor, f"metadata {_quote(key)}")
    entries = [_entry(cursor, index) for index in range(n_tensors)]
    alignment = _alignment(metadata)
    start = cursor.position + -cursor.position % alignment
    problems = [line for entry in entries for line in _wrong(entry, start, alignment, size)]
    tensors = {} if problems else _tensors(entries, start, alignment, size, problems)
    if problems:
        more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise UserError.all([f"{len(problems)} bad tensors:", *(f"  {x}" for x in problems[:MAX_SHOWN] + more)])
    return metadata, tensors


class _Cursor:
    """Reads the header of a file from start to end, and checks before every read that the file size and
    MAX_HEADER_BYTES are not exceeded."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.position, self.strings = file, size, 0, 0

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.position:
            raise UserError(f"cut short or damaged: {what} takes {n} bytes at byte {self.position} of {self.size}")
        if n > MAX_HEADER_BYTES - self.position:
            raise UserError(
                f"{what} at byte {self.position} takes {n} bytes: the header may have {MAX_HEADER_BYTES} in all"
            )
        self.position += n
        data = self.file.read(n)
        if len(data) != n:
            raise UserError(f"cut short while it was read, in {what}")
        return data

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def count(self, what: str, limit: int) -> int:
        n = self.u64(f"the number of {what}")
        if n > limit:
            raise UserError(f"{n} {what}, at most {limit} are read")
        return n

    def text(self, what: str, index: int | None = None) -> str:
        n = self.u64(what)
        if n > MAX_STRING_BYTES:
            raise UserError(f"{_item(what, index)}: a string of {n} bytes, at most {MAX_STRING_BYTES} are read")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{_item(what, index)} is not UTF-8: {error.reason} at byte {error.start}") from error


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Maps the id of each numeric metadata type in GGUF to the corresponding numpy dtype.
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip

_LOOKS_LIKE = (
    (b"PK\x03\x04", "a zip archive, such as a PyTorch .bin, .pt or .pth"),
    (b"\x80", "a Python pickle, such as an old PyTorch .bin or .pt"),
    (b"<", "an HTML or XML page: was the download refused?"),
    (b"version https://git-lfs", "a git-lfs pointer: git lfs pull gets the file"),
    ((b"lmgg", b"fmgg", b"tjgg"), "an older ggml file: convert it with an older llama.cpp"),
    (b"", "something else"),
)


def _check_magic(cursor: _Cursor) -> None:
    if not cursor.size:
        raise UserError("the file is empty")
    head = cursor.take(min(cursor.size, 32), "the magic")
    cursor.file.seek(0)
    cursor.position = 0
    if not head.startswith(MAGIC):
        guess = "a safetensors file" if head[8:9] == b"{" else next(w for p, w in _LOOKS_LIKE if head.startswith(p))
        raise UserError(f"not a GGUF file: it begins with {head[:4]!r} and looks like {guess}")
    cursor.take(4, "the magic")
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise UserError("a big-endian GGUF file: only little-endian ones are read")
    if version not in READABLE:
        raise UserError(
            f"GGUF version {version}: versions 2 and 3 are read; convert the model again with a newer llama.cpp"
        )


def _value(cursor: _Cursor, what: str) -> Any:
    kind = cursor.u32(what)
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY:
        scalar = _number_array(cursor, kind, 1, what)[0]
        # The float32 that is nearest to 1e-05 is converted to the Python float 1e-05, and not to 9.999999747378752e-06,
        # the exact value of the float32.
        return float(str(scalar)) if scalar.dtype == np.float32 else scalar.item()
    kind, n = cursor.u32(what), cursor.u64(what)
    if kind != _STRING:
        return _number_array(cursor, kind, n, what)
    if n > (cursor.size - cursor.position) // 8:
        raise UserError(f"cut short or damaged: {what} has {n} strings at byte {cursor.position} of {cursor.size}")
    cursor.strings += n
    if cursor.strings > MAX_STRINGS:
        raise UserError(f"{what}: its {n} strings make more than {MAX_STRINGS} in arrays, which are not read")
    return [cursor.text(what, index) for index in range(n)]


def _number_array(cursor: _Cursor, kind: int, n: int, what: str) -> np.ndarray:
    if kind == _BOOL:
        flags = np.frombuffer(cursor.take(n, what), np.uint8)
        if np.max(flags, initial=0) > 1:
            raise UserError(f"{what}: a bool is 0 or 1, got {np.max(flags)}")
        return flags.view(bool)
    if kind not in _NUMBERS:
        raise UserError(f"{what}: {'an array of arrays' if kind == _ARRAY else f'value type {kind}'} is not supported")
    return np.frombuffer(cursor.take(n * _NUMBERS[kind].itemsize, what), _NUMBERS[kind])


class _Entry(NamedTuple):
    """An entry of the tensor list of a file, which has not been validated yet."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int  # Byte offset of the tensor's data from the start of the data section.


def _entry(cursor: _Cursor, index: int) -> _Entry:
    name = cursor.text(f"the name of tensor {index}")
    what = f"tensor {_quote(name)}"
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise UserError(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
    *dims, type_id, offset = struct.unpack(f"<{n_dims}QIQ", cursor.take(8 * n_dims + 12, what))
    return _Entry(name, tuple(reversed(dims)), type_id, offset)


def _alignment(metadata: Mapping[str, Any]) -> int:
    n = metadata.get("general.alignment", ALIGNMENT)
    if type(n) is not int or not 1 <= n <= MAX_ALIGNMENT or n & (n - 1):
        got = n if type(n) is int else type(n).__name__
        raise UserError(f"general.alignment is {got}, expected a power of two up to {MAX_ALIGNMENT}")
    return n


def _wrong(entry: _Entry, start: int, alignment: int, size: int) -> Iterator[str]:
    """Yields one error message if an entry of a GGUF file's tensor list is invalid; only the first problem of the entry
    is reported."""
    name, kind = _quote(entry.name), _BY_ID.get(entry.type_id)
    if not all(entry.shape):
        yield f"{name} has shape {list(entry.shape)}: every dimension must be positive"
    elif kind is None:
        type_name = _OTHER.get(entry.type_id, f"unknown type {entry.type_id}")
        yield f"{name} is {type_name}; supported are {', '.join(TYPES)}"
    elif entry.shape[-1] % kind.block:
        yield f"{name} has rows of {entry.shape[-1]} values, {kind.name} needs a multiple of {kind.block}"
    elif entry.offset % alignment:
        yield f"{name} has offset {entry.offset}, not a multiple of the alignment {alignment}"
    elif (end := start + entry.offset + _size_bytes(kind, entry.shape)) > size:
        yield f"{name} {kind.name}{list(entry.shape)} ends at byte {end}, the file at {size}: is it cut short?"


def _tensors(entries: list[_Entry], start: int, alignment: int, size: int, problems: list[str]) -> dict[str, Tensor]:
    """Returns a dict from the name of each tensor to its `Tensor`, and appends error messages to `problems`.

    Overlapping tensors are an error. A gap between tensors of at least the alignment is also an error, because a tensor
    with a wrong type or dimension leaves such a gap.
    """
    tensors: dict[str, Tensor] = {}
    for name, shape, type_id, offset in entries:
        kind = _BY_ID[type_id]
        if name in tensors:
            problems.append(f"{_quote(name)} is a duplicate")
        tensors[name] = Tensor(name, shape, kind.name, start + offset, _size_bytes(kind, shape))
    end, before = start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            problems.append(f"{_quote(tensor.name)} overlaps {_quote(before)}")
        elif tensor.offset - end >= alignment:
            after = f"{_quote(before)}, which is {tensors[before].type}," if before else "the header"
            problems.append(
                f"{tensor.offset - end} bytes between {after} and {_quote(tensor.name)} belong to no tensor"
            )
        end, before = tensor.offset + tensor.size_bytes, tensor.name
    if before and size - end >= alignment:
        problems.append(
            f"{size - end} bytes after {_quote(before)}, which is {tensors[before].type}, the last, belong to no tensor"
        )
    return tensors


def _quote(name: str) -> str:
    """Formats a name from a file for error messages: the name is quoted, put on one line, and truncated."""
    return repr(name[:100])[:120]


def _item(what: str, index: int | None) -> str:
    return what if index is None else f"{what}, item {index},"


# --- writing


def _header(metadata: Mapping[str, Any], tensors: list[NewTensor]) -> tuple[bytes, int]:
    """Returns the header of a new file as bytes, padded to the alignment, and the alignment in bytes.

    The new header is parsed by the same code as in `read`, so that no file is written that `read` would refuse.
    """
    alignment = _alignment(metadata)
    fields = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        fields += [_text(key, f"metadata key {key!r}"), _pack(value, f"metadata {key!r}")]
    offset = 0
    for name, shape, type_, _ in tensors:
        kind, label = _writable(type_), _text(name, f"tensor name {name!r}")
        if len(label) - 8 > MAX_NAME_BYTES:
            raise UserError(f"tensor name {name!r} has {len(label) - 8} bytes, llama.cpp takes {MAX_NAME_BYTES}")
        fields += [label, struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.id, offset)]
        offset += _size_bytes(kind, shape)
        offset += -offset % alignment
    header = b"".join(fields)
    header += bytes(-len(header) % alignment)
    _parse(io.BytesIO(header), len(header) + offset)
    return header, alignment


def _write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], type: str, values: Callable[[], Any]) -> None:
    array = np.asarray(values())
    if array.shape != tuple(shape):
        raise UserError(f"the values of {name} have shape {list(array.shape)}, expected {list(shape)}")
    try:
        for blocks in _encode(array, TYPES[type]):
            file.write(blocks)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _pack(value: Any, what: str) -> bytes:
    """Serialises a metadata value: returns the bytes of the id of its type, followed by the bytes of the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value, what)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(_text(item, what) for item in value)
    array = value if isinstance(value, np.ndarray | np.generic) else _typed(value, what)
    kind = _NUMBER_TYPES.get(array.dtype)
    if kind is None or array.ndim > 1:
        raise UserError(f"{what} is {array.dtype}{list(array.shape)}, which GGUF cannot hold")
    head = struct.pack("<IIQ", _ARRAY, kind, array.size) if array.ndim else struct.pack("<I", kind)
    return head + array.tobytes()


_NUMBER_TYPES = {np.dtype(bool): _BOOL, **{dtype: kind for kind, dtype in _NUMBERS.items()}}


def _typed(value: Any, what: str) -> np.ndarray:
    """Converts a Python number, or a list of numbers, to a numpy array with the dtype that is written to the file."""
    items = value if isinstance(value, list | tuple) else [value]
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return np.array(value, bool)
    if kinds == {int}:
        for dtype in ("<i4", "<i8", "<u8") if items is value else ("<u4", "<i4", "<i8", "<u8"):
            if np.iinfo(dtype).min <= min(items) and max(items) <= np.iinfo(dtype).max:
                return np.array(value, dtype)
        raise UserError(f"{what} is beyond 64 bits")
    if kinds == {float}:
        largest = float(np.finfo(np.float32).max)
        if any(largest < abs(item) < math.inf for item in items):
            raise UserError(f"{what} is beyond float32: np.float64 keeps the wider type")
        return np.array(value, "<f4")
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise UserError(f"{what} holds {names}: expected bool, int, float, str, a list of one of them, or numpy numbers")


def _text(text: str, what: str) -> bytes:
    try:
        data = text.encode()
    except (UnicodeEncodeError, AttributeError) as error:
        raise UserError(f"{what} is not a string that UTF-8 can encode") from error
    return _U64.pack(len(data)) + data


# --- encoding and decoding the blocks of a tensor

# A `Decode` is a function (blocks [n], out [n, block] float32) that writes the values of the blocks into `out`.
Decode = Callable[[np.ndarray, np.ndarray], None]
# An `Encode` is a function that takes values [n, block] float32, and returns blocks [n] with the dtype `_Type.layout`.
Encode = Callable[[np.ndarray], np.ndarray]


class _Type(NamedTuple):
    name: str
    id: int  # Id of the tensor type in ggml.
    block: int  # Number of values per block.
    layout: np.dtype  # Numpy dtype of a block, which is a structured dtype unless a block is a single value.
    decode: Decode
    encode: Encode | None = None


def _decode(read: Callable[[int, int], Any], kind: _Type, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Decodes a tensor chunk by chunk, and returns an array of the given shape and dtype.

    Args:
        read: function (start, stop) that returns the bytes start .. stop - 1 of the tensor; it is called for
            consecutive ranges.
    """
    out = np.empty(math.prod(shape), dtype)
    scratch = np.empty(0 if out.dtype == np.float32 else min(CHUNK, out.size), np.float32)
    n_bytes = kind.layout.itemsize
    for start in range(0, out.size, CHUNK):
        chunk = out[start : start + CHUNK]
        n = len(chunk) // kind.block
        first = start // kind.block
        data = read(first * n_bytes, (first + n) * n_bytes)
        if len(data) != n * n_bytes:
            raise UserError("the file has become shorter")
        values = chunk if out.dtype == np.float32 else scratch[: len(chunk)]
        with np.errstate(invalid="ignore"):  # suppresses numpy's warning about infinite or NaN scales
            kind.decode(np.frombuffer(data, kind.layout), values.reshape(n, kind.block))
            if values is not chunk:
                chunk[:] = values
    return out.reshape(shape)


def _encode(array: np.ndarray, kind: _Type) -> Iterator[bytes]:
    assert kind.encode is not None  # checked by `_writable`
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield kind.encode(flat[start : start + CHUNK].astype(np.float32, copy=False).reshape(-1, kind.block)).tobytes()


def _known(type: str) -> _Type:
    if type not in TYPES:
        raise UserError(f"type {type!r} is not supported: one of {', '.join(TYPES)}")
    return TYPES[type]


def _writable(type: str) -> _Type:
    if _known(type).encode is None:
        raise UserError(f"type {type} can be read only: write {', '.join(n for n in TYPES if TYPES[n].encode)}")
    return TYPES[type]


def _check_rows(kind: _Type, shape: tuple[int, ...]) -> None:
    if kind.block > 1 and (not shape or shape[-1] % kind.block):
        raise UserError(f"{kind.name} takes rows of a multiple of {kind.block} values, got shape {list(shape)}")


def _size_bytes(kind: _Type, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // kind.block * kind.layout.itemsize


def _decode_plain(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, 0] = blocks


def _decode_bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    words = out.view(np.uint32)
    words[:, 0] = blocks
    words <<= 16  # the 16 bits of a bfloat16 are the upper 16 bits of a float32


def _decode_q8_0(b: np.ndarray, out: np.ndarray) -> None:
    out[:] = b["q"]
    out *= _column(b["d"])


def _decode_q4_0(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 16, out)
    out -= 8
    out *= _column(b["d"])


def _decode_q4_1(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 16, out)
    out *= _column(b["d"])
    out += _column(b["m"])


def _decode_q5_0(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 16, out)
    out += np.unpackbits(b["high"], axis=1, bitorder="little") << 4
    out -= 16
    out *= _column(b["d"])


def _decode_q5_1(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 16, out)
    out += np.unpackbits(b["high"], axis=1, bitorder="little") << 4
    out *= _column(b["d"])
    out += _column(b["m"])


def _decode_q4_k(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 32, out)
    _scale_groups(b, out)


def _decode_q5_k(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 32, out)
    # In a Q5_K block, bit g of byte i in b["high"] is the fifth bit of value i in group g.
    high = (b["high"][:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    out += high.reshape(out.shape) << 4
    _scale_groups(b, out)


def _decode_q6_k(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], 64, out)
    high = (b["high"].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    out += high.reshape(out.shape) << 4
    out -= 32
    groups = out.reshape(-1, 16, 16)
    groups *= (_column(b["d"]) * b["scales"])[..., None]


def _column(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray, width: int, out: np.ndarray) -> None:
    """Unpack the 4-bit values in `packed` into `out`.

    Each run of `width` bytes in `packed` holds 2 * width values: the low nibbles hold the first `width` values, and the
    high nibbles hold the last `width` values.
    """
    packed = packed.reshape(len(packed), -1, width)
    halves = out.reshape(len(packed), -1, 2, width)
    halves[:, :, 0] = packed & 15
    halves[:, :, 1] = packed >> 4


def _scale_groups(b: np.ndarray, out: np.ndarray) -> None:
    """Multiply each group of values in `out` by its scale, and subtract its minimum, in place, for the types Q4_K and
    Q5_K.

    A Q4_K or Q5_K block has 8 groups of 32 values. The scales and minima of the 8 groups, with 6 bits each, are packed
    in 12 bytes:

        byte  0..3   low 6 bits: scales 0..3; top 2 bits: the upper 2 bits of scales 4..7
              4..7   low 6 bits: minima 0..3; top 2 bits: the upper 2 bits of minima 4..7
              8..11  low 4 bits: the lower 4 bits of scales 4..7; top 4 bits: the lower 4 bits of minima 4..7
    """
    scales, minima, rest = b["scales"][:, :4], b["scales"][:, 4:8], b["scales"][:, 8:]
    scales = np.concatenate([scales & 63, (scales >> 6 << 4) | (rest & 15)], axis=1)
    minima = np.concatenate([minima & 63, (minima >> 6 << 4) | (rest >> 4)], axis=1)
    groups = out.reshape(-1, 8, 32)
    groups *= (_column(b["d"]) * scales)[..., None]
    groups -= (_column(b["m"]) * minima)[..., None]


def _encode_f32(x: np.ndarray) -> np.ndarray:
    return x.astype("<f4", copy=False)


def _encode_f16(x: np.ndarray) -> np.ndarray:
    return _halves(x, "F16", x)


def _encode_bf16(x: np.ndarray) -> np.ndarray:
    words = x.view(np.uint32)
    nearest = words + (0x7FFF + ((words >> 16) & 1))  # `nearest` is rounded to the nearest bfloat16, with ties to even.
    # The highest mantissa bit of a NaN is set, because dropping the lower 16 bits could otherwise turn the NaN into an
    # infinity.
    return (np.where(np.isnan(x), words | 0x400000, nearest) >> 16).astype("<u2")


def _encode_q8_0(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    blocks = np.empty(len(x), _Q8_0)
    blocks["d"] = _halves(scale, "Q8_0", x)[:, 0]
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
    x = x * inverse
    whole = np.trunc(x)
    # Q8_0 values are rounded to the nearest integer, with ties away from zero, as in ggml.
    blocks["q"] = whole + np.trunc(2 * (x - whole))
    return blocks


def _halves(values: np.ndarray, name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        worst = x.flat[np.argmax(np.abs(x))]
        raise UserError(f"{name} cannot hold the value {worst:g}: write F32 or BF16, or check the model")
    return halves


def _layout(*fields: tuple[Any, ...]) -> np.dtype:
    return np.dtype(list(fields))


_D, _M = ("d", "<f2"), ("m", "<f2")  # scale and minimum
_Q8_0 = _layout(_D, ("q", "i1", 32))
_Q4_K = [_D, _M, ("scales", "u1", 12)]
_Q6_K = [("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16)]

TYPES: dict[str, _Type] = {
    kind.name: kind
    for kind in (
        _Type("F32", 0, 1, np.dtype("<f4"), _decode_plain, _encode_f32),
        _Type("F16", 1, 1, np.dtype("<f2"), _decode_plain, _encode_f16),
        _Type("BF16", 30, 1, np.dtype("<u2"), _decode_bf16, _encode_bf16),
        _Type("Q8_0", 8, 32, _Q8_0, _decode_q8_0, _encode_q8_0),
        _Type("Q4_0", 2, 32, _layout(_D, ("q", "u1", 16)), _decode_q4_0),
        _Type("Q4_1", 3, 32, _layout(_D, _M, ("q", "u1", 16)), _decode_q4_1),
        _Type("Q5_0", 6, 32, _layout(_D, ("high", "u1", 4), ("q", "u1", 16)), _decode_q5_0),
        _Type("Q5_1", 7, 32, _layout(_D, _M, ("high", "u1", 4), ("q", "u1", 16)), _decode_q5_1),
        _Type("Q4_K", 12, 256, _layout(*_Q4_K, ("q", "u1", 128)), _decode_q4_k),
        _Type("Q5_K", 13, 256, _layout(*_Q4_K, ("high", "u1", 32), ("q", "u1", 128)), _decode_q5_k),
        _Type("Q6_K", 14, 256, _layout(*_Q6_K, _D), _decode_q6_k),
    )
}
_BY_ID = {kind.id: kind for kind in TYPES.values()}
_OTHER = {  # dict that maps the ids of unsupported ggml types to their names, for error messages
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
