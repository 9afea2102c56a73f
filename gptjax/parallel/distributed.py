"""Several processes that are one program: how they meet, what each reads, which one writes, and when one is gone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import config
from gptjax.config import Config, DistributedConfig
from gptjax.errors import UserError
from gptjax.ops.device import ROWS
from gptjax.parallel.meeting import meet

RESTART = 75  # exit code, EX_TEMPFAIL: a peer is gone; all processes started again go on from the last checkpoint
BAD_INPUT, BUG = 2, 1  # exit codes, as `gptjax.__main__` has them
OWN = ("distributed.", "data.cache_dir")  # settings that may differ between the processes of a run
MEET = (
    "  start the same command on every host, with distributed.coordinator=HOST:PORT of the first, "
    "distributed.num_processes=N and distributed.process_id=0 to N-1; on a TPU pod or under Slurm "
    "distributed.coordinator=auto finds all three"
)


class Agreed(UserError):
    """Raised in all processes: they leave together."""


def start(cfg: DistributedConfig) -> None:
    """Meet the other processes; does nothing without `distributed.coordinator`, or when it was done already.

    Raises:
        UserError: they cannot be found, or do not come in `timeout_s`.
    """
    if cfg.coordinator is None or jax.distributed.is_initialized():
        return
    told: dict[str, Any] = dict(
        coordinator_address=cfg.coordinator, num_processes=cfg.num_processes, process_id=cfg.process_id
    )  # fmt: skip
    failed = f"distributed.coordinator={cfg.coordinator}: the processes do not meet"
    try:
        if cfg.coordinator != "auto" and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            meet(cfg.coordinator, told["num_processes"], told["process_id"], cfg.timeout_s)
        _end_when_jax_aborts(f"error: {failed}\n{MEET}")
        jax.distributed.initialize(
            **(told if cfg.coordinator != "auto" else {}),
            initialization_timeout=cfg.timeout_s,
            heartbeat_timeout_seconds=cfg.heartbeat_s,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{failed}: {str(error).splitlines()[0]}\n{MEET}") from error


def _end_when_jax_aborts(failed: str) -> None:
    """JAX ends a process with SIGABRT when it cannot reach the others, and when one is silent for too long: end with
    the exit code that says so, below the stack that JAX prints.

    The handler must be one of C: Python's wait for the main thread, and abort() does not. JAX's own callback for this
    ends in std::bad_cast (jaxlib 0.10.2). A SIGABRT of a thread of Python's is a bug, and stays one. jaxlib 0.7
    leaves by _exit(1) instead: there the exit code of a process whose peer was silent is 1, below JAX's own words.
    """
    global _handler
    if os.name == "nt":
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    main = threading.get_ident()

    def on_abort(number: int) -> None:
        if not jax.distributed.is_initialized() and threading.get_ident() == main:
            os.write(2, f"{failed}\n".encode())
            os._exit(BAD_INPUT)
        if isinstance(threading.current_thread(), threading._DummyThread):  # not one that Python started
            os.write(2, f"another process is gone, or was silent for distributed.heartbeat_s\n{AGAIN}\n".encode())
            os._exit(RESTART)
        libc.signal(number, None)  # SIG_DFL: abort() goes on

    _handler = kind(on_abort)
    libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


_handler: Any = None  # kept, since C has its address only
AGAIN = f"  exit code {RESTART}: start all processes again; they go on from the last checkpoint"


def gather_text(text: str) -> list[str]:
    """Of every process, in their order."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    own = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [np.asarray(row)[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def agree_on(values: Mapping[str, Any], what: str) -> None:
    """Compare values that must be the same in all processes; `what` they are begins the message.

    Raises:
        UserError: in all of them, with the names and values that differ.
    """
    if jax.process_count() == 1:
        return
    every = [json.loads(text) for text in gather_text(json.dumps({name: repr(v) for name, v in values.items()}))]
    lines = []
    for name in dict.fromkeys(name for own in every for name in own):
        said: dict[str, list[str]] = {}
        for i, own in enumerate(every):
            said.setdefault(own.get(name, "not there"), []).append(str(i))
        if len(said) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{v:.200} in process {', '.join(ids)}" for v, ids in said.items()))
    if lines:
        raise Agreed.all([f"{what} of the {len(every)} processes of this run differ:", *lines])


def agree_on_settings(cfg: Config) -> None:
    """Raises UserError, in all processes, with the settings that differ between them."""
    values = {key: value for key, value in config.flat(cfg).items() if not key.startswith(OWN)}
    agree_on(values, "the settings")


@contextmanager
def together() -> Iterator[None]:
    """What one process cannot do none does: a UserError in one of them is raised in all, at the end of the block."""
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1 or isinstance(error, Agreed):
            raise
        own = error
    texts = gather_text(str(own) if own else "")
    if own:
        raise Agreed(str(own)) from own
    for i, text in enumerate(texts):
        if text:
            raise Agreed(f"process {i}: {text}")


def is_writer() -> bool:
    """Whether this is the process that writes logs, metrics and models."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Go on when all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(number: int) -> int:
    """The largest that any process gives, in all of them."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def on_host(tree: Any) -> Any:
    """Every leaf whole in this process, as numpy where it was spread over several; all of them must call it."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def rows_here(mesh: Mesh | None, rows: int) -> slice:
    """Which of a batch's rows this process feeds: those that its own devices hold."""
    if mesh is None or jax.process_count() == 1:
        return slice(0, rows)
    by_rows = tuple(mesh.axis_names.index(axis) for axis in ROWS)
    counts = [mesh.devices.shape[i] for i in by_rows]
    own = [
        int(np.ravel_multi_index([place[i] for i in by_rows], counts))
        for place, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    ]
    size = rows // int(np.prod(counts))
    return slice(min(own) * size, (max(own) + 1) * size)


@contextmanager
def peers(say: Callable[[str], None]) -> Iterator[None]:
    """Ends this process with RESTART when a collective fails, as it does when another process is gone; and with its
    own code where it alone fails, since a clean exit would wait for the others."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, Agreed):
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            _leave(BAD_INPUT)
        words = ("gloo", "peer", "distributed", "coordination", "heartbeat", "connection")
        of_a_peer = any(word in str(error).lower() for word in words)
        if not isinstance(error, jax.errors.JaxRuntimeError | ValueError) or not of_a_peer:
            traceback.print_exc()
            _leave(BUG)
        say(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone: "
            f"{str(error).splitlines()[0]:.200}\n{AGAIN}"
        )
        _leave(RESTART)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
