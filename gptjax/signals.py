"""Handling of Ctrl-C (SIGINT) and SIGTERM.

While the training loop polls `Signals.code` after every step call (`polled`), a signal only sets the code. Everywhere
else, it raises KeyboardInterrupt or Terminated. Two things can delay that: Python drops exceptions that are raised in
a callback of the garbage collector (JAX has one) or in a destructor, and calls no signal handler while C code runs.
Therefore `raise_if_any` is called between the stages of a run, and a program starts a thread that ends the process
`GRACE_S` seconds after the signal.
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

    Codes: 3: the loss is not finite. 130: Ctrl-C, checkpoint saved. 143: SIGTERM, checkpoint saved. A SystemExit, so
    that a program which calls `train` ends with this code.
    """

    def __init__(self, code: int, why: str):
        super().__init__(code)
        self.why = why

    def __str__(self) -> str:
        return self.why


class Terminated(Stopped):
    """Ended by a SIGTERM outside the training loop."""


class Signals:
    """The signal received so far. `code`: 128 + its number, which is the exit code; 0 if there was none."""

    code: int = 0
    polled: bool = False  # a loop checks `code` and acts on it
    forgotten: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code and "ipykernel" not in sys.modules:
            os._exit(128 + number)  # a second signal ends the process at once
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
        """Raise KeyboardInterrupt or Terminated if a signal was received; called where it is safe to stop."""
        if self.code == INTERRUPTED:
            raise KeyboardInterrupt
        if self.code:
            raise Terminated(self.code, f"ended by {signal_name(self.code)}")

    def forget(self) -> None:
        """Reset, after the signal has been handled: it ended only one answer of a chat, for example."""
        self.code, self.forgotten = 0, True

    def watch(self, wake: int) -> None:
        """Body of a thread that ends the process if no handler runs. Python writes a byte to `wake` per signal."""
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
    """The name of the signal behind an exit code."""
    return {130: "Ctrl-C", 143: "SIGTERM"}.get(code, f"signal {code - 128}")


def _end(number: int) -> None:
    os.write(2, f"ended by {signal_name(128 + number)}\n".encode())
    os._exit(128 + number)


current: Signals | None = None  # those of the innermost `catch_signals`


@contextmanager
def catch_signals(program: bool = False) -> Iterator[Signals]:
    """Context manager that handles SIGTERM and Ctrl-C; nested ones share the same `Signals`.

    Installs no handlers outside the main thread.

    Args:
        program: gptjax owns the process: start a thread that ends it if a signal is not acted on.
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
    """Start the watching thread. Returns the file descriptor to close at the end; None if other code has set a
    wakeup descriptor."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    if (other := signal.set_wakeup_fd(write, warn_on_full_buffer=False)) != -1:
        signal.set_wakeup_fd(other)
        os.close(read)
        os.close(write)
        return None
    threading.Thread(target=signals.watch, args=(read,), daemon=True, name="gptjax-signals").start()
    return write
