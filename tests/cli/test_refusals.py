"""Settings that a command would not use are errors, whichever layer set them; a dry run reports the same errors."""

import dataclasses
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax import config
from gptjax.__main__ import main
from gptjax.config import Computation

BASE = gptjax.ModelConfig(arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=16, context_length=256, vocab_size=257)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals") / "base"
    gptjax.save(folder, gptjax.init_params(jax.random.key(0), BASE), BASE, gptjax.tokenizers.load("bytes"))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, base):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    rows = [{"text": f"{text} {i}", "label": label} for i in range(9) for text, label in (("NA", "a"), ("null", "b"))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def says(capsys, *args):
    assert main(list(args)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# ---------------------------------------------------------------- presets of another task


PRESET = {
    "pretrain": "tiny-gpt2", "classify": "book-spam-lora", "instruct": "instruct", "prefer": "book-dpo",
    "reward_model": "reward_model", "distill": "distill",
}  # fmt: skip
TASKS = tuple(PRESET)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("other", TASKS)
def test_a_preset_of_another_task(task, other, here, capsys):
    verb = ["pretrain"] if task == "pretrain" else ["finetune", task]
    preset = PRESET[other]
    if task == other:
        assert main([*verb, preset, "--print-config"]) == 0
        return
    way_out = f"gptjax {'pretrain' if other == 'pretrain' else f'finetune {other}'}"
    for name in (preset, "mine.yaml"):
        Path("mine.yaml").write_text(f"base: {preset}\n")
        error = says(capsys, *verb, name)
        assert f"{name} is for task={other}: {way_out} {name}" in error
    for anything in (["sweep"], ["plan"]):
        assert f"{preset} is for task={other}, not for task={task}" in says(capsys, *anything, preset, f"task={task}")
    if task == "pretrain":
        assert f"{preset} is for task={other}" in says(capsys, "data", "prepare", preset)


def test_the_task_of_a_file_is_as_good(here, capsys):
    Path("mine.yaml").write_text("task: classify\n")
    assert "mine.yaml is for task=classify: gptjax finetune classify" in says(capsys, "pretrain", "mine.yaml")
    assert "use gptjax finetune classify" in says(capsys, "pretrain", "task=classify")
    Path("mine.yaml").write_text("train:\n  max_steps: 3\n")  # sets no task, so every command accepts it
    assert main(["finetune", "classify", "mine.yaml", "--print-config"]) == 0
    assert main(["pretrain", "mine.yaml", "--print-config"]) == 0


# ---------------------------------------------------------------- settings that nothing reads


@pytest.mark.parametrize(
    ("verb", "settings", "words"),
    [
        ("pretrain tiny-gpt2", "finetune.base=smollm2-135m-instruct", "only of gptjax finetune"),  # equals the default
        ("pretrain tiny-gpt2", "lora.rank=16", "only of gptjax finetune"),
        ("pretrain tiny-gpt2", "classify.bias=true", "only of gptjax finetune classify"),
        ("finetune classify", "model.n_layer=12", "whose model is finetune.base"),
        ("finetune instruct", "model.arch=gpt2", "whose model is finetune.base"),
        ("finetune classify", "data.source=shakespeare", "whose data is classify.source"),
        ("finetune prefer", "tokenizer.name=chars", "whose tokenizer is that of finetune.base"),
        ("finetune classify", "sample.temperature=0.8", "which writes no text"),
        ("finetune reward_model", "sample.pick=reward", "which writes no text"),
        ("finetune prefer", "reward_model.center=0.1", "only of gptjax finetune reward_model"),
        ("finetune classify", "instruct.examples=3", "only of gptjax finetune instruct"),
        ("sweep instruct", "prefer.loss=ipo", "only of gptjax finetune prefer"),
        ("sweep tiny-gpt2", "lora.rank=[4,8]", "only of gptjax finetune"),
        ("plan instruct", "data.source=x", "whose data is instruct.source"),
        ("data inspect", "lora.rank=4", "only of gptjax finetune"),
        ("tokenizer train bpe", "optim.lr=1", "which reads tokenizer.name"),
        ("sample MODEL", "train.max_steps=1", "which reads prompt, prompts"),
        ("chat MODEL", "prompt=x", "unknown setting prompt; gptjax chat reads"),
        ("chat MODEL", "foo=1", "gptjax chat reads system, max_new_tokens"),
        ("chat MODEL", "sample.out=x", "not a setting of gptjax chat, which reads system"),
    ],
)
def test_a_setting_that_nothing_reads(verb, settings, words, here, base, capsys):
    key = settings.partition("=")[0]
    error = says(capsys, *verb.replace("MODEL", str(base)).split(), settings)
    assert key in error and words in error and ("sweep: " if "[" in settings else "command line: ") in error
    if verb.split()[0] in ("pretrain", "finetune"):
        group, _, name = key.partition(".")
        Path("mine.yaml").write_text(f"{group}:\n  {name}: {settings.partition('=')[2]}\n")
        error = says(capsys, *verb.split()[: -1 if "tiny-gpt2" in verb else None], "mine.yaml", "--print-config")
        assert f"mine.yaml:2: {key}: not a setting of" in error and words in error


def test_all_of_them_at_once_with_other_mistakes(here, capsys):
    error = says(capsys, "finetune", "classify", "model.n_layer=3", "data.source=x", "optim.lrr=1", "seed=-1")
    for words in ("errors:", "model.n_layer", "data.source", "optim.lrr", "seed (-1)"):
        assert words in error


@pytest.mark.parametrize("name", sorted(config.presets()))
def test_a_copy_of_a_preset_is_read_whole(name, here):
    task = config.load_config(name).task
    verb = ["pretrain"] if task == "pretrain" else ["finetune", task]
    shutil.copy(config.presets()[name], "mine.yaml")
    assert main([*verb, "mine.yaml", "--print-config"]) == 0


def test_print_config_is_of_what_the_task_reads_and_comes_back(here, base, capsys):
    args = ["finetune", "classify", "classify.source=rows.jsonl", f"finetune.base={base}", "--print-config"]
    assert main(args) == 0
    out = capsys.readouterr().out
    groups = set(re.findall(r"^(\w+):$", out, re.MULTILINE))
    assert groups == {"model", "optim", "train", "mesh", "distributed", "finetune", "lora", "classify"}
    model = out[out.index("model:") : out.index("optim:")]
    assert set(re.findall(r"^  (\w+):", model, re.MULTILINE)) == {item.name for item in fields(Computation)}
    Path("mine.yaml").write_text(out)
    assert main(["finetune", "classify", "mine.yaml", "--print-config"]) == 0


def test_settings_of_an_adapter_that_is_none(here, capsys):
    words = "finetune.trainable=all has no adapter"
    Path("rank.yaml").write_text("lora:\n  rank: 4\n")
    Path("all.yaml").write_text("finetune:\n  trainable: all\n")
    verb = ["finetune", "classify"]
    assert "lora.rank: " + words in says(capsys, *verb, "finetune.trainable=all", "lora.rank=4")
    assert words in says(capsys, *verb, "all.yaml", "lora.rank=4")
    assert "ln_f/* has no adapter" in says(capsys, *verb, "book-spam", "lora.rank=4")
    assert main([*verb, "rank.yaml", "finetune.trainable=all", "--print-config"]) == 0  # the later layer wins
    out = capsys.readouterr().out
    assert "lora:" not in out
    Path("mine.yaml").write_text(out)
    assert main([*verb, "mine.yaml", "--print-config"]) == 0
    assert main([*verb, "all.yaml", "finetune.trainable=lora", "lora.rank=4", "--print-config"]) == 0


def test_the_config_of_a_run_holds_everything_and_is_read(here):
    cfg = config.load_config("tiny-gpt2", "data.source=a.txt")
    Path("run").mkdir()
    Path("run/config.yaml").write_text(config.to_yaml(cfg))
    shutil.copy("run/config.yaml", "mine.yaml")
    written = Path("mine.yaml").read_text()
    assert written.count("\nreward_model:") == 1  # the last section, which releases without this task did not write
    Path("older.yaml").write_text(written.partition("\nreward_model:")[0] + "\n")
    for source in ("run", "run/config.yaml", "mine.yaml", "older.yaml"):
        assert main(["pretrain", source, "--print-config"]) == 0


# ---------------------------------------------------------------- dry run


def test_a_dry_run_shows_what_differs_and_the_summary(here, base, capsys):
    args = ["finetune", "classify", "classify.source=rows.jsonl", f"finetune.base={base}", "seed=0", "--dry-run"]
    assert main(args) == 0
    out = capsys.readouterr().out
    # seed was given, so it is printed even at its default
    assert len(out.splitlines()) < 30 and "seed: 0 " in out and "no step was taken" in out
    assert not re.search(r"^  (n_layer|eps|source: .shak)", out, re.MULTILINE) and "lr: 0.0005" in out
    assert not Path("runs").exists()


TINY = ("tiny-gpt2", "tokenizer.name=bytes", "data.source=a.txt", "model.n_layer=1", "train.max_steps=2")
WAYS = {
    "another config": (["run_dir=run"], "was made with another config"),
    "a foreign folder": (["run_dir=foreign"], "holds no run of gptjax"),
    "a file": (["run_dir=a.txt"], "is a file"),
    "below a file": (["run_dir=a.txt/run"], "a.txt is a file"),
    "in use": (["run_dir=busy"], "is in use: process"),
    "never": (["run_dir=run", "train.resume=never", "train.max_steps=100"], "already holds a run"),
    "no data": (["data.source=absent.txt"], "data.source=absent.txt: no such file"),
    "no tokenizer": (["tokenizer.name=absent.json"], "tokenizer.name=absent.json"),
    "no devices": (["mesh.data=64"], "64 devices, and there"),
    "no logger": (["train.loggers=[wandb]"], "needs wandb"),
    "steps": (["train.steps_per_call=3"], "must divide"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_refuses_what_the_run_would_before_it_reads_data(way, here, capsys, monkeypatch):
    import fcntl

    from gptjax import data

    settings, words = WAYS[way]
    if way == "no logger":
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    Path("run").mkdir()
    Path("run/config.yaml").write_text(config.to_yaml(config.load_config("tiny-gpt2", "run_dir=run")))
    Path("foreign").mkdir()
    Path("foreign/train.py").write_text("mine")
    Path("busy").mkdir()
    lock = open("busy/.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(data, "prepare", lambda *args, **kwargs: pytest.fail("the data is read first"))
    before = sorted(here.rglob("*"))
    for dry in (["--dry-run"], []):
        assert words in says(capsys, "pretrain", *TINY, *settings, *dry)
    lock.close()
    assert sorted(here.rglob("*")) == before


def test_several_at_once(here, capsys):
    error = says(capsys, "pretrain", *TINY, "data.source=absent.txt", "tokenizer.name=absent.json", "run_dir=a.txt")
    assert error.startswith("errors:\n") and error.index("absent.txt") < error.index("absent.json") < error.index(
        "is a"
    )


def test_a_finetuning_alike(here, base, capsys):
    Path("foreign").mkdir()
    Path("foreign/train.py").write_text("mine")
    verb = ["finetune", "classify", "run_dir=foreign", "classify.source=absent.csv", "finetune.base=absent"]
    for more in ([], ["--dry-run"], ["finetune.seeds=2"], ["finetune.seeds=2", "--dry-run"]):
        error = says(capsys, *verb, *more)
        assert "holds no run of gptjax" in error
        if len(more) != 2 and "finetune.seeds=2" not in more:
            assert "classify.source=absent.csv: no such file" in error and "finetune.base: absent: no" in error
    assert "classify.source is missing" in says(capsys, "finetune", "classify", "--dry-run", f"finetune.base={base}")


def test_a_finished_run_is_said_to_be_finished(here, capsys):
    Path("run/final").mkdir(parents=True)
    Path("run/config.yaml").write_text(config.to_yaml(config.load_config(*TINY, "run_dir=run")))
    Path("run/final/result.json").write_text('{"step": 2, "val/loss": 1.0}')
    Path("a.txt").unlink()  # not needed: the run is finished
    assert main(["pretrain", *TINY, "run_dir=run", "--dry-run"]) == 0
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------- one or several


@pytest.mark.parametrize(
    "args", [["pretrian"], ["pretrain", "tiny-gpt2", "run_dir=run"], ["pretrain", "tiny-gpt2", "run_dir=mine"]]
)
def test_one_error_with_its_way_out_is_one(args, here, capsys):
    for name, text in (("run", config.to_yaml(config.load_config("tiny-gpt2", "seed=3"))), ("mine", "my: own\n")):
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(text)
    assert says(capsys, *args).startswith("error: ")


def test_a_base_that_is_not_there_names_the_file(here, capsys):
    Path("mine.yaml").write_text("seed: 1\nbase: nothing\n")
    assert "mine.yaml:2: base: no preset or file 'nothing'" in says(capsys, "pretrain", "mine.yaml")


# ---------------------------------------------------------------- a tokenizer of another model


FEW = "the tokenizer has 257 ids, the model 256 rows"
VERBS = (
    "sample MODEL", "sample MODEL --dry-run", "chat MODEL", "classify MODEL text", "audit MODEL",
    "data check a.txt model=MODEL", "import MODEL out", "export hf MODEL out", "export gguf MODEL out.gguf",
    "export stablehlo MODEL out", "pretrain pretrain.base=MODEL data.source=a.txt",
    "pretrain pretrain.base=MODEL data.source=a.txt --dry-run", "finetune classify finetune.base=MODEL",
    "finetune classify finetune.base=MODEL --dry-run", "finetune instruct finetune.base=MODEL --dry-run",
    "finetune prefer finetune.base=MODEL", "finetune distill distill.teacher=MODEL finetune.base=MODEL",
    "finetune reward_model finetune.base=MODEL",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_tokenizer_with_more_ids_than_the_model_has_rows(verb, here, capsys):
    """The error is raised before any tensor is read: the model folder has none."""
    cfg = dataclasses.replace(BASE, vocab_size=256, n_classes=2 * verb.startswith("classify"))
    labels = {"labels": ["a", "b"], "pooling": "last", "max_length": 9, "prompt": "{text}"}
    gptjax.save("m", {"ln_f": {"scale": np.ones(1)}}, cfg, files={"labels.json": json.dumps(labels)})
    Path("m/model.safetensors").unlink()
    gptjax.tokenizers.load("bytes").replace(chat_template="{{ messages }}").save("m")
    before = sorted(here.rglob("*"))
    words = verb.replace("MODEL", "m").split()
    error = says(capsys, *words, *["classify.source=rows.jsonl"] * ("classify" in words[1:2]))
    assert FEW in error and "m: " in error and "grow_vocabulary" in error
    assert [path for path in sorted(here.rglob("*")) if "xla" not in path.parts and path.name != "cache"] == before


# ---------------------------------------------------------------- a classifier where a model that writes is needed


# parts of the two messages; the second asks for the model that the classifier was fine-tuned from
CLASSIFY, NAME = 'gptjax classify MODEL "TEXT"', "name the model"
WRITING = {
    "sample MODEL": CLASSIFY, "sample MODEL --dry-run": CLASSIFY, "chat MODEL": CLASSIFY, "audit MODEL": CLASSIFY,
    "audit base train=a.txt held_out=a.txt prompts=a.txt base=MODEL": NAME, "data check a.txt model=MODEL": NAME,
    "export gguf MODEL out.gguf": "gptjax export hf MODEL DIR", "export stablehlo MODEL out": "gptjax classify MODEL",
    "pretrain pretrain.base=MODEL data.source=a.txt": NAME, "finetune instruct finetune.base=MODEL": NAME,
    "finetune prefer finetune.base=MODEL --dry-run": NAME, "finetune reward_model finetune.base=MODEL": NAME,
    "sweep instruct finetune.base=MODEL --dry-run": NAME,
}  # fmt: skip


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A classifier run, which also has an LM head, and its Hugging Face export, which has none."""
    folder = tmp_path_factory.mktemp("classifiers")
    cfg = dataclasses.replace(BASE, n_classes=2, cls_bias=False)
    params = gptjax.init_params(jax.random.key(0), cfg)
    tokenizer = gptjax.tokenizers.load("bytes").replace(chat_template="{{ messages }}")
    about = {"labels": ["a", "b"], "pooling": "last", "max_length": 9, "prompt": "{text}"}
    gptjax.save(folder / "run", params, cfg, tokenizer, {"labels.json": json.dumps(about)})
    gptjax.weights.export_hf(folder / "hf", params, cfg, tokenizer, about)
    return folder


@pytest.mark.parametrize("form", ["run", "hf"])
@pytest.mark.parametrize("verb", WRITING)
def test_a_classifier_does_not_write(verb, form, here, base, classifiers, capsys):
    model = str(classifiers / form)
    error = says(capsys, *(word.replace("MODEL", model) if word != "base" else str(base) for word in verb.split()))
    assert f"{model} is a classifier of 2 classes, which does not write: " in error
    assert WRITING[verb].replace("MODEL", model) in error
    assert not [path for path in here.iterdir() if path.name.startswith(("runs", "out"))]


@pytest.mark.parametrize("form", ["run", "hf"])
def test_a_classifier_is_imported_and_is_a_base_of_another(form, here, classifiers, capsys):
    assert main(["import", str(classifiers / form), "own"]) == 0
    assert 'gptjax classify own "TEXT"' in capsys.readouterr().out
    assert main(["finetune", "classify", "finetune.base=own", "classify.source=rows.jsonl", "--dry-run"]) == 0


def test_pretraining_has_no_classes(here, capsys):
    error = says(capsys, "pretrain", *TINY, "model.n_classes=2", "run_dir=run")
    assert "model.n_classes=2: expected 0" in error and "gptjax finetune classify" in error


def test_a_notebook_is_no_command_line():
    with pytest.raises(gptjax.types.UserError, match="^load_config: unknown key optim.lrr"):
        gptjax.load_config("tiny-gpt2", "optim.lrr=3")
