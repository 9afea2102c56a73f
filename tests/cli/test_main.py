"""The command line in general: help, versions, typos, exit codes, pipes."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from gptjax.__main__ import main
from gptjax.config import Computation
from gptjax.config.uses import TUNINGS

TUNED = ("finetune.", "lora.", *(f"{task}." for task in TUNINGS))


def test_pretrain_help_lists_every_setting_with_default_and_comment(capsys):
    from gptjax.config import schema

    main(["pretrain", "--help"])
    out = capsys.readouterr().out
    tuned = [key for key in schema() if key.startswith(TUNED)]
    assert all((f"  {key}=" in out) != (key in tuned) for key in schema())
    # the preset's values, not the defaults
    assert "model.arch=modern" in out and "optim.name=muon" in out and "train.max_steps=1200" in out
    assert "Gradient accumulation: number of micro-batches per optimizer step" in out
    main(["pretrain", "tiny-gpt2", "optim.lr=0.5", "--help"])
    out = capsys.readouterr().out
    assert "model.arch=gpt2" in out and "optim.lr=0.5" in out
    assert main(["pretrain", "absent", "--help"]) == 0
    assert "the values of shakespeare-char" in capsys.readouterr().out


@pytest.mark.parametrize("task", TUNINGS)
def test_finetune_help_is_of_its_task(task, capsys):
    main(["finetune", task, "--help"])
    out = capsys.readouterr().out
    keys = re.findall(r"^  (\S+?)=", out, re.MULTILINE)
    assert keys[0].startswith(f"{task}.") and f"  task={task}" in out
    others = {*TUNINGS, "data", "tokenizer"} - {task}
    assert not [key for key in keys if key.partition(".")[0] in others]
    assert [key for key in keys if key.startswith("model.")] == [f"model.{item.name}" for item in fields(Computation)]
    assert "  train.epochs=" in out and ("train.epochs=null" in out) == (task == "reward")  # the value of the preset
    needed = {"instruct"} if task == "reward" else set()  # a command that the examples need
    assert set(re.findall(r"^  gptjax finetune (\w+)", out, re.MULTILINE)) == {task} | needed


def test_classify_help_lists_what_it_needs(capsys):
    main(["classify", "--help"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 40 and "text_field=COLUMN" in out and "optim" not in out


@pytest.mark.parametrize(("typed", "meant"), [("pretrian", "pretrain"), ("train", "pretrain"), ("generate", "sample")])
def test_a_wrong_verb(typed, meant, capsys):
    assert main([typed]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gptjax ")


def test_interrupted(monkeypatch, capsys):
    from gptjax.cli import presets

    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(presets, "run", stop)
    assert main(["presets"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_who_leaves_is_no_error():
    code = "from gptjax.__main__ import main; import sys; sys.exit(main(['pretrain', '--help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_a_full_disk_is_no_bug(monkeypatch, capsys):
    import errno

    from gptjax.cli import presets

    def full(args):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(presets, "run", full)
    assert main(["presets"]) == 2
    assert "runs/x/metrics.jsonl: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "tunables", "verb", "starts"),
    [
        ("always [madvise] never", "", "pretrain", "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            "glibc.malloc.check=1",
            "finetune classify",
            "glibc.malloc.check=1:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "pretrain", None),  # set by the user: left alone
        ("[always] madvise never", "", "pretrain", None),
        ("always [madvise] never", "", "presets ls", None),
        ("always [madvise] never", "", "pretrain --help", None),
        (None, "", "pretrain", None),
    ],
)
def test_training_starts_again_with_huge_pages_where_linux_gives_them_on_request(
    setting, tunables, verb, starts, monkeypatch, tmp_path
):
    from gptjax.training import process

    if setting:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(process, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    words = verb.split() if verb.startswith("presets") else [*verb.split(), "--print-config"]
    monkeypatch.setattr(sys, "argv", ["gptjax", *words])
    started = []
    monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
    assert main() == 0
    assert os.environ["GLIBC_TUNABLES"] == (starts or tunables)
    assert [args[1] for args in started] == ([[sys.executable, *sys.orig_argv[1:]]] if starts else [])
