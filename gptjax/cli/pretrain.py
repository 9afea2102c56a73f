"""`gptjax pretrain`: trains a model, or with --dry-run prints a report of what the run would do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gptjax.cli import options
from gptjax.config import Config

if TYPE_CHECKING:
    from gptjax.data import Prepared
    from gptjax.weights import Model

# If the command line names no preset, the preset is FROM_BASE if the command line sets pretrain.base, and DEFAULT
# otherwise.
DEFAULT, FROM_BASE = "shakespeare-char", "continue"


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=1)
    default = FROM_BASE if any(leaf.key == "pretrain.base" for leaf in parsed.leaves) else DEFAULT
    cfg, provenance = options.configure(parsed, default, "pretrain", "pretrain")
    if options.show_only(parsed, cfg, provenance, lambda cfg: options.report(cfg, plan)):
        return 0
    from gptjax.tasks import train

    return train(cfg).exit_code


def plan(cfg: Config) -> list[str]:
    """Returns the lines of the report of a dry run, which show the data, the number of parameters, the number of steps
    and the estimated memory."""
    from gptjax import tree
    from gptjax.model.gpt import abstract_params
    from gptjax.tasks.pretrain import from_base
    from gptjax.training.memory import memory_bytes

    cfg, base = from_base(cfg)
    data, problem = _prepared(cfg, base)
    vocab_size = cfg.model.vocab_size or (data.tokenizer.vocab_size if data else 0)
    tokens, lines = cfg.train.batch_size * cfg.window, []
    if base:
        lines.append(f"base               {base.location}: {base.kind}, context {cfg.model.context_length:,}")
    if data:
        lines += [
            f"data               {len(data.train):,} tokens to train, {len(data.val):,} to validate",
            f"tokenizer          {data.tokenizer.name}, vocabulary of {data.tokenizer.vocab_size:,}",
        ]
    else:
        lines += [f"data               not read: {problem}"]
    if vocab_size:
        n_params = tree.size(abstract_params(dataclasses.replace(cfg.model, vocab_size=vocab_size)))
        lines.append(f"parameters         {n_params:,}")
    else:
        lines.append("parameters         unknown without the tokenizer's vocabulary (or model.vocab_size)")
    lines.append(f"tokens per step    {tokens:,} ({cfg.train.batch_size} windows of {cfg.window})")
    lines.append(f"steps              {_steps(cfg, data, tokens)}")
    if vocab_size:
        memory = memory_bytes(cfg, n_params, vocab_size)
        terms = ", ".join(f"{name} {options.human(size)}" for name, size in memory.items())
        lines.append(f"memory (estimate)  {options.human(sum(memory.values()))}: {terms}")
    return lines


def _prepared(cfg: Config, base: Model | None) -> tuple[Prepared | None, str]:
    """Returns a pair (tokenized data, problem) for a dry run. A dry run downloads nothing: if the data cannot be
    prepared without a download, the tokenized data is None and `problem` says what would be downloaded; otherwise
    `problem` is ""."""
    from gptjax import assets, data

    for source in (*cfg.data.source, *cfg.data.val_source):
        if source.startswith("hf:"):
            return None, f"{source} would be downloaded"
        if source in assets.ASSETS and not assets.status(source).cached:
            return None, f"{source} is not in the cache yet; `gptjax data prepare` fetches it"
    return data.prepare(cfg, base and base.tokenizer(), log=options.note), ""


def _steps(cfg: Config, data: Prepared | None, tokens_per_step: int) -> str:
    if data is None:
        return f"{cfg.train.epochs:g} epochs" if cfg.train.epochs else f"{cfg.train.max_steps:,}"
    if cfg.train.epochs:
        return f"{round(cfg.train.epochs * len(data.train) / tokens_per_step):,}: {cfg.train.epochs:g} epochs"
    epochs = cfg.train.max_steps * tokens_per_step / max(len(data.train), 1)
    return f"{cfg.train.max_steps:,}: {cfg.train.max_steps * tokens_per_step:,} tokens, {epochs:.2f} epochs"
