"""What every fine-tuning shares: the base, how its data is divided, and the task made of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import assets, tree, weights
from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError, complaints
from gptjax.model.gpt import abstract_params, refuse_classifier
from gptjax.tasks import trainable
from gptjax.tasks.trainable import Trainable
from gptjax.tokenizers import Tokenizer, chat
from gptjax.training.flops import flops_per_token
from gptjax.training.progress import Progress
from gptjax.training.task import Loss, Task, Validation
from gptjax.types import Params


def refuse_missing(cfg: Config) -> None:
    """A cheap look before the data is read; nothing is fetched.

    Raises:
        UserError: a base or a file of data that is not there, both at once.
    """
    name, source, problems = cfg.finetune.base, getattr(cfg, cfg.task).source, []
    if cfg.task == "classify" and not source:
        problems.append("classify.source is missing: name a .csv, .tsv, .jsonl or .parquet file, or hf:org/name")
    if source and not source.startswith("hf:") and not Path(source).expanduser().exists():
        problems.append(f"{cfg.task}.source={source}: no such file")
    if not name.startswith("hf:") and name not in assets.ASSETS:
        problems += [f"finetune.base: {problem}" for problem in complaints(base_model, cfg)]
    if problems:
        raise UserError.all(problems)


def base_model(cfg: Config) -> weights.Model:
    """The base of a fine-tuning, before any tensor is read.

    Raises:
        UserError: no such model, or a classifier whose answers would be trained.
    """
    found = weights.open_model(cfg.finetune.base)
    if cfg.task != "classify":
        refuse_classifier(found.cfg, cfg.finetune.base, "name the model that it was made from")
    return found


def styled(base: weights.Model, style: chat.Style | None) -> tuple[Tokenizer, list[str]]:
    """The base's tokenizer with the template of the style, as the tuned model will have it, and lines that say so."""
    tokenizer = base.tokenizer()
    return chat.styled(tokenizer, style), chat.describe_style(tokenizer, style)


def longest_row(cfg: Config, model: ModelConfig) -> int:
    """The most tokens that a row of the task can have."""
    settings = getattr(cfg, cfg.task)
    most = settings.max_length if cfg.task == "classify" else settings.context_length
    return min(most or model.context_length, model.context_length)


def why_so_long(cfg: Config, model: ModelConfig) -> str:
    """Where the number of `longest_row` comes from, for an error."""
    asked = getattr(cfg, cfg.task).context_length
    if asked > model.context_length:
        return f" (that of the base {cfg.finetune.base}; {cfg.task}.context_length is {asked})"
    return f" ({cfg.task}.context_length)"


def load_base(
    cfg: Config, found: weights.Model, heads: Params, key: jax.Array, progress: Progress
) -> tuple[Trainable, str]:
    """The base's weights, taken apart with the new heads by `trainable.partition`, and their fingerprint."""
    with progress.phase("loading the base"):
        params = found.params("float32", None)
    fingerprint = weights.fingerprint(params)
    return trainable.partition(cfg, params, heads, cfg.model, key, fingerprint), fingerprint


def make_task(
    cfg: Config,
    parts: Trainable,
    *,
    fingerprint: str,
    tokenizer: Tokenizer,
    loss: Callable[[Config], Loss],
    batch: Callable[[int], Any],
    eval_batches: Callable[[], Iterable[Any]],
    width: int,
    data: str,
    lines: Sequence[str],
    where: Callable[[int], str] | None = None,
    files: dict[str, str] | None = None,
) -> Task:
    """The task of a fine-tuning, from what only its kind knows.

    Args:
        cfg: resolved. fingerprint: of the base. loss: what the config, whose dropout may be traced, makes of it.
        batch: step -> its batch. width: tokens of a row. data: hash of what is trained and validated on.
        lines: about the data, for the start. where: as of `Task`; None: the batch's first tokens.
        files: beside the model.
    """
    model, shapes = cfg.model, abstract_params(cfg.model)
    n_params, base_shapes = tree.size(shapes), trainable.split_heads(shapes)[0]
    share = trainable.frozen_share(cfg, n_params, tree.size(parts.params))
    base, source = _base_to_name(cfg, fingerprint), getattr(cfg, cfg.task).source
    # not `parts`, which would keep the weights that training replaces
    combine, merge, export = parts.combine, parts.merge, parts.export

    def batches(step: int, k: int, rows: slice | None) -> Any:
        some = [batch(step + i) for i in range(k)]
        return jax.tree.map(lambda *leaves: np.stack(leaves)[:, rows or slice(None)], *some)

    def first_tokens(step: int) -> str:
        return f"the batch begins with {tokenizer.decode(batch(step).tokens[0, :20].tolist())!r}"

    def write(folder: Path, trained: Params, frozen: Params, texts: dict[str, str]) -> None:
        weights.save(
            folder, merge(trained, frozen) if base is None else trainable.with_heads(trained), model, tokenizer,
            texts | (files or {}), add=lambda partial: export(partial / "adapter", trained, frozen),
            twin=folder.with_name("best"), base=base,
        )  # fmt: skip

    return Task(
        tokenizer=tokenizer,
        batches=batches,
        where=where or first_tokens,
        validation=Validation(lambda first: eval_batches()),
        build=lambda cfg: trainable.rules(cfg, loss(cfg), combine),
        start=parts.params,
        frozen=parts.frozen,
        flops_per_token=flops_per_token(model, base_shapes, width=width, frozen=share),
        identity={
            "base": (fingerprint, f"finetune.base={cfg.finetune.base}"), "data": (data, f"{cfg.task}.source={source}"),
        },
        describe=lambda n_trained: [*lines, *_describe(cfg, n_params, n_trained)],
        write=write,
    )  # fmt: skip


def _base_to_name(cfg: Config, fingerprint: str) -> dict[str, Any] | None:
    """What `weights.save` writes where the adapter is kept alone; None where the merged weights are."""
    name, asked = cfg.finetune.base, cfg.finetune.save_merged
    if cfg.finetune.trainable != "lora" or cfg.lora.init != "lora" or asked:
        return None
    shared = name.startswith("hf:") or (name in assets.ASSETS and not Path(name).exists())
    if not shared and asked is None:
        return None
    source = name if shared else str(Path(name).expanduser().absolute())
    base = weights.native.Base(source, fingerprint, cfg.finetune.quantize, cfg.lora)
    return base._asdict() | {"lora": dataclasses.asdict(cfg.lora)}


def plan(cfg: Config, found: weights.Model, model: ModelConfig) -> str:
    """A line on the base and what of it would be trained, from shapes."""
    shapes = abstract_params(model)
    n, n_trained = tree.size(shapes), tree.size(trainable.abstract_trained(cfg, *trainable.split_heads(shapes), model))
    return f"base               {found.location}: {n:,} parameters, {n_trained:,} trained ({n_trained / n:.2%})"


def _describe(cfg: Config, n_params: int, n_trained: int) -> list[str]:
    share = f"{n_trained:,} trained ({n_trained / n_params:.2%})"
    lines = [f"model   {cfg.finetune.base}: {n_params:,} parameters, {share}"]
    if cfg.finetune.trainable == "lora":
        lines.append(
            f"lora    rank {cfg.lora.rank}, scale {cfg.lora.scale:g} ({cfg.lora.scaling}, alpha {cfg.lora.alpha:g}), "
            f"{cfg.lora.targets}"
        )
    rate = f"lr {cfg.optim.lr:g}, {cfg.train.max_steps:,} steps of {cfg.train.batch_size} rows"
    return [*lines, f"train   {cfg.optim.name}, {rate}"]
