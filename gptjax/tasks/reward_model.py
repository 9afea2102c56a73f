"""Reward model: fine-tunes a language model, with a classification head of one class, on pairs of answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import losses
from gptjax.config import Config, ModelConfig
from gptjax.data import loader, preferences
from gptjax.data.preferences import PairRows
from gptjax.evaluation.intervals import interval
from gptjax.files import use_json, write_json
from gptjax.tasks import prefer, tuning
from gptjax.tasks.classify import new_head
from gptjax.tasks.prefer import batch_shapes
from gptjax.tasks.tuning import refuse_missing
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.step import evaluate as mean_over
from gptjax.training.task import Loss, Ready, resolve
from gptjax.weights.load import LABELS

__all__ = ["batch_shapes", "evaluate", "loss", "plan", "prepare", "refuse_missing"]
RESULTS = "test.json"


def evaluate(result: TrainResult, held_out: PairRows | None, say: Callable[[str], None]) -> None:
    """Evaluates the reward model on the held-out pairs, and writes the scores to test.json.

    The scores of the reward model are the loss, the accuracy (how often the chosen answer has the larger reward) with
    its 95 % confidence interval, and the mean reward margin. If test.json exists already, the scores are not computed
    again, and a summary of the scores in test.json is printed.

    Args:
        held_out: the test pairs. None: the test pairs are read again.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        rows = held_out or prefer.encoded_pairs(result.cfg, tuning.base_model(result.cfg))[1][2]
        batches = preferences.eval_batches(rows, result.cfg.train.batch_size)
        mean, metrics = mean_over(jax.jit(loss(result.cfg)), result.params, batches)
        n, values = int(mean.weight), {name: metric.value() for name, metric in metrics.items()}
        accuracy_interval = list(interval(float(metrics["accuracy"].total), n))
        write_json(file, {"pairs": n, "loss": mean.value(), **values, "accuracy_interval": accuracy_interval})
    say(use_json(file, summary))


def summary(scores: dict[str, Any]) -> str:
    low, high = scores["accuracy_interval"]
    return (
        f"test    {scores['pairs']} held-out pairs: accuracy {scores['accuracy']:.1%} (95 % interval {low:.1%}-"
        f"{high:.1%}; chosen answer has larger reward), margin {scores['margin']:.3f}, loss {scores['loss']:.4f}"
    )


def loss(cfg: Config) -> Loss:
    return losses.reward_model(cfg.model, cfg.reward_model.center)


def _with_head(model: ModelConfig) -> ModelConfig:
    """Returns the config of a model with a reward head.

    The reward head has no bias, because the Bradley-Terry loss does not depend on the bias.
    """
    return dataclasses.replace(model, n_classes=1, cls_bias=False)


def prepare(cfg: Config, progress: Progress) -> Ready:
    base = tuning.base_model(cfg)
    size = cfg.train.batch_size
    model = _with_head(base.cfg.computed_as(cfg.model))
    with progress.phase("preparing the data"):
        tokenizer, rows, lines = prefer.encoded_pairs(cfg, base)
    train, val, test = rows
    resolved = resolve(cfg, model, len(train.tokens), size)
    key = jax.random.key(cfg.seed)
    heads = {"cls_head": new_head(jax.random.fold_in(key, 1), model)}
    trainable, fingerprint = tuning.load_base(resolved, base, heads, jax.random.fold_in(key, 2), progress)
    labels = {"labels": ["reward"], "pooling": "last", "max_length": model.context_length, "prompt": "{text}"}
    task = tuning.make_task(
        resolved,
        trainable,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: preferences.batch(train, step, batch_size=size, seed=cfg.seed),
        eval_batches=lambda: preferences.eval_batches(val, size),
        width=train.tokens.shape[1],
        data=loader.fingerprint(*train, *val),
        lines=lines,
        files={LABELS: json.dumps(labels, indent=1) + "\n"},
    )
    return Ready(resolved, task, test)


def plan(cfg: Config) -> list[str]:
    """Returns the lines of text that --dry-run prints to summarise a training run."""
    base = tuning.base_model(cfg)
    return prefer.plan_pairs(cfg, base, _with_head(base.cfg))
