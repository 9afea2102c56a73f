"""The training step, on a linear regression: these properties hold for any loss and any pytree of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from gptjax.ops.device import compiling_for
from gptjax.optim import offloaded
from gptjax.training.step import TrainState, evaluate, make_multi_step, make_train_step
from gptjax.types import Mean

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.array(RNG.normal(size=(3,)), jnp.float32), "b": jnp.float32(0.1)}
TX = optax.adam(0.1)


def batch(seed=0, n=12):
    rng = np.random.default_rng(seed)
    weights = np.where(np.arange(n) % 5 == 0, 0, rng.uniform(0.1, 3, n))  # unequal, with unequal sums per micro-batch
    return {
        k: v.astype(np.float32) for k, v in dict(x=rng.normal(size=(n, 3)), y=rng.normal(size=n), w=weights).items()
    }


def loss(params, batch, key):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    noise = 0.0 if key is None else 0.01 * jax.random.normal(key)
    total, weight = jnp.sum(batch["w"] * error**2), batch["w"].sum()
    return Mean(total, weight) if key is None else Mean(total * (1 + noise), weight), {
        "absolute": Mean(jnp.sum(batch["w"] * jnp.abs(error)), weight),
    }


def quiet(params, batch, key):
    return loss(params, batch, None)


def fresh(tx=TX, **kwargs):
    return TrainState.create(PARAMS, tx=tx, key=jax.random.key(0), **kwargs)


def stacked(n):
    return jax.tree.map(lambda *xs: np.stack(xs), *map(batch, range(n)))


def assert_same(a, b):
    """Compare bitwise."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def step(request):
    """The step as compiled for each platform: a non-finite step is skipped by lax.cond on a CPU, by jnp.where on a
    GPU."""
    compiled = jax.jit(make_train_step(loss, TX))

    def call(*args):
        with compiling_for(request.param):
            return compiled(*args)

    return call


def test_the_gradient_is_that_of_the_weighted_mean():
    sgd = optax.sgd(1.0)
    state, metrics = make_train_step(quiet, sgd)(fresh(sgd), batch())
    data = batch()
    error = data["x"] @ PARAMS["w"] + PARAMS["b"] - data["y"]
    gradient = 2 * (data["w"] * error) @ data["x"] / data["w"].sum()
    np.testing.assert_allclose(PARAMS["w"] - state.params["w"], gradient, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(float((data["w"] * error**2).sum() / data["w"].sum()), rel=1e-5)
    assert metrics["absolute"] == pytest.approx(float((data["w"] * np.abs(error)).sum() / data["w"].sum()), rel=1e-5)
    assert metrics["weight"] == pytest.approx(float(data["w"].sum()))
    assert metrics["grad_norm"] >= np.linalg.norm(gradient) * 0.999
    assert (int(state.step), int(metrics["skipped"])) == (1, 0)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_accumulation_equals_the_whole_batch(n):
    sgd = optax.sgd(1.0)
    whole, expected = make_train_step(quiet, sgd)(fresh(sgd), batch())
    state, metrics = jax.jit(make_train_step(quiet, sgd, accumulation=n))(fresh(sgd), batch())
    for a, b in zip(jax.tree.leaves((state.params, metrics)), jax.tree.leaves((whole.params, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_rerun_is_bitwise_equal(step):
    def run():
        state, out = fresh(), []
        for i in range(3):
            state, metrics = step(state, batch(i))
            out.append(metrics)
        return state, out

    assert_same(run(), run())


def test_each_step_uses_another_random_key(step):
    first = step(fresh(), batch())[1]["loss"]
    later = step(fresh().replace(step=jnp.int32(1)), batch())[1]["loss"]
    other = step(fresh().replace(key=jax.random.key(1)), batch())[1]["loss"]
    assert len({float(first), float(later), float(other)}) == 3


def test_several_steps_in_one_call_equal_single_steps(step):
    state, metrics = jax.jit(make_multi_step(make_train_step(loss, TX)))(fresh(), stacked(3))
    single, losses = fresh(), []
    for i in range(3):
        single, m = step(single, batch(i))
        losses.append(m["loss"])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert int(state.step) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_non_finite_step_changes_no_parameters_and_is_counted(step, bad):
    """With 1e30 the loss overflows. The next finite step resets `skipped_in_a_row` but not `skipped`."""
    state, _ = step(fresh(), batch())
    broken = batch(1)
    broken["x"][3] = bad
    once, _ = step(state, broken)
    twice, metrics = step(once, broken)
    assert_same((twice.params, twice.opt_state), (state.params, state.opt_state))
    assert (int(twice.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (3, 2, 2)
    good, metrics = step(twice, batch(2))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert np.isfinite(good.params["w"]).all() and (good.params["w"] != state.params["w"]).any()


def test_a_step_with_a_finite_loss_and_a_non_finite_gradient_is_skipped():
    def root(params, batch, key):
        return Mean(jnp.sqrt(jnp.abs(params["b"])), jnp.float32(1)), {}

    start = fresh().replace(params={**PARAMS, "b": jnp.float32(0)})
    state, metrics = make_train_step(root, TX)(start, {"x": jnp.ones(1)})
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert_same(state.params, start.params)
    assert int(state.skipped) == 1


def test_a_batch_with_weight_zero_gives_finite_results(step):
    state, metrics = step(fresh(), {**batch(), "w": np.zeros(12, np.float32)})
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and int(state.skipped) == 0


def test_frozen_params_are_read_but_not_updated():
    trained, frozen = {"w": PARAMS["w"]}, {"b": PARAMS["b"]}
    step = make_train_step(quiet, TX, combine=lambda params, frozen: {**params, **frozen})
    state, metrics = step(TrainState.create(trained, tx=TX, key=jax.random.key(0), frozen=frozen), batch())
    assert_same(state.frozen, frozen)
    assert (state.params["w"] != trained["w"]).all() and state.params.keys() == {"w"}
    assert metrics["loss"] == pytest.approx(float(loss(PARAMS, batch(), None)[0].value()), rel=1e-5)


def test_evaluation_counts_every_token_once():
    """The result is the mean over tokens, not the mean of the batches' means: the last batch is shorter."""
    batches = [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch()) for a, b in ((0, 5), (5, 10), (10, 12))]
    whole = loss(PARAMS, batch(), None)[0]
    total, _ = evaluate(loss, PARAMS, batches)
    assert total.weight == pytest.approx(float(whole.weight))
    assert total.value() == pytest.approx(float(whole.value()), rel=1e-6)
    means = [float(loss(PARAMS, data, None)[0].value()) for data in batches]
    assert abs(np.mean(means) - total.value()) > 1e-3


@pytest.mark.cpu
@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="a CPU has no separate host memory in older versions of jax")
def test_an_offloaded_optimizer_state_is_updated_by_lax_cond_on_a_gpu():
    """jnp.where would compute on the moments in host memory."""
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    tx = offloaded(TX)
    state = fresh(tx)
    moments = jax.tree.map(lambda leaf: jax.device_put(leaf, host) if leaf.ndim else leaf, state.opt_state)
    with compiling_for("gpu"):
        offloaded_program = str(jax.make_jaxpr(make_train_step(quiet, tx))(state.replace(opt_state=moments), batch()))
        program = str(jax.make_jaxpr(make_train_step(quiet, TX))(fresh(), batch()))
    assert "cond[" in offloaded_program and "cond[" not in program
