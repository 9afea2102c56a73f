"""Fine-tuning a language model to tell texts apart: data, head, run, and what the test texts say of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import tree, weights
from gptjax.config import Config, ModelConfig
from gptjax.data import labelled
from gptjax.finetuning import base, metrics
from gptjax.model.gpt import abstract_params, init_params
from gptjax.tasks import classify
from gptjax.training.job import Job
from gptjax.training.loop import TrainResult, flops_per_token, run_job
from gptjax.types import Params, UserError
from gptjax.weights import native

LABELS = "labels.json"  # beside the model: names of the classes, and how a text is pooled
RESULTS = "test.json"


def run(cfg: Config, log: Callable[[str], None] | None = None) -> TrainResult:
    """Train, then score the test texts: accuracy with its interval, F1, confusion, calibration, beside baselines."""
    result = run_job(cfg, lambda cfg, progress: _prepare(cfg, progress), log)
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        _, model = weights.load(Path(result.run_dir) / "final")
        splits = _data(result.cfg)
        scores = score(result, model, splits)
        file.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        from gptjax.training.plot import draw_confusion

        draw_confusion(np.array(scores["confusion"]), scores["labels"], file.parent / "confusion.png")
    for line in summary(json.loads(file.read_text(encoding="utf-8"))):
        (log or print)(line)
    return result


def _data(cfg: Config) -> labelled.Splits:
    settings = cfg.classify
    if not settings.source:
        raise UserError("classify.source is missing: name a .csv, .tsv, .jsonl or .parquet file, or hf:org/name")
    data = labelled.read(settings.source, text=settings.text_field, label=settings.label_field, labels=settings.labels)
    if settings.balance and settings.split != "book":  # which balances by itself
        data = labelled.balanced(data, cfg.seed)
    fractions = (1 - settings.val_fraction - settings.test_fraction, settings.val_fraction, settings.test_fraction)
    return labelled.split(
        data, how=settings.split, fractions=fractions, seed=cfg.seed, deduplicate=settings.deduplicate
    )


def _prepare(cfg: Config, progress: Any) -> tuple[Config, Job]:
    with progress.phase("preparing the data"):
        splits = _data(cfg)
    found = base.base_model(cfg)
    tokenizer = found.tokenizer()
    model = base.model_config(cfg, found.cfg, n_classes=len(splits.train.names))
    longest = min(cfg.classify.max_length or model.context_length, model.context_length)
    train, val = (labelled.encode(part, tokenizer, longest) for part in (splits.train, splits.val))
    settings = cfg.train
    if settings.epochs is not None:
        steps = max(1, round(settings.epochs * len(train.labels) / settings.batch_size))
        settings = dataclasses.replace(settings, max_steps=steps)
    cfg = dataclasses.replace(cfg, model=model, train=settings)
    with progress.phase("loading the base"):
        params = found.params("float32", None)
    key = jax.random.key(cfg.seed)
    heads = {"cls_head": new_head(jax.random.fold_in(key, 1), model)}
    parts = base.parts(cfg, params, heads, model, jax.random.fold_in(key, 2))
    plain, export = parts.plain, parts.export  # not `parts`, which would keep the weights that training replaces
    n_params, fingerprint = tree.size(params | heads), weights.fingerprint(params)
    flops = flops_per_token(model, params)
    task = classify.task(model, cfg.classify.pooling)
    width = train.tokens.shape[1]

    def batch(step: int) -> labelled.LabelledBatch:
        return labelled.batch(train, step, batch_size=settings.batch_size, seed=cfg.seed)

    def batches(step: int, k: int) -> labelled.LabelledBatch:
        return labelled.LabelledBatch(*map(np.stack, zip(*(batch(step + i) for i in range(k)), strict=True)))

    def describe(n_trained: int) -> list[str]:
        counts = " + ".join(f"{len(part.texts):,}" for part in splits[:3])
        names = ", ".join(splits.train.names)
        lines = [f"data    {cfg.classify.source}: {counts} texts to train, validate and test on; classes {names}"]
        if splits.leaked:
            lines.append(f"        {splits.leaked} of the texts to validate and test on are training texts too")
        if train.cut + val.cut:
            lines.append(f"        {train.cut + val.cut} texts are cut at {longest} tokens")
        steps = f"{settings.max_steps:,} steps of {settings.batch_size} texts, up to {width} tokens each"
        rate = f"train   {cfg.optim.name}, lr {cfg.optim.lr:g}, {steps}"
        return [*lines, *base.describe(cfg, n_params, n_trained), rate]

    def write(folder: Path, trained: Any, frozen: Any, files: dict[str, str]) -> None:
        about = {"labels": list(splits.train.names), "pooling": cfg.classify.pooling, "max_length": longest}
        files = {**files, LABELS: json.dumps(about, indent=1) + "\n"}
        weights.save(folder, plain(trained, frozen), model, tokenizer, files)
        export(folder / "adapter", trained, frozen)

    return cfg, Job(
        tokenizer=tokenizer,
        batch=batch,
        batches=batches,
        where=lambda step: f"the batch holds texts such as {_first_text(splits.train, batch(step), train)!r:.80}",
        eval_batches=lambda first: labelled.eval_batches(val, settings.batch_size),
        loss=base.loss_with_dropout(cfg, task.loss),
        init=lambda key, start: start,
        start=parts.trained,
        frozen=parts.frozen,
        combine=parts.combine,
        optimizer=base.optimizer(cfg),
        tokens_per_step=settings.batch_size * width,
        flops_per_token=flops,
        identity={"base": fingerprint, "data": labelled.fingerprint(train, val)},
        describe=describe,
        write=write,
    )


def plan(cfg: Config) -> list[str]:
    """What a run would do, for --dry-run."""
    splits, found = _data(cfg), base.base_model(cfg)
    model = base.model_config(cfg, found.cfg, n_classes=len(splits.train.names))
    shapes = abstract_params(model)
    heads = {"cls_head": shapes["cls_head"]}
    body = {name: leaf for name, leaf in shapes.items() if name not in heads}
    trained = base.abstract_trained(cfg, body, heads, model)
    settings = cfg.train
    steps = settings.max_steps
    if settings.epochs is not None:
        steps = max(1, round(settings.epochs * len(splits.train.texts) / settings.batch_size))
    texts = " + ".join(f"{len(part.texts):,}" for part in splits[:3])
    n, n_trained = tree.size(shapes), tree.size(trained)
    return [
        f"data               {texts} texts to train, validate and test on; classes {', '.join(splits.train.names)}",
        f"base               {found.where}: {n:,} parameters, {n_trained:,} trained ({n_trained / n:.2%})",
        f"steps              {steps:,} of {settings.batch_size} texts: "
        f"{steps * settings.batch_size / len(splits.train.texts):.2f} epochs",
    ]


def _first_text(data: labelled.Labelled, batch: labelled.LabelledBatch, examples: labelled.Examples) -> str:
    row = int(np.flatnonzero((examples.tokens == batch.tokens[0]).all(-1))[0])
    return data.texts[row]


def new_head(key: jax.Array, cfg: ModelConfig) -> Params:
    """{"kernel" [D, n_classes], "bias" [n_classes]}, as the config's init says."""
    small = dataclasses.replace(cfg, n_layer=1, vocab_size=2, d_ff=2)
    return init_params(key, small)["cls_head"]


def predictor(params: Params, cfg: ModelConfig, pooling: classify.Pooling) -> Callable[[Any, Any], np.ndarray]:
    """(tokens [B, T], lengths [B]) -> probabilities [B, n_classes]."""
    run = jax.jit(lambda params, t, n: jax.nn.softmax(classify.class_logits(params, t, n, cfg, pooling)))
    return lambda tokens, lengths: np.asarray(run(params, tokens, lengths))


def score(result: TrainResult, cfg: ModelConfig, splits: labelled.Splits) -> dict[str, Any]:
    """`metrics.report` of the test texts, with baselines that know the training texts only."""
    about = read_labels(Path(result.run_dir) / "final")
    test = labelled.encode(splits.test, result.tokenizer, about["max_length"])
    predict = predictor(result.params, cfg, about["pooling"])
    rows = [
        predict(batch.tokens, batch.lengths)[batch.weights > 0]
        for batch in labelled.eval_batches(test, result.cfg.train.batch_size)
    ]
    scores = metrics.report(np.concatenate(rows), test.labels, tuple(about["labels"]))
    scores["majority"] = labelled.majority(splits.train, splits.test)
    scores["naive_bayes"] = labelled.naive_bayes(splits.train, splits.test, result.tokenizer)
    scores["leaked"] = splits.leaked
    return scores


def summary(scores: dict[str, Any]) -> list[str]:
    low, high = scores["accuracy_interval"]
    width = max(map(len, scores["labels"]))
    return [
        f"test    {scores['n']} texts: accuracy {scores['accuracy']:.2%} (95 % interval {low:.1%}-{high:.1%}), "
        f"F1 {scores['macro_f1']:.3f}, calibration error {scores['calibration_error']:.3f}",
        f"        naive Bayes {scores['naive_bayes']:.2%}, always the commonest class {scores['majority']:.2%}",
        *(
            f"        {name:>{width}}  " + " ".join(f"{n:5d}" for n in row)
            for name, row in zip(scores["labels"], scores["confusion"], strict=True)
        ),
    ]


def read_labels(folder: Path) -> dict[str, Any]:
    """What a classifier's folder says of its classes.

    Raises:
        UserError: the model is none.
    """
    file = native.find(folder) / LABELS
    if not file.is_file():
        raise UserError(f"{folder} is no classifier ({LABELS} is missing): gptjax finetune classify makes one")
    return json.loads(file.read_text(encoding="utf-8"))


def classify_texts(folder: str | Path, texts: list[str]) -> list[dict[str, float]]:
    """The probability of each class for each text, by the model in a run directory."""
    params, cfg = weights.load(folder)
    about, tokenizer = read_labels(Path(folder)), weights.load_tokenizer(folder)
    names = tuple(about["labels"])
    data = labelled.Labelled(texts, np.zeros(len(texts), np.int32), names)
    examples = labelled.encode(data, tokenizer, about["max_length"])
    predict = predictor(params, cfg, about["pooling"])
    rows = predict(examples.tokens, examples.lengths)
    return [dict(zip(names, map(float, row), strict=True)) for row in rows]
