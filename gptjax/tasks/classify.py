"""Fine-tuning a language model to tell texts apart: data, head, run, and what the test texts say of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import losses, weights
from gptjax._moved import moved_name, old_task
from gptjax.config import Config, ModelConfig
from gptjax.data import classification, loader
from gptjax.data.classification import LabelledBatch
from gptjax.data.split import LabelledSplits, split_labelled
from gptjax.errors import UserError
from gptjax.evaluation.classification import report
from gptjax.files import use_json, write_json
from gptjax.losses.classify import Pooling
from gptjax.model.gpt import init_params
from gptjax.tasks import tuning
from gptjax.tasks.tuning import refuse_missing
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.task import Loss, Ready, resolve
from gptjax.types import Params
from gptjax.weights import read_labels
from gptjax.weights.load import LABELS

RESULTS = "test.json"
__all__ = [
    "classify_texts", "evaluate", "load_classifier", "loss", "new_head", "plan", "prepare", "probabilities",
    "refuse_missing",
]  # fmt: skip
AT_ONCE, WIDTH = 16, 64  # texts, and tokens whose multiples they are filled up to, in `load_classifier`
TEXT = 16  # tokens of a text, at the least: so many of them are in a packed row
ROW_TOKENS = 2048  # about so many are scored at once


def evaluate(result: TrainResult, splits: LabelledSplits | None, say: Callable[[str], None]) -> None:
    """Score the test texts: accuracy with its interval, F1, confusion, calibration, beside baselines; test.json.

    Args:
        splits: of the data; None: read again.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        from gptjax.training.plot import draw_confusion

        scores = score(result, splits or _data(result.cfg))
        draw_confusion(np.array(scores["confusion"]), scores["labels"], file.parent / "confusion.png")
        write_json(file, scores)  # last: with it the scoring is done
    for line in use_json(file, summary):
        say(line)


def _data(cfg: Config) -> LabelledSplits:
    settings = cfg.classify
    if not settings.source:
        raise UserError("classify.source is missing: name a .csv, .tsv, .jsonl or .parquet file, or hf:org/name")
    quoted = settings.split == "book"  # as pandas reads it
    data = classification.read(
        settings.source, text=settings.text_field, label=settings.label_field, labels=settings.labels, quoted=quoted
    )
    if settings.balance and settings.split != "book":  # which balances by itself
        data = classification.balanced(data, cfg.seed)
    fractions = (1 - settings.val_fraction - settings.test_fraction, settings.val_fraction, settings.test_fraction)
    return split_labelled(
        data, how=settings.split, fractions=fractions, seed=cfg.seed, deduplicate=settings.deduplicate
    )


def _model(cfg: Config, found: weights.Model, splits: LabelledSplits) -> ModelConfig:
    model = found.cfg.computed_as(cfg.model)
    return dataclasses.replace(model, n_classes=len(splits.train.names), cls_bias=cfg.classify.bias)


def prepare(cfg: Config, progress: Progress) -> Ready:
    found = tuning.base_model(cfg)
    tokenizer = found.tokenizer()
    with progress.phase("preparing the data"):
        splits = _data(cfg)
    model = _model(cfg, found, splits)
    longest = tuning.longest_row(cfg, model)
    packed = cfg.classify.packing == "packed"
    encoded = [
        classification.encode(part, tokenizer, longest, cfg.classify.prompt) for part in (splits.train, splits.val)
    ]
    train, val = (classification.rows(part, packed) for part in encoded)
    resolved = resolve(cfg, model, len(train.tokens), cfg.train.batch_size)
    key, size = jax.random.key(cfg.seed), cfg.train.batch_size
    heads = {"cls_head": new_head(jax.random.fold_in(key, 1), model)}
    parts, fingerprint = tuning.load_base(resolved, found, heads, jax.random.fold_in(key, 2), progress)
    width = train.tokens.shape[1]

    def describe_batch(step: int) -> str:
        row = train.texts[loader.epoch_rows(step, size, len(train.tokens), cfg.seed)[0]]
        return f"the batch holds texts such as {splits.train.texts[row[0]]!r:.80}"

    counts = " + ".join(f"{len(part.texts):,}" for part in splits[:3])
    names = ", ".join(splits.train.names)
    lines = [
        f"data    {cfg.classify.source}: {counts} texts to train, validate and test on; classes {names}",
        f"        {len(train.tokens):,} rows of {width} tokens, {(train.segment_ids > 0).mean():.0%} full",
    ]
    if splits.leaked:
        lines.append(f"        {splits.leaked} of the texts to validate and test on are training texts too")
    if cut := sum(part.cut for part in encoded):
        lines.append(f"        {cut} texts are cut at {longest} tokens")
    settings = cfg.classify
    about = {
        "labels": list(splits.train.names), "pooling": settings.pooling, "max_length": longest,
        "prompt": settings.prompt,
    }  # fmt: skip
    task = tuning.make_task(
        resolved,
        parts,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: classification.batch(train, step, batch_size=size, seed=cfg.seed),
        describe_batch=describe_batch,
        eval_batches=lambda: classification.eval_batches(val, size),
        width=width,
        data=loader.fingerprint(*train, *val),
        lines=lines,
        files={LABELS: json.dumps(about, indent=1) + "\n"},
    )
    return Ready(resolved, task, splits)


def loss(cfg: Config) -> Loss:
    return losses.classify(cfg.model, cfg.classify.pooling)


def batch_shapes(cfg: Config, rows: int, width: int) -> LabelledBatch:
    """Of a batch; how many texts a packed row has only the data could tell: little depends on it."""
    n = max(1, width // TEXT) if cfg.classify.packing == "packed" else 1

    def shape(columns: int, dtype: type = np.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    return LabelledBatch(shape(width), shape(width), shape(n), shape(n, np.float32))


def plan(cfg: Config) -> list[str]:
    """What a run would do, for --dry-run."""
    splits, found = _data(cfg), tuning.base_model(cfg)
    found.tokenizer()  # refused here if it does not fit the model
    texts = " + ".join(f"{len(part.texts):,}" for part in splits[:3])
    epochs = f"{cfg.train.epochs:g} epochs" if cfg.train.epochs is not None else f"{cfg.train.max_steps:,} steps"
    return [
        f"data               {texts} texts to train, validate and test on; classes {', '.join(splits.train.names)}",
        tuning.plan(cfg, found, _model(cfg, found, splits)),
        f"training           {epochs}, {cfg.train.batch_size} rows at a time",
    ]


def new_head(key: jax.Array, cfg: ModelConfig) -> Params:
    """{"kernel" [D, n_classes], and "bias" [n_classes] where it has one}, as the config's init says."""
    small = dataclasses.replace(cfg, n_layer=1, vocab_size=2, d_ff=2)
    return init_params(key, small)["cls_head"]


def probabilities(params: Params, cfg: ModelConfig, examples: classification.Examples, pooling: Pooling) -> np.ndarray:
    """[n, n_classes] float32, of each text."""
    rows = classification.rows(examples)
    n = rows.texts.shape[1]
    run = jax.jit(lambda params, *xs: jax.nn.softmax(losses.class_logits(params, *xs, cfg, pooling, n=n)))
    size = min(len(rows.tokens), max(1, ROW_TOKENS // rows.tokens.shape[1]))
    found = [run(params, batch.tokens, batch.segment_ids) for batch in classification.eval_batches(rows, size)]
    which = rows.texts[rows.texts >= 0]
    return np.concatenate(found)[: len(rows.texts)][rows.texts >= 0][np.argsort(which)]


def score(result: TrainResult, splits: LabelledSplits) -> dict[str, Any]:
    """`evaluation.classification.report` of the test texts, with baselines that know the training texts only."""
    about, cfg = read_labels(Path(result.run_dir) / "final"), result.cfg.model
    test = classification.encode(splits.test, result.tokenizer, about["max_length"], about["prompt"])
    found = probabilities(result.params, cfg, test, about["pooling"])
    scores = report(found, test.labels, tuple(about["labels"]))
    scores["majority"] = classification.majority(splits.train, splits.test)
    scores["naive_bayes"] = classification.naive_bayes(splits.train, splits.test, result.tokenizer)
    scores["leaked"] = splits.leaked
    return scores


def summary(scores: dict[str, Any]) -> list[str]:
    low, high = scores["accuracy_interval"]
    return [
        f"test    {scores['n']} texts: accuracy {scores['accuracy']:.2%} (95 % interval {low:.1%}-{high:.1%}), "
        f"F1 {scores['macro_f1']:.3f}, calibration error {scores['calibration_error']:.3f}",
        f"        naive Bayes {scores['naive_bayes']:.2%}, always the commonest class {scores['majority']:.2%}",
        *(f"        {line}" for line in _table(scores["labels"], scores["confusion"])),
    ]


def _table(labels: list[str], confusion: list[list[int]]) -> list[str]:
    """A confusion table: a class a row, what its texts were taken for in columns.

    true \\ predicted    ham   spam
                  ham    812      3
                 spam      5    110
    """
    corner = "true \\ predicted"
    digits = max(5, *(len(str(n)) for row in confusion for n in row))
    first, widths = max(map(len, [corner, *labels])), [max(digits, len(label)) for label in labels]
    rows = [labels, *([str(n) for n in row] for row in confusion)]
    return [
        f"{name:>{first}}  " + " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for name, row in zip([corner, *labels], rows, strict=True)
    ]


def classify_texts(folder: str | Path, texts: list[str]) -> list[dict[str, float]]:
    """The probability of each class for each text, by the model in a run directory."""
    return load_classifier(folder)(texts)


def load_classifier(folder: str | Path) -> Callable[[Sequence[str]], list[dict[str, float]]]:
    """texts -> the probability of each class for each, by the model in a run directory; for many calls, which share
    the programs of few shapes: `AT_ONCE` texts of a multiple of `WIDTH` tokens.

    Raises:
        UserError: the model is no classifier; the function, of a text without tokens.
    """
    about = read_labels(Path(folder))
    model = weights.open_model(folder)
    tokenizer, params, cfg = model.tokenizer(), model.params("float32", None), model.cfg
    names = tuple(about["labels"])
    run = jax.jit(lambda params, *xs: jax.nn.softmax(losses.class_logits(params, *xs, cfg, about["pooling"])[:, 0]))

    def some(texts: Sequence[str]) -> np.ndarray:
        data = classification.Labelled(list(texts), np.zeros(len(texts), np.int32), names)
        ids = classification.encode(data, tokenizer, about["max_length"], about["prompt"]).ids
        tokens = np.zeros((AT_ONCE, min(-(-max(map(len, ids)) // WIDTH) * WIDTH, cfg.context_length)), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i, own in enumerate(ids):
            tokens[i, : len(own)], segment_ids[i, : len(own)] = own, 1
        return np.asarray(run(params, tokens, segment_ids))[: len(ids)]

    def of(texts: Sequence[str]) -> list[dict[str, float]]:
        parts = [some(texts[first : first + AT_ONCE]) for first in range(0, len(texts), AT_ONCE)]
        return [dict(zip(names, map(float, row), strict=True)) for part in parts for row in part]

    return of


def __getattr__(name: str) -> Any:
    """Names that `gptjax.losses` has now."""
    new = moved_name(__name__, name)
    return old_task(new, init_params) if name == "task" else new
