"""Reading and replacing activations: what is read is what flows, and what is put in its place flows on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import UserError, lora
from gptjax.model import activations
from gptjax.model.activations import Patch
from gptjax.model.cache import init_cache
from gptjax.model.gpt import (
    extend,
    extend_tapped,
    for_decoding,
    forward,
    layers_apart,
    lm_logits,
    tapped,
)
from gptjax.ops.attention import attention_weights, heads_attention, weighted_values
from gptjax.ops.norm import layer_norm
from gptjax.ops.quant import quantize
from gptjax.research import taps
from gptjax.research.taps import add, replace, scale

SWITCHES = {
    "gpt2": dict(arch="gpt2"),
    "alibi": dict(arch="gpt2", position="alibi"),
    "modern": dict(arch="modern", unroll=True),
    "llama": dict(arch="llama", n_layer=3, sliding_window=3, window_pattern="SLS", remat="full"),
    "both": dict(arch="llama", norm_position="both", qk_norm=True, activation="geglu", rope_local_base=500.0,
                 sliding_window=3, window_pattern="SL"),
    "post": dict(arch="llama", norm_position="post", qk_norm=True, qk_norm_over="all"),
}  # fmt: skip
MODELS = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 7))
EVERYTHING = ("*", "blocks/*/attn/weights")
CLOSE = dict(rtol=1e-4, atol=1e-4)


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_patches(cfg):
    """One of each kind: stacks and single layers, data and functions, replacing, adding and scaling; no time axis."""
    L, N, K, H = cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.head_dim
    heads = np.ones((L, N, 1), np.float32)
    heads[0, 1], heads[1, 2] = 0, 0.5
    return {
        "embed": add(0.3 * noise(cfg.d_model)),
        "blocks/*/attn/heads": scale(heads),
        "blocks/*/resid_mid": lambda x: 0.9 * x,
        "blocks/1/attn/k": replace(noise(K, H), np.arange(K)[:, None] == 1),
        "blocks/0/attn/v": lambda x: x + 0.1,
        "blocks/[01]/mlp/hidden": scale(np.arange(cfg.d_ff) % 2.0),
        "blocks/*/mlp/out": (add(noise(L, cfg.d_model)), lambda x: 1.1 * x),
        "ln_f/out": add(noise(cfg.d_model, seed=2)),
    }


def text(f, *args):
    return jax.jit(f).lower(*args).as_text()


@MODELS
def test_without_patches_it_is_the_same_program(tiny, switches):
    cfg, params = tiny(**switches)
    plain = text(lambda p: forward(p, TOKENS, cfg), params)
    assert plain == text(lambda p: forward(p, TOKENS, cfg, patches={}), params)
    assert plain == text(lambda p: tapped(p, TOKENS, cfg, ())[0], params)


@MODELS
def test_every_activation_is_read_and_put_back_unchanged(tiny, switches):
    """Shapes as documented; stacks are the single layers; stacked parameters as those that lie apart; the run's own
    activations in their own places change nothing."""
    cfg, params = tiny(**switches)
    singles = tuple(name.replace("*", "1") for name in activations.names(cfg))

    @jax.jit
    def run(params):
        logits, acts = tapped(params, TOKENS, cfg, EVERYTHING)
        _, single = tapped(params, TOKENS, cfg, singles)
        again = {path: forward(params, TOKENS, cfg, patches={path: value}) for path, value in acts.items()}
        return logits, acts, single, again, forward(params, TOKENS, cfg)

    logits, acts, single, again, plain = run(params)
    np.testing.assert_array_equal(logits, plain)
    assert set(acts) == set(activations.names(cfg))
    (B, T), L, D, N, K, H = TOKENS.shape, cfg.n_layer, cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim
    special = {
        "attn/q": (T, N, H), "attn/k": (T, K, H), "attn/v": (T, K, H), "attn/weights": (N, T, T),
        "attn/heads": (T, N, H), "mlp/hidden": (T, cfg.d_ff),
    }  # fmt: skip
    for path, value in acts.items():
        layer, site = activations.split(path)
        assert value.shape == ((L,) if layer else ()) + (B, *special.get(site, (T, D))), path
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(single[path.replace("*", "1")], value[1] if layer else value)
        np.testing.assert_allclose(again[path], plain, rtol=1e-5, atol=1e-5, err_msg=path)

    _, apart, _, _, _ = run(layers_apart(params, cfg))
    for path, value in acts.items():
        np.testing.assert_allclose(apart[path], value, **CLOSE, err_msg=path)


@MODELS
def test_the_stream_is_the_sum_of_what_is_added(tiny, switches):
    cfg, params = tiny(**switches)
    logits, acts = jax.jit(lambda p: tapped(p, TOKENS, cfg, ("*",)))(params)
    at = {path.removeprefix("blocks/*/"): value for path, value in acts.items()}
    np.testing.assert_allclose(at["resid_pre"] + at["attn/out"], at["resid_mid"], **CLOSE)
    np.testing.assert_allclose(at["resid_mid"] + at["mlp/out"], at["resid"], **CLOSE)
    if not cfg.residual_lambdas:
        np.testing.assert_array_equal(at["resid_pre"][0], at["embed"])
        np.testing.assert_array_equal(at["resid_pre"][1:], at["resid"][:-1])
    np.testing.assert_array_equal(logits, jax.jit(lambda p, h: lm_logits(p, h, cfg))(params, at["ln_f/out"]))


def test_a_patched_model_by_hand(tiny):
    """GPT-2 in plain operations, with each patch written where it belongs."""
    cfg, params = tiny("gpt2", n_kv_head=4)
    patches = {
        "embed": add(noise(32)),
        "blocks/0/attn/heads": replace(0.0, np.arange(4)[:, None] == 2),  # head 2 of layer 0 is gone
        "blocks/1/attn/weights": np.full((2, 4, 7, 7), 1 / 7, np.float32),  # layer 1 looks everywhere alike
        "blocks/*/mlp/hidden": scale(noise(2, 48)),
        "blocks/1/resid": replace(noise(32, seed=3), np.arange(7)[:, None] == 5),  # one position
    }

    def linear(x, node):
        return x @ node["kernel"] + node["bias"]

    def by_hand(params):
        x = params["wte"]["embedding"][TOKENS] + params["wpe"]["embedding"][:7] + noise(32)
        for i in range(2):
            p = jax.tree.map(lambda a: a[i], params["blocks"])  # noqa: B023
            h = layer_norm(x, **p["ln_1"])
            q, k, v = (linear(h, p["attn"][name]).reshape(2, 7, 4, 8) for name in "qkv")
            scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(8)
            weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((7, 7), bool)), scores, -jnp.inf), -1)
            weights = jnp.full_like(weights, 1 / 7) if i == 1 else weights
            heads = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
            heads = heads.at[:, :, 2].set(0) if i == 0 else heads
            x = x + linear(heads.reshape(2, 7, 32), p["attn"]["o"])
            hidden = jax.nn.gelu(linear(layer_norm(x, **p["ln_2"]), p["mlp"]["up"]), approximate=True)
            x = x + linear(hidden * noise(2, 48)[i], p["mlp"]["down"])
        x = x.at[:, 5].set(noise(32, seed=3))
        return layer_norm(x, **params["ln_f"]) @ params["wte"]["embedding"].T

    got = jax.jit(lambda p: forward(p, TOKENS, cfg, patches=patches))(params)
    np.testing.assert_allclose(got, jax.jit(by_hand)(params), **CLOSE)
    np.testing.assert_allclose(
        jax.jit(lambda p: forward(p, TOKENS, cfg, patches=patches))(layers_apart(params, cfg)), got, **CLOSE
    )


@MODELS
def test_cached_is_uncached(tiny, switches):
    """Patched, in pieces: as a prompt, then token by token from the layout for decoding; activations too."""
    cfg, params = tiny(**switches)
    patches = some_patches(cfg)
    asked = ("blocks/*/resid", "blocks/1/attn/k", "embed")

    @jax.jit
    def both(params, quick):
        cache = init_cache(cfg, 2, 10)
        first, cache, acts = extend_tapped(params, TOKENS[:, :5], cfg, cache, asked, patches=patches)
        second, cache = extend(quick, TOKENS[:, 5:6], cfg, cache, patches=patches)
        third, cache, last = extend_tapped(params, TOKENS[:, 6:], cfg, cache, asked, patches=patches)
        logits = jnp.concatenate([first, second, third], 1)
        return logits, acts, last, tapped(params, TOKENS, cfg, asked, patches=patches), forward(params, TOKENS, cfg)

    logits, acts, last, (whole, seen), plain = both(params, for_decoding(params, cfg))
    np.testing.assert_allclose(logits, whole, **CLOSE)
    assert np.abs(whole - plain).max() > 0.1  # the patches did something
    for path, value in seen.items():
        time = 2 if "*" in path else 1
        np.testing.assert_allclose(acts[path], np.take(value, range(5), time), **CLOSE)
        np.testing.assert_allclose(last[path], np.take(value, [6], time), **CLOSE)


def test_weights_over_a_cache(tiny):
    """They span its slots, and what is not there yet has none; replaced by themselves they change nothing."""
    cfg, params = tiny("llama", sliding_window=3)
    path = "blocks/*/attn/weights"
    _, cache = extend(params, TOKENS[:, :5], cfg, init_cache(cfg, 2, 10))
    logits, _, acts = extend_tapped(params, TOKENS[:, 5:], cfg, cache, (path,))
    assert acts[path].shape == (2, 2, 4, 2, 10)
    np.testing.assert_allclose(acts[path][..., :7], taps.attention_maps(params, TOKENS, cfg)[..., 5:, :], **CLOSE)
    assert not acts[path][..., 7:].any()
    np.testing.assert_allclose(extend(params, TOKENS[:, 5:], cfg, cache, patches=acts)[0], logits, **CLOSE)


@pytest.mark.parametrize("options", [{}, dict(window=3), dict(alibi=True), dict(scale=0.2, offset=2)])
def test_weights_are_those_that_attention_uses(options):
    q, k, v = noise(2, 5, 4, 8), noise(2, 2, 7, 8, seed=2), noise(2, 2, 7, 8, seed=3)
    weights = attention_weights(q, k, **options)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(weighted_values(weights, v), heads_attention(q, k, v, **options), rtol=1e-5, atol=1e-5)
    ids = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
    weights = attention_weights(q, k[:, :, :5], segment_ids=ids)
    assert not (weights * (ids[:, None, :, None] != ids[:, None, None])).any()
    dropped = weighted_values(
        jnp.ones((1, 2, 3, 4)), jnp.ones((1, 1, 4, 8)), dropout=0.5, dropout_key=jax.random.key(0)
    )
    assert set(np.unique(dropped)) <= {0.0, 2.0, 4.0, 6.0, 8.0} and 1 < dropped.mean() < 7


def test_patches_are_data(tiny):
    """One program serves all values; vmapped over them it gives what a loop gives; gradients flow into them."""
    cfg, params = tiny("llama")
    values = noise(3, 2, 32)
    traces = []

    @jax.jit
    def run(params, patches):
        traces.append(1)
        return forward(params, TOKENS, cfg, patches=patches)

    loop = [run(params, {"blocks/*/mlp/out": add(value), "blocks/1/resid": scale(2.0)}) for value in values]
    assert len(traces) == 1
    many = {"blocks/*/mlp/out": add(values), "blocks/1/resid": scale(np.full(3, 2.0, np.float32))}
    np.testing.assert_allclose(jax.jit(jax.vmap(run, (None, 0)))(params, many), np.stack(loop), **CLOSE)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 17, (3, 2, 7))
    shared = {"blocks/1/resid": add(noise(32))}
    batched = jax.jit(jax.vmap(lambda t: forward(params, t, cfg, patches=shared)))(tokens)
    np.testing.assert_allclose(batched[2], forward(params, tokens[2], cfg, patches=shared), **CLOSE)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_with_respect_to_an_activation(tiny, remat):
    """Of what is added to the embedding: the gradient of the position table. Through a replaced activation: none."""
    cfg, params = tiny("gpt2", remat=remat)

    def loss(params, delta, patches):
        return jnp.square(forward(params, TOKENS, cfg, patches={"embed": add(delta), **patches})).mean()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_params, of_delta = grads(params, jnp.zeros((7, 32)), {})
    np.testing.assert_allclose(of_delta, of_params["wpe"]["embedding"][:7], **CLOSE)

    blocked, none = grads(params, jnp.zeros((7, 32)), {"blocks/0/resid": jnp.array(noise(2, 7, 32))})
    assert not none.any() and not blocked["wpe"]["embedding"].any()
    assert not blocked["blocks"]["mlp"]["up"]["kernel"][0].any() and blocked["blocks"]["mlp"]["up"]["kernel"][1].any()


def test_adapters_and_quantised_leaves(tiny):
    cfg, params = tiny("llama")
    lcfg = gptjax.LoraConfig(rank=4, targets="blocks/*/kernel | wte/* | lm_head/*")
    adapter = jax.tree.map(lambda a: a + 0.1, lora.init(jax.random.key(0), params, lcfg))
    patches = some_patches(cfg)

    @jax.jit
    def run(params):
        return tapped(params, TOKENS, cfg, ("*",), patches=patches)

    for one, other in (
        (lora.attach(params, adapter, lcfg), lora.merge(params, adapter, lcfg)),
        (quantize(params, "int8"), gptjax.dequantize(quantize(params, "int8"))),
    ):
        for a, b in zip(jax.tree.leaves(run(one)), jax.tree.leaves(run(other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

    def loss(adapter):
        return jnp.square(forward(lora.attach(params, adapter, lcfg), TOKENS, cfg, patches=patches)).mean()

    def through_merged(adapter):
        return jnp.square(forward(lora.merge(params, adapter, lcfg), TOKENS, cfg, patches=patches)).mean()

    a, b = jax.jit(jax.grad(loss))(adapter), jax.jit(jax.grad(through_merged))(adapter)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3 * float(jnp.abs(y).max()))


def test_order_and_dropout(tiny):
    """Several at one place go in the order given, a single layer's after the stack's; documents and dropout as ever."""
    cfg, params = tiny("gpt2", dropout=0.5)
    ids, key = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2), jax.random.key(0)
    patches = {"blocks/1/resid": lambda x: x + 1, "blocks/*/resid": (lambda x: 0 * x, lambda x: x + 2), "*/resid": scale(
        np.full(2, 3.0, np.float32))}  # fmt: skip
    for p in (params, layers_apart(params, cfg)):
        _, acts = tapped(p, TOKENS, cfg, ("blocks/*/resid",), segment_ids=ids, dropout_key=key, patches=patches)
        assert set(np.unique(acts["blocks/*/resid"][0])) == {6} and set(np.unique(acts["blocks/*/resid"][1])) == {7}
    plain = forward(params, TOKENS, cfg, segment_ids=ids, dropout_key=key)
    logits, acts = tapped(params, TOKENS, cfg, EVERYTHING, segment_ids=ids, dropout_key=key)
    np.testing.assert_allclose(logits, plain, **CLOSE)
    assert not acts["blocks/*/attn/weights"][..., 3:, :3].any()


def test_names():
    cfg = gptjax.ModelConfig(vocab_size=5, n_layer=12)
    assert activations.paths(("blocks/*/attn/out",), cfg) == ("blocks/*/attn/out",)
    assert activations.paths("blocks/3/resid | ln_f/out", cfg) == ("blocks/3/resid", "ln_f/out")
    assert activations.paths(("blocks/1?/resid", "blocks/[01]/resid"), cfg) == tuple(
        f"blocks/{i}/resid" for i in (10, 11, 0, 1)
    )
    assert activations.paths(("*",), cfg) == tuple(n for n in activations.names(cfg) if "weights" not in n)
    assert activations.paths(("*/weights",), cfg) == ("blocks/*/attn/weights",)
    assert len(activations.paths(("blocks/3/*",), cfg)) == 12


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda p, cfg: tapped(p, TOKENS, cfg, ("blocks/*/atn/out", "embed")), "'blocks/\\*/atn/out' matches no.*embed, "),
        (lambda p, cfg: tapped(p, TOKENS, cfg, ("blocks/2/resid",)), "one of the layers 0 to 1"),
        (lambda p, cfg: forward(p, TOKENS, cfg, patches={"resid": add(1.0)}), "'resid' matches no"),
        (lambda p, cfg: forward(p, TOKENS, cfg, patches={"*/resid": noise(3, 32)}), r"axis of 2 layers, got \(3, 32\)"),
        (lambda p, cfg: forward(p, TOKENS, cfg, patches={"embed": noise(9, 32)}), r"\(9, 32\)\] do not fit .*\(2, 7, 32"),
        (lambda p, cfg: taps.patching_grid(p, TOKENS, TOKENS[:, 1:], cfg, jnp.sum), r"got \(2, 7\) and \(2, 6\)"),
        (lambda p, cfg: taps.patching_grid(p, TOKENS, TOKENS, cfg, jnp.sum, site="res"), "'res' is no activation.*resid"),
        (lambda p, cfg: taps.patching_grid(p, TOKENS, TOKENS, cfg, jnp.sum, over=("head",)), "resid has position"),
    ],
)  # fmt: skip
def test_mistakes(tiny, call, says):
    cfg, params = tiny("llama")
    with pytest.raises(UserError, match=says):
        call(params, cfg)


CLEAN, CORRUPTED = TOKENS[:1], np.where(np.arange(7) == 3, 5, TOKENS[:1])
METRIC = taps.logit_difference(3, 4)


def at_end(params, cfg, tokens, patches):
    return METRIC(forward(params, tokens, cfg, patches=patches)[:, -1])


@pytest.mark.parametrize("site, axes", [("resid", (1,)), ("attn/v", (1, 2)), ("attn/weights", (2, 1))])
def test_the_grid_is_a_loop(tiny, site, axes):
    """All cells, whatever goes side by side; the last layer's last position restores the clean run."""
    cfg, params = tiny("llama", n_layer=3)
    over = ("position", "head")[: len(axes)]
    value = tapped(params, CLEAN, cfg, (f"blocks/*/{site}",))[1][f"blocks/*/{site}"]

    def grid(memory_bytes):
        return jax.jit(
            lambda p: taps.patching_grid(
                p, CLEAN, CORRUPTED, cfg, METRIC, site=site, over=over, memory_bytes=memory_bytes
            )
        )(params)

    got = grid(2**30)
    assert got.shape == (3, *(value.shape[1 + axis] for axis in axes))

    for layer in range(3):
        layer_cell = jax.jit(
            lambda p, mask, layer=layer: at_end(
                p, cfg, CORRUPTED, {f"blocks/{layer}/{site}": replace(value[layer], mask)}
            )
        )
        for place in np.ndindex(got.shape[1:]):
            mask = np.zeros(value.shape[1:], bool)
            np.moveaxis(mask, axes, range(len(axes)))[place] = True
            np.testing.assert_allclose(got[(layer, *place)], layer_cell(params, mask), **CLOSE)
    np.testing.assert_allclose(grid(40_000), got, **CLOSE)
    if site == "resid":
        np.testing.assert_allclose(got[-1, -1], at_end(params, cfg, CLEAN, {}), **CLOSE)
        np.testing.assert_allclose(got[:, :3], at_end(params, cfg, CORRUPTED, {}), **CLOSE)  # before they differ


def test_head_ablation(tiny):
    cfg, params = tiny("modern")
    got = jax.jit(lambda p: taps.head_ablation(p, TOKENS, cfg, METRIC))(params)
    means = tapped(params, TOKENS, cfg, ("blocks/*/attn/heads",))[1]["blocks/*/attn/heads"].mean((1, 2), keepdims=True)
    mean = jax.jit(lambda p: taps.head_ablation(p, TOKENS, cfg, METRIC, value=means))(params)
    assert got.shape == mean.shape == (2, 4)
    for layer, head in ((0, 0), (1, 3)):
        mask = np.arange(4)[:, None] == head
        for grid, value in ((got, 0.0), (mean, means[layer])):
            patches = {f"blocks/{layer}/attn/heads": replace(value, mask)}
            np.testing.assert_allclose(grid[layer, head], at_end(params, cfg, TOKENS, patches), **CLOSE)


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_the_logit_lens_ends_at_the_logits(tiny, arch):
    cfg, params = tiny(arch)
    lens = jax.jit(lambda p: taps.logit_lens(p, TOKENS, cfg))(params)
    assert lens.shape == (3, 2, 7, 17)
    np.testing.assert_allclose(lens[-1], forward(params, TOKENS, cfg), **CLOSE)
    one = dataclasses.replace(cfg, n_layer=1)
    first = params | {"blocks": jax.tree.map(lambda a: a[:1], params["blocks"])}
    np.testing.assert_allclose(lens[1], forward(first, TOKENS, one), **CLOSE)


def test_attention_maps(tiny):
    cfg, params = tiny("llama", sliding_window=3, window_pattern="SL")
    maps = jax.jit(lambda p: taps.attention_maps(p, TOKENS, cfg))(params)
    assert maps.shape == (2, 2, 4, 7, 7)
    distance = np.arange(7)[:, None] - np.arange(7)
    assert not maps[..., distance < 0].any() and not maps[0][..., distance > 2].any()
    assert maps[1][..., distance > 2].all()
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


def test_steering_while_generating(tiny):
    """Greedy tokens of the steered model: those of its forward pass; the same program at every strength."""
    cfg, params = tiny("llama")
    prompts = [TOKENS[0, :4].tolist(), TOKENS[1, :2].tolist()]
    vector = taps.steering_vector(params, TOKENS[:, :3], TOKENS[:1], cfg, 0)
    stack = "blocks/*/resid"
    one, other = (tapped(params, tokens, cfg, (stack,))[1][stack][0, :, -1] for tokens in (TOKENS[:, :3], TOKENS[:1]))
    np.testing.assert_allclose(vector, (one[0] + one[1]) / 2 - other[0], **CLOSE)

    settings = dict(max_new_tokens=6, key=jax.random.key(0))
    plain = gptjax.generate(params, prompts, cfg, **settings)
    counts, steered = [], []
    for strength in (0.0, 4.0, -4.0):
        patches = taps.steering(vector, 0, strength)
        steered.append(gptjax.generate(params, prompts, cfg, patches=patches, **settings))
        counts.append(gptjax.generation.programs())
        streamed = gptjax.generation.stream(params, prompts[0], cfg, every=6, patches=patches, **settings)
        assert list(streamed) == [steered[-1][0]]
    assert counts[1] == counts[2]
    assert steered[0] == plain and steered[1] != plain and steered[2] != steered[1]
    step = jax.jit(lambda p, tokens, patches: forward(p, tokens, cfg, patches=patches))
    for strength, rows in zip((0.0, 4.0, -4.0), steered, strict=True):
        for prompt, new in zip(prompts, rows, strict=True):
            whole = np.array([[*prompt, *new] + [0] * (4 - len(prompt))])
            logits = step(params, whole, taps.steering(vector, 0, strength))
            assert logits[0, len(prompt) - 1 : len(prompt) + 5].argmax(-1).tolist() == new


def test_patch_is_a_pytree():
    patch = replace(jnp.ones(3), jnp.array([True, False, True]))
    assert isinstance(patch, Patch) and len(jax.tree.leaves(patch)) == 2
    assert gptjax.research.taps is taps and "taps" in dir(gptjax.research)
    with pytest.raises(AttributeError, match="it has .*taps"):
        _ = gptjax.research.nothing
