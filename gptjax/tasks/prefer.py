"""Preference tuning (DPO and similar losses): fine-tunes a model on pairs of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import losses, weights
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
from gptjax.training.step import evaluate as mean_over
from gptjax.training.task import Loss, Ready, resolve
from gptjax.types import Params

__all__ = ["evaluate", "loss", "plan", "prepare", "reference", "refuse_missing"]
# The function `batch_shapes` assumes MIN_PAIR_TOKENS tokens per pair, to estimate how many pairs fit into a packed row.
MIN_PAIR_TOKENS = 64
RESULTS = "test.json"


class HeldOut(NamedTuple):
    """The test data of preference tuning.

    Attributes:
        rows: the test pairs.
        reference: log-probabilities of the test pairs' answers under the reference model, or None if the loss needs no
            reference model.
    """

    rows: PairRows
    reference: np.ndarray | None


def evaluate(result: TrainResult, held_out: HeldOut | None, say: Callable[[str], None]) -> None:
    """Evaluates the model on the held-out pairs, and writes the scores to test.json.

    The scores of preference tuning are the loss, the accuracy (how often the chosen answer has the larger reward) and
    the reward margin. If test.json exists already, the scores are not computed again, and a summary of the scores in
    test.json is printed.

    Args:
        held_out: the test pairs. None: this function reads the data again, and computes the reference
            log-probabilities again with the base model.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        if held_out is None:
            with Progress(log=lambda line: None) as silent:
                held_out = prepare(result.cfg, silent).held_out
        batches = preferences.eval_batches(held_out.rows, result.cfg.train.batch_size, held_out.reference)
        mean, metrics = mean_over(jax.jit(loss(result.cfg)), result.params, batches)
        scores = {"pairs": int(mean.weight), "loss": mean.value()} | {k: v.value() for k, v in metrics.items()}
        write_json(file, scores)
    say(use_json(file, summary))


def summary(scores: dict[str, Any]) -> str:
    return (
        f"test    {scores['pairs']} held-out pairs: accuracy {scores['accuracy']:.1%} (chosen answer has larger reward)"
        f", margin {scores['margin']:.3f}, loss {scores['loss']:.4f}"
    )


def pairs(cfg: Config, notes: list[str] | None = None, special: Collection[str] = ()) -> Splits[Pair]:
    """Reads pairs of answers, and splits the pairs into training, validation and test pairs.

    Without a data source, the pairs of answers are synthetic. The rejected answer of a synthetic pair is a wrong answer
    to the same question if the task is reward_model, and an answer to another question if the task is prefer.

    Args:
        notes: a list to which a line of text is appended that names the ignored keys of the file. None: the line is
            printed to stderr.
        special: texts of the special tokens, as in `preferences.read`.
    """
    made = preferences.of_mistakes if cfg.task == "reward_model" else preferences.of_skills
    read = partial(preferences.read, special=special)
    return split_records(getattr(cfg, cfg.task), cfg.seed, read, made, notes)


def loss(cfg: Config) -> Loss:
    return losses.preference(cfg.model, cfg.prefer.loss, beta=cfg.prefer.beta, margin=cfg.prefer.margin)


def batch_shapes(cfg: Config, rows: int, width: int) -> PairBatch:
    """Returns the shapes of a batch of the preference tuning task.

    The number of pairs per packed row depends on the data, so the number is estimated.
    """
    n = max(1, width // MIN_PAIR_TOKENS) if getattr(cfg, cfg.task).packing == "packed" else 1
    ids, *floats = (
        jax.ShapeDtypeStruct((rows, *shape), dtype)
        for shape, dtype in (((width,), np.int32), ((width,), np.float32), ((n,), np.float32), ((n, 2), np.float32))
    )
    return PairBatch(ids, ids, floats[0], ids, *floats[1:])


def _rows(cfg: Config, pairs: list[Any], tokenizer: Tokenizer, model: ModelConfig) -> tuple[PairRows, int]:
    """Encodes pairs of answers as rows of tokens.

    A row holds several pairs if the task's setting `packing` is "packed", and one pair otherwise.

    Returns:
        (rows, number of pairs that were dropped because they do not fit into a row).
    """
    width = tuning.longest_row(cfg, model)
    because, packed = tuning.why_so_long(cfg, model), getattr(cfg, cfg.task).packing == "packed"
    # The end token is an input of a reward model, because a reward is computed from the hidden state of the end token.
    encoded = preferences.encode(
        pairs, tokenizer, context_length=width, because=because, end_as_input=cfg.task == "reward_model"
    )
    return preferences.rows(encoded, width if packed else None, packed), encoded.dropped


def encoded_pairs(cfg: Config, base: weights.Model) -> tuple[Tokenizer, list[PairRows], list[str]]:
    """Reads and encodes the pairs of answers of the tasks prefer and reward_model.

    Returns:
        (tokenizer with the chat template of the task's style, the rows to train, validate and test on, lines of text
        that describe the rows).
    """
    settings, notes = getattr(cfg, cfg.task), list[str]()
    tokenizer, style_lines = tuning.styled(base, settings.style)
    splits = pairs(cfg, notes, tokenizer.special_tokens)
    rows, dropped = zip(*(_rows(cfg, subset, tokenizer, base.cfg) for subset in splits), strict=True)
    train, counts = rows[0], " + ".join(f"{len(subset):,}" for subset in splits)
    lines = [
        f"data    {settings.source or 'synthetic skills'}: {counts} pairs to train, validate and test on",
        f"        {len(train.tokens):,} rows of {train.tokens.shape[1]} tokens, {(train.segment_ids > 0).mean():.0%} "
        f"full; {sum(dropped)} pairs that do not fit a row were dropped",
        *(f"        {note}" for note in notes),
        *style_lines,
    ]
    return tokenizer, list(rows), lines


def prepare(cfg: Config, progress: Progress) -> Ready:
    base = tuning.base_model(cfg)
    size = cfg.train.batch_size
    model = base.cfg.computed_as(cfg.model)
    with progress.phase("preparing the data"):
        tokenizer, rows, lines = encoded_pairs(cfg, base)
    train, val, test = rows
    resolved = resolve(cfg, model, len(train.tokens), cfg.train.batch_size)
    trainable, fingerprint = tuning.load_base(resolved, base, {}, jax.random.key(cfg.seed), progress)
    references: list[np.ndarray | None] = [None] * 3
    if cfg.prefer.loss in NEEDS_REFERENCE:
        with progress.phase("computing the reference log-probabilities"):
            start = trainable.combine(trainable.params, trainable.frozen)
            references = [reference(start, subset, model, size) for subset in rows]

    task = tuning.make_task(
        resolved,
        trainable,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: preferences.batch(train, step, batch_size=size, seed=cfg.seed, reference=references[0]),
        eval_batches=lambda: preferences.eval_batches(val, size, references[1]),
        width=train.tokens.shape[1],
        data=loader.fingerprint(*train, *val),
        lines=lines,
    )
    return Ready(resolved, task, HeldOut(test, references[2]))


def reference(params: Params, rows: PairRows, cfg: ModelConfig, batch_size: int) -> np.ndarray:
    """Computes the log-probabilities of the chosen and the rejected answer of each pair, [n_pairs, 2] float32.

    The log-probabilities are computed with `params`, the params of the reference model.
    """
    log_probs = jax.jit(lambda params, batch: losses.answer_log_probs(params, batch, cfg)[0])
    outputs = [log_probs(params, batch) for batch in preferences.eval_batches(rows, batch_size)]
    is_pair = rows.pairs >= 0  # Negative entries of `rows.pairs` are padding.
    out = np.zeros((int(is_pair.sum()), 2), np.float32)
    out[rows.pairs[is_pair]] = np.concatenate(outputs)[: len(rows.pairs)][is_pair]
    return out


def plan(cfg: Config) -> list[str]:
    """Returns the lines of text that --dry-run prints to summarise a training run."""
    base = tuning.base_model(cfg)
    return [*plan_pairs(cfg, base, base.cfg), f"loss               {cfg.prefer.loss}"]


def plan_pairs(cfg: Config, base: weights.Model, model: ModelConfig) -> list[str]:
    """Returns the lines of text about the data, the base model and the number of steps that --dry-run prints.

    The tasks prefer and reward_model share the function `plan_pairs`.
    """
    _, rows, lines = encoded_pairs(cfg, base)
    n, size = len(rows[0].tokens), cfg.train.batch_size
    return [
        *(f"{line[:8]:19}{line[8:]}" for line in lines),
        tuning.plan(cfg, base, model.computed_as(cfg.model)),
        f"steps              {cfg.train.steps(n, size):,} of {size} rows, {n:,} rows per epoch",
    ]


def __getattr__(name: str) -> Any:
    """Returns the object that a deprecated name of this module refers to.

    The name `task` refers to the function `task(cfg)` of earlier releases, which returns a namespace of the functions
    prepare, init and loss.
    """
    new = moved_name(__name__, name)
    return old_task(new, init_params) if name == "task" else new
