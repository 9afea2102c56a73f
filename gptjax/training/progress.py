"""Prints the progress of a training run.

On a terminal, the progress is shown as a progress bar of the package rich. If the output is not a terminal, the
progress is printed as plain lines, at least one line every 10 s.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptjax.training.chips import peak_flops as peak_flops

# If the output is not a terminal, progress lines are printed at intervals of at least LINE_EVERY_S seconds.
LINE_EVERY_S = 5.0
# After SILENCE_S seconds without output, a heartbeat line is printed, because some CI systems kill silent jobs.
SILENCE_S = 8.0


class Progress:
    """Prints lines of output and a progress bar, writes the lines to log.txt, and prints heartbeat lines.

    Heartbeat lines show during long phases, such as compilation, that the process is alive.

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
        """Prints a line of output, and writes the line to log.txt."""
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
        """Shows the progress of training: updates the progress bar on a terminal, or prints lines at intervals."""
        if self._rich:
            if not self._bar:
                from rich.progress import BarColumn, Progress, TextColumn

                columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
                self._bar = Progress(*columns, transient=True)
                self._task = self._bar.add_task("", total=total)
                self._bar.start()
            self._bar.update(self._task, completed=step, description=line)
        elif (now := time.monotonic()) - self._told >= LINE_EVERY_S:
            # The interval between progress lines is measured from the last progress line, not from the last heartbeat
            # line, because the frequent heartbeat lines of a slow run would otherwise suppress the run's progress
            # lines.
            self._told = now
            self.say(line)

    @contextmanager
    def phase(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Sets the name of the current phase, which heartbeat lines show.

        Args:
            what: name of the phase, or a function that is called for each heartbeat line and returns the name.
        """
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
    """Removes the terminal's escape sequences for colours from a text, so that the text can be written to a file.

    Text that is green on the terminal is put between « and » in the returned text.
    """
    text = re.sub(r"\x1b\[32m(.*?)\x1b\[0m", r"«\1»", text, flags=re.DOTALL)
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def duration(seconds: float) -> str:
    """Formats a duration in seconds as "1:05" (m:ss) or "2:03:04" (h:mm:ss)."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
