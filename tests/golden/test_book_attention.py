"""Chapter 3 of the book: self-attention without weights, causal mask and heads; layer norm of chapter 4."""

import numpy as np
import pytest

from gptjax.from_scratch import causal_mask, simple_attention
from gptjax.ops.attention import attention
from gptjax.ops.norm import layer_norm

# The book's embedding vectors for "Your journey starts with one step", one per word.
X = np.array(
    [
        [0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55],
    ],
    np.float32,
)  # fmt: skip


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_second_row_of_simple_attention():
    scores = X @ X.T
    np.testing.assert_allclose(scores[1], [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865], atol=5e-5)
    np.testing.assert_allclose(softmax(scores)[1], [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581], atol=5e-5)
    np.testing.assert_allclose(simple_attention(X)[1], [0.4419, 0.6515, 0.5683], atol=5e-5)


def test_simple_attention_as_a_whole():
    np.testing.assert_allclose(simple_attention(X), softmax(X @ X.T) @ X, atol=1e-6)


def test_causal_mask():
    assert causal_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, 4, 1).tolist() == [[True, True, False, False], [True, True, True, False]]


def test_masking_before_the_softmax_equals_masking_after_it_and_dividing_again():
    weights = np.tril(softmax(X @ X.T / 3**0.5))
    weights /= weights.sum(-1, keepdims=True)
    x = X[None, :, None]
    np.testing.assert_allclose(attention(x, x, x)[0, :, 0], weights @ X, atol=1e-6)


def test_product_of_heads():
    a = np.array([[0.2745, 0.6584, 0.2775, 0.8573], [0.8993, 0.0390, 0.9268, 0.7388], [0.7179, 0.7058, 0.9156, 0.4340]])
    np.testing.assert_allclose((a @ a.T)[0], [1.3208, 1.1631, 1.2879], atol=1.5e-4)


def test_variance_after_layer_norm():
    """The variance is v / (v + 1e-5), slightly below one because of eps; v is the biased variance (divided by D)."""
    out = np.array([[0.2260, 0.3470, 0, 0.2216, 0, 0], [0.2133, 0.2394, 0, 0.5198, 0.3297, 0]], np.float32)
    normed = np.asarray(layer_norm(out))
    assert normed.mean(-1) == pytest.approx([0, 0], abs=1e-6)
    assert normed.var(-1) == pytest.approx([0.9995, 0.9997], abs=5e-5)
