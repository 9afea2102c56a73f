"""Saves and restores checkpoints with integrity checks: Orbax stores the arrays, and checksums verify that the arrays
are intact.

    checkpoints/
      250/  state/         the arrays, written by Orbax
            meta.json      the step, the caller's metadata; shape, dtype and fingerprint of every leaf
            manifest.json  size and sha256 of every file; written last
      500/
      corrupt-750/         a damaged checkpoint, kept for inspection

Orbax does not detect flipped bits in array data, treats every folder whose name is a number as a checkpoint, never
falls back to an older step, and leaves an incomplete checkpoint if the process is killed while Orbax deletes a
checkpoint. So that no incomplete checkpoint is read, `Checkpoints.save` writes a checkpoint to a temporary folder, and
renames the complete folder atomically. `Checkpoints.restore` checks that every file matches the manifest, that the name
of the folder is the step in meta.json, and that every leaf matches its fingerprint. Before a checkpoint is deleted, its
folder is renamed, so that a partially deleted folder does not count as a checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tree
from gptjax._moved import moved_name
from gptjax.errors import UserError
from gptjax.files import sha256, sync

VERSION = 1
STATE, META, MANIFEST = "state", "meta.json", "manifest.json"
# Minimum number of checkpoints to keep, so that an older checkpoint can be restored if the newest one is damaged.
MIN_KEEP = 2


class Restored(NamedTuple):
    step: int
    state: Any
    meta: dict[str, Any]


class Damaged(Exception):
    """The error that is raised if the files of a checkpoint were changed after the checkpoint was written."""


class Checkpoints:
    """The checkpoints in the folder of one run. Saving is synchronous: the method `save` returns when the checkpoint is
    on disk.

    Args:
        keep: number of newest checkpoints to keep, at least 2.
        log: function that is called with each warning, as one line of text.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, log: Callable[[str], None] = print):
        self.folder, self.keep, self.log = Path(folder).absolute(), max(keep, MIN_KEEP), log
        self._verified: set[int] = set()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint folder, in ascending order, without verifying the checkpoints."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isascii() and path.name.isdigit())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete all checkpoints that are older than the `keep` newest intact checkpoints.

        Args:
            state: the training state, any pytree of arrays; it may contain random keys.
            meta: metadata, as a JSON object.

        Returns:
            The folder of the checkpoint.

        Raises:
            UserError: the checkpoint could not be written, for example because the disk is full; older checkpoints are
                unchanged.
        """
        target, partial = self.folder / str(step), self.folder / f".partial-{step}"
        # Orbax saves the shards of every process; only process 0 writes the other files
        writes = jax.process_index() == 0
        try:
            leaves, impls = _plain(state)
            if writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                for pattern in (".partial-*", ".trash-*"):  # incomplete checkpoint folders of killed processes
                    for path in self.folder.glob(pattern):
                        shutil.rmtree(path, ignore_errors=True)
                partial.mkdir()
            _wait("checkpoint begun")
            _orbax_save(partial / STATE, leaves)
            hashes = fingerprints(leaves)
            if writes:
                described = {
                    name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name, "fingerprint": hashes[name]}
                    for name, leaf in leaves.items()
                }
                _write_json(partial / META, {"step": step, "meta": meta, "leaves": described, "keys": impls})
                _write_json(partial / MANIFEST, _manifest(partial))
                _sync_tree(partial)
                if target.exists() or target.is_symlink():
                    self._set_aside(step)
                os.rename(partial, target)
                sync(self.folder)
        except Exception as error:
            if not isinstance(error, OSError) and not any(word in str(error) for word in DISK_WORDS):
                raise
            raise UserError(
                f"cannot write checkpoint {target}: {_reason(error)}\n"
                "  earlier checkpoints are unharmed; free disk space (or choose another run_dir) and run again"
            ) from error
        finally:
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
        self._verified.add(step)
        if writes:
            self._collect()
        _wait("checkpoint written")
        return target

    def restore(
        self, abstract_state: Any, accept: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored | None:
        """Restore the newest intact checkpoint, with the shardings of `abstract_state`; return None if there are no
        checkpoints.

        Damaged checkpoints that are newer than the restored one are renamed to corrupt-STEP, with a warning.

        Args:
            abstract_state: the expected state, a pytree of arrays or of `jax.ShapeDtypeStruct`.
            accept: function that is called with the metadata of an intact checkpoint before its arrays are read, and
                raises an error to reject the checkpoint. If `accept` raises `Damaged`, the next older checkpoint is
                tried; any other error is passed on to the caller.

        Raises:
            UserError: there are checkpoints but none is intact, or the shapes or dtypes of the stored arrays differ
                from those of `abstract_state`.
        """
        wanted, impls = _plain(abstract_state)
        bad: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                stored = self._check(step)
                accept(stored["meta"])
                _refuse_other_shapes(self.folder / str(step), stored, wanted, impls)
                state = self._read(step, stored, wanted, impls, abstract_state)
            except Damaged as error:
                bad[step] = str(error)
                self.log(f"WARNING: checkpoint {self.folder / str(step)} is damaged: {error}")
                continue
            _wait("checkpoint read")
            for bad_step in bad if jax.process_index() == 0 else ():
                self._set_aside(bad_step)
            if bad:
                self.log(f"WARNING: going back to the checkpoint of step {step}; damaged ones are kept as corrupt-*")
            self._verified.add(step)
            return Restored(step, state, stored["meta"])
        set_aside = [path.name for path in self.folder.glob("corrupt-*")] if self.folder.is_dir() else []
        if bad or set_aside:
            raise UserError(
                f"{self.folder}: no checkpoint can be read ({', '.join([*map(str, bad), *set_aside])})\n"
                "  nothing was changed. To train from step 0 choose another run_dir, or delete this folder first"
            )
        return None

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Returns the step and the metadata of the newest checkpoint whose files match the checkpoint's manifest, or
        None if there is no such checkpoint. `newest` loads no arrays."""
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                return step, self._check(step)["meta"]
        return None

    def read(self, step: int) -> dict[str, Any]:
        """Returns the state of one checkpoint for inspection, as nested dicts of arrays on one device.

        The shapes and dtypes of the arrays are taken from meta.json. For each random key, the array of
        `jax.random.key_data` is returned.

        Raises:
            UserError: the checkpoint is damaged.
        """
        try:
            stored = self._check(step)
            wanted = {
                name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
                for name, leaf in sorted(stored["leaves"].items())
            }
            return tree.unflatten(self._read(step, stored, wanted, {}, wanted))
        except Damaged as error:
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged: {error}") from error

    def _check(self, step: int) -> dict[str, Any]:
        """Compare every file of a checkpoint with the manifest, raise Damaged if a file differs, and return the
        contents of meta.json."""
        folder = self.folder / str(step)
        if folder.is_symlink() or not folder.is_dir():
            raise Damaged("not a folder")
        try:
            text = (folder / MANIFEST).read_bytes()
            manifest = json.loads(text)
            if text != _json(manifest) or manifest["sha256"] != _self_hash(manifest):
                raise Damaged(f"{MANIFEST} was changed")
            paths = _files(folder)
            for name, (size, digest) in manifest["files"].items():
                path = paths.get(name)
                if path is None:
                    raise Damaged(f"{name} is missing")
                if path.stat().st_size != size:
                    raise Damaged(f"{name} has {path.stat().st_size} bytes, expected {size}")
                if sha256(path) != digest:
                    raise Damaged(f"{name} does not match its sha256")
            return _stored(json.loads((folder / META).read_bytes()), step)
        except FileNotFoundError as error:
            raise Damaged(f"{Path(error.filename).name} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{type(error).__name__}: {error}") from error

    def _read(
        self, step: int, stored: dict[str, Any], wanted: dict[str, Any], impls: dict[str, str], abstract_state: Any
    ) -> Any:
        """Restore the arrays of the checkpoint of a step, check the fingerprints of the arrays, and return a pytree
        with the structure of `abstract_state`.

        A meta.json that an older release wrote does not contain the step; in this case, the array "step" of the
        restored state, if there is such an array, must equal the name of the folder.

        Raises:
            Damaged: Orbax fails, a fingerprint differs from the one in meta.json, or the step differs from the folder's
                name.
        """
        try:
            leaves = _orbax_restore(self.folder / str(step) / STATE, wanted)
        except Exception as error:
            raise Damaged(f"Orbax: {_reason(error)}") from error
        for name, value in fingerprints(leaves).items():
            if value != stored["leaves"][name]["fingerprint"]:
                raise Damaged(f"{name} does not match its fingerprint")
        counted = leaves.get("step") if "step" not in stored else None
        if counted is not None and counted.ndim == 0 and int(counted) != step:
            raise Damaged(f"it contains step {int(counted)}, but its folder is {step}")
        for name, impl in impls.items():
            leaves[name] = jax.random.wrap_key_data(leaves[name], impl=impl)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), list(leaves.values()))

    def _collect(self) -> None:
        """Delete all checkpoints that are older than the `keep` newest intact checkpoints."""
        kept = 0
        for step in reversed(self.steps()):
            if kept >= self.keep:
                trash = self.folder / f".trash-{step}"
                shutil.rmtree(trash, ignore_errors=True)
                os.rename(self.folder / str(step), trash)
                shutil.rmtree(trash, ignore_errors=True)
                continue
            if step not in self._verified:
                with contextlib.suppress(Damaged):
                    self._check(step)
                    self._verified.add(step)
            kept += step in self._verified

    def _set_aside(self, step: int) -> None:
        name, n = f"corrupt-{step}", 1
        while (self.folder / name).exists():
            n += 1
            name = f"corrupt-{step}-{n}"
        os.rename(self.folder / str(step), self.folder / name)


def _wait(name: str) -> None:
    """Wait until all processes have called `_wait` with the same name; if there is only one process, do nothing."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


# ---------------------------------------------------------------- fingerprints


def fingerprints(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Returns a uint32 hash of each leaf: the sum of bits * (2 i + 1) mod 2**32 over the elements of the leaf, where i
    is the flat index of an element, and bits is the bit pattern of the element as an unsigned integer. For a 64-bit
    dtype, only the lower 32 bits of each bit pattern are used.

    Flipping the bit b < 32 of an element always changes the hash, because the sum changes by an odd number times 2**b,
    which is not 0 mod 2**32. An integer sum does not depend on the order of its terms, so the hash does not depend on
    the sharding.
    """
    on_host = tuple(
        getattr(leaf, "sharding", None) and leaf.sharding.memory_kind == "pinned_host" for leaf in leaves.values()
    )
    values = jax.device_get(_fingerprints(list(leaves.values()), on_host))
    return dict(zip(leaves, map(int, values), strict=True))


@partial(jax.jit, static_argnums=1)
def _fingerprints(leaves: list[jax.Array], on_host: tuple[bool, ...]) -> list[jax.Array]:
    """Compute the fingerprint of each leaf on the device. `on_host` has a bool per leaf, which is True if the leaf is
    in pinned host memory (offloaded)."""
    device = jax.memory.Space.Device
    return [
        _fingerprint(jax.device_put(leaf, device) if offloaded else leaf)
        for leaf, offloaded in zip(leaves, on_host, strict=True)
    ]


def _fingerprint(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


# ---------------------------------------------------------------- conversion of states to flat dicts, and validation of
# metadata


def _plain(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Flatten a pytree.

    Returns:
        Two dicts, whose keys are the paths of the leaves. The first has the array of each leaf; for a random key, this
        is its key data. The second has the name of the PRNG implementation of each random key.
    """
    leaves, impls = tree.flatten(state), {}
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):

            def data(key, name=name):
                impls[name] = str(jax.random.key_impl(key))
                return jax.random.key_data(key)

            if isinstance(leaf, jax.Array):
                leaves[name] = data(leaf)
            else:
                shape = jax.eval_shape(data, leaf)
                leaves[name] = shape.update(sharding=getattr(leaf, "sharding", None))
    return leaves, impls


def _stored(body: Any, step: int) -> dict[str, Any]:
    """Checks the contents of meta.json, and returns them; raises Damaged if the contents are invalid.

    The step may be missing in meta.json, because older releases did not store the step.
    """

    def require(valid: bool, problem: str) -> None:
        if not valid:
            raise Damaged(f"{META}: {problem}")

    require(isinstance(body, dict), "expected a JSON object")
    for key in ("meta", "leaves", "keys"):
        require(isinstance(body.get(key), dict), f"expected an object at {key}")
    if "step" in body:
        require(type(body["step"]) is int, "expected an integer at step")
        require(body["step"] == step, f"it is of step {body['step']}, but its folder is {step}")
    for name, leaf in body["leaves"].items():
        require(isinstance(leaf, dict), f"leaves: expected an object at {name}")
        shape, dtype = leaf.get("shape"), leaf.get("dtype")
        is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        require(is_shape, f"leaves: expected a list of sizes at {name}/shape")
        require(isinstance(dtype, str) and dtype in _DTYPES, f"leaves: unknown dtype {dtype!r} at {name}")
        require(type(leaf.get("fingerprint")) is int, f"leaves: expected an integer at {name}/fingerprint")
        parents = [name[:i] for i, letter in enumerate(name) if letter == "/"]
        require(not any(parent in body["leaves"] for parent in parents), f"leaves: {name} is inside another leaf")
    for name, impl in body["keys"].items():
        require(isinstance(impl, str), f"keys: expected a name at {name}")
    return body


_DTYPES = {
    "bool", "int4", "int8", "int16", "int32", "int64", "uint4", "uint8", "uint16", "uint32", "uint64",
    "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip


def _refuse_other_shapes(folder: Path, stored: dict[str, Any], wanted: dict[str, Any], impls: dict[str, str]) -> None:
    """Raise UserError if the stored arrays differ from the expected arrays in name, shape or dtype. Orbax itself would
    silently cast the stored arrays to the expected dtypes."""

    def kind(name: str, shape: Any, dtype: str, keys: dict[str, str]) -> str:
        return f"{dtype}{list(shape)}" + (f" ({keys[name]} key)" if name in keys else "")

    saved = {name: kind(name, leaf["shape"], leaf["dtype"], stored["keys"]) for name, leaf in stored["leaves"].items()}
    expected = {name: kind(name, leaf.shape, np.dtype(leaf.dtype).name, impls) for name, leaf in wanted.items()}
    lines = [
        f"  {name}: {saved.get(name, 'nothing')} in the checkpoint, {expected.get(name, 'nothing')} expected"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise UserError.all([f"checkpoint {folder} is from another model or optimizer:", *lines[:20], *more])


# ---------------------------------------------------------------- Orbax


def _orbax_save(path: Path, leaves: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(path, args=ocp.args.StandardSave(tree.unflatten(leaves)))


def _orbax_restore(path: Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
        for name, leaf in wanted.items()
    }
    with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        restored = tree.flatten(reader.restore(path, args=ocp.args.StandardRestore(tree.unflatten(abstract))))
    return {  # Orbax restores arrays into device memory, even if their sharding has the memory kind pinned_host
        name: leaf
        if leaf.sharding.memory_kind == abstract[name].sharding.memory_kind
        else jax.device_put(leaf, abstract[name].sharding)
        for name, leaf in ((name, restored[name]) for name in wanted)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that suppresses Orbax's log messages and, after a failure, the error messages of Orbax's
    background threads.

    Without the context manager `_quiet`, Orbax logs several lines per checkpoint, and after a failure Orbax's
    background threads print further errors.
    """
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: (
        None if "Event loop is closed" in str(unraisable.exc_value) else hook(unraisable)
    )
    try:
        yield
    except Exception as error:
        failure: BaseException | None = error
        # Python would otherwise issue a warning when it frees a coroutine of Orbax that was never awaited.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while failure:
                traceback.clear_frames(failure.__traceback__)
                failure = failure.__cause__ or failure.__context__
            gc.collect()
        time.sleep(0.2)  # callbacks in Orbax's background threads need time to finish
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# Orbax's errors for a full or read-only disk have no common type, but each error message contains one of the words in
# DISK_WORDS.
DISK_WORDS = (
    "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "os_error_code", "No space left", "File too large", "PERMISSION_DENIED",
    "Read-only file system", "Disk quota",
)  # fmt: skip


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for word in ("No space left on device", "File too large", "Read-only file system", "Disk quota exceeded"):
        if word in text:
            return word
    return f"{type(error).__name__}: {text[:300]}"


# ---------------------------------------------------------------- files


def _manifest(folder: Path) -> dict[str, Any]:
    files = {name: [path.stat().st_size, sha256(path)] for name, path in _files(folder).items()}
    manifest = {"version": VERSION, "files": files}
    return {**manifest, "sha256": _self_hash(manifest)}


def _files(folder: Path) -> dict[str, Path]:
    """Returns the paths of all files in a checkpoint except the manifest, as a sorted dict whose keys are the paths
    relative to `folder`."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths if path != folder / MANIFEST}


def _self_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_json({key: value for key, value in manifest.items() if key != "sha256"})).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(_json(value))


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
