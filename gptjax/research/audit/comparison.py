"""What tuning changed, on a set of prompts."""

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
    """[n] each: KL(base || tuned), nats a token; share of places where both find the same token likeliest; loss of the
    prompt under each, nats a token."""

    kl: np.ndarray
    agree: np.ndarray
    before: np.ndarray
    after: np.ndarray


def drift(base: tuple[Params, ModelConfig], tuned: tuple[Params, ModelConfig], batch: Batch) -> Drift:
    """What tuning changed on rows of text.

    Raises:
        UserError: the models have different vocabularies.
    """
    if base[1].vocab_size != tuned[1].vocab_size:
        raise UserError(
            f"drift compares two models of one vocabulary: they have {base[1].vocab_size} and {tuned[1].vocab_size} ids"
        )

    @jax.jit
    def some(first: Params, second: Params, part: Batch) -> tuple[jax.Array, ...]:
        a, b = (
            jax.nn.log_softmax(forward(params, part.tokens, cfg))
            for params, cfg in ((first, base[1]), (second, tuned[1]))
        )
        share = part.weights / jnp.maximum(part.weights.sum(1, keepdims=True), 1e-9)
        losses = (-jnp.take_along_axis(x, part.targets[..., None], -1)[..., 0] for x in (a, b))
        each = ((jnp.exp(a) * (a - b)).sum(-1), a.argmax(-1) == b.argmax(-1), *losses)
        return tuple((x * share).sum(1) for x in each)

    size = max(1, CHUNK_BYTES // (16 * batch.tokens.shape[1] * base[1].vocab_size))
    return Drift(*in_chunks(lambda part: some(base[0], tuned[0], part), batch, size))
