"""Loss curvature: Hessian-vector products, top eigenvalues, SAM, model soups and linear interpolation of models.

    value  = curvature.loss_on_batch(task.loss, batch)      a function that takes params and returns the mean loss
    hv     = curvature.hvp(value, params, vector)           Hessian-vector product, a tree like `params`
    top    = curvature.eigenvalues(value, params, key, n=3) eigenvalues, their error bounds, eigenvectors
    step   = make_train_step(loss, tx, transform=curvature.sam(rho=0.05))
    losses = curvature.linear_interpolation(value, first, second, jnp.linspace(0, 1, 21))
    soup   = curvature.mix(result.states[0][1].params, jnp.full(8, 1 / 8))     the average of a sweep's eight runs

All functions of this module are pure and take pytrees. All functions of this module except `greedy_soup` work under jit
and vmap. To study a LoRA adapter instead of the whole model, pass `lora.bind(loss, params, cfg)` to `loss_on_batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from gptjax._moved import moved_name
from gptjax.errors import UserError
from gptjax.training.step import Gradient, Loss
from gptjax.types import Params

# The type of a function that takes params and returns the loss, a float32 scalar.
Scalar = Callable[[Any], jax.Array]

# Dot products are computed in full float32 even on GPUs and TPUs, because in TF32 or bfloat16 the Lanczos vectors would
# lose their orthogonality.
_dot = partial(jnp.dot, precision="highest")


def loss_on_batch(loss: Loss, batch: Any, key: jax.Array | None = None) -> Scalar:
    """Returns a function that takes params and returns the mean loss per token (or per text) of one batch.

    Dropout is disabled if the PRNG key `key` is None.
    """
    return lambda params: loss(params, batch, key)[0].value()


def hvp(loss: Scalar, params: Any, vector: Any) -> Any:
    """Returns the Hessian-vector product H v, a tree like `params`, where H is the Hessian of `loss` at `params`.

    The Hessian-vector product is computed as the forward-mode derivative of the gradient in the direction `vector`. The
    Hessian is never stored, and one Hessian-vector product costs about as much as two gradients. The computation of
    Hessian-vector products is described in Pearlmutter 1994, "Fast exact multiplication by the Hessian", eq. 3.
    """
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


class Eigen(NamedTuple):
    """The result of `eigenvalues`.

    Attributes:
        values: eigenvalues, [n] float32, in the order that the argument `which` selects.
        errors: residual norms |H v - value v|, [n] float32. The residual norm is an upper bound on the distance between
            the returned value and an eigenvalue of H.
        vectors: eigenvectors, a tree like the params with leaves [n, ..]. Each eigenvector has norm 1 over all leaves.
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
    """Computes extreme eigenvalues of the Hessian of `loss` at `params` by Lanczos iteration.

    Args:
        key: PRNG key of the random start vector.
        n: number of eigenvalues to return.
        steps: number of Lanczos steps. Each Lanczos step computes one Hessian-vector product and keeps one vector of
            the size of the params in memory. Increase `steps` if the returned `errors` are too large.
        which: eigenvalues to return, and their order: the n largest in descending order, the n smallest in ascending
            order, or the n of largest magnitude in descending order of magnitude.

    Raises:
        UserError: n is below 1, or larger than `steps` or than the number of parameters.
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
    """Computes an orthonormal basis for which a symmetric matrix H is tridiagonal: T = basis H basis^T.

    The matrix H is given as the function `product`, which takes a vector v and returns the matrix-vector product H v.

    Every new basis vector is reorthogonalised twice against all previous vectors, because in float32 the three-term
    recurrence of Lanczos alone loses orthogonality after a few steps. If the basis spans an invariant subspace, the
    Lanczos iteration restarts with a random orthogonal vector, and the tridiagonal matrix T becomes block diagonal.

    Returns:
        (diagonal of T [steps], off-diagonal of T [steps], basis [steps, size]), float32. The last element of the
        off-diagonal is not part of T, but the norm of the residual after the last step.

    The Lanczos algorithm is described in Golub and Van Loan, "Matrix Computations", 4th edition, sections 10.1 and
    10.3.1.
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
        invariant = beta <= 1e-6 * scale
        fresh = unit(orthogonal(jax.random.normal(jax.random.fold_in(key, i + 1), (size,)), basis))
        v = jnp.where(invariant, fresh, unit(w))
        return (v, basis, scale), (alpha, jnp.where(invariant, 0.0, beta))

    start = unit(jax.random.normal(key, (size,)))
    carry = start, jnp.zeros((steps, size)), jnp.float32(0)
    (_, basis, _), (alphas, betas) = jax.lax.scan(body, carry, jnp.arange(steps))
    return alphas, betas, basis


def sam(rho: float | jax.Array = 0.05) -> Callable[[Gradient], Gradient]:
    """Returns the gradient transform of sharpness-aware minimisation (SAM), for use in a train step.

    The gradient transform of SAM is passed to the train step as `make_train_step(.., transform=sam(0.05))`. SAM
    replaces the gradient g at the params w by the gradient at w + e, where e = `rho` g / |g| is treated as a constant.
    With SAM, the loss and the metrics are computed at the unperturbed params, and both gradients of a step use the same
    dropout mask. A training step with SAM computes two gradients instead of one. SAM is defined in arXiv:2010.01412,
    eq. 2 with p = 2, and eq. 3.
    """

    def transform(gradient: Gradient) -> Gradient:
        def sharp(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
            grads, aux = gradient(params, frozen, batch, key)
            scale = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
            perturbed = jax.tree.map(lambda w, g: w + (scale * g).astype(w.dtype), params, grads)
            return gradient(perturbed, frozen, batch, key)[0], aux

        return sharp

    return transform


def mix(stacked: Any, weights: jax.Array) -> Any:
    """Returns the weighted sum of the params of N models, which are stacked along a leading axis.

    The leaves of `stacked` have shape [N, ..], the weights have shape [N], and the leaves of the result have shape
    [..]. Weights of 1 / N give a uniform model soup (arXiv:2203.05482, section 2.1).

    Do not use `mix` on LoRA adapters, because averaging the low-rank factors a and b separately does not average their
    products a b. To average LoRA adapters, use `lora.average`, or merge each adapter into its params first.
    """
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision="highest"), stacked)


def mixtures(loss: Scalar, stacked: Any, weights: jax.Array, *, at_once: int | None = None) -> jax.Array:
    """Returns the losses, [M] float32, of M models whose params are weighted sums of the params of N models.

    Args:
        stacked: params of the N models, stacked along a leading axis: leaves [N, ..].
        weights: weight of each model in each weighted sum, [M, N].
        at_once: number of weighted sums that are held in memory at the same time. None: all M.
    """

    def mixture_loss(w: jax.Array) -> jax.Array:
        return loss(mix(stacked, w))

    if at_once is None:
        return jax.vmap(mixture_loss)(weights)
    return jax.lax.map(mixture_loss, weights, batch_size=at_once)


def linear_interpolation(
    loss: Scalar, first: Params, second: Params, t: jax.Array, *, at_once: int | None = None
) -> jax.Array:
    """Returns the losses, [M] float32, of models on the line between the params of two models.

    The interpolated params are (1 - t) * first + t * second, for each of the M elements of t. The losses show whether a
    loss barrier separates the two models (arXiv:1412.6544).

    Args:
        at_once: number of interpolated models that are held in memory at the same time. None: all M.

    Raises:
        UserError: the params of the two models have different shapes.
    """
    if (a := jax.tree.map(jnp.shape, first)) != (b := jax.tree.map(jnp.shape, second)):
        raise UserError(f"cannot interpolate between models of different shapes: {a} and {b}")
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    return mixtures(loss, stacked, jnp.stack([1 - t, t], 1), at_once=at_once)


def greedy_soup(loss: Scalar, stacked: Any, n: int) -> tuple[list[int], Any]:
    """Builds a greedy model soup, which is the average of the params of selected models (arXiv:2203.05482, recipe 1).

    The models are considered for the soup in order of increasing loss. A model is added to the soup if adding the model
    does not raise the loss of the soup.

    Args:
        loss: function that takes params and returns the loss on held-out data.
        stacked: params of the n models, stacked along a leading axis: leaves [n, ..].

    Returns:
        (indices of the chosen models, params averaged over the chosen models).
    """

    def weights(members: list[int]) -> jax.Array:
        return jnp.zeros(n).at[jnp.array(members)].set(1 / len(members))

    single = mixtures(loss, stacked, jnp.eye(n))
    order = [int(i) for i in jnp.argsort(single)]
    chosen, best = order[:1], single[order[0]]
    score = jax.jit(lambda w: loss(mix(stacked, w)))
    for i in order[1:]:
        if (candidate := score(weights([*chosen, i]))) <= best:
            chosen, best = [*chosen, i], candidate
    return chosen, mix(stacked, weights(chosen))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
