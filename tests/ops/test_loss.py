"""Tests of the cross-entropy, computed from all logits and in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import loss
from gptjax.ops.device import compiling_for
from gptjax.ops.loss import (
    cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
    linear_log_probs_and_entropies,
    softcap,
)

RNG = np.random.default_rng(0)
N, D, V = 12, 8, 11
HIDDEN = RNG.normal(size=(3, 4, D)).astype(np.float32)
HEAD = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (3, 4))
WEIGHTS = np.array([1, 0, 0.5, 2] * 3, np.float32).reshape(3, 4)


def total(hidden, head, weights, cap=0.0, **options):
    """The loss from all logits at once, or in chunks if `dtype` or `chunk` is given."""
    if options:
        mean = linear_cross_entropy(hidden, head, TARGETS, weights, cap=cap, **options)
    else:
        mean = cross_entropy(softcap(hidden @ head, cap), TARGETS, weights)
    return 3 * mean.total, mean


@functools.cache
def compiled(cap, options):
    fn = jax.value_and_grad(lambda h, w, weights: total(h, w, weights, cap, **dict(options)), (0, 1), has_aux=True)
    return jax.jit(fn)


def evaluate(weights, cap, **options):
    weights = np.ones_like(WEIGHTS) if weights is None else weights
    (_, mean), grads = compiled(cap, tuple(options.items()))(HIDDEN, HEAD, weights)
    return mean, grads


def test_cross_entropy():
    logits = (HIDDEN @ HEAD).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, TARGETS[..., None], -1)[..., 0])
    mean = cross_entropy(jnp.array(logits, jnp.float32), TARGETS, WEIGHTS)
    np.testing.assert_allclose(mean, ((nll * WEIGHTS).sum(), WEIGHTS.sum()), rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(jnp.array(logits, jnp.float32), TARGETS), (nll.sum(), N), rtol=1e-5)


def test_large_logits_stay_finite():
    assert cross_entropy(jnp.array([1e4, 0.0, -1e4]), jnp.array(2)).total == 2e4
    big = linear_cross_entropy(jnp.full((1, 1), 1e4), jnp.array([[1.0, 0.0, -1.0]]), jnp.array([2]))
    assert big.total == 2e4


def test_softcap():
    x = jnp.array([-1e3, -0.1, 0.0, 0.1, 1e3])
    assert softcap(x, 0) is x
    np.testing.assert_allclose(softcap(x, 15.0), 15 * np.tanh(np.asarray(x) / 15), rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "cap", "chunk"),
    [(None, 0.0, None), (WEIGHTS, 0.0, None), (WEIGHTS, 0.0, 5), (WEIGHTS, 2.0, 4), (None, 2.0, 4), (None, 2.0, 1)],
)
def test_the_chunked_loss_equals_the_loss_from_all_logits(weights, cap, chunk):
    mean, grads = evaluate(weights, cap, chunk=chunk)
    exact, exact_grads = evaluate(weights, cap)
    np.testing.assert_allclose(mean, exact, rtol=1e-5)
    for a, b in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_value_without_gradients():
    mean = linear_cross_entropy(HIDDEN, HEAD, TARGETS, None, cap=2.0, chunk=5)
    np.testing.assert_allclose(mean, total(HIDDEN, HEAD, None, 2.0)[1], rtol=1e-5)


@pytest.mark.parametrize("chunk", [5, 12])
def test_bfloat16_is_close(chunk):
    mean, grads = evaluate(WEIGHTS, 2.0, dtype="bfloat16", chunk=chunk)
    exact, exact_grads = evaluate(WEIGHTS, 2.0)
    np.testing.assert_allclose(mean, exact, rtol=0.01)
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)


def test_tokens_with_weight_0_have_no_gradient():
    _, (dhidden, _) = evaluate(WEIGHTS, 0.0, chunk=5)
    assert not np.any(np.asarray(dhidden)[WEIGHTS == 0]) and np.any(dhidden, axis=-1)[WEIGHTS > 0].all()


@pytest.mark.parametrize("chunk", [None, 5, 12])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_log_probs_per_token(cap, chunk):
    """Compares values, and gradients of a function that is not a sum over tokens."""

    def whole(h, w):
        logits = jax.nn.log_softmax(softcap(h @ w, cap))
        return jnp.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]

    def in_chunks(h, w):
        return linear_log_probs(h, w, TARGETS, cap=cap, chunk=chunk)

    np.testing.assert_allclose(in_chunks(HIDDEN, HEAD), whole(HIDDEN, HEAD), rtol=1e-4, atol=1e-5)
    want, got = (
        jax.grad(lambda h, w, fn=fn: jnp.square(fn(h, w).sum(-1)).sum(), (0, 1))(HIDDEN, HEAD)
        for fn in (whole, in_chunks)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), want, got)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_entropies_at_a_temperature(temperature, device):
    """A GPU pads the columns of the head. Entropies have no gradient."""

    def whole(h, w):
        logits = jax.nn.log_softmax(softcap(h @ w, 2.0) / temperature)
        return jnp.take_along_axis(logits, TARGETS[..., None], -1)[..., 0], -(jnp.exp(logits) * logits).sum(-1)

    options = dict(cap=2.0, chunk=5, temperature=temperature)
    with compiling_for(device):
        got = linear_log_probs_and_entropies(HIDDEN, HEAD, TARGETS, **options)
        alone = linear_log_probs(HIDDEN, HEAD, TARGETS, **options)
        both = lambda h, w: linear_log_probs_and_entropies(h, w, TARGETS, **options)  # noqa: E731
        gradients = jax.grad(lambda h, w: sum(jnp.square(x).sum() for x in both(h, w)), (0, 1))(HIDDEN, HEAD)
    np.testing.assert_allclose(got[0], alone, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, whole(HIDDEN, HEAD))
    want = jax.grad(lambda h, w: jnp.square(whole(h, w)[0]).sum(), (0, 1))(HIDDEN, HEAD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradients, want)


def columns_of_products(jaxpr):
    """Number of columns of the second operand of each matrix product in a program."""
    columns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            columns.append(max(eqn.invars[1].aval.shape))
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    columns += columns_of_products(inner)
    return columns


@pytest.mark.first_cases(1)
@pytest.mark.parametrize(("cap", "chunk", "dtype"), [(0.0, None, "float32"), (2.0, 5, "float32"), (2.0, 5, "bfloat16")])
def test_a_gpu_pads_the_columns_of_the_head_without_changing_the_loss(cap, chunk, dtype):
    options = dict(dtype=dtype, chunk=chunk)

    def both(h, w):
        mean = linear_cross_entropy(h, w, TARGETS, WEIGHTS, cap=cap, **options)
        return mean.total + (linear_log_probs(h, w, TARGETS, cap=cap, **options) * WEIGHTS).sum(), mean.total

    run = lambda h, w: jax.value_and_grad(both, (0, 1), has_aux=True)(h, w)  # noqa: E731
    want = run(HIDDEN, HEAD)
    with compiling_for("gpu"):
        got = run(HIDDEN, HEAD)
        programs = jax.make_jaxpr(run)(HIDDEN, HEAD)
    assert 128 in columns_of_products(programs.jaxpr) and V not in columns_of_products(programs.jaxpr)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=0.05, atol=0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


@pytest.mark.parametrize(("memory", "expected"), [(None, 256), (4, 256), (16, 512), (80, 1024), (141, 1024)])
def test_the_chunk_size_on_a_gpu_depends_on_its_memory(memory, expected, monkeypatch):
    stats = None if memory is None else {"bytes_limit": memory * 2**30}
    monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), {"memory_stats": lambda self: stats})()])
    with compiling_for("gpu"):
        assert loss._chunk_bytes() == expected * 2**20
    assert loss._chunk_bytes() == 256 * 2**20
