"""This module defines preference-optimisation losses on pairs of chosen and rejected answers: DPO, IPO, ORPO, KTO and
SimPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.losses.next_token import token_log_probs
from gptjax.ops.dropout import off
from gptjax.types import Mean, Metrics, Params

if TYPE_CHECKING:
    from gptjax.data.preferences import PairBatch

Kind = Literal["dpo", "ipo", "orpo", "kto", "simpo"]
BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}  # BETA holds the default `beta` of each loss.
NEEDS_REFERENCE = ("dpo", "ipo", "kto")


class Answers(NamedTuple):
    """Holds the inputs of a preference loss for B rows with P pairs of answers each, in arrays of shape [B, P, 2]
    float32 whose last axis is (chosen, rejected).

    Attributes:
        now: log p, the log-probability of each answer under the policy, summed over the tokens and the end token.
        before: log p_reference, the log-probability of each answer under the reference model, which is the policy
            before training.
        length: number of tokens of each answer, including the end token.
        present: mask [B, P], which is 1 for a pair and 0 for padding.
    """

    now: jax.Array
    before: jax.Array
    length: jax.Array
    present: jax.Array


# LossAndRewards is a pair of arrays: the loss per pair [B, P] and the reward per answer [B, P, 2].
LossAndRewards = tuple[jax.Array, jax.Array]


def dpo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the DPO loss, -log sigmoid(r_chosen - r_rejected), where r = beta log(p / p_reference) is the reward of
    an answer with the probabilities p under the policy and p_reference under the reference model.

    Source: arXiv:2305.18290, eq. 7.
    """
    reward = beta * (x.now - x.before)
    return -jax.nn.log_sigmoid(reward[..., 0] - reward[..., 1]), reward


def ipo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the IPO loss, (h_chosen - h_rejected - 1 / (2 beta))^2, where h is the log-ratio of an answer per
    token.

    The log-ratio per token is log(p / p_reference) divided by the number of tokens of the answer, as in TRL, where p
    and p_reference are the probabilities of the answer under the policy and the reference model.

    Source: arXiv:2310.12036, eq. 17.
    """
    ratio = (x.now - x.before) / x.length
    return jnp.square(ratio[..., 0] - ratio[..., 1] - 1 / (2 * beta)), beta * ratio


def orpo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the ORPO loss: the chosen answer's mean cross-entropy, minus beta log sigmoid(log odds ratio).

    The odds ratio is the odds of the chosen answer divided by the odds of the rejected answer. The odds of an answer
    are p / (1 - p), where p is the geometric mean of the probabilities of the answer's tokens.

    Source: arXiv:2403.07691 (ORPO).
    """
    mean = jnp.minimum(x.now / x.length, -1e-6)
    odds = mean - jnp.log(-jnp.expm1(mean))
    return -mean[..., 0] - beta * jax.nn.log_sigmoid(odds[..., 0] - odds[..., 1]), beta * mean


def kto(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the KTO loss of a pair: the sum of a term for the chosen answer and a term for the rejected answer.

    The KTO term of a chosen answer is 1 - sigmoid(beta (h - z)), and the KTO term of a rejected answer is 1 -
    sigmoid(beta (z - h)), where h is log(p / p_reference) of the answer and z is a KL reference point.

    The KL reference point of the chosen answers is the mean log(p / p_reference) of the rejected answers in the batch,
    or 0 if this mean is negative. The KL reference point of the rejected answers is the mean log(p / p_reference) of
    the chosen answers, or 0 if this mean is negative, as in TRL's kto_pair. Through the KL reference points, the KTO
    loss of a pair depends on the other pairs in the batch. The KTO paper estimates the KL reference point from
    mismatched questions and answers instead of other pairs.

    Source: arXiv:2402.01306, eq. 8.
    """
    ratio = x.now - x.before
    mean = (ratio * x.present[..., None]).sum((0, 1)) / jnp.maximum(x.present.sum(), 1)
    kl = jax.lax.stop_gradient(jnp.maximum(mean, 0))
    chosen = 1 - jax.nn.sigmoid(beta * (ratio[..., 0] - kl[1]))
    rejected = 1 - jax.nn.sigmoid(beta * (kl[0] - ratio[..., 1]))
    return chosen + rejected, beta * ratio


def simpo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the SimPO loss, -log sigmoid(r_chosen - r_rejected - margin), where r is the reward of an answer.

    The SimPO reward of an answer is beta times the mean log-probability of the answer's tokens.

    Source: arXiv:2405.14734, eq. 6.
    """
    reward = beta * x.now / x.length
    return -jax.nn.log_sigmoid(reward[..., 0] - reward[..., 1] - margin), reward


LOSSES: dict[str, Callable[[Answers, float, float], LossAndRewards]] = {
    "dpo": dpo,
    "ipo": ipo,
    "orpo": orpo,
    "kto": kto,
    "simpo": simpo,
}


def answer_log_probs(
    params: Params, batch: PairBatch, cfg: ModelConfig, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each answer and the number of tokens of each answer, [B, P, 2] float32 each.

    The log-probability and the number of tokens include the end token of the answer. If the policy is a frozen model
    with a LoRA adapter, the frozen model is the reference model. To compute the reference log-probabilities, pass the
    params without the adapter.

    Args:
        batch: the `PairBatch`, whose arrays tokens, targets, weights, segment_ids [B, T] and present [B, P] are used.
            Segment 2 p + 1 is the chosen answer of pair p, and segment 2 p + 2 is the rejected answer.
    """
    log_probs = token_log_probs(params, batch, cfg, key)
    n = 2 * batch.present.shape[1]
    # `mask` [B, 2 P, T] selects the tokens of each answer.
    mask = batch.segment_ids[:, None] == jnp.arange(1, n + 1)[:, None]
    counts = jnp.where(mask, batch.weights[:, None], 0.0)
    # With the precision "highest", GPUs and TPUs do not round the operands of `einsum`.
    sums = jnp.einsum("bst,bt->bs", counts, log_probs, precision="highest")
    lengths = counts.sum(-1)
    return sums.reshape(-1, n // 2, 2), lengths.reshape(-1, n // 2, 2)


def preference(
    cfg: ModelConfig, kind: Kind = "dpo", *, beta: float | None = None, margin: float = 1.0
) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the preference loss named `kind`, averaged over pairs, for a `gptjax.data.preferences.PairBatch`.

    The metric `margin` is the reward of the chosen answer minus the reward of the rejected answer. The metric
    `accuracy` is the fraction of pairs in which the chosen answer has the higher reward.
    """
    beta = BETA[kind] if beta is None else beta

    def loss(params: Params, batch: PairBatch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        now, length = answer_log_probs(params, batch, cfg, None if off(cfg.dropout) else key)
        present = batch.present
        losses, reward = LOSSES[kind](Answers(now, batch.reference, jnp.maximum(length, 1), present), beta, margin)
        gap, n = reward[..., 0] - reward[..., 1], present.sum()
        metrics = {
            "margin": Mean((gap * present).sum(), n),
            "accuracy": Mean(((gap > 0).astype(jnp.float32) * present).sum(), n),
        }
        return Mean((losses * present).sum(), n), metrics

    return loss
