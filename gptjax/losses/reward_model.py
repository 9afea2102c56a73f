"""This module defines the loss of reward models, which trains a linear head to score the chosen answer of a pair higher
than the rejected answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.losses.classify import class_logits
from gptjax.ops.dropout import off
from gptjax.types import Mean, Metrics, Params

if TYPE_CHECKING:
    from gptjax.data.preferences import PairBatch


def reward_model(cfg: ModelConfig, center: float = 0.0) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the loss of a reward model, averaged over pairs, for a `gptjax.data.preferences.PairBatch`.

    The loss of a pair is -log sigmoid(r_chosen - r_rejected) + center * (r_chosen + r_rejected)^2, where r_chosen and
    r_rejected are the rewards of the chosen and the rejected answer. The term -log sigmoid(r_chosen - r_rejected) is
    the negative log-likelihood of the Bradley-Terry model, in nats. The Bradley-Terry term of the loss does not change
    if a constant is added to the rewards of both answers. The loss term center * (r_chosen + r_rejected)^2 draws the
    mean reward of the two answers of a pair to 0. The metric `margin` is the reward of the chosen answer minus the
    reward of the rejected answer. The metric `accuracy` is the fraction of pairs in which the chosen answer has the
    higher reward.

    Sources: arXiv:2203.02155, eq. 1 (Bradley-Terry term); arXiv:2312.09244, as in TRL (centering term).
    """

    def loss(params: Params, batch: PairBatch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        rewards = answer_rewards(params, batch, cfg, None if off(cfg.dropout) else key)
        gap, present, n = rewards[..., 0] - rewards[..., 1], batch.present, batch.present.sum()
        losses = -jax.nn.log_sigmoid(gap) + center * jnp.square(rewards.sum(-1))
        metrics = {
            "margin": Mean((gap * present).sum(), n),
            "accuracy": Mean(((gap > 0).astype(jnp.float32) * present).sum(), n),
        }
        return Mean((losses * present).sum(), n), metrics

    return loss


def answer_rewards(params: Params, batch: PairBatch, cfg: ModelConfig, key: jax.Array | None = None) -> jax.Array:
    """Returns the rewards of the chosen and the rejected answer of each pair, [B, P, 2] float32.

    The reward of an answer is the logit of the model's only class, computed from the hidden state of the answer's last
    token.

    Args:
        batch: the `PairBatch`, whose arrays tokens, segment_ids [B, T] and present [B, P] are used. Segment 2 p + 1 is
            the chosen answer of pair p, and segment 2 p + 2 is the rejected answer.
        key: PRNG key of the dropout. None: dropout is off.
    """
    n = 2 * batch.present.shape[1]
    logits = class_logits(params, batch.tokens, batch.segment_ids, cfg, n=n, dropout_key=key)  # [B, 2 P, 1]
    return logits.reshape(-1, n // 2, 2)
