"""What a run is about: all that the training loop does not know. `gptjax.tasks` makes one for each kind of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from gptjax.config import Config, ModelConfig
from gptjax.tokenizers import Tokenizer
from gptjax.training.step import Loss
from gptjax.types import Params


def just_trained(trained: Any, frozen: Any) -> Any:
    return trained


class Rules(NamedTuple):
    """What a step is made of.

    loss        (params, batch, key) -> (Mean, metrics)
    combine     (trained, frozen) -> the params that the loss reads; LoRA attaches here
    optimizer   of what is trained
    """

    loss: Loss
    combine: Callable[[Any, Any], Any]
    optimizer: optax.GradientTransformation


class Validation(NamedTuple):
    """The text that is held out to choose the best model by.

    batches       first -> all of its batches; before the first step a part of them is enough (`first`)
    first_share   how large that part is, of the whole
    more          loss -> what follows from it, such as perplexity
    """

    batches: Callable[[bool], Iterable[Any]]
    first_share: float = 1.0
    more: Callable[[float], dict[str, float]] = lambda loss: {}


class Task(NamedTuple):
    """Functions and facts of one run.

    tokenizer
    batches           (step, k, rows) -> the batches of steps step .. step + k - 1, leaves [k, B, ..], of which only
                      the rows of that slice; None: all rows. A pure function: resuming needs no more
    where             step -> where the data of that step lies, for an error
    validation
    build             config -> `Rules`; its numbers may be traced, when several runs go in one program
    start             what is trained, before the first step; or key -> that
    frozen            what the loss reads and the optimizer never sees
    flops_per_token   of a training step, for MFU
    identity          name -> (hash of what a checkpoint belongs to, the setting that names it)
    describe          number of trained parameters -> lines about data and model, said before the first step
    write             (folder, trained, frozen, text files): writes the model, in a folder that needs nothing else
    sample            params -> texts that the model writes, after each evaluation; None: none
    """

    tokenizer: Tokenizer
    batches: Callable[[int, int, slice | None], Any]
    where: Callable[[int], str]
    validation: Validation
    build: Callable[[Config], Rules]
    start: Any
    frozen: Any
    flops_per_token: float
    identity: dict[str, tuple[str, str]]
    describe: Callable[[int], list[str]]
    write: Callable[[Path, Any, Any, dict[str, str]], None]
    sample: Callable[[Params], list[str]] | None = None

    def initial(self) -> tuple[Callable[[jax.Array, Any], Any], Any]:
        """(key, start) -> what is trained, and that start: arrays are an argument, so that no program holds them."""
        if callable(self.start):
            return lambda key, start: self.start(key), None
        return lambda key, start: start, self.start


def resolve(written: Config, model: ModelConfig, size: int, per_step: int) -> Config:
    """The config with what only the data can tell: the model's sizes, and the steps that `train.epochs` are over
    `size` tokens or rows, `per_step` at a time."""
    train = dataclasses.replace(written.train, max_steps=written.train.steps(size, per_step))
    return dataclasses.replace(written, model=model, train=train)


class Ready(NamedTuple):
    """What `prepare` makes of a config.

    cfg        the config as `resolve` gives it
    task
    held_out   what the trained model is scored on, as the task's own `evaluate` takes it
    """

    cfg: Config
    task: Task
    held_out: Any = None
