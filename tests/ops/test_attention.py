"""Tests of attention against a naive implementation, and of the functions for teaching it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.from_scratch import multi_head_attention
from gptjax.ops.attention import attention, attention_weights, weighted_values
from gptjax.ops.position import alibi_slopes


def naive(q, k, v, *, offset=0, segment_ids=None, window=0, scale=None, alibi=False):
    """Naive attention: keys and values repeated per group, all T x S scores, -inf where a query must not attend."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    distance = np.arange(T)[:, None] + np.broadcast_to(offset, B)[:, None, None] - np.arange(S)
    mask = (distance >= 0) & (distance < (window or S + T))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (scale or 1 / np.sqrt(H))
    if alibi:
        scores = scores - alibi_slopes(N)[:, None, None] * distance[:, None].astype(np.float32)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1), v)


def qkv(T, S, N=4, K=2, H=6, B=2, dtype=np.float32):
    rng = np.random.default_rng(T + S)
    return tuple(rng.normal(size=(B, n, heads, H)).astype(dtype) for n, heads in ((T, N), (S, K), (S, K)))


SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (2, 256)), axis=1)
CASES = {
    "documents, alibi": (9, 9, {"segment_ids": SEGMENTS[:, :9], "alibi": True}),
    "two blocks of queries": (128, 128, {"segment_ids": SEGMENTS[:, :128]}),
    "two long blocks of queries": (256, 256, {"alibi": True}),
    "with a KV cache": (2, 8, {"offset": np.array([4, 2]), "alibi": True}),
    "sliding window, another scale": (9, 9, {"window": 3, "scale": 0.7}),
    "sliding window, two blocks": (128, 128, {"window": 70}),
}


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_naive_attention(case):
    T, S, options = CASES[case]
    args = qkv(T, S)

    def run(fn, args):
        def total(args):
            out = fn(*args, **options)
            return jnp.sin(out).sum(), out  # sin: every element has a different cotangent

        return jax.value_and_grad(total, has_aux=True)(args)

    ours, expected = jax.jit(lambda args: (run(attention, args), run(naive, args)))(args)
    np.testing.assert_allclose(ours[0][1], expected[0][1], rtol=1e-5, atol=5e-6)
    for a, b in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_fully_masked_row_is_finite():
    out = attention(*qkv(4, 4), offset=-9)
    assert np.isfinite(out).all()


def test_bfloat16_keeps_its_dtype_and_has_float32_scores():
    args = [jnp.asarray(a, jnp.bfloat16) for a in qkv(7, 7)]
    out = attention(*args)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), naive(*(a.astype(jnp.float32) for a in args)), atol=0.03)


def test_dropout():
    """The same key drops the same weights; the mean over 2,000 equal rows is the result without dropout."""
    q, k, v = (np.repeat(a, 2000, 0) for a in qkv(3, 3, B=1))
    run = jax.jit(lambda key: attention(q, k, v, dropout=0.4, dropout_key=key))
    plain = np.asarray(attention(q, k, v))
    np.testing.assert_array_equal(plain, attention(q, k, v, dropout=0.4))
    dropped = np.asarray(run(jax.random.key(0)))
    np.testing.assert_array_equal(dropped, run(jax.random.key(0)))
    assert np.abs(dropped - plain).max() > 0.1
    np.testing.assert_allclose(dropped.mean(0), plain[0], atol=5 * (dropped.std(0) / 2000**0.5).max())


def test_the_gradient_with_dropout_uses_the_same_dropped_weights():
    """Compares with central differences along one direction, with the same key and thus the same dropped weights."""
    args, direction = qkv(130, 130), qkv(130, 130)[::-1]
    direction = tuple(np.resize(d, a.shape) for a, d in zip(args, direction, strict=True))

    @jax.jit
    def total(args):
        return jnp.sin(attention(*args, dropout=0.3, dropout_key=jax.random.key(1))).sum()

    gradient = jax.jit(jax.grad(total))(args)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    ahead, behind = (tuple(a + h * d for a, d in zip(args, direction, strict=True)) for h in (5e-3, -5e-3))
    np.testing.assert_allclose((total(ahead) - total(behind)) / 1e-2, slope, rtol=0.01)


def test_multi_head_attention_concatenates_its_heads():
    rng = np.random.default_rng(0)
    x, (w_q, w_k, w_v, w_o) = (
        rng.normal(size=(1, 5, 8)).astype(np.float32),
        rng.normal(size=(4, 8, 8)).astype(np.float32),
    )
    mask = np.tril(np.ones((5, 5)))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (x[0] @ w[:, head] for w in (w_q, w_k, w_v))
        weights = np.exp(q @ k.T / 2) * mask
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    expected = np.concatenate(heads, -1) @ w_o
    np.testing.assert_allclose(multi_head_attention(x, w_q, w_k, w_v, w_o, 2)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_window_may_be_traced():
    """As in a scan over layers with different windows; 0: no window."""
    args = qkv(9, 9)
    run = jax.jit(lambda window: attention(*args, window=window))
    for window in (0, 1, 4):
        np.testing.assert_allclose(run(window), naive(*args, window=window), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("options", [{}, dict(window=3), dict(alibi=True), dict(scale=0.2, offset=np.array([2, 1]))])
def test_attention_weights_are_those_of_attention(options):
    q, k, v = qkv(5, 7)
    k_heads, v_heads = (np.moveaxis(a, 2, 1) for a in (k, v))

    @jax.jit
    def run(q, k, v):
        weights = attention_weights(q, k, **options)
        return weights, weighted_values(weights, v)

    weights, out = run(q, k_heads, v_heads)
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 4, 5)), rtol=1e-5)
    np.testing.assert_allclose(out, naive(q, k, v, **options), rtol=1e-5, atol=5e-6)


def test_attention_weights_with_documents_and_dropout():
    q, k, _ = qkv(5, 5)
    ids = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
    weights = np.asarray(jax.jit(lambda q, k: attention_weights(q, k, segment_ids=ids))(q, np.moveaxis(k, 2, 1)))
    assert not (weights * (ids[:, None, :, None] != ids[:, None, None])).any()
    ones = np.ones((1, 2, 3, 4), np.float32), np.ones((1, 1, 4, 8), np.float32)
    out = np.asarray(jax.jit(lambda w, v: weighted_values(w, v, dropout=0.5, dropout_key=jax.random.key(0)))(*ones))
    assert set(out.flat) <= {0.0, 2.0, 4.0, 6.0, 8.0} and 1 < out.mean() < 7
