"""Second order: products with the Hessian, its largest eigenvalues, flat minima, and the way between two models.

value  = curvature.at(task.loss, batch)                 params -> the mean loss: what the others take as `loss`
hv     = curvature.hvp(value, params, vector)           the Hessian times a vector, a tree like `params`
top    = curvature.eigenvalues(value, params, key, n=3) values, how far off they are at most, vectors
step   = make_train_step(loss, tx, transform=curvature.sam(rho=0.05))
losses = curvature.along(value, first, second, jnp.linspace(0, 1, 21))
soup   = curvature.mix(found.states[0][1].params, jnp.full(8, 1 / 8))      the mean of a sweep's eight runs

All of them are pure functions of trees: of an adapter with `lora.bind(loss, params, cfg)`, under jit and vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from gptjax.errors import UserError
from gptjax.training.step import Gradient, Loss
from gptjax.types import Params

Scalar = Callable[[Any], jax.Array]  # params -> [] float32

_dot = partial(jnp.dot, precision="highest")  # on every device: a rounded basis is not orthogonal


def at(loss: Loss, batch: Any, key: jax.Array | None = None) -> Scalar:
    """params -> the loss a token (or text) of one batch, without dropout where `key` is None."""
    return lambda params: loss(params, batch, key)[0].value()


def hvp(loss: Scalar, params: Any, vector: Any) -> Any:
    """H v, a tree like `params`; H the Hessian of `loss` at `params`, never formed: the derivative of the gradient
    along `vector`, at about the cost of two gradients. Source: Pearlmutter 1994, "Fast exact multiplication by the
    Hessian", eq. 3."""
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


class Eigen(NamedTuple):
    """values   [n] float32, as `which` orders them
    errors   [n] float32: |H v - value v|, which bounds how far each is from an eigenvalue of H
    vectors  a tree like the params, leaves [n, ..], of length 1 each over all leaves
    """

    values: jax.Array
    errors: jax.Array
    vectors: Any


def eigenvalues(
    loss: Scalar,
    params: Any,
    key: jax.Array,
    *,
    n: int = 1,
    steps: int = 30,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
) -> Eigen:
    """The outermost eigenvalues of the Hessian of `loss` at `params`, by `steps` products with it.

    Args:
        key: of the random vector it begins with.
        steps: of Lanczos; that many vectors of the params' size are kept. More where `errors` are too large.
        which: largest first, smallest first, or largest in magnitude first.

    Raises:
        UserError: n is more than the steps, or than the params hold numbers.
    """
    flat, unravel = ravel_pytree(params)
    steps = min(steps, flat.size)
    if not 1 <= n <= steps:
        raise UserError(f"n={n}: expected 1 to {steps}, the smaller of steps and of the number of parameters")

    def product(v: jax.Array) -> jax.Array:
        return ravel_pytree(hvp(loss, params, unravel(v.astype(flat.dtype))))[0].astype(jnp.float32)

    alphas, betas, basis = lanczos(product, key, flat.size, steps)
    values, small = jnp.linalg.eigh(jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1))
    order = {"largest": -values, "smallest": values, "magnitude": -jnp.abs(values)}[which]
    chosen = jnp.argsort(order)[:n]
    vectors = _dot(small[:, chosen].T, basis)
    return Eigen(values[chosen], jnp.abs(betas[-1] * small[-1, chosen]), jax.vmap(unravel)(vectors))


def lanczos(
    product: Callable[[jax.Array], jax.Array], key: jax.Array, size: int, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Diagonal [steps], next-to-diagonal [steps] and basis [steps, size], float32, of H = basis^T T basis.

    H is `product`'s symmetric matrix. Each vector is made orthogonal to all before it, twice: in float32 the
    three-term recurrence alone loses that after a few steps. Where the basis is closed under H it goes on with a
    random vector, and T falls into blocks. The last of the next-to-diagonal leads out of T.
    Source: Golub and Van Loan, "Matrix Computations", 4th ed., 10.1 and 10.3.1.
    """

    def orthogonal(v: jax.Array, basis: jax.Array) -> jax.Array:
        for _ in range(2):
            v = v - _dot(basis.T, _dot(basis, v))
        return v

    def unit(v: jax.Array) -> jax.Array:
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    def body(carry: tuple, i: jax.Array) -> tuple[tuple, tuple]:
        v, basis, scale = carry
        basis = basis.at[i].set(v)
        w = product(v)
        alpha, scale = _dot(v, w), jnp.maximum(scale, jnp.linalg.norm(w))
        w = orthogonal(w, basis)
        beta = jnp.linalg.norm(w)
        closed = beta <= 1e-6 * scale
        fresh = unit(orthogonal(jax.random.normal(jax.random.fold_in(key, i + 1), (size,)), basis))
        v = jnp.where(closed, fresh, unit(w))
        return (v, basis, scale), (alpha, jnp.where(closed, 0.0, beta))

    start = unit(jax.random.normal(key, (size,)))
    carry = start, jnp.zeros((steps, size)), jnp.float32(0)
    (_, basis, _), (alphas, betas) = jax.lax.scan(body, carry, jnp.arange(steps))
    return alphas, betas, basis


def sam(rho: float | jax.Array = 0.05) -> Callable[[Gradient], Gradient]:
    """The gradient where the loss is highest within `rho`, for `make_train_step(.., transform=sam(0.05))`.

    e = rho g / |g|, g the gradient at w; the result is the gradient at w + e, and e is no function of w to it. Loss and
    metrics are those at w, both gradients with the same dropout. Two gradients a step.
    Source: sharpness-aware minimisation, arXiv:2010.01412, eq. 2 with p = 2, and eq. 3.
    """

    def transform(gradient: Gradient) -> Gradient:
        def sharp(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
            grads, aux = gradient(params, frozen, batch, key)
            scale = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
            worst = jax.tree.map(lambda w, g: w + (scale * g).astype(w.dtype), params, grads)
            return gradient(worst, frozen, batch, key)[0], aux

        return sharp

    return transform


def mix(stacked: Any, weights: jax.Array) -> Any:
    """The weighted sum over the leading axis: leaves [N, ..] and weights [N] -> [..]. A uniform soup (arXiv:2203.05482,
    2.1) has weights 1 / N.

    Of adapters this is the mean of a and of b, not of what they add: for that `lora.average`, or mix merged params.
    """
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision="highest"), stacked)


def mixtures(loss: Scalar, stacked: Any, weights: jax.Array, *, at_once: int | None = None) -> jax.Array:
    """The loss of each mixture: leaves [N, ..] and weights [M, N] -> [M] float32, in one call.

    Args:
        at_once: mixtures whose params are alive together; None: all.
    """

    def one(w: jax.Array) -> jax.Array:
        return loss(mix(stacked, w))

    return jax.vmap(one)(weights) if at_once is None else jax.lax.map(one, weights, batch_size=at_once)


def along(loss: Scalar, first: Params, second: Params, t: jax.Array, *, at_once: int | None = None) -> jax.Array:
    """The loss at (1 - t) first + t second for each t [M] -> [M] float32: the barrier between two minima.
    Source: linear interpolation, arXiv:1412.6544; `at_once` as in `mixtures`.

    Raises:
        UserError: two trees of other shapes.
    """
    if (a := jax.tree.map(jnp.shape, first)) != (b := jax.tree.map(jnp.shape, second)):
        raise UserError(f"two models of other shapes have no line between them: {a} and {b}")
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    return mixtures(loss, stacked, jnp.stack([1 - t, t], 1), at_once=at_once)


def greedy_soup(loss: Scalar, stacked: Any, n: int) -> tuple[list[int], Any]:
    """Which of the n models [n, ..], best first, lower the loss of their mean, and that mean. `loss`: held-out data's.
    Source: arXiv:2203.05482, recipe 1."""

    def weights(members: list[int]) -> jax.Array:
        return jnp.zeros(n).at[jnp.array(members)].set(1 / len(members))

    alone = mixtures(loss, stacked, jnp.eye(n))
    order = [int(i) for i in jnp.argsort(alone)]
    chosen, best = order[:1], alone[order[0]]
    score = jax.jit(lambda w: loss(mix(stacked, w)))
    for i in order[1:]:
        if (found := score(weights([*chosen, i]))) <= best:
            chosen, best = [*chosen, i], found
    return chosen, mix(stacked, weights(chosen))
