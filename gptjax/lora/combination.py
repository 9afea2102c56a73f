"""Merges several LoRA adapters of one base model into one adapter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import tree
from gptjax.errors import UserError, did_you_mean
from gptjax.lora.adapter import Adapter, concatenate_factors, factors_by_path
from gptjax.ops.precision import exact

MajoritySign = Literal["total", "frequency"]
Prune = Callable[[jax.Array, float, jax.Array | None], jax.Array]


class Method(NamedTuple):
    """A merge of matrices: `prune` sets elements of each adapter's matrix to zero, then `add` adds the matrices."""

    prune: Prune | None
    add: Callable[[jax.Array, jax.Array, MajoritySign], jax.Array]


@exact
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str = "cat",
    *,
    scales: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    key: jax.Array | None = None,
) -> Adapter:
    """Merges adapters into one, with a weight per adapter.

    The methods, for the contributions D_i = scales[i] * a_i @ b_i of the adapters to a weight:

    cat              sum of weights[i] * D_i, exactly, by concatenating the factors; the ranks add up
    slerp            spherical interpolation of two D_i per matrix [in, out], with weights 1 - t and t (Shoemake 1985);
                     linear if the two are parallel or one is zero. Exact; the ranks add up
    linear           weighted sum of the factors a_i, and of the b_i: a rough approximation of the sum of the D_i
    magnitude_prune  linear, of the share `density` of each factor's elements with the largest magnitudes
    ties             TIES (arXiv:2306.01708): as magnitude_prune, but of each element's values only those are averaged
                     that have the sign of the majority
    dare_linear      DARE (arXiv:2311.03099): linear, of a random share `density` of elements, divided by `density`
    dare_ties        the same with the sum of TIES
    svd              sum of weights[i] * D_i, truncated to `rank` singular values

    The methods magnitude_prune_svd, ties_svd, dare_linear_svd and dare_ties_svd merge the D_i instead of the factors,
    and truncate the result to `rank` singular values, as svd does.

    Args:
        adapters: adapters with factors a [.., in, R] and b [.., R, out]. Their targets may differ; an adapter does not
            take part in the merge of a weight for which it has no factors. Their ranks may differ for cat, slerp and
            the svd methods.
        weights: weight of each adapter, which may be negative except for slerp.
        scales: scale of each adapter (`LoraConfig.scale`), to be given if they differ; attach the result with a scale
            of 1. None: all adapters have the same scale; attach the result with this scale.
        rank: rank of the result of the svd methods. None: the largest rank of an adapter.
        density: share of the elements that are kept, above 0 and at most 1. Needed by the pruning methods.
        majority_sign: for the ties methods, the sign of an element's sum ("total") or of most values ("frequency").
        key: random key of the masks of the dare methods. Masks are independent across adapters, paths and factors.

    Returns:
        The merged adapter, float32.

    Raises:
        UserError: an argument does not fit the method or the adapters; or an adapter has a DoRA magnitude vector, a
            MiSS matrix or complete weights.

    Source: PEFT's `LoraModel.add_weighted_adapter`, whose combination types these methods are, except for slerp.
    """
    scales = [1.0] * len(adapters) if scales is None else scales
    if not adapters or not len(adapters) == len(weights) == len(scales):
        raise UserError(
            f"lora.combine needs one weight and one scale per adapter, got {len(adapters)} adapters, {len(weights)} "
            f"weights and {len(scales)} scales"
        )
    _refuse(method, weights, density, majority_sign, key)
    if rank is not None and rank < 1:
        raise UserError(f"lora.combine: rank={rank}: expected at least 1")
    merged: dict[str, jax.Array] = {}
    for path, pairs in factors_by_path(adapters).items():
        a, b = [a for a, _ in pairs.values()], [b for _, b in pairs.values()]
        w, s = jnp.float32([weights[i] for i in pairs]), jnp.float32([scales[i] for i in pairs])
        if method == "cat":
            pair = _weighted(a, b, w * s)
        elif method == "slerp":
            pair = _slerp(a, b, w, s)
        else:
            steps = METHODS["linear" if method == "svd" else method.removesuffix("_svd")]
            keys = {name: [mask_key(key, f"{path}/{name}", i) for i in pairs] for name in ("a", "b", "w")}
            mix = partial(_mix, steps, density=density, majority_sign=majority_sign)
            if method.endswith("svd"):
                deltas = [scale * (x @ y) for scale, x, y in zip(s, a, b, strict=True)]
                most = max(x.shape[-1] for x in a) if rank is None else rank
                pair = _truncated(mix(deltas, w, keys["w"]), most)
            else:
                _refuse_ranks(path, method, a)
                root = jnp.sqrt(jnp.abs(w * s))  # the product of both factors' weights is w * s
                signed = jnp.where(w * s < 0, -root, root)
                pair = {"a": mix(a, signed, keys["a"]), "b": mix(b, root, keys["b"])}
        merged |= {f"{path}/{name}": leaf for name, leaf in pair.items()}
    return tree.unflatten(merged)


def _refuse(
    method: str, weights: Sequence[float], density: float | None, majority_sign: str, key: jax.Array | None
) -> None:
    known = ("cat", "slerp", "svd", *METHODS, *(f"{name}_svd" for name in METHODS if name != "linear"))
    if method not in known:
        raise UserError(
            f"lora.combine: unknown method {method!r}{did_you_mean(method, known)}; one of {', '.join(known)}"
        )
    if method == "slerp" and (len(weights) != 2 or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
        raise UserError(f"lora.combine: slerp needs two adapters and weights 1 - t and t, got weights {list(weights)}")
    steps = METHODS.get(method.removesuffix("_svd"))
    if steps is not None and steps.prune is not None and (density is None or not 0 < density <= 1):
        raise UserError(f"lora.combine: {method} needs a density above 0 and at most 1, got {density}")
    if steps is not None and steps.prune is _random and key is None:
        raise UserError(f"lora.combine: {method} drops random elements: pass key=jax.random.key(0)")
    if majority_sign not in ("total", "frequency"):
        raise UserError(f"lora.combine: majority_sign={majority_sign!r}: expected 'total' or 'frequency'")


def _refuse_ranks(path: str, method: str, a: Sequence[jax.Array]) -> None:
    if len(ranks := {x.shape[-1] for x in a}) > 1:
        raise UserError(
            f"lora.combine: {path} has the ranks {', '.join(map(str, sorted(ranks)))}, but {method} needs one rank: "
            f"use cat, slerp, or {'svd' if method == 'linear' else f'{method}_svd'}"
        )


def _weighted(a: Sequence[jax.Array], b: Sequence[jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    """Returns the factors of the sum of weights[i] * a_i @ b_i. The weights are [N, ..], for the leading axes of a."""
    return concatenate_factors([(x, y * w[..., None, None]) for x, y, w in zip(a, b, weights, strict=True)])


def _slerp(a: Sequence[jax.Array], b: Sequence[jax.Array], w: jax.Array, s: jax.Array) -> dict[str, jax.Array]:
    """Returns the factors of sin(w_0 angle) / sin(angle) D_0 + sin(w_1 angle) / sin(angle) D_1, where `angle` is the
    angle between the flattened D_0 and D_1."""
    if len(a) == 1:
        return _weighted(a, b, w * s)

    def inner(i: int, j: int) -> jax.Array:
        """Returns the inner product of D_i and D_j from products of the size of the ranks."""
        return s[i] * s[j] * ((_t(a[i]) @ a[j]) * (b[i] @ _t(b[j]))).sum((-2, -1))

    norms = jnp.sqrt(inner(0, 0) * inner(1, 1))
    angle = jnp.arccos(jnp.clip(inner(0, 1) / jnp.where(norms > 0, norms, 1), -1, 1))
    sine = jnp.sin(angle)
    curved = (norms > 0) & (sine > 1e-3)  # otherwise the direction of the arc is undefined or lost in rounding
    coefficients = [jnp.where(curved, jnp.sin(t * angle) / jnp.where(curved, sine, 1), t) for t in w]
    return _weighted(a, b, jnp.stack([c * scale for c, scale in zip(coefficients, s, strict=True)]))


def _truncated(delta: jax.Array, rank: int) -> dict[str, jax.Array]:
    u, s, v = jnp.linalg.svd(delta, full_matrices=False)
    return {"a": u[..., :rank], "b": s[..., :rank, None] * v[..., :rank, :]}


def _mix(
    steps: Method,
    matrices: Sequence[jax.Array],
    weights: jax.Array,
    keys: Sequence[jax.Array | None],
    *,
    density: float | None,
    majority_sign: MajoritySign,
) -> jax.Array:
    if steps.prune is not None and density is not None and density < 1:
        matrices = [steps.prune(x, density, key) for x, key in zip(matrices, keys, strict=True)]
    stacked = jnp.stack(matrices)
    return steps.add(stacked, weights.reshape(-1, *[1] * (stacked.ndim - 1)), majority_sign)


def _largest(x: jax.Array, density: float, key: jax.Array | None) -> jax.Array:
    """Zeroes all but the share `density` of each matrix [in, out] of x [.., in, out] with the largest magnitudes."""
    flat = jnp.abs(x).reshape(*x.shape[:-2], -1)
    order = jnp.argsort(jnp.argsort(-flat))  # position of each element in descending order
    return x * (order < int(density * flat.shape[-1])).reshape(x.shape)


def _random(x: jax.Array, density: float, key: jax.Array | None) -> jax.Array:
    assert key is not None
    return x * jax.random.bernoulli(key, density, x.shape) / density


def _sum(x: jax.Array, weights: jax.Array, majority_sign: MajoritySign) -> jax.Array:
    return (x * weights).sum(0)


def _elected_mean(x: jax.Array, weights: jax.Array, majority_sign: MajoritySign) -> jax.Array:
    """Returns the weighted sum of the values with the majority sign, divided by their number (TIES, section 4)."""
    votes = x if majority_sign == "total" else jnp.sign(x)
    kept = jnp.sign(x) == jnp.where(votes.sum(0) >= 0, 1, -1)
    return (x * weights * kept).sum(0) / jnp.maximum(kept.sum(0), 1)


def mask_key(key: jax.Array | None, path: str, i: int) -> jax.Array | None:
    """Returns the key of the mask of the array at `path`, such as blocks/attn/q/kernel/a, of adapter i."""
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), i)


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


# The methods that merge either the factors or, with the suffix _svd, the products D_i.
METHODS: dict[str, Method] = {
    "linear": Method(None, _sum),
    "magnitude_prune": Method(_largest, _sum),
    "ties": Method(_largest, _elected_mean),
    "dare_linear": Method(_random, _sum),
    "dare_ties": Method(_random, _elected_mean),
}
