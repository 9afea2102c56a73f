"""Progress output of a run: a rich progress bar on a terminal, plain lines elsewhere, at least one line every 10 s."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptjax.training.chips import peak_flops as peak_flops

LINE_EVERY_S = 5.0  # minimum seconds between progress lines, which are printed if the output is not a terminal
SILENCE_S = 8.0  # seconds without output until a heartbeat line is printed, because some CI systems kill silent jobs


class Progress:
    """Prints lines and a progress bar, writes log.txt, and prints heartbeat lines during long phases.

    Args:
        write: function that is called with each line for log.txt.
        log: function that is called with each line, which is then not printed; if None, the lines are printed.
        alive: function that is called about once per second, for as long as the process is alive.
    """

    def __init__(
        self,
        write: Callable[[str], None] = lambda line: None,
        log: Callable[[str], None] | None = None,
        alive: Callable[[], None] = lambda: None,
    ):
        self._write, self._log, self._alive = write, log, alive
        self._phase: str | Callable[[], str] = ""
        self._since, self._spoke, self._told = time.monotonic(), time.monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None
        self._rich = log is None and sys.stdout.isatty()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, daemon=True, name="gptjax-heartbeat")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line and write it to log.txt."""
        self._spoke = time.monotonic()
        plain = without_colours(line)
        self._write(f"{time.strftime('%H:%M:%S')} {plain}\n")
        if self._log:
            self._log(plain)
        elif self._bar:
            from rich.text import Text

            self._bar.console.print(Text.from_ansi(line), soft_wrap=True)
        else:
            print(line if self._rich else plain, flush=True)

    def status(self, step: int, total: int, line: str) -> None:
        """Show the progress of training: update the bar on a terminal, or print a line every few seconds."""
        if self._rich:
            if not self._bar:
                from rich.progress import BarColumn, Progress, TextColumn

                columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
                self._bar = Progress(*columns, transient=True)
                self._task = self._bar.add_task("", total=total)
                self._bar.start()
            self._bar.update(self._task, completed=step, description=line)
        elif (now := time.monotonic()) - self._told >= LINE_EVERY_S:
            # The interval is measured from the last progress line, not from the last heartbeat line; otherwise,
            # frequent heartbeat lines of a slow run would suppress its progress lines.
            self._told = now
            self.say(line)

    @contextmanager
    def phase(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Set the name of the current phase, which heartbeat lines show. If `what` is a function, it is called for each
        heartbeat line and returns the name."""
        before, self._phase, self._since = self._phase, what, time.monotonic()
        try:
            yield
        finally:
            self._phase, self._since = before, time.monotonic()

    def _heartbeat(self) -> None:
        while not self._end.wait(1.0):
            self._alive()
            now = time.monotonic()
            if not self._bar and self._phase and now - self._spoke >= SILENCE_S:
                what = self._phase() if callable(self._phase) else self._phase
                self.say(f"... {what}, {now - self._since:.0f} s")


def without_colours(text: str) -> str:
    """Returns the text without colours, for a file or a pipe: green text is put between « and », other escape sequences
    are removed."""
    text = re.sub(r"\x1b\[32m(.*?)\x1b\[0m", r"«\1»", text, flags=re.DOTALL)
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def duration(seconds: float) -> str:
    """Format a duration: "1:05" (m:ss) or "2:03:04" (h:mm:ss)."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
