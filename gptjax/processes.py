"""A child process that answers requests over pipes, within limits on time.

It is used for what must not run in the calling process: chat templates of strangers (`tokenizers/_render.py`) and
reward functions of users (`evaluation/_scoring.py`). A request and a reply are each one line of JSON.
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
    """A child process that reads a line of JSON from its stdin and writes a line of JSON to its stdout.

    The process is started without fork in Python, so it is safe to start one beside JAX's threads, from any thread, on
    Linux and macOS. It inherits no file descriptors, and it has a session of its own: a Ctrl-C in the terminal reaches
    only the parent process. When the parent process ends for any reason, the child process reads the end of its stdin,
    and must end, too.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        self._killed = False

    @classmethod
    def module(cls, name: str) -> Child:
        """Start Python with this process's import path and environment, and call `main()` of the module `name`.

        Unlike multiprocessing's spawn, this does not import the program's main module again. JAX, if the child process
        uses it, runs on the CPU: it must not take the memory of the parent's accelerator.
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
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, request: Any, timeout_s: float, max_bytes: int = MAX_REPLY_BYTES) -> Any:
        """Send a request, a JSON value, and return the reply. Without a request (None), return the next reply.

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
        """Kill the process if the `with` block takes longer than `seconds`. Afterwards `_killed` is decided."""
        timer = threading.Timer(seconds, self.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def kill(self) -> None:
        """Kill the process, with all processes that it has started and that are in its process group."""
        self._killed = True
        if self._process.returncode is None:  # else its process group may be another's by now
            with suppress(OSError, AttributeError):  # Windows has no process groups
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()

    def close(self) -> None:
        """Kill the process, if it still runs, and wait for its end."""
        assert self._process.stdin and self._process.stdout
        self.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _plain(value: Any) -> Any:
    """Returns a JSON value in place of one that JSON does not have, such as a date or an array of a Parquet file."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        return f"ended its process by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended its process by signal {-code}"
