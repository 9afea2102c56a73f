"""Multi-head latent attention (MLA): keys and values of all heads are up-projected from one latent vector per token.

    c   = norm(x W_DKV)                    [R]      cached
    k_r = rope(x W_KR)                     [P]      cached, shared by all heads
    q_h = [c_q W_UQ,h ; rope(c_q W_QR,h)]  [H + P]  with c_q = norm(x W_DQ)
    k_h = [c W_UK,h ; k_r]                 [H + P]
    y   = sum_h softmax(q_h k_h^T / sqrt(H + P)) (c W_UV,h) W_O,h

The function `apply` computes the keys and values of all heads from the latent vectors, which is the cheapest method for
many tokens. The function `extend` of multi-head latent attention does not compute keys and values: for each head h, it
multiplies the query by the transpose of W_UK,h, the up-projection matrix of the keys, and multiplies the attention
output by W_UV,h, the up-projection matrix of the values. In `extend`, the cached vectors (a latent vector of R elements
and a RoPE key of P elements per token) serve as one key head that all query heads share.

The equations of multi-head latent attention are from DeepSeek-V2, arXiv:2405.04434, eq. 37-47; section 3.1.2 of the
paper describes the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.attention import attention, heads_attention
from gptjax.ops.linear import dense, linear
from gptjax.ops.norm import rms_norm
from gptjax.ops.position import rope, rope_frequencies, rope_table
from gptjax.research.architectures.common import kernels, norm_scale, require
from gptjax.types import Params


@dataclass(frozen=True)
class Config:
    """Sizes of the multi-head latent attention (MLA) layer.

    Attributes:
        d_model: size D of the layer's inputs and outputs.
        n_head: number N of attention heads.
        d_head: size H of a head, without the channels that RoPE rotates.
        d_latent: size R of the latent vector c, from which keys and values are computed.
        d_rope: size P of the RoPE key k_r. 0: no position embedding.
        d_query_latent: size of the latent vector c_q of the queries. None: queries are projected from x directly.
        rope_base: base of the RoPE frequencies.

    Raises:
        UserError: d_rope is odd.
    """

    d_model: int
    n_head: int
    d_head: int
    d_latent: int
    d_rope: int
    d_query_latent: int | None = None
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        require((self.d_rope % 2 == 0, f"d_rope ({self.d_rope}) must be even: RoPE rotates pairs of channels"))


class Cache(NamedTuple):
    """Cache of multi-head latent attention with S slots.

    Attributes:
        latents: concatenation of the latent vectors c and the RoPE keys k_r, [B, S, R + P] float32.
        length: number of filled slots, int32. The filled slots come first.
    """

    latents: jax.Array
    length: jax.Array


def init(key: jax.Array, cfg: Config) -> Params:
    D, N, H, R, P = cfg.d_model, cfg.n_head, cfg.d_head, cfg.d_latent, cfg.d_rope
    Q = cfg.d_query_latent or D
    shapes = {
        "kv_down": (D, R), "k_rope": (D, P), "k_up": (R, N * H), "v_up": (R, N * H),
        "q_up": (Q, N * H), "q_rope": (Q, N * P), "o": (N * H, D),
    }  # fmt: skip
    if cfg.d_query_latent:
        shapes["q_down"] = (D, Q)
    params = kernels(key, shapes) | {"kv_norm": norm_scale(R)}
    return params | {"q_norm": norm_scale(Q)} if cfg.d_query_latent else params


def apply(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
    """Applies causal multi-head latent attention to x [B, T, D], and returns the outputs [B, T, D]."""
    (B, T, _), N = x.shape, cfg.n_head
    q_c, q_r, latents = _project(params, x, cfg, 0)
    c, k_r = latents[..., : cfg.d_latent], latents[..., cfg.d_latent :]
    k_c, v = (linear(c, params[name]["kernel"]).reshape(B, T, N, -1) for name in ("k_up", "v_up"))
    k_r = jnp.broadcast_to(k_r[:, :, None], (B, T, N, cfg.d_rope))
    q, k = jnp.concatenate([q_c, q_r], -1), jnp.concatenate([k_c, k_r], -1)
    # The values v are zero-padded, because `attention` requires the same head size for q, k and v.
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, cfg.d_rope)))
    return _project_output(params, attention(q, k, v)[..., : cfg.d_head])


def init_cache(cfg: Config, batch: int, length: int) -> Cache:
    return Cache(jnp.zeros((batch, length, cfg.d_latent + cfg.d_rope)), jnp.int32(0))


def extend(params: Params, x: jax.Array, cfg: Config, cache: Cache) -> tuple[jax.Array, Cache]:
    """Applies causal attention to the next T tokens x [B, T, D], and writes the tokens' latent vectors to the cache.

    The caller must ensure that cache.length + T does not exceed the number of slots in the cache.
    """
    N, H, R = cfg.n_head, cfg.d_head, cfg.d_latent
    q_c, q_r, new = _project(params, x, cfg, cache.length)
    latents = jax.lax.dynamic_update_slice(cache.latents, new, (0, cache.length, 0))
    k_up, v_up = (dense(params[name]["kernel"]).reshape(R, N, H) for name in ("k_up", "v_up"))
    q = jnp.concatenate([jnp.einsum("BTNH,RNH->BTNR", q_c, k_up), q_r], -1)
    # The latent vectors serve as one key head, which all query heads share. The values are the first R channels of the
    # shared key head, which are the latent vectors without the RoPE keys.
    kv_head = latents[:, None]
    mean = heads_attention(q, kv_head, kv_head, offset=cache.length, scale=(H + cfg.d_rope) ** -0.5)[..., :R]
    y = jnp.einsum("BTNR,RNH->BTNH", mean, v_up)
    return _project_output(params, y), Cache(latents, cache.length + x.shape[1])


def _project(
    params: Params, x: jax.Array, cfg: Config, first: int | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects x [B, T, D] to queries and latent vectors; the first token has the position `first`.

    Returns:
        The part of the queries without RoPE [B, T, N, H], the part with RoPE [B, T, N, P], and the vectors to cache
        [B, T, R + P].
    """
    (B, T, _), N = x.shape, cfg.n_head
    table = rope_table(first + jnp.arange(T), rope_frequencies(cfg.d_rope, cfg.rope_base))
    c = rms_norm(linear(x, params["kv_down"]["kernel"]), params["kv_norm"]["scale"])
    k_r = rope(linear(x, params["k_rope"]["kernel"])[:, :, None], table)[:, :, 0]
    q_input = x
    if cfg.d_query_latent:
        q_input = rms_norm(linear(x, params["q_down"]["kernel"]), params["q_norm"]["scale"])
    q_c = linear(q_input, params["q_up"]["kernel"]).reshape(B, T, N, cfg.d_head)
    q_r = rope(linear(q_input, params["q_rope"]["kernel"]).reshape(B, T, N, cfg.d_rope), table)
    return q_c, q_r, jnp.concatenate([c, k_r], -1)


def _project_output(params: Params, y: jax.Array) -> jax.Array:
    return linear(y.reshape(*y.shape[:2], -1), params["o"]["kernel"])
