"""Several processes that are one program: how they meet, what each reads, which one writes, and when one is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import DistributedConfig
from gptjax.ops.device import ROWS
from gptjax.types import UserError

RESTART = 75  # exit code, EX_TEMPFAIL: a peer is gone; all processes started again go on from the last checkpoint


def start(cfg: DistributedConfig) -> None:
    """Meet the other processes; does nothing without `distributed.coordinator`, or when it was done already.

    Raises:
        UserError: they cannot be found, or do not come in `timeout_s`.
    """
    if cfg.coordinator is None or jax.distributed.is_initialized():
        return
    told = dict(
        coordinator_address=cfg.coordinator, num_processes=cfg.num_processes, process_id=cfg.process_id
    )  # fmt: skip
    try:
        jax.distributed.initialize(
            **(told if cfg.coordinator != "auto" else {}),
            initialization_timeout=cfg.timeout_s,
            heartbeat_timeout_seconds=cfg.heartbeat_s,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"distributed.coordinator={cfg.coordinator}: the processes do not meet: {str(error).splitlines()[0]}\n"
            "  start the same command on every host, with distributed.coordinator=HOST:PORT of the first, "
            "distributed.num_processes=N and distributed.process_id=0 to N-1; on a TPU pod or under Slurm "
            "distributed.coordinator=auto finds all three"
        ) from error


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
    """Ends this process with RESTART when a collective fails, as it does when another process is gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or (isinstance(error, UserError) or not _of_a_peer(error)):
            raise
        say(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone: "
            f"{str(error).splitlines()[0]:.200}\n"
            f"  exit code {RESTART}: start all processes again; they go on from the last checkpoint"
        )
        sys.stdout.flush()
        os._exit(RESTART)  # a clean exit would wait for the others


def _of_a_peer(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "peer", "distributed", "coordination", "heartbeat", "connection"))
