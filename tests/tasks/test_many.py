"""Many adapters trained in one vmapped program equal adapters trained one by one."""

import jax
import numpy as np
import pytest

import gptjax
from gptjax import lora, tree
from gptjax.losses import next_token
from gptjax.optim import make_optimizer
from gptjax.tasks.many import Many, create, make_many_step
from gptjax.types import Batch

LORA = gptjax.LoraConfig(rank=4, dropout=0.1)
MANY = dict(rates=[1.0, 3.0, 0.3, 1.0], scales=[2.0, 0.5, 2.0, 1.0], ranks=[4, 2, 1, 4], seeds=[0, 1, 2, 0])
STEPS, N = 4, 4
EPS = 1e-4  # with the default eps, Adam would turn gradients that are rounding errors into full-size updates


def batch(step, seed=0):
    tokens = np.random.default_rng([step, seed]).integers(0, 17, (2, 9)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches",
    [pytest.param(False, id="shared batch", marks=pytest.mark.slow), pytest.param(True, id="batch per adapter")],
)
def test_one_program_equals_a_loop(model, batches):
    """Compared with single adapters, each with its learning rate in the optimizer, its scale in the config, and its
    rank."""
    cfg, params = model
    tx, loss = make_optimizer(gptjax.OptimConfig(lr=1e-2, eps=EPS), STEPS), next_token(cfg)
    many = Many.of(**MANY)
    states = create(params, many, LORA, tx)
    step = jax.jit(make_many_step(loss, tx, LORA, batches=batches))
    for i in range(STEPS):
        data = jax.tree.map(lambda *x: np.stack(x), *(batch(i, n) for n in range(N))) if batches else batch(i)
        states, metrics = step(states, many, params, data)
    for n in range(N):
        start, key = jax.random.split(jax.random.key(MANY["seeds"][n]))
        settings = gptjax.LoraConfig(rank=4, dropout=0.1, alpha=MANY["scales"][n], scaling="alpha")
        tx_n = make_optimizer(gptjax.OptimConfig(lr=1e-2 * MANY["rates"][n], eps=EPS), STEPS)
        adapter = lora.truncate_rank(lora.init(start, params, settings), MANY["ranks"][n])
        single_step = jax.jit(
            gptjax.make_train_step(
                lora.with_dropout(loss), tx_n, combine=lambda a, base, settings=settings: lora.attach(base, a, settings)
            )
        )
        state = gptjax.TrainState.create(adapter, frozen=params, tx=tx_n, key=key)
        for i in range(STEPS):
            state, single_metrics = single_step(state, batch(i, n if batches else 0))
        np.testing.assert_allclose(metrics["loss"][n], single_metrics["loss"], rtol=1e-5)
        for path, leaf in tree.flatten(state.params).items():
            np.testing.assert_allclose(tree.flatten(states.params)[path][n], leaf, atol=1e-5, err_msg=path)
    a = states.params["blocks"]["attn"]["q"]["kernel"]["a"]
    assert not a[1, ..., 2:].any() and a[1, ..., :2].any()


@pytest.mark.slow
def test_the_base_is_not_copied_per_adapter(model):
    cfg, params = model
    tx = make_optimizer(gptjax.OptimConfig(), STEPS)
    states = create(params, Many.of(**MANY), LORA, tx)
    assert states.frozen is None
    step = make_many_step(next_token(cfg), tx, LORA)
    program = jax.jit(step).lower(states, Many.of(**MANY), params, batch(0)).as_text()
    shape = "x".join(map(str, params["wte"]["embedding"].shape))
    assert f"tensor<{shape}xf32>" in program and f"tensor<{N}x{shape}xf32>" not in program


def test_mistakes(model):
    with pytest.raises(gptjax.UserError, match="as many rates as scales"):
        Many.of(**(MANY | {"seeds": [0]}))
    with pytest.raises(gptjax.UserError, match="larger than lora.rank"):
        create(model[1], Many.of(**(MANY | {"ranks": [1, 2, 9, 1]})), LORA, make_optimizer(gptjax.OptimConfig(), 2))
