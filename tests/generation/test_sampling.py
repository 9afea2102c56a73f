"""Filters and samplers against distributions computed with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import SampleConfig
from gptjax.generation import chain, from_config, greedy, min_p, repetition_penalty, temperature, top_k, top_p

LOGITS = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32)
SEEN = np.array([True, False, True, True, False, False, False, False, False])
DRAWS = 20_000


def reference(t=1.0, k=9, p=1.0, least=0.0, penalty=1.0):
    """The expected distribution after repetition penalty, temperature, top-k, top-p and min-p (`least`), in this
    order."""
    lowered = np.where(LOGITS > 0, LOGITS / penalty, LOGITS * penalty)
    scaled = np.where(SEEN, lowered, LOGITS).astype(np.float64) / t
    order = np.argsort(-scaled)
    probs = np.exp(scaled)
    probs[order[k:]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= p]] = 0
    probs[probs < least * probs.max()] = 0
    return probs / probs.sum()


CASES = {
    "plain": ((), {}),
    "hot": ((temperature(5.0),), {"t": 5.0}),
    "cold": ((temperature(0.5),), {"t": 0.5}),
    "top k": ((top_k(3),), {"k": 3}),
    "top p": ((temperature(3.0), top_p(0.8)), {"t": 3.0, "p": 0.8}),
    "min p": ((temperature(3.0), min_p(0.2)), {"t": 3.0, "least": 0.2}),
    "penalty": ((repetition_penalty(1.5), temperature(2.0)), {"t": 2.0, "penalty": 1.5}),
    "all five": (
        (repetition_penalty(1.3), temperature(4.0), top_k(7), top_p(0.9), min_p(0.1)),
        {"t": 4.0, "k": 7, "p": 0.9, "least": 0.1, "penalty": 1.3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case):
    """Chi-square test of 20,000 draws: with 8 degrees of freedom, 32 is exceeded once in 10,000 trials."""
    filters, meant = CASES[case]
    draw = jax.jit(chain(*filters))
    many, seen = (jnp.broadcast_to(a, (DRAWS, 9)) for a in (LOGITS, SEEN))
    tokens = np.asarray(draw(many, jax.random.key(0), *([seen] if chain(*filters).history else [])))
    counts, expected = np.bincount(tokens, minlength=9), DRAWS * reference(**meant)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 32


def kept(keep, logits):
    return np.isfinite(np.asarray(keep(jnp.asarray(logits, jnp.float32)))).tolist()


def test_top_k():
    assert kept(top_k(2), [[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]) == [[False, True, True], [True, False, True]]
    assert kept(top_k(2), [[1.0, 2.0, 2.0, 2.0]]) == [[False, True, True, True]]  # tokens tied with the k-th are kept
    assert kept(top_k(100), [[1.0, 2.0]]) == [[True, True]]


def test_top_p_keeps_the_token_that_crosses_p_and_always_one():
    logits = np.log([[0.5, 0.3, 0.2]])
    for p, expected in {
        0.01: [1, 0, 0],
        0.49: [1, 0, 0],
        0.51: [1, 1, 0],
        0.79: [1, 1, 0],
        0.81: [1, 1, 1],
        1.0: [1, 1, 1],
    }.items():
        assert kept(top_p(p), logits) == [[bool(x) for x in expected]], p


def test_greedy_takes_the_first_of_equals():
    assert greedy(jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]]), None).tolist() == [1, 0]


def test_the_same_settings_are_the_same_function():
    """Equal arguments give the same object, so that a compiled decoding loop is reused."""
    assert chain(temperature(0.8), top_k(50)) is chain(temperature(0.8), top_k(50))
    assert from_config(SampleConfig(top_p=0.9)) is from_config(SampleConfig(top_p=0.9, seed=3))


def test_from_config():
    assert from_config(SampleConfig(temperature=0)) is greedy
    assert from_config(SampleConfig(temperature=0.8)) is chain(temperature(0.8))
    full = SampleConfig(temperature=0.7, top_k=5, top_p=0.9)
    assert from_config(full) is chain(temperature(0.7), top_k(5), top_p(0.9))
