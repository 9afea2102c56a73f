"""safetensors files round-trip; an invalid file gives one error message, never a crash, a hang or a huge allocation."""

import json
import os
import pickle
import random
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.formats import safetensors
from gptjax.weights import load
from gptjax.weights.rules import Out

N = 10_000  # mutations of a valid file
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.ones(4, np.float32), "d": np.float32(7)}


def outs(tensors=TENSORS):
    return [Out(name, np.shape(array), lambda array=array: np.asarray(array)) for name, array in tensors.items()]


@pytest.fixture
def good(tmp_path):
    safetensors.save(tmp_path, outs())
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_out_and_in_and_through_the_formats_own_library(tmp_path, dtype):
    from safetensors.numpy import load_file, save_file

    safetensors.save(tmp_path, outs(), dtype)
    file, theirs = safetensors.open_folder(tmp_path), load_file(tmp_path / "model.safetensors")
    for name, array in TENSORS.items():
        assert file.shapes()[name] == array.shape and file.array(name).dtype == dtype
        np.testing.assert_array_equal(file.array(name), array.astype(dtype))
        np.testing.assert_array_equal(theirs[name], array.astype(dtype))
    save_file(
        {name: array.astype(dtype) for name, array in TENSORS.items() if array.ndim}, tmp_path / "their.safetensors"
    )
    reopened = safetensors.open_file(tmp_path / "their.safetensors")
    np.testing.assert_array_equal(reopened.array("a"), TENSORS["a"].astype(dtype))


def test_shards(tmp_path):
    safetensors.save(tmp_path, outs(), shard_bytes=24)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    folder = safetensors.open_folder(tmp_path)
    assert all(np.array_equal(folder.array(name), array) for name, array in TENSORS.items())


def file_of(header, data=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class _Canary:
    def __reduce__(self):
        return os.mkdir, ("canary-was-run",)


BAD = {
    "empty": (b"", "not a whole safetensors file"),
    "seven bytes": (b"1234567", "not a whole"),
    "header of 2^63": (file_of({}, length=1 << 63), "header of 9,223,372,036,854,775,808"),
    "header longer than the file": (file_of({}, b"", 1000), "header of 1,000"),
    "not JSON": (file_of(b"{,}"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "a list": (file_of([]), "must be a JSON object"),
    "nested deep": (file_of(b"[" * 100_000), "not JSON"),
    "key twice": (file_of(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "key twice behind many": (
        file_of(b"{" + b"".join(b'"%d": 1,' % i for i in range(100_000)) + b'"x": 1, "x": 2}'),
        "duplicate key 'x'",
    ),
    "a million lists": (file_of(b'{"a": [' + b"[]," * 1_000_000 + b"1]}"), "more than 500,000 values"),
    "cut off in a header of 128": (file_of(b'{"a"', b"", 128), "not a whole safetensors file (header of 128"),
    "NUL in a name": (file_of({"a\0": entry()}), "'a\\x00': the name of a tensor must be printable"),
    "half a surrogate pair": (file_of(b'{"\\ud800": {}}'), "'\\ud800': the name of a tensor must be printable"),
    "overlap": (file_of({"a": entry(), "b": entry()}), "overlap or leave a gap"),
    "hole": (file_of({"a": entry(offsets=(4, 28))}, b"\0" * 28), "overlap or leave a gap"),
    "cut off": (file_of({"a": entry()}, b"\0" * 20), "cut off or too long"),
    "bytes behind": (file_of({"a": entry()}, b"\0" * 25), "cut off or too long"),
    "dims of 2^40": (file_of({"a": entry(shape=(1 << 40, 1 << 40))}), "takes"),
    "empty, but huge": (file_of({"a": entry(shape=(0, 1 << 61), offsets=(0, 0))}, b""), "is too large"),
    "negative dim": (file_of({"a": entry(shape=(-2, -3))}), "integers"),
    "dim is true": (file_of({"a": entry(shape=(True, 6))}), "integers"),
    "dim is text": (file_of({"a": entry(shape=("2", 3))}), "integers"),
    "100,000 dims": (file_of({"a": entry(shape=(1,) * 100_000)}), "up to 32"),
    "unknown dtype": (file_of({"a": entry(dtype="F8_E4M3")}), "F8_E4M3"),
    "dtype is a list": (file_of({"a": entry(dtype=["F32"])}), "not supported"),
    "offsets backwards": (file_of({"a": entry(offsets=(24, 0))}), "span -24"),
    "three offsets": (file_of({"a": entry(offsets=(0, 24, 24))}), "two integers"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2, 3]}}), "expected dtype, shape and data_offsets"),
    "metadata is a number": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 60, "a zip archive, as torch.save writes"),
    "a pickle": (pickle.dumps(_Canary()) + b"\0" * 60, "a pickle"),
    "a web page": (b"<!DOCTYPE html><html>" + b" " * 60, "an HTML page"),
    "GGUF": (b"GGUF" + b"\xff" * 60, "a GGUF file"),
    "Git LFS": (b"version https://git-lfs" + b" " * 60, "a Git LFS pointer"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files(tmp_path, monkeypatch, case):
    content, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        safetensors.open_file(path)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert str(error.value).startswith(str(path)) and words in str(error.value)
    assert not (tmp_path / "canary-was-run").exists()


def test_nesting_of_every_depth(tmp_path):
    """JSON nested just below json's recursion limit must not make the error message itself fail."""
    path = tmp_path / "model.safetensors"
    for depth in range(850, 1010):
        for key in ("dtype", "shape", "data_offsets"):
            body = {**entry(), key: 0}
            path.write_bytes(
                file_of(
                    json.dumps({"a": body}).replace(f'"{key}": 0', f'"{key}": ' + "[" * depth + "]" * depth).encode()
                )
            )
            with pytest.raises(UserError):
                safetensors.open_file(path)


def test_not_a_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        safetensors.open_file(tmp_path / "absent.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(UserError, match="not a file"):
            safetensors.open_file(path)


def test_a_file_that_changes_after_the_header_was_read(good):
    file = safetensors.open_file(good)
    good.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(UserError, match="d is cut off"):
        file.array("d")
    good.unlink()
    with pytest.raises(UserError, match="a cannot be read: No such file"):
        file.array("a")


def test_values_of_another_shape_are_not_written(tmp_path):
    with pytest.raises(UserError, match=r"the values of a have shape \[3\], expected \[2\]"):
        safetensors.save(tmp_path, [Out("a", (2,), lambda: np.zeros(3))])
    assert not list(tmp_path.iterdir())


def test_ten_thousand_mutations(good, tmp_path):
    """Every mutant is read or refused; most mutations hit the header, which is what the reader parses."""
    content = good.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(b"")
    refused = 0
    with open(path, "r+b", buffering=0) as out:  # faster than creating a new file each time
        for _ in range(N):
            mutant = bytearray(content)
            for _ in range(rng.randint(1, 3)):
                position = rng.randrange(header if rng.random() < 0.9 else len(mutant)) % max(len(mutant), 1)
                kind = rng.randrange(4)
                if kind == 0 and mutant:
                    mutant[position] = rng.randrange(256)
                elif kind == 1:
                    mutant[position:position] = rng.randbytes(rng.randint(1, 8))
                elif kind == 2:
                    del mutant[position : position + rng.randint(1, 40)]
                else:
                    mutant[position : position + 1] = rng.choice(b'0123456789[]{}":,-e').to_bytes(1, "little")
            out.seek(0)
            out.truncate(out.write(mutant))
            try:
                file = safetensors.open_file(path)
                for name in file.entries:
                    file.array(name)
            except UserError:
                refused += 1
    assert refused > N // 2


INDEX = {
    "parent": "../model-1.safetensors",
    "absolute": "/etc/model.safetensors",
    "folder": "a/b.safetensors",
    "URL": "https://x/y.safetensors",
    "NUL": "a\0.safetensors",
    "hidden": ".model.safetensors",
    "pickle": "model.bin",
    "empty": "",
    "blank": "model 1.safetensors",
    "long": "x" * 1000 + ".safetensors",
}


@pytest.mark.parametrize("name", INDEX)
def test_names_of_shards_are_plain(tmp_path, name):
    index = {"weight_map": {"a": INDEX[name]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not the plain name"):
        safetensors.open_folder(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path):
    safetensors.save(tmp_path, outs(), shard_bytes=24)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    for change, words in (
        ({"a": shards[1]}, "'a' is not in"),
        ({"stranger": shards[0]}, "'stranger' is not in"),
        ({"a": "model-00003-of-00003.safetensors"}, "is missing"),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(UserError, match=words):
            safetensors.open_folder(tmp_path)
    short = {name: shard for name, shard in index["weight_map"].items() if name != "d"}
    path.write_text(json.dumps({"weight_map": short}))
    with pytest.raises(UserError, match="is not in the index"):
        safetensors.open_folder(tmp_path)
    path.write_text(json.dumps({"weight_map": {f"t{i}": "x" for i in range(1_000_000)}}))
    with pytest.raises(UserError, match="the index has more than 500,000 values"):
        safetensors.open_folder(tmp_path)
    path.write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(10_001)}}))
    with pytest.raises(UserError, match="10,001 files, expected up to 10,000"):
        safetensors.open_folder(tmp_path)
    path.write_bytes(bytes((32 << 20) + 1))
    with pytest.raises(UserError, match="an index may have"):
        safetensors.open_folder(tmp_path)


def test_the_single_file_comes_before_an_index(tmp_path):
    """As in transformers: if model.safetensors exists, an index left by an older save is ignored."""
    safetensors.save(tmp_path, outs(), shard_bytes=24)
    safetensors.save(tmp_path, outs({"only": np.ones(1, np.float32)}))
    assert safetensors.open_folder(tmp_path).shapes() == {"only": (1,)}


def test_links_into_a_cache_are_followed(tmp_path):
    """The layout of the Hugging Face cache: the folder's files are links to blobs elsewhere."""
    (tmp_path / "blobs").mkdir()
    safetensors.save(tmp_path / "blobs", outs())
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    assert safetensors.open_folder(tmp_path / "snapshot").shapes() == {k: v.shape for k, v in TENSORS.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "x.npy", "x.msgpack"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(_Canary()))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    for source in ("model", f"model/{name}"):
        with pytest.raises(UserError, match="save_pretrained"):
            load(source)
    assert not (tmp_path / "canary-was-run").exists()


SIZES = '"n_layer": 1, "n_head": 1, "n_positions": 4, "vocab_size": 3}'


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"model_type": "bert"}', "model_type='bert' is unknown; known are gpt2, llama"),
        ('{"model_type": "llama", "auto_map": {"AutoModel": "x.py"}}', "auto_map"),
        ('{"model_type": "gpt2"}', r"(?s)12 layers are announced.*says n_embd=768"),  # GPT2Config's defaults
        ('{"model_type": "gpt2", "n_embd": -8, ' + SIZES, "d_model"),
        ('{"model_type": "gpt2", "n_embd": NaN, "n_layer": "1"}', "n_embd: expected int, got nan"),
        ('{"model_type": "gpt2", "n_embd": 1099511627776, ' + SIZES, "d_model"),
        ('{"model_type": "gpt2", "n_embd": 8, "n_embd": 16}', "duplicate key"),
    ],
)  # fmt: skip
def test_malformed_configs(good, config, words):
    (good.parent / "config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        load(good.parent)


@pytest.mark.parametrize(("label", "dtype"), [(b'"I32"', "int32"), (b'"U32"', "uint32")])
def test_integers_are_no_weights(tmp_path, label, dtype):
    """One changed letter in the header would make the reader interpret float bits as huge integers."""
    import jax

    import gptjax
    from gptjax.weights import export_hf

    cfg = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=8, context_length=16, vocab_size=11)
    export_hf(tmp_path / "hf", gptjax.init_params(jax.random.key(0), cfg), cfg)
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', label, 1))
    with pytest.raises(UserError, match=f"holds {dtype}, expected floating-point values"):
        load(tmp_path / "hf")


def test_numbers_that_are_not_finite_and_missing_tensors_are_named(tmp_path):
    import jax

    import gptjax
    from gptjax.weights import export_hf

    cfg = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=8, context_length=16, vocab_size=11)
    params = gptjax.init_params(jax.random.key(0), cfg)
    params["wpe"]["embedding"] = params["wpe"]["embedding"].at[0, 0].set(np.nan)
    export_hf(tmp_path / "nan", params, cfg)
    with pytest.raises(UserError, match=r"transformer.wpe.weight has non-finite values"):
        load(tmp_path / "nan")
    source = safetensors.open_folder(tmp_path / "nan")
    kept = {name: source.array(name) for name in source.shapes() if "mlp" not in name}
    kept["transformer.wte.weight"] = kept["transformer.wte.weight"].T
    (tmp_path / "less").mkdir()
    safetensors.save(tmp_path / "less", outs(kept))
    (tmp_path / "less" / "config.json").write_bytes((tmp_path / "nan" / "config.json").read_bytes())
    with pytest.raises(UserError) as error:
        load(tmp_path / "less")
    assert str(error.value).count("is missing") == 4
    assert "transformer.wte.weight is [8, 11], expected [11, 8]" in str(error.value)
