"""Tests of the position encodings."""

import numpy as np

from gptjax.ops.position import (
    alibi_slopes,
    previous,
    rope,
    rope_frequencies,
    rope_table,
    segment_positions,
    sinusoidal,
)

POSITIONS = np.array([[0, 1, 2, 40], [7, 3, 0, 1000]])


def test_sinusoidal():
    d = 6
    angle = POSITIONS[..., None] / 10_000.0 ** (np.arange(0, d, 2) / d)
    out = np.asarray(sinusoidal(POSITIONS, d))
    np.testing.assert_allclose(out[..., 0::2], np.sin(angle), atol=1e-4)
    np.testing.assert_allclose(out[..., 1::2], np.cos(angle), atol=1e-4)
    assert sinusoidal(POSITIONS, 5).shape == (2, 4, 5)


def test_rope_is_a_rotation_of_complex_numbers():
    H, base = 8, 500.0
    x = np.random.default_rng(0).normal(size=(2, 4, 3, H)).astype(np.float32)
    z = x[..., : H // 2] + 1j * x[..., H // 2 :]
    angle = POSITIONS[..., None, None] * base ** (-np.arange(H // 2) / (H // 2))
    rotated = z * np.exp(1j * angle)
    out = rope(x, rope_table(POSITIONS, rope_frequencies(H, base)))
    np.testing.assert_allclose(out, np.concatenate([rotated.real, rotated.imag], -1), atol=2e-4)


def test_rope_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(q_position, k_position):
        rotated = (
            rope(x, rope_table(np.array([p]), rope_frequencies(8))) for x, p in ((q, q_position), (k, k_position))
        )
        return float(np.vdot(*map(np.asarray, rotated)))

    np.testing.assert_allclose([score(5, 2), score(103, 100)], score(3, 0), rtol=1e-4)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    twelve = [2.0**-n for n in range(1, 9)] + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)]
    np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)


def test_previous():
    x = np.arange(1.0, 6.0)[None, :, None]
    assert previous(x)[0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert previous(x, np.array([[9.0]]))[0, :, 0].tolist() == [9, 1, 2, 3, 4]
    assert previous(x, None, np.array([[3, 3, 4, 4, 1]]))[0, :, 0].tolist() == [0, 1, 0, 3, 0]


def test_scaled_frequencies():
    plain = np.asarray(rope_frequencies(16, 100.0))
    np.testing.assert_allclose(rope_frequencies(16, 100.0, "linear", 4.0), plain / 4)
    scaled = np.asarray(rope_frequencies(16, 100.0, "llama3", 8.0, 1.0, 4.0, 64))
    rotations = 64 * plain / (2 * np.pi)
    assert (rotations > 4).any() and (rotations < 1).any() and ((rotations > 1) & (rotations < 4)).any()
    np.testing.assert_allclose(scaled[rotations > 4], plain[rotations > 4])
    np.testing.assert_allclose(scaled[rotations < 1], plain[rotations < 1] / 8)
    between = (rotations > 1) & (rotations < 4)
    keep = (rotations[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (keep + (1 - keep) / 8), rtol=1e-6)


def test_positions_start_at_0_in_every_document():
    ids = np.array([[1, 1, 1, 2, 2, 0], [5, 6, 6, 6, 6, 6]])
    assert segment_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
