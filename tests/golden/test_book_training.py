"""Appendix D of the book: warmup, cosine decay, gradient clipping."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import OptimConfig
from gptjax.optim import make_schedule

PEAK, INITIAL, MIN, STEPS, WARMUP = 1e-3, 1e-5, 1e-5, 135, 27


def books_rate(step):
    """The learning rate of the book's code; step 0 is the first update."""
    if step < WARMUP:
        return INITIAL + step * (PEAK - INITIAL) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return MIN + (PEAK - MIN) * 0.5 * (1 + math.cos(math.pi * progress))


def test_135_steps():
    cfg = OptimConfig(lr=PEAK, warmup_steps=WARMUP, initial_lr_ratio=INITIAL / PEAK, min_lr_ratio=MIN / PEAK)
    ours = PEAK * make_schedule(cfg, STEPS)(jnp.arange(STEPS))
    assert int(0.2 * STEPS) == WARMUP
    np.testing.assert_allclose(ours, [books_rate(step) for step in range(STEPS)], rtol=1e-5, atol=1e-9)
    assert [float(ours[i]) for i in (0, 1, 26, 27)] == pytest.approx([1e-5, 4.66667e-5, 9.63333e-4, 1e-3], rel=1e-5)
    assert int(ours.argmax()) == 27


def test_a_gradient_of_norm_5_is_divided_by_5():
    gradient = {"w": jnp.array([[1.0, 2.0], [2.0, 4.0]])}
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(gradient, clip.init(gradient))
    np.testing.assert_allclose(clipped["w"], gradient["w"] / 5, rtol=1e-6)
