"""The loss of reward models against TRL's formula, and its independence of padding, packing and constant shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import tree
from gptjax.data import preferences
from gptjax.data.preferences import EncodedPairs
from gptjax.losses import answer_rewards, reward_model
from gptjax.model.gpt import backbone

RNG = np.random.default_rng(0)


def pair(question, *answers):
    """Two examples, with a filler as the target of the end token."""
    return tuple(
        (np.concatenate([question, answer, answer[-1:]]).astype(np.int32), np.zeros(len(question) + len(answer) + 1))
        for answer in answers
    )


PAIRS = EncodedPairs([pair(RNG.integers(0, 17, n), RNG.integers(0, 17, a), RNG.integers(0, 17, b))
                      for n, a, b in ((3, 2, 4), (2, 1, 1), (4, 3, 2))], 0)  # fmt: skip


def batch(packed=False, width=None, filler=0):
    rows = preferences.rows(PAIRS, width, packed)
    whole = next(preferences.eval_batches(rows, len(rows.tokens)))
    return whole._replace(tokens=np.where(whole.segment_ids == 0, filler, whole.tokens))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", n_classes=1)


def rewards_of(model):
    """The rewards [3, 2] of the answers alone, in float64 from the hidden state of the last token."""
    cfg, params = model
    hidden = [[backbone(params, ids[None, :-1], cfg)[0, -1] for ids, _ in pair] for pair in PAIRS.pairs]
    head = params["cls_head"]
    return np.float64(hidden) @ np.float64(head["kernel"])[:, 0] + np.float64(head["bias"])[0]


def trl(chosen, rejected, center):
    """The loss of TRL's RewardTrainer, with center_rewards_coefficient=center."""
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    chosen, rejected = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    if center:
        loss = loss + center * torch.mean((chosen + rejected) ** 2)
    return float(loss)


@pytest.mark.slow
def test_rewards_are_those_of_each_answer_alone(model):
    cfg, params = model
    np.testing.assert_allclose(answer_rewards(params, batch(), cfg)[:, 0], rewards_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_it_is_the_formula_of_trl(model, center):
    cfg, params = model
    rewards = np.asarray(answer_rewards(params, batch(), cfg))[:, 0]
    mean, metrics = reward_model(cfg, center)(params, batch(), None)
    np.testing.assert_allclose(mean.value(), trl(rewards[:, 0], rewards[:, 1], center), rtol=1e-6)
    gap = rewards[:, 0] - rewards[:, 1]
    np.testing.assert_allclose(metrics["margin"].value(), gap.mean(), rtol=1e-6)
    assert [float(x) for x in (*metrics["accuracy"], mean.weight)] == [(gap > 0).sum(), 3, 3]


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("other", [dict(width=24, packed=True, filler=3), dict(width=24, filler=5)], ids=str)
def test_neither_padding_nor_packing_changes_anything(model, other):
    cfg, params = model
    gradient = jax.jit(jax.value_and_grad(lambda p, b: reward_model(cfg, 0.1)(p, b, None)[0].total))
    expected, got = gradient(params, batch()), gradient(params, batch(**other))
    np.testing.assert_allclose(expected[0], got[0], rtol=1e-4)
    for path, leaf in tree.flatten(expected[1]).items():
        np.testing.assert_allclose(tree.flatten(got[1])[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


def test_parts_of_a_batch_add_up(model):
    cfg, params = model
    whole = batch()
    loss = jax.jit(lambda b: reward_model(cfg, 0.1)(params, b, None)[0])
    totals = [loss(jax.tree.map(lambda x, i=i: x[i : i + 1], whole)) for i in range(3)]
    np.testing.assert_allclose(sum(p.total for p in totals), loss(whole).total, rtol=1e-5)


def test_only_centring_notices_a_constant(model):
    cfg, params = model
    shifted = params | {"cls_head": {**params["cls_head"], "bias": params["cls_head"]["bias"] + 3}}

    def losses(center):
        return [float(reward_model(cfg, center)(p, batch(), None)[0].value()) for p in (params, shifted)]

    plain, centred = losses(0.0), losses(0.1)
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    sums = rewards_of(model).sum(-1)
    assert centred[1] - centred[0] == pytest.approx(0.1 * (np.square(sums + 6) - np.square(sums)).mean(), rel=1e-4)


def test_swapped_answers_have_the_opposite_margin(model):
    cfg, params = model
    swapped = EncodedPairs([pair[::-1] for pair in PAIRS.pairs], 0)
    rows = preferences.rows(swapped, None, False)
    other = next(preferences.eval_batches(rows, 3))
    margins = [reward_model(cfg)(params, b, None)[1]["margin"].value() for b in (batch(), other)]
    np.testing.assert_allclose(margins[0], -margins[1], rtol=1e-4)


@pytest.mark.slow
def test_a_step_down_raises_the_margin(model):
    cfg, params = model

    def loss(p):
        return reward_model(cfg)(p, batch(), None)

    grads = jax.grad(lambda p: loss(p)[0].total)(params)
    after = jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)
    assert loss(after)[1]["margin"].total > loss(params)[1]["margin"].total
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
