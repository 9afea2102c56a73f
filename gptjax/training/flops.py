"""Counts the FLOPs (floating-point operations) of training, for MFU and `gptjax plan`."""

from __future__ import annotations

import math

from gptjax import tree
from gptjax.config import ModelConfig
from gptjax.types import Params


def flops_per_token(cfg: ModelConfig, params: Params, *, width: int | None = None, frozen: float = 0.0) -> float:
    """Returns the FLOPs per token of a training step (arXiv:2204.02311, appendix B).

    For each token, a training step takes 6 FLOPs per weight in a matrix multiplication, and 12 L N H T FLOPs for
    attention in L layers with N heads of size H and T tokens per row.

    Args:
        width: number of tokens per row, T, or None for the context length.
        frozen: fraction of the weights that have no gradient, and so take 4 FLOPs each instead of 6.
    """
    not_multiplied = ("wte", "wpe", "lm_head") if cfg.n_classes else ("wte", "wpe")
    n = sum(math.prod(leaf.shape) for name, leaf in tree.flatten(params).items() if not name.startswith(not_multiplied))
    if cfg.tie_embeddings and not cfg.n_classes:
        n += cfg.vocab_size * cfg.d_model
    return (6.0 - 2.0 * frozen) * n + 12.0 * cfg.n_layer * cfg.n_head * cfg.head_dim * (width or cfg.context_length)
