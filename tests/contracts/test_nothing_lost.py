"""No user file is overwritten or deleted: a foreign file or folder at the target is byte-identical afterwards."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax import weights
from gptjax.__main__ import main
from gptjax.data import sources
from gptjax.errors import UserError
from gptjax.files import new_file, write_text
from gptjax.formats import tables
from gptjax.tokenizers import load as load_tokenizer
from gptjax.training.run_dir import RunDir


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = gptjax.ModelConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, d_model=8)
    params = gptjax.init_params(__import__("jax").random.key(0), cfg)
    files = {"labels.json": json.dumps({"labels": ["a", "b"], "pooling": "last", "max_length": 8, "prompt": "{text}"})}
    folder = weights.save(tmp_path_factory.mktemp("model") / "m", params, cfg, load_tokenizer("bytes"), files)
    return folder, params, cfg


@pytest.fixture()
def foreign(tmp_path):
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "train.py").write_text("print('mine')\n")
    (folder / "data" / "labels.csv").write_text("a,b\n")
    (folder / "log.txt").write_text("mine\n")
    return folder


TEXT = ["data.source=TEXT", "tokenizer.name=bytes"]
VERBS = {
    "pretrain": ["pretrain", "tiny-gpt2", *TEXT, "run_dir=OUT"],
    "classify": ["finetune", "classify", "classify.source=TEXT", "finetune.base=MODEL", "run_dir=OUT"],
    "instruct": ["finetune", "instruct", "finetune.base=MODEL", "run_dir=OUT"],
    "prefer": ["finetune", "prefer", "finetune.base=MODEL", "run_dir=OUT"],
    "distill": ["finetune", "distill", "distill.teacher=MODEL", "finetune.base=MODEL", "run_dir=OUT"],
    "reward_model": ["finetune", "reward_model", "finetune.base=MODEL", "run_dir=OUT"],
    "export hf": ["export", "hf", "MODEL", "OUT"],
    "export stablehlo": ["export", "stablehlo", "MODEL", "OUT"],
    "import": ["import", "MODEL", "OUT"],
    "export gguf": ["export", "gguf", "MODEL", "OUT"],
    "tokenizer": ["tokenizer", "train", "bpe", "data.source=TEXT", "tokenizer.vocab_size=300", "out=OUT/train.json"],
    "sample": ["sample", "MODEL", "--prompt", "a", "max_new_tokens=2", "out=OUT"],
    "data check": ["data", "check", "TEXT", "out=OUT"],
    "seeds": ["finetune", "instruct", "finetune.base=MODEL", "finetune.seeds=2", "run_dir=OUT"],
    "sweep": ["sweep", "tiny-gpt2", *TEXT, "seed=range(2)", "train.max_steps=2", "run_dir=OUT"],
    "audit": ["audit", "MODEL", "train=TEXT", "held_out=TEXT", "out=OUT"],
    "plan": ["plan", "tiny-gpt2", "model.vocab_size=257", "out=OUT"],
    "plan png": ["plan", "tiny-gpt2", "model.vocab_size=257", "png=OUT"],
    "presets cp": ["presets", "cp", "tiny-gpt2", "OUT"],
    "classify file": ["classify", "MODEL", "a text", "out=OUT.csv"],
    "compare": ["compare", "TEXT", "out=OUT"],
}
# the existing target of a command that adds a suffix to its output, or a file name to an output folder
IN_THE_WAY = {
    "audit": "OUT.json",
    "presets cp": "OUT/tiny-gpt2.yaml",
    "classify file": "OUT.csv",
    "tokenizer": "OUT/train.json",
}
REFUSAL = r"exists already|is there already|is a file|is not empty|not empty|new folder|cannot make|Is a directory"


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_what_is_in_its_way(verb, kind, foreign, model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 40)
    out = foreign if kind == "folder" or "OUT/" in IN_THE_WAY.get(verb, "") else foreign / "log.txt"
    if verb in IN_THE_WAY:
        there = Path(IN_THE_WAY[verb].replace("OUT", str(out)))
        there.mkdir() if kind == "folder" else there.write_text("mine")
    before, folders = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    words = {"TEXT": str(text), "MODEL": str(model[0]), "OUT": str(out)}
    args = []
    for arg in VERBS[verb]:
        for word, value in words.items():
            arg = arg.replace(word, value)
        args.append(arg)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and re.search(REFUSAL, error), error
    assert snapshot(tmp_path) == before and sorted(tmp_path.rglob("*")) == folders


@pytest.mark.parametrize("form", ["hf", "gguf", "stablehlo"])
def test_an_export_is_refused_before_the_model_is_read(form, foreign, model, monkeypatch, capsys):
    monkeypatch.setattr(weights, "open_model", lambda source: pytest.fail("the model is read first"))
    for target in (foreign, foreign / "log.txt"):
        assert main(["export", form, str(model[0]), str(target)]) == 2
        assert re.search(REFUSAL, capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_cache_beside_foreign_files_leaves_them(kind, foreign, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 40)
    before = snapshot(foreign)
    place = foreign if kind == "folder" else foreign / "log.txt"
    args = [f"data.source={tmp_path / 'text.txt'}", "tokenizer.name=bytes", f"data.cache_dir={place}"]
    assert main(["data", "prepare", "tiny-gpt2", *args]) == (0 if kind == "folder" else 2)
    assert before.items() <= snapshot(foreign).items()


def test_save_refuses_what_it_did_not_write(foreign, model, tmp_path, monkeypatch):
    _, params, cfg = model
    before = snapshot(foreign)
    for target in (foreign, foreign / "log.txt"):
        with pytest.raises(UserError, match=r"did not write|is a file"):
            weights.save(target, params, cfg)
    assert snapshot(foreign) == before
    folder = weights.save(tmp_path / "own", params, cfg)
    weights.save(folder, params, cfg)  # a folder written by save is replaced
    (folder / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.md"):
        weights.save(folder, params, cfg)
    monkeypatch.chdir(foreign)
    with pytest.raises(UserError, match="name a new folder"):
        weights.save(".", params, cfg)


def test_a_model_of_before_is_replaced(model, tmp_path):
    _, params, cfg = model
    folder = weights.save(tmp_path / "own", params, cfg, load_tokenizer("bytes"))
    body = json.loads((folder / "model.json").read_text())
    del body["files"], body["model_sha256"]
    (folder / "model.json").write_text(json.dumps(body))
    weights.load(folder)
    weights.save(folder, params, cfg)


def test_a_foreign_config_is_said_to_be_in_the_way(foreign, tmp_path, capsys):
    (foreign / "config.yaml").write_text("my: settings\n")
    before = snapshot(foreign)
    assert main(["pretrain", "tiny-gpt2", f"run_dir={foreign}"]) == 2
    assert "is taken" in capsys.readouterr().err
    (foreign / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["pretrain", "tiny-gpt2", f"run_dir={foreign}"]) == 2
    assert "is taken" in capsys.readouterr().err
    (foreign / "config.yaml").write_text("my: settings\n")
    assert snapshot(foreign) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.json"])
def test_one_bit_is_noticed(name, model, tmp_path, monkeypatch):
    _, params, cfg = model
    folder = weights.save(tmp_path / "m", params, cfg, load_tokenizer("bytes"))
    raw = bytearray((folder / name).read_bytes())
    if name == "model.json":
        raw = bytearray(bytes(raw).replace(b'"context_length": 16', b'"context_length": 17'))
    else:
        raw[-20] ^= 1
    (folder / name).write_bytes(bytes(raw))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        weights.load(folder)
    if name == "model.safetensors":
        monkeypatch.setenv("GPTJAX_VERIFY", "0")
        weights.load(folder)


def test_out_makes_its_folder_and_keeps_what_is_done(model, tmp_path):
    out = tmp_path / "new" / "folder" / "out.jsonl"
    assert main(["sample", str(model[0]), "--prompt", "a", "max_new_tokens=2", f"out={out}"]) == 0
    assert json.loads(out.read_text())["prompt"] == "a"


def test_files_have_the_mode_that_the_umask_leaves(model, tmp_path):
    _, params, cfg = model
    mask = os.umask(0o077)
    try:
        folder = weights.save(tmp_path / "m", params, cfg, load_tokenizer("bytes"))
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}
    assert np.all([path.stat().st_mode & 0o600 == 0o600 for path in folder.iterdir()])


# ---------------------------------------------------------------- names and small files that nobody can use

LONG = "n" * 300


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gptjax.load(LONG), "File name too long"),
        (lambda: load_tokenizer(f"{LONG}/x"), "File name too long"),
        (lambda: gptjax.load_config(f"{LONG}.yaml"), "File name too long"),
        (lambda: list(sources.documents(gptjax.DataConfig(source=(f"{LONG}.txt",)))), "data.source=n"),
        (lambda: list(sources.documents(gptjax.DataConfig(source=("~no-such-user/x.txt",)))), "home directory"),
        (lambda: list(tables.read(f"{LONG}.jsonl")), "File name too long"),
        (lambda: RunDir(LONG).check(gptjax.load_config("tiny-gpt2")), "run_dir=n"),
        (lambda: weights.save(LONG, {}, gptjax.ModelConfig()), "File name too long"),
        (lambda: new_file(LONG), "out=n"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_error(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("source", ["/", "~", "."])
def test_a_folder_of_everything_is_refused_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    with pytest.raises(UserError, match="is the root or home folder"):
        list(sources.documents(gptjax.DataConfig(source=(source,))))
    assert time.process_time() - start < 1.0


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("x")
    monkeypatch.setattr(sources, "MAX_FILES", 4)
    assert len(list(sources.documents(gptjax.DataConfig(source=(str(tmp_path),))))) == 4
    monkeypatch.setattr(sources, "MAX_FILES", 3)
    with pytest.raises(UserError, match="more than 3 files"):
        sources.documents(gptjax.DataConfig(source=(str(tmp_path),)))


@pytest.mark.parametrize(
    "name", ["hf:..", "hf:/etc", "hf:../x/y", "hf:~/x", "hf:a", "hf:", "hf:a/b/c", "hf:a/..", "hf:.a/b"]
)
def test_names_on_the_hub_have_their_form(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (lambda: sources.documents(gptjax.DataConfig(source=(name,))), lambda: list(tables.read(name))):
        with pytest.raises(UserError, match="expected hf:org/name"):
            read()
    if name != "hf:a":  # a model on the Hub may lack an organisation, such as "gpt2"
        with pytest.raises(UserError, match="expected hf:org/name"):
            gptjax.load(name)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a folder or file here"):
        tables.hub_name("hf:org/name:config@train")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", ",".join(f"c{i}" for i in range(30_000)) + "\n"),
        (".csv", ",".join(["text", *(f"c{i // 2}" for i in range(60_000))]) + "\n"),
        (".jsonl", "{" + ", ".join(f'"k{i}": 1' for i in range(30_000)) + ', "k29999": 1}\n'),
    ],
)
def test_thirty_thousand_columns_are_one_error_within_a_second(suffix, text, tmp_path):
    path = tmp_path / f"wide{suffix}"
    path.write_text(text)
    for read in (
        lambda: list(sources.documents(gptjax.DataConfig(source=(str(path),)))),
        lambda: list(tables.read(str(path))),
    ):
        start = time.process_time()
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 2000
        assert time.process_time() - start < 1.0


@pytest.mark.parametrize("key", ["vocab_size", "n_kv_head", "n_head", "d_model", "n_layer", "context_length"])
def test_a_model_of_nothing_is_refused(key, model, tmp_path):
    body = json.loads((model[0] / "model.json").read_text())
    body["model"][key] = 0
    (tmp_path / "model.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=rf"model.{key} \(0\) must be at least 1"):
        weights.load(tmp_path)


def test_the_same_weights_of_best_and_final_lie_on_the_disk_once(tmp_path):
    cfg = gptjax.ModelConfig(vocab_size=17, context_length=8, n_layer=1, n_head=2, d_model=8)
    params = gptjax.init_params(jax.random.key(0), cfg)
    best, final = tmp_path / "best", tmp_path / "final"
    gptjax.save(best, params, cfg)
    weights.save(final, params, cfg, twin=best)
    file = "model.safetensors"
    assert (best / file).samefile(final / file)
    other = jax.tree.map(lambda a: a + 1, params)
    weights.save(final, other, cfg, twin=best)  # must replace the hard-linked file instead of writing into it
    assert not (best / file).samefile(final / file)
    for folder, tree in ((best, params), (final, other)):
        jax.tree.map(np.testing.assert_array_equal, gptjax.load(folder)[0], tree)
    damaged = bytearray((best / file).read_bytes())
    damaged[-1] ^= 1
    (best / file).write_bytes(damaged)
    weights.save(final, params, cfg, twin=best)
    assert not (best / file).samefile(final / file)
    gptjax.load(final)


def test_a_full_disk_leaves_the_old_file_and_no_half(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.json", "new")
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"
