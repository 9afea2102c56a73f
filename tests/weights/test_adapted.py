"""A fine-tuned model that is stored as an adapter loads, with its base, as the merged model."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import gptjax
from gptjax import tree, weights
from gptjax.__main__ import main
from gptjax.tasks.tuning import _base_reference
from gptjax.weights import native

BASE = gptjax.ModelConfig(
    arch="llama", n_layer=2, n_head=2, d_model=64, d_ff=64, context_length=32, vocab_size=257, tie_embeddings=False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    params = gptjax.init_params(jax.random.key(0), BASE)
    gptjax.save(folder / "base", params, BASE, gptjax.tokenizers.load("bytes"))
    rows = [f"up\t{'ABCD'[i % 4] * 5}{i}\n" for i in range(30)] + [f"down\t{'efgh'[i % 4] * 5}{i}\n" for i in range(30)]
    (folder / "data.tsv").write_text("".join(rows))
    return folder


def tune(folder, name, *more):
    code = main(
        [
            "finetune", "classify", f"classify.source={folder / 'data.tsv'}", f"finetune.base={folder / 'base'}",
            f"run_dir={folder / name}", "train.epochs=null", "train.max_steps=4", "train.eval_every=2",
            "train.checkpoint_every=4", "optim.lr=1e-2", "optim.warmup_steps=0", "lora.rank=4", *more,
        ]
    )  # fmt: skip
    assert code == 0
    return folder / name


@pytest.fixture(scope="module")
def run(folder):
    return tune(folder, "alone", "finetune.save_merged=false")


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["lora.dora=true", "classify.bias=true"],
        ["finetune.quantize=int8"],
        ["lora.targets=blocks/1/attn/*/kernel"],
        ["lora.miss=true", "lora.targets=blocks/[1-1]/attn/*/kernel"],
    ],
    ids=["plain", "dora", "int8", "a layer", "miss"],
)
def test_it_is_what_the_merged_copy_is(folder, more):
    name = "-".join(["both", *(setting.split("=")[0] for setting in more)])
    alone = tune(folder, f"{name}-alone", "finetune.save_merged=false", *more)
    whole = tune(folder, f"{name}-whole", *more)
    assert (alone / "final" / native.ADAPTER).exists() and not (alone / "final" / native.WEIGHTS).exists()
    assert (whole / "final" / native.WEIGHTS).exists() and not (whole / "final" / native.ADAPTER).exists()
    for subfolder in ("final", "best"):
        (params, cfg), (expected, expected_cfg) = weights.load(alone / subfolder), weights.load(whole / subfolder)
        assert cfg == expected_cfg
        leaves = tree.flatten(params)
        assert leaves.keys() == tree.flatten(expected).keys()
        for path, leaf in tree.flatten(expected).items():
            assert leaves[path].dtype == np.float32
            np.testing.assert_allclose(leaves[path], leaf, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_dtype_and_place_are_the_callers(run):
    device = jax.devices()[-1]
    whole, cfg = weights.load(run)
    low, _ = weights.load(run, dtype="bfloat16", shardings=SingleDeviceSharding(device))
    places = jax.tree.map(lambda leaf: SingleDeviceSharding(device), gptjax.model.gpt.abstract_params(cfg))
    by_tree, _ = weights.load(run, dtype="bfloat16", shardings=places)
    for path, leaf in tree.flatten(low).items():
        assert leaf.dtype == "bfloat16" and leaf.devices() == {device}
        np.testing.assert_array_equal(leaf, np.asarray(tree.flatten(whole)[path]).astype("bfloat16"))
        np.testing.assert_array_equal(leaf, tree.flatten(by_tree)[path])


@pytest.mark.slow
def test_every_verb_reads_it(folder, run):
    assert main(["classify", str(run), "AAAAA1"]) == 0
    assert main(["export", "hf", str(run), str(folder / "hf")]) == 0
    assert main(["export", "peft", str(run), str(folder / "peft")]) == 0
    params, _ = weights.load(run)
    exported, _ = weights.load(folder / "hf")
    np.testing.assert_array_equal(
        exported["blocks"]["attn"]["q"]["kernel"], np.asarray(params["blocks"]["attn"]["q"]["kernel"])
    )


@pytest.fixture
def copy(folder, run, tmp_path):
    """A copy of the run and of its base, in which the run refers to the copied base."""
    shutil.copytree(run / "final", tmp_path / "final")
    shutil.copytree(folder / "base", tmp_path / "base")
    change(tmp_path, lambda base: base | {"source": str(tmp_path / "base")})
    return tmp_path


def change(folder, make):
    file = folder / "final" / native.MODEL
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"base": make(body["base"])}))


@pytest.mark.slow
def test_a_base_that_was_moved_is_named_and_found_at_its_new_place(copy):
    weights.load(copy / "final")
    shutil.move(copy / "base", copy / "elsewhere")
    with pytest.raises(gptjax.UserError, match=r"(?s)adapter for .*base, which cannot be read.*set base/source"):
        weights.load(copy / "final")
    change(copy, lambda base: base | {"source": str(copy / "elsewhere")})
    weights.load(copy / "final")


def test_a_base_with_other_weights_is_refused(copy):
    shutil.rmtree(copy / "base")
    gptjax.save(copy / "base", gptjax.init_params(jax.random.key(1), BASE), BASE, gptjax.tokenizers.load("bytes"))
    with pytest.raises(gptjax.UserError, match="has other weights than those it was trained on"):
        weights.load(copy / "final")


def test_damage_is_named(copy):
    file = copy / "final" / native.ADAPTER
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(gptjax.UserError, match=r"adapter\.safetensors: not as gptjax\.save wrote it"):
        weights.load(copy / "final")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora", {"rank": 4, "alpha": 99.0}, "the settings of the adapter"),
        ("lora", {"rank": "four"}, "lora.rank"),
        ("quantize", "int7", "finetune.quantize"),
        ("source", None, "expected strings"),
        ("fingerprint", 3, "expected strings"),
    ],
)
def test_a_changed_description_is_refused(copy, key, value, message):
    change(copy, lambda base: base | {key: value})
    with pytest.raises(gptjax.UserError, match=message):
        weights.load(copy / "final")


@pytest.mark.parametrize("value", [None, 3, [], {}, {"source": "x"}])
def test_no_description_is_refused(copy, value):
    change(copy, lambda base: value)
    with pytest.raises(gptjax.UserError, match=r"model\.json"):
        weights.load(copy / "final")


def kept(*settings):
    cfg = gptjax.load_config("classify", "classify.source=x.csv", *settings)
    return _base_reference(cfg, "f")


def test_which_bases_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kept()["source"] == "smollm2-135m-instruct"
    assert kept("finetune.base=hf:org/name")["source"] == "hf:org/name"
    assert kept("finetune.save_merged=true") is None
    assert kept("finetune.base=some/run") is None, "what a user may change or delete is not relied on unasked"
    assert kept("finetune.base=some/run", "finetune.save_merged=false")["source"] == str(tmp_path / "some/run")
    assert kept("lora.init=pissa") is None and kept("finetune.trainable=all") is None
    (tmp_path / "smollm2-135m-instruct").mkdir()
    assert kept() is None, "a folder of that name comes before the asset"


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["finetune.trainable=all", "lora.init=pissa"])
def test_what_changes_the_base_cannot_be_kept_alone(setting):
    with pytest.raises(gptjax.UserError, match="save_merged=false needs"):
        kept("finetune.save_merged=false", setting)
