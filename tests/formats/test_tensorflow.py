"""TensorFlow checkpoints are read correctly; an invalid one gives an error message, never a crash or a hang.

The writer in this file follows the format's specification alone. The golden files were written by TensorFlow 2.21
(`tf.compat.v1.train.Saver`).
"""

import random
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.formats import tensorflow

N = 10_000  # mutations of a valid index
STATE = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
HUGE = 1 << 62

GOLDEN_INDEX = bytes.fromhex("""
00000608011a02080100020f6266080e120412020802280435e5e19bd800041168616c6608131204120208022004280435f96d31e0000415
696e747308031208120208021202080120082808356b4ade44000f116d6f64656c2f68302f6c6e5f312f6208011204120208022010280835
290398070e01116708011204120208022018280835e8e346590603157774650801120812020803120208022020281835c0db3d1700040d73
746570080912002038280835bbd79f11000000000100000000b8618485000000000100000000c0f2a1b00001037400c00100000000010000
0000b5d39717c50108d2010f0000000000000000000000000000000000000000000000000000000000000000000057fb808b247547db
""")
GOLDEN_DATA = bytes.fromhex("""
803f20c00038004201000000feffffff00000000000000000000803f0000803f000000000000803f0000004000004040000080400000a040
0700000000000000
""")
GOLDEN = {
    "bf": np.array([1, -2.5], ml_dtypes.bfloat16),
    "half": np.array([0.5, 3], np.float16),
    "ints": np.array([[1], [-2]], np.int32),
    "model/h0/ln_1/b": np.zeros(2, np.float32),
    "model/h0/ln_1/g": np.ones(2, np.float32),
    "model/wte": np.arange(6, dtype=np.float32).reshape(3, 2),
    "step": np.array(7, np.int64),
}


# --- checkpoints made by hand


def crc32c(data: bytes) -> int:
    """CRC-32C by its bitwise definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes, crc=crc32c) -> bytes:
    value = crc(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) % (1 << 32))


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def header(shards=1, endian=0) -> bytes:
    return field(1, shards) + (field(2, endian) if endian else b"") + field(3, field(1, 1))


def entry(shape=(2,), dtype=1, shard=0, offset=0, size=8, crc=bytes(4), more=b"") -> bytes:
    dims = b"".join(field(2, field(1, n)) for n in shape)
    values = field(1, dtype) + field(2, dims) + field(3, shard) + field(4, offset) + field(5, size)
    return values + varint(6 << 3 | 5) + crc + more


def block(pairs, interval=3) -> bytes:
    """A table block with prefix-compressed keys; every `interval`-th key is stored in full (a restart point)."""
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % interval:
            while shared < min(len(before), len(key)) and before[shared] == key[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(blocks, kind=0, crc=crc32c, handles=None, index=None) -> bytes:
    """A whole table file, from the contents of its blocks."""
    out, block_handles = b"", []
    for content in blocks:
        block_handles.append(varint(len(out)) + varint(len(content)))
        out += content + bytes([kind]) + masked_crc(content + bytes([kind]), crc)
    block_handles = block_handles if handles is None else handles
    index = block([(b"%05d" % i, handle) for i, handle in enumerate(block_handles)], 1) if index is None else index
    places = b""
    for content in (block([]), index):
        places += varint(len(out)) + varint(len(content))
        out += content + b"\0" + masked_crc(content + b"\0", crc)
    return out + places.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def one_tensor(value=None, key=b"w", head=None) -> bytes:
    """A table with the header and one tensor entry."""
    return table([block([(b"", header() if head is None else head), (key, entry() if value is None else value)])])


NUMBER = {np.float32: 1, np.int32: 3, np.int64: 9, ml_dtypes.bfloat16: 14, np.float16: 19}


def save(folder, arrays, shards=1, per_block=4):
    """Write a checkpoint in TensorFlow's layout: sorted names, several blocks, tensors distributed over the shards."""
    pairs, data = [(b"", header(shards))], [b""] * shards
    for i, (name, array) in enumerate(sorted(arrays.items())):
        raw, shard = array.tobytes(), i % shards
        number = NUMBER[array.dtype.type]
        pairs.append((name.encode(), entry(array.shape, number, shard, len(data[shard]), len(raw), masked_crc(raw))))
        data[shard] += raw
    blocks = [block(pairs[i : i + per_block]) for i in range(0, len(pairs), per_block)]
    return put(folder, table(blocks), *data)


def put(folder, index, *data, state=STATE):
    (folder / "checkpoint").write_text(state)
    (folder / "model.ckpt.index").write_bytes(index)
    for i, content in enumerate(data or [bytes(8)]):
        (folder / f"model.ckpt.data-{i:05}-of-{max(len(data), 1):05}").write_bytes(content)
    return folder


def assert_same(source, arrays):
    assert source.shapes() == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        values = source.array(name)
        assert values.dtype == array.dtype and values.shape == array.shape
        np.testing.assert_array_equal(values, array)


# --- in


def test_what_tensorflow_wrote(tmp_path):
    source = tensorflow.open_checkpoint(put(tmp_path, GOLDEN_INDEX, GOLDEN_DATA))
    assert_same(source, GOLDEN)
    np.testing.assert_array_equal(source.rows("model/wte", 1, 3), GOLDEN["model/wte"][1:3])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("per_block", [1, 4, 100])
def test_names_share_their_beginnings_over_blocks_and_shards(tmp_path, shards, per_block):
    rng = np.random.default_rng(0)
    arrays = {f"model/h{i}/{letter}": rng.normal(size=(3, i)).astype(np.float32) for i in range(12) for letter in "abc"}
    arrays["model/größe"] = np.array(5, np.int64)
    assert_same(tensorflow.open_checkpoint(save(tmp_path, arrays, shards, per_block)), arrays)


def test_rows_are_compared_with_the_checksum_of_the_whole(tmp_path):
    array = np.arange(1 << 18, dtype=np.float32).reshape(-1, 64)
    raw = array.tobytes()
    crc = masked_crc(raw, tensorflow.crc32c)
    put(tmp_path, one_tensor(entry(array.shape, size=len(raw), crc=crc)), raw)
    source = tensorflow.open_checkpoint(tmp_path)
    np.testing.assert_array_equal(source.rows("w", 5, 8), array[5:8])
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(raw[:-1] + b"\1")
    with pytest.raises(UserError, match="w is damaged: its checksum differs"):
        tensorflow.open_checkpoint(tmp_path).rows("w", 5, 8)


def test_the_data_changes_after_the_index_was_read(tmp_path):
    source = tensorflow.open_checkpoint(put(tmp_path, GOLDEN_INDEX, GOLDEN_DATA))
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    for bit in range(8 * len(GOLDEN_DATA)):
        damaged = bytearray(GOLDEN_DATA)
        damaged[bit // 8] ^= 1 << bit % 8
        data.write_bytes(damaged)
        wrong = []
        for name in GOLDEN:
            source.checked.clear()
            try:
                source.array(name)
            except UserError as error:
                wrong.append(str(error))
        assert len(wrong) == 1 and str(data) in wrong[0]
    data.write_bytes(GOLDEN_DATA[:-1])
    with pytest.raises(UserError, match="step is damaged"):
        source.array("step")
    data.unlink()
    with pytest.raises(UserError, match="step cannot be read: No such file"):
        source.array("step")


@pytest.mark.parametrize("size", [*range(20), 63, 64, 65, 1000, 1001, 4095, (1 << 18) + 7])
def test_checksums(size):
    data = random.Random(size).randbytes(size)
    assert tensorflow.crc32c(data) == crc32c(data)
    assert tensorflow.crc32c(data[size // 3 :], tensorflow.crc32c(data[: size // 3])) == crc32c(data)


def test_a_checksum_from_the_standard():
    assert tensorflow.crc32c(b"123456789") == 0xE3069283


# --- hostile


GOOD = one_tensor()
END = len(GOOD) - 48
BAD = {
    "empty": (b"", "cut off"),
    "first half": (GOOD[: len(GOOD) // 2], "cut off"),
    "last byte gone": (GOOD[:-1], "cut off"),
    "another magic": (GOOD[:-8] + b"12345678", "no index of a checkpoint"),
    "footer only": (GOOD[END:], "does not fit"),
    "handles cut off": (GOOD[:END] + b"\xff" * 40 + GOOD[-8:], "a number of more than 10 bytes"),
    "index block far away": (
        GOOD[:END] + (varint(0) * 2 + varint(HUGE) * 2).ljust(40, b"\0") + GOOD[-8:], "does not fit",
    ),
    "block far away": (table([], handles=[varint(HUGE) + varint(9)]), "does not fit"),
    "block of 2^62": (table([], handles=[varint(0) + varint(HUGE)]), "does not fit"),
    "block of 3": (table([], handles=[varint(0) + varint(3)]), "does not fit"),
    "handle cut off": (table([], handles=[b"\x80"]), "a number is cut off"),
    "block twice": (table([block([(b"", header())])], handles=[varint(0) + varint(17)] * 2), "overlaps"),
    "a bit of a block": (b"\1" + GOOD[1:], "block at byte 0 is damaged: its checksum differs"),
    "snappy": (table([block([(b"", header())])], kind=1), "compressed (snappy)"),
    "another compression": (table([block([(b"", header())])], kind=7), "compressed (compression 7)"),
    "2^32 restarts": (table([block([(b"", header())])[:-4] + b"\xff" * 4]), "a block has no entries"),
    "no entries": (table([block([])]), "a block has no entries"),
    "no blocks": (table([]), "a block has no entries"),
    "shares more than there is": (table([b"\5\1\1ab" + bytes(4) + b"\1\0\0\0"]), "exceeds the block"),
    "value past the end": (table([b"\0\1\x7fab" + bytes(4) + b"\1\0\0\0"]), "exceeds the block"),
    "long key": (one_tensor(key=b"k" * 1025), "a key of 1,025 bytes"),
    "keys descend": (table([block([(b"", header()), (b"b", entry()), (b"a", entry())])]), "keys must ascend"),
    "key twice": (table([block([(b"", header()), (b"b", entry()), (b"b", entry())])]), "keys must ascend"),
    "keys descend over blocks": (table([block([(b"b", entry())]), block([(b"", header())])]), "keys must ascend"),
    "20,001 tensors": (
        table([block([(b"%06d" % i, b"") for i in range(20_002)])], crc=tensorflow.crc32c), "more than 20,000",
    ),
    "3 MB": (bytes(3 << 20), "3,145,728 bytes, at most 2,097,152 are read"),
    "no header": (table([block([(b"w", entry())])]), "entry about the whole checkpoint is missing"),
    "header is text": (one_tensor(head=b"hello"), "entry about the whole checkpoint"),
    "big-endian": (one_tensor(head=header(endian=1)), "big-endian"),
    "no shards": (one_tensor(head=header(0)), "0 data files"),
    "2^40 shards": (one_tensor(head=header(1 << 40)), "1,099,511,627,776 data files"),
    "2 shards": (one_tensor(head=header(2)), "model.ckpt.data-00000-of-00002 is missing"),
    "a text": (one_tensor(entry(dtype=7)), "'w': TensorFlow's dtype number 7 is not supported: DT_FLOAT (1)"),
    "slices": (one_tensor(entry(more=field(7, b""))), "'w': saved in slices"),
    "another size": (one_tensor(entry(size=7)), "'w': float32 [2] takes 8 bytes, got 7"),
    "a smaller shape": (one_tensor(entry(shape=(1,))), "'w': float32 [1] takes 4 bytes, got 8"),
    "dims of 2^40": (one_tensor(entry(shape=(1 << 40, 1 << 40))), "is too large"),
    "empty, but huge": (one_tensor(entry(shape=(0, HUGE), size=0)), "is too large"),
    "negative dim": (one_tensor(entry(shape=((1 << 64) - 1,))), "is too large"),
    "33 dims": (one_tensor(entry(shape=(1,) * 33, size=4)), "is too large"),
    "500,000 dims": (
        table([block([(b"", header()), (b"w", entry((0,) * 500_000))])], crc=tensorflow.crc32c), "is too large",
    ),
    "unknown rank": (one_tensor(field(1, 1) + field(2, field(3, 1))), "number of dimensions is unknown"),
    "past the end of the data": (one_tensor(entry(offset=1)), "'w': ends at byte 9 of model.ckpt.data-00000-of-00001"),
    "offset of 2^62": (one_tensor(entry(offset=HUGE)), "ends at byte"),
    "negative offset": (one_tensor(entry(offset=(1 << 64) - 8)), "ends at byte"),
    "shard 1 of 1": (one_tensor(entry(shard=1)), "'w': in data file 1, there are 1"),
    "unknown field": (one_tensor(entry(more=field(9, 1))), "'w': field 9 of kind 0 is unknown"),
    "shape is a number": (one_tensor(field(1, 1) + field(2, 2)), "'w': field 2 of kind 0 is unknown"),
    "field cut off": (one_tensor(entry(more=varint(2 << 3 | 2) + b"\5ab")), "'w': field 2 is cut off"),
    "checksum cut off": (one_tensor(entry()[:-1]), "'w': field 6 is cut off"),
    "11 bytes of a number": (one_tensor(field(1, 1)[:1] + b"\xff" * 10 + b"\1"), "'w': a number of more than 10 bytes"),
    "name not UTF-8": (one_tensor(key=b"\xff"), "a name must be printable UTF-8"),
    "NUL in a name": (one_tensor(key=b"a\0b"), "a name must be printable UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed_indexes(tmp_path, case):
    content, words = BAD[case]
    put(tmp_path, content)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(UserError) as error:
        tensorflow.open_checkpoint(tmp_path)
    assert time.process_time() - started < 2 and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert str(error.value).startswith(str(tmp_path / "model.ckpt.index")) and words in str(error.value)


def test_all_bad_tensors_are_named_at_once(tmp_path):
    pairs = [(b"", header()), (b"a", entry(size=7)), (b"b", entry()), (b"c", entry(dtype=7)), (b"d", entry(shard=9))]
    with pytest.raises(UserError) as error:
        tensorflow.open_checkpoint(put(tmp_path, table([block(pairs)])))
    assert all(f"  '{name}': " in str(error.value) for name in "acd") and "'b'" not in str(error.value)


@pytest.mark.parametrize(
    "state",
    [
        "", "\n" * 65_000, "model_checkpoint_path: model.ckpt", 'all_model_checkpoint_paths: "model.ckpt"',
        *(f'model_checkpoint_path: "{name}"' for name in ("", "../model.ckpt", "/etc/model.ckpt", "a/b", ".hidden")),
        *(f'model_checkpoint_path: "{name}"' for name in ("a\0b", "a b", "a\\b", "C:x", "\u00e9", "x" * 1000)),
    ],
)  # fmt: skip
def test_the_state_file_names_files_beside_it(tmp_path, state):
    with pytest.raises(UserError, match="with the plain name of files here") as error:
        tensorflow.open_checkpoint(put(tmp_path, GOOD, state=state))
    assert str(error.value).startswith(str(tmp_path / "checkpoint"))


def test_files_that_are_not_there(tmp_path):
    put(tmp_path, GOOD)
    (tmp_path / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match="model.ckpt.data-00000-of-00001 is missing"):
        tensorflow.open_checkpoint(tmp_path)
    (tmp_path / "model.ckpt.index").unlink()
    with pytest.raises(UserError, match="model.ckpt.index: no such file"):
        tensorflow.open_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_bytes(bytes(1 << 17))
    with pytest.raises(UserError, match="checkpoint: 131,072 bytes, at most"):
        tensorflow.open_checkpoint(tmp_path)
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="checkpoint: not a file"):
        tensorflow.open_checkpoint(tmp_path)


def test_ten_thousand_mutations(tmp_path):
    """Half of the mutants have recomputed checksums, so that the parser behind the checksum test is reached too."""
    pairs = [(b"", header())]
    for i, (name, array) in enumerate(sorted(GOLDEN.items())):
        number = NUMBER[array.dtype.type]
        pairs.append((name.encode(), entry(array.shape, number, 0, 4 * i, array.nbytes)))
    blocks = [block(pairs[:5]), block(pairs[5:])]
    index = block([(b"a", b"\0" + varint(len(blocks[0]))), (b"z", varint(len(blocks[0]) + 5) + varint(len(blocks[1])))])
    whole = table(blocks, index=index)
    put(tmp_path, whole, bytes(64))
    assert len(tensorflow.open_checkpoint(tmp_path).entries) == len(GOLDEN)
    rng = random.Random(0)

    def mutated(content: bytes) -> bytes:
        content = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            position, kind = rng.randrange(len(content)), rng.randrange(4)
            if kind == 0:
                content[position] ^= 1 << rng.randrange(8)
            elif kind == 1:
                content[position] = rng.choice([0, 1, 127, 128, 255])
            elif kind == 2:
                content[position:position] = rng.randbytes(rng.randint(1, 4))
            else:
                del content[position : position + rng.randint(1, 4)]
        return bytes(content)

    def mutant() -> bytes:
        if rng.random() < 0.5:
            return mutated(whole)
        contents = [*blocks, index]
        which = rng.randrange(3)
        contents[which] = mutated(contents[which])
        return table(contents[:2], index=contents[2], crc=tensorflow.crc32c)

    refused = 0
    with open(tmp_path / "model.ckpt.index", "r+b", buffering=0) as file:  # faster than creating a new file each time
        for _ in range(N):
            file.seek(0)
            file.truncate(file.write(mutant()))
            try:
                tensorflow.open_checkpoint(tmp_path)
            except UserError:
                refused += 1
    assert N // 2 < refused < N


def test_gpt2_as_openai_published_it(tmp_path):
    import json

    import jax

    import gptjax
    from gptjax.weights import families
    from gptjax.weights.rules import write

    cfg = gptjax.ModelConfig(vocab_size=17, context_length=16, n_layer=2, n_head=2, d_model=8)
    params = gptjax.init_params(jax.random.key(0), cfg)
    save(tmp_path, {out.name: out.array() for out in write(params, families.OPENAI_RULES, cfg)})
    sizes = {"n_vocab": 17, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
    (tmp_path / "hparams.json").write_text(json.dumps(sizes))
    read, read_cfg = gptjax.load(tmp_path)
    assert not families.differences(read_cfg, cfg)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read))
    (tmp_path / "hparams.json").write_text(json.dumps(sizes | {"n_layer": 3, "surprise": 1}))
    with pytest.raises(UserError, match="surprise=1 is unknown"):
        gptjax.load(tmp_path)
