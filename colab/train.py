"""`gptjax pretrain` or `gptjax finetune` on a rented runtime, which nobody may be looking at.

    python colab/train.py shakespeare-char optim.lr=3e-3 train.max_steps=2000
    python colab/train.py instruct instruct.source=mine.jsonl          a preset or YAML says what kind of run it is
    nohup python colab/train.py gpt2-124m >train.out 2>&1 &

What it does beside the command itself: it ignores the end of its terminal, and that nobody reads what it prints; it
prints a line at least every 10 s, since some runners end what is silent; where a Google Drive is mounted and no run_dir
is given, the run lies there; and it waits for the lock of a machine that is gone. After a lost session the same command
goes on from the newest checkpoint (train.checkpoint_every says how often there is one). Exit codes are the command's.
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
SILENCE_S = 9.0  # gptjax itself speaks after 8: this is for what comes before and after its training


class Steady:
    """A text stream that outlives its reader. `spoke` is when it was written to last."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.spoke = stream, time.monotonic()

    def write(self, text: str) -> int:
        self.spoke = time.monotonic()
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        return False  # lines, not a bar

    def _try(self, do: Any) -> None:
        try:
            do()
        except (OSError, ValueError):  # the terminal or the pipe is gone, or closed: let the rest go nowhere
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def command(args: Sequence[str]) -> tuple[list[str], str]:
    """(the arguments of `gptjax`, the run directory) for a preset or YAML and its settings.

    Raises:
        UserError: as `gptjax` itself.
    """
    from gptjax.cli import options, pretrain
    from gptjax.config import resolve

    args = list(args[1:] if args[:1] == ["--"] else args)
    words = options.parse(args, words=1)
    source = words.words[0] if words.words else pretrain.DEFAULT
    cfg, where = resolve(source, leaves=words.leaves)
    verb = ["pretrain"] if cfg.task == "pretrain" else ["finetune", cfg.task]
    rest = args[1:] if words.words else args
    run_dir = cfg.run_dir or "runs/default"
    if DRIVE.is_dir() and where["run_dir"] == "name of the config":
        run_dir = str(DRIVE / "gptjax" / Path(run_dir).name)
        rest = [*rest, f"run_dir={run_dir}"]
    return [*verb, source, *rest], run_dir


def wait_for_a_lost_machine(run_dir: str) -> None:
    """Until the lock that another machine has left is old enough; for one that is alive, no longer than that."""
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
    """A line whenever nothing was printed for `SILENCE_S`."""
    started = time.monotonic()
    while not end.wait(SILENCE_S / 20):
        if time.monotonic() - out.spoke >= SILENCE_S:
            out.write(f"... at work, {time.monotonic() - started:.0f} s\n")
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
