"""Types that the whole package shares. This module does not import jax."""

from __future__ import annotations

from typing import Any, NamedTuple

from gptjax.errors import UserError, complaints

__all__ = ["Batch", "Mean", "Metrics", "Params", "RolloutBatch", "UserError", "complaints"]

Params = dict[str, Any]  # nested dict of arrays; "blocks/attn/q/kernel" is the path of one of them
Metrics = dict[str, Any]  # dict that maps the name of each metric to a Mean or a scalar


class Mean(NamedTuple):
    """A weighted mean before the division: a weighted sum and the sum of its weights.

    To combine several means, add their totals and their weights, then divide once. Loss functions return a `Mean`, so
    that gradient accumulation, padding, packing and data parallelism give exactly the mean over the whole batch.
    """

    total: Any
    weight: Any

    def value(self) -> Any:
        return self.total / self.weight


class Batch(NamedTuple):
    """One batch for next-token prediction: a pytree, whose optional leaves may be None.

    tokens       [B, T] int32    input ids
    targets      [B, T] int32    the token after each input token
    weights      [B, T] float32  loss weight per target, or None if every weight is 1
    segment_ids  [B, T] int32    id of the document that a token belongs to, or None for one document per row
    positions    [B, T] int32    position within the document, or None for 0..T-1
    subtree_end  [B, T] int32    for documents that are token trees (`data.token_tree`): index in the row from which on
                                 the token is no longer visible, or None if no document is a tree
    """

    tokens: Any
    targets: Any
    weights: Any = None
    segment_ids: Any = None
    positions: Any = None
    subtree_end: Any = None


class RolloutBatch(NamedTuple):
    """A batch of rollouts, each a prompt and a sampled answer, in B rows that are padded at the end.

    A row holds one rollout or, if `index` is given, a token tree of N rollouts with the same prompt. The last axis of
    weights, old and reference is that of the tokens, or with `index` that of the up to A targets of each answer.

    tokens        [B, T] int32    input ids
    targets       [B, T] int32    the token after each input token
    weights       [B, T] float32  1 for the targets that are tokens of the answer, including its end token; else 0
    segment_ids   [B, T] int32    as in `Batch`, or None
    positions     [B, T] int32    as in `Batch`, or None
    old           [B, T] float32  log-probability of each target under the sampler, at the temperature of sampling
    reference     [B, T] float32  the same under the reference model, or None if the loss has no KL penalty
    advantages    [B] float32     the advantage of each answer

    subtree_end   [B, T] int32    as in `Batch`, or None
    index         [B, N, A] int32 place in the row of each target of each answer, or None. With `index`, weights, old
                                  and reference are [B, N, A], and advantages [B, N].

    `old` and `reference` are used where weights is 1 only. The weights of a row without an answer are all 0.
    """

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    old: Any
    reference: Any
    advantages: Any
    subtree_end: Any = None
    index: Any = None
