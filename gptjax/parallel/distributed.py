"""This module contains functions for runs with several processes.

The functions of this module connect the processes, compare the settings of the processes, assign the rows of a batch to
the processes, and exit if a process is lost.
"""

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
from gptjax._moved import moved_name
from gptjax.config import Config, DistributedConfig
from gptjax.errors import UserError
from gptjax.ops.device import ROWS
from gptjax.parallel.meeting import meet

# RESTART is the exit code (EX_TEMPFAIL) of a process if another process is lost. To resume the run after the loss of a
# process, restart all processes. BAD_INPUT is the exit code for invalid input, and BUG the exit code for a bug, as in
# `gptjax.__main__`. Settings that begin with a prefix in PER_PROCESS may differ between the processes of a run.
RESTART = 75
BAD_INPUT, BUG = 2, 1
PER_PROCESS = ("distributed.", "data.cache_dir")
HOW_TO_START = (
    "  start the same command on every host, with distributed.coordinator=HOST:PORT of the first, "
    "distributed.num_processes=N and distributed.process_id=0 to N-1; on a TPU pod or under Slurm "
    "distributed.coordinator=auto finds all three"
)


class Agreed(UserError):
    """A UserError that is raised in all processes of a run, so that all processes exit together."""


def start(cfg: DistributedConfig) -> None:
    """Connects this process to the other processes of the run.

    `start` does nothing if `distributed.coordinator` is not set, or if this process is already connected.

    Raises:
        UserError: the processes cannot connect within `timeout_s`.
    """
    if cfg.coordinator is None or jax.distributed.is_initialized():
        return
    arguments: dict[str, Any] = dict(
        coordinator_address=cfg.coordinator, num_processes=cfg.num_processes, process_id=cfg.process_id
    )  # fmt: skip
    failed = f"distributed.coordinator={cfg.coordinator}: the processes do not meet"
    try:
        if cfg.coordinator != "auto" and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            meet(cfg.coordinator, arguments["num_processes"], arguments["process_id"], cfg.timeout_s)
        _end_when_jax_aborts(f"error: {failed}\n{HOW_TO_START}")
        jax.distributed.initialize(
            **(arguments if cfg.coordinator != "auto" else {}),
            initialization_timeout=cfg.timeout_s,
            heartbeat_timeout_seconds=cfg.heartbeat_s,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{failed}: {str(error).splitlines()[0]}\n{HOW_TO_START}") from error


def _end_when_jax_aborts(failed: str) -> None:
    """Installs a SIGABRT handler that ends this process with an exit code and a message when JAX aborts.

    The exit code after a SIGABRT is BAD_INPUT if JAX cannot connect the processes, and RESTART if a connected process
    is lost. JAX aborts a process that cannot reach the other processes, or that receives no heartbeats from another
    process. The SIGABRT handler prints a message after the stack trace that JAX prints. The SIGABRT handler must be a C
    function, because Python signal handlers run in the main thread, for which abort() does not wait. JAX's callback for
    lost processes cannot replace the SIGABRT handler, because calling this callback fails with std::bad_cast (jaxlib
    0.10.2).

    Once the processes are connected, a SIGABRT in a Python thread indicates a bug instead of a lost process. After a
    SIGABRT in a Python thread, the SIGABRT handler restores the default signal action, which ends the process. With
    jaxlib 0.7, the exit code after the loss of another process is 1 instead of RESTART, because jaxlib 0.7 calls
    _exit(1) instead of abort().
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
        # A thread that Python did not start has a `_DummyThread` object.
        if isinstance(threading.current_thread(), threading._DummyThread):
            os.write(
                2, f"another process is gone, or was silent for distributed.heartbeat_s\n{HOW_TO_RESTART}\n".encode()
            )
            os._exit(RESTART)
        # `libc.signal(number, None)` restores the default signal action, with which abort() ends the process.
        libc.signal(number, None)

    _handler = kind(on_abort)
    libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


_handler: Any = None  # `_handler` keeps the C callback alive, because C code holds only the address of the callback.
HOW_TO_RESTART = f"  exit code {RESTART}: restart all processes; they resume from the last checkpoint"


def gather_text(text: str) -> list[str]:
    """Returns, in every process, the list of the strings that all processes passed, in the order of process ids."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    local = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(local))))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(local)] = local
    rows = multihost_utils.process_allgather(padded)
    return [np.asarray(row)[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def agree_on(values: Mapping[str, Any], what: str) -> None:
    """Checks that `values` are equal in all processes, where `what` names the values in the error message.

    Raises:
        UserError: some values differ. All processes raise the error, with the names of the differing values and the
            values.
    """
    if jax.process_count() == 1:
        return
    all_values = [json.loads(text) for text in gather_text(json.dumps({name: repr(v) for name, v in values.items()}))]
    lines = []
    for name in dict.fromkeys(name for values in all_values for name in values):
        processes: dict[str, list[str]] = {}
        for i, local in enumerate(all_values):
            processes.setdefault(local.get(name, "not there"), []).append(str(i))
        if len(processes) > 1:
            differing = (f"{value:.200} in process {', '.join(ids)}" for value, ids in processes.items())
            lines.append(f"  {name}: " + "; ".join(differing))
    if lines:
        raise Agreed.all([f"{what} of the {len(all_values)} processes of this run differ:", *lines])


def agree_on_settings(cfg: Config) -> None:
    """Raises a UserError in all processes if the settings of the processes differ."""
    values = {key: value for key, value in config.flat(cfg).items() if not key.startswith(PER_PROCESS)}
    agree_on(values, "the settings")


@contextmanager
def synchronise_errors() -> Iterator[None]:
    """Context manager that makes all processes raise a UserError after the block if one process raises a UserError in
    the block."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1 or isinstance(error, Agreed):
            raise
        failure = error
    texts = gather_text(str(failure) if failure else "")
    if failure:
        raise Agreed(str(failure)) from failure
    for i, text in enumerate(texts):
        if text:
            raise Agreed(f"process {i}: {text}")


def is_writer() -> bool:
    """Returns True if this process is process 0, which is the only process that writes logs, metrics and models."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes of the run have called this function."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(number: int) -> int:
    """Returns the maximum of the integer `number` over all processes of the run."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def on_host(tree: Any) -> Any:
    """Returns the pytree with every array that is spread over several processes gathered into a numpy array in each
    process.

    PRNG keys, and leaves that are not spread over several processes, are returned unchanged. All processes of the run
    must call `on_host`.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def rows_here(mesh: Mesh | None, rows: int) -> slice:
    """Returns the range of batch rows that this process loads, which are the rows of the process's local devices."""
    if mesh is None or jax.process_count() == 1:
        return slice(0, rows)
    batch_axes = tuple(mesh.axis_names.index(axis) for axis in ROWS)
    counts = [mesh.devices.shape[i] for i in batch_axes]
    local = [
        int(np.ravel_multi_index([place[i] for i in batch_axes], counts))
        for place, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    ]
    size = rows // int(np.prod(counts))
    return slice(min(local) * size, (max(local) + 1) * size)


@contextmanager
def peers(say: Callable[[str], None]) -> Iterator[None]:
    """Context manager that ends this process with exit code RESTART if a collective operation fails because another
    process is lost.

    `peers` raises an `Agreed` error again, because every process of the run raises an `Agreed` error at the same point.
    After any exception but `Agreed`, the process exits immediately, because a normal exit would wait for the other
    processes. The exit code of the process is BAD_INPUT for a UserError and BUG for exceptions that do not indicate a
    lost process. In a run with a single process, `peers` raises every exception again.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, Agreed):
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            _leave(BAD_INPUT)
        markers = ("gloo", "peer", "distributed", "coordination", "heartbeat", "connection")
        lost_peer = any(marker in str(error).lower() for marker in markers)
        if not isinstance(error, jax.errors.JaxRuntimeError | ValueError) or not lost_peer:
            traceback.print_exc()
            _leave(BUG)
        say(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone: "
            f"{str(error).splitlines()[0]:.200}\n{HOW_TO_RESTART}"
        )
        _leave(RESTART)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def __getattr__(name: str) -> Any:
    """Returns the function of this module that formerly had the given name, with a DeprecationWarning."""
    return moved_name(__name__, name)
