"""`gptjax sweep`: the default axes, the files it writes, and its error messages."""

import json

import pytest

from gptjax.__main__ import main

SMALL = ("model.n_layer=1", "model.d_model=16", "train.max_steps=4", "train.batch_size=2", "data.max_documents=2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    return tmp_path


def test_it_trains_prints_and_writes(folder, capsys):
    args = [
        "sweep",
        "tiny-gpt2",
        *SMALL[:-1],
        "data.source=a.txt",
        "optim.lr=[1e-3,1e-2]",
        "seed=range(2)",
        "at_once=3",
    ]
    assert main(args) == 0
    out = capsys.readouterr().out
    for words in (
        "4 runs (2 x 2) in 1 program",
        "2 at a time",
        "optim.lr",
        " +- ",
        "lowest validation loss: gptjax pre",
    ):
        assert words in out, out
    run = folder / "runs" / "tiny-gpt2-sweep"
    assert {path.name for path in run.iterdir()} == {"sweep.csv", "sweep.json", "sweep.png"}
    assert len(json.loads((run / "sweep.json").read_text())["rows"]) == 4
    assert main(args) == 2
    assert "holds a sweep already" in capsys.readouterr().err


def test_dry_run_counts_programs_and_does_nothing(folder, capsys):
    args = ["sweep", "tiny-gpt2", "model.n_layer=[1,2,3]", "optim.lr=[1e-3,1e-2]", "seed=range(4)", "--dry-run"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "24 runs (3 x 2 x 4) in 3 programs" in out and "one program per value of model.n_layer" in out
    assert "1,200 steps" in out and "no step was taken" in out
    assert not (folder / "runs").exists()


def test_without_an_axis_it_has_some(capsys):
    assert main(["sweep", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "12 runs (3 x 4) in 1 program" in captured.out and "no axis was given" in captured.err
    assert main(["sweep", "seed=5", "--dry-run"]) == 0
    assert "3 runs (3) in 1 program" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["at_once=none"], "at_once=none: expected a whole number"),
        (["seed=range(2)", "sample.n=[1,2]"], "sample.n cannot be swept"),
        (["seed=range(2)", "model.d_modle=3"], "model.d_model"),
        (["model.n_head=[2,3]"], "must be divisible"),
        (["seed=range(2)", "mesh.fsdp=2"], "leave out"),
        (["seed=range(2)", "train.patience=1", "train.eval_every=1"], "train.patience: leave out"),
    ],
)
def test_what_it_refuses(args, says, capsys):
    assert main(["sweep", "tiny-gpt2", *args]) == 2
    assert says in capsys.readouterr().err


def test_it_refuses_a_task_without_fixed_data(capsys):
    assert main(["sweep", "reward", "seed=range(2)"]) == 2
    assert "a sweep trains on fixed data" in capsys.readouterr().err
