"""Next-token prediction: the loss is the cross-entropy of the model's logits and the targets."""

import jax
import numpy as np
import optax
import pytest

from gptjax.losses import next_token
from gptjax.model.gpt import forward
from gptjax.ops.loss import cross_entropy
from gptjax.training.step import TrainState, make_multi_step, make_train_step
from gptjax.types import Batch


def batch(seed=0, B=4, T=8):
    rng = np.random.default_rng(seed)
    return Batch(
        tokens=rng.integers(0, 17, (B, T)).astype(np.int32),
        targets=rng.integers(0, 17, (B, T)).astype(np.int32),
        weights=(rng.random((B, T)) * (np.arange(B) + 1)[:, None]).astype(np.float32),
        segment_ids=np.repeat([[0, 0, 0, 1, 1, 1, 1, 1]], B, 0).astype(np.int32),
        positions=np.repeat([[0, 1, 2, 0, 1, 2, 3, 4]], B, 0).astype(np.int32),
    )


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_loss_is_the_cross_entropy_of_the_logits(tiny, arch):
    """arch=modern has a logit softcap and an untied head."""
    cfg, params = tiny(arch)
    data = batch()

    @jax.jit
    def both(params):
        logits = forward(params, data.tokens, cfg, segment_ids=data.segment_ids, positions=data.positions)
        return next_token(cfg)(params, data, None)[0], cross_entropy(logits, data.targets, data.weights)

    ours, expected = both(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert float(ours.weight) == pytest.approx(float(data.weights.sum()), rel=1e-6)


def test_plain_batches_need_tokens_and_targets_only(tiny):
    cfg, params = tiny("gpt2")
    data = batch()
    mean, _ = next_token(cfg)(params, Batch(data.tokens, data.targets), None)
    assert float(mean.weight) == data.tokens.size and np.isfinite(mean.total)


def test_a_key_drops_out_and_none_does_not(tiny):
    cfg, params = tiny("gpt2", dropout=0.5)
    loss = jax.jit(lambda key: next_token(cfg)(params, batch(), key)[0].total)
    dropped = float(loss(jax.random.key(0)))
    assert dropped == float(loss(jax.random.key(0))) != float(loss(jax.random.key(1)))
    still = next_token(tiny("gpt2")[0])(params, batch(), None)[0].total
    assert float(loss(None)) == pytest.approx(float(still), rel=1e-5)


def steps_of(tiny, tx, **how):
    cfg, params = tiny("gpt2", n_layer=1)
    step = make_train_step(next_token(cfg), tx, **how)
    return step, TrainState.create(params, tx=tx, key=jax.random.key(0))


def test_accumulation_equals_the_whole_batch(tiny):
    """With unequal target weights, four micro-batches give the same loss and gradient as one batch."""

    def run(n):
        step, state = steps_of(tiny, optax.sgd(1.0), accumulation=n)
        state, metrics = jax.jit(step)(state, batch())
        return {"params": state.params, "metrics": metrics}

    for a, b in zip(jax.tree.leaves(run(4)), jax.tree.leaves(run(1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_it_learns_and_does_so_again_bit_for_bit(tiny):
    """Sixty steps on one batch, in one call; a second run ends with bitwise equal parameters."""
    step, state = steps_of(tiny, optax.adam(1e-2))
    many = jax.jit(make_multi_step(step))
    batches = jax.tree.map(lambda x: np.repeat(x[None], 60, 0), batch())
    (end, metrics), (repeated, _) = many(state, batches), many(state, batches)
    assert metrics["loss"][-1] < 0.3 * metrics["loss"][0]
    for a, b in zip(jax.tree.leaves(end.params), jax.tree.leaves(repeated.params), strict=True):
        np.testing.assert_array_equal(a, b)
