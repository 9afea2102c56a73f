"""Preference losses against their formulas, and their independence of padding, packing and prompt targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import tree
from gptjax.data import preferences
from gptjax.data.preferences import EncodedPairs
from gptjax.losses import answer_log_probs, preference
from gptjax.losses.preference import BETA, LOSSES
from gptjax.model.gpt import forward

KINDS = tuple(LOSSES)
RNG = np.random.default_rng(0)


def pair(question, chosen, rejected):
    def side(answer):
        ids = np.concatenate([question, answer]).astype(np.int32)
        return ids, np.concatenate([np.zeros(len(question)), np.ones(len(answer))]).astype(np.float32)

    return side(chosen), side(rejected)


PAIRS = EncodedPairs([pair(RNG.integers(0, 17, n), RNG.integers(0, 17, a), RNG.integers(0, 17, b))
                      for n, a, b in ((3, 2, 4), (2, 1, 1), (4, 3, 2))], 0)  # fmt: skip


def batch(packed=False, width=None, reference=None, filler=0):
    rows = preferences.rows(PAIRS, width, packed)
    whole = next(preferences.eval_batches(rows, len(rows.tokens), reference))
    return whole._replace(tokens=np.where(whole.segment_ids == 0, filler, whole.tokens))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


@pytest.fixture(scope="module")
def before():
    return (-10 + RNG.normal(size=(3, 2))).astype(np.float32)


def log_probs(model):
    cfg, params = model
    out = np.zeros((3, 2, 2))
    for i, pair in enumerate(PAIRS.pairs):
        for j, (ids, weights) in enumerate(pair):
            logp = jax.nn.log_softmax(forward(params, ids[None, :-1], cfg)[0])
            each = np.asarray(logp)[np.arange(len(ids) - 1), ids[1:]] * weights[1:]
            out[i, j] = each.sum(), weights.sum()
    return out[..., 0], out[..., 1]


@pytest.mark.slow
def test_log_probs_are_those_of_each_answer_alone(model):
    cfg, params = model
    want = log_probs(model)
    got = answer_log_probs(params, batch(), cfg)
    np.testing.assert_allclose(got[0][:, 0], want[0], rtol=1e-4)
    np.testing.assert_array_equal(got[1][:, 0], want[1])


def by_formula(kind, now, before, length, beta, margin=1.0):
    """The losses in float64, by the formulas of the papers."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    if kind == "dpo":
        return -np.log(sigmoid(beta * np.log(np.exp(now - before)[:, 0] / np.exp(now - before)[:, 1])))
    if kind == "ipo":
        h = ((now - before) / length) @ [1, -1]
        return (h - 1 / (2 * beta)) ** 2
    if kind == "orpo":
        p = np.exp(now / length)
        ratio = (p / (1 - p))[:, 0] / (p / (1 - p))[:, 1]
        return -np.log(p[:, 0]) - beta * np.log(sigmoid(np.log(ratio)))
    if kind == "kto":
        ratio = now - before
        z_chosen, z_rejected = np.maximum(ratio.mean(0), 0)
        return 2 - sigmoid(beta * (ratio[:, 0] - z_rejected)) - sigmoid(beta * (z_chosen - ratio[:, 1]))
    return -np.log(sigmoid(beta * (now / length) @ [1, -1] - margin))


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_their_formulas(model, before, kind):
    cfg, params = model
    now, length = log_probs(model)
    want = by_formula(kind, now, before, length, BETA[kind])
    mean, metrics = preference(cfg, kind)(params, batch(reference=before), None)
    np.testing.assert_allclose(mean.total, want.sum(), rtol=1e-4)
    assert mean.weight == metrics["accuracy"].weight == 3


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [dict(width=24, filler=5), dict(width=24, packed=True, filler=3)], ids=str)
def test_neither_padding_nor_packing_changes_anything(model, before, kind, other):
    cfg, params = model
    gradient = jax.jit(jax.value_and_grad(lambda p, b: preference(cfg, kind)(p, b, None)[0].total))
    expected, got = gradient(params, batch(reference=before)), gradient(params, batch(reference=before, **other))
    np.testing.assert_allclose(expected[0], got[0], rtol=1e-4)
    for path, leaf in tree.flatten(expected[1]).items():
        np.testing.assert_allclose(tree.flatten(got[1])[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kto"])
def test_parts_of_a_batch_add_up(model, before, kind):
    cfg, params = model
    whole = batch(reference=before)
    loss = jax.jit(lambda b: preference(cfg, kind)(params, b, None)[0])
    totals = [loss(jax.tree.map(lambda x, i=i: x[i : i + 1], whole)) for i in range(3)]
    np.testing.assert_allclose(sum(p.total for p in totals), loss(whole).total, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_not_learned(model, before, kind):
    """Changing the targets inside the prompt does not change the loss."""
    cfg, params = model
    original = batch(reference=before)
    other = original._replace(targets=np.where(original.weights > 0, original.targets, 9))

    def loss(b):
        return preference(cfg, kind)(params, b, None)[0].total

    np.testing.assert_array_equal(loss(original), loss(other))


def test_dpo_begins_at_ln_2_with_no_margin(model):
    cfg, params = model
    start = np.asarray(answer_log_probs(params, batch(), cfg)[0])[:, 0]
    mean, metrics = preference(cfg, "dpo")(params, batch(reference=start), None)
    np.testing.assert_allclose(mean.value(), np.log(2), atol=1e-6)
    assert metrics["margin"].value() == metrics["accuracy"].value() == 0


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_makes_the_chosen_answers_likelier_than_the_others(model, before, kind):
    cfg, params = model
    examples = batch(reference=before)

    def loss(p):
        return preference(cfg, kind, beta=0.5)(p, examples, None)

    grads = jax.grad(lambda p: loss(p)[0].total)(params)
    after = jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)
    assert loss(after)[0].total < loss(params)[0].total
    if kind != "kto":  # KTO may lower both log-probabilities
        assert loss(after)[1]["margin"].total > loss(params)[1]["margin"].total
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
