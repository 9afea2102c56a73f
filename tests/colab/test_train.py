"""colab/train.py: its arguments, and that a run survives a closed terminal, a closed pipe and a lost machine."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "colab" / "train.py"
SMALL = ("data.source=my.txt", "train.eval_every=10", "train.checkpoint_every=10", "train.max_steps=80", "run_dir=run")


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("colab_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DRIVE", tmp_path / "MyDrive")
    monkeypatch.chdir(tmp_path)
    return module


def test_the_preset_says_what_kind_of_run_it_is(script):
    assert script.command(["tiny-gpt2", "seed=1"]) == (["pretrain", "tiny-gpt2", "seed=1"], "runs/tiny-gpt2")
    assert script.command(["book-dpo", "prefer.source=a.jsonl"])[0][:3] == ["finetune", "prefer", "book-dpo"]
    assert script.command(["--", "seed=1"])[0] == ["pretrain", "shakespeare-char", "seed=1"]


def test_the_run_lies_on_a_drive_that_is_mounted(script, tmp_path):
    script.DRIVE.mkdir()
    there = str(script.DRIVE / "gptjax" / "tiny-gpt2")
    assert script.command(["tiny-gpt2"]) == (["pretrain", "tiny-gpt2", f"run_dir={there}"], there)
    assert script.command(["tiny-gpt2", "run_dir=here"]) == (["pretrain", "tiny-gpt2", "run_dir=here"], "here")
    Path("mine.yaml").write_text("base: tiny-gpt2\nrun_dir: its-own\n", encoding="utf-8")
    assert script.command(["mine.yaml"])[1] == "its-own"


def test_a_mistake_is_exit_code_2_and_the_streams_are_given_back(script, capsys):
    before = sys.stdout
    hang_up = signal.getsignal(signal.SIGHUP)
    try:
        assert script.main(["tiny-gpt2", "learning_rate=1"]) == 2
        assert script.main(["tiny-gpt2", "--dry-runn"]) == 2
    finally:
        signal.signal(signal.SIGHUP, hang_up)
    assert sys.stdout is before
    assert "optim.lr" in (errors := capsys.readouterr().err) and "--dry-run" in errors


def test_a_stream_without_a_reader(script):
    read, write = os.pipe()
    out = script.Steady(os.fdopen(write, "w"))
    os.close(read)
    for _ in range(2):
        assert out.write("a line\n") == 7
        out.flush()
    out.stream.close()
    out.write("closed")
    out.flush()
    assert not out.isatty()


def test_a_message_is_printed_during_long_silences(script, monkeypatch):
    monkeypatch.setattr(script, "SILENCE_S", 0.1)
    out, end = script.Steady(io.StringIO()), threading.Event()
    speaker = threading.Thread(target=script.speak, args=(out, end))
    speaker.start()
    for _ in range(1000):
        if out.stream.getvalue().count("... running") >= 2:
            break
        time.sleep(0.01)
    end.set()
    speaker.join()
    assert out.stream.getvalue().count("... running") >= 2


@pytest.mark.parametrize(("host", "age_s", "waits"), [("gone", 0, True), ("gone", 1000, False), (None, 0, False)])
def test_the_lock_of_another_machine(script, monkeypatch, host, age_s, waits):
    Path("run").mkdir()
    lock = Path("run/.lock")
    lock.write_text(json.dumps({"host": host} if host else {}), encoding="utf-8")
    os.utime(lock, (time.time() - age_s,) * 2)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        os.utime(lock, (time.time() - 1000,) * 2)

    monkeypatch.setattr(script.time, "sleep", sleep)
    script.wait_for_a_lost_machine("run")
    script.wait_for_a_lost_machine("no-such-run")
    assert slept == [1.0] * waits


@pytest.mark.slow
def test_it_outlives_its_terminal_and_goes_on_after_its_machine(tmp_path):
    """After SIGHUP, a closed stdout and SIGKILL after a checkpoint, a second start resumes and finishes the run."""
    (tmp_path / "my.txt").write_text("The more I give to thee, the more I have, for both are infinite.\n" * 90)
    root, metrics = str(SCRIPT.parents[1]), tmp_path / "run/metrics.jsonl"
    environment = os.environ | {"PYTHONPATH": root, "GPTJAX_CACHE": str(tmp_path / "cache")}
    options = dict(cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = [sys.executable, str(SCRIPT), "tiny-gpt2", *SMALL]

    first = subprocess.Popen(run, **options)
    try:
        for line in first.stdout:
            if "compiled, first" in line:
                break
        first.send_signal(signal.SIGHUP)
        first.stdout.close()
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob("run/checkpoints/*/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        seen = len(metrics.read_text())
        while len(metrics.read_text()) == seen and time.monotonic() < deadline:
            time.sleep(0.05)  # it keeps writing metrics
        assert first.poll() is None, "the process must survive SIGHUP and a closed stdout"
    finally:
        first.kill()
        first.wait()

    more = subprocess.run(run, timeout=100, **options)
    assert more.returncode == 0, more.stdout
    assert "resuming from step" in more.stdout and "done: 80 steps" in more.stdout
    assert [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "lr" in row][-1] == 80
