"""Gated DeltaNet: linear attention with a recurrent state of constant size.

Each attention head has one state matrix S, which maps keys to values:
    S_t = a_t S_t-1 (I - b_t k_t k_t^T) + b_t v_t k_t^T     decay by a_t, then replace the value stored for k_t by v_t
    o_t = S_t q_t

The queries q, keys k and values v pass through a short causal convolution and SiLU, and q and k are L2-normalised. With
the learned parameters A, d and W, a Gated DeltaNet layer computes from its input x the decay exp(-A softplus(x W_a +
d)), the write strength sigmoid(x W_b) and, from the product o of state matrix and query, the output norm(o) silu(x W_g)
W_O. Gated DeltaNet is described in arXiv:2412.06464, equation 10, section 3.4 and figure 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.linear import linear
from gptjax.ops.norm import rms_norm
from gptjax.research.architectures.common import kernels, norm_scale, require
from gptjax.types import Params


@dataclass(frozen=True)
class Config:
    """Sizes of the Gated DeltaNet layer.

    Attributes:
        d_model: size of the layer's inputs and outputs.
        n_head: number of heads.
        d_head: size of a key and of a value.
        conv_width: number of tokens that the causal convolution sees. 1: no convolution.

    Raises:
        UserError: conv_width is below 1.
    """

    d_model: int
    n_head: int
    d_head: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        require((self.conv_width >= 1, f"conv_width ({self.conv_width}) must be at least 1: the current token"))


class Cache(NamedTuple):
    """The recurrent state of a Gated DeltaNet layer, for B rows and N heads of size H = d_head.

    Attributes:
        state: transposed state matrices S^T, [B, N, H, H] float32. Rows are key channels, columns are value channels.
        tail: last inputs of the convolution, [B, conv_width - 1, 3*N*H] float32. Zero before the first token.
    """

    state: jax.Array
    tail: jax.Array


def init(key: jax.Array, cfg: Config) -> Params:
    """Initialises the parameters of a Gated DeltaNet layer.

    The kernels [in, out] are drawn from the normal distribution N(0, 1 / in), and the decay rates A from the uniform
    distribution U(1, 16). The bias d in the decay exp(-A softplus(x W_a + d)) is drawn so that softplus(d) is
    log-uniform in [0.001, 0.1]. The decay rates A and the bias d are initialised as in the code of Mamba-2
    (arXiv:2405.21060).
    """
    D, N, wide = cfg.d_model, cfg.n_head, cfg.n_head * cfg.d_head
    shapes = dict.fromkeys(("q", "k", "v", "gate"), (D, wide))
    shapes |= {"o": (wide, D), "forget": (D, N), "write": (D, N)}
    conv, rates, steps = jax.random.split(jax.random.fold_in(key, len(shapes)), 3)
    step = jnp.exp(jax.random.uniform(steps, (N,), minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
    params = kernels(key, shapes) | {"norm": norm_scale(cfg.d_head)}
    params["conv"] = {"weight": jax.random.normal(conv, (cfg.conv_width, 3 * wide)) * cfg.conv_width**-0.5}
    params["forget"] |= {
        "log_rate": jnp.log(jax.random.uniform(rates, (N,), minval=1.0, maxval=16.0)),
        "bias": step + jnp.log(-jnp.expm1(-step)),  # The bias is the inverse softplus of `step`.
    }
    return params


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """Applies a causal Gated DeltaNet layer to x [B, T, D], and returns the outputs [B, T, D]."""
    return extend(params, x, cfg, init_cache(cfg, x.shape[0]))[0]


def init_cache(cfg: Config, batch: int, length: int = 0) -> Cache:
    """Returns an empty cache for `batch` rows; the size of the cache does not depend on `length`."""
    wide = 3 * cfg.n_head * cfg.d_head
    return Cache(jnp.zeros((batch, cfg.n_head, cfg.d_head, cfg.d_head)), jnp.zeros((batch, cfg.conv_width - 1, wide)))


def extend(params: Params, x: jax.Array, cfg: Config, cache: Cache) -> tuple[jax.Array, Cache]:
    """Applies Gated DeltaNet to the next T tokens x [B, T, D], and returns the outputs and the updated cache."""
    (B, T, _), N = x.shape, cfg.n_head
    inputs = jnp.concatenate([linear(x, params[name]["kernel"]) for name in "qkv"], -1)
    inputs = jnp.concatenate([cache.tail, inputs], 1)
    mixed = sum(w * inputs[:, i : i + T] for i, w in enumerate(params["conv"]["weight"]))
    q, k, v = (a.reshape(B, T, N, -1) for a in jnp.split(jax.nn.silu(mixed), 3, -1))
    o, state = gated_delta_rule(_unit(q), _unit(k), v, *gates(params, x), cache.state)
    gate = jax.nn.silu(linear(x, params["gate"]["kernel"]))
    o = rms_norm(o, params["norm"]["scale"]).reshape(B, T, -1) * gate
    return linear(o, params["o"]["kernel"]), Cache(state, inputs[:, T:])


def gates(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the decay and the write strength of every token and head, two arrays [B, T, N] of values from 0 to 1."""
    forget = params["forget"]
    rate = jax.nn.softplus(linear(x, forget["kernel"], forget["bias"]))
    return jnp.exp(-jnp.exp(forget["log_rate"]) * rate), jax.nn.sigmoid(linear(x, params["write"]["kernel"]))


def gated_delta_rule(
    q: jax.Array, k: jax.Array, v: jax.Array, a: jax.Array, b: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the recurrence of the gated delta rule with `jax.lax.scan` over tokens.

    Args:
        q, k, v: queries, keys and values, [B, T, N, H] each.
        a, b: decay and write strength, [B, T, N] each.
        state: initial state [B, N, H, H], laid out as `Cache.state`.

    Returns:
        Outputs o [B, T, N, H], and the state after the last token.
    """

    def step(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, a, b = inputs
        state = a[..., None, None] * state
        stored = jnp.einsum("BNK,BNKV->BNV", k, state)
        state = state + jnp.einsum("BNK,BNV->BNKV", k, b[..., None] * (v - stored))
        return state, jnp.einsum("BNK,BNKV->BNV", q, state)

    state, o = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (q, k, v, a, b)))
    return o.swapaxes(0, 1), state


def _unit(x: jax.Array) -> jax.Array:
    """L2-normalises x along its last axis, with epsilon 1e-6 as in the code of the Gated DeltaNet paper's authors."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
