"""The doors of the model: pure functions of a parameter tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.cache import Cache
from gptjax.model.layers import GPT
from gptjax.ops.linear import matmul
from gptjax.ops.loss import softcap
from gptjax.types import Params


def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """Fresh parameters, a nested dict of float32 arrays; blocks are stacked [L, ..].

    init=gpt2: N(0, 0.02), output projections 0.02 / sqrt(2L), embeddings N(0, embed_std), biases 0 (GPT-2's code).
    init=torch: embeddings N(0, 1), linears U(+-1/sqrt(in)), as PyTorch's layers start; the expected first loss of
    gpt2 with an untied head is then ln V + 1/6.
    """
    return GPT(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """The tree of `init_params` as shapes and dtypes, in no memory."""
    return jax.eval_shape(lambda key: init_params(key, cfg), jax.random.key(0))


def backbone(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Token ids [B, T] -> the last hidden state [B, T, D], after the final norm.

    Args:
        positions: [B, T] or [T] int32; None: 0..T-1.
        segment_ids: [B, T] int32; a token sees its own document only.
        dropout_key: None: no dropout.
    """
    return GPT(cfg).apply({"params": params}, tokens, positions, segment_ids, dropout_key)[0]


def head_kernel(params: Params, cfg: ModelConfig) -> Any:
    """[D, V]: the head's own matrix, or the token embedding turned."""
    return params["wte"]["embedding"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]


def lm_logits(params: Params, hidden: jax.Array, cfg: ModelConfig) -> jax.Array:
    """[.., D] -> [.., V] float32, softcapped where cfg says so."""
    logits = matmul(head_kernel(params, cfg), hidden, cfg.dtype).astype(jnp.float32)
    return softcap(logits, cfg.logit_softcap)


def forward(params: Params, tokens: jax.Array, cfg: ModelConfig, **context: Any) -> jax.Array:
    """Token ids [B, T] int32 -> logits [B, T, V] float32; keywords as in `backbone`."""
    return lm_logits(params, backbone(params, tokens, cfg, **context), cfg)


def extend(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, *, valid: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Read tokens [B, T] after those in the cache: prefill (T > 1) and decoding (T == 1) are this one function.

    Args:
        valid: [B, T] bool, False where a token is padding (to the left of a shorter prompt); None: all are real.

    Returns:
        logits [B, T, V] float32 and the cache that now holds these tokens too. The caller keeps
        cache.length + T within the cache's slots.
    """
    B, T = tokens.shape
    valid = jnp.ones((B, T), bool) if valid is None else valid
    before = cache.valid.sum(1, keepdims=True)
    positions = before + jnp.cumsum(valid, 1) - 1
    mask = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
    hidden, cache = GPT(cfg).apply(
        {"params": params}, tokens, jnp.maximum(positions, 0), None, None, cache.replace(valid=mask)
    )
    return lm_logits(params, hidden, cfg), cache.replace(length=cache.length + T)
