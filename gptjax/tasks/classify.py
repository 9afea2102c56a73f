"""Classification: one vector of a text, a linear head on it, cross-entropy over classes."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.gpt import backbone, init_params
from gptjax.ops.linear import linear
from gptjax.ops.loss import cross_entropy
from gptjax.tasks.base import Task
from gptjax.types import Mean, Metrics, Params

Pooling = Literal["last", "first", "mean"]


def task(cfg: ModelConfig, pooling: Pooling = "last") -> Task:
    """`cfg.n_classes` classes; a batch has tokens [B, T] int32 with padding on the right, lengths [B] of what is real,
    labels [B] int32, and weights [B] float32, 0 for rows that only fill up.

    The loss is in nats, summed over texts; its metrics hold `accuracy`.
    """

    def loss(params: Params, batch: Any, key: jax.Array | None) -> tuple[Mean, Metrics]:
        key = key if cfg.dropout else None
        logits = class_logits(params, batch.tokens, batch.lengths, cfg, pooling, dropout_key=key)
        right = (logits.argmax(-1) == batch.labels) * batch.weights
        return cross_entropy(logits, batch.labels, batch.weights), {"accuracy": Mean(right.sum(), batch.weights.sum())}

    return Task(prepare=lambda batch: batch, init=lambda key: init_params(key, cfg), loss=loss)


def class_logits(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cfg: ModelConfig,
    pooling: Pooling = "last",
    *,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """[B, n_classes] float32, from `params["cls_head"]`. Padding stands on the right and cannot be seen.

    Args:
        pooling: the hidden state of the last real token, of the first, or the mean over the real ones.
    """
    hidden = backbone(params, tokens, cfg, dropout_key=dropout_key)
    if pooling == "first":
        pooled = hidden[:, 0]
    elif pooling == "last":
        pooled = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, 1)[:, 0]
    else:
        real = (jnp.arange(tokens.shape[1]) < lengths[:, None])[..., None]
        pooled = jnp.where(real, hidden, 0).sum(1) / lengths[:, None]
    head = params["cls_head"]
    return linear(pooled.astype(jnp.float32), head["kernel"], head["bias"])
