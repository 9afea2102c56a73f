"""A mixture of experts in the place of the feed-forward layer: each token goes through its n_active best of n_expert.

    scores = x W_R                                        [E]
    y      = sum over the n_active highest e of softmax(those scores)_e expert_e(x)
    expert = (silu(x W_gate) * x W_up) W_down             SwiGLU, arXiv:2002.05202, eq. 6

Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`): no expert has a capacity, no token is
dropped, and the work is n_active experts a token. Source: Mixtral, arXiv:2401.04088, 2.1.
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
    """d_ff is one expert's. Raises UserError where more experts are active than there are."""

    d_model: int
    d_ff: int
    n_expert: int
    n_active: int

    def __post_init__(self) -> None:
        text = f"n_active ({self.n_active}) must be between 1 and n_expert ({self.n_expert})"
        require((1 <= self.n_active <= self.n_expert, text))


def init(key: jax.Array, cfg: Config) -> Params:
    """router [D, E], up and gate [E, D, F], down [E, F, D]."""
    D, F, E = cfg.d_model, cfg.d_ff, cfg.n_expert
    return kernels(key, {"router": (D, E), "up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)})


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """x [B, T, D] -> [B, T, D], every place for itself."""
    weights, experts = route(params, x, cfg)
    rows = x.reshape(-1, x.shape[-1])
    order = experts.reshape(-1).argsort()  # entry i is token i // n_active through its (i % n_active)th expert
    sizes = jnp.bincount(experts.reshape(-1), length=cfg.n_expert).astype(jnp.int32)
    token = order // cfg.n_active
    groups = rows[token]
    w_up, w_gate, w_down = (dense(params[name]["kernel"]) for name in ("up", "gate", "down"))
    hidden = jax.nn.silu(jax.lax.ragged_dot(groups, w_gate, sizes)) * jax.lax.ragged_dot(groups, w_up, sizes)
    out = jax.lax.ragged_dot(hidden, w_down, sizes)
    return jnp.zeros_like(rows).at[token].add(out * weights.reshape(-1)[order, None]).reshape(x.shape)


def init_cache(cfg: Config, batch: int, length: int = 0) -> tuple[()]:
    """Nothing: a place reads no other."""
    return ()


def extend(params: Params, x: jax.Array, cfg: Config, cache: tuple[()]) -> tuple[jax.Array, tuple[()]]:
    """The next T places, as `apply`."""
    return apply(params, x, cfg), cache


def route(params: Params, x: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Weights [B, T, n_active] float32, which add to 1, and the experts [B, T, n_active] int32 they are for."""
    scores, experts = jax.lax.top_k(linear(x, params["router"]["kernel"]), cfg.n_active)
    return jax.nn.softmax(scores, -1), experts


def balance_loss(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """[] float32, to add to a loss: E sum_e (share of choices that are e) (mean probability of e); 1 is even, and at
    most E where all go to one. Source: arXiv:2101.03961, eq. 4-6, with n_active choices a token."""
    chosen = jax.nn.one_hot(route(params, x, cfg)[1], cfg.n_expert)
    share = chosen.reshape(-1, cfg.n_expert).mean(0)
    probability = jax.nn.softmax(linear(x, params["router"]["kernel"]), -1).reshape(-1, cfg.n_expert).mean(0)
    return cfg.n_expert * (share * probability).sum()
