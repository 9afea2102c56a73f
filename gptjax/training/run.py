"""Data classes for the state of a training run, which the training loop and users' hooks share."""

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
from gptjax.optim import average_of
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
    """Raised by `Run.poll` if a signal was received, such as Ctrl-C.

    The training loop calls `Run.poll` only at points where the run can be stopped.
    """


@dataclasses.dataclass
class Counters:
    """Counters of a training run, which are saved in every checkpoint together with the TrainState.

    Attributes:
        evaluated: step of the last evaluation.
        val_loss: validation loss of the last evaluation.
        best_loss: lowest validation loss so far.
        best_step: step with the lowest validation loss.
        loss_total: weighted sum of the training losses since the last row of metrics.
        loss_weight: sum of the weights of the losses in `loss_total`.
        since_best: number of evaluations since the evaluation with the lowest validation loss.
        samples_bytes: length of samples.txt in bytes.
        seconds: wall time of the run so far, in seconds.
    """

    evaluated: int = -1
    val_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = -1
    loss_total: float = 0.0
    loss_weight: float = 0.0
    since_best: int = 0
    samples_bytes: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Run:
    """One training run. The attributes `state`, `step` and `counters` of a `Run` change during training.

    Attributes:
        cfg: the config, with the values that depend on the data filled in.
        task: the task. Its `start` and `frozen` are None once `state` holds these arrays.
        rules: the `StepFunctions` of the task.
        dir: the run directory.
        mesh: the device mesh, or None on one device.
        writes: whether this process writes files.
        state, step: TrainState and training step after the last compiled call, which may still be running.
        saved: step of the last checkpoint, or 0 if there is no checkpoint.
        k: number of training steps per compiled call.
        n_params: number of trained parameters.
        tokens_per_step: number of tokens per training step, over all devices.
        rolled: metrics of the last rollouts.
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
    rolled: dict[str, float] = dataclasses.field(default_factory=dict)
    began: float = 0.0

    @property
    def both(self) -> tuple[Any, Any]:
        """The pair (trained params, frozen params).

        If train.ema or train.average_last is set, the pair contains the average of the trained params instead of the
        trained params.
        """
        return average_of(self.state.params, self.state.opt_state), self.state.frozen

    @property
    def stopped_early(self) -> bool:
        """True if train.patience has ended the run."""
        return self.counters.since_best >= self.cfg.train.patience > 0

    @property
    def done(self) -> bool:
        return self.step >= self.cfg.train.max_steps or self.stopped_early

    def params(self) -> Params:
        """Returns the params that the loss reads, copied to host memory."""
        return self.rules.combine(*distributed.on_host(self.both))

    def seconds(self) -> float:
        """Returns the wall time of the run in seconds.

        The wall time of a resumed run includes the time of the earlier processes.
        """
        return round(time.monotonic() - self.began, 3)

    def poll(self) -> None:
        """Raises Interrupted if this process or another process of the run has received a signal."""
        if code := distributed.agree(self.signals.code):
            self.signals.code = code
            raise Interrupted

    def batch(self, step: int, k: int = 1) -> Any:
        """Returns the batches of the k training steps from `step`, stacked along a leading axis if k is larger than 1.

        Each process reads only its own rows of a batch.
        """
        batch_size = self.cfg.train.batch_size
        rows = distributed.rows_here(self.mesh, batch_size) if jax.process_count() > 1 else None
        batch = self.task.batches(step, k, rows)
        if k == 1:
            batch = jax.tree.map(lambda leaf: leaf[0], batch)
        return place_batch(batch, self.mesh, rows=rows, of=batch_size)


# A hook is a pair (every, fn): the function fn(run) is called every `every` training steps and after the last step.
Hook = tuple[int, Callable[[Run], None]]
