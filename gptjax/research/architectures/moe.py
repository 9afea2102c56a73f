"""Mixture of experts (MoE) layer, which replaces the feed-forward layer and routes each token to its top experts.

The router selects n_active of n_expert experts for each token:

    scores = x W_R                                        [E]
    y      = sum_e p_e expert_e(x)                        over the n_active experts e with the highest scores
    p      = softmax(scores of these experts)             [n_active]
    expert = (silu(x W_gate) * x W_up) W_down             SwiGLU, arXiv:2002.05202, eq. 6

Tokens are sorted by expert and multiplied by the experts' weights in a grouped matrix multiplication
(`jax.lax.ragged_dot`). Experts have no capacity limit, so no token is dropped, and exactly n_active experts process
each token.

Source: Mixtral, arXiv:2401.04088, 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gptjax.ops.linear import dense, linear
from gptjax.research.architectures.common import kernels, require
from gptjax.types import Params


@dataclass(frozen=True)
class Config:
    """Sizes of the mixture-of-experts layer.

    Attributes:
        d_model: size D of the layer's inputs and outputs.
        d_ff: hidden size F of one expert.
        n_expert: number E of experts.
        n_active: number of experts that process one token.

    Raises:
        UserError: n_active is below 1 or above n_expert.
    """

    d_model: int
    d_ff: int
    n_expert: int
    n_active: int

    def __post_init__(self) -> None:
        text = f"n_active ({self.n_active}) must be between 1 and n_expert ({self.n_expert})"
        require((1 <= self.n_active <= self.n_expert, text))


def init(key: jax.Array, cfg: Config) -> Params:
    """Initialises the kernels of the router, [D, E], and of E experts of hidden size F.

    The stacked kernels of all E experts are `up` and `gate`, [E, D, F], and `down`, [E, F, D].
    """
    D, F, E = cfg.d_model, cfg.d_ff, cfg.n_expert
    return kernels(key, {"router": (D, E), "up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)})


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """Applies the mixture of experts to each token of x [B, T, D] independently, and returns the outputs [B, T, D]."""
    weights, experts = route(params, x, cfg)
    rows = x.reshape(-1, x.shape[-1])
    # The flattened array `experts` is sorted by expert index. Before sorting, element i of the flattened array
    # `experts` is the index of an expert that processes token i // n_active.
    order = experts.reshape(-1).argsort()
    sizes = jnp.bincount(experts.reshape(-1), length=cfg.n_expert).astype(jnp.int32)
    token = order // cfg.n_active
    groups = rows[token]
    w_up, w_gate, w_down = (dense(params[name]["kernel"]) for name in ("up", "gate", "down"))
    hidden = jax.nn.silu(jax.lax.ragged_dot(groups, w_gate, sizes)) * jax.lax.ragged_dot(groups, w_up, sizes)
    out = jax.lax.ragged_dot(hidden, w_down, sizes)
    return jnp.zeros_like(rows).at[token].add(out * weights.reshape(-1)[order, None]).reshape(x.shape)


def init_cache(cfg: Config, batch: int, length: int = 0) -> tuple[()]:
    """Returns an empty tuple: a mixture-of-experts layer needs no cache, because it processes each token separately."""
    return ()


def extend(params: Params, x: jax.Array, cfg: Config, cache: tuple[()]) -> tuple[jax.Array, tuple[()]]:
    """Applies the mixture of experts to the next T tokens x [B, T, D]; returns the outputs and the unchanged cache."""
    return apply(params, x, cfg), cache


def route(params: Params, x: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Routes each token to its top n_active experts.

    Returns:
        (weights, indices) of the selected experts, [B, T, n_active] each. The weights are float32 and sum to 1 for each
        token. The indices are int32.
    """
    scores, experts = jax.lax.top_k(linear(x, params["router"]["kernel"]), cfg.n_active)
    return jax.nn.softmax(scores, -1), experts


def balance_loss(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """Returns the load balancing loss of the router, a float32 scalar.

    The load balancing loss is E times the sum over the E experts of (fraction of routing choices that select the
    expert) * (mean router probability of the expert). The load balancing loss is 1 if all experts process equally many
    tokens. The load balancing loss reaches its maximum, E / n_active, if every token is routed to the same n_active
    experts and the router assigns probability 0 to all other experts.

    The load balancing loss follows arXiv:2101.03961, eq. 4-6, extended from one expert per token to n_active experts
    per token.
    """
    chosen = jax.nn.one_hot(route(params, x, cfg)[1], cfg.n_expert)
    fraction = chosen.reshape(-1, cfg.n_expert).mean(0)
    probability = jax.nn.softmax(linear(x, params["router"]["kernel"]), -1).reshape(-1, cfg.n_expert).mean(0)
    return cfg.n_expert * (fraction * probability).sum()
