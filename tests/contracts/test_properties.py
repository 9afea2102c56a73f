"""Properties of every architecture and position encoding, computed by one compiled program per case."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model.cache import init_cache
from gptjax.model.gpt import backbone, extend, forward

MEMBERS = {
    "gpt2, learned": ("gpt2", {}),
    "gpt2, sinusoidal": ("gpt2", {"position": "sinusoidal"}),
    "gpt2, alibi": ("gpt2", {"position": "alibi"}),
    "llama, rope": ("llama", {}),
    "llama, alibi": ("llama", {"position": "alibi"}),
    "modern, rope": ("modern", {}),
    "modern, learned": ("modern", {"position": "learned"}),
}
T = 12
SPLIT = 5  # length of the first document, and of the cache's prefill


@pytest.fixture(scope="module", params=MEMBERS)
def results(request, tiny):
    """{name: array}, computed once per case."""
    arch, switches = MEMBERS[request.param]
    cfg, params = tiny(arch, **switches)
    tokens = jnp.array(np.random.default_rng(1).permutation(17)[:T])[None]

    def cached(params):
        logits, cache = extend(params, tokens[:, :SPLIT], cfg, init_cache(cfg, 1))

        def step(cache, token):
            logits, cache = extend(params, token[None, None], cfg, cache)
            return cache, logits[0, 0]

        _, rest = jax.lax.scan(step, cache, tokens[0, SPLIT:])
        return jnp.concatenate([logits[0], rest])

    def sensitivity(params):
        """[T, T]: gradient of the last hidden state at position t with respect to the embedding at position s."""

        def hidden_at(embedding, t):
            hidden = backbone({**params, "wte": {"embedding": embedding}}, tokens, cfg)
            return jnp.vdot(hidden[0, t], jnp.arange(1.0, cfg.d_model + 1))

        rows = jax.vmap(jax.grad(hidden_at), (None, 0))(params["wte"]["embedding"], jnp.arange(T))
        return jnp.abs(rows[:, tokens[0]]).max(-1)

    @jax.jit
    def run(params):
        segments = (jnp.arange(T) >= SPLIT).astype(jnp.int32)[None]
        positions = jnp.where(segments == 0, jnp.arange(T), jnp.arange(T) - SPLIT)
        return {
            "whole": forward(params, tokens, cfg)[0],
            "cached": cached(params),
            "packed": forward(params, tokens, cfg, segment_ids=segments, positions=positions)[0],
            "second document": forward(params, tokens[:, SPLIT:], cfg)[0],
            "sensitivity": sensitivity(params),
        }

    return jax.tree.map(np.asarray, run(params))


@pytest.mark.first_cases(2)
def test_no_gradient_from_the_future(results):
    """The gradient is exactly zero above the diagonal and non-zero on and below it."""
    seen = np.tril(np.ones((T, T), bool))
    assert not results["sensitivity"][~seen].any()
    assert (results["sensitivity"][seen] > 1e-6).all()


@pytest.mark.first_cases(4)
def test_cached_equals_uncached(results):
    np.testing.assert_allclose(results["cached"], results["whole"], rtol=1e-4, atol=1e-4)
    assert (results["cached"].argmax(-1) == results["whole"].argmax(-1)).all()


@pytest.mark.first_cases(4)
def test_packed_equals_separate(results):
    separate = np.concatenate([results["whole"][:SPLIT], results["second document"]])
    np.testing.assert_allclose(results["packed"], separate, rtol=1e-4, atol=1e-4)
    assert np.abs(results["packed"][SPLIT:] - results["whole"][SPLIT:]).max() > 0.01


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def gradients(request, tiny):
    """{name: (logits, gradients)} of the same model, with different execution settings."""
    cfg, params = tiny(request.param, dropout=0.1 if request.param == "gpt2" else 0.0)
    tokens = jnp.arange(2 * T).reshape(2, T) % 17

    def run(**how):  # a separate program per setting: in one program XLA would share common subexpressions
        def total(params):
            logits = forward(params, tokens, dataclasses.replace(cfg, **how), dropout_key=jax.random.key(3))
            return jnp.sin(logits).sum(), logits

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    return {name: run(**how) for name, how in WAYS.items()}


WAYS = {"plain": {}, "unrolled": {"unroll": True}, "dots": {"remat": "dots"}, "full": {"remat": "full"}}
WAYS |= {"offload": {"remat": "offload"}}


@pytest.mark.slow
@pytest.mark.first_cases(2)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_how_it_is_computed_changes_nothing(gradients, way):
    """Unrolling and rematerialisation change neither logits nor gradients, with the same dropout key."""
    ours, expected = (jax.tree_util.tree_leaves_with_path(gradients[name]) for name in (way, "plain"))
    for (path, a), (_, b) in zip(ours, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 2e-5, path
