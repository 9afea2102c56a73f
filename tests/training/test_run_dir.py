"""The run directory: lock, metrics, plots and loggers."""

import json
import os
import socket
import time

import pytest

from gptjax.errors import UserError
from gptjax.training import loggers, plot, progress
from gptjax.training.process import keep_buffers
from gptjax.training.run_dir import LOCK_STALE_S, RunDir, read_metrics


def test_only_one_process_holds_the_lock(tmp_path):
    with RunDir(tmp_path / "run").locked():
        refused = pytest.raises(UserError, match=f"is in use: process {os.getpid()} on {socket.gethostname()}")
        with refused, RunDir(tmp_path / "run").locked():
            pass
    with RunDir(tmp_path / "run").locked():
        pass


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "since": "then"}))
    with RunDir(tmp_path).locked():
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_another_machine_expires(tmp_path):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "then"}))
    with pytest.raises(UserError, match="process 7 on elsewhere"), RunDir(tmp_path).locked():
        pass
    old = time.time() - LOCK_STALE_S - 1
    os.utime(lock, (old, old))
    with RunDir(tmp_path).locked():
        RunDir(tmp_path).touch()
        assert lock.stat().st_mtime > old + 10


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to run_dir"), RunDir(tmp_path / "file" / "run").locked():
        pass


def test_metrics_after_the_step_and_an_incomplete_line_are_removed(tmp_path):
    run = RunDir(tmp_path)
    whole = "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in (5, 10, 15))
    run.metrics.write_text(whole + '{"step": 10, "val/lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10, 15]
    run.cut_metrics(10, pytest.fail)
    assert run.metrics.read_text() == whole[: whole.index('{"step": 15')]


@pytest.mark.parametrize(
    "damage", [b"\x00" * 20, b'{"step": 10, "tr\xff": 1}', b'{"step": true}', b"[" * 5000, b'{"st', b"", b"[10]"]
)
def test_damaged_lines_of_the_metrics_are_skipped_with_a_warning(damage, tmp_path):
    run = RunDir(tmp_path)
    good = [json.dumps({"step": step}).encode() for step in (5, 10, 15)]
    run.metrics.write_bytes(b"\n".join([good[0], damage, good[1], damage, good[2], b'{"step": 20']))
    with pytest.warns(UserWarning, match=r"metrics.jsonl: 2 damaged lines were left out"):
        assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10, 15]
    lines: list[str] = []
    run.cut_metrics(10, lines.append)
    assert lines == [f"WARNING: {run.metrics}: 2 damaged lines were left out"]
    assert [row["step"] for row in run.rows()] == [5, 10]


@pytest.mark.parametrize("rows", [[], [{"step": 0, "val/loss": 4.0}], [{"step": 1, "train/loss": None}]])
def test_a_plot_with_few_or_no_points(tmp_path, rows):
    plot.draw(rows, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_smoothed_curve_does_not_lag():
    losses = [100.0 - step for step in range(100)]
    assert [loss for _, loss in plot._smooth(list(enumerate(losses)))] == pytest.approx(losses)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="an optional logger")
    logger = loggers.LOGGERS["tensorboard"](tmp_path, None)
    logger.log({"step": 3, "train/loss": 1.5, "mfu": None})
    logger.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_peak_flops_and_durations():
    assert progress.peak_flops("tpu", "TPU v5 lite") == 197e12
    assert progress.peak_flops("tpu", "TPU v6 lite") == 918e12
    assert progress.peak_flops("gpu", "NVIDIA A100-SXM4-80GB") == 312e12
    assert progress.peak_flops("cpu", "cpu") is None
    assert progress.duration(65.4) == "1:05" and progress.duration(7384) == "2:03:04"


def test_a_heartbeat_line_is_printed_after_silence(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE_S", 0.5)
    lines, alive = [], []
    shown = progress.Progress(lambda line: None, lines.append, lambda: alive.append(1))
    with shown, shown.phase("compiling"):
        deadline = time.monotonic() + 20
        while not lines and time.monotonic() < deadline:
            time.sleep(0.05)
    assert lines[0].startswith("... compiling, ") and alive


def test_keep_buffers():
    assert keep_buffers() in (True, False)
