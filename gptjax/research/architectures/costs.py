"""What architectures cost, by formula: bytes of a cache, parameters of a mixture, FLOPs of a decoder.

Bytes are exact, of `itemsize` bytes a number (2: bfloat16); 1 GB = 10^9 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from gptjax.config import ModelConfig
from gptjax.research.architectures import deltanet, mla, moe


def kv_cache_bytes(cfg: ModelConfig, batch: int = 1, itemsize: int = 2) -> int:
    """Of keys and values of `cfg.context_length` tokens in all layers; a layer with a window keeps no more than that.

    MHA, GQA and MQA differ in cfg.n_kv_head, sliding windows are cfg.sliding_window in the layers marked S of
    cfg.window_pattern. (The model's own cache, `gptjax.model.cache`, gives every layer all slots.)
    """
    slots = sum(min(window or cfg.context_length, cfg.context_length) for window in cfg.windows)
    return batch * slots * 2 * cfg.n_kv_head * cfg.head_dim * itemsize


def mla_cache_bytes(cfg: mla.Config, n_layer: int, length: int, batch: int = 1, itemsize: int = 2) -> int:
    """Of the latent vector and the turned key of `length` tokens. Source: arXiv:2405.04434, table 1."""
    return batch * n_layer * length * (cfg.d_latent + cfg.d_rope) * itemsize


def deltanet_state_bytes(cfg: deltanet.Config, n_layer: int, batch: int = 1, itemsize: int = 2) -> int:
    """Of the heads' matrices and the convolution's last inputs, whatever the length."""
    tail = (cfg.conv_width - 1) * 3 * cfg.n_head * cfg.d_head
    return batch * n_layer * (cfg.n_head * cfg.d_head**2 + tail) * itemsize


class MoeParams(NamedTuple):
    """Numbers of one layer: of one expert, of the router, of all, and of those that a token meets."""

    expert: int
    router: int
    total: int
    active: int


def moe_params(cfg: moe.Config) -> MoeParams:
    expert, router = 3 * cfg.d_model * cfg.d_ff, cfg.d_model * cfg.n_expert
    return MoeParams(expert, router, cfg.n_expert * expert + router, cfg.n_active * expert + router)


class Flops(NamedTuple):
    """Of matrix products, two for each multiplication with its addition.

    projections   q, k, v and o
    attention     q k^T, and the weights with v
    feed_forward  two matrices, three with a gate
    head          hidden states to logits
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
        """Without attention: what counting layers' weights gives."""
        return self.total - self.attention


def forward_flops(cfg: ModelConfig, batch: int, length: int, *, pairs: int | None = None) -> Flops:
    """Of `gptjax.forward` on [batch, length] tokens; a training step takes three times that, without remat.

    XLA's `cost_analysis` adds a few per cent for what is no product (norms, softmax, activations), and counts the body
    of a loop once: give it `unroll=True`.

    Args:
        pairs: of a query and a key, for each head and row. None: length^2, the whole square, as papers count;
            length (length + 1) / 2 are those that a causal mask leaves; `ops.attention` computes 3/4 length^2 on a CPU
            from 128 tokens on, where length is even.
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
