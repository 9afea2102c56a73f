"""A run while it trains: what its parts share. `loop` advances it; `evaluate`, `resume`, `meter` and `compile` work on
it, as hooks of users do."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config
from gptjax.parallel import distributed, place_batch
from gptjax.signals import Signals
from gptjax.tokenizers import Tokenizer
from gptjax.training.progress import Progress
from gptjax.training.run_dir import RunDir
from gptjax.training.step import TrainState
from gptjax.training.task import StepFunctions, Task
from gptjax.types import Params


class TrainResult(NamedTuple):
    run_dir: Path
    params: Params
    cfg: Config
    tokenizer: Tokenizer
    step: int
    val_loss: float
    exit_code: int = 0


class Interrupted(Exception):
    """A signal has come, at a place where it can be acted on."""


@dataclasses.dataclass
class Counters:
    """What is carried from step to step beside the state; goes into every checkpoint."""

    evaluated: int = -1  # step of the last evaluation
    val_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = -1
    loss_total: float = 0.0  # since the last line of metrics
    loss_weight: float = 0.0
    samples_bytes: int = 0  # length of samples.txt
    seconds: float = 0.0  # wall time of the run so far


@dataclasses.dataclass
class Run:
    """One run. `state`, `step` and `counters` change as it trains.

    cfg, task, rules   what is trained and how; task.start and task.frozen are let go once the state holds them
    dir                the run directory; mesh: None on one device; writes: whether this process writes
    state, step        after the last call that was started; saved: step of the last checkpoint
    k                  steps of one compiled call; tokens_per_step: of all devices; n_params: trained
    """

    cfg: Config
    task: Task
    rules: StepFunctions
    dir: RunDir
    mesh: Mesh | None
    progress: Progress
    signals: Signals
    checkpoints: Checkpoints
    environment: dict[str, Any]
    writes: bool
    state: TrainState
    n_params: int
    tokens_per_step: int
    step: int = 0
    saved: int = 0
    k: int = 1
    counters: Counters = dataclasses.field(default_factory=Counters)
    last_sample: str | None = None
    began: float = 0.0

    @property
    def both(self) -> tuple[Any, Any]:
        """What is trained, and what is not."""
        return self.state.params, self.state.frozen

    def params(self) -> Params:
        """What the loss reads, on the host."""
        return self.rules.combine(*distributed.on_host(self.both))

    def seconds(self) -> float:
        """Wall time, of earlier processes too."""
        return round(time.monotonic() - self.began, 3)

    def poll(self) -> None:
        """Raises Interrupted if a signal has come, to this process or another."""
        if code := distributed.agree(self.signals.code):
            self.signals.code = code
            raise Interrupted

    def batch(self, step: int, k: int = 1) -> Any:
        """Of k steps in a call with a leading side of them; of several processes each reads its own rows."""
        of = self.cfg.train.batch_size
        rows = distributed.rows_here(self.mesh, of) if jax.process_count() > 1 else None
        batch = self.task.batches(step, k, rows)
        if k == 1:
            batch = jax.tree.map(lambda leaf: leaf[0], batch)
        return place_batch(batch, self.mesh, rows=rows, of=of)


Hook = tuple[int, Callable[[Run], None]]  # every so many steps, and after the last
