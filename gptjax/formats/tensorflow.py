"""Reads TensorFlow checkpoints, the format of OpenAI's GPT-2 release, without the library TensorFlow.

    checkpoint                        model_checkpoint_path: "model.ckpt"
    model.ckpt.index                  dtype, shape, shard, offset, size and checksum by tensor name: a LevelDB table
    model.ckpt.data-00000-of-00001    the tensor data, one file per shard

A LevelDB table consists of blocks of sorted (key, value) pairs, an index block with the locations of these blocks, and
a footer of 48 bytes with the location of the index block. In each block of a LevelDB table, keys are prefix-compressed:
a key is stored as the length of the prefix that it shares with the previous key, and the key's remaining bytes. Each
block of a LevelDB table is followed by a compression byte and a checksum. The values in the index file of a TensorFlow
checkpoint are protocol buffers. Every length in a file is checked, and the checksum of every block and tensor is
verified. While a TensorFlow checkpoint is read, only one tensor is in memory at a time. The tensor data is read, not
memory-mapped, because this process would be killed if another process truncated a memory-mapped file.

Sources: LevelDB's table_format.txt specifies LevelDB tables, TensorFlow's tensor_bundle.proto specifies the values in
the table of a checkpoint, and RFC 3720, appendix B.4, specifies the checksum CRC-32C.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gptjax.errors import UserError, refuse
from gptjax.formats.tensors import Shape, Stored

# Maps the number of each supported TensorFlow DataType to its name and its numpy dtype.
DTYPES: dict[int, tuple[str, Any]] = {
    1: ("DT_FLOAT", np.float32), 3: ("DT_INT32", np.int32), 9: ("DT_INT64", np.int64),
    14: ("DT_BFLOAT16", ml_dtypes.bfloat16), 19: ("DT_HALF", np.float16),
}  # fmt: skip
MAGIC = 0xDB4775248B80FB57
FOOTER = 48
# Maximum size of an index file in bytes; the index files of GPT-2 have 5 to 21 kB. Reading a valid index file takes at
# most 2 s.
MAX_INDEX = 2 << 20
MAX_TENSORS, MAX_SHARDS, MAX_DIMS, MAX_KEY = 20_000, 1000, 32, 1024
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_PATH_LINE = re.compile(r'^[ \t]*model_checkpoint_path[ \t]*:[ \t]*"([^"\n]*)"[ \t\r]*$', re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """The location, dtype, shape and checksum of a tensor in a TensorFlow checkpoint."""

    dtype: np.dtype[Any]
    shape: Shape
    shard: Path
    offset: int
    size_bytes: int
    checksum: int  # masked CRC-32C of the tensor's bytes, as computed by `masked`


@dataclass(frozen=True)
class Checkpoint(Stored):
    """The index of a TensorFlow checkpoint, with methods that read tensors from the shards.

    The checksum of a tensor is verified when it is first read.
    """

    entries: Mapping[str, Entry]
    checked: set[str] = field(default_factory=set)  # names of the tensors whose checksums have been verified

    def _read(self, name: str, shape: Shape, offset: int) -> np.ndarray:
        entry = self.entries[name]
        out = np.empty(shape, entry.dtype)
        try:
            with entry.shard.open("rb") as file:
                if name not in self.checked and masked(_checksum(file, entry)) != entry.checksum:
                    raise UserError(f"{entry.shard}: {name} is damaged: its checksum differs. Get the file again")
                self.checked.add(name)
                file.seek(offset)
                if file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
                    raise UserError(f"{entry.shard}: {name} is cut off: the file was changed while it was read")
        except OSError as error:
            raise UserError(f"{entry.shard}: {name} cannot be read: {error.strerror or error}") from error
        return out


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read and validate the index of the TensorFlow checkpoint that the file `checkpoint` in a folder names; the
    tensors are not read.

    Raises:
        UserError: a file is missing, damaged or invalid; the message lists up to 20 invalid tensors.
    """
    folder = Path(folder)
    state = folder / "checkpoint"
    match = _PATH_LINE.search(_read(state, 1 << 16).decode(errors="replace"))
    if not match or not _PREFIX.fullmatch(match[1]):
        got = f"got {match[1]!r:.80}" if match else "found no such line"
        raise UserError(f'{state}: expected model_checkpoint_path: "NAME" with the plain name of files here, {got}')
    index = folder / f"{match[1]}.index"
    table = _read_table(_read(index, MAX_INDEX), str(index))
    shards = _shards(folder / match[1], table)
    entries, problems = {}, []
    for key, value in table.items():
        if key:
            name = key.decode(errors="replace")
            try:
                if not name.isprintable() or "\ufffd" in name:
                    raise UserError("a name must be printable UTF-8")
                entries[name] = _entry(value, shards)
            except UserError as error:
                problems.append(f"{name!r:.80}: {error}")
    refuse(str(index), problems)
    return Checkpoint(entries)


def _read(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{path}: {size:,} bytes, at most {limit:,} are read of such a file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------- the table


def _read_table(data: bytes, location: str) -> dict[bytes, bytes]:
    """Parses the bytes of a LevelDB table, and returns a dict with its keys and values."""
    try:
        if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
            raise UserError("the last 8 bytes are not those of a table: it is cut off, or no index of a checkpoint")
        _, pos = _handle(data[-FOOTER:-8], 0)
        handle, _ = _handle(data[-FOOTER:-8], pos)
        pairs: dict[bytes, bytes] = {}
        end, last = 0, None
        for _, value in _pairs(_block(data, *handle)):
            (offset, size), _ = _handle(value, 0)
            if offset < end:
                raise UserError(f"the block at byte {offset:,} overlaps the one before it")
            end = offset + size
            for key, body in _pairs(_block(data, offset, size)):
                if last is not None and key <= last:
                    raise UserError(f"{key!r:.80} comes after {last!r:.80}: keys must ascend")
                if len(pairs) > MAX_TENSORS:
                    raise UserError(f"more than {MAX_TENSORS:,} tensors")
                pairs[key] = body
                last = key
        return pairs
    except UserError as error:
        raise UserError(f"{location}: {error}") from error


def _handle(data: bytes, pos: int) -> tuple[tuple[int, int], int]:
    """Parses the block handle at `pos`, and returns the block's (offset, size) and the position after the handle."""
    offset, pos = _varint(data, pos)
    size, pos = _varint(data, pos)
    return (offset, size), pos


def _block(data: bytes, offset: int, size: int) -> bytes:
    """Verifies the checksum of the table block at `offset`, and returns the content of the block.

    The content of a block is followed by a compression byte, and by a 4-byte checksum of the content and the
    compression byte.
    """
    end = offset + size
    if end + 5 > len(data) - FOOTER or size < 4:
        raise UserError(f"a block of {size:,} bytes at byte {offset:,} does not fit into a table of {len(data):,}")
    if masked(crc32c(data[offset : end + 1])) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise UserError(f"the block at byte {offset:,} is damaged: its checksum differs. Get the file again")
    if data[end] != 0:
        kind = {1: "snappy"}.get(data[end], f"compression {data[end]}")
        raise UserError(f"the block at byte {offset:,} is compressed ({kind}), as TensorFlow's Saver never writes it")
    return data[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the (key, value) pairs of a table block in order.

    The restart points at the end of a LevelDB table block are skipped, because they are needed only for binary search.
    """
    end = len(block) - 4 * (1 + int.from_bytes(block[-4:], "little"))
    if end <= 0:
        raise UserError("a block has no entries")
    pos, key = 0, b""
    while pos < end:
        shared, pos = _varint(block, pos)
        n_new, pos = _varint(block, pos)
        size, pos = _varint(block, pos)
        if shared > len(key) or pos + n_new + size > end:
            raise UserError("an entry of a block exceeds the block")
        if shared + n_new > MAX_KEY:
            raise UserError(f"a key of {shared + n_new:,} bytes, at most {MAX_KEY:,} are read")
        key = key[:shared] + block[pos : pos + n_new]
        pos += n_new + size
        yield key, block[pos - size : pos]


# ---------------------------------------------------------------- the values


def _shards(prefix: Path, table: Mapping[bytes, bytes]) -> list[tuple[Path, int | None]]:
    """Returns the path and the size in bytes of each shard of a checkpoint; the size is None if the shard's file is
    missing."""
    location = f"{prefix}.index"
    if b"" not in table:
        raise UserError(f"{location}: the entry about the whole checkpoint is missing")
    try:
        header = _fields(table[b""], {1: int, 2: int, 3: bytes})
    except UserError as error:
        raise UserError(f"{location}: the entry about the whole checkpoint: {error}") from error
    n = header.get(1, 0)
    if header.get(2, 0):
        raise UserError(f"{location}: written on a big-endian machine: only little-endian ones are read")
    if not 1 <= n <= MAX_SHARDS:
        raise UserError(f"{location}: {n:,} data files, expected 1 to {MAX_SHARDS:,}")
    shards = (prefix.with_name(f"{prefix.name}.data-{i:05}-of-{n:05}") for i in range(n))
    return [(path, path.stat().st_size if path.is_file() else None) for path in shards]


def _entry(value: bytes, shards: list[tuple[Path, int | None]]) -> Entry:
    fields = _fields(value, {1: int, 2: bytes, 3: int, 4: int, 5: int, 6: float, 7: bytes})
    number, shard, offset, size = (fields.get(n, 0) for n in (1, 3, 4, 5))
    if 7 in fields:
        raise UserError("saved in slices (a partitioned variable), which is not supported")
    if number not in DTYPES:
        known = ", ".join(f"{name} ({n})" for n, (name, _) in DTYPES.items())
        raise UserError(f"TensorFlow's dtype number {number} is not supported: {known} are")
    shape, dtype = _shape(fields.get(2, b"")), np.dtype(DTYPES[number][1])
    if math.prod(shape) * dtype.itemsize != size:
        raise UserError(f"{dtype.name} {list(shape)} takes {math.prod(shape) * dtype.itemsize:,} bytes, got {size:,}")
    if shard >= len(shards):
        raise UserError(f"in data file {shard}, there are {len(shards)}")
    path, length = shards[shard]
    if length is None:
        raise UserError(f"{path.name} is missing")
    if offset + size > length:
        raise UserError(f"ends at byte {offset + size:,} of {path.name}, which has {length:,}: is it cut off?")
    return Entry(dtype, shape, path, offset, size, fields.get(6, 0))


def _shape(message: bytes) -> Shape:
    """Parses a TensorShapeProto, which has the field numbers dim = 2 {size = 1; name = 2} and unknown_rank = 3."""
    shape = []
    for number, value in _messages(message, {2: bytes, 3: int}):
        if number == 3 and value:
            raise UserError("its number of dimensions is unknown")
        if number == 2:
            shape.append(_fields(value, {1: int, 2: bytes}).get(1, 0))
        if len(shape) > MAX_DIMS or math.prod(n or 1 for n in shape) >= 1 << 59:  # numpy's limit
            raise UserError(f"shape {shape!r:.80} is too large: expected up to {MAX_DIMS} dimensions")
    return tuple(shape)


def _fields(message: bytes, kinds: Mapping[int, type]) -> dict[int, Any]:
    return dict(_messages(message, kinds))


def _messages(message: bytes, kinds: Mapping[int, type]) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) for each field of a protocol buffer.

    `kinds` maps a field number to a Python type that stands for the wire type of the field: `int` for a varint, `bytes`
    for a length-delimited field, and `float` for a 4-byte field, whose bytes are returned as an int.
    """
    pos = 0
    while pos < len(message):
        tag, pos = _varint(message, pos)
        number, wire = tag >> 3, tag & 7
        if number not in kinds or wire != {int: 0, bytes: 2, float: 5}[kinds[number]]:
            raise UserError(f"field {number} of kind {wire} is unknown here")
        value: Any = 4
        if wire != 5:
            value, pos = _varint(message, pos)
        if wire:
            pos += value
            if pos > len(message):
                raise UserError(f"field {number} is cut off")
            value = message[pos - value : pos] if wire == 2 else int.from_bytes(message[pos - 4 : pos], "little")
        yield number, value


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    """Returns the value of the varint at position `pos`, and the position after the varint.

    A varint stores an integer in groups of 7 bits, one group per byte and the least significant group first; the top
    bit of a byte is 1 if more bytes follow.
    """
    value = 0
    for i in range(10):
        if pos + i >= len(data):
            raise UserError("a number is cut off")
        byte = data[pos + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, pos + i + 1
    raise UserError("a number of more than 10 bytes")


# ---------------------------------------------------------------- the checksum

# The CRC of a message is linear (over GF(2)) in each of the 32-bit words w0, w1, .. of the message. Because the CRC is
# linear, each pair of adjacent 32-bit words of the message can be combined into one word independently of all other
# pairs, so that numpy combines all pairs in one vectorised operation. Let A_k(x) be the CRC state after processing 2^k
# zero words of 32 bits, beginning from the CRC state x. The first vectorised operation of the CRC replaces the message
# words w0 and w1 with A_0(w0) ^ w1, the words w2 and w3 with A_0(w2) ^ w3, and so on, so that n/2 of the n words are
# left. The second vectorised operation of the CRC combines pairs of the n/2 words with A_1 in the same way, so that n/4
# words are left, and so on until one word is left. The function A_k, which advances a CRC state by 2^k zero words, is
# stored as lookup tables [4, 256], one for each of the four bytes of a word; applying A_k twice gives A_{k+1}.

_CHUNK = 1 << 18  # Number of bytes that are processed at once, so that intermediate results fit in the CPU cache.
_SHORT = 1000  # Maximum length in bytes of data whose CRC is computed byte by byte, as is faster for short data.


def crc32c(data: bytes, crc: int = 0) -> int:
    """Returns the CRC-32C (Castagnoli) of `data`.

    If a message is read in parts, pass the CRC-32C of all parts before `data` as `crc`; the result is then the CRC-32C
    of all parts including `data`.
    """
    octets = np.frombuffer(data, np.uint8)
    whole = len(octets) - len(octets) % 4 if len(octets) > _SHORT else 0
    state, table, tables = crc ^ 0xFFFFFFFF, *_tables()
    for start in range(0, whole, _CHUNK):
        words = octets[start : min(start + _CHUNK, whole)].view("<u4").astype(np.uint32)
        words[0] ^= np.uint32(state)
        level = 0
        while len(words) > 1:
            odd = len(words) % 2  # 1 if the number of words is odd, in which case the first word is not combined
            joined = _apply(tables[level], words[odd::2]) ^ words[odd + 1 :: 2]
            words = np.concatenate([words[:odd], joined])
            level += 1
        state = int(_apply(tables[0], words)[0])
    for byte in octets[whole:].tolist():
        state = (state >> 8) ^ table[(state ^ byte) & 255]
    return state ^ 0xFFFFFFFF


def _checksum(file: BinaryIO, entry: Entry) -> int:
    file.seek(entry.offset)
    crc = 0
    for start in range(0, entry.size_bytes, _CHUNK):
        crc = crc32c(file.read(min(_CHUNK, entry.size_bytes - start)), crc)
    return crc


def masked(crc: int) -> int:
    """Returns the masked CRC that LevelDB and TensorFlow store: the CRC rotated right by 15 bits, plus a constant."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _apply(table: np.ndarray, words: np.ndarray) -> np.ndarray:
    out = table[0].take(words & 255)
    for i in (1, 2, 3):
        out ^= table[i].take((words >> (8 * i)) & 255)
    return out


@functools.cache
def _tables() -> tuple[list[int], list[np.ndarray]]:
    """Returns the CRC lookup table for single bytes [256], and a list of CRC lookup tables [4, 256] for words.

    Table k of the list computes A_k (see the comment above `_CHUNK`), which advances a CRC state by 2^k zero words.
    """
    byte = np.arange(256, dtype=np.uint32)
    crc: np.ndarray = byte
    for _ in range(8):
        crc = (crc >> 1) ^ (np.uint32(0x82F63B78) * (crc & 1))
    table = np.stack([crc, byte, byte << 8, byte << 16])  # lookup table that advances a CRC state by one zero byte
    for _ in range(2):
        table = _apply(table, table)
    tables = [table]
    while 4 << len(tables) < _CHUNK:
        tables.append(_apply(tables[-1], tables[-1]))
    return crc.tolist(), tables
