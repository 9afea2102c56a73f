"""Text classification: fine-tunes a language model with a classification head, and evaluates it on test texts."""

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
# `load_classifier` classifies texts in batches of BATCH_SIZE rows, padded to a multiple of PAD_TO tokens.
BATCH_SIZE, PAD_TO = 16, 64
# The function `batch_shapes` assumes MIN_TEXT_TOKENS tokens per text, to estimate how many texts fit into a packed row.
MIN_TEXT_TOKENS = 16
# The function `probabilities` classifies texts in batches of about BATCH_TOKENS tokens.
BATCH_TOKENS = 2048


def evaluate(result: TrainResult, splits: LabelledSplits | None, say: Callable[[str], None]) -> None:
    """Evaluates the classifier on the test texts; writes the scores to test.json, and a plot to confusion.png.

    The scores of the classifier are the accuracy with its confidence interval, the F1 score, the confusion matrix, the
    calibration error and the accuracies of two baselines. If test.json exists already, the scores are not computed
    again, and a summary of the scores in test.json is printed.

    Args:
        splits: the training, validation and test texts with their labels. None: the texts are read again.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        from gptjax.training.plot import draw_confusion

        scores = score(result, splits or _data(result.cfg))
        draw_confusion(np.array(scores["confusion"]), scores["labels"], file.parent / "confusion.png")
        write_json(file, scores)  # The file test.json is written last, because it marks the evaluation as complete.
    for line in use_json(file, summary):
        say(line)


def _data(cfg: Config) -> LabelledSplits:
    settings = cfg.classify
    if not settings.source:
        raise UserError("classify.source is missing: name a .csv, .tsv, .jsonl, .json or .parquet file, or hf:org/name")
    # With classify.split=book, quotation marks in a .tsv file delimit a text and are not part of the text. The code of
    # the book Build a Large Language Model (From Scratch) reads .tsv files with pandas, which treats quotation marks as
    # delimiters of a text.
    quoted = settings.split == "book"
    data = classification.read(
        settings.source, text=settings.text_field, label=settings.label_field, labels=settings.labels, quoted=quoted
    )
    # With classify.split=book, the function `split_labelled` balances the classes.
    if settings.balance and settings.split != "book":
        data = classification.balanced(data, cfg.seed)
    fractions = (1 - settings.val_fraction - settings.test_fraction, settings.val_fraction, settings.test_fraction)
    return split_labelled(
        data, how=settings.split, fractions=fractions, seed=cfg.seed, deduplicate=settings.deduplicate
    )


def _model(cfg: Config, base: weights.Model, splits: LabelledSplits) -> ModelConfig:
    model = base.cfg.computed_as(cfg.model)
    return dataclasses.replace(model, n_classes=len(splits.train.names), cls_bias=cfg.classify.bias)


def prepare(cfg: Config, progress: Progress) -> Ready:
    base = tuning.base_model(cfg)
    tokenizer = base.tokenizer()
    with progress.phase("preparing the data"):
        splits = _data(cfg)
    model = _model(cfg, base, splits)
    max_length = tuning.longest_row(cfg, model)
    packed = cfg.classify.packing == "packed"
    encoded = [
        classification.encode(texts, tokenizer, max_length, cfg.classify.prompt) for texts in (splits.train, splits.val)
    ]
    train, val = (classification.rows(examples, packed) for examples in encoded)
    resolved = resolve(cfg, model, len(train.tokens), cfg.train.batch_size)
    key, size = jax.random.key(cfg.seed), cfg.train.batch_size
    heads = {"cls_head": new_head(jax.random.fold_in(key, 1), model)}
    trainable, fingerprint = tuning.load_base(resolved, base, heads, jax.random.fold_in(key, 2), progress)
    width = train.tokens.shape[1]

    def describe_batch(step: int) -> str:
        row = train.texts[loader.epoch_rows(step, size, len(train.tokens), cfg.seed)[0]]
        return f"the batch contains texts such as {splits.train.texts[row[0]]!r:.80}"

    counts = " + ".join(f"{len(subset.texts):,}" for subset in splits[:3])
    names = ", ".join(splits.train.names)
    lines = [
        f"data    {cfg.classify.source}: {counts} texts to train, validate and test on; classes {names}",
        f"        {len(train.tokens):,} rows of {width} tokens, {(train.segment_ids > 0).mean():.0%} full",
    ]
    if splits.leaked:
        lines.append(f"        {splits.leaked} of the validation and test texts are also training texts")
    if truncated := sum(examples.cut for examples in encoded):
        lines.append(f"        {truncated} texts are truncated to {max_length} tokens")
    settings = cfg.classify
    labels_json = {
        "labels": list(splits.train.names), "pooling": settings.pooling, "max_length": max_length,
        "prompt": settings.prompt,
    }  # fmt: skip
    task = tuning.make_task(
        resolved,
        trainable,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: classification.batch(train, step, batch_size=size, seed=cfg.seed),
        describe_batch=describe_batch,
        eval_batches=lambda: classification.eval_batches(val, size),
        width=width,
        data=loader.fingerprint(*train, *val),
        lines=lines,
        files={LABELS: json.dumps(labels_json, indent=1) + "\n"},
    )
    return Ready(resolved, task, splits)


def loss(cfg: Config) -> Loss:
    return losses.classify(cfg.model, cfg.classify.pooling)


def batch_shapes(cfg: Config, rows: int, width: int) -> LabelledBatch:
    """Returns the shapes of a batch of the classification task.

    The number of texts per packed row depends on the data, so the number is estimated.
    """
    n = max(1, width // MIN_TEXT_TOKENS) if cfg.classify.packing == "packed" else 1

    def shape(columns: int, dtype: type = np.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    return LabelledBatch(shape(width), shape(width), shape(n), shape(n, np.float32))


def plan(cfg: Config) -> list[str]:
    """Returns the lines of text that --dry-run prints to summarise a training run."""
    splits, base = _data(cfg), tuning.base_model(cfg)
    base.tokenizer()  # The method `tokenizer` raises UserError if the tokenizer does not fit the base model.
    texts = " + ".join(f"{len(subset.texts):,}" for subset in splits[:3])
    epochs = f"{cfg.train.epochs:g} epochs" if cfg.train.epochs is not None else f"{cfg.train.max_steps:,} steps"
    return [
        f"data               {texts} texts to train, validate and test on; classes {', '.join(splits.train.names)}",
        tuning.plan(cfg, base, _model(cfg, base, splits)),
        f"training           {epochs}, {cfg.train.batch_size} rows per step",
    ]


def new_head(key: jax.Array, cfg: ModelConfig) -> Params:
    """Returns the params of a new classification head, initialised by the method `cfg.init`.

    The params of the classification head are {"kernel": [D, n_classes], "bias": [n_classes]}. If cfg.cls_bias is false,
    the classification head has no bias.
    """
    small = dataclasses.replace(cfg, n_layer=1, vocab_size=2, d_ff=2)
    return init_params(key, small)["cls_head"]


def probabilities(params: Params, cfg: ModelConfig, examples: classification.Examples, pooling: Pooling) -> np.ndarray:
    """Returns the class probabilities of each text, [n, n_classes] float32."""
    rows = classification.rows(examples)
    n = rows.texts.shape[1]
    run = jax.jit(lambda params, *xs: jax.nn.softmax(losses.class_logits(params, *xs, cfg, pooling, n=n)))
    size = min(len(rows.tokens), max(1, BATCH_TOKENS // rows.tokens.shape[1]))
    outputs = [run(params, batch.tokens, batch.segment_ids) for batch in classification.eval_batches(rows, size)]
    text_ids = rows.texts[rows.texts >= 0]
    return np.concatenate(outputs)[: len(rows.texts)][rows.texts >= 0][np.argsort(text_ids)]


def score(result: TrainResult, splits: LabelledSplits) -> dict[str, Any]:
    """Returns the scores of the classifier on the test texts, and the accuracies of two baselines.

    The scores of the classifier are computed by `evaluation.classification.report`. Two baselines, the most common
    class and naive Bayes, are fitted to the training texts. The entry "leaked" of the scores is the number of
    validation and test texts that are also training texts.
    """
    settings, cfg = read_labels(Path(result.run_dir) / "final"), result.cfg.model
    test = classification.encode(splits.test, result.tokenizer, settings["max_length"], settings["prompt"])
    predicted = probabilities(result.params, cfg, test, settings["pooling"])
    scores = report(predicted, test.labels, tuple(settings["labels"]))
    scores["majority"] = classification.majority(splits.train, splits.test)
    scores["naive_bayes"] = classification.naive_bayes(splits.train, splits.test, result.tokenizer)
    scores["leaked"] = splits.leaked
    return scores


def summary(scores: dict[str, Any]) -> list[str]:
    low, high = scores["accuracy_interval"]
    return [
        f"test    {scores['n']} texts: accuracy {scores['accuracy']:.2%} (95 % interval {low:.1%}-{high:.1%}), "
        f"F1 {scores['macro_f1']:.3f}, calibration error {scores['calibration_error']:.3f}",
        f"        naive Bayes {scores['naive_bayes']:.2%}, always the most common class {scores['majority']:.2%}",
        *(f"        {line}" for line in _table(scores["labels"], scores["confusion"])),
    ]


def _table(labels: list[str], confusion: list[list[int]]) -> list[str]:
    """Formats a confusion matrix as lines of text, with one row per true class and one column per predicted class.

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
    """Computes the class probabilities of each text with the classifier in a run directory."""
    return load_classifier(folder)(texts)


def load_classifier(folder: str | Path) -> Callable[[Sequence[str]], list[dict[str, float]]]:
    """Loads the classifier in a run directory, and returns a function that classifies texts.

    Texts are padded to batches of `BATCH_SIZE` rows and a multiple of `PAD_TO` tokens, so that XLA compiles programs
    for only a few shapes.

    Returns:
        A function that maps texts to the class probabilities of each text, and raises UserError for a text without
        tokens.

    Raises:
        UserError: the model is not a classifier.
    """
    settings = read_labels(Path(folder))
    refuse_reward_model(settings, folder)
    model = weights.open_model(folder)
    tokenizer, params, cfg = model.tokenizer(), model.params("float32", None), model.cfg
    names, pooling = tuple(settings["labels"]), settings["pooling"]
    run = jax.jit(lambda params, *xs: jax.nn.softmax(losses.class_logits(params, *xs, cfg, pooling)[:, 0]))

    def classify_batch(texts: Sequence[str]) -> np.ndarray:
        data = classification.Labelled(list(texts), np.zeros(len(texts), np.int32), names)
        ids = classification.encode(data, tokenizer, settings["max_length"], settings["prompt"]).ids
        width = min(-(-max(map(len, ids)) // PAD_TO) * PAD_TO, cfg.context_length)
        tokens = np.zeros((BATCH_SIZE, width), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i, text_ids in enumerate(ids):
            tokens[i, : len(text_ids)], segment_ids[i, : len(text_ids)] = text_ids, 1
        return np.asarray(run(params, tokens, segment_ids))[: len(ids)]

    def classify(texts: Sequence[str]) -> list[dict[str, float]]:
        batches = [classify_batch(texts[first : first + BATCH_SIZE]) for first in range(0, len(texts), BATCH_SIZE)]
        return [dict(zip(names, map(float, row), strict=True)) for batch in batches for row in batch]

    return classify


def refuse_reward_model(settings: dict[str, Any], folder: str | Path) -> None:
    """Raises UserError if the model in `folder` is a reward model, whose labels.json has only one class.

    A reward model cannot classify texts, because the probability of its only class is always 1.
    """
    if len(settings["labels"]) == 1:
        raise UserError(
            f"{folder} is a reward model, which has no classes: gptjax sample MODEL chat=true n=8 pick=reward "
            f"reward_model={folder} uses it"
        )


def __getattr__(name: str) -> Any:
    """Returns the object that a deprecated name of this module refers to.

    A deprecated name refers to a renamed constant or to a function of `gptjax.losses`.
    """
    new = moved_name(__name__, name)
    return old_task(new, init_params) if name == "task" else new
