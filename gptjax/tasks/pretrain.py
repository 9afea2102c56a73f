"""Pretraining: trains a model to predict the next token of text, from scratch or from a base model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import assets, config, data, losses, weights
from gptjax._moved import moved_name, old_task
from gptjax.config import Config, TokenizerConfig
from gptjax.data.loader import ORDER_OF_WINDOWS
from gptjax.errors import UserError, complaints
from gptjax.generation import from_config, generate, prompt_ids
from gptjax.model.gpt import abstract_params, init_params, refuse_classifier
from gptjax.optim import make_optimizer
from gptjax.tokenizers import Tokenizer
from gptjax.training.flops import flops_per_token
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.task import Loss, Ready, StepFunctions, Task, Validation, identity, resolve
from gptjax.types import Batch, Params

# In continued pretraining, a window of text has BASE_WINDOW tokens by default, but at most as many tokens as the base
# model's context.
BASE_WINDOW = 1024
# An evaluation batch has at least about EVAL_TOKENS tokens.
EVAL_TOKENS = 4096
# The evaluation before the first training step uses about FIRST_EVAL_TOKENS tokens.
FIRST_EVAL_TOKENS = 16_384


def prepare(cfg: Config, progress: Progress) -> Ready:
    """Tokenises the text, or reads the tokens from the cache, and builds the pretraining task."""
    cfg, base = from_base(cfg)
    with progress.phase("preparing the data"):
        ready = data.prepare(cfg, base.tokenizer() if base else None, log=progress.say)
    model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or ready.tokenizer.vocab_size)
    resolved = resolve(cfg, model, len(ready.train), cfg.train.batch_size * cfg.window)
    config.validate(resolved)
    return Ready(resolved, _task(resolved, ready, base))


def evaluate(result: TrainResult, held_out: None, say: Callable[[str], None]) -> None:
    """Does nothing, because pretraining has no test data. The score of a pretraining run is its validation loss."""


def loss(cfg: Config) -> Loss:
    return losses.next_token(cfg.model)


def batch_shapes(cfg: Config, rows: int, width: int) -> Batch:
    ids, counts = (jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (np.int32, np.float32))
    return Batch(ids, ids, counts, ids, ids) if cfg.data.document_mask else Batch(ids, ids)


def refuse_missing(cfg: Config) -> None:
    """Checks that the data, the tokenizer and the base model exist, without reading text or downloading anything.

    Raises:
        UserError: data, tokenizer or base model are missing, or the model has a classification head. The error message
            lists all problems.
    """
    problems, base = complaints(data.refuse_missing, cfg), cfg.pretrain.base
    if cfg.model.n_classes:
        problems.append(f"model.n_classes={cfg.model.n_classes}: expected 0; gptjax finetune classify adds the classes")
    if base is not None and not base.startswith("hf:") and base not in assets.ASSETS:
        problems += [f"pretrain.base: {problem}" for problem in complaints(from_base, cfg)]
    if problems:
        raise UserError.all(problems)


def from_base(cfg: Config) -> tuple[Config, weights.Model | None]:
    """Opens the base model of continued pretraining, and copies its architecture and tokenizer into the config.

    Returns:
        The config with the base model's architecture and tokenizer, and with the window length filled in; and the base
        model, whose tensors are not read yet. If `pretrain.base` is None, returns (cfg, None).

    Raises:
        UserError: the base model does not exist, is a classifier, or has a context shorter than the window.
    """
    if cfg.pretrain.base is None:
        return cfg, None
    base = weights.open_model(cfg.pretrain.base)
    refuse_classifier(base.cfg, cfg.pretrain.base, "name the model that it was made from")
    model = base.cfg.computed_as(cfg.model)
    window = cfg.pretrain.context_length or min(model.context_length, BASE_WINDOW)
    cfg = dataclasses.replace(
        cfg, model=model, tokenizer=TokenizerConfig(name=cfg.pretrain.base),
        pretrain=dataclasses.replace(cfg.pretrain, context_length=window),
    )  # fmt: skip
    config.validate(cfg)
    return cfg, base


def _task(cfg: Config, ready: data.Prepared, base: weights.Model | None) -> Task:
    """Builds the `Task` of a pretraining run.

    Raises:
        UserError: the prompt for the text samples is invalid.
    """
    model, settings, val = cfg.model, cfg.train, ready.val
    try:
        prompt = prompt_ids(ready.tokenizer, cfg.sample.prompt)
    except UserError as error:
        raise UserError(f"sample.prompt: {error}") from error
    loader = data.Loader(
        ready.train, cfg.data, batch_size=settings.batch_size, context_length=cfg.window,
        seed=cfg.seed, vocab_size=ready.tokenizer.vocab_size,
    )  # fmt: skip
    start = base.params("float32", None) if base else None
    tokens_per_step = settings.batch_size * cfg.window

    rows = max(settings.batch_size // settings.accumulation, EVAL_TOKENS // cfg.window)
    n_batches = -(-(len(val) - 1) // (rows * cfg.window))
    # The evaluation before the first training step uses at least two batches. The evaluation time per batch is measured
    # without the first batch, because the time of the first batch includes compilation.
    first_batches = min(n_batches, max(2, FIRST_EVAL_TOKENS // (rows * cfg.window)))

    def eval_batches(first: bool) -> Iterator[Batch]:
        sizes = dict(context_length=cfg.window, batch_size=rows)
        batches = data.eval_batches(val, **sizes, document_mask=cfg.data.document_mask)
        return itertools.islice(batches, first_batches if first else None)

    def describe_batch(step: int) -> str:
        starts = ", ".join(map(str, loader.starts(step)[:4]))
        return f"the windows of this batch start at tokens {starts} ... of the training text"

    def derived_metrics(loss: float) -> dict[str, float]:
        bits = {"bits_per_byte": loss / math.log(2) * val.n_targets / val.n_bytes} if val.n_bytes else {}
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, **bits}

    def write(folder: Path, params: Params, frozen: None, files: dict[str, str]) -> None:
        weights.save(folder, params, model, ready.tokenizer, files, twin=folder.with_name("best"))

    def describe(n_params: int) -> list[str]:
        tokens = settings.max_steps * tokens_per_step
        return [
            f"data    {', '.join(cfg.data.source)}: {len(ready.train):,} tokens to train on, "
            f"{len(val):,} held out; tokenizer {ready.tokenizer.name}, {ready.tokenizer.vocab_size:,} ids",
            f"model   {model.arch}, {model.n_layer} layers, {model.n_head} heads, d_model {model.d_model}, "
            f"context {model.context_length}: {n_params:,} parameters, {model.dtype}",
            *([f"base    {cfg.pretrain.base}, windows of {cfg.window} tokens"] if base else []),
            f"train   {cfg.optim.name}, lr {cfg.optim.lr:g}, {settings.max_steps:,} steps of {tokens_per_step:,} "
            f"tokens = {tokens:,} tokens, {tokens / max(len(ready.train), 1):.2f} epochs",
        ]

    text, vocabulary = f"data.source={','.join(cfg.data.source)}", f"tokenizer.name={cfg.tokenizer.name}"
    return Task(
        tokenizer=ready.tokenizer,
        batches=lambda step, k, rows: loader.batches(step, k, rows or slice(None)),
        describe_batch=describe_batch,
        validation=Validation(
            eval_batches,
            first_batches / n_batches,
            derived_metrics,
            sample=sampling(cfg, ready.tokenizer, [prompt] * cfg.sample.n),
        ),
        build=lambda cfg: StepFunctions(loss(cfg), identity, make_optimizer(cfg.optim, cfg.train.max_steps)),
        start=(lambda key: init_params(key, model)) if start is None else start,
        frozen=None,
        flops_per_token=flops_per_token(model, abstract_params(model), width=cfg.window),
        fingerprints={
            "tokenizer": (ready.tokenizer.fingerprint, vocabulary),
            "order of windows": (ORDER_OF_WINDOWS, text),
            "training data": (ready.train.fingerprint, text),
            "validation data": (val.fingerprint, text),
            **({} if start is None else {"base": (weights.fingerprint(start), f"pretrain.base={cfg.pretrain.base}")}),
        },
        describe=describe,
        write=write,
    )


def sampling(cfg: Config, tokenizer: Tokenizer, prompts: list[list[int]]) -> Callable[[Params], list[str]]:
    """Returns a function that takes params, and generates a continuation of each prompt with the settings `cfg.sample`.

    The returned function generates one text per prompt. Each generated text begins with its prompt.
    """
    settings = cfg.sample

    def sample(params: Params) -> list[str]:
        new = generate(
            params, prompts, cfg.model, max_new_tokens=settings.max_new_tokens, key=jax.random.key(settings.seed),
            sampler=from_config(settings), stop=() if tokenizer.eot_id is None else (tokenizer.eot_id,),
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        texts = zip(prompts, new, strict=True)
        return [tokenizer.decode(prompt + ids) for prompt, ids in texts]

    return sample


def __getattr__(name: str) -> Any:
    """Returns the function of `gptjax.losses` that a deprecated name of this module refers to.

    The name `task` refers to the function `task(cfg)` of earlier releases, which returns a namespace of the functions
    prepare, init and loss.
    """
    new = moved_name(__name__, name)
    return old_task(new, init_params) if name == "task" else new
