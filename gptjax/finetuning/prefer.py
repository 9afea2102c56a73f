"""Fine-tuning on preferences: pairs, their log-probabilities before training, run, and what held-out pairs say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from gptjax.config import Config, ModelConfig
from gptjax.data import loader, preferences
from gptjax.data.preferences import PairRows
from gptjax.files import use_json, write_json
from gptjax.finetuning import base
from gptjax.parallel.distributed import is_writer
from gptjax.tasks import prefer
from gptjax.training.job import Job
from gptjax.training.loop import TrainResult, run_job
from gptjax.training.step import evaluate
from gptjax.types import Params

RESULTS = "test.json"


def run(cfg: Config, log: Callable[[str], None] | None = None) -> TrainResult:
    """Train, then `finish`."""
    held: list[Any] = []
    result = run_job(cfg, lambda cfg, progress: prepare(cfg, progress, held), log, base.refuse_missing)
    return finish(result, log or print, held) if is_writer() else result


def finish(result: TrainResult, say: Callable[[str], None], held: list[Any] | None = None) -> TrainResult:
    """Score the held-out pairs: loss, how often the chosen answer has the larger reward, by how much.

    Args:
        held: rows and reference of the test pairs, which only the base before training can give; None: made again.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        if not held:
            held = []
            prepare(result.cfg, SimpleNamespace(phase=lambda name: nullcontext()), held)
        rows, reference = held
        batches = preferences.eval_batches(rows, result.cfg.train.batch_size, reference)
        mean, metrics = evaluate(jax.jit(loss(result.cfg)), result.params, batches)
        scores = {"pairs": int(mean.weight), "loss": mean.value()} | {k: v.value() for k, v in metrics.items()}
        write_json(file, scores)
    say(use_json(file, summary))
    return result


def summary(scores: dict[str, Any]) -> str:
    return (
        f"test    {scores['pairs']} held-out pairs: the chosen answer is preferred in {scores['accuracy']:.1%}, "
        f"margin {scores['margin']:.3f}, loss {scores['loss']:.4f}"
    )


def pairs(cfg: Config, notes: list[str] | None = None) -> base.Thirds:
    """To train, validate and test on. notes: as of `instructions.read`."""
    return base.thirds(cfg.prefer, cfg.seed, preferences.read, preferences.of_skills, notes)


def loss(cfg: Config) -> Callable:
    return prefer.task(cfg.model, cfg.prefer.loss, beta=cfg.prefer.beta, margin=cfg.prefer.margin).loss


def _rows(cfg: Config, part: list[Any], tokenizer: Any, model: ModelConfig) -> tuple[PairRows, int]:
    """The rows of a part, and how many pairs did not fit."""
    width = base.longest_row(cfg, model)
    encoded = preferences.encode(part, tokenizer, context_length=width, because=base.why_so_long(cfg, model))
    packed = cfg.prefer.packing == "packed"
    return preferences.rows(encoded, width if packed else None, packed), encoded.dropped


def prepare(cfg: Config, progress: Any, held: list[Any] | None = None) -> tuple[Config, Job]:
    found = base.base_model(cfg)
    size, notes = cfg.train.batch_size, list[str]()
    model = base.model_config(cfg, found.cfg)
    with progress.phase("preparing the data"):
        tokenizer, about_style = base.styled(found, cfg.prefer.style)
        parts_of_data = pairs(cfg, notes)
        rows, dropped = zip(*(_rows(cfg, part, tokenizer, model) for part in parts_of_data), strict=True)
    train, val, test = rows
    steps = cfg.train.steps(len(train.tokens), size)
    cfg = dataclasses.replace(cfg, model=model, train=dataclasses.replace(cfg.train, max_steps=steps))
    with progress.phase("loading the base"):
        params = found.params("float32", None)
    parts = base.parts(cfg, params, {}, model, jax.random.key(cfg.seed), train.tokens.shape[1])
    before: list[Any] = [None] * 3
    if cfg.prefer.loss in prefer.NEEDS_REFERENCE:
        with progress.phase("scoring the pairs before training"):
            start = parts.combine(parts.trained, parts.frozen)
            before = [reference(start, part, model, size) for part in rows]
    if held is not None:
        held[:] = [test, before[2]]

    def batch(step: int) -> preferences.PairBatch:
        return preferences.batch(train, step, batch_size=size, seed=cfg.seed, reference=before[0])

    def where(step: int) -> str:
        return f"the batch begins with {tokenizer.decode(batch(step).tokens[0, :20].tolist())!r}"

    counts = " + ".join(f"{len(part):,}" for part in parts_of_data)
    lines = [
        f"data    {cfg.prefer.source or 'synthetic skills'}: {counts} pairs to train, validate and test on",
        f"        {len(train.tokens):,} rows of {train.tokens.shape[1]} tokens, {(train.segment_ids > 0).mean():.0%} "
        f"full; {sum(dropped)} pairs do not fit and are left out",
        *(f"        {note}" for note in notes),
        *about_style,
    ]
    return cfg, base.job(
        cfg,
        parts,
        model=model,
        tokenizer=tokenizer,
        loss=loss,
        batch=batch,
        where=where,
        eval_batches=lambda first: preferences.eval_batches(val, size, before[1]),
        tokens_per_step=size * train.tokens.shape[1],
        data=loader.fingerprint(*train, *val),
        lines=lines,
    )


def reference(params: Params, rows: PairRows, cfg: ModelConfig, batch_size: int) -> np.ndarray:
    """[pairs, 2] float32: log-probabilities of the chosen and the rejected answer of each pair."""
    scored = jax.jit(lambda params, batch: prefer.log_probs(params, batch, cfg)[0])
    found = [scored(params, batch) for batch in preferences.eval_batches(rows, batch_size)]
    here = rows.pairs >= 0
    out = np.zeros((int(here.sum()), 2), np.float32)
    out[rows.pairs[here]] = np.concatenate(found)[: len(rows.pairs)][here]
    return out


def plan(cfg: Config) -> list[str]:
    """What a run would do, for --dry-run."""
    notes: list[str] = []
    parts, found = pairs(cfg, notes), base.base_model(cfg)
    model = base.model_config(cfg, found.cfg)
    tokenizer, about_style = base.styled(found, cfg.prefer.style)
    rows, dropped = _rows(cfg, parts.train, tokenizer, model)
    n, size = len(rows.tokens), cfg.train.batch_size
    counts = " + ".join(f"{len(part):,}" for part in parts)
    return [
        f"data               {counts} pairs to train, validate and test on; {dropped} do not fit",
        *(f"                   {note}" for note in notes),
        *(f"{line[:8]:19}{line[8:]}" for line in about_style),
        base.plan(cfg, found, model),
        f"steps              {cfg.train.steps(n, size):,} of {size} rows, {n:,} rows an epoch; loss {cfg.prefer.loss}",
    ]
