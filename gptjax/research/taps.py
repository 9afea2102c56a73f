"""Looking into a model and reaching into it: what a notebook asks of activations, in a few lines each.

    logits, acts = tapped(params, tokens, cfg, ("blocks/*/attn/out",))       read
    logits = forward(params, tokens, cfg, patches={"blocks/3/resid": ...})   replace
    grid = patching_grid(params, clean, corrupted, cfg, metric)              which of them carry the difference
    words = generate(params, prompts, cfg, patches=steering(v, 12), ..)      change what it says

The paths stand in `gptjax.model.activations`. All of this is traced code: jit it, differentiate it, vmap it; `params`
may hold adapters and quantised leaves. A metric is any (logits [B, V] float32) -> scalar.
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

# where a stack [L, B, ..] has its positions (of queries) and its heads
_AXES: dict[str, dict[str, int]] = {"attn/weights": {"position": 3, "head": 2}}
_WITH_HEADS = ("attn/q", "attn/k", "attn/v", "attn/heads", "attn/weights")


def logit_difference(right: int, wrong: int) -> Metric:
    """By how much a token's logit is above another's, the mean of the rows."""
    return lambda logits: (logits[..., right] - logits[..., wrong]).mean()


def patching_grid(
    params: Params,
    clean: jax.Array,
    corrupted: jax.Array,
    cfg: ModelConfig,
    metric: Metric,
    *,
    site: str = "resid",
    over: tuple[Axis, ...] = ("position",),
    at: int = -1,
    memory_bytes: int = 2**30,
) -> jax.Array:
    """Activation patching: in which layer, at which place, stands what tells one prompt from the other.

    Each cell is a run on `corrupted` in which one layer's activation, at one position or of one head, is that of the
    run on `clean`. All cells are one vmapped program, as many at a time as fit the memory.

    Args:
        clean, corrupted: [B, T] int32 each. Exchanged, the grid shows what breaks the answer, not what restores it.
        metric: of the logits [B, V] at position `at`.
        site: one of `gptjax.model.activations.SITES`.
        over: ("position",), ("head",) or both.
        memory_bytes: for the activations of the runs that go side by side, by estimate.

    Returns:
        [L, T], [L, N] or [L, T, N] float32, the metric of every run. N is the number of key heads at attn/k and attn/v.

    Raises:
        UserError: prompts of different lengths, no such site, or no heads there.

    Source: arXiv:2202.05262 (causal tracing), arXiv:2309.16042.
    """
    if clean.shape != corrupted.shape:
        raise UserError(
            f"expected two prompts of the same shape, got {clean.shape} and {corrupted.shape}: positions are compared "
            f"one by one, so choose words of as many tokens"
        )
    path = f"blocks/*/{site}"
    if path not in (known := names(cfg)[1:-1]):
        sites = ", ".join(name.removeprefix("blocks/*/") for name in known)
        raise UserError(f"site={site!r} is no activation of a block; there are {sites}")
    value = tapped(params, clean, cfg, (path,))[1][path]
    return _grid(params, corrupted, cfg, metric, path, value, over, value.shape, at, memory_bytes)


def head_ablation(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    metric: Metric,
    *,
    value: ArrayLike | None = None,
    at: int = -1,
    memory_bytes: int = 2**30,
) -> jax.Array:
    """The metric without each head, one at a time: [L, N] float32. `at` and `memory_bytes` as in `patching_grid`.

    Args:
        value: what stands in a head's place, broadcast to [L, B, T, N, H]. None: zero. Means over a text are the
            usual alternative: `tapped(..)[1]["blocks/*/attn/heads"].mean((1, 2), keepdims=True)`.

    Source: arXiv:1905.10650; mean ablation: arXiv:2211.00593, 2.1.
    """
    shape = (cfg.n_layer, *tokens.shape, cfg.n_head, cfg.head_dim)
    value = jnp.zeros((cfg.n_layer, 1, 1, 1, 1)) if value is None else value
    return _grid(params, tokens, cfg, metric, "blocks/*/attn/heads", value, ("head",), shape, at, memory_bytes)


def _grid(
    params: Params,
    tokens: jax.Array,
    cfg: ModelConfig,
    metric: Metric,
    path: str,
    value: ArrayLike,
    over: tuple[Axis, ...],
    shape: tuple[int, ...],
    at: int,
    memory_bytes: int,
) -> jax.Array:
    """One run for every layer and every place along `over` of an activation of `shape` [L, B, ..]."""
    site = path.removeprefix("blocks/*/")
    known = _AXES.get(site, {"position": 2} | ({"head": 3} if site in _WITH_HEADS else {}))
    if not over or any(name not in known for name in over):
        raise UserError(
            f"over={over}: {site} has {' and '.join(known)}; heads are apart at {', '.join(_WITH_HEADS)} only"
        )
    axes = [0, *(known[name] for name in over)]
    sides = [shape[axis] for axis in axes]

    def run(cell: jax.Array) -> jax.Array:
        mask = jnp.ones((1,) * len(shape), bool)
        for axis, index in zip(axes, jnp.unravel_index(cell, sides), strict=True):
            other = [i for i in range(len(shape)) if i != axis]
            mask = mask & jnp.expand_dims(jnp.arange(shape[axis]) == index, other)
        hidden = backbone(params, tokens, cfg, patches={path: replace(value, mask)})
        return metric(lm_logits(params, hidden[:, at], cfg))

    # About what a forward pass holds at its widest: the stream and its copies, neurons, scores, the last logits.
    (B, T), n = tokens.shape, math.prod(sides)
    width = 6 * cfg.d_model + 3 * cfg.d_ff + 3 * cfg.n_head * (T + cfg.head_dim)
    run_bytes = 4 * B * (T * width + cfg.vocab_size)
    groups = -(-n // max(1, memory_bytes // run_bytes))
    size = -(-n // groups)
    cells = jnp.minimum(jnp.arange(groups * size), n - 1).reshape(groups, size)  # the last group does some again
    return jax.lax.map(jax.vmap(run), cells).reshape(-1)[:n].reshape(sides)


def logit_lens(params: Params, tokens: jax.Array, cfg: ModelConfig, **context: Any) -> jax.Array:
    """What the model would say if it ended earlier: [L + 1, B, T, V] float32, of the embedding and after every block.

    The stream goes through the final norm and the head; the last entry is `forward` itself. Keywords as in `tapped`.
    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); arXiv:2303.08112, eq. 2.
    """
    _, acts = tapped(params, tokens, cfg, ("embed", "blocks/*/resid"), **context)
    stream = jnp.concatenate([acts["embed"][None], acts["blocks/*/resid"]])
    norm = {"params": params["ln_f"]} if "ln_f" in params else {}
    return jax.lax.map(lambda x: lm_logits(params, Norm(cfg).apply(norm, x), cfg), stream)


def attention_maps(params: Params, tokens: jax.Array, cfg: ModelConfig, **context: Any) -> jax.Array:
    """[L, B, N, T, T] float32: where each query (second to last axis) looks. Keywords as in `tapped`."""
    path = "blocks/*/attn/weights"
    return tapped(params, tokens, cfg, (path,), **context)[1][path]


def steering_vector(
    params: Params, towards: jax.Array, away: jax.Array, cfg: ModelConfig, layer: int, *, at: int = -1
) -> jax.Array:
    """[D] the mean difference of the stream after `layer` between texts of two kinds, at their position `at`.

    Args:
        towards, away: [B, T] int32 each, of any number of rows and tokens, without padding.

    Source: arXiv:2308.10248; the mean of many pairs: arXiv:2312.06681, eq. 2.
    """
    path = f"blocks/{layer}/resid"
    one, other = (tapped(params, tokens, cfg, (path,))[1][path][:, at].mean(0) for tokens in (towards, away))
    return one - other


def steering(vector: jax.Array, layer: int, strength: ArrayLike = 1.0) -> dict[str, Patch]:
    """Patches that add strength * vector [D] to the stream after `layer`, at every token.

    For `forward`, `extend` and `generate`; the same program serves all vectors and strengths.
    """
    return {f"blocks/{layer}/resid": add(strength * vector)}
