"""This module defines the classification loss: the cross-entropy of a linear head on the pooled hidden states of a
text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.gpt import backbone
from gptjax.ops.dropout import off
from gptjax.ops.linear import linear
from gptjax.ops.loss import cross_entropy
from gptjax.ops.precision import with_matmul_precision
from gptjax.types import Mean, Metrics, Params

if TYPE_CHECKING:
    from gptjax.data.classification import LabelledBatch

Pooling = Literal["last", "first", "mean"]


def classify(cfg: ModelConfig, pooling: Pooling = "last") -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the classification loss over `cfg.n_classes` classes.

    A batch has B rows, and each row packs up to K texts. The batch consists of tokens and segment_ids [B, T] int32,
    labels [B, K] int32, and weights [B, K] float32. In each row, the segment id of text k (0 to K - 1) is k + 1. In a
    row with fewer than K texts, the weights of the missing texts are 0. The classification loss is the cross-entropy in
    nats, as a `Mean` over texts. The metrics contain `accuracy`, the fraction of texts that are classified correctly.
    """

    def loss(params: Params, batch: LabelledBatch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        key, n = None if off(cfg.dropout) else key, batch.labels.shape[1]
        logits = class_logits(params, batch.tokens, batch.segment_ids, cfg, pooling, n=n, dropout_key=key)
        correct = (logits.argmax(-1) == batch.labels).astype(jnp.float32) * batch.weights
        return cross_entropy(logits, batch.labels, batch.weights), {
            "accuracy": Mean(correct.sum(), batch.weights.sum())
        }

    return loss


@with_matmul_precision
def class_logits(
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    cfg: ModelConfig,
    pooling: Pooling = "last",
    *,
    n: int = 1,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns the class logits [B, n, n_classes] float32 of the texts in segments 1 to n, computed by
    `params["cls_head"]`.

    Tokens attend only to tokens of the same text. Tokens do not attend to other texts or to padding, which has the
    segment id 0.

    Args:
        pooling: the hidden state of a text that is classified: the hidden state of the last token, the hidden state of
            the first token, or the mean hidden state of all tokens.
    """
    hidden = backbone(params, tokens, cfg, segment_ids=segment_ids, dropout_key=dropout_key)
    mask = segment_ids[:, None] == jnp.arange(1, n + 1)[:, None]  # [B, n, T]
    if pooling == "mean":
        count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        share = mask.astype(jnp.float32) / count.astype(jnp.float32)
        # `pooled` is the mean hidden state of each text. With the precision "highest", GPUs and TPUs do not round the
        # operands of `einsum`.
        pooled = jnp.einsum("bnt,btd->bnd", share, hidden.astype(jnp.float32), precision="highest")
    else:
        last = tokens.shape[1] - 1 - mask[..., ::-1].argmax(-1)
        index = last if pooling == "last" else mask.argmax(-1)
        pooled = jnp.take_along_axis(hidden, index[..., None], 1)
    head = params["cls_head"]
    return linear(pooled.astype(jnp.float32), head["kernel"], head.get("bias"))
