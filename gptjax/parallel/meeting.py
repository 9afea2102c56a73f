"""This module checks that all processes of a run have started before the processes call `jax.distributed.initialize`.

Each process first waits for the other processes, because `jax.distributed.initialize` aborts a process if another
process is missing.

Process 0 listens at the address of the coordinator, and the other processes connect to this address. When all processes
are connected to process 0, process 0 frees the address of the coordinator for JAX. Each process sends one line of JSON
(left), and process 0 answers with one line of JSON (right):

    {"process_id": 1, "num_processes": 2}      {"problem": ""}
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from gptjax.errors import UserError

# POLL_S is the time in seconds between two polls of a socket. Signals such as Ctrl+C are handled between polls.
POLL_S = 0.2
LINE_BYTES = 4096


def meet(address: str, num_processes: int, process_id: int, timeout_s: float) -> None:
    """Waits until all processes of the run are connected to process 0.

    Raises:
        UserError: a process does not connect in time, two processes have the same id, or two processes expect
            different numbers of processes. All processes that are connected raise the error.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"expected HOST:PORT with a port from 1 to 65535, got {address!r}")
    if process_id == 0:
        _receive(int(port), num_processes, time.monotonic() + timeout_s)
    else:
        _join(host.strip("[]"), int(port), num_processes, process_id, time.monotonic() + timeout_s + 5 * POLL_S)


def _receive(port: int, num_processes: int, deadline: float) -> None:
    connected: dict[int, socket.socket] = {}
    with _listen(port) as server:
        problem = ""
        while len(connected) < num_processes - 1 and not problem:
            connected = {peer: line for peer, line in connected.items() if not _is_closed(line)}
            if time.monotonic() > deadline:
                missing = ", ".join(str(i) for i in range(1, num_processes) if i not in connected)
                problem = f"process {missing} of {num_processes} did not come in time"
                break
            with suppress(TimeoutError):
                line, _ = server.accept()
                line.settimeout(1.0)
                problem = _admit(line, num_processes, connected)
        _answer(connected.values(), problem)
    if problem:
        raise UserError(problem)


def _admit(line: socket.socket, num_processes: int, connected: dict[int, socket.socket]) -> str:
    """Reads the message of a connecting process, adds the process's socket to `connected`, and returns an error message
    or ""."""
    message = _read(line)
    peer = message.get("process_id")
    if type(peer) is not int:  # A message without a process_id is not from a process of this run.
        line.close()
        return ""
    problem = ""
    if message.get("num_processes") != num_processes:
        problem = f"process 0 expects {num_processes} processes, process {peer} {message.get('num_processes')}"
    elif peer == 0 or (peer in connected and not _is_closed(connected[peer])):
        problem = f"two processes have distributed.process_id={peer}"
    if problem:
        _answer([line], problem)
    else:
        connected[peer] = line
    return problem


def _join(host: str, port: int, num_processes: int, process_id: int, deadline: float) -> None:
    why = "nobody answered"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=POLL_S * 10) as line:
                line.sendall(_line({"process_id": process_id, "num_processes": num_processes}))
                line.settimeout(POLL_S)
                reply = _read(line, deadline)
        except OSError as error:
            why = error.strerror or str(error)
        else:
            if reply.get("problem"):
                raise UserError(str(reply["problem"]))
            if "problem" in reply:
                return
            why = "the server there is not process 0 of gptjax, or it has exited"
        time.sleep(POLL_S)
    raise UserError(f"process {process_id} did not reach process 0 at {host}:{port} in time: {why}")


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port}: {error.strerror or error}") from error
    server.settimeout(POLL_S)
    return server


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read(line: socket.socket, deadline: float = 0.0) -> dict[str, Any]:
    """Receives one line of JSON, and returns the JSON object, or {} if no valid JSON object arrives."""
    text = b""
    while not text.endswith(b"\n") and len(text) < LINE_BYTES:
        try:
            chunk = line.recv(LINE_BYTES)
        except TimeoutError:
            if time.monotonic() < deadline:
                continue
            break
        except OSError:
            break
        if not chunk:
            break
        text += chunk
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def _answer(lines: Iterable[socket.socket], problem: str) -> None:
    """Sends `problem` to all connected processes, and waits until these processes close the connections, so that the
    port becomes free."""
    lines = list(lines)
    for line in lines:
        with suppress(OSError):
            line.sendall(_line({"problem": problem}))
    for line in lines:
        with suppress(OSError):
            line.settimeout(1.0)
            line.recv(1)
        line.close()


def _is_closed(line: socket.socket) -> bool:
    try:
        line.setblocking(False)
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
