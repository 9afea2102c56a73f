"""Multi-process training: the losses of one process, every window read once, and no waiting for dead processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gptjax.parallel.distributed import RESTART
from gptjax.training.run_dir import read_metrics

HOST = Path(__file__).with_name("host.py")
HEARTBEAT_S = 10


def processes(folder, n, *more, own_settings=None, command=None, only=None, cwd=None):
    """Start n processes with one CPU device each; n=1 starts a single process without `distributed` settings.

    Args:
        own_settings: additional settings, {process index: settings}.
        command: command line to run instead of `host.py`.
        only: indices of the processes to start; the default is all.
        cwd: working directory below `folder`; {} is replaced by the process index.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [
        f"run_dir={folder / 'run'}", "data.source=python-docs", "train.max_steps=12", "train.eval_every=4",
        "train.checkpoint_every=4", "train.steps_per_call=2", "train.log_every=2", "data.mask_tokens=1",
        "sample.max_new_tokens=8", *more,
    ]  # fmt: skip
    started = []
    for i in only or range(n):
        process_settings = [
            f"distributed.coordinator=127.0.0.1:{port}", f"distributed.num_processes={n}",
            f"distributed.process_id={i}", f"distributed.heartbeat_s={HEARTBEAT_S}", "distributed.timeout_s=60",
        ]  # fmt: skip
        process_settings += [*more, *(own_settings or {}).get(i, [])]
        words = command or [str(HOST), str(folder / f"{i}.json")]
        command_line = [sys.executable, *words, *settings, *(process_settings if n > 1 else [])]
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with open(folder / f"{i}.log", "w") as log:
            here = folder / cwd.format(i) if cwd else None
            started.append(subprocess.Popen(command_line, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=here))
    return started


def ended(folder, running, timeout_s=200):
    codes = [process.wait(timeout_s) for process in running]
    return codes, [(folder / f"{i}.log").read_text(errors="replace") for i in range(len(running))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    codes, logs = ended(folder, processes(folder, 1))
    assert codes == [0], logs[0][-2000:]
    return folder


def losses(folder):
    return [row["train/loss"] for row in read_metrics(folder / "run") if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.further_case)])
def test_several_processes_are_one(alone, tmp_path, n):
    """FSDP over two processes, so that no process holds all weights."""
    codes, logs = ended(tmp_path, processes(tmp_path, n, "mesh.fsdp=2"))
    assert codes == [0] * n, "\n".join(log[-1500:] for log in logs)
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)
    whole = json.loads((alone / "0.json").read_text())
    results = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(n)]
    assert [result["val_loss"] for result in results] == pytest.approx([whole["val_loss"]] * n, abs=1e-5)
    # each process counts the tokens of the first batch; then training rows are read in calls of 2 steps x 8 rows, split
    # over the processes, and validation rows by each process
    calls = [starts for starts in whole["read"][1:] if len(starts) == 16]
    calls_of = [[starts for starts in result["read"][1:] if len(starts) == 16 // n] for result in results]
    assert len(calls) == 6
    for k, starts in enumerate(calls):
        merged = [start for step in (0, 1) for result in calls_of for start in _half(result[k], step)]
        assert merged == starts  # no window is repeated or skipped
    assert all("step " not in log for log in logs[1:])  # only process 0 logs the steps
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def _half(starts, step):
    n = len(starts) // 2
    return starts[step * n : (step + 1) * n]


LONGER = ("train.max_steps=100", "train.eval_every=100", "train.checkpoint_every=20", "optim.schedule=constant")


@pytest.mark.slow
def test_when_one_is_killed_the_others_end_and_all_go_on(tmp_path):
    """After a restart they resume from the last checkpoint and reach the losses of an uninterrupted run."""
    (tmp_path / "whole").mkdir()
    assert ended(tmp_path / "whole", processes(tmp_path / "whole", 2, "mesh.fsdp=2", *LONGER))[0] == [0, 0]
    running = processes(tmp_path, 2, "mesh.fsdp=2", *LONGER)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGKILL)
    codes, (log, _) = ended(tmp_path, running, HEARTBEAT_S + 5)
    assert codes == [RESTART, -signal.SIGKILL] and "another process is gone" in log, (codes, log[-2000:])
    assert losses(tmp_path)[-1] != losses(tmp_path / "whole")[-1]
    codes, logs = ended(tmp_path, processes(tmp_path, 2, "mesh.fsdp=2", *LONGER))
    assert codes == [0, 0] and "resuming from step" in logs[0], logs[0][-2000:]
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


CLI = ("-m", "gptjax", "pretrain", "tiny-gpt2")


@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    ("differ", "lines"),
    [
        (["optim.lr=1e-4", "run_dir=OTHER"], ["optim.lr: ", "run_dir: "]),
        (["train.max_steps=10", "model.d_model=16"], ["train.max_steps: 12 in process 0; 10 in process 1", "model.d_"]),
        (["data.text_field=x", "distributed.heartbeat_s=11"], ["data.text_field: 'text' in process 0; 'x' in process"]),
    ],
)
def test_processes_with_other_settings_all_end_with_the_difference(tmp_path, differ, lines):
    differ = [setting.replace("OTHER", str(tmp_path / "other")) for setting in differ]
    codes, logs = ended(tmp_path, processes(tmp_path, 2, command=CLI, own_settings={1: differ}), 40)
    assert codes == [2, 2], logs
    for log in logs:
        assert "the settings of the 2 processes of this run differ:" in log and "Traceback" not in log
        assert all(text in log for text in lines) and "heartbeat_s:" not in log
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_data_all_end_with_the_difference(tmp_path):
    """Equal settings, but the file of that name has other text on the second host."""
    for i in range(2):
        (tmp_path / f"host-{i}").mkdir()
        (tmp_path / f"host-{i}" / "my.txt").write_text(f"To be, or not to be, {i}.\n" * 200)
    more = ("data.source=my.txt", "data.cache_dir=cache", f"run_dir={tmp_path / 'run'}")
    running = processes(tmp_path, 2, *more, command=CLI, cwd="host-{}")
    codes, logs = ended(tmp_path, running, 60)
    assert codes == [2, 2], logs
    for log in logs:
        assert "the data of the 2 processes of this run differ:" in log and "Traceback" not in log
        assert re.search("  training data: '[0-9a-f]{64}' in process 0; '[0-9a-f]{64}' in process 1", log), log
        assert "  validation data: " in log and "tokenizer: " not in log and "compiling" not in log
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_process_cannot_do_none_does(tmp_path):
    """The second host cannot write to its token cache."""
    (tmp_path / "file").write_text("")
    second = {1: [f"data.cache_dir={tmp_path / 'file' / 'cache'}"]}
    codes, logs = ended(tmp_path, processes(tmp_path, 2, command=CLI, own_settings=second), 40)
    assert codes == [2, 2], logs
    assert "process 1: " in logs[0] and all("Traceback" not in log for log in logs)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_does_not_come(tmp_path):
    (running,) = processes(tmp_path, 2, "distributed.timeout_s=2", command=CLI, only=[1])
    assert running.wait(40) == 2
    log = (tmp_path / "1.log").read_text()
    assert "the processes do not meet: process 1 did not reach process 0" in log and "Traceback" not in log
    assert "SIGABRT" not in log


@pytest.mark.slow
def test_a_process_that_stands_still(tmp_path):
    more = (*LONGER, "train.max_steps=100000", "distributed.heartbeat_s=5")
    running = processes(tmp_path, 2, *more, command=CLI)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        running[1].send_signal(signal.SIGSTOP)
        old = jax.__version_info__ < (0, 8)  # jaxlib 0.7 ends with _exit(1), which cannot be intercepted
        assert running[0].wait(HEARTBEAT_S + 10) == (1 if old else RESTART)
    finally:
        running[1].kill()
        running[1].wait()
    log = (tmp_path / "0.log").read_text(errors="replace")
    assert ("tasks are unhealthy" if old else "was silent for distributed.heartbeat_s") in log
