"""The cache as a value: what is written where, and what padding does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model.cache import init_cache
from gptjax.model.gpt import extend, forward


def test_an_empty_cache():
    cfg = ModelConfig(vocab_size=5, n_layer=3, n_head=4, n_kv_head=2, d_model=24, context_length=9)
    cache = init_cache(cfg, 2)
    assert cache.k.shape == cache.v.shape == (3, 2, 9, 2, 6)
    assert not cache.valid.any() and int(cache.length) == 0
    assert init_cache(cfg, 2, 4).k.shape[2] == 4


def test_write_and_read():
    cache = init_cache(ModelConfig(vocab_size=5, n_layer=2, n_head=1, d_model=2, context_length=4), 1)
    cache = cache.replace(length=jnp.int32(1)).write(1, jnp.ones((1, 2, 1, 2)), jnp.full((1, 2, 1, 2), 2.0))
    k, v = cache.read(1)
    assert k[0, :, 0, 0].tolist() == [0, 1, 1, 0] and v[0, :, 0, 0].tolist() == [0, 2, 2, 0]
    assert not any(a.any() for a in cache.read(0))


@pytest.mark.parametrize(
    ("arch", "at"), [("gpt2", "learned"), ("gpt2", "alibi"), ("gpt2", "sinusoidal"), ("modern", "rope")]
)
def test_padding_on_the_left_is_never_seen(tiny, arch, at):
    """A short row beside a long one reads what it reads alone, in two calls as in one."""
    cfg, params = tiny(arch, position=at)
    tokens = np.random.default_rng(0).integers(0, 17, (2, 7))
    valid = np.arange(7) >= np.array([[0], [3]])

    @jax.jit
    def both(params):
        first, cache = extend(params, tokens[:, :5], cfg, init_cache(cfg, 2, 10), valid=valid[:, :5])
        second, cache = extend(params, tokens[:, 5:], cfg, cache, valid=valid[:, 5:])
        alone = forward(params, tokens[:1], cfg)[0], forward(params, tokens[1:, 3:], cfg)[0]
        return jnp.concatenate([first, second], 1), alone, cache

    logits, (long, short), cache = both(params)
    np.testing.assert_allclose(logits[0], long, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[1, 3:], short, rtol=1e-4, atol=1e-4)
    assert np.isfinite(logits).all() and int(cache.length) == 7
    assert cache.valid.sum(1).tolist() == [7, 4]
