"""This module defines the next-token cross-entropy, which is the loss of pretraining and of instruction tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from gptjax.config import ModelConfig
from gptjax.model.gpt import backbone, head_factors
from gptjax.ops.dropout import off
from gptjax.ops.loss import linear_cross_entropy, linear_log_probs, linear_log_probs_and_entropies
from gptjax.ops.precision import matmul_precision, with_matmul_precision
from gptjax.types import Batch, Mean, Metrics, Params, RolloutBatch

if TYPE_CHECKING:
    from gptjax.data.preferences import PairBatch


def next_token(cfg: ModelConfig, *, chunk: int | None = None) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the loss function of next-token prediction for batches of type `gptjax.types.Batch`.

    Args:
        chunk: number of tokens whose logits are in memory at once. None: the default chunk size of
            `linear_cross_entropy`. Small chunks slow down training only if the LM head is trained, because
            every chunk then adds its contribution to the gradient of the whole head.
    """

    @matmul_precision(cfg)
    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        """Returns the next-token cross-entropy in nats, as a `Mean` over the targets, and an empty dict of metrics.

        If `key` is None, dropout is off.
        """
        hidden = backbone(
            params, batch.tokens, cfg, positions=batch.positions, segment_ids=batch.segment_ids,
            subtree_end=batch.subtree_end, dropout_key=None if off(cfg.dropout) else key,
        )  # fmt: skip
        hidden, head = head_factors(params, hidden, cfg)
        mean = linear_cross_entropy(
            hidden, head, batch.targets, batch.weights, cap=cfg.logit_softcap, dtype=cfg.dtype, chunk=chunk
        )
        return mean, {}

    return loss


@with_matmul_precision
def token_log_probs(
    params: Params,
    batch: Batch | PairBatch | RolloutBatch,
    cfg: ModelConfig,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Returns the log-probability of every target token under the model, [B, T] float32.

    `token_log_probs` uses the tokens, targets and segment_ids of the batch, and the positions and subtree_end if the
    batch contains positions and subtree_end.

    Args:
        key: random key for dropout, or None for no dropout.
        temperature: sampling temperature by which the logits are divided.
    """
    hidden, head = _head_factors(params, batch, cfg, key)
    return linear_log_probs(
        hidden, head, batch.targets, cap=cfg.logit_softcap, dtype=cfg.dtype, temperature=temperature
    )


@with_matmul_precision
def token_log_probs_and_entropies(
    params: Params,
    batch: Batch | PairBatch | RolloutBatch,
    cfg: ModelConfig,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target and the entropy of the model's distribution at each position.

    The log-probabilities, which equal the result of `token_log_probs`, and the entropies are in nats, [B, T] float32
    each. No gradient flows through the entropies.
    """
    hidden, head = _head_factors(params, batch, cfg, key)
    return linear_log_probs_and_entropies(
        hidden, head, batch.targets, cap=cfg.logit_softcap, dtype=cfg.dtype, temperature=temperature
    )


def _head_factors(
    params: Params, batch: Batch | PairBatch | RolloutBatch, cfg: ModelConfig, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    hidden = backbone(
        params, batch.tokens, cfg, positions=getattr(batch, "positions", None), segment_ids=batch.segment_ids,
        subtree_end=getattr(batch, "subtree_end", None), dropout_key=key,
    )  # fmt: skip
    return head_factors(params, hidden, cfg)
