"""The interface between the training loop and the tasks (pretraining, classification, ..) in `gptjax.tasks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from gptjax._moved import moved_name
from gptjax.config import Config, ModelConfig
from gptjax.optim import with_average
from gptjax.tokenizers import Tokenizer
from gptjax.training.step import Loss
from gptjax.types import Mean, Metrics, Params


def identity(trained: Any, frozen: Any) -> Any:
    """Returns the trained params.

    If a loss reads only the trained params, `identity` serves as the task's function `combine`.
    """
    return trained


class StepFunctions(NamedTuple):
    """The functions that a training step is built from.

    Attributes:
        loss: function (params, batch, key) that returns (Mean, metrics).
        combine: function (trained, frozen) that returns the params that the loss reads, for example with LoRA applied.
        optimizer: optax transformation that updates the trained params.
    """

    loss: Loss
    combine: Callable[[Any, Any], Any]
    optimizer: optax.GradientTransformation


class Validation(NamedTuple):
    """The validation data of a training run, and functions that evaluate the model.

    The model with the lowest validation loss is saved as the best model. If `score` is set, the model is evaluated by
    the rewards of the answers that the model generates, and the validation loss is the negative mean reward.

    Attributes:
        batches: function (first) that returns all validation batches or, if `first` is True, a part of the validation
            batches. `first` is True only for the evaluation before the first step.
        first_share: size of the part that `first` selects, as a fraction of all validation batches.
        derived_metrics: function (loss) that computes further metrics from the loss, such as perplexity.
        score: function (params) that lets the model answer the validation questions, and returns the negative mean
            reward as a `Mean` over the answers, and a dict with further metrics. None: the loss is used.
        sample: function (params) that returns generated texts, called after each evaluation. None: no samples.
    """

    batches: Callable[[bool], Iterable[Any]]
    first_share: float = 1.0
    derived_metrics: Callable[[float], dict[str, float]] = lambda loss: {}
    score: Callable[[Params], tuple[Mean, Metrics]] | None = None
    sample: Callable[[Params], list[str]] | None = None

    def text(self, loss: float) -> str:
        """Formats the validation loss for a line of output, or the mean reward if `score` is set."""
        return f"loss {loss:.4f}" if self.score is None else f"reward {-loss:.4f}"


class Rollouts(NamedTuple):
    """Answers that the model has generated, as batches on which the model is trained.

    Attributes:
        batches: the batches of the next k steps, with leaves [k, B, ..].
        metrics: metrics of the answers, such as their mean reward. Empty if the batches are not answers of the model.
        rows: one JSON-serialisable dict per answer, for rollouts.jsonl.
        warnings: warnings for the log, for example about a collapse of training.
    """

    batches: Any
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    warnings: Sequence[str] = ()


class RolloutSource(NamedTuple):
    """The source of training batches that the model generates itself.

    Attributes:
        make: function (trained, frozen, step, k) that returns the batches of the k steps from `step`. The batches
            depend on these arguments only, so that a resumed run makes the same rollouts.
        during: context manager that is open while the task is trained, such as processes that `make` needs.
    """

    make: Callable[[Any, Any, int, int], Rollouts]
    during: AbstractContextManager[Any] = nullcontext()


class Task(NamedTuple):
    """The data, model and functions of one training run, which a task passes to the training loop.

    Attributes:
        tokenizer: the tokenizer, which is saved with the model.
        batches: function (step, k, rows) that returns the batches of the k steps from `step`, with leaves [k, B, ..].
            `rows` is a slice of the batch axis, or None for all rows. `batches` is a pure function, so that a resumed
            run needs no data loader state. If `rollouts` is set, only the shapes of these batches are used.
        describe_batch: function (step) that returns a line about the data in this step's batch, for error messages.
        validation: the validation data.
        build: function that builds `StepFunctions` from a config, whose hyperparameters may be tracers when several
            runs are vmapped in one program.
        start: the trained params before the first step, or a function (key) that initialises the trained params.
        frozen: params that the loss reads and the optimizer does not update.
        flops_per_token: FLOPs per token of a training step, for MFU.
        fingerprints: dict from the name of each data set or weights that a checkpoint depends on to a pair (hash, name
            of the setting that selects the data or weights).
        describe: function (number of trained parameters) that returns lines of text about data and model, which are
            printed before the first step.
        write: function (folder, trained, frozen, text files) that writes a self-contained model folder.
        rollouts: the source of batches that the model generates. None: the function `batches` makes the batches.
    """

    tokenizer: Tokenizer
    batches: Callable[[int, int, slice | None], Any]
    describe_batch: Callable[[int], str]
    validation: Validation
    build: Callable[[Config], StepFunctions]
    start: Any
    frozen: Any
    flops_per_token: float
    fingerprints: dict[str, tuple[str, str]]
    describe: Callable[[int], list[str]]
    write: Callable[[Path, Any, Any, dict[str, str]], None]
    rollouts: RolloutSource | None = None

    def functions(self, cfg: Config) -> StepFunctions:
        """Returns the `StepFunctions` for a config.

        If train.ema or train.average_last is set, the optimizer not only updates but also averages the trained params.
        """
        functions = self.build(cfg)
        return functions._replace(optimizer=with_average(functions.optimizer, cfg))

    def initial(self) -> tuple[Callable[[jax.Array, Any], Any], Any]:
        """Returns a pair (init, start), for which init(key, start) returns the trained params before the first step.

        The arrays in `start` are an argument of the function `init`, so that the arrays do not become constants of the
        compiled program.
        """
        if callable(self.start):
            return lambda key, start: self.start(key), None
        return lambda key, start: start, self.start


def resolve(written: Config, model: ModelConfig, size: int, per_step: int) -> Config:
    """Returns a copy of the config `written` that contains the model config `model` and the number of training steps.

    If `train.epochs` is set, the number of steps is computed from the size of the training data and the size of one
    batch, `per_step`. The size of the training data and the size of a batch are numbers of tokens in pretraining, and
    numbers of rows in fine-tuning.
    """
    train = dataclasses.replace(written.train, max_steps=written.train.steps(size, per_step))
    return dataclasses.replace(written, model=model, train=train)


def short_run(cfg: Config) -> str:
    """Returns a warning if all steps of a run are in the learning rate's warmup, or "" if the run has more steps.

    If `train.epochs` is not set, `config.check` refuses a run whose steps are all in the warmup. If `train.epochs` is
    set, `config.check` cannot refuse a run whose steps are all in the warmup, because the number of steps depends on
    the size of the data.
    """
    steps, warmup = cfg.train.max_steps, cfg.optim.warmup_steps
    if warmup < steps:
        return ""
    return (
        f"warning: the run has {steps:,} steps, but the warmup of the learning rate takes {warmup:,} "
        f"(optim.warmup_steps): set a larger train.epochs, or optim.warmup_steps=0"
    )


class Ready(NamedTuple):
    """The result of a task's function `prepare`.

    Attributes:
        cfg: the config, with the values that depend on the data filled in by `resolve`.
        task: the task that the training loop runs.
        held_out: the test data, which are passed to the task's function `evaluate`.
    """

    cfg: Config
    task: Task
    held_out: Any = None


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
