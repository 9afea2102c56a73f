"""Cross-entropy values from the book (chapters 5 and 7)."""

import math

import jax.numpy as jnp
import pytest

from gptjax.ops.loss import cross_entropy


def loss(logits, targets, weights=None):
    weights = None if weights is None else jnp.array(weights, jnp.float32)
    return float(cross_entropy(jnp.array(logits), jnp.array(targets), weights).value())


def test_two_rows_three_rows_and_a_row_that_does_not_count():
    logits = [[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]]
    assert loss(logits[:2], [0, 1]) == pytest.approx(1.1269, abs=5e-5)
    assert loss(logits, [0, 1, 1]) == pytest.approx(0.7936, abs=5e-5)
    assert loss(logits, [0, 1, 1], [1, 1, 0]) == pytest.approx(1.1269, abs=5e-5)


def test_log_probabilities_that_are_gathered():
    assert loss([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]], [0, 2]) == pytest.approx(1.4185, abs=5e-5)


def test_toy_loss_and_perplexity():
    """Six target probabilities of an untrained model, each written as a two-class distribution."""
    p = jnp.array([7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06])
    value = loss(jnp.log(jnp.stack([p, 1 - p], -1)), [0] * 6)
    assert value == pytest.approx(10.7940, abs=5e-5)
    assert math.exp(value) == pytest.approx(48725.8, rel=5e-5)
