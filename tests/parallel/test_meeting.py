"""Rendezvous of a run's processes: all connect, or each reports why not within the timeout."""

import socket
import threading
import time

import pytest

from gptjax.errors import UserError
from gptjax.parallel import meeting
from gptjax.parallel.meeting import meet


@pytest.fixture(autouse=True)
def short_poll(monkeypatch):
    monkeypatch.setattr(meeting, "POLL_S", 0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet_all(port, *processes, timeout_s=0.6, host="127.0.0.1"):
    """Run `meet` in a thread per (process_id, num_processes); returns their error messages, empty on success."""
    ends = [""] * len(processes)

    def run_one(i, process_id, num_processes):
        try:
            meet(f"{host}:{port}", num_processes, process_id, timeout_s)
        except UserError as error:
            ends[i] = str(error)

    threads = [threading.Thread(target=run_one, args=(i, *process)) for i, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return ends


def test_all_meet_in_any_order_and_the_port_is_free_again():
    port = free_port()
    for _ in range(3):
        assert meet_all(port, (2, 4), (1, 4), (0, 4), (3, 4), timeout_s=10) == [""] * 4


def test_every_process_names_the_missing_ones():
    ends = meet_all(free_port(), (0, 4), (2, 4))
    assert ends == ["process 1, 3 of 4 did not come in time"] * 2


def test_without_process_0():
    (end,) = meet_all(free_port(), (1, 2))
    assert "process 1 did not reach process 0 at 127.0.0.1:" in end and "refused" in end
    (end,) = meet_all(free_port(), (1, 2), host="no-such-host.invalid")
    assert "did not reach process 0 at no-such-host.invalid:" in end


def test_the_same_id_twice():
    ends = meet_all(free_port(), (0, 4), (1, 4), (1, 4), timeout_s=5)
    assert "two processes have distributed.process_id=1" in ends


def test_different_num_processes():
    ends = meet_all(free_port(), (0, 2), (1, 3), timeout_s=5)
    assert ends == ["process 0 expects 2 processes, process 1 3"] * 2


def test_process_0_twice():
    port = free_port()
    with meeting._listen(port), pytest.raises(UserError, match=f"cannot listen at port {port}"):
        meet(f"127.0.0.1:{port}", 2, 0, 1)


@pytest.mark.parametrize(
    "message", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"[1]\n", b'{"process_id": "1"}\n', b""]
)
def test_strangers_do_no_harm(message):
    port = free_port()

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as line:
                    line.sendall(message)
                return
            except OSError:
                time.sleep(0.02)

    thread = threading.Thread(target=stranger)
    thread.start()
    thread.join(0.1)
    assert meet_all(port, (0, 2), (1, 2), timeout_s=10) == ["", ""]
    thread.join()


@pytest.mark.parametrize("address", ["host", "host:", "host:x", "host:0", "host:99999"])
def test_malformed_addresses(address):
    with pytest.raises(UserError, match="expected HOST:PORT"):
        meet(address, 2, 1, 1)
