"""Handling of Ctrl-C (SIGINT) and SIGTERM.

While the training loop polls `Signals.code` after every call of the training step, a signal only sets this code.
Outside the training loop, a signal raises KeyboardInterrupt or Terminated. This can fail in two ways: Python drops
exceptions that are raised in a callback of the garbage collector (JAX has one) or in a destructor, and it calls no
signal handler while C code runs. Therefore `raise_if_any` is called between the stages of a run. In addition,
`catch_signals(program=True)` starts a thread that ends the process if a signal is not acted on within `GRACE_S`
seconds.
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
    """Raised if training ends before its last step; `code` is the exit code, and `str()` gives the reason.

    The exit code is 130 after Ctrl-C and 143 after SIGTERM; in both cases all finished steps are saved first. It is 3
    after train.max_nonfinite consecutive steps with a loss or gradient that is not finite. `Stopped` is a SystemExit,
    so that a program that calls `train` ends with this exit code.
    """

    def __init__(self, code: int, why: str):
        super().__init__(code)
        self.why = why

    def __str__(self) -> str:
        return self.why


class Terminated(Stopped):
    """Raised if a SIGTERM is received outside the training loop."""


class Signals:
    """Records the last signal received.

    `code` is the exit code that stands for the signal: 128 + the signal's number, or 0 if no signal was received.
    """

    code: int = 0
    polled: bool = False  # whether a loop checks `code`, so that the handler need not raise an exception
    forgotten: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code and "ipykernel" not in sys.modules:
            os._exit(128 + number)  # a second signal ends the process at once, except in a notebook
        self.code = 128 + number
        if self.polled:
            return
        callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        while frame is not None:
            if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
                return  # do not raise: Python drops exceptions in destructors and in callbacks of the garbage collector
            frame = frame.f_back
        self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise KeyboardInterrupt or Terminated if a signal was received. Call this method only where it is safe to
        stop."""
        if self.code == INTERRUPTED:
            raise KeyboardInterrupt
        if self.code:
            raise Terminated(self.code, f"ended by {signal_name(self.code)}")

    def forget(self) -> None:
        """Reset `code` after the signal has been handled, for example by ending one answer of a chat."""
        self.code, self.forgotten = 0, True

    def watch(self, wake: int) -> None:
        """The body of a thread that ends the process if a received signal is not acted on within `GRACE_S` seconds.

        `wake` is a file descriptor from which the thread reads the number of each received signal, which Python writes
        as one byte.
        """
        received: float | None = None
        number = 0
        while True:
            timeout_s = None if received is None or self.polled else max(0.0, received + GRACE_S - time.monotonic())
            ready = select.select([wake], [], [], timeout_s)[0]
            if self.forgotten:
                received, self.forgotten = None, False
            if not ready and received is not None and not self.polled:
                _end(number)
            byte = os.read(wake, 1) if ready else b"\0"
            if not byte:
                break
            if byte[0] in HEARD and received is not None:
                _end(byte[0])  # a second signal
            if byte[0] in HEARD:
                received, number = time.monotonic(), byte[0]
        os.close(wake)


def signal_name(code: int) -> str:
    """Returns the name of the signal that an exit code stands for, such as Ctrl-C for 130."""
    return {130: "Ctrl-C", 143: "SIGTERM"}.get(code, f"signal {code - 128}")


def _end(number: int) -> None:
    os.write(2, f"ended by {signal_name(128 + number)}\n".encode())
    os._exit(128 + number)


current: Signals | None = None  # the object that the active `catch_signals` yielded; None outside of it


@contextmanager
def catch_signals(program: bool = False) -> Iterator[Signals]:
    """Context manager that handles SIGTERM and Ctrl-C. Nested calls of `catch_signals` share one `Signals`.

    Outside the main thread no signal handlers are installed, because Python allows them only in the main thread.

    Args:
        program: whether gptjax is the process's main program, as on the command line. True: except on Windows, a thread
            is started that ends the process if a signal is not acted on within `GRACE_S` seconds.
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
    """Start the thread that runs `Signals.watch`.

    Returns:
        The file descriptor to close in order to end the thread, or None if other code has already set a wakeup file
        descriptor, in which case no thread is started.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    if (other := signal.set_wakeup_fd(write, warn_on_full_buffer=False)) != -1:
        signal.set_wakeup_fd(other)
        os.close(read)
        os.close(write)
        return None
    threading.Thread(target=signals.watch, args=(read,), daemon=True, name="gptjax-signals").start()
    return write
