"""GGUF files round-trip; an invalid file gives one error message, never a crash, a hang or a huge allocation."""

import contextlib
import random
import struct
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.formats import gguf

N = 10_000  # mutations of a valid file
READ_ONLY = [name for name, kind in gguf.TYPES.items() if kind.encode is None]
WRITABLE = [name for name in gguf.TYPES if name not in READ_ONLY]
HUGE = 1 << 62


# --- files made by hand


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(name="w", dims=(4,), type_id=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def build(pairs=(), tensors=(), data=b"", version=3, n_pairs=None, n_tensors=None, pad=32) -> bytes:
    """Assemble a file from raw bytes; pairs are (key, type and value as bytes)."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(text(key) + value for key, value in pairs) + b"".join(tensors)
    return head + bytes(-len(head) % pad) + data


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def array(type_id: int, n: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, type_id, n) + content


@pytest.fixture
def put(tmp_path):
    def put(content: bytes):
        path = tmp_path / "model.gguf"
        with open(path, "r+b" if path.exists() else "wb") as file:  # faster than creating a new file each time
            file.write(content)
            file.truncate()
        return path

    return put


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def raw_blocks(type: str, n_values: int, seed: int = 0) -> np.ndarray:
    """Random blocks of a quantisation type, with small finite scales."""
    kind = gguf.TYPES[type]
    rng = np.random.default_rng(seed)
    n = n_values // kind.block
    blocks = rng.integers(0, 256, n * kind.layout.itemsize, np.uint8).view(kind.layout)
    for field in {"d", "m"} & set(kind.layout.names or ()):
        blocks[field] = rng.normal(size=n) * 0.1
    return blocks.view(np.uint8) if kind.block > 1 else gguf.quantize(rng.normal(size=n), type)


def one_of_each() -> bytes:
    """A small valid file with every metadata type and every tensor type."""
    scalars = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
    pairs = [(f"scalar.{t}", struct.pack("<I", t) + struct.pack(f, 1)) for t, f in scalars.items()]
    pairs += [(f"array.{t}", array(t, 2, 2 * struct.pack(f, 1))) for t, f in scalars.items()]
    pairs += [("text", struct.pack("<I", 8) + text("Ġhi")), ("tokens", array(8, 3, text("a") + text("") + text("Ġ")))]
    tensors, data = [], b""
    for type, kind in gguf.TYPES.items():
        tensors.append(entry(f"blk.{type}", (256, 2), kind.id, len(data)))
        data += raw_blocks(type, 512).tobytes()
        data += bytes(-len(data) % 32)
    return build(pairs, tensors, data)


# --- out and in


@pytest.mark.parametrize("type", WRITABLE)
def test_tensors_come_back(tmp_path, type):
    arrays = {"a.weight": normal(5, 3, 64), "b": normal(32, seed=1), "c": normal(40, 4096, seed=2)}
    gguf.write(tmp_path / "m.gguf", {}, [(n, x.shape, type, lambda x=x: x) for n, x in arrays.items()])
    file = gguf.read(tmp_path / "m.gguf")
    assert list(file.tensors) == list(arrays)
    for name, x in arrays.items():
        assert file.tensors[name].shape == x.shape and file.tensors[name].type == type
        back = file.array(name)
        assert back.dtype == np.float32 and back.shape == x.shape
        np.testing.assert_array_equal(back, gguf.dequantize(gguf.quantize(x, type), type, x.shape))
        tolerance = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}[type] * np.abs(x).max()
        assert np.abs(back - x).max() <= tolerance
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


METADATA = {
    "true": (True, True),
    "zero": (0, 0),
    "uint32": (2**32 - 1, 2**32 - 1),
    "int32": (-5, -5),
    "int64": (-(2**40), -(2**40)),
    "above uint32": (2**40, 2**40),
    "uint64": (2**64 - 1, 2**64 - 1),
    "float, the decimal that was meant": (1e-5, 1e-5),
    "infinite": (float("inf"), float("inf")),
    "text": ("Ġ naïve 😀\n", "Ġ naïve 😀\n"),
    "no text": ("", ""),
    "texts": (["a", "", "Ġb"], ["a", "", "Ġb"]),
    "no items": ([], []),
    "bools": ([True, False], np.array([True, False])),
    "ints": ((1, -2), np.array([1, -2], np.int32)),
    "long ints": ([1, -(2**40)], np.array([1, -(2**40)])),
    "floats": ([0.5, -1.0], np.array([0.5, -1], np.float32)),
    "numpy scalar": (np.float64(0.1), 0.1),
    "numpy bool": (np.bool_(True), True),
    **{x.dtype.name: (x, x) for x in (np.arange(3).astype(code) for code in "bBhHiIqQfd?")},
    "empty of a type": (np.zeros(0, np.float32), np.zeros(0, np.float32)),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_comes_back(tmp_path, name):
    given, expected = METADATA[name]
    gguf.write(tmp_path / "m.gguf", {"key": given, "last": 1}, [])
    back = gguf.read(tmp_path / "m.gguf").metadata
    assert back["last"] == 1
    if isinstance(expected, np.ndarray):
        assert back["key"].dtype == expected.dtype
        np.testing.assert_array_equal(back["key"], expected)
    else:
        assert type(back["key"]) is type(expected) and back["key"] == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "holds NoneType"),
        ([1, "a"], "holds int, str"),
        ([[1]], "holds list"),
        (2**64, "beyond 64 bits"),
        (1e300, "beyond float32"),
        (np.zeros((2, 2)), "float64[2, 2], which GGUF cannot hold"),
        (np.zeros(2, np.float16), "float16[2]"),
        ("\ud800", "UTF-8"),
        ("x" * (1 << 20) + "x", "a string of 1048577 bytes"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, value, words):
    with pytest.raises(UserError) as error:
        gguf.write(tmp_path / "m.gguf", {"key": value}, [])
    assert words in str(error.value) and "'key'" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_alignment_is_obeyed(tmp_path):
    x = normal(3)
    gguf.write(tmp_path / "m.gguf", {"general.alignment": 256}, [(n, (3,), "F32", lambda: x) for n in "ab"])
    file = gguf.read(tmp_path / "m.gguf")
    assert [tensor.offset for tensor in file.tensors.values()] == [256, 512]
    np.testing.assert_array_equal(file.array("b"), x)


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    def values():
        assert all(before() is None for before in alive)
        x = normal(8, 32)
        alive.append(weakref.ref(x))
        return x

    gguf.write(tmp_path / "m.gguf", {}, [(n, (8, 32), "F32", values) for n in "abc"])
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("w", (2, 33), "Q8_0")], "'w' has rows of 33 values, Q8_0 needs a multiple of 32"),
        ([("w", (2,), "F32"), ("w", (2,), "F32")], "'w' is a duplicate"),
        ([("w", (2, 0), "F32")], "every dimension must be positive"),
        ([("w", (), "F32")], "0 dimensions"),
        ([("w", (1, 1, 1, 1, 1), "F32")], "5 dimensions"),
        ([("w", (32,), "Q4_0")], "Q4_0 can be read only: write F32, F16, BF16, Q8_0"),
        ([("w", (32,), "F8")], "type 'F8' is not supported"),
        ([("w" * 64, (32,), "F32")], "has 64 bytes, llama.cpp takes 63"),
    ],
)
def test_bad_tensors_are_refused_before_any_work(tmp_path, tensors, words):
    def never():
        raise AssertionError

    with pytest.raises(UserError) as error:
        gguf.write(tmp_path / "m.gguf", {}, [(*tensor, never) for tensor in tensors])
    assert words in str(error.value) and str(error.value).startswith(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("type", "values", "words"),
    [
        ("F32", np.zeros((32, 1)), "w have shape [32, 1], expected [32]"),
        ("F16", np.full(32, 1e6), "w: F16 cannot hold the value 1e+06"),
        ("Q8_0", np.full(32, 1e9), "w: Q8_0 cannot hold the value 1e+09"),
        ("Q8_0", np.full(32, np.nan), "w: Q8_0 cannot hold the value nan"),
    ],
)
def test_bad_values_leave_the_old_file(tmp_path, type, values, words):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises(UserError) as error:
        gguf.write(path, {}, [("w", (32,), type, lambda: values)])
    assert words in str(error.value)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_other_errors_pass_through_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        gguf.write(tmp_path / "m.gguf", {}, [("w", (1,), "F32", lambda: 1 / 0)])
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gguf.write(tmp_path / "file" / "m.gguf", {}, [])


# --- values


@pytest.mark.parametrize(
    ("type", "block", "expected"),
    [
        ("BF16", struct.pack("<H", 0xC040), [-3]),
        ("Q8_0", struct.pack("<e32b", 0.5, *range(-16, 16)), [q / 2 for q in range(-16, 16)]),
        ("Q4_0", struct.pack("<e16B", 2, *[0xF1] * 16), [-14] * 16 + [14] * 16),
        ("Q4_1", struct.pack("<ee16B", 2, -1, *[0xF1] * 16), [1] * 16 + [29] * 16),
        ("Q5_0", struct.pack("<eI16B", 1, 1, *[0xF1] * 16), [1] + [-15] * 15 + [-1] * 16),
        ("Q5_1", struct.pack("<eeI16B", 1, 3, 1 << 31, *[0xF1] * 16), [4] * 16 + [18] * 15 + [34]),
        # scales 0..3 are 2 and 4..7 are 1 + 16; minima 0..3 are 3 and 4..7 are 4
        (
            "Q4_K",
            struct.pack("<ee12B128B", 1, 1, *[0x42] * 4, *[3] * 4, *[0x41] * 4, *[0x21] * 128),
            [2 - 3] * 32 + [4 - 3] * 32 + [2 - 3] * 32 + [4 - 3] * 32 + ([17 - 4] * 32 + [34 - 4] * 32) * 2,
        ),
        (
            "Q5_K",
            struct.pack("<ee12B32B128B", 1, 0, *[1] * 8, *[0x01] * 4, *[0x80] * 32, *[0x21] * 128),
            ([1] * 32 + [2] * 32) * 3 + [1] * 32 + [18] * 32,
        ),
        (
            "Q6_K",
            struct.pack("<128B64B16be", *[0x21] * 128, *[0b11_10_01_00] * 64, *range(16), 2),
            [2 * scale * (-31, -15, 2, 18)[scale % 8 // 2] for scale in range(16) for _ in range(16)],
        ),
    ],
)  # fmt: skip
def test_blocks_worked_out_by_hand(type, block, expected):
    np.testing.assert_array_equal(gguf.dequantize(block, type, (len(expected),)), expected)


def test_cast_while_reading(put):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    file = gguf.read(put(one_of_each()))
    for name in file.tensors:
        for dtype in (np.float16, ml_dtypes.bfloat16):
            cast = file.array(name, dtype)
            assert cast.dtype == dtype
            np.testing.assert_array_equal(cast, file.array(name).astype(dtype))


def test_bfloat16_rounds_to_even_and_keeps_what_is_not_finite():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -np.inf, np.nan, 3.4028235e38], np.float32)
    back = gguf.dequantize(gguf.quantize(x, "BF16"), "BF16", x.shape)
    np.testing.assert_array_equal(back, [1, 1 + 4 * 2**-8, -np.inf, np.nan, np.inf])


def test_q8_0_of_tiny_and_zero_blocks_is_zero():
    x = np.concatenate([np.zeros(32), np.full(32, 1e-40), np.full(32, 1e-20)]).astype(np.float32)
    np.testing.assert_array_equal(gguf.dequantize(gguf.quantize(x, "Q8_0"), "Q8_0", (96,)), np.zeros(96))


def test_bytes_and_shape_must_agree():
    with pytest.raises(UserError, match="takes 34 bytes, got 33"):
        gguf.dequantize(bytes(33), "Q8_0", (32,))
    with pytest.raises(UserError, match="a multiple of 32"):
        gguf.quantize(normal(33), "Q8_0")


# --- beside gguf-py


@pytest.fixture(scope="module")
def oracle():
    return pytest.importorskip("gguf")


@pytest.mark.parametrize("type", gguf.TYPES)
def test_values_equal_gguf_py(oracle, type):
    shape = (300, 512)  # more than one chunk
    raw = raw_blocks(type, 300 * 512).reshape(300, -1)
    expected = oracle.quants.dequantize(raw, oracle.GGMLQuantizationType[type])
    np.testing.assert_array_equal(gguf.dequantize(raw, type, shape), expected)


@pytest.mark.parametrize("type", WRITABLE)
def test_bytes_equal_gguf_py(oracle, type):
    x = normal(300, 512)
    x[0, :32] = np.arange(32) - 15.5  # halves, to test rounding of ties
    expected = oracle.quants.quantize(x, oracle.GGMLQuantizationType[type])
    np.testing.assert_array_equal(gguf.quantize(x, type), expected.reshape(-1).view(np.uint8))


def test_gguf_py_reads_what_we_write(oracle, tmp_path):
    arrays = {f"{type}.weight": (type, normal(4, 64)) for type in WRITABLE}
    metadata = {key.replace(" ", "."): value for key, (value, _) in METADATA.items() if key != "no items"}
    gguf.write(tmp_path / "m.gguf", metadata, [(n, x.shape, t, lambda x=x: x) for n, (t, x) in arrays.items()])
    reader = oracle.GGUFReader(tmp_path / "m.gguf")
    ours = gguf.read(tmp_path / "m.gguf")
    for key in metadata:
        # gptjax returns the shortest decimal of a float32
        as_stored = np.float32 if isinstance(ours.metadata[key], float) else np.asarray
        theirs = reader.fields[key].contents()
        np.testing.assert_array_equal(as_stored(theirs), as_stored(ours.metadata[key]), key)
    assert len(reader.tensors) == len(arrays)
    for tensor in reader.tensors:
        type, x = arrays[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == x.shape and tensor.tensor_type.name == type
        np.testing.assert_array_equal(
            oracle.quants.dequantize(tensor.data, tensor.tensor_type), ours.array(tensor.name)
        )


def test_we_read_what_gguf_py_writes(oracle, tmp_path):
    x = normal(4, 64)
    writer = oracle.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint64("a", 7)
    writer.add_array("tokens", ["a", "Ġb"])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", x)
    writer.add_tensor("v", gguf.quantize(x, "Q8_0").reshape(4, -1), raw_dtype=oracle.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    file = gguf.read(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == "llama" and file.metadata["tokens"] == ["a", "Ġb"]
    assert file.metadata["a"] == 7 and file.metadata["scores"].tolist() == [0.5, 1.5]
    np.testing.assert_array_equal(file.array("w"), x)
    assert file.tensors["v"].shape == (4, 64)


# --- reading


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_is_read(put, version):
    content = bytearray(one_of_each())
    content[4] = version
    file = gguf.read(put(bytes(content)))
    assert len(file.metadata) == 24 and set(file.tensors) == {f"blk.{type}" for type in gguf.TYPES}
    assert file.metadata["scalar.7"] is True and file.metadata["scalar.12"] == 1.0
    assert file.metadata["array.7"].dtype == bool and file.metadata["array.3"].dtype == np.int16
    assert file.metadata["text"] == "Ġhi" and file.metadata["tokens"] == ["a", "", "Ġ"]
    assert all(file.array(name).shape == (2, 256) for name in file.tensors)


def test_a_tensor_that_is_not_there(put):
    file = gguf.read(put(one_of_each()))
    with pytest.raises(UserError, match=r"no tensor is called 'blk.F33', did you mean 'blk.F32'\?"):
        file.array("blk.F33")


def test_a_file_that_changes_after_the_header_was_read(put):
    path = put(one_of_each())
    file = gguf.read(path)
    put(one_of_each()[:-1000])
    with pytest.raises(UserError, match="become shorter"):
        file.array(list(file.tensors)[-1])
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        file.array("blk.F32")


W = bytes(32)  # the data of one small tensor
ALIGN = "general.alignment"
HOSTILE = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"G", "not a GGUF file"),
    "magic only": (b"GGUF", "cut short or damaged: the version"),
    "another magic": (b"\x7fELF" + bytes(99), "looks like something else"),
    "pickle": (b"\x80\x04\x95\x10" + bytes(99), "a Python pickle"),
    "zip": (b"PK\x03\x04" + bytes(99), "a zip archive, such as a PyTorch"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
    "web page": (b"<!DOCTYPE html><html>", "an HTML or XML page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    "ggjt": (b"tjgg" + bytes(99), "an older ggml file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (build(version=1), "GGUF version 1: versions 2 and 3 are read"),
    "version 4": (build(version=4), "GGUF version 4"),
    "2^62 tensors": (build(n_tensors=HUGE), f"{HUGE} tensors, at most 20000"),
    "2^62 metadata": (build(n_pairs=HUGE), f"{HUGE} metadata entries, at most 10000"),
    "more tensors than there are": (build(n_tensors=19_999, pad=1), "cut short or damaged: the name of tensor 0"),
    "more metadata than there are": (build(n_pairs=9_999, pad=1), "the key of metadata entry 0"),
    "key of 2^62 bytes": (build(n_pairs=1, pad=1) + struct.pack("<Q", HUGE), "a string of 4611686018427387904 bytes"),
    "key past the end": (build(n_pairs=1, pad=1) + struct.pack("<Q", 1000), "the key of metadata entry 0 takes 1000"),
    "key not UTF-8": (build([(b"\xff", u32(1))]), "the key of metadata entry 0 is not UTF-8"),
    "key twice": (build([("k", u32(1)), ("k", u32(2))]), "duplicate metadata key 'k'"),
    "value type 13": (build([("k", struct.pack("<II", 13, 0))]), "metadata 'k': value type 13"),
    "bool of 2": (build([("k", struct.pack("<IB", 7, 2))]), "a bool is 0 or 1, got 2"),
    "bools of 255": (build([("k", array(7, 3, b"\1\0\xff"))]), "a bool is 0 or 1, got 255"),
    "text of 2^62 bytes": (build([("k", struct.pack("<IQ", 8, HUGE))]), "a string of 4611686018427387904 bytes"),
    "text not UTF-8": (build([("k", struct.pack("<I", 8) + text(b"a\x80"))]), "invalid start byte at byte 1"),
    "array of 2^62 numbers": (build([("k", array(4, HUGE))]), f"metadata 'k' takes {HUGE * 4} bytes"),
    "array of 2^64-1 bytes": (build([("k", array(0, 2**64 - 1))]), "cut short or damaged"),
    "array of 2^62 texts": (build([("k", array(8, HUGE))]), f"has {HUGE} strings"),
    "array of a text not UTF-8": (build([("k", array(8, 2, text("a") + text(b"\xc3")))]), "'k', item 1, is not UTF-8"),
    "array of arrays": (build([("k", array(9, 1, array(4, 1, u32(1))))]), "an array of arrays is not supported"),
    "arrays in arrays": (build([("k", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 999)]), "an array of arrays"),
    "array of type 99": (build([("k", array(99, 1, W))]), "value type 99 is not supported"),
    "alignment 0": (build([(ALIGN, u32(0))]), "alignment is 0, expected a power of two up to 65536"),
    "alignment 3": (build([(ALIGN, u32(3))]), "alignment is 3"),
    "alignment 2^31": (build([(ALIGN, u32(1 << 31))]), "alignment is 2147483648"),
    "alignment is a text": (build([(ALIGN, struct.pack("<I", 8) + text("9" * 999))]), "alignment is str, expected"),
    "alignment is an array": (build([(ALIGN, array(4, 1, struct.pack("<I", 32)))]), "expected a power of two"),
    "0 dimensions": (build(tensors=[entry(dims=())]), "tensor 'w' has 0 dimensions"),
    "5 dimensions": (build(tensors=[entry(dims=(1,) * 5)], data=W), "5 dimensions, expected 1 to 4"),
    "2^32-1 dimensions": (build(n_tensors=1, pad=1) + text("w") + b"\xff" * 4 + W, "4294967295 dimensions"),
    "a dimension of 0": (build(tensors=[entry(dims=(4, 0))], data=W), "every dimension must be positive"),
    "dimensions beyond 64 bits": (build(tensors=[entry(dims=(HUGE, 4))], data=W), f"'w' F32[4, {HUGE}] ends at"),
    "dimensions that wrap to 4": (build(tensors=[entry(dims=(2**63 + 2, 2))], data=W), "ends at byte"),
    "dimensions of 2^256": (build(tensors=[entry(dims=(2**64 - 1,) * 4)], data=W), "ends at byte"),
    "type 99": (build(tensors=[entry(type_id=99)], data=W), "'w' is unknown type 99; supported are F32, F16"),
    "type Q2_K": (build(tensors=[entry(dims=(256,), type_id=10)], data=W), "'w' is Q2_K; supported are F32"),
    "a row of half a block": (build(tensors=[entry(dims=(16,), type_id=8)], data=W), "Q8_0 needs a multiple of 32"),
    "offset off the alignment": (build(tensors=[entry(offset=8)], data=W), "offset 8, not a multiple"),
    "offset past the end": (build(tensors=[entry(offset=1 << 40)], data=W), "ends at byte 1099511627856, the file at"),
    "offset that wraps": (build(tensors=[entry(offset=2**64 - 32)], data=W), "ends at byte 18446744073709551"),
    "data cut short": (build(tensors=[entry()], data=W[:15]), "is it cut short?"),
    "tensor twice": (build(tensors=[entry(), entry(offset=32)], data=W * 2), "'w' is a duplicate"),
    "tensors overlap": (build(tensors=[entry("a", (16,)), entry("b", offset=32)], data=W * 2), "'b' overlaps 'a'"),
    "a hole": (
        build(tensors=[entry("a", (16,), type_id=1), entry("b", offset=64)], data=W * 3),
        "32 bytes between 'a', which is F16, and 'b' belong to no tensor",
    ),
    "a hole before the first": (build(tensors=[entry(offset=32)], data=W * 2), "between the header and 'w' belong to"),
    "a tail": (build(tensors=[entry()], data=W * 2), "bytes after 'w', which is F32, the last, belong to no tensor"),
    "name not UTF-8": (build(tensors=[entry(b"\xfe")], data=W), "the name of tensor 0 is not UTF-8"),
    "name of a megabyte": (build(tensors=[entry("w" * (1 << 20), type_id=99)], data=W), "is unknown type 99"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(put, case):
    content, words = HOSTILE[case]
    path = put(content)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UserError) as error:
            gguf.read(path)
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert words in message and message.startswith(f"{path}: ")
    assert len(message) < 1000
    assert seconds < 2 and peak < 20 << 20


def test_a_header_beyond_its_bound_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.write(build([("k", array(0, 65 << 20))]))
        file.truncate(1 << 30)  # a sparse file: takes no disk space
    with pytest.raises(UserError, match="the header may have 67108864 in all"):
        gguf.read(path)


@pytest.mark.parametrize("sizes", [(1 << 20, 1), (1 << 23,)])
def test_more_strings_than_any_vocabulary_has_are_refused(tmp_path, sizes):
    path = tmp_path / "m.gguf"
    arrays = [(f"k{i}", array(8, n, bytes(8 * n))) for i, n in enumerate(sizes)]
    path.write_bytes(build(arrays)[: 60 << 20])
    with pytest.raises(UserError, match=rf"{sizes[-1]} strings .*1048576 in arrays|cut short"):
        gguf.read(path)


def test_every_bad_tensor_is_named_up_to_twenty(put):
    tensors = [entry(f"t{i}", type_id=99) for i in range(30)]
    with pytest.raises(UserError) as error:
        gguf.read(put(build(tensors=tensors)))
    lines = str(error.value).splitlines()
    assert "30 bad tensors:" in lines[0] and len(lines) == 22
    assert lines[1].startswith("  't0' is unknown type 99") and lines[-1] == "  ... and 10 more"


def test_cut_at_any_byte(put):
    content = one_of_each()
    for end in [*range(HEADER), *range(HEADER, len(content) - 32, 97)]:
        with pytest.raises(UserError):
            gguf.read(put(content[:end]))


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(UserError, match="no such file|not a file"):
        gguf.read(tmp_path / name)


NUMBERS = [0, 1, 2, 3, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change one or two random bytes or ranges, mostly in the header."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 2)):
        position = rng.randrange(1, len(out) if rng.random() < 0.1 else min(len(out), HEADER))
        match rng.randrange(10):
            case 0:
                out[position:position] = rng.randbytes(rng.randint(1, 16))
            case 1:
                del out[position : position + rng.randint(1, 16)]
            case 2:
                del out[position + 1 :]
            case 3 | 4:
                out[position : position + 8] = struct.pack("<Q", rng.choice(NUMBERS))
            case 5 | 6:
                out[position] = rng.randrange(256)
            case _:
                out[position] ^= 1 << rng.randrange(8)
    return bytes(out)


HEADER = one_of_each().index(b"blk.Q6_K") + 40


@contextlib.contextmanager
def at_most(n_bytes: int):
    """Make larger allocations raise MemoryError, where the operating system supports a limit."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.slow
def test_ten_thousand_mutations_read_or_are_refused(put):
    content, rng = one_of_each(), random.Random(0)
    n_read, slowest_s = 0, 0.0
    with at_most(256 << 20):
        for _ in range(N):
            path = put(mutate(content, rng))
            start = time.process_time()
            try:
                file = gguf.read(path)
                for name, tensor in file.tensors.items():
                    assert file.array(name).shape == tensor.shape
                n_read += 1
            except UserError as error:
                assert str(error).startswith(f"{path}: ")
            slowest_s = max(slowest_s, time.process_time() - start)
    assert 0.05 * N < n_read < 0.95 * N  # many mutants are accepted and many are refused
    assert slowest_s < 2
