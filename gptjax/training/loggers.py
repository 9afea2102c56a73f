"""Loggers for training metrics: the file metrics.jsonl, TensorBoard, and Weights & Biases.

The file metrics.jsonl is always written. TensorBoard and Weights & Biases are used if train.loggers lists them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gptjax.config import Config, flat
from gptjax.errors import UserError


class Logger(Protocol):
    def log(self, row: dict[str, Any]) -> None:
        """Logs a row of metrics, which is a dict with the training step and the value of each metric."""

    def close(self) -> None: ...


class JsonLines:
    """Writes metrics to the file metrics.jsonl, with one JSON object per line.

    The method `log` passes each line of metrics.jsonl to the operating system immediately. The method `sync` calls
    fsync, which writes all lines of metrics.jsonl to the disk.
    """

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, run_dir: Path, cfg: Config):
        self._writer = _module("tensorboardX", "tensorboardX").SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row):
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Logs metrics to Weights & Biases, in the project $WANDB_PROJECT (by default gptjax).

    If the environment variable WANDB_MODE is "offline", the metrics are logged to local files.
    """

    def __init__(self, run_dir: Path, cfg: Config):
        wandb = _module("wandb", "wandb")
        name = Path(run_dir).name
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gptjax"), name=name, dir=str(run_dir), config=flat(cfg)
        )

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(dict(_scalars(row)), step=row["step"])

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, Config], Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check(names: tuple[str, ...]) -> None:
    """Checks that the packages that the given loggers need are installed.

    Raises:
        UserError: a package is not installed.
    """
    for name in names:
        _module({"tensorboard": "tensorboardX"}.get(name, name), name)


def _module(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"train.loggers={name} needs {module}, which is not installed: pip install {module} "
            "(or pip install -e '.[track]' in the checkout)"
        ) from error


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in row.items() if name != "step" and isinstance(value, int | float)]
