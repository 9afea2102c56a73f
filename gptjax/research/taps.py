"""Interpretability methods: activation patching, head ablation, logit lens, attention maps and steering vectors.

    logits, acts = tapped(params, tokens, cfg, ("blocks/*/attn/out",))       read activations
    logits = forward(params, tokens, cfg, patches={"blocks/3/resid": ...})   replace activations
    grid = patching_grid(params, clean, corrupted, cfg, metric)              activation patching
    text = generate(params, prompts, cfg, patches=steering(v, 12), ..)       steer generation

The module `gptjax.model.activations` lists the paths of the activations. All functions of this module work under jit,
grad and vmap. The argument `params` may contain adapters and quantised weights. A metric is any function that takes
logits [B, V] float32 and returns a scalar. In shapes, L is the number of layers, B the number of rows, T the number of
tokens per row, D the size of the residual stream, N the number of attention heads, H the size of a head, and V the size
of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.activations import Patch, add, names, paths, replace, scale
from gptjax.model.gpt import backbone, extend_tapped, lm_logits, tapped
from gptjax.model.layers import Norm
from gptjax.types import Params

__all__ = [
    "Patch", "add", "attention_maps", "extend_tapped", "head_ablation", "logit_difference", "logit_lens", "names",
    "patching_grid", "paths", "replace", "scale", "steering", "steering_vector", "tapped",
]  # fmt: skip

Metric = Callable[[jax.Array], jax.Array]
Axis = Literal["position", "head"]

# Activations have shape [L, B, ..], stacked over layers. In an activation [L, B, ..], axis 2 is the position axis and
# axis 3 is the head axis, unless _AXES lists other axes for the activation. The position of an attention weight is the
# query's position.
_AXES: dict[str, dict[str, int]] = {"attn/weights": {"position": 3, "head": 2}}
_WITH_HEADS = ("attn/q", "attn/k", "attn/v", "attn/heads", "attn/weights")


def logit_difference(right: int, wrong: int) -> Metric:
    """Returns a metric: the logit of the token `right` minus the logit of the token `wrong`, averaged over rows."""
    return lambda logits: (logits[..., right] - logits[..., wrong]).mean()


def patching_grid(
    params: Params,
    clean: jax.Array,
    corrupted: jax.Array,
    cfg: ModelConfig,
    metric: Metric,
    *,
    site: str = "resid",
    axes: tuple[Axis, ...] = ("position",),
    position: int = -1,
    memory_bytes: int = 2**30,
) -> jax.Array:
    """Finds the activations that distinguish two prompts, by activation patching (causal tracing).

    The function returns a grid of metric values. Each value in the grid is the metric of a forward pass on the prompt
    `corrupted` in which the activation of one layer, at one position or head, is replaced by the activation from the
    forward pass on the prompt `clean`. The forward passes are vmapped in one compiled program; `memory_bytes` limits
    how many forward passes run at the same time.

    Args:
        clean, corrupted: tokens of the two prompts, [B, T] int32 each. The grid shows which activations of `clean`
            restore the correct answer on `corrupted`. Swap the two prompts to see which activations of the corrupted
            prompt destroy the correct answer.
        metric: function that is applied to the logits [B, V] at `position`.
        site: name of the activation to patch, one of `gptjax.model.activations.SITES`.
        axes: axes of the grid besides the layers: ("position",), ("head",) or both.
        position: index of the token whose logits are passed to the metric.
        memory_bytes: maximum estimated memory, in bytes, for the activations of the forward passes that are vmapped
            together.

    Returns:
        The metric of every forward pass, float32: [L, T] for axes=("position",), [L, N] for ("head",), and [L, T, N]
        for ("position", "head"). For the sites attn/k and attn/v, N is the number of key/value heads.

    Raises:
        UserError: the prompts' shapes differ, `site` does not exist, or the activation at `site` lacks one of `axes`.

    Causal tracing is described in arXiv:2202.05262, and activation patching in arXiv:2309.16042.
    """
    if clean.shape != corrupted.shape:
        raise UserError(
            f"expected two prompts of the same shape, got {clean.shape} and {corrupted.shape}: positions are patched "
            f"one by one, so choose prompts with the same number of tokens"
        )
    path = f"blocks/*/{site}"
    if path not in (known := names(cfg)[1:-1]):
        sites = ", ".join(name.removeprefix("blocks/*/") for name in known)
        raise UserError(f"site={site!r} is no activation of a block; there are {sites}")
    value = tapped(params, clean, cfg, (path,))[1][path]
    return _grid(params, corrupted, cfg, metric, path, value, axes, value.shape, position, memory_bytes)


def head_ablation(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    metric: Metric,
    *,
    value: ArrayLike | None = None,
    position: int = -1,
    memory_bytes: int = 2**30,
) -> jax.Array:
    """Computes a metric with one attention head ablated, for each head in turn. Returns [L, N] float32.

    Args:
        value: array that replaces a head's output, broadcast to [L, B, T, N, H]. None: zeros (zero ablation). For mean
            ablation use `tapped(..)[1]["blocks/*/attn/heads"].mean((1, 2), keepdims=True)`.
        position, memory_bytes: as in `patching_grid`.

    Head ablation is described in arXiv:1905.10650, and mean ablation in arXiv:2211.00593, section 2.1.
    """
    shape = (cfg.n_layer, *tokens.shape, cfg.n_head, cfg.head_dim)
    value = jnp.zeros((cfg.n_layer, 1, 1, 1, 1)) if value is None else value
    return _grid(params, tokens, cfg, metric, "blocks/*/attn/heads", value, ("head",), shape, position, memory_bytes)


def _grid(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    metric: Metric,
    path: str,
    value: ArrayLike,
    axes: tuple[Axis, ...],
    shape: tuple[int, ...],
    position: int,
    memory_bytes: int,
) -> jax.Array:
    """Computes a metric for every cell of a grid, in which each cell stands for one layer and one position or head.

    For each cell of the grid, a forward pass is run in which the activation of the cell's layer, at the cell's position
    or head or both, is replaced by `value`. The argument `shape` is the shape [L, B, ..] of the activation at `path`,
    stacked over layers. The first axis of the grid of metric values is the layer, and the following axes are those
    named in `axes`.
    """
    site = path.removeprefix("blocks/*/")
    known = _AXES.get(site, {"position": 2} | ({"head": 3} if site in _WITH_HEADS else {}))
    if not axes or any(name not in known for name in axes):
        raise UserError(
            f"axes={axes}: {site} has {' and '.join(known)}; a head axis exists only at {', '.join(_WITH_HEADS)}"
        )
    dims = [0, *(known[name] for name in axes)]
    sizes = [shape[dim] for dim in dims]

    def run(cell: jax.Array) -> jax.Array:
        mask = jnp.ones((1,) * len(shape), bool)
        for dim, index in zip(dims, jnp.unravel_index(cell, sizes), strict=True):
            other_dims = [i for i in range(len(shape)) if i != dim]
            mask = mask & jnp.expand_dims(jnp.arange(shape[dim]) == index, other_dims)
        hidden = backbone(params, tokens, cfg, patches={path: replace(value, mask)})
        return metric(lm_logits(params, hidden[:, position], cfg))

    # The peak memory of a forward pass is estimated as the size of the residual stream and its copies, the feed-forward
    # activations, the attention scores, and the logits at one position.
    (B, T), n = tokens.shape, math.prod(sizes)
    width = 6 * cfg.d_model + 3 * cfg.d_ff + 3 * cfg.n_head * (T + cfg.head_dim)
    run_bytes = 4 * B * (T * width + cfg.vocab_size)
    groups = -(-n // max(1, memory_bytes // run_bytes))
    size = -(-n // groups)
    # The last group of vmapped forward passes is padded with copies of its last forward pass; the results of the copies
    # are dropped.
    cells = jnp.minimum(jnp.arange(groups * size), n - 1).reshape(groups, size)
    return jax.lax.map(jax.vmap(run), cells).reshape(-1)[:n].reshape(sizes)


def logit_lens(params: Params, tokens: jax.Array, cfg: ModelConfig, **context: Any) -> jax.Array:
    """Computes the logit lens: logits decoded from the embedding and from the residual stream after every block.

    The final norm and the LM head are applied to the embedding and to the output of each of the L blocks. The last
    entry of the logit lens equals the logits of `forward`. The logit lens is described in arXiv:2303.08112, eq. 2, and
    in the blog post "interpreting GPT: the logit lens" by nostalgebraist (2020).

    Args:
        context: further arguments of `tapped`, such as `positions` or `patches`.

    Returns:
        Logits [L + 1, B, T, V] float32.
    """
    _, acts = tapped(params, tokens, cfg, ("embed", "blocks/*/resid"), **context)
    stream = jnp.concatenate([acts["embed"][None], acts["blocks/*/resid"]])
    norm = {"params": params["ln_f"]} if "ln_f" in params else {}
    return jax.lax.map(lambda x: lm_logits(params, Norm(cfg).apply(norm, x), cfg), stream)


def attention_maps(params: Params, tokens: jax.Array, cfg: ModelConfig, **context: Any) -> jax.Array:
    """Returns the attention weights of all layers and heads, [L, B, N, T, T] float32.

    The last two axes of the attention weights are queries and keys. The attention weights of each query sum to 1.

    Args:
        context: further arguments of `tapped`, such as `positions` or `patches`.
    """
    path = "blocks/*/attn/weights"
    return tapped(params, tokens, cfg, (path,), **context)[1][path]


def steering_vector(
    params: Params, towards: jax.Array, away: jax.Array, cfg: ModelConfig, layer: int, *, position: int = -1
) -> jax.Array:
    """Computes a steering vector [D], the difference between the mean residual streams of two sets of texts.

    The steering vector is the mean residual stream after the block `layer` on the texts `towards`, minus the mean
    residual stream after the same block on the texts `away`.

    Args:
        towards, away: tokens of two sets of texts, [B, T] int32 each, without padding. B and T may differ between the
            two sets.
        position: index of the token whose residual stream is averaged.

    Steering vectors are described in arXiv:2308.10248, and their mean over many pairs of texts in arXiv:2312.06681,
    eq. 2.
    """
    path = f"blocks/{layer}/resid"
    target, source = (tapped(params, tokens, cfg, (path,))[1][path][:, position].mean(0) for tokens in (towards, away))
    return target - source


def steering(vector: jax.Array, layer: int, strength: ArrayLike = 1.0) -> dict[str, Patch]:
    """Returns patches that add strength * vector to the residual stream after the block `layer`, at every token.

    The returned patches are passed to `forward`, `extend` or `generate` as the argument `patches`. The arguments
    `vector` [D] and `strength` are traced arrays, so that new values cause no recompilation.
    """
    return {f"blocks/{layer}/resid": add(strength * vector)}
