"""The KV cache: which slots are written, and the effect of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model.cache import init_cache
from gptjax.model.gpt import extend, for_decoding, forward


def test_an_empty_cache():
    cfg = ModelConfig(vocab_size=5, n_layer=3, n_head=4, n_kv_head=2, d_model=24, context_length=9)
    cache = init_cache(cfg, 2)
    assert cache.k.shape == cache.v.shape == (3, 2, 2, 9, 6)
    assert cache.empty and cache.length.tolist() == [0, 0]
    assert init_cache(cfg, 2, 4).k.shape[3] == 4


@pytest.mark.parametrize("rows", [2, 20])
def test_every_row_is_written_from_its_own_length_on(rows):
    cfg = ModelConfig(vocab_size=5, n_layer=2, n_head=1, d_model=2, context_length=4)
    cache = init_cache(cfg, rows).replace(length=jnp.arange(rows) % 2 + 1, empty=False)
    cache = cache.write(1, jnp.ones((rows, 1, 2, 2)), jnp.full((rows, 1, 2, 2), 2.0))
    k, v = cache.read(1, jnp.float32)
    assert k[0, 0, :, 0].tolist() == [0, 1, 1, 0] and v[0, 0, :, 0].tolist() == [0, 2, 2, 0]
    assert k[1, 0, :, 0].tolist() == [0, 0, 1, 1] and k[-2, 0, :, 0].tolist() == [0, 1, 1, 0]
    assert not any(a.any() for a in cache.read(0, jnp.float32))


def test_int8_error_is_at_most_half_a_step_of_each_head():
    cfg = ModelConfig(vocab_size=5, n_layer=1, n_head=3, d_model=24, context_length=6)
    k, v = np.random.default_rng(0).normal(size=(2, 2, 3, 6, 8)).astype(np.float32)
    cache = init_cache(cfg, 2, dtype="int8").write(0, jnp.array(k), jnp.array(v))
    assert cache.k.dtype == jnp.int8
    for kept, exact in zip(cache.read(0, jnp.float32), (k, v), strict=True):
        assert (np.abs(kept - exact) <= np.abs(exact).max(-1, keepdims=True) / 127 / 2 + 1e-6).all()


SWITCHES = {
    "gpt2": dict(arch="gpt2"),
    "alibi": dict(arch="gpt2", position="alibi"),
    "sinusoidal": dict(arch="gpt2", position="sinusoidal"),
    "modern": dict(arch="modern"),
    "windows": dict(
        arch="llama", n_kv_head=1, d_head=6, sliding_window=3, window_pattern="SL", rope_local_base=500.0,
        norm_position="both", qk_norm=True, activation="geglu", embed_gain=3.0,
    ),
    "post": dict(arch="llama", norm_position="post", qk_norm=True, qk_norm_over="all", rope_scaling="linear"),
}  # fmt: skip


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_padding_on_the_right_is_never_seen(tiny, switches):
    """A short row in a ragged batch gives the same logits as alone, in one call or two, with layers stacked or not."""
    cfg, params = tiny(**switches)
    tokens = np.random.default_rng(0).integers(0, 17, (2, 7))

    @jax.jit
    def both(params, decode_params):
        first, cache = extend(params, tokens[:, :5], cfg, init_cache(cfg, 2, 10), lengths=jnp.array([5, 2]))
        rest = np.stack([tokens[0, 5:], tokens[1, 2:4]])
        second, cache = extend(decode_params, rest, cfg, cache)
        return first, second, cache.length, forward(params, tokens, cfg)

    first, second, length, whole = both(params, for_decoding(params, cfg))
    np.testing.assert_allclose(first[0], whole[0, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first[1, :2], whole[1, :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second[0], whole[0, 5:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second[1], whole[1, 2:4], rtol=1e-4, atol=1e-4)
    assert length.tolist() == [7, 4]


@pytest.mark.slow
def test_setting_the_length_back_forgets(tiny):
    cfg, params = tiny("modern")
    tokens = np.random.default_rng(0).integers(0, 17, (1, 8))
    _, cache = extend(params, tokens[:, :6], cfg, init_cache(cfg, 1, 10))
    logits, _ = extend(params, tokens[:, 3:], cfg, cache.replace(length=jnp.array([3])))
    np.testing.assert_allclose(logits, forward(params, tokens, cfg)[:, 3:], rtol=1e-4, atol=1e-4)
