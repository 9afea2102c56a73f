"""The loss of a classifier: what it reads of a text, and what cannot change it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import tree
from gptjax.model.gpt import abstract_params, backbone
from gptjax.tasks import classify

POOLINGS = ("last", "first", "mean")


class Rows(NamedTuple):
    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def rows(T=12):
    tokens = np.random.default_rng(0).integers(0, 17, (3, T)).astype(np.int32)
    return Rows(tokens, np.array([5, 9, 1]), np.array([0, 2, 1]), np.ones(3, np.float32))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", n_classes=3)


def test_the_head_is_in_the_tree(model):
    cfg, params = model
    assert {p: a.shape for p, a in tree.flatten(params).items() if p.startswith("cls_head")} == {
        "cls_head/bias": (3,), "cls_head/kernel": (32, 3),
    }  # fmt: skip
    assert "cls_head" not in abstract_params(cfg.__class__(vocab_size=17))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_by_hand(model, pooling):
    cfg, params = model
    batch = rows()
    got = classify.class_logits(params, batch.tokens, batch.lengths, cfg, pooling)
    for i, n in enumerate(batch.lengths):
        hidden = backbone(params, batch.tokens[i : i + 1, :n], cfg)[0]
        pooled = {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling]
        want = pooled @ params["cls_head"]["kernel"] + params["cls_head"]["bias"]
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_and_rows_that_fill_up_change_nothing(model, pooling):
    """Loss and gradients; whatever stands in the padding, and however much of it there is."""
    cfg, params = model
    loss = classify.task(cfg, pooling).loss
    batch = rows()
    one = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0].total))(params)
    tokens = np.concatenate([batch.tokens, batch.tokens[:1]])
    real = np.arange(12) < np.append(batch.lengths, 3)[:, None]
    tokens = np.pad(np.where(real, tokens, 16), ((0, 0), (0, 4)), constant_values=7)
    more = Rows(tokens, np.append(batch.lengths, 3), np.append(batch.labels, 1), np.array([1, 1, 1, 0], np.float32))
    two = jax.jit(jax.value_and_grad(lambda p: loss(p, more, None)[0].total))(params)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one[1], two[1])


def test_parts_of_a_batch_add_up(model):
    cfg, params = model
    loss = jax.jit(lambda batch: classify.task(cfg).loss(params, batch, None))
    batch = rows()
    whole, metrics = loss(batch)
    parts = [loss(Rows(*(leaf[i : i + 1] for leaf in batch))) for i in range(3)]
    np.testing.assert_allclose(sum(mean.total for mean, _ in parts), whole.total, rtol=1e-5)
    assert sum(m["accuracy"].total for _, m in parts) == metrics["accuracy"].total
    assert whole.weight == metrics["accuracy"].weight == 3


def test_untrained_loss_is_near_that_of_chance(model):
    cfg, params = model
    params = params | {"cls_head": jax.tree.map(jnp.zeros_like, params["cls_head"])}
    mean, _ = classify.task(cfg).loss(params, rows(), None)
    np.testing.assert_allclose(mean.value(), np.log(3), rtol=1e-6)
