"""Reads and writes safetensors files, and Hugging Face folders of such files, with one tensor in memory at a time.

    8 bytes  length of the header, little-endian
    header   JSON {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {..}}
    data     the tensors, without gaps or overlaps

The package `safetensors` is not used, because this package allows a header of 100 MB and memory-maps the file. This
module checks every length and count in the header before memory is allocated, and a file that is truncated while it is
read raises an error instead of killing the process. `tests/formats/test_safetensors.py` tests that this module and the
package `safetensors` can read each other's files.

Source: the format is described in the README of the safetensors repository.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from gptjax.errors import UserError, refuse
from gptjax.files import replacing, write_text
from gptjax.formats.json import parse_json
from gptjax.formats.tensors import Out, Shape, Stored

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
# Maximum size in bytes of a header, and of an index file. A header that lists 50,000 tensors has 5 MB; the safetensors
# format allows 100 MB.
MAX_HEADER = MAX_INDEX = 32 << 20
MAX_SHARDS, MAX_DIMS = 10_000, 32
SHARD_BYTES = 5 << 30
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".msgpack", ".h5")
_MAGIC = {
    b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x80": "a pickle", b"GGUF": "a GGUF file: name it .gguf",
    b"<": "an HTML page", b"\x93NUMPY": "a numpy file", b"version http": "a Git LFS pointer",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: Shape
    offset: int  # byte offset of the tensor's data from the start of the file
    size_bytes: int


@dataclass(frozen=True)
class File(Stored):
    """The header of a safetensors file, with methods that read tensors from the file."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def _read(self, name: str, shape: Shape, offset: int) -> np.ndarray:
        out = np.empty(shape, DTYPES[self.entries[name].dtype])
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                read = file.readinto(out.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error.strerror or error}") from error
        if read != out.nbytes:
            raise UserError(f"{self.path}: {name} is cut off: the file was changed while it was read")
        return out


@dataclass(frozen=True)
class Folder:
    """A checkpoint whose tensors are divided among several safetensors files, the shards."""

    files: Mapping[str, File]  # dict that maps the name of each tensor to the shard that contains this tensor

    def shapes(self) -> dict[str, Shape]:
        return {name: file.entries[name].shape for name, file in self.files.items()}

    def array(self, name: str) -> np.ndarray:
        return self.files[name].array(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.files[name].rows(name, start, stop)


# ---------------------------------------------------------------- in


def open_file(path: str | os.PathLike[str]) -> File:
    """Read and validate the header of a safetensors file; the tensors are not read.

    Raises:
        UserError: the file cannot be read or violates the format; the message lists up to 20 invalid tensors.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(16)
            length = int.from_bytes(head[:8], "little")
            if len(head) < 8 or length > min(size - 8, MAX_HEADER):
                # The first 8 bytes of a safetensors file are the length of its header; by chance these 8 bytes may
                # begin with the magic bytes of another format. If byte 8 of an unreadable file is "{", with which a
                # JSON header begins, the file is reported as a damaged safetensors file, even if its first bytes are
                # the magic bytes of another format.
                kinds = [kind for magic, kind in _MAGIC.items() if head.startswith(magic) and head[8:9] != b"{"]
                what = f"a safetensors file but {kinds[0]}" if kinds else "a whole safetensors file"
                raise UserError(
                    f"{path}: not {what} (header of {length:,} bytes in a file of {size:,}; "
                    f"at most {MAX_HEADER:,} are read)"
                )
            file.seek(8)
            text = file.read(length)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    header = parse_json(text, str(path), "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map strings to strings")
    problems: list[str] = []
    entries = {name: entry for name, body in header.items() if (entry := _entry(name, body, 8 + length, problems))}
    refuse(str(path), problems)
    refuse(str(path), _gaps(entries, 8 + length, size))
    return File(path, entries, metadata)


def _entry(name: str, body: Any, start: int, problems: list[str]) -> Entry | None:
    shown = f"{name!r:.80}"
    if not name.isprintable():  # a name with NUL, an escape sequence or a lone surrogate is not printable
        problems.append(f"{shown}: the name of a tensor must be printable")
        return None
    if not isinstance(body, dict) or set(body) != {"dtype", "shape", "data_offsets"}:
        problems.append(f"{shown}: expected dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = body["dtype"], body["shape"], body["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        problems.append(f"{shown}: dtype {dtype!r:.40} is not supported: {', '.join(DTYPES)} are")
        return None
    if not _counts(shape) or len(shape) > MAX_DIMS:
        problems.append(f"{shown}: shape {shape!r:.80}, expected up to {MAX_DIMS} integers")
        return None
    if not _counts(offsets) or len(offsets) != 2:
        problems.append(f"{shown}: data_offsets {offsets!r:.80}, expected two integers")
        return None
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        problems.append(
            f"{shown}: {dtype} {shape!r:.60} takes {size:,} bytes, data_offsets span {offsets[1] - offsets[0]:,}"
        )
        return None
    if not size and math.prod(n or 1 for n in shape) >= 1 << 59:
        problems.append(f"{shown}: shape {shape!r:.80} is too large for any array, even an empty one")
        return None
    return Entry(dtype, tuple(shape), start + offsets[0], size)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _gaps(entries: Mapping[str, Entry], start: int, size: int) -> list[str]:
    """Returns a list with one error message if tensors overlap, leave a gap, or do not end at the end of the file, else
    []."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != end:
            return [f"{name!r:.80} begins at byte {entry.offset:,}, expected {end:,}: tensors overlap or leave a gap"]
        end += entry.size_bytes
    return [] if end == size else [f"the tensors end at byte {end:,}, the file at {size:,}: it is cut off or too long"]


def open_folder(folder: str | os.PathLike[str]) -> File | Folder:
    """Open the file `model.safetensors` in a folder or, if this file does not exist, the shards that
    `model.safetensors.index.json` lists.

    Raises:
        UserError: the folder has no weights, or only pickled weights; a file is missing or invalid; or the index names
            other tensors than the shards contain.
    """
    folder = Path(folder)
    index = folder / INDEX
    try:
        if (folder / WEIGHTS).is_file():
            return open_file(folder / WEIGHTS)
        if not index.is_file():
            raise UserError(_nothing_here(folder))
        if index.stat().st_size > MAX_INDEX:
            raise UserError(f"{index}: {index.stat().st_size:,} bytes, but an index may have at most {MAX_INDEX:,}")
        text = index.read_bytes()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
    named = parse_json(text, str(index), "index").get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    shards = sorted(set(named.values()))
    if len(shards) > MAX_SHARDS:
        raise UserError(f"{index}: {len(shards):,} files, expected up to {MAX_SHARDS:,}")
    problems = [f"{s!r:.80} is not the plain name of a .safetensors file" for s in shards if not _SHARD.fullmatch(s)]
    problems += [f"{s} is missing" for s in shards if _SHARD.fullmatch(s) and not (folder / s).is_file()]
    refuse(str(index), problems)
    files = {shard: open_file(folder / shard) for shard in shards}
    problems += [f"{name!r:.80} is not in {shard}" for name, shard in named.items() if name not in files[shard].entries]
    for shard, file in files.items():
        problems += [
            f"{name!r:.80} of {shard} is not in the index" for name in file.entries if named.get(name) != shard
        ]
    refuse(str(index), problems)
    return Folder({name: files[shard] for name, shard in named.items()})


def _nothing_here(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return refuse_pickle(folder / pickled[0])
    return f"{folder}: expected {WEIGHTS} or {INDEX}, found neither"


def refuse_pickle(path: Path) -> str:
    return (
        f"{path}: only safetensors and GGUF files are supported: loading a pickle can execute arbitrary code. If you "
        "trust the file, convert it with transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(path.parent)!r}).save_pretrained('converted')"
    )


# ---------------------------------------------------------------- out


def save(
    folder: str | os.PathLike[str],
    tensors: Iterable[Out],
    dtype: DTypeLike = np.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors to the file `model.safetensors`, or to several shards with an index if their total size exceeds
    `shard_bytes`.

    While the tensors are written, only one tensor is in memory at a time.
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    shards: list[list[Out]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes
    if len(shards) == 1:
        write_file(folder / WEIGHTS, shards[0], dtype)
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, dtype)
    total = sum(math.prod(tensor.shape) * dtype.itemsize for shard in shards for tensor in shard)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def write_file(path: Path, tensors: list[Out], dtype: np.dtype) -> None:
    """Write the tensors to one safetensors file, atomically."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(_bytes(tensor, dtype))


def _bytes(tensor: Out, dtype: np.dtype) -> memoryview:
    """Returns the bytes of the values of one tensor.

    `_bytes` is a separate function, so that no local variable of `write_file` keeps a tensor's array alive while the
    array of the next tensor is computed.
    """
    array = tensor.array()
    if array.shape != tuple(tensor.shape):
        raise UserError(f"the values of {tensor.name} have shape {list(array.shape)}, expected {list(tensor.shape)}")
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data
