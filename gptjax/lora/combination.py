"""This module merges several LoRA adapters of one base model into one adapter."""

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
    """Describes a merge method: `prune` sets elements of each adapter's matrix to zero, then `add` sums the
    matrices."""

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
    """Returns one adapter that is the merge of several adapters, with one merge weight per adapter.

    Adapter i contributes the matrix D_i = scales[i] * a_i @ b_i to each adapted weight. The argument `method` is one of
    the following:

        cat: the exact sum of weights[i] * D_i, computed by concatenating the factors. The ranks add up.
        slerp: the exact spherical interpolation of two matrices D_i [in, out], with weights 1 - t and t (Shoemake
            1985). The interpolation is linear if the matrices are parallel or if one matrix is zero. The ranks add up.
        linear: the weighted sum of the factors a_i and the weighted sum of the factors b_i, whose product approximates
            the sum of the D_i roughly.
        magnitude_prune: prunes each factor to the fraction `density` of elements with the largest magnitudes, and then
            merges the factors as linear does.
        ties: TIES (arXiv:2306.01708). Prunes as magnitude_prune does, and then averages, per element, only the values
            that have the majority sign.
        dare_linear: DARE (arXiv:2311.03099). Keeps a random fraction `density` of elements, divides the kept elements
            by `density`, and then merges the factors as linear does.
        dare_ties: drops elements as dare_linear does, and then averages as ties does.
        svd: the sum of weights[i] * D_i, truncated to the `rank` largest singular values.

    The methods magnitude_prune_svd, ties_svd, dare_linear_svd and dare_ties_svd merge the matrices D_i = scales[i] *
    a_i @ b_i instead of the factors a_i and b_i, and truncate the merged matrix to its `rank` largest singular values.

    Args:
        adapters: adapters with factors a [.., in, R] and b [.., R, out]. The adapters' targets may differ; an adapter
            does not take part in the merge of a weight for which the adapter has no factors. The adapters' ranks may
            differ for cat, slerp and the svd methods.
        weights: merge weight of each adapter, which may be negative except for slerp.
        scales: scale of each adapter (`LoraConfig.scale`), needed if the scales differ; attach the result with a scale
            of 1. None: all adapters have the same scale; attach the result with the same scale.
        rank: rank of the result of the svd methods. None: the largest rank of an adapter.
        density: fraction of the elements that are kept, above 0 and at most 1. The pruning methods need it.
        majority_sign: for the ties methods, whether the majority sign of an element is the sign of the sum of the
            adapters' values ("total") or the sign of most of the values ("frequency").
        key: PRNG key of the random masks of the dare methods. The masks are independent across adapters, paths and
            factors.

    Returns:
        The merged adapter, float32.

    Raises:
        UserError: an argument does not fit the method or the adapters; or an adapter has a DoRA magnitude vector, a
            MiSS matrix or complete weights.

    Source: PEFT's `LoraModel.add_weighted_adapter`, whose combination types include all methods of `combine` except
    slerp.
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
                # The LoRA factor a is multiplied by `signed` and the factor b by `root`, whose product is w * s, the
                # merge weight times the scale of the adapter.
                root = jnp.sqrt(jnp.abs(w * s))
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
    """Returns the low-rank factors a and b of the sum over i of weights[i] * a_i @ b_i.

    The array `weights` has the shape [N, ..], where N is the number of adapters and .. are the leading axes of the
    factors a_i.
    """
    return concatenate_factors([(x, y * w[..., None, None]) for x, y, w in zip(a, b, weights, strict=True)])


def _slerp(a: Sequence[jax.Array], b: Sequence[jax.Array], w: jax.Array, s: jax.Array) -> dict[str, jax.Array]:
    """Returns the low-rank factors of the spherical interpolation of the contributions of two adapters to a weight.

    The spherical interpolation is sin(w_0 angle) / sin(angle) D_0 + sin(w_1 angle) / sin(angle) D_1, where D_i = s_i
    a_i @ b_i is the contribution of adapter i, w_i is the merge weight, s_i is the scale, and `angle` is the angle
    between the flattened matrices D_0 and D_1.
    """
    if len(a) == 1:
        return _weighted(a, b, w * s)

    def inner(i: int, j: int) -> jax.Array:
        """Returns the inner product of the matrices s[i] a[i] @ b[i] and s[j] a[j] @ b[j], from [rank, rank]
        products."""
        return s[i] * s[j] * ((_t(a[i]) @ a[j]) * (b[i] @ _t(b[j]))).sum((-2, -1))

    norms = jnp.sqrt(inner(0, 0) * inner(1, 1))
    angle = jnp.arccos(jnp.clip(inner(0, 1) / jnp.where(norms > 0, norms, 1), -1, 1))
    sine = jnp.sin(angle)
    # For parallel or zero matrices, the arc of the spherical interpolation is undefined or lost in rounding, and the
    # interpolation is linear.
    curved = (norms > 0) & (sine > 1e-3)
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
    """Returns x [.., in, out] with zeros outside the fraction `density` of largest magnitudes in each matrix [in,
    out]."""
    flat = jnp.abs(x).reshape(*x.shape[:-2], -1)
    # `order` holds the position of each element in descending order of magnitude.
    order = jnp.argsort(jnp.argsort(-flat))
    return x * (order < int(density * flat.shape[-1])).reshape(x.shape)


def _random(x: jax.Array, density: float, key: jax.Array | None) -> jax.Array:
    assert key is not None
    return x * jax.random.bernoulli(key, density, x.shape) / density


def _sum(x: jax.Array, weights: jax.Array, majority_sign: MajoritySign) -> jax.Array:
    return (x * weights).sum(0)


def _elected_mean(x: jax.Array, weights: jax.Array, majority_sign: MajoritySign) -> jax.Array:
    """Returns, per element, the weighted sum of the adapters' values that have the majority sign, divided by the number
    of these values (TIES, section 4)."""
    votes = x if majority_sign == "total" else jnp.sign(x)
    kept = jnp.sign(x) == jnp.where(votes.sum(0) >= 0, 1, -1)
    return (x * weights * kept).sum(0) / jnp.maximum(kept.sum(0), 1)


def mask_key(key: jax.Array | None, path: str, i: int) -> jax.Array | None:
    """Returns the PRNG key of the random mask for adapter i and the array at `path`, such as blocks/attn/q/kernel/a."""
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), i)


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


# METHODS holds the methods that merge the factors a_i and b_i or, with the suffix _svd, the products D_i = scales[i] *
# a_i @ b_i.
METHODS: dict[str, Method] = {
    "linear": Method(None, _sum),
    "magnitude_prune": Method(_largest, _sum),
    "ties": Method(_largest, _elected_mean),
    "dare_linear": Method(_random, _sum),
    "dare_ties": Method(_random, _elected_mean),
}
