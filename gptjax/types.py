"""Defines the types that are used in the whole package. This module does not import jax."""

from __future__ import annotations

from typing import Any, NamedTuple

from gptjax.errors import UserError, complaints

__all__ = ["Batch", "Mean", "Metrics", "Params", "RolloutBatch", "UserError", "complaints"]

# `Params` is a nested dict of arrays; for example, params["blocks"]["attn"]["q"]["kernel"] is an array.
Params = dict[str, Any]
Metrics = dict[str, Any]  # A dict that maps the name of each metric to a Mean or a scalar.


class Mean(NamedTuple):
    """A weighted mean before the division: the weighted sum of the values (`total`), and the sum of the weights
    (`weight`).

    To combine several `Mean` objects, add their totals, add their weights, and then divide once. Loss functions return
    a `Mean`, so that gradient accumulation, padding, packing and data parallelism give exactly the mean over the whole
    batch.
    """

    total: Any
    weight: Any

    def value(self) -> Any:
        return self.total / self.weight


class Batch(NamedTuple):
    """A batch for next-token prediction: a pytree of arrays, some of which may be None.

    tokens: The input ids, [B, T] int32.
    targets: The token after each input token, [B, T] int32.
    weights: The loss weight of each target, [B, T] float32, or None if every weight is 1.
    segment_ids: The id of the document that each token belongs to, [B, T] int32, or None if each row is one document.
    positions: The position of each token within its document, [B, T] int32, or None for 0..T-1.
    subtree_end: If documents are token trees (see `data.token_tree`), the index in the row after the last token of the
      subtree that begins at each token, [B, T] int32; None if no document is a token tree.
    """

    tokens: Any
    targets: Any
    weights: Any = None
    segment_ids: Any = None
    positions: Any = None
    subtree_end: Any = None


class RolloutBatch(NamedTuple):
    """A batch of rollouts in B rows, which are padded at the end. A rollout is a prompt with a sampled answer.

    A row holds one rollout or, if `index` is given, N rollouts with the same prompt, merged into a tree of tokens in
    which the prompt occurs once. The last axis of weights, old and reference has an element per token or, if `index` is
    given, an element for each of the up to A targets of an answer.

    tokens: The input ids, [B, T] int32.
    targets: The token after each input token, [B, T] int32.
    weights: The loss weights [B, T] float32: 1 for targets that are tokens of the answer, including the end token of
      the answer; 0 for all other targets.
    segment_ids: The id of the document that each token belongs to, [B, T] int32, as in `Batch`, or None.
    positions: The position of each token within its document, [B, T] int32, as in `Batch`, or None.
    old: The log-probability of each target under the sampler, at the sampling temperature, [B, T] float32.
    reference: The log-probability of each target under the reference model, [B, T] float32, or None if the loss has
      no KL penalty.
    advantages: The advantage of each answer, [B] float32.
    subtree_end: The end of the subtree that begins at each token, [B, T] int32, as in `Batch`, or None.
    index: The index in the row of each target of each answer, [B, N, A] int32, or None. If `index` is given, weights,
      old and reference have the shape [B, N, A], and advantages has the shape [B, N].

    The log-probabilities `old` and `reference` are used only where `weights` is 1. If a row of a batch has no answer,
    all loss weights of the row are 0.
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
