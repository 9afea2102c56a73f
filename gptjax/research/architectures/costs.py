"""Formulas for costs: bytes of a cache, parameters of a mixture of experts, FLOPs of a decoder.

Byte counts are exact for `itemsize` bytes per element (2 for bfloat16); 1 GB = 10^9 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from gptjax.config import ModelConfig
from gptjax.research.architectures import deltanet, mla, moe


def kv_cache_bytes(cfg: ModelConfig, batch: int = 1, itemsize: int = 2) -> int:
    """Returns the size in bytes of the KV caches of all layers for `cfg.context_length` tokens.

    Sliding-window layers, marked S in cfg.window_pattern, cache only their window of cfg.sliding_window tokens.
    Multi-head, grouped-query and multi-query attention differ only in cfg.n_kv_head. In contrast, the cache of the GPT
    model, `gptjax.model.cache`, allocates context_length slots in every layer, including sliding-window layers.
    """
    slots = sum(min(window or cfg.context_length, cfg.context_length) for window in cfg.windows)
    return batch * slots * 2 * cfg.n_kv_head * cfg.head_dim * itemsize


def mla_cache_bytes(cfg: mla.Config, n_layer: int, length: int, batch: int = 1, itemsize: int = 2) -> int:
    """Returns the size in bytes of an MLA cache of `length` tokens, which holds latent vectors and shared RoPE keys.

    Source: arXiv:2405.04434, table 1.
    """
    return batch * n_layer * length * (cfg.d_latent + cfg.d_rope) * itemsize


def deltanet_state_bytes(cfg: deltanet.Config, n_layer: int, batch: int = 1, itemsize: int = 2) -> int:
    """Returns the size in bytes of a Gated DeltaNet cache (state matrices, last inputs of the convolution).

    The size of a Gated DeltaNet cache does not depend on the sequence length.
    """
    tail = (cfg.conv_width - 1) * 3 * cfg.n_head * cfg.d_head
    return batch * n_layer * (cfg.n_head * cfg.d_head**2 + tail) * itemsize


class MoeParams(NamedTuple):
    """Parameter counts of one mixture-of-experts layer.

    expert  parameters of one expert
    router  parameters of the router
    total   parameters of all experts and the router
    active  parameters that one token uses: those of n_active experts and the router
    """

    expert: int
    router: int
    total: int
    active: int


def moe_params(cfg: moe.Config) -> MoeParams:
    expert, router = 3 * cfg.d_model * cfg.d_ff, cfg.d_model * cfg.n_expert
    return MoeParams(expert, router, cfg.n_expert * expert + router, cfg.n_active * expert + router)


class Flops(NamedTuple):
    """FLOPs of matrix multiplications; a multiply-add counts as two FLOPs.

    projections   projections to q, k and v, and the output projection o
    attention     q k^T, and attention weights times v
    feed_forward  multiplications by two matrices, or by three with a gate
    head          projection of the hidden states to logits
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
        """FLOPs of the multiplications by weights: `total` minus `attention`."""
        return self.total - self.attention


def forward_flops(cfg: ModelConfig, batch: int, length: int, *, pairs: int | None = None) -> Flops:
    """Returns the FLOPs of `gptjax.forward` on [batch, length] tokens.

    A training step without rematerialisation takes three times as many FLOPs as the forward pass. XLA's `cost_analysis`
    reports a few per cent more FLOPs, because it includes norms, softmax and activations. Compare XLA's
    FLOPs with `forward_flops` only for a model compiled with `unroll=True`, because XLA counts the body of a loop once.

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
