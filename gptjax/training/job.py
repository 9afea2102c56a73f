"""What a run is about: all that the loop does not know. Pretraining and every kind of fine-tuning are one of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.types import Mean, Metrics

Rules = tuple[Callable[[Any, Any, Any], tuple[Mean, Metrics]], Callable[[Any, Any], Any], Any]


def just_trained(trained: Any, frozen: Any) -> Any:
    return trained


class Job(NamedTuple):
    """Functions and facts of one run.

    tokenizer
    batch, batches    step -> a batch; (step, k) -> k of them, stacked. Pure functions: resuming needs no more
    part              (step, k, rows) -> `batches` of those rows alone; None: made whole, then cut
    where             step -> where its data lies, for a message
    eval_batches      first -> the whole validation set; a part of it is enough where `first`
    first_eval_share  how large that part is, of the whole
    loss              (params, batch, key) -> (Mean, metrics)
    init              (key, start) -> what is trained; `start` comes as an argument, so that it is no constant
    frozen            what the loss reads and the optimizer never sees
    combine           (trained, frozen) -> the params that the loss reads
    optimizer         of what is trained
    rules             config -> (loss, combine, optimizer) under its numbers, which may be traced; of `prepare`'s own
                      config the three above. None: the job is of several configs
    tokens_per_step   for rates; flops_per_token: of a training step, for MFU
    identity          name -> hash of what a checkpoint belongs to; source: the settings that name it
    describe          number of trained parameters -> lines about data and model, said before the first step
    more_of_loss      validation loss -> what follows from it, by name
    sample            params -> texts the model writes; None: none
    lead              sides of a batch's leaves before the rows
    write             (folder, trained, frozen, text files): the model, in a folder that needs nothing else
    """

    tokenizer: Any
    batch: Callable[[int], Any]
    batches: Callable[[int, int], Any]
    where: Callable[[int], str]
    eval_batches: Callable[[bool], Iterable[Any]]
    loss: Callable[[Any, Any, Any], tuple[Mean, Metrics]]
    init: Callable[[Any, Any], Any]
    optimizer: Any
    tokens_per_step: int
    flops_per_token: float
    identity: dict[str, str]
    source: str
    describe: Callable[[int], list[str]]
    write: Callable[[Path, Any, Any, dict[str, str]], None]
    start: Any = None
    frozen: Any = None
    combine: Callable[[Any, Any], Any] = just_trained
    more_of_loss: Callable[[float], dict[str, Any]] = lambda loss: {}
    sample: Callable[[Any], list[str]] | None = None
    part: Callable[[int, int, slice], Any] | None = None
    lead: int = 0
    rules: Callable[[Any], Rules] | None = None
    first_eval_share: float = 1.0
