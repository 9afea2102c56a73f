"""The run directory, which holds the files of one training run.

Checks and a lock protect the files of a run from other runs and other processes. A run directory contains:

    config.yaml        all settings, with the values that depend on the data filled in
    environment.json   versions, device and command line of the last start of the run
    metrics.jsonl      one JSON object per line
    rollouts.jsonl     for tasks that train on answers of the model: one JSON object per answer
    log.txt  samples.txt  loss.png
    checkpoints/       training states from which the run can be resumed
    best/  final/      self-contained models: the model with the lowest validation loss, and the model of the last step
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from gptjax import config
from gptjax.config import Config
from gptjax.config.uses import verb_of
from gptjax.errors import UserError
from gptjax.files import user_path, write_text

# The Python module fcntl does not exist on Windows, where only the age of the lock file shows whether the lock is held.
try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

# The files that contain the test results of a fine-tuned model.
OF_THE_END = ("test.json", "responses.jsonl", "confusion.png")
# A lock file that has not been modified for LOCK_STALE_S seconds counts as abandoned. The process that trains in a run
# directory updates the modification time of its lock file at least every 10 s.
LOCK_STALE_S = 180

# The following settings may differ when a run is resumed, because they do not affect the trained weights.
MAY_CHANGE = (
    "run_dir", "train.eval_every", "train.checkpoint_every", "train.log_every", "train.keep_checkpoints",
    "train.max_nonfinite", "train.patience", "train.resume", "train.loggers", "data.cache_dir", "sample.*", "mesh.*",
    "distributed.*",
)  # fmt: skip


class RunDir:
    """The paths and files of one training run.

    The method `check` must be called before files of the run are written. Files of the run may be written only inside
    `with run_dir.locked():`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.final = self.path / "final"

    def exists(self) -> bool:
        return self.config.exists() or self.checkpoints.exists() or self.final.exists()

    def check(self, cfg: Config) -> None:
        """Checks that a run of the config `cfg` can be started or resumed in this directory, without writing files.

        Raises:
            UserError: the directory holds a run of another config, or any run if `train.resume=never`, or files of
                another program, or the directory is not writable.
        """
        user_path(self.path, "run_dir")
        if not self.exists():
            refuse_unwritable(self.path)
            refuse_foreign(self.path)
            return
        if cfg.train.resume == "never":
            raise UserError(
                f"{self.path} already holds a run and train.resume=never: nothing was overwritten\n"
                "  choose another run_dir=FOLDER, or train.resume=auto to resume it"
            )
        if not self.config.exists():
            raise UserError(f"{self.path} holds a run without its config.yaml: choose another run_dir=FOLDER")
        stored = self.stored()
        if lines := changes(stored, cfg):
            lines += [f"  {reason}"] if longer(stored, cfg) and (reason := self._ended(stored)) else []
        elif longer(stored, cfg) and (reason := self._ended(stored)):
            name = "max_steps" if cfg.train.epochs is None else "epochs"
            lines = [f"train.{name}: {getattr(stored.train, name)} -> {getattr(cfg.train, name)}", reason]
        if lines:
            raise UserError.all(
                [
                    f"{self.path} was made with another config (run -> now); nothing was overwritten:",
                    *(f"  {line}" for line in lines),
                    "  for a new run choose another run_dir=FOLDER; to resume this one keep its settings",
                ]
            )

    def _ended(self, stored: Config) -> str:
        """Returns the reason why a run cannot be extended to more steps, or "" if the run can be extended.

        The schedule of the learning rate or of the weight decay may rule out more steps, for example because the
        learning rate was planned to decay to its minimum at the last step.
        """
        optim, steps = stored.optim, stored.train.max_steps
        saved = max((int(path.name) for path in self.checkpoints.glob("*") if path.name.isdecimal()), default=0)
        decay_start = steps - max(1, round(optim.decay_fraction * steps))
        if optim.weight_decay and optim.weight_decay_schedule in ("linear", "cosine"):
            return (
                f"optim.weight_decay_schedule={optim.weight_decay_schedule}: the weight decay was planned for {steps} "
                f"steps; {train_further(stored, self.path)}"
            )
        if optim.schedule == "constant" or (optim.schedule == "wsd" and saved <= decay_start):
            return ""
        begun = f", and step {saved} is past step {decay_start}, where the decay starts"
        return (
            f"optim.schedule={optim.schedule}: the learning rate schedule was planned for {steps} steps"
            f"{begun if optim.schedule == 'wsd' else ''}; {train_further(stored, self.path)}"
        )

    def stored(self) -> Config:
        """Reads and returns the config in the run's file config.yaml.

        Raises:
            UserError: the file was not written by gptjax, or is damaged.
        """
        try:
            return config.from_yaml(self.config.read_text(encoding="utf-8"), str(self.config))
        except (OSError, ValueError) as error:  # ValueError includes its subclass UserError.
            details = "\n".join(f"  {line}" for line in str(error).splitlines())
            raise UserError(
                f"run_dir={self.path} is taken: its config.yaml was not written by gptjax, or is damaged; "
                f"nothing was overwritten\n  choose another run_dir=FOLDER\n{details}"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock of the run directory while a `with` block runs, so that no other process trains in it.

        Raises:
            UserError: another process holds the lock, or the directory cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write to run_dir={self.path}: {error.strerror}; choose another run_dir=FOLDER"
            ) from error
        with os.fdopen(handle, "r+") as lock:
            _refuse_owner(self.path, lock)
            lock.seek(0)
            lock.truncate()
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}, lock)
            lock.flush()
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.seek(0)
                    lock.truncate()

    def refuse_busy(self) -> None:
        """Checks that no other process trains in this directory, without taking the lock or writing files.

        Raises:
            UserError: another process holds the lock.
        """
        with suppress(FileNotFoundError, PermissionError), open(self.path / ".lock", encoding="utf-8") as lock:
            _refuse_owner(self.path, lock)

    def touch(self) -> None:
        """Updates the modification time of the lock file, to show that the process that holds the lock is alive."""
        with suppress(OSError):
            os.utime(self.path / ".lock")

    def begin(self, cfg: Config, environment: dict[str, Any]) -> None:
        """Writes environment.json, and writes config.yaml if the file does not exist.

        If `cfg` has more steps than the stored config, the numbers of steps and epochs in config.yaml are updated. If a
        run that had ended is trained further, the test results of the shorter run are deleted.
        """
        stored = self.stored() if self.config.exists() else None
        if stored is None:
            write_text(self.config, config.to_yaml(cfg))
        elif cfg.train.max_steps > stored.train.max_steps:
            settings = dataclasses.replace(stored.train, max_steps=cfg.train.max_steps, epochs=cfg.train.epochs)
            write_text(self.config, config.to_yaml(dataclasses.replace(stored, train=settings)))
        for name in OF_THE_END if self.final.exists() else ():
            (self.path / name).unlink(missing_ok=True)
        write_text(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")

    def cut_metrics(self, step: int, say: Callable[[str], None]) -> None:
        """Removes the rows of all steps after `step` from metrics.jsonl and rollouts.jsonl.

        An incomplete last line of metrics.jsonl or rollouts.jsonl is removed. Damaged lines of the two files are
        removed with a warning.
        """
        for file in filter(Path.exists, (self.metrics, self.rollouts)):
            lines, damaged = _lines(file)
            if damaged:
                say(f"WARNING: {_dropped(file, damaged)}")
            kept = b"".join(line for line, row in lines if row["step"] <= step)
            if kept != file.read_bytes():
                write_text(file, kept.decode())

    def append(self, name: str, text: str) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)

    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)


def refuse_unwritable(path: Path) -> None:
    """Checks that a run directory can be created or written to.

    Raises:
        UserError: the path or one of its parents is a file, or the folder is not writable.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir={path} is a file: choose another run_dir=FOLDER")
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), Path())
    if not nearest.is_dir():
        reason = "is a file"
    else:
        reason = "" if os.access(nearest, os.W_OK | os.X_OK) else "cannot be written to"
    if reason:
        raise UserError(f"cannot write to run_dir={path}: {nearest} {reason}; choose another run_dir=FOLDER")


def refuse_foreign(path: Path, allowed: str = "") -> None:
    """Checks that a directory without a run contains no files of other programs.

    A directory without a run may contain a lock file and temporary files, left by a run that was killed during its
    start.

    Args:
        allowed: regular expression that matches the names of further files that the directory may hold.

    Raises:
        UserError: the directory contains files of another program, or cannot be read.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise UserError(f"run_dir={path} cannot be read: {error.strerror or error}") from error
    known = r"\.lock|\..+\.partial" + (f"|{allowed}" if allowed else "")
    if names := [name for name in names if not re.fullmatch(known, name)]:
        listed = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
        raise UserError(
            f"run_dir={path} is not empty and holds no run of gptjax ({listed}): nothing was overwritten\n"
            "  choose another run_dir=FOLDER"
        )


def _refuse_owner(path: Path, lock: TextIO) -> None:
    """Takes the lock of a run directory by locking the open lock file.

    Raises:
        UserError: another process holds the lock. The error message names this process.
    """
    held = False
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError:
            pass  # An OSError means that the file system does not support locks.
    try:
        owner = json.loads(lock.read() or "{}")
    except (ValueError, RecursionError):
        owner = {}
    owner = owner if isinstance(owner, dict) else {}
    # The operating system releases the lock of a process on this machine when the process ends. If the process that
    # holds a lock runs on another machine, only the age of the lock file shows whether the process has ended.
    other_host = bool(owner) and (not fcntl or owner.get("host") != socket.gethostname())
    if held or (other_host and time.time() - os.fstat(lock.fileno()).st_mtime < LOCK_STALE_S):
        process = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        raise UserError(
            f"{path} is in use: {process} has been training there since {owner.get('since', '?')}\n"
            "  wait for it, or choose another run_dir=FOLDER; "
            f"if that machine is down, the directory is free after {LOCK_STALE_S} s"
        )


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the file metrics.jsonl of a run directory, and returns its rows as dicts.

    An incomplete last line of metrics.jsonl is left out. Damaged lines of metrics.jsonl are left out with a Python
    warning.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines, damaged = _lines(path)
    if damaged:
        warnings.warn(_dropped(path, damaged), stacklevel=2)
    return [row for _, row in lines]


def _lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """Reads the valid lines of a metrics.jsonl file, and counts the damaged lines.

    An incomplete last line of a metrics.jsonl file is neither returned nor counted as damaged.

    Returns:
        (list of pairs (line, row parsed from the line), number of damaged lines).
    """
    *complete, _ = path.read_bytes().split(b"\n")
    rows = []
    for line in complete:
        with suppress(ValueError, RecursionError):
            row = json.loads(line.decode())
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append((line + b"\n", row))
    return rows, len(complete) - len(rows)


def _dropped(path: Path, damaged: int) -> str:
    return f"{path}: {damaged} damaged {'line was' if damaged == 1 else 'lines were'} left out"


def changes(stored: Config, cfg: Config) -> list[str]:
    """Lists the settings that differ between two configs although they must be equal to resume the run.

    Each line shows the old and the new value of a setting, such as "optim.lr: 0.001 -> 0.0003". A larger number of
    steps or epochs is not listed, because a run may be resumed with more steps or epochs.

    Args:
        stored: the config in the run directory.
        cfg: the new config. Values that are still to be filled in from the data or the base model are not compared.
    """
    cfg = _resolve_like(stored, cfg)
    if longer(stored, cfg):
        cfg = dataclasses.replace(
            cfg, train=dataclasses.replace(cfg.train, max_steps=stored.train.max_steps, epochs=stored.train.epochs)
        )
    return [line for line in config.diff(stored, cfg) if not may_change(line.partition(":")[0])]


def train_further(stored: Config, path: Path) -> str:
    """Returns advice on how to train a model further if its run cannot be extended to more steps."""
    if stored.task in ("classify", "reward_model"):
        return "for more steps run the same command with another run_dir=FOLDER"
    key = "pretrain.base" if stored.task == "pretrain" else "finetune.base"
    return f"to train the model further: gptjax {verb_of(stored.task)} {key}={path} run_dir=FOLDER"


def longer(stored: Config, cfg: Config) -> bool:
    """Returns True if the config `cfg` has more training steps or epochs than the config `stored`."""
    before, now = stored.train, cfg.train
    if before.epochs is None or now.epochs is None:
        return before.epochs is now.epochs is None and now.max_steps > before.max_steps
    return now.epochs > before.epochs


def _resolve_like(stored: Config, written: Config) -> Config:
    """Returns the config `written`, in which values that depend on the data or the base model come from `stored`."""
    model, train = written.model, written.train
    pretrain, tokenizer = written.pretrain, written.tokenizer
    if written.task != "pretrain" or pretrain.base is not None:  # A base model determines the architecture.
        model = stored.model.computed_as(model)
    elif not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=stored.model.vocab_size)
    if pretrain.base is not None:
        tokenizer = stored.tokenizer
        if pretrain.context_length is None:
            pretrain = dataclasses.replace(pretrain, context_length=stored.pretrain.context_length)
    if train.epochs is not None and train.epochs == stored.train.epochs:
        train = dataclasses.replace(train, max_steps=stored.train.max_steps)
    return dataclasses.replace(written, model=model, train=train, pretrain=pretrain, tokenizer=tokenizer)


def may_change(key: str) -> bool:
    """Returns True if the setting `key` may have another value when a run is resumed."""
    return key in MAY_CHANGE or key.rpartition(".")[0] + ".*" in MAY_CHANGE


def environment() -> dict[str, Any]:
    """Returns the contents of the file environment.json: time, command line, versions, devices and XLA_FLAGS."""
    import jax

    device = jax.devices()[0]
    names = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "time": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in names},
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


# BITWISE lists the entries of environment.json that must not change for a resumed run to be bitwise equal to an
# uninterrupted run.
BITWISE = ("versions", "backend", "device", "devices", "XLA_FLAGS")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
