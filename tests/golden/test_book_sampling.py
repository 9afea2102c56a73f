"""Top-k and temperature on the nine logits of chapter 5.3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation.sampling import temperature, top_k

WORDS = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
LOGITS = jnp.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])


def test_top_3():
    p = jax.nn.softmax(top_k(3)(LOGITS))[0]
    np.testing.assert_allclose(p, [0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], atol=5e-5)


def test_pizza_at_temperature_5():
    p = jax.nn.softmax(temperature(5.0)(LOGITS))[0]
    assert float(p[WORDS.index("pizza")]) == pytest.approx(0.0430, abs=5e-5)


@pytest.mark.parametrize(
    ("t", "counts"),
    [(1.0, [73, 0, 0, 582, 2, 0, 0, 343, 0]), (5.0, [165, 75, 42, 239, 71, 46, 32, 227, 103])],
)
def test_the_books_thousand_draws_fit(t, counts):
    """The book's counts in 1,000 draws lie within four standard deviations of the expected counts."""
    p = np.asarray(jax.nn.softmax(temperature(t)(LOGITS))[0], np.float64)
    assert (np.abs(np.array(counts) - 1000 * p) <= 4 * np.sqrt(1000 * p * (1 - p)) + 1).all()
