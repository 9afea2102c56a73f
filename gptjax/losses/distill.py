"""This module defines knowledge-distillation losses, which train a student on a teacher's next-token or class
probabilities."""

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
# NO_TOKEN is the logit of each token that a softmax is to leave out. NO_TOKEN is finite, because a logit of -inf would
# have a NaN gradient.
NO_TOKEN = -1e15


class TeacherBatch(NamedTuple):
    """A batch for next-token prediction with the teacher's log-probabilities, which `teacher_log_probs` computes.

    Attributes:
        tokens, targets, weights, segment_ids: arrays [B, T], as in `gptjax.types.Batch`.
        ids: the K most probable tokens under the teacher in descending order of probability, [B, T, K] int32.
        log_probs: the log-probabilities of the tokens in `ids` and, as the last element, the total log-probability of
            all other tokens, [B, T, K + 1] float32. If K is the vocabulary size, the last element is left out.
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    ids: Any
    log_probs: Any


def divergence(student: jax.Array, teacher: jax.Array, kind: Divergence = "forward", beta: float = 0.5) -> jax.Array:
    """Returns the divergence between the student's and the teacher's distributions in nats, [..].

    Args:
        kind: `forward` computes KL(teacher || student), which makes the student cover every token that is probable
            under the teacher. `reverse` computes KL(student || teacher), which makes the student avoid every token
            that is improbable under the teacher. `js` computes the generalised Jensen-Shannon divergence,
            beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.
        student, teacher: log-probabilities of the student and of the teacher, [.., V].
        beta: weight of the teacher in the mixture m of `js`, between 0 and 1 (exclusive).

    Source: arXiv:2306.13649, section 2. The divergences equal TRL's `generalized_jsd_loss` without the reduction over
    tokens; in TRL, beta=0 selects `forward` and beta=1 selects `reverse`.
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
    """Returns the log-probability of each of the K tokens in `ids` [.., K] and the total log-probability of all other
    tokens.

    For K tokens in `ids`, the returned array has the shape [.., K + 1] float32. The last element of the returned array
    is the log-probability of all tokens outside `ids` together, so that the probabilities sum to 1. If the number K of
    tokens in `ids` is the vocabulary size V, the shape of the returned array is [.., K]. The divergence of two
    distributions over K tokens and one outcome for all other tokens is at most the divergence of the full distributions
    over V tokens (data processing inequality), and equals the divergence of the full distributions if K is V.
    """
    norm = jax.nn.logsumexp(logits, -1, keepdims=True)
    known = jnp.take_along_axis(logits, ids, -1) - norm
    if ids.shape[-1] == logits.shape[-1]:
        return known
    # The total probability of the tokens outside `ids` is computed from the logits of these tokens, because 1 -
    # sum(exp(known)) would be rounded to 0 if the model is almost certain.
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
    """Returns the distillation loss of a student language model as a `Mean` over tokens.

    The distillation loss is alpha CE + (1 - alpha) temperature^2 D, where CE is the cross-entropy of the next token,
    and D is the divergence between the teacher's and the student's distributions softmax(logits / temperature).
    Dividing the logits by the temperature scales the gradient of the divergence by 1 / temperature^2; the factor
    temperature^2 in the distillation loss compensates for this scaling (arXiv:1503.02531, section 2).

    For a `gptjax.types.Batch`, which must have no token trees (several continuations of one prefix in a row), the loss
    runs the forward pass of the teacher. For a `Batch`, the params hold the student's parameters and, in
    params["teacher"], the teacher's parameters, which receive no gradient. For a `TeacherBatch`, the loss uses the
    teacher's log-probabilities in the batch, which must have been computed with the temperature of the loss.

    For a `gptjax.types.RolloutBatch`, which holds answers that the student generated, the loss is temperature^2 times
    the divergence D for any alpha, as in GKD (arXiv:2306.13649, algorithm 1). For a `RolloutBatch`, the cross-entropy
    is left out of the loss, because the expected gradient of the cross-entropy on the student's own samples is zero.
    Each row of a `RolloutBatch` must hold one answer instead of a token tree of several answers, and the arrays `old`
    and `advantages` of the batch are not used.

    The teacher's and the student's vocabulary sizes may differ, because an embedding can have more rows than the
    tokenizer has token ids. The distillation loss uses only the logits of token ids that both models have.

    The metrics are cross_entropy (CE, in nats), divergence (D, in nats) and agreement, which is the fraction of
    positions at which both models have the same most probable token.

    Args:
        cfg: the student's model config.
        teacher_cfg: the teacher's model config.
        kind, beta: type of the divergence D, see `divergence`.
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
    """Returns the teacher's `top_k` most probable tokens and the log-probabilities of these tokens, for a
    `TeacherBatch`.

    Args:
        params, cfg: parameters and model config of the teacher.
        vocab_size: number of logits to use: the smaller of the teacher's and the student's vocabulary sizes.
        temperature: temperature of the softmax, which must equal the temperature of the loss.
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
    """Returns the distillation loss of a classifier as a `Mean` over texts.

    The loss is alpha CE + (1 - alpha) temperature^2 D, where CE is the cross-entropy of the class label, and D is the
    divergence between the teacher's and the student's class probabilities softmax(logits / temperature).

    The batches have the form that `losses.classify` describes. params["teacher"] holds the parameters of the teacher,
    which must be a classifier with the same classes in the same order. The metrics are the metrics of `distill` and
    `accuracy`, the fraction of texts that the student classifies correctly.
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
    """Returns the cross-entropy, divergence and agreement of each token or text, [..] each.

    The arguments are the student's logits [.., V], the targets [..], the divergences [..], and `best` [..], which is
    the most probable token or class under the teacher.
    """
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
