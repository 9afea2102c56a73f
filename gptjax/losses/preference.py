"""Losses for preference optimisation on chosen and rejected answers (DPO, IPO, ORPO, KTO and SimPO)."""

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
BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}  # default value of `beta` for each loss
NEEDS_REFERENCE = ("dpo", "ipo", "kto")


class Answers(NamedTuple):
    """The inputs of a preference loss for B rows of P pairs, [B, P, 2] float32; the last axis is (chosen, rejected).

    now        log p, the log-probability of each answer under the policy, summed over its tokens and the end token
    before     log p_reference, the same log-probability under the reference model, the policy before training
    length     number of tokens of each answer, including the end token
    present    [B, P], 1 where there is a pair, 0 for padding
    """

    now: jax.Array
    before: jax.Array
    length: jax.Array
    present: jax.Array


LossAndRewards = tuple[jax.Array, jax.Array]  # loss of each pair [B, P], and rewards of its two answers [B, P, 2]


def dpo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the DPO loss, -log sigmoid(r_chosen - r_rejected), with rewards r = beta log(p / p_reference).

    Source: arXiv:2305.18290, eq. 7.
    """
    reward = beta * (x.now - x.before)
    return -jax.nn.log_sigmoid(reward[..., 0] - reward[..., 1]), reward


def ipo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the IPO loss, (h_chosen - h_rejected - 1 / (2 beta))^2.

    h is log(p / p_reference) of an answer divided by its number of tokens, as in TRL.

    Source: arXiv:2310.12036, eq. 17.
    """
    ratio = (x.now - x.before) / x.length
    return jnp.square(ratio[..., 0] - ratio[..., 1] - 1 / (2 * beta)), beta * ratio


def orpo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the ORPO loss: the chosen answer's mean cross-entropy, minus beta log sigmoid(log odds ratio).

    The odds ratio is the odds of the chosen answer divided by the odds of the rejected answer. The odds of an answer
    are p / (1 - p), where p is the geometric mean of its tokens' probabilities.

    Source: arXiv:2403.07691.
    """
    mean = jnp.minimum(x.now / x.length, -1e-6)
    odds = mean - jnp.log(-jnp.expm1(mean))
    return -mean[..., 0] - beta * jax.nn.log_sigmoid(odds[..., 0] - odds[..., 1]), beta * mean


def kto(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the KTO loss: the sum of a term for the chosen and a term for the rejected answer.

    With h = log(p / p_reference) of the answer and a KL reference point z, the term of a chosen answer is
    1 - sigmoid(beta (h - z)), and the term of a rejected answer is 1 - sigmoid(beta (z - h)).

    The reference point of the chosen answers is the mean log(p / p_reference) of the rejected answers in the batch, or
    0 if this mean is negative. In the same way, the reference point of the rejected answers is computed from the chosen
    answers, as in TRL's kto_pair. The KTO loss of a pair therefore depends on the other pairs in the batch. The KTO
    paper estimates the KL reference point differently, from mismatched questions and answers.

    Source: arXiv:2402.01306, eq. 8.
    """
    ratio = x.now - x.before
    mean = (ratio * x.present[..., None]).sum((0, 1)) / jnp.maximum(x.present.sum(), 1)
    kl = jax.lax.stop_gradient(jnp.maximum(mean, 0))
    chosen = 1 - jax.nn.sigmoid(beta * (ratio[..., 0] - kl[1]))
    rejected = 1 - jax.nn.sigmoid(beta * (kl[0] - ratio[..., 1]))
    return chosen + rejected, beta * ratio


def simpo(x: Answers, beta: float, margin: float) -> LossAndRewards:
    """Computes the SimPO loss, -log sigmoid(r_chosen - r_rejected - margin).

    The reward r of an answer is beta times the mean log-probability of its tokens.

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
    """Returns two arrays [B, P, 2] float32: the log-probability of each answer, and its number of tokens.

    Both include the end token of the answer. If the policy is a frozen model with a LoRA adapter, the reference model
    is the frozen model: to compute its log-probabilities, pass the params without the adapter.

    Args:
        batch: the `PairBatch`, whose arrays tokens, targets, weights, segment_ids [B, T] and present [B, P] are used.
            Segment 2 p + 1 is the chosen answer of pair p, and segment 2 p + 2 the rejected answer.
    """
    log_probs = token_log_probs(params, batch, cfg, key)
    n = 2 * batch.present.shape[1]
    mask = batch.segment_ids[:, None] == jnp.arange(1, n + 1)[:, None]  # mask of each answer's tokens, [B, 2 P, T]
    counts = jnp.where(mask, batch.weights[:, None], 0.0)
    sums = jnp.einsum("bst,bt->bs", counts, log_probs, precision="highest")  # GPUs and TPUs do not round the operands
    lengths = counts.sum(-1)
    return sums.reshape(-1, n // 2, 2), lengths.reshape(-1, n // 2, 2)


def preference(
    cfg: ModelConfig, kind: Kind = "dpo", *, beta: float | None = None, margin: float = 1.0
) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the preference loss named `kind`, averaged over pairs, for a `gptjax.data.preferences.PairBatch`.

    The metrics are `margin`, the reward of the chosen answer minus the reward of the rejected answer, and `accuracy`,
    the fraction of pairs with a margin above 0.
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
