"""Compares the predictions of a base model and a fine-tuned model on a set of prompts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import forward
from gptjax.research.audit.text import CHUNK_BYTES
from gptjax.research.influence import in_chunks
from gptjax.types import Batch, Params


class Drift(NamedTuple):
    """Differences between the predictions of a base model and a fine-tuned model on n prompts.

    Every attribute is an array of shape [n], with one value per prompt.

    Attributes:
        kl: KL divergence KL(base || tuned), in nats per token.
        agree: fraction of positions at which both models have the same most likely token.
        before, after: loss of the prompt under the base model and under the fine-tuned model, in nats per token.
    """

    kl: np.ndarray
    agree: np.ndarray
    before: np.ndarray
    after: np.ndarray


def drift(base: tuple[Params, ModelConfig], tuned: tuple[Params, ModelConfig], batch: Batch) -> Drift:
    """Compares the predictions of a base model and a fine-tuned model on each row of a batch of text.

    Raises:
        UserError: the vocabularies of the models differ in size.
    """
    if base[1].vocab_size != tuned[1].vocab_size:
        raise UserError(
            f"drift compares models of one vocabulary: expected equal sizes, got {base[1].vocab_size} and "
            f"{tuned[1].vocab_size}"
        )

    @jax.jit
    def compare(first: Params, second: Params, chunk: Batch) -> tuple[jax.Array, ...]:
        a, b = (
            jax.nn.log_softmax(forward(params, chunk.tokens, cfg))
            for params, cfg in ((first, base[1]), (second, tuned[1]))
        )
        weights = chunk.weights / jnp.maximum(chunk.weights.sum(1, keepdims=True), 1e-9)
        losses = (-jnp.take_along_axis(x, chunk.targets[..., None], -1)[..., 0] for x in (a, b))
        each = ((jnp.exp(a) * (a - b)).sum(-1), a.argmax(-1) == b.argmax(-1), *losses)
        return tuple((x * weights).sum(1) for x in each)

    size = max(1, CHUNK_BYTES // (16 * batch.tokens.shape[1] * base[1].vocab_size))
    return Drift(*in_chunks(lambda chunk: compare(base[0], tuned[0], chunk), batch, size))
