"""`load` and `load_tokenizer` for every kind of model source."""

import dataclasses
import importlib
import pkgutil
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax import assets, tokenizers, weights
from gptjax.errors import UserError
from gptjax.formats import gguf
from gptjax.tokenizers import hf
from gptjax.weights import export, families

TEXT = "To be, or not to be, that is the question: naïve 日本 12 34\n"


@pytest.fixture(scope="module")
def model():
    tokenizer = tokenizers.train("bpe", [TEXT] * 8, 280)
    cfg = gptjax.ModelConfig(
        arch="llama", n_layer=1, n_head=2, d_model=32, d_ff=32, context_length=16, vocab_size=tokenizer.vocab_size
    )
    return gptjax.init_params(jax.random.key(0), cfg), cfg, tokenizer


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    params, cfg, tokenizer = model
    gptjax.save(folder / "run" / "final", params, cfg, tokenizer)
    weights.export_hf(folder / "hf", params, cfg, tokenizer)
    weights.export_gguf(folder / "m.gguf", params, cfg, tokenizer)
    return folder


@pytest.mark.parametrize("place", ["run", "run/final", "hf", "m.gguf"])
def test_the_tokenizer_of_a_model(model, places, place):
    *_, tokenizer = model
    for load in (weights.load_tokenizer, tokenizers.load):
        loaded = load(places / place)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.vocab_size == tokenizer.vocab_size
        assert weights.stop_ids(loaded) == weights.stop_ids(tokenizer)


def test_a_named_asset(model, places, monkeypatch):
    *_, tokenizer = model
    monkeypatch.setitem(assets.ASSETS, "small", assets.ASSETS["smollm2-135m-instruct"])
    monkeypatch.setattr(assets, "fetch", lambda name: places / "m.gguf")
    for load in (weights.load_tokenizer, tokenizers.load):
        assert load("small").encode(TEXT) == tokenizer.encode(TEXT)


def test_a_model_without_one(model, places, tmp_path):
    params, cfg, _ = model
    gptjax.save(tmp_path / "bare", params, cfg)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        weights.load_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match="no such run"):
        weights.load_tokenizer(tmp_path / "absent")


def test_windows_are_refused_where_llama_cpp_has_none(model, tmp_path):
    params, cfg, tokenizer = model
    for shape in (dict(sliding_window=4), dict(sliding_window=4, window_pattern="SL"), dict(sliding_window=15)):
        with pytest.raises(UserError, match=r"the nearest, llama, lacks model\.windows=\(") as error:
            weights.export_gguf(tmp_path / "m.gguf", params, dataclasses.replace(cfg, **shape), tokenizer)
        assert "Its own folder" in str(error.value)
        assert not (tmp_path / "m.gguf").exists()
    weights.export_gguf(tmp_path / "m.gguf", params, dataclasses.replace(cfg, sliding_window=16), tokenizer)


def test_every_file_of_a_family_is_registered():
    names = [f"{families.__name__}.{module.name}" for module in pkgutil.iter_modules(families.__path__)]
    in_files = [module.FAMILY for module in map(importlib.import_module, names) if hasattr(module, "FAMILY")]
    assert {family.name: family for family in in_files} == families.FAMILIES


@pytest.fixture
def changed(places, tmp_path):
    """write(**metadata): a copy of the GGUF file with changed metadata."""

    def write(**changes):
        file = gguf.read(places / "m.gguf")
        metadata = file.metadata | {key.replace("__", "."): value for key, value in changes.items()}
        tensors = [(t.name, t.shape, t.type, lambda t=t: file.array(t.name)) for t in file.tensors.values()]
        gguf.write(tmp_path / "changed.gguf", metadata, tensors)
        return tmp_path / "changed.gguf"

    return write


HOSTILE = {
    "window": (dict(llama__attention__sliding_window=4), "sliding_window=4: llama.cpp gives llama models no window"),
    "a million layers": (dict(llama__block_count=10**6), "1000000 layers are announced, but there are only 12 tensors"),
    "2^31 layers": (dict(llama__block_count=2**31), "n_layer=2147483648, expected at most 16777216"),
    "2^31-1 heads": (dict(llama__attention__head_count=2**31 - 1), "n_head=2147483647"),
    "no heads": (dict(llama__attention__head_count=0), "model.n_head (0)"),
    "no kv heads": (dict(llama__attention__head_count_kv=0), "n_kv_head=0, expected 1 or more"),
    "width 0": (dict(llama__embedding_length=0), "model.d_model (0)"),
    "a long name": ({"llama__" + "x" * 10**5: 1}, "xxx..."),
    "parts": (dict(split__count=[2, 2]), "gguf-split"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata(changed, case):
    values, words = HOSTILE[case]
    with pytest.raises(UserError) as error:
        gptjax.load(changed(**values))
    assert words in str(error.value) and len(str(error.value)) < 1000


def test_arrays_where_numbers_belong(changed, places):
    for key in [*gguf.read(places / "m.gguf").metadata, "llama.attention.sliding_window_pattern"]:
        # vocab_size is read from the shape of the embedding instead
        if key.startswith("llama.") and key != "llama.vocab_size":
            with pytest.raises(UserError, match=key.removeprefix("llama.")):
                gptjax.load(changed(**{key: [1, 2]}))


def test_a_name_that_means_more_to_llama_cpp_is_changed(model, tmp_path):
    """llama.cpp requires <s> and </s> in every model named phi3, and refuses to load one without them."""
    params, cfg, tokenizer = model
    weights.export_gguf(tmp_path / "My-Phi-3-chat.gguf", params, cfg, tokenizer)
    assert gguf.read(tmp_path / "My-Phi-3-chat.gguf").metadata["general.name"] == "My-Phi-chat"
    assert export._name_for_llama_cpp("phi3", ["</s>", "<unk>", "<s>", "<|endoftext|>"]) == "phi3"
    assert export._name_for_llama_cpp("other", []) == "other"


def test_folders_and_files_behind_links(tiny, tmp_path):
    """The layout of the Hugging Face cache: every file is a link to a blob without a file extension."""
    cfg, params = tiny("llama", vocab_size=257)
    gptjax.weights.export_hf(tmp_path / "hf", params, cfg, gptjax.tokenizers.load("bytes"))
    gptjax.save(tmp_path / "run" / "kept", params, cfg, gptjax.tokenizers.load("bytes"))
    (tmp_path / "run" / "final").symlink_to(tmp_path / "run" / "kept", target_is_directory=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, file in enumerate(sorted((tmp_path / "hf").iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / str(i))
    (tmp_path / "link").symlink_to(tmp_path / "snapshot", target_is_directory=True)
    for source in ("snapshot", "link", "run"):
        loaded, _ = gptjax.load(tmp_path / source)
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
        assert gptjax.weights.load_tokenizer(tmp_path / source).encode("abc") == [97, 98, 99]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("my.txt", "Once upon a time, na\u00efve.\n".encode() * 300, "is a text file: expected a run or model folder"),
        ("my.txt", b"gptjax", "gptjax pretrain data.source="),
        ("model", b"GGUF\3\0\0\0", "is a GGUF file: name it .gguf"),
        ("model.pt", b"PK\3\4....", "loading a pickle can execute arbitrary code"),
        ("model.bin", b"anything", "loading a pickle can execute arbitrary code"),
        ("weights", b"\x80\x04..", "loading a pickle can execute arbitrary code"),
        ("config.json", b"{}", "is the description of a model: name its folder"),
        ("photo.png", b"\x89PNG\r\n\0\0\xff\xfe" * 9, "is not a model of a known format: expected a run"),
    ],
)
def test_a_file_that_is_no_model_is_called_what_it_is(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        weights.open_model(tmp_path / name)
    assert words in str(error.value) and ("pickle" in str(error.value)) == ("pickle" in words)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(model, places, tmp_path):
    params, cfg, tokenizer = model
    more = tokenizers.extend(tokenizer, ["<|more|>"])
    words = f"the tokenizer has {cfg.vocab_size + 1} ids, the model {cfg.vocab_size} rows"
    for write in (gptjax.save, weights.export_hf, weights.export_gguf, weights.export_stablehlo):
        with pytest.raises(UserError, match=words):
            write(tmp_path / "m.gguf", params, cfg, more)
        assert not (tmp_path / "m.gguf").exists()
    shutil.copytree(places / "hf", tmp_path / "hf")
    for name, text in hf.to_hf(more).items():
        (tmp_path / "hf" / name).write_text(text)
    with pytest.raises(UserError, match=words):
        weights.load_tokenizer(tmp_path / "hf")
    # still loadable by itself, as input to `grow_vocabulary`
    assert tokenizers.load(tmp_path / "hf").vocab_size == cfg.vocab_size + 1
