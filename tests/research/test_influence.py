"""Per-example gradients, influence scores, gradient noise scale, DP-SGD and its accountant."""

import builtins
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import lora, tree
from gptjax.config import LoraConfig
from gptjax.errors import UserError
from gptjax.losses import next_token
from gptjax.research import influence, privacy
from gptjax.training.step import TrainState, make_train_step
from gptjax.types import Batch, Mean


def linear(params, batch, key):
    """A loss with known gradients: the weighted mean of (x . w - y)^2 / 2."""
    x, y, weights = batch
    error = x @ params["w"] - y
    return Mean((weights * error**2 / 2).sum(), weights.sum()), {}


def points(n=8, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=n).astype(np.float32), np.ones(n, np.float32)


@pytest.fixture(scope="module")
def model(tiny):
    cfg, params = tiny("llama", n_layer=1)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (5, 9)).astype(np.int32)
    weights = np.ones((5, 8), np.float32)
    weights[3, 4:] = 0
    return cfg, params, Batch(ids[:, :-1], ids[:, 1:], weights)


@pytest.mark.slow
def test_gradients_of_a_model_equal_a_loop(model):
    cfg, params, batch = model
    loss = next_token(cfg)
    features = influence.gradient_features(loss, dims=None, chunk=2)(params, batch)

    @jax.jit
    def alone(row):
        def value(params):
            mean, _ = loss(params, row, None)
            return mean.total / mean.weight

        return jax.grad(value)(params)

    for i in range(5):
        gradient = alone(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        np.testing.assert_allclose(features[i], flat, atol=1e-5)


def test_gradients_of_an_adapter_leave_the_base_out(model):
    cfg, params, batch = model
    settings = LoraConfig(rank=2, targets="blocks/attn/q/kernel")
    adapter = lora.init(jax.random.key(0), params, settings)
    features = influence.gradient_features(
        next_token(cfg), combine=lambda a, base: lora.attach(base, a, settings), dims=None
    )
    assert features(adapter, batch, params).shape == (5, tree.size(adapter))


def test_a_row_without_weight_has_no_gradient():
    x, y, weights = points()
    weights[2] = 0
    gradients = influence.example_gradients(linear, {"w": jnp.ones(3)}, (x, y, weights))["w"]
    np.testing.assert_allclose(gradients, np.where(weights[:, None] > 0, (x.sum(1) - y)[:, None] * x, 0), rtol=1e-5)


def test_a_sketch_keeps_products_on_average():
    rng = np.random.default_rng(0)
    a, b = ({"u": rng.normal(size=(20, 5)), "v": rng.normal(size=30)} for _ in range(2))
    b = jax.tree.map(lambda x, y: x + y, a, b)
    exact = sum((x * y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    size = math.prod(math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(t))) for t in (a, b))
    products = [float(influence.sketch(a, 64, seed) @ influence.sketch(b, 64, seed)) for seed in range(40)]
    assert abs(np.mean(products) - exact) < 4 * size / math.sqrt(64 * 40)
    assert np.std(products) < 2 * size / math.sqrt(64)


def test_the_twin_is_the_most_similar():
    x, y, weights = points(8)
    features = influence.gradient_features(linear, dims=None)({"w": jnp.zeros(3)}, (x, y, weights))
    near = influence.similarity(features[[5, 2]], features)
    assert near.argmax(1).tolist() == [5, 2]
    np.testing.assert_allclose(near.max(1), 1, rtol=1e-6)
    assert not np.isnan(influence.similarity(np.zeros((1, 3)), features)).any()


def test_tracin_is_what_a_small_step_lowers():
    """Eq. 1: after a step on one training example, a test example's loss falls by rate * inner product."""
    x, y, weights = points(4)
    params, rate = {"w": jnp.float32([0.3, -0.2, 0.5])}, 1e-4
    train, test = (x[:3], y[:3], weights[:3]), (x[3:], y[3:], weights[3:])
    features = influence.gradient_features(linear, dims=None)
    scores = influence.tracin(features, [params], train, test, rates=[rate])
    gradients = influence.example_gradients(linear, params, train)
    before = float(linear(params, test, None)[0].total)
    for i in range(3):
        after = linear(jax.tree.map(lambda p, g, i=i: p - rate * g[i], params, gradients), test, None)[0].total
        assert before - float(after) == pytest.approx(scores[0, i], rel=0.05, abs=1e-6)
    twice = influence.tracin(features, iter([params, params]), train, test, rates=[rate, rate])
    np.testing.assert_allclose(twice, 2 * scores, rtol=1e-5)
    for rates in ([rate], [rate] * 3):
        with pytest.raises(UserError, match="one rate for each checkpoint"):
            influence.tracin(features, [params, params], train, test, rates=rates)


def test_noise_scale_of_known_noise():
    """Gradients g + N(0, s^2 I): trace is d s^2, square norm |g|^2."""
    rng, d, s = np.random.default_rng(0), 4, 0.5
    x = rng.normal(1.0, s, (4000, d)).astype(np.float32)

    def loss(params, batch, key):
        return Mean((batch @ params["w"]).sum(), jnp.float32(len(batch))), {}

    noise = influence.gradient_noise(loss, {"w": jnp.zeros(d)}, x, chunk=500)
    assert noise.trace == pytest.approx(d * s**2, rel=0.05)
    assert noise.square_norm == pytest.approx(d, rel=0.05)
    assert noise.scale == pytest.approx(s**2, rel=0.1)
    with pytest.raises(UserError, match="n_small < n_big"):
        influence.noise_scale(1.0, 1.0, n_small=8, n_big=8)


def test_clipping_by_hand():
    batch, params = points(6), {"w": jnp.float32([1.0, -1.0, 0.5])}
    each = influence.example_gradients(linear, params, batch)["w"]
    lengths = np.linalg.norm(each, axis=1)
    clip = float(np.median(lengths))
    expected = (each * np.minimum(1, clip / lengths)[:, None]).sum(0)
    for chunk in (None, 2):
        total, seen = influence.clipped_sum(linear, params, batch, clip=clip, chunk=chunk)
        np.testing.assert_allclose(total["w"], expected, rtol=1e-5)
        np.testing.assert_allclose(seen, lengths, rtol=1e-5)
    with pytest.raises(UserError, match="must divide the 6 rows"):
        influence.clipped_sum(linear, params, batch, clip=1.0, chunk=4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_noise_and_with_a_far_clip_it_is_the_plain_step(accumulation):
    batch, tx, key = points(8), optax.sgd(0.1), jax.random.key(0)
    state = TrainState.create({"w": jnp.ones(3)}, tx=tx, key=key)
    loss = privacy.private(linear, clip=1e6, noise=0.0, batch_size=8, accumulation=accumulation)
    private, metrics = jax.jit(make_train_step(loss, tx, combine=privacy.pair, accumulation=accumulation))(state, batch)
    plain, expected = make_train_step(linear, tx)(state, batch)
    np.testing.assert_allclose(private.params["w"], plain.params["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_noise_is_as_large_as_said(accumulation):
    """Rows without weight: pure noise, of standard deviation noise * clip / batch_size, whatever the accumulation."""
    batch, tx = (jnp.zeros((8, 500)), jnp.zeros(8), jnp.zeros(8)), optax.sgd(1.0)
    state = TrainState.create({"w": jnp.zeros(500)}, tx=tx, key=jax.random.key(3))
    loss = privacy.private(linear, clip=0.5, noise=2.0, batch_size=4, accumulation=accumulation)
    step = jax.jit(make_train_step(loss, tx, combine=privacy.pair, accumulation=accumulation))
    after, _ = step(state, batch)
    assert float(after.params["w"].std()) == pytest.approx(0.25, rel=0.12)
    other, _ = step(after, batch)
    assert not np.allclose(other.params["w"] - after.params["w"], after.params["w"])


def test_one_row_moves_the_step_by_at_most_the_clip():
    batch, params, key = points(8), {"w": jnp.ones(3)}, jax.random.key(0)
    far = batch[0].copy()
    far[0] *= 1e4
    loss = privacy.private(linear, clip=0.3, noise=1.0, batch_size=1)
    gradient = jax.grad(lambda params, batch: loss((params, None), batch, key)[0].total)
    moved = gradient(params, batch)["w"] - gradient(params, (far, *batch[1:]))["w"]
    assert float(jnp.linalg.norm(moved)) <= 2 * 0.3 + 1e-5


def test_of_an_adapter_only_what_is_trained_is_clipped(model):
    cfg, params, batch = model
    settings = LoraConfig(rank=2, targets="blocks/attn/q/kernel")
    adapter, tx = lora.init(jax.random.key(0), params, settings), optax.sgd(0.1)

    def combine(a, base):
        return lora.attach(base, a, settings)

    clip = 1e-3
    loss = privacy.private(next_token(cfg), clip=clip, noise=0.0, batch_size=5, combine=combine)
    state = TrainState.create(adapter, tx=tx, key=jax.random.key(0), frozen=params)
    after, metrics = jax.jit(make_train_step(loss, tx, combine=privacy.pair))(state, batch)
    assert 0 < float(metrics["grad_norm"]) <= clip + 1e-7
    assert jax.tree.structure(after.params) == jax.tree.structure(adapter)


def test_private_needs_a_key_and_sensible_numbers():
    loss = privacy.private(linear, clip=1.0, noise=1.0, batch_size=8)
    with pytest.raises(UserError, match="needs a key"):
        loss(({"w": jnp.ones(3)}, None), points(), None)
    for bad in (dict(clip=0.0), dict(noise=-1.0), dict(batch_size=0)):
        with pytest.raises(UserError, match="above 0"):
            privacy.private(linear, **{**dict(clip=1.0, noise=1.0, batch_size=8), **bad})


def test_rows_are_drawn_each_by_itself():
    sizes = []
    for step in range(200):
        rows, here = privacy.poisson_sample(100, rate=0.1, step=step, seed=0)
        assert len(rows) == len(here) == 28
        real = rows[here > 0]
        assert len(set(real.tolist())) == len(real)
        sizes.append(len(real))
    assert np.mean(sizes) == pytest.approx(10, abs=1)
    assert np.var(sizes) == pytest.approx(9, rel=0.4)


@pytest.mark.slow
def test_the_accountant():
    pytest.importorskip("dp_accounting")
    spent = privacy.epsilon(noise=1.0, rate=1.0, steps=1, delta=1e-5)
    assert spent == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-3)
    assert privacy.epsilon(noise=1.0, rate=0.01, steps=10, delta=1e-5) < spent
    noise = privacy.noise_for(2.0, rate=0.1, steps=20, delta=1e-5)
    assert 1.3 < noise < 1.7
    assert privacy.epsilon(noise=noise, rate=0.1, steps=20, delta=1e-5) <= 2.0
    with pytest.raises(UserError, match="0 < rate <= 1"):
        privacy.epsilon(noise=1.0, rate=2.0, steps=1, delta=1e-5)


def gaussian_epsilon(noise, delta):
    """The exact epsilon of the Gaussian mechanism: arXiv:1805.06530, theorem 8, by bisection."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        a, b = 0.5 / noise - middle * noise, -0.5 / noise - middle * noise
        low, high = (middle, high) if phi(a) - math.exp(middle) * phi(b) > delta else (low, middle)
    return low


def test_without_the_library_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"\.\[privacy\]"):
        privacy.epsilon(noise=1.0, rate=0.1, steps=1, delta=1e-5)


def test_the_old_names_of_privacy():
    with pytest.warns(DeprecationWarning, match=r"influence.private is now gptjax.research.privacy.private"):
        assert influence.private is privacy.private
    with pytest.raises(AttributeError, match="public"):
        influence.public  # noqa: B018


def test_examples_of_different_lengths_are_refused():
    x, y, weights = points(4)
    with pytest.raises(UserError, match="one n above 0"):
        influence.gradient_features(linear)({"w": jnp.ones(3)}, (x, y[:3], weights))
