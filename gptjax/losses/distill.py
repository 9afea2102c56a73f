"""Knowledge distillation: a student learns the probabilities that a teacher gives to the next token, or to a class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.losses.classify import Pooling, class_logits
from gptjax.model.gpt import backbone, head_factors
from gptjax.ops.dropout import off
from gptjax.ops.loss import Head, map_logits
from gptjax.ops.precision import matmul_precision, with_matmul_precision
from gptjax.types import Batch, Mean, Metrics, Params, RolloutBatch

if TYPE_CHECKING:
    from gptjax.data.classification import LabelledBatch

Divergence = Literal["forward", "reverse", "js"]
NO_TOKEN = -1e15  # logit of an excluded token; finite, because the gradient of -inf would be nan


class TeacherBatch(NamedTuple):
    """A batch for next-token prediction with the teacher's log-probabilities, which `teacher_log_probs` computes.

    tokens, targets, weights, segment_ids   [B, T], as in `gptjax.types.Batch`
    ids         [B, T, K] int32    the K most probable tokens under the teacher, the most probable first
    log_probs   [B, T, K + 1] float32, or [B, T, K] if K is the vocabulary size: the log-probabilities of these tokens
                and, last, of all other tokens together
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    ids: Any
    log_probs: Any


def divergence(student: jax.Array, teacher: jax.Array, kind: Divergence = "forward", beta: float = 0.5) -> jax.Array:
    """Returns the divergence of two distributions, [..] in nats.

    forward   KL(teacher || student): the student covers everything that the teacher considers probable
    reverse   KL(student || teacher): the student avoids what the teacher considers improbable
    js        beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student: the
              generalised Jensen-Shannon divergence

    Args:
        student, teacher: log-probabilities, [.., V].
        beta: weight of the teacher in the mixture m of `js`, between 0 and 1 (exclusive).

    Source: arXiv:2306.13649, section 2; equal to TRL's `generalized_jsd_loss` before its reduction, in which beta=0 is
    `forward` and beta=1 is `reverse`.
    """

    def kl(p: jax.Array, q: jax.Array) -> jax.Array:
        return (jnp.exp(p) * (p - q)).sum(-1)

    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    mixture = jnp.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def coarse_log_probs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the log-probabilities of the K tokens `ids` [.., K] and, last, of all other tokens together.

    The result is [.., K + 1] float32, or [.., K] if K is the size V of the vocabulary, because there are then no other
    tokens. All other tokens count as one outcome, so that the probabilities sum to 1. A divergence of such coarse
    distributions is at most that of the full distributions (data processing inequality), and equal to it if K is V.
    """
    norm = jax.nn.logsumexp(logits, -1, keepdims=True)
    known = jnp.take_along_axis(logits, ids, -1) - norm
    if ids.shape[-1] == logits.shape[-1]:
        return known
    # The sum over the other tokens is computed from their logits: 1 - sum(exp(known)) would be rounded to 0 if the
    # model is almost certain.
    others = jnp.put_along_axis(logits, ids, NO_TOKEN, -1, inplace=False)
    return jnp.concatenate([known, jax.nn.logsumexp(others, -1, keepdims=True) - norm], -1)


def distill(
    cfg: ModelConfig,
    teacher_cfg: ModelConfig,
    *,
    kind: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the distillation loss, alpha CE + (1 - alpha) temperature^2 D, as a `Mean` over tokens.

    CE is the cross-entropy of the next token, and D the divergence between the teacher's and the student's
    distributions softmax(logits / temperature). The factor temperature^2 keeps the size of the gradient, which the
    temperature divides by temperature^2 (arXiv:1503.02531, section 2).

    For a `gptjax.types.Batch`, which must have no token trees, the loss runs the teacher: the parameters are those of
    the student and params["teacher"], for which there is no gradient. For a `TeacherBatch` it needs no teacher; its
    log-probabilities must have been computed with the same temperature.

    For a `gptjax.types.RolloutBatch`, answers that the student generated, the loss is temperature^2 D, whatever alpha
    is, as in GKD (arXiv:2306.13649, algorithm 1): the expected gradient of the cross-entropy of samples from the
    student itself is zero. Such a batch has no token trees either; `old` and `advantages` are not used.

    The embedding of a model may have more rows than the tokenizer has ids. Only the logits that both models have are
    used.

    The metrics are cross_entropy, divergence (D, in nats) and agreement, the fraction of tokens for which the most
    probable token of both models is the same.

    Args:
        cfg: the student's model config.
        teacher_cfg: the teacher's model config.
        kind, beta: see `divergence`.
    """
    n = min(cfg.vocab_size, teacher_cfg.vocab_size)

    def with_teacher(student: jax.Array, teacher: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        student, teacher = student[:, :n], teacher[:, :n]
        soft, soft_teacher = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
        return _values(student, targets, divergence(soft, soft_teacher, kind, beta), teacher.argmax(-1))

    def with_log_probs(
        student: jax.Array, targets: jax.Array, ids: jax.Array, teacher: jax.Array
    ) -> dict[str, jax.Array]:
        student = student[:, :n]
        soft = coarse_log_probs(student / temperature, ids)
        return _values(student, targets, divergence(soft, teacher, kind, beta), ids[:, 0])

    @matmul_precision(cfg)
    def loss(params: Params, batch: Batch | TeacherBatch | RolloutBatch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        heads = [_head(params, batch, cfg, None if off(cfg.dropout) else key)]
        if isinstance(batch, TeacherBatch):
            values = map_logits(with_log_probs, heads, (batch.targets, batch.ids, batch.log_probs))
        else:
            heads.append(_head(jax.lax.stop_gradient(params["teacher"]), batch, teacher_cfg))
            values = map_logits(with_teacher, heads, (batch.targets,))
        weights = jnp.ones(batch.targets.shape, jnp.float32) if batch.weights is None else batch.weights
        return _weighted(values, weights, temperature, 0.0 if isinstance(batch, RolloutBatch) else alpha)

    return loss


@with_matmul_precision
def teacher_log_probs(
    params: Params, batch: Batch, cfg: ModelConfig, *, top_k: int, vocab_size: int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns the `ids` and `log_probs` of a `TeacherBatch`: the teacher's K = `top_k` most probable tokens.

    Args:
        params, cfg: the teacher.
        vocab_size: number of logits to use, the smaller of the vocabulary sizes of teacher and student.
        temperature: temperature of the softmax, that of the loss.
    """

    def of_tokens(logits: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits[:, :vocab_size] / temperature
        ids = jax.lax.top_k(logits, top_k)[1]
        return ids, coarse_log_probs(logits, ids)

    return map_logits(of_tokens, [_head(params, batch, cfg)], (batch.targets,))


def distill_classes(
    cfg: ModelConfig,
    teacher_cfg: ModelConfig,
    pooling: Pooling = "last",
    teacher_pooling: Pooling = "last",
    *,
    kind: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the distillation loss of a classifier, as `distill` with the probabilities of the classes, as a `Mean`
    over texts.

    Batches are as in `losses.classify`; params["teacher"] are the parameters of the teacher, a classifier with the same
    classes in the same order. The metrics are those of `distill` and accuracy, the fraction of texts that the student
    classifies correctly.
    """

    def loss(params: Params, batch: LabelledBatch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        key, n = None if off(cfg.dropout) else key, batch.labels.shape[1]
        inputs = batch.tokens, batch.segment_ids
        student = class_logits(params, *inputs, cfg, pooling, n=n, dropout_key=key)
        teacher = class_logits(jax.lax.stop_gradient(params["teacher"]), *inputs, teacher_cfg, teacher_pooling, n=n)
        soft, soft_teacher = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
        labels, weights = jnp.asarray(batch.labels), jnp.asarray(batch.weights)
        values = _values(student, labels, divergence(soft, soft_teacher, kind, beta), teacher.argmax(-1))
        values["accuracy"] = (student.argmax(-1) == labels).astype(jnp.float32)
        return _weighted(values, weights, temperature, alpha)

    return loss


def _head(
    params: Params, batch: Batch | TeacherBatch | RolloutBatch, cfg: ModelConfig, key: jax.Array | None = None
) -> Head:
    hidden = backbone(params, batch.tokens, cfg, segment_ids=batch.segment_ids, dropout_key=key)
    hidden, kernel = head_factors(params, hidden, cfg)
    return Head(hidden, kernel, cfg.logit_softcap, cfg.dtype)


def _values(student: jax.Array, targets: jax.Array, divergences: jax.Array, best: jax.Array) -> dict[str, jax.Array]:
    """Returns the metrics of each token or text, [..], from the student's logits [.., V], the divergences [..] and the
    most probable outcome under the teacher, `best` [..]."""
    return {
        "cross_entropy": -jnp.take_along_axis(jax.nn.log_softmax(student), targets[..., None], -1)[..., 0],
        "divergence": divergences,
        "agreement": (student.argmax(-1) == best).astype(jnp.float32),
    }


def _weighted(
    values: dict[str, jax.Array], weights: jax.Array, temperature: float, alpha: float
) -> tuple[Mean, Metrics]:
    metrics = {name: Mean((value * weights).sum(), weights.sum()) for name, value in values.items()}
    hard, soft = metrics["cross_entropy"].total, metrics["divergence"].total
    return Mean(alpha * hard + (1 - alpha) * temperature**2 * soft, weights.sum()), metrics
