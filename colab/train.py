"""Runs `gptjax pretrain` or `gptjax finetune` on an unattended runtime.

    python colab/train.py shakespeare-char optim.lr=3e-3 train.max_steps=2000
    python colab/train.py instruct instruct.source=mine.jsonl          the preset or YAML file selects the command
    nohup python colab/train.py gpt2-124m >train.out 2>&1 &

In addition to the command itself, it:
- ignores the hang-up of its terminal and a closed output pipe;
- prints a line at least every 10 s, since some runners terminate silent programs;
- puts the run on a mounted Google Drive if no run_dir is given;
- waits until the lock of a machine that is gone has expired.

After a lost session the same command resumes from the newest checkpoint (train.checkpoint_every sets how often one is
written). The exit code is that of the command.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

DRIVE = Path("/content/drive/MyDrive")
SILENCE_S = 9.0  # gptjax prints after 8 s of silence during training; this covers the time before and after


class Steady:
    """A text stream that keeps working when its reader is gone. `last_write` is the time of the last write."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last_write = stream, time.monotonic()

    def write(self, text: str) -> int:
        self.last_write = time.monotonic()
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        return False  # log lines instead of a progress bar

    def _try(self, operation: Any) -> None:
        try:
            operation()
        except (OSError, ValueError):  # the terminal or pipe is gone or closed: discard further output
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def command(args: Sequence[str]) -> tuple[list[str], str]:
    """Returns the arguments for `gptjax` and the run directory, for a preset or YAML file and its overrides.

    Raises:
        UserError: as `gptjax` itself.
    """
    from gptjax.cli import options, pretrain
    from gptjax.config import resolve

    args = list(args[1:] if args[:1] == ["--"] else args)
    words = options.parse(args, words=1)
    source = words.words[0] if words.words else pretrain.DEFAULT
    cfg, origins = resolve(source, leaves=words.leaves)
    verb = ["pretrain"] if cfg.task == "pretrain" else ["finetune", cfg.task]
    rest = args[1:] if words.words else args
    run_dir = cfg.run_dir or "runs/default"
    if DRIVE.is_dir() and origins["run_dir"] == "name of the config":
        run_dir = str(DRIVE / "gptjax" / Path(run_dir).name)
        rest = [*rest, f"run_dir={run_dir}"]
    return [*verb, source, *rest], run_dir


def wait_for_a_lost_machine(run_dir: str) -> None:
    """Waits until the lock of another machine has expired, at most `LOCK_STALE_S` seconds."""
    from gptjax.training.run_dir import LOCK_STALE_S

    lock, end = Path(run_dir) / ".lock", time.monotonic() + LOCK_STALE_S
    while time.monotonic() < end:
        try:
            host = json.loads(lock.read_text() or "{}").get("host")
            age_s = time.time() - lock.stat().st_mtime
        except (OSError, ValueError):
            return
        if host in (None, socket.gethostname()) or age_s >= LOCK_STALE_S:
            return
        time.sleep(1.0)


def speak(out: Steady, end: threading.Event) -> None:
    """Prints a line whenever nothing was printed for `SILENCE_S` seconds, until `end` is set."""
    started = time.monotonic()
    while not end.wait(SILENCE_S / 20):
        if time.monotonic() - out.last_write >= SILENCE_S:
            out.write(f"... running, {time.monotonic() - started:.0f} s\n")
            out.flush()


def main(argv: Sequence[str]) -> int:
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, _ = Steady(sys.stdout), Steady(sys.stderr)
    end = threading.Event()
    threading.Thread(target=speak, args=(out, end), daemon=True).start()
    try:
        from gptjax.__main__ import main as gptjax
        from gptjax.errors import UserError

        try:
            arguments, run_dir = command(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"gptjax {' '.join(arguments)}", flush=True)
        wait_for_a_lost_machine(run_dir)
        return gptjax(arguments)
    finally:
        end.set()
        out.flush()
        sys.stdout, sys.stderr = before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
