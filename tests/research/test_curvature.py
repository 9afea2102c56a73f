"""Curvature against the dense Hessian, SAM against its two gradient steps written out, mixtures against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gptjax
from gptjax.errors import UserError
from gptjax.losses import next_token
from gptjax.research import curvature
from gptjax.training.step import TrainState, make_train_step
from gptjax.types import Batch, Mean

CFG = gptjax.ModelConfig(
    arch="gpt2", vocab_size=5, context_length=4, n_layer=1, n_head=1, d_model=4, d_ff=4, unroll=True
)


@pytest.fixture(scope="module")
def model():
    """(loss, params, dense Hessian [P, P]) of a model with about 150 parameters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: gptjax.init_params(jax.random.key(0), CFG))
    params = jax.tree.map(lambda x: jnp.float32(0.5 * rng.normal(size=x.shape)), shapes)
    tokens = rng.integers(0, 5, (3, 5)).astype(np.int32)
    loss = curvature.loss_on_batch(next_token(CFG), Batch(tokens[:, :-1], tokens[:, 1:]))
    flat, unravel = ravel_pytree(params)
    return loss, params, np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v))))(flat), np.float64)


@pytest.mark.first_cases(1)
def test_the_product_is_the_hessian_s(model):
    """Also against central differences of the gradient, which use no custom derivative rule."""
    loss, params, whole = model
    flat, unravel = ravel_pytree(params)
    v = np.random.default_rng(1).normal(size=flat.shape).astype(np.float32)
    product = ravel_pytree(jax.jit(lambda v: curvature.hvp(loss, params, unravel(v)))(v))[0]
    np.testing.assert_allclose(product, whole @ v, atol=1e-4 * np.abs(whole @ v).max())
    gradient = jax.jit(lambda x: ravel_pytree(jax.grad(loss)(unravel(x)))[0])
    step = 1e-2 / np.linalg.norm(v)
    differences = (gradient(flat + step * v) - gradient(flat - step * v)) / (2 * step)
    np.testing.assert_allclose(product, differences, atol=5e-3 * np.abs(whole @ v).max())


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenvalues_are_those_of_the_whole_hessian(model, which):
    loss, params, whole = model
    every = np.linalg.eigvalsh(whole)
    want = {"largest": every[::-1], "smallest": every, "magnitude": every[np.argsort(-np.abs(every))]}[which][:3]
    find = jax.jit(lambda p, key: curvature.eigenvalues(loss, p, key, n=3, steps=60, which=which))
    values, errors, vectors = find(params, jax.random.key(0))
    scale = np.abs(every).max()
    np.testing.assert_allclose(values, want, atol=2e-5 * scale)
    assert (np.asarray(errors) < 1e-3 * scale).all()
    for n in range(3):
        v = np.asarray(ravel_pytree(jax.tree.map(lambda leaf: leaf[n], vectors))[0])  # noqa: B023
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(whole @ v, values[n] * v, atol=2e-3 * scale)


@pytest.mark.slow
def test_few_steps_say_how_far_off_they_are(model):
    loss, params, whole = model
    every = np.linalg.eigvalsh(whole)
    values, errors, _ = jax.jit(lambda p, key: curvature.eigenvalues(loss, p, key, n=2, steps=6))(
        params, jax.random.key(0)
    )
    for value, error in zip(np.asarray(values), np.asarray(errors), strict=True):
        assert np.abs(every - value).min() <= error * 1.001 + 1e-5


def test_lanczos_goes_on_where_the_basis_is_closed():
    """With two distinct eigenvalues the Krylov space of the start vector is exhausted after two steps."""
    values = jnp.array([3.0, 3.0, 3.0, 1.0, 1.0, 1.0])
    alphas, betas, basis = curvature.lanczos(lambda v: values * v, jax.random.key(0), 6, 6)
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-5)
    whole = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    np.testing.assert_allclose(np.linalg.eigvalsh(whole), np.sort(values), atol=1e-5)


def test_too_many_eigenvalues():
    with pytest.raises(UserError, match="expected 1 to 3"):
        curvature.eigenvalues(lambda p: (p["w"] ** 2).sum(), {"w": jnp.ones(3)}, jax.random.key(0), n=4)


# ---------------------------------------------------------------- SAM


def line_loss(params, batch, key):
    """A weighted mean over rows; w is trained, b is frozen."""
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return Mean((batch["weight"] * error**4).sum(), batch["weight"].sum()), {}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sam_is_its_two_steps_by_hand(accumulation):
    """w' = w - lr grad L(w + rho g / |g|), L the mean over the whole batch; frozen parameters are not perturbed."""
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=s).astype(np.float32) for name, s in (("x", (6, 3)), ("y", (6,)))}
    batch["weight"] = np.float32([1, 2, 0.5, 1, 3, 1])
    w, b, lr, rho = rng.normal(size=3).astype(np.float32), np.float32(0.3), 0.01, 0.05

    def gradient(w):
        error = batch["x"] @ w + b - batch["y"]
        return (4 * batch["weight"] * error**3) @ batch["x"] / batch["weight"].sum()

    g = gradient(w)
    want = w - lr * gradient(w + rho * g / np.linalg.norm(g))
    tx = optax.sgd(lr)
    step = make_train_step(
        line_loss, tx, combine=lambda trained, frozen: trained | frozen, accumulation=accumulation,
        transform=curvature.sam(rho),
    )  # fmt: skip
    state = TrainState.create({"w": jnp.array(w)}, tx=tx, key=jax.random.key(0), frozen={"b": b})
    state, metrics = jax.jit(step)(state, batch)
    np.testing.assert_allclose(state.params["w"], want, rtol=1e-5)
    error = batch["x"] @ w + b - batch["y"]
    at_w = (batch["weight"] * error**4).sum() / batch["weight"].sum()
    assert float(metrics["loss"]) == pytest.approx(float(at_w), rel=1e-5)
    assert not np.allclose(want, w - lr * g, atol=1e-5)


def test_sam_where_there_is_no_gradient():
    tx = optax.sgd(0.1)
    step = make_train_step(lambda p, b, k: (Mean((p["w"] * 0).sum(), 1.0), {}), tx, transform=curvature.sam())
    state, metrics = step(TrainState.create({"w": jnp.ones(2)}, tx=tx, key=jax.random.key(0)), None)
    assert (state.params["w"] == 1).all() and metrics["skipped"] == 0


# ---------------------------------------------------------------- soups and lines

STACKED = {"w": jnp.float32(np.random.default_rng(2).normal(size=(4, 2, 3))), "b": jnp.float32([1, 2, 3, 5])}


def bowl(params):
    return (jnp.sin(params["w"]) ** 2).sum() + params["b"] ** 2


def member(i):
    return jax.tree.map(lambda leaf: leaf[i], STACKED)


def test_a_soup_is_a_loop_of_sums():
    weights = np.float32([0.1, 0.2, 0.3, 0.4])
    want = jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *map(member, range(4))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), curvature.mix(STACKED, weights), want)


@pytest.mark.parametrize("at_once", [None, 2])
def test_losses_along_a_line_are_a_loop(at_once):
    t = np.float32([0, 0.25, 0.5, 1])
    find = jax.jit(lambda a, b, t: curvature.linear_interpolation(bowl, a, b, t, at_once=at_once))
    want = [bowl(jax.tree.map(lambda a, b: (1 - s) * a + s * b, member(0), member(3))) for s in t]  # noqa: B023
    np.testing.assert_allclose(find(member(0), member(3), t), want, rtol=1e-5)


def test_no_line_between_models_of_other_shapes():
    with pytest.raises(UserError, match="different shapes"):
        curvature.linear_interpolation(bowl, member(0), {"w": jnp.ones((2, 2)), "b": jnp.ones(())}, jnp.zeros(1))


def test_greedy_soup():
    """On a parabola: the average of 0.9 and -1.1 is better than the best alone; adding 5 makes it worse."""
    stacked = {"w": jnp.float32([5.0, -1.1, 0.9])}
    chosen, soup = curvature.greedy_soup(lambda p: p["w"] ** 2, stacked, 3)
    assert chosen == [2, 1] and float(soup["w"]) == pytest.approx(-0.1, abs=1e-6)
