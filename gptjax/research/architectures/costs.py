"""Formulas for the bytes of a KV cache, the parameters of a mixture of experts, and the FLOPs of a decoder.

The formulas for caches count `itemsize` bytes per cached element (2 for bfloat16), and no overhead. One GB is 10^9
bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from gptjax.config import ModelConfig
from gptjax.research.architectures import deltanet, mla, moe


def kv_cache_bytes(cfg: ModelConfig, batch: int = 1, itemsize: int = 2) -> int:
    """Returns the size in bytes of the KV caches of all layers for `cfg.context_length` tokens.

    Sliding-window layers, marked S in cfg.window_pattern, are counted with a cache of cfg.sliding_window tokens. If a
    model has sliding-window layers, the returned size is smaller than the cache of `gptjax.model.cache`, which
    allocates context_length slots in every layer. Multi-head, grouped-query and multi-query attention differ only in
    cfg.n_kv_head, the number of key/value heads.
    """
    slots = sum(min(window or cfg.context_length, cfg.context_length) for window in cfg.windows)
    return batch * slots * 2 * cfg.n_kv_head * cfg.head_dim * itemsize


def mla_cache_bytes(cfg: mla.Config, n_layer: int, length: int, batch: int = 1, itemsize: int = 2) -> int:
    """Returns the size in bytes of the caches of `n_layer` layers of multi-head latent attention, for `length` tokens.

    The cache of a multi-head latent attention layer holds one latent vector and one RoPE key, shared by all heads, per
    token.

    Source: arXiv:2405.04434, table 1.
    """
    return batch * n_layer * length * (cfg.d_latent + cfg.d_rope) * itemsize


def deltanet_state_bytes(cfg: deltanet.Config, n_layer: int, batch: int = 1, itemsize: int = 2) -> int:
    """Returns the size in bytes of the caches of `n_layer` Gated DeltaNet layers.

    The cache of a Gated DeltaNet layer holds the state matrices and the last inputs of the convolution. The size of a
    Gated DeltaNet cache does not depend on the sequence length.
    """
    tail = (cfg.conv_width - 1) * 3 * cfg.n_head * cfg.d_head
    return batch * n_layer * (cfg.n_head * cfg.d_head**2 + tail) * itemsize


class MoeParams(NamedTuple):
    """Parameter counts of one mixture-of-experts layer.

    Attributes:
        expert: number of parameters of one expert.
        router: number of parameters of the router.
        total: number of parameters of all experts and the router.
        active: number of parameters that process one token: the parameters of n_active experts and of the router.
    """

    expert: int
    router: int
    total: int
    active: int


def moe_params(cfg: moe.Config) -> MoeParams:
    expert, router = 3 * cfg.d_model * cfg.d_ff, cfg.d_model * cfg.n_expert
    return MoeParams(expert, router, cfg.n_expert * expert + router, cfg.n_active * expert + router)


class Flops(NamedTuple):
    """FLOPs of the matrix multiplications of a decoder; a multiply-add counts as two FLOPs.

    Attributes:
        projections: FLOPs of the query, key, value and output projections.
        attention: FLOPs of q k^T, and of the product of the attention weights and v.
        feed_forward: FLOPs of the two matrix multiplications of a feed-forward layer, or of three with a gate.
        head: FLOPs of the LM head, which projects the hidden states to logits.
    """

    projections: int
    attention: int
    feed_forward: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def linear(self) -> int:
        """Returns the FLOPs of the multiplications by weight matrices: `total` without the FLOPs of `attention`."""
        return self.total - self.attention


def forward_flops(cfg: ModelConfig, batch: int, length: int, *, pairs: int | None = None) -> Flops:
    """Returns the FLOPs of the forward pass `gptjax.forward` on tokens of shape [batch, length].

    A training step without rematerialisation takes three times as many FLOPs as the forward pass. XLA's `cost_analysis`
    reports a few per cent more FLOPs than `forward_flops`, because XLA also counts norms, softmax and activation
    functions. Compare the FLOPs of XLA and `forward_flops` only for a model compiled with `unroll=True`, because XLA
    counts the body of a loop once.

    Args:
        pairs: number of (query, key) pairs to count per head and row. None counts all length^2 pairs and ignores the
            causal mask, as is usual in papers. With the causal mask, length (length + 1) / 2 pairs are needed. On a CPU
            `ops.attention` computes 3/4 length^2 pairs if length is even and at least 128, because the first half of
            the queries skips the second half of the keys.
    """
    tokens = batch * length
    pairs = length**2 if pairs is None else pairs
    D, N, K, H, F, L = cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.d_ff, cfg.n_layer
    return Flops(
        projections=2 * tokens * L * (2 * D * N * H + 2 * D * K * H),
        attention=2 * 2 * batch * pairs * L * N * H,
        feed_forward=2 * tokens * L * (3 if cfg.gated else 2) * D * F,
        head=2 * tokens * D * cfg.vocab_size,
    )
