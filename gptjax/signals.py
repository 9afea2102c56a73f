"""Handles the signals SIGINT (Ctrl-C) and SIGTERM.

During the training loop, which polls `Signals.code` after every call of the training step, a signal only sets
`Signals.code`. Outside the training loop, a signal raises KeyboardInterrupt or Terminated. Raising an exception can
fail in two ways: Python ignores exceptions that are raised in a destructor or in a callback of the garbage collector
(JAX has such a callback), and Python calls no signal handler while C code is running. Because a signal handler's
exception can be lost, `raise_if_any` is called between the stages of a run. `catch_signals(program=True)` starts a
thread that ends the process if a signal has no effect within `GRACE_S` seconds.
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
    """The exception that is raised if training ends before its last step; `code` is the exit code, and `str()` returns
    the reason.

    The exit code is 130 after Ctrl-C and 143 after SIGTERM; in both cases all finished steps are saved first. The exit
    code is 3 after train.max_nonfinite consecutive steps with a loss or gradient that is not finite. `Stopped` is a
    subclass of SystemExit, so that a program that calls `train` ends with the exit code of the `Stopped` that `train`
    raises.
    """

    def __init__(self, code: int, why: str):
        super().__init__(code)
        self.why = why

    def __str__(self) -> str:
        return self.why


class Terminated(Stopped):
    """The exception that is raised if the process receives a SIGTERM outside the training loop."""


class Signals:
    """Records the last signal that the process has received.

    `code` is the exit code for the received signal, which is 128 + the number of the signal, or 0 if no signal was
    received.
    """

    code: int = 0
    polled: bool = False  # True while a loop polls `code`, so that the signal handler need not raise an exception
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
                # The signal handler raises no exception here, because Python ignores exceptions in destructors and in
                # callbacks of the garbage collector.
                return
            frame = frame.f_back
        self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise KeyboardInterrupt or Terminated if a signal was received. Call this method only at points where the
        program can safely stop."""
        if self.code == INTERRUPTED:
            raise KeyboardInterrupt
        if self.code:
            raise Terminated(self.code, f"ended by {signal_name(self.code)}")

    def forget(self) -> None:
        """Reset `code` to 0 after the signal has been handled, for example by ending the current answer of a chat."""
        self.code, self.forgotten = 0, True

    def watch(self, wake: int) -> None:
        """Run in a thread, and end the process if a received signal has no effect within `GRACE_S` seconds.

        `wake` is a file descriptor. Python writes the number of each received signal to the file descriptor `wake` as
        one byte, and the thread that runs `watch` reads these bytes.
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
    """Returns the name of the signal for an exit code: Ctrl-C for 130 and SIGTERM for 143."""
    return {130: "Ctrl-C", 143: "SIGTERM"}.get(code, f"signal {code - 128}")


def _end(number: int) -> None:
    os.write(2, f"ended by {signal_name(128 + number)}\n".encode())
    os._exit(128 + number)


# the `Signals` that the active `catch_signals` yielded, or None if no `catch_signals` is active
current: Signals | None = None


@contextmanager
def catch_signals(program: bool = False) -> Iterator[Signals]:
    """Context manager that handles SIGTERM and Ctrl-C. Nested calls of `catch_signals` share one `Signals` object.

    In other threads than the main thread, no signal handlers are installed, because Python allows signal handlers only
    in the main thread.

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
