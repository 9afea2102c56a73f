"""The classification loss: which positions it pools, and its independence of padding and packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import tree
from gptjax.data.classification import LabelledBatch
from gptjax.losses import class_logits, classify
from gptjax.model.gpt import abstract_params, backbone

POOLINGS = ("last", "first", "mean")


LENGTHS = (5, 9, 1)


def batch(T=12, filler=0):
    """Three texts, one per row."""
    tokens = np.random.default_rng(0).integers(0, 17, (3, 12)).astype(np.int32)
    real = np.arange(12) < np.array(LENGTHS)[:, None]
    tokens = np.pad(np.where(real, tokens, filler), ((0, 0), (0, T - 12)), constant_values=filler)
    segment_ids = np.pad(real.astype(np.int32), ((0, 0), (0, T - 12)))
    return LabelledBatch(tokens, segment_ids, np.array([[0], [2], [1]]), np.ones((3, 1), np.float32))


def packed():
    """The same texts packed into two rows, the second before the first, with one empty label slot."""
    tokens_of = batch().tokens
    tokens, segment_ids = np.full((2, 15), 3, np.int32), np.zeros((2, 15), np.int32)
    for row, start, i, k in ((0, 0, 1, 1), (0, 9, 0, 2), (1, 4, 2, 1)):
        tokens[row, start : start + LENGTHS[i]] = tokens_of[i, : LENGTHS[i]]
        segment_ids[row, start : start + LENGTHS[i]] = k
    return LabelledBatch(tokens, segment_ids, np.array([[2, 0], [1, 0]]), np.array([[1, 1], [1, 0]], np.float32))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", n_classes=3)


def test_the_head_is_in_the_tree(model):
    cfg, params = model
    assert {p: a.shape for p, a in tree.flatten(params).items() if p.startswith("cls_head")} == {
        "cls_head/bias": (3,), "cls_head/kernel": (32, 3),
    }  # fmt: skip
    assert "cls_head" not in abstract_params(cfg.__class__(vocab_size=17))


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_by_hand(model, pooling):
    cfg, params = model
    separate, row = batch(), packed()
    got = class_logits(params, separate.tokens, separate.segment_ids, cfg, pooling)[:, 0]
    for i, n in enumerate(LENGTHS):
        hidden = backbone(params, separate.tokens[i : i + 1, :n], cfg)[0]
        pooled = {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling]
        want = pooled @ params["cls_head"]["kernel"] + params["cls_head"]["bias"]
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-4)
    packed_logits = class_logits(params, row.tokens, row.segment_ids, cfg, pooling, n=2)
    np.testing.assert_allclose(packed_logits[[0, 0, 1], [1, 0, 0]], got, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("other", [batch(16, filler=7), packed()], ids=["padding", "packing"])
def test_neither_padding_nor_packing_changes_anything(model, pooling, other):
    """Loss and gradients do not depend on the padding tokens or on the amount of padding."""
    cfg, params = model
    loss = classify(cfg, pooling)
    expected, got = (
        jax.jit(jax.value_and_grad(lambda p, batch=batch: loss(p, batch, None)[0].total))(params)
        for batch in (batch(), other)
    )
    np.testing.assert_allclose(expected[0], got[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), expected[1], got[1])


def test_parts_of_a_batch_add_up(model):
    cfg, params = model
    loss = jax.jit(lambda batch: classify(cfg)(params, batch, None))
    whole, metrics = loss(batch())
    micro_batches = [loss(LabelledBatch(*(leaf[i : i + 1] for leaf in batch()))) for i in range(3)]
    np.testing.assert_allclose(sum(mean.total for mean, _ in micro_batches), whole.total, rtol=1e-5)
    assert sum(m["accuracy"].total for _, m in micro_batches) == metrics["accuracy"].total
    assert whole.weight == metrics["accuracy"].weight == 3


def test_untrained_loss_is_near_that_of_chance(model):
    cfg, params = model
    params = params | {"cls_head": jax.tree.map(jnp.zeros_like, params["cls_head"])}
    mean, _ = classify(cfg)(params, packed(), None)
    np.testing.assert_allclose(mean.value(), np.log(3), rtol=1e-6)
