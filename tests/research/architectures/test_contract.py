"""Properties of every architecture: the cache, causality, gradients, LoRA and config errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import lora
from gptjax.config import LoraConfig
from gptjax.errors import UserError
from gptjax.research.architectures import attention, deltanet, mla, moe, sliding_window

B, T, D = 2, 9, 16
SHELF = {
    "multi-head": (attention, attention.Config(D, n_head=4, n_kv_head=4)),
    "grouped-query": (attention, attention.Config(D, n_head=4, n_kv_head=2)),
    "multi-query": (attention, attention.Config(D, n_head=4, n_kv_head=1)),
    "sliding window": (sliding_window, sliding_window.Config(D, n_head=4, n_kv_head=2, window=3)),
    "a window of one": (sliding_window, sliding_window.Config(D, n_head=2, n_kv_head=2, window=1)),
    "a window beyond the text": (sliding_window, sliding_window.Config(D, n_head=2, n_kv_head=1, window=20)),
    "latent": (mla, mla.Config(D, n_head=4, d_head=6, d_latent=5, d_rope=4, d_query_latent=7)),
    "latent, plain queries": (mla, mla.Config(D, n_head=2, d_head=8, d_latent=5, d_rope=2)),
    "latent, no positions": (mla, mla.Config(D, n_head=2, d_head=8, d_latent=5, d_rope=0)),
    "experts": (moe, moe.Config(D, d_ff=12, n_expert=5, n_active=2)),
    "one expert": (moe, moe.Config(D, d_ff=12, n_expert=1, n_active=1)),
    "gated delta": (deltanet, deltanet.Config(D, n_head=2, d_head=6)),
    "gated delta, no convolution": (deltanet, deltanet.Config(D, n_head=3, d_head=4, conv_width=1)),
}


def case(name):
    member, cfg = SHELF[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    return member, cfg, member.init(jax.random.key(1), cfg), x


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("name", SHELF)
def test_cached_equals_uncached(name):
    """`extend` equals `apply` for several ways to split the tokens into chunks, shorter and longer than a window."""
    member, cfg, params, x = case(name)

    @jax.jit
    def both(params, x):
        outputs = []
        for chunks in ((T,), (4, 1, 1, 3), (1, 5, 2, 1)):
            cache, y, first = member.init_cache(cfg, B, T + 2), [], 0
            for size in chunks:
                out, cache = member.extend(params, x[:, first : first + size], cfg, cache)
                y, first = [*y, out], first + size
            outputs.append(jnp.concatenate(y, 1))
        return member.apply(params, x, cfg), outputs

    whole, outputs = both(params, x)
    assert whole.shape == (B, T, D) and whole.dtype == jnp.float32
    assert float(jnp.abs(whole).max()) > 0.1
    for out in outputs:
        np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("name", SHELF)
def test_no_gradient_from_the_future_and_one_to_every_parameter(name):
    member, cfg, params, x = case(name)
    position = 5

    @jax.jit
    def gradients(params, x):
        def value(params, x, place):
            return jnp.sin(member.apply(params, x, cfg)[:, place]).sum()

        return jax.grad(value, 1)(params, x, position), jax.grad(value)(params, x, slice(None))

    of_x, of_params = gradients(params, x)
    assert not np.asarray(of_x[:, position + 1 :]).any()
    assert np.asarray(of_x[:, position]).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        # a softmax over a single score has no gradient
        dead = {"a window of one": "qk", "one expert": ["router"]}.get(name, ())
        expected = leaf.size > 0 and path[0].key not in dead
        assert np.isfinite(leaf).all() and bool(np.asarray(leaf).any()) == expected, path


@pytest.mark.slow
@pytest.mark.first_cases(3)
@pytest.mark.parametrize("name", SHELF)
def test_a_new_adapter_changes_nothing(name):
    member, cfg, params, x = case(name)
    settings = LoraConfig(rank=2, targets="*/kernel")
    fitting = {path: leaf for path, leaf in params.items() if "kernel" not in leaf or leaf["kernel"].size}
    adapter = lora.init(jax.random.key(2), fitting, settings)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    run = jax.jit(lambda adapter: member.apply(lora.attach(params, adapter, settings), x, cfg))
    plain = member.apply(params, x, cfg)
    np.testing.assert_allclose(run(adapter), plain, rtol=1e-5, atol=1e-5)
    merged = member.apply(lora.merge(params, moved, settings), x, cfg)
    np.testing.assert_allclose(run(moved), merged, rtol=1e-4, atol=1e-4)
    assert np.abs(run(moved) - plain).max() > 0.01


@pytest.mark.slow
def test_rows_of_different_lengths_by_vmap():
    member, cfg, params, x = case("grouped-query")
    rows, lengths = x[:, None], (2, 6)  # [B, 1, T, D]
    caches = [
        member.extend(params, row[:, :n], cfg, member.init_cache(cfg, 1, T))[1]
        for row, n in zip(rows, lengths, strict=True)
    ]
    caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    now = jnp.stack([row[:, n : n + 1] for row, n in zip(rows, lengths, strict=True)])
    y, caches = jax.vmap(member.extend, (None, 0, None, 0))(params, now, cfg, caches)
    whole = member.apply(params, x, cfg)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(y[row, 0, 0], whole[row, n], rtol=1e-5, atol=1e-5)
    assert caches.length.tolist() == [3, 7]


MISTAKES = {
    "d_model (10) must be n_head (4) times an even number": lambda: attention.Config(10, 4, 4),
    "n_head (4) must be divisible by n_kv_head (3)": lambda: attention.Config(16, 4, 3),
    "window (0) must be at least 1": lambda: sliding_window.Config(16, 4, 4, window=0),
    "d_rope (3) must be even": lambda: mla.Config(16, 4, 4, 8, d_rope=3),
    "n_active (3) must be between 1 and n_expert (2)": lambda: moe.Config(16, 8, n_expert=2, n_active=3),
    "conv_width (0) must be at least 1": lambda: deltanet.Config(16, 2, 8, conv_width=0),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_sizes_that_do_not_fit(text):
    with pytest.raises(UserError) as error:
        MISTAKES[text]()
    assert text in str(error.value)
