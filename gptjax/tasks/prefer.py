"""Fine-tuning on preferences: pairs, their log-probabilities before training, run, and what held-out pairs say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import losses
from gptjax._moved import moved_name, old_task
from gptjax.config import Config, ModelConfig
from gptjax.data import loader, preferences
from gptjax.data.preferences import Pair, PairBatch, PairRows
from gptjax.data.split import Splits, split_records
from gptjax.files import use_json, write_json
from gptjax.losses.preference import NEEDS_REFERENCE
from gptjax.model.gpt import init_params
from gptjax.tasks import tuning
from gptjax.tasks.tuning import refuse_missing
from gptjax.tokenizers import Tokenizer
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.step import evaluate as evaluated
from gptjax.training.task import Loss, Ready, resolve
from gptjax.types import Params

__all__ = ["evaluate", "loss", "plan", "prepare", "reference", "refuse_missing"]
PAIR = 64  # tokens of a pair, at the least: so many of them are in a packed row
RESULTS = "test.json"


class HeldOut(NamedTuple):
    """The pairs to test on, and their log-probabilities before training, where the loss needs them."""

    rows: PairRows
    before: np.ndarray | None


def evaluate(result: TrainResult, held_out: HeldOut | None, say: Callable[[str], None]) -> None:
    """Score the held-out pairs: loss, how often the chosen answer has the larger reward, by how much; test.json.

    Args:
        held_out: None: made again, of the base before training.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        if held_out is None:
            with Progress(log=lambda line: None) as silent:
                held_out = prepare(result.cfg, silent).held_out
        batches = preferences.eval_batches(held_out.rows, result.cfg.train.batch_size, held_out.before)
        mean, metrics = evaluated(jax.jit(loss(result.cfg)), result.params, batches)
        scores = {"pairs": int(mean.weight), "loss": mean.value()} | {k: v.value() for k, v in metrics.items()}
        write_json(file, scores)
    say(use_json(file, summary))


def summary(scores: dict[str, Any]) -> str:
    return (
        f"test    {scores['pairs']} held-out pairs: the chosen answer is preferred in {scores['accuracy']:.1%}, "
        f"margin {scores['margin']:.3f}, loss {scores['loss']:.4f}"
    )


def pairs(cfg: Config, notes: list[str] | None = None) -> Splits[Pair]:
    """To train, validate and test on. notes: as of `conversations.read`."""
    return split_records(cfg.prefer, cfg.seed, preferences.read, preferences.of_skills, notes)


def loss(cfg: Config) -> Loss:
    return losses.preference(cfg.model, cfg.prefer.loss, beta=cfg.prefer.beta, margin=cfg.prefer.margin)


def batch_shapes(cfg: Config, rows: int, width: int) -> PairBatch:
    """Of a batch; how many pairs a packed row has only the data could tell: little depends on it."""
    n = max(1, width // PAIR) if cfg.prefer.packing == "packed" else 1
    ids, *floats = (
        jax.ShapeDtypeStruct((rows, *shape), dtype)
        for shape, dtype in (((width,), np.int32), ((width,), np.float32), ((n,), np.float32), ((n, 2), np.float32))
    )
    return PairBatch(ids, ids, floats[0], ids, *floats[1:])


def _rows(cfg: Config, part: list[Any], tokenizer: Tokenizer, model: ModelConfig) -> tuple[PairRows, int]:
    """The rows of a part, and how many pairs did not fit."""
    width = tuning.longest_row(cfg, model)
    encoded = preferences.encode(part, tokenizer, context_length=width, because=tuning.why_so_long(cfg, model))
    packed = cfg.prefer.packing == "packed"
    return preferences.rows(encoded, width if packed else None, packed), encoded.dropped


def prepare(cfg: Config, progress: Progress) -> Ready:
    found = tuning.base_model(cfg)
    size, notes = cfg.train.batch_size, list[str]()
    model = found.cfg.computed_as(cfg.model)
    with progress.phase("preparing the data"):
        tokenizer, about_style = tuning.styled(found, cfg.prefer.style)
        parts_of_data = pairs(cfg, notes)
        rows, dropped = zip(*(_rows(cfg, part, tokenizer, model) for part in parts_of_data), strict=True)
    train, val, test = rows
    resolved = resolve(cfg, model, len(train.tokens), cfg.train.batch_size)
    parts, fingerprint = tuning.load_base(resolved, found, {}, jax.random.key(cfg.seed), progress)
    before: list[np.ndarray | None] = [None] * 3
    if cfg.prefer.loss in NEEDS_REFERENCE:
        with progress.phase("scoring the pairs before training"):
            start = parts.combine(parts.params, parts.frozen)
            before = [reference(start, part, model, size) for part in rows]

    counts = " + ".join(f"{len(part):,}" for part in parts_of_data)
    lines = [
        f"data    {cfg.prefer.source or 'synthetic skills'}: {counts} pairs to train, validate and test on",
        f"        {len(train.tokens):,} rows of {train.tokens.shape[1]} tokens, {(train.segment_ids > 0).mean():.0%} "
        f"full; {sum(dropped)} pairs do not fit and are left out",
        *(f"        {note}" for note in notes),
        *about_style,
    ]
    task = tuning.make_task(
        resolved,
        parts,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: preferences.batch(train, step, batch_size=size, seed=cfg.seed, reference=before[0]),
        eval_batches=lambda: preferences.eval_batches(val, size, before[1]),
        width=train.tokens.shape[1],
        data=loader.fingerprint(*train, *val),
        lines=lines,
    )
    return Ready(resolved, task, HeldOut(test, before[2]))


def reference(params: Params, rows: PairRows, cfg: ModelConfig, batch_size: int) -> np.ndarray:
    """[pairs, 2] float32: log-probabilities of the chosen and the rejected answer of each pair."""
    scored = jax.jit(lambda params, batch: losses.answer_log_probs(params, batch, cfg)[0])
    found = [scored(params, batch) for batch in preferences.eval_batches(rows, batch_size)]
    here = rows.pairs >= 0
    out = np.zeros((int(here.sum()), 2), np.float32)
    out[rows.pairs[here]] = np.concatenate(found)[: len(rows.pairs)][here]
    return out


def plan(cfg: Config) -> list[str]:
    """What a run would do, for --dry-run."""
    notes: list[str] = []
    parts, found = pairs(cfg, notes), tuning.base_model(cfg)
    model = found.cfg.computed_as(cfg.model)
    tokenizer, about_style = tuning.styled(found, cfg.prefer.style)
    rows, dropped = _rows(cfg, parts.train, tokenizer, model)
    n, size = len(rows.tokens), cfg.train.batch_size
    counts = " + ".join(f"{len(part):,}" for part in parts)
    return [
        f"data               {counts} pairs to train, validate and test on; {dropped} do not fit",
        *(f"                   {note}" for note in notes),
        *(f"{line[:8]:19}{line[8:]}" for line in about_style),
        tuning.plan(cfg, found, model),
        f"steps              {cfg.train.steps(n, size):,} of {size} rows, {n:,} rows an epoch; loss {cfg.prefer.loss}",
    ]


def __getattr__(name: str) -> Any:
    """Names that `gptjax.losses` has now."""
    new = moved_name(__name__, name)
    return old_task(new, init_params) if name == "task" else new
