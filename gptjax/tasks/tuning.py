"""Functions that all fine-tuning tasks share: opening and loading the base model, and building the `Task`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import assets, tree, weights
from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError, complaints, did_you_mean_path
from gptjax.model.gpt import abstract_params, refuse_classifier
from gptjax.tasks.trainable import (
    Trainable,
    abstract_trained,
    frozen_share,
    partition,
    split_heads,
    step_functions,
    with_heads,
)
from gptjax.tokenizers import Tokenizer, chat
from gptjax.training.flops import flops_per_token
from gptjax.training.progress import Progress
from gptjax.training.task import Loss, RolloutSource, Task, Validation
from gptjax.types import Mean, Metrics, Params


def refuse_missing(cfg: Config) -> None:
    """Checks that the base model and the data exist, without reading the data or downloading anything.

    Raises:
        UserError: the base model or the data file is missing; the message lists all problems.
    """
    name, source, problems = cfg.finetune.base, getattr(cfg, cfg.task).source, []
    if cfg.task == "classify" and not source:
        problems.append("classify.source is missing: name a .csv, .tsv, .jsonl, .json or .parquet file, or hf:org/name")
    if source and not source.startswith("hf:") and not Path(source).expanduser().exists():
        problems.append(f"{cfg.task}.source={source}: no such file{did_you_mean_path(source)}")
    if not name.startswith("hf:") and name not in assets.ASSETS:
        problems += [f"finetune.base: {problem}" for problem in complaints(base_model, cfg)]
    if problems:
        raise UserError.all(problems)


def base_model(cfg: Config) -> weights.Model:
    """Opens the base model of a fine-tuning run, without reading its tensors.

    Raises:
        UserError: the base model does not exist, or is a classifier although the task is generative.
    """
    base = weights.open_model(cfg.finetune.base)
    if cfg.task != "classify":
        refuse_classifier(base.cfg, cfg.finetune.base, "name the model that it was made from")
    return base


def styled(base: weights.Model, style: chat.Style | None) -> tuple[Tokenizer, list[str]]:
    """Returns the base model's tokenizer with the chat template of `style`, and lines of text that describe the style.

    The lines of text that describe the chat style are made by `chat.describe_style`.
    """
    tokenizer = base.tokenizer()
    return chat.styled(tokenizer, style), chat.describe_style(tokenizer, style)


def longest_row(cfg: Config, model: ModelConfig) -> int:
    """Returns the maximum number of tokens per row of a fine-tuning task."""
    settings = getattr(cfg, cfg.task)
    most = settings.max_length if cfg.task == "classify" else settings.context_length
    return min(most or model.context_length, model.context_length)


def why_so_long(cfg: Config, model: ModelConfig) -> str:
    """Returns a part of an error message: the name of the setting that limits the number of tokens per row."""
    requested = getattr(cfg, cfg.task).context_length
    if requested > model.context_length:
        return f" (that of the base {cfg.finetune.base}; {cfg.task}.context_length is {requested})"
    return f" ({cfg.task}.context_length)"


def load_base(
    cfg: Config, base: weights.Model, heads: Params, key: jax.Array, progress: Progress
) -> tuple[Trainable, str]:
    """Loads the base model's params, and partitions the params and the new heads into trained and frozen params.

    The setting `finetune.trainable` selects the trained params.

    Returns:
        (trained and frozen params as a `Trainable`, fingerprint of the base model's weights).
    """
    with progress.phase("loading the base"):
        params = base.params("float32", None)
    fingerprint = weights.fingerprint(params)
    return partition(cfg, params, heads, cfg.model, key, fingerprint), fingerprint


def make_task(
    cfg: Config,
    trainable: Trainable,
    *,
    fingerprint: str,
    tokenizer: Tokenizer,
    loss: Callable[[Config], Loss],
    batch: Callable[[int], Any],
    eval_batches: Callable[[], Iterable[Any]] = tuple,
    width: int,
    data: str,
    lines: Sequence[str],
    describe_batch: Callable[[int], str | None] = lambda step: None,
    files: dict[str, str] | None = None,
    score: Callable[[Params], tuple[Mean, Metrics]] | None = None,
    rollouts: RolloutSource | None = None,
) -> Task:
    """Builds the `Task` of a fine-tuning run.

    Args:
        cfg: the config, with the values filled in that depend on the data.
        trainable: the base model, partitioned into trained and frozen params.
        fingerprint: hash of the base model's weights.
        loss: function that builds the loss function from a config; the config's dropout rate may be a tracer.
        batch: function that maps a step to the batch of this step.
        eval_batches: function that returns the validation batches.
        width: number of tokens per row.
        data: hash of the training and validation data.
        lines: lines of text that describe the data, printed before the first step.
        describe_batch: function that maps a step to a line of text about the batch of this step, as in `Task`, or to
            None for a line that shows the batch's first tokens.
        files: further text files to write into the model's folder, as a dict from file name to text.
        score: the function `Validation.score`, or None for an evaluation by the loss on `eval_batches`.
        rollouts: the source of batches that the model generates, or None.
    """
    model, shapes = cfg.model, abstract_params(cfg.model)
    n_params, base_shapes = tree.size(shapes), split_heads(shapes)[0]
    share = frozen_share(cfg, n_params, tree.size(trainable.params))
    base, source = _base_reference(cfg, fingerprint), getattr(cfg, cfg.task).source
    # A closure over `trainable` would keep the initial weights in memory after training has replaced these weights.
    combine, merge, export = trainable.combine, trainable.merge, trainable.export

    def batches(step: int, k: int, rows: slice | None) -> Any:
        steps = [batch(step + i) for i in range(k)]
        return jax.tree.map(lambda *leaves: np.stack(leaves)[:, rows or slice(None)], *steps)

    def first_tokens(step: int) -> str:
        return f"the batch begins with {tokenizer.decode(batch(step).tokens[0, :20].tolist())!r}"

    def write(folder: Path, trained: Params, frozen: Params, texts: dict[str, str]) -> None:
        weights.save(
            folder, merge(trained, frozen) if base is None else with_heads(trained), model, tokenizer,
            texts | (files or {}), add=lambda partial: export(partial / "adapter", trained, frozen),
            twin=folder.with_name("best"), base=base,
        )  # fmt: skip

    return Task(
        tokenizer=tokenizer,
        batches=batches,
        describe_batch=lambda step: describe_batch(step) or first_tokens(step),
        validation=Validation(lambda first: eval_batches(), score=score),
        build=lambda cfg: step_functions(cfg, loss(cfg), combine),
        start=trainable.params,
        frozen=trainable.frozen,
        flops_per_token=flops_per_token(model, base_shapes, width=width, frozen=share),
        fingerprints={
            "base": (fingerprint, f"finetune.base={cfg.finetune.base}"), "data": (data, f"{cfg.task}.source={source}"),
        },
        describe=lambda n_trained: [*lines, *_describe(cfg, n_params, n_trained)],
        write=write,
        rollouts=rollouts,
    )  # fmt: skip


def _base_reference(cfg: Config, fingerprint: str) -> dict[str, Any] | None:
    """Returns a dict that is saved with an adapter to identify the adapter's base model.

    The dict that identifies the base model has the fields of `weights.native.Base`. The function returns None if the
    run saves all weights of the model instead of an adapter.
    """
    name, save_merged = cfg.finetune.base, cfg.finetune.save_merged
    if cfg.finetune.trainable != "lora" or cfg.lora.init != "lora" or save_merged:
        return None
    shared = name.startswith("hf:") or (name in assets.ASSETS and not Path(name).exists())
    if not shared and save_merged is None:
        return None
    source = name if shared else str(Path(name).expanduser().absolute())
    base = weights.native.Base(source, fingerprint, cfg.finetune.quantize, cfg.lora)
    return base._asdict() | {"lora": dataclasses.asdict(cfg.lora)}


def plan(cfg: Config, base: weights.Model, model: ModelConfig) -> str:
    """Returns a line of text with the base model, its number of parameters, and the number of trained parameters."""
    shapes = abstract_params(model)
    n, n_trained = tree.size(shapes), tree.size(abstract_trained(cfg, *split_heads(shapes), model))
    return f"base               {base.location}: {n:,} parameters, {n_trained:,} trained ({n_trained / n:.2%})"


def _describe(cfg: Config, n_params: int, n_trained: int) -> list[str]:
    share = f"{n_trained:,} trained ({n_trained / n_params:.2%})"
    lines = [f"model   {cfg.finetune.base}: {n_params:,} parameters, {share}"]
    if cfg.finetune.trainable == "lora":
        scale = f"scale {cfg.lora.scale:g} ({cfg.lora.scaling}, alpha {cfg.lora.alpha:g})"
        lines.append(f"lora    rank {cfg.lora.rank}, {'MiSS' if cfg.lora.miss else scale}, {cfg.lora.targets}")
    rate = f"lr {cfg.optim.lr:g}, {cfg.train.max_steps:,} steps of {cfg.train.batch_size} rows"
    return [*lines, f"train   {cfg.optim.name}, {rate}"]
