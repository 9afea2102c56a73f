"""Activation patching, ablation and steering against loops with one run at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import UserError
from gptjax.model.gpt import forward, tapped
from gptjax.research import taps
from gptjax.research.taps import replace

TOKENS = np.random.default_rng(0).integers(0, 17, (2, 7))
CLOSE = dict(rtol=1e-4, atol=1e-4)
CLEAN, CORRUPTED = TOKENS[:1], np.where(np.arange(7) == 3, 5, TOKENS[:1])
METRIC = taps.logit_difference(3, 4)


def at_end(params, cfg, tokens, patches):
    return METRIC(forward(params, tokens, cfg, patches=patches)[:, -1])


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("site, axes", [("resid", (1,)), ("attn/v", (1, 2)), ("attn/weights", (2, 1))])
def test_the_grid_is_a_loop(tiny, site, axes):
    """Every cell equals one patched run, for any memory limit; the last cell restores the clean run."""
    cfg, params = tiny("llama")
    path = f"blocks/*/{site}"
    value = jax.jit(lambda p: tapped(p, CLEAN, cfg, (path,))[1][path])(params)

    def whole(memory_bytes):
        settings = dict(site=site, axes=("position", "head")[: len(axes)], memory_bytes=memory_bytes)
        return jax.jit(lambda p: taps.patching_grid(p, CLEAN, CORRUPTED, cfg, METRIC, **settings))(params)

    got = whole(2**30)
    assert got.shape == (2, *(value.shape[1 + axis] for axis in axes))
    for layer in range(2):

        @jax.jit
        def cell(params, mask, path=f"blocks/{layer}/{site}", value=value[layer]):
            return at_end(params, cfg, CORRUPTED, {path: replace(value, mask)})

        for place in np.ndindex(got.shape[1:]):
            mask = np.zeros(value.shape[1:], bool)
            np.moveaxis(mask, axes, range(len(axes)))[place] = True
            np.testing.assert_allclose(got[(layer, *place)], cell(params, mask), **CLOSE)
    if site == "resid":
        np.testing.assert_allclose(whole(40_000), got, **CLOSE)
        run = jax.jit(lambda p, tokens: at_end(p, cfg, tokens, {}))
        clean, corrupted = run(params, CLEAN), run(params, CORRUPTED)
        np.testing.assert_allclose(got[-1, -1], clean, **CLOSE)
        # before the first position where the prompts differ
        np.testing.assert_allclose(got[:, :3], np.full((2, 3), corrupted), **CLOSE)
        assert abs(clean - corrupted) > 0.1


@pytest.mark.slow
def test_head_ablation(tiny):
    cfg, params = tiny("modern")
    path = "blocks/*/attn/heads"

    @jax.jit
    def run(params):
        means = tapped(params, TOKENS, cfg, (path,))[1][path].mean((1, 2), keepdims=True)
        return means, *(taps.head_ablation(params, TOKENS, cfg, METRIC, value=value) for value in (None, means))

    means, zeroed, mean = run(params)
    assert zeroed.shape == mean.shape == (2, 4)

    @jax.jit
    def without(params, value, head):
        patch = replace(value, jnp.arange(4)[:, None] == head)
        return at_end(params, cfg, TOKENS, {"blocks/1/attn/heads": patch})

    for head in range(4):
        np.testing.assert_allclose(zeroed[1, head], without(params, jnp.zeros_like(means[1]), head), **CLOSE)
        np.testing.assert_allclose(mean[1, head], without(params, means[1], head), **CLOSE)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_the_logit_lens_ends_at_the_logits(tiny, arch):
    cfg, params = tiny(arch)
    lens = jax.jit(lambda p: taps.logit_lens(p, TOKENS, cfg))(params)
    assert lens.shape == (3, 2, 7, 17)
    np.testing.assert_allclose(lens[-1], jax.jit(lambda p: forward(p, TOKENS, cfg))(params), **CLOSE)
    one_layer = dataclasses.replace(cfg, n_layer=1)
    first = params | {"blocks": jax.tree.map(lambda a: a[:1], params["blocks"])}
    np.testing.assert_allclose(lens[1], jax.jit(lambda p: forward(p, TOKENS, one_layer))(first), **CLOSE)


def test_attention_maps(tiny):
    cfg, params = tiny("llama", sliding_window=3, window_pattern="SL")
    maps = np.asarray(jax.jit(lambda p: taps.attention_maps(p, TOKENS, cfg))(params))
    assert maps.shape == (2, 2, 4, 7, 7)
    distance = np.arange(7)[:, None] - np.arange(7)
    assert not maps[..., distance < 0].any() and not maps[0][..., distance > 2].any()
    assert maps[1][..., distance > 2].all()
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_steering_while_generating(tiny):
    """Greedy decoding with steering matches the steered forward pass; another strength does not recompile."""
    cfg, params = tiny("llama")
    stack, prompts, strengths = "blocks/*/resid", [TOKENS[0, :4].tolist(), TOKENS[1, :2].tolist()], (0.0, 4.0, -4.0)

    @jax.jit
    def run(params):
        vector = taps.steering_vector(params, TOKENS[:, :3], TOKENS[:1], cfg, 0)
        towards, away = (tapped(params, tokens, cfg, (stack,))[1][stack] for tokens in (TOKENS[:, :3], TOKENS[:1]))
        return vector, towards[0, :, -1], away[0, :, -1]

    vector, towards, away = run(params)
    np.testing.assert_allclose(vector, (towards[0] + towards[1]) / 2 - away[0], **CLOSE)

    settings = dict(max_new_tokens=6, key=jax.random.key(0))
    step = jax.jit(lambda p, tokens, patches: forward(p, tokens, cfg, patches=patches))
    counts, steered = [], []
    for strength in strengths:
        patches = taps.steering(vector, 0, strength)
        steered.append(gptjax.generate(params, prompts, cfg, patches=patches, **settings))
        counts.append(gptjax.generation.programs())
        for prompt, new in zip(prompts, steered[-1], strict=True):
            whole = np.array([[*prompt, *new] + [0] * (4 - len(prompt))])
            logits = np.asarray(step(params, whole, patches))
            assert logits[0, len(prompt) - 1 : len(prompt) + 5].argmax(-1).tolist() == new
    assert counts[0] == counts[1] == counts[2]
    assert steered[0] != steered[1] != steered[2]
    streamed = gptjax.generation.stream(params, prompts[0], cfg, every=6, patches=patches, **settings)
    assert list(streamed) == [steered[-1][0]]


def grid(params, cfg, clean=TOKENS, **options):
    return taps.patching_grid(params, clean, TOKENS, cfg, jnp.sum, **options)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda p, c: grid(p, c, TOKENS[:, 1:]), r"got \(2, 6\) and \(2, 7\)"),
        (lambda p, c: grid(p, c, site="res"), "'res' is no activation.*resid"),
        (lambda p, c: grid(p, c, axes=("head",)), "resid has position"),
    ],
)
def test_mistakes(tiny, call, says):
    cfg, params = tiny("llama")
    with pytest.raises(UserError, match=says):
        call(params, cfg)


def test_the_parts_of_research_open():
    assert gptjax.research.taps is taps and "taps" in dir(gptjax.research)
    with pytest.raises(AttributeError, match="it has .*taps"):
        _ = gptjax.research.nothing
