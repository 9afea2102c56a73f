"""Ctrl-C and SIGTERM, heard from the first line of a program to its last.

Where the training loop looks at `Signals.code` after every call (`polled`), a signal only sets it. Everywhere else it
raises KeyboardInterrupt or Stopped. Two things can hold that up: Python drops an exception that is raised inside a
callback of the garbage collector (JAX has one) or in a destructor, and calls no handler while C code runs. Therefore
`raise_if_any` is called between the stages of a run, and a program has a thread that ends it `GRACE_S` after the
signal.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HEARD = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT
GRACE_S = 5.0


class Stopped(SystemExit):
    """Training ended before its last step; `code` is the exit code and `str()` says why.

    3: the loss is not finite. 130: Ctrl-C, saved. 143: SIGTERM, saved. A SystemExit, so that any program which
    calls `train` ends with this code.
    """

    def __init__(self, code: int, why: str):
        super().__init__(code)
        self.why = why

    def __str__(self) -> str:
        return self.why


class Terminated(Stopped):
    """By a SIGTERM that nobody had acted on."""


class Signals:
    """Which signal has come; `code` is then 128 + its number, the exit code of what it ended."""

    code: int = 0
    polled: bool = False  # somebody looks at `code` and acts on it
    forgotten: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code and "ipykernel" not in sys.modules:
            os._exit(128 + number)  # the second one: now
        self.code = 128 + number
        if self.polled:
            return
        callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        while frame is not None:
            if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
                return  # Python would drop an exception that is raised here
            frame = frame.f_back
        self.raise_if_any()

    def raise_if_any(self) -> None:
        """What the signal that has come raises; for places where nothing is half done."""
        if self.code == INTERRUPTED:
            raise KeyboardInterrupt
        if self.code:
            raise Terminated(self.code, f"ended by {signal_name(self.code)}")

    def forget(self) -> None:
        """The signal was for something that is over now, such as one answer of a chat."""
        self.code, self.forgotten = 0, True

    def watch(self, wake: int) -> None:
        """A thread that ends the program where no handler can. Python writes a byte to `wake` for every signal."""
        came: float | None = None
        number = 0
        while True:
            rest = None if came is None or self.polled else max(0.0, came + GRACE_S - time.monotonic())
            ready = select.select([wake], [], [], rest)[0]
            if self.forgotten:
                came, self.forgotten = None, False
            if not ready and came is not None and not self.polled:
                _end(number)
            byte = os.read(wake, 1) if ready else b"\0"
            if not byte:
                break
            if byte[0] in HEARD and came is not None:
                _end(byte[0])  # the second one
            if byte[0] in HEARD:
                came, number = time.monotonic(), byte[0]
        os.close(wake)


def signal_name(code: int) -> str:
    """Of an exit code."""
    return {130: "Ctrl-C", 143: "SIGTERM"}.get(code, f"signal {code - 128}")


def _end(number: int) -> None:
    os.write(2, f"ended by {signal_name(128 + number)}\n".encode())
    os._exit(128 + number)


current: Signals | None = None  # of the block that is open


@contextmanager
def catch_signals(program: bool = False) -> Iterator[Signals]:
    """Hears SIGTERM and Ctrl-C inside the block; a block inside another one is the same.

    Outside the main thread nothing is installed.

    Args:
        program: the process is ours: a signal that nothing acts on ends it.
    """
    global current
    if threading.current_thread() is not threading.main_thread():
        yield Signals()
        return
    if current is not None:
        yield current
        return
    current = signals = Signals()
    before = {number: signal.signal(number, signals.on_signal) for number in HEARD}
    wake = _start_watching(signals) if program and os.name != "nt" else None
    try:
        yield signals
    finally:
        if wake is not None:
            signal.set_wakeup_fd(-1)
            os.close(wake)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        current = None


def _start_watching(signals: Signals) -> int | None:
    """The descriptor to close when it is over; None where somebody else has asked for the signals' bytes."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    if (other := signal.set_wakeup_fd(write, warn_on_full_buffer=False)) != -1:
        signal.set_wakeup_fd(other)
        os.close(read)
        os.close(write)
        return None
    threading.Thread(target=signals.watch, args=(read,), daemon=True, name="gptjax-signals").start()
    return write
