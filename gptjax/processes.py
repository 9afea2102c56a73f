"""Runs child processes that answer requests over pipes, with a time limit per request.

Child processes run code that must not run in the calling process: untrusted chat templates (`tokenizers/_render.py`)
and reward functions of users (`evaluation/_scoring.py`). Each request and each reply is one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

MAX_REPLY_BYTES = 1 << 20


class Child:
    """A child process that reads requests from its stdin and writes replies to its stdout, one line of JSON each.

    The child process is not started with os.fork, so it can safely be started while JAX's threads are running, from any
    thread, on Linux and macOS. The child process inherits no file descriptors, and runs in a separate session, so that
    a Ctrl-C in the terminal interrupts only the parent process. When the parent process ends for any reason, the child
    process reaches the end of its stdin, and must then exit.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        self._killed = False

    @classmethod
    def module(cls, name: str) -> Child:
        """Start a Python process with the import path and environment of this process, which calls `main()` of the
        module `name`.

        Unlike the start method spawn of multiprocessing, `Child.module` does not import the program's main module
        again. In the child process, JAX uses only the CPU, because the child process must not allocate memory on the
        parent's accelerator.
        """
        program = f"import sys; sys.path[:] = sys.argv[1:]; import {name} as program; program.main()"
        command = [sys.executable, "-c", program, *(path or os.getcwd() for path in sys.path)]
        return cls(command, {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"})

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """True if the child process is still running."""
        return self._process.poll() is None

    def ask(self, request: Any, timeout_s: float, max_bytes: int = MAX_REPLY_BYTES) -> Any:
        """Send a request, which is a JSON value, to the child process, and return the reply. If the request is None, no
        request is sent, and the next reply is returned.

        Raises:
            TimeoutError: there was no reply within `timeout_s` seconds. The process has been killed.
            EOFError: the process ended without a reply. The message says how it ended.
            ValueError: the reply is not JSON, or longer than `max_bytes`.
        """
        assert self._process.stdin and self._process.stdout
        with self._deadline(timeout_s):
            if request is not None:
                with suppress(BrokenPipeError):
                    self._process.stdin.write(json.dumps(request, default=_plain).encode() + b"\n")
                    self._process.stdin.flush()
            reply = self._process.stdout.readline(max_bytes)
        if self._killed:
            self.close()
            raise TimeoutError(f"no reply within {timeout_s:g} s")
        if not reply.endswith(b"\n"):
            self.close()
            if len(reply) == max_bytes:
                raise ValueError(f"more than {max_bytes:,} bytes")
            raise EOFError(_ending(self._process.returncode))
        return json.loads(reply)

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        """Kill the child process if the `with` block takes longer than `seconds`. After the `with` block, `_killed`
        says whether the process was killed."""
        timer = threading.Timer(seconds, self.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def kill(self) -> None:
        """Kill the child process and all other processes in its process group."""
        self._killed = True
        # The process group must not be killed after the child process has ended, because its id may be reused.
        if self._process.returncode is None:
            with suppress(OSError, AttributeError):  # Windows has no os.killpg, which raises AttributeError.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()

    def close(self) -> None:
        """Kill the child process if it is still running, and wait until it has ended."""
        assert self._process.stdin and self._process.stdout
        self.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _plain(value: Any) -> Any:
    """Converts a value that JSON cannot represent, such as a date or an array from a Parquet file, to a JSON value."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        return f"ended its process by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended its process by signal {-code}"
