"""Reading and replacing activations with `tapped` and `patches`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import UserError, lora
from gptjax.model import activations
from gptjax.model.activations import Patch, add, replace, scale
from gptjax.model.cache import init_cache
from gptjax.model.gpt import extend, extend_tapped, for_decoding, forward, lm_logits, tapped, unstack_layers
from gptjax.ops.norm import layer_norm
from gptjax.ops.quant import quantize

SWITCHES = {
    "gpt2": dict(arch="gpt2"),
    "modern": dict(arch="modern", unroll=True),
    "llama": dict(arch="llama", sliding_window=3, window_pattern="SL", remat="full"),
    "both": dict(arch="llama", norm_position="both", qk_norm=True, activation="geglu", rope_local_base=500.0,
                 sliding_window=3, window_pattern="SL"),
    "post": dict(arch="llama", norm_position="post", qk_norm=True, qk_norm_over="all"),
}  # fmt: skip
MODELS = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 7))
EVERYTHING = ("*", "blocks/*/attn/weights")
CLOSE = dict(rtol=1e-4, atol=1e-4)
SAME = dict(rtol=1e-5, atol=1e-5)  # the same operations; an accelerator may fuse the two programs differently


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_patches(cfg):
    """One patch of each kind: all layers or one, arrays or functions, replace, add or scale; none has a time axis."""
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


@pytest.mark.slow
@pytest.mark.first_cases(1)
@MODELS
def test_every_activation_is_read_and_put_back_unchanged(tiny, switches):
    """Activations have the documented shapes and sum to the residual stream; stacked and per-layer paths agree, as do
    stacked and unstacked parameters; replacing an activation by itself does not change the logits."""
    cfg, params = tiny(**switches)
    singles = tuple(name.replace("*", "1") for name in activations.names(cfg))

    @jax.jit
    def run(params):
        return tapped(params, TOKENS, cfg, (*EVERYTHING, *singles))

    @jax.jit
    def put_back(params, acts):
        """Logits [n, B, T, V] of one run per path, in which only that activation is replaced."""

        def replace_one(chosen):
            patches = {}
            for on, (path, value) in zip(chosen, acts.items(), strict=True):
                mask = jnp.full((len(value),) + (1,) * (value.ndim - 1), on) if "*" in path else on
                patches[path] = replace(value, mask)
            return forward(params, TOKENS, cfg, patches=patches)

        return jax.vmap(replace_one)(jnp.eye(len(acts), dtype=bool))

    logits, acts = run(params)
    plain = jax.jit(lambda p: forward(p, TOKENS, cfg))(params)
    np.testing.assert_allclose(logits, plain, **SAME)
    stacks = {path: acts[path] for path in activations.names(cfg)}
    assert set(acts) == {*stacks, *singles}
    (B, T), L, D, N, K, H = TOKENS.shape, cfg.n_layer, cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim
    special = {
        "attn/q": (T, N, H), "attn/k": (T, K, H), "attn/v": (T, K, H), "attn/weights": (N, T, T),
        "attn/heads": (T, N, H), "mlp/hidden": (T, cfg.d_ff),
    }  # fmt: skip
    for path, value in stacks.items():
        layer, site = activations.split(path)
        assert value.shape == ((L,) if layer else ()) + (B, *special.get(site, (T, D))), path
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(acts[path.replace("*", "1")], value[1] if layer else value, **SAME)
    replaced = put_back(params, stacks)
    np.testing.assert_allclose(replaced, np.broadcast_to(plain, replaced.shape), rtol=2e-5, atol=2e-5)
    for a, b in zip(jax.tree.leaves(run(unstack_layers(params, cfg))), jax.tree.leaves((logits, acts)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)

    stacked = {path.removeprefix("blocks/*/"): np.asarray(value) for path, value in stacks.items()}
    np.testing.assert_allclose(stacked["resid_pre"] + stacked["attn/out"], stacked["resid_mid"], **CLOSE)
    np.testing.assert_allclose(stacked["resid_mid"] + stacked["mlp/out"], stacked["resid"], **CLOSE)
    if not cfg.residual_lambdas:
        np.testing.assert_allclose(stacked["resid_pre"][0], stacked["embed"], **SAME)
        np.testing.assert_allclose(stacked["resid_pre"][1:], stacked["resid"][:-1], **SAME)
    np.testing.assert_allclose(jax.jit(lambda p, h: lm_logits(p, h, cfg))(params, stacked["ln_f/out"]), logits, **CLOSE)


def test_a_patched_model_by_hand(tiny):
    """A patched GPT-2 against a reimplementation in plain operations with the patches written into it."""
    cfg, params = tiny("gpt2", n_kv_head=4)
    patches = {
        "embed": add(noise(32)),
        "blocks/0/attn/heads": replace(0.0, np.arange(4)[:, None] == 2),  # head 2 of layer 0 is ablated
        "blocks/1/attn/weights": np.full((2, 4, 7, 7), 1 / 7, np.float32),  # uniform attention in layer 1
        "blocks/*/mlp/hidden": scale(noise(2, 48)),
        "blocks/1/resid": replace(noise(32, seed=3), np.arange(7)[:, None] == 5),  # only position 5
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

    expected = jax.jit(by_hand)(params)
    for layout in (params, unstack_layers(params, cfg)):
        got = jax.jit(lambda p: forward(p, TOKENS, cfg, patches=patches))(layout)
        np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.first_cases(1)
@MODELS
def test_cached_is_uncached(tiny, switches):
    """With patches, prefill and then single tokens in the decoding layout give the uncached logits and activations."""
    cfg, params = tiny(**switches)
    patches = some_patches(cfg)
    paths = ("blocks/*/resid", "blocks/1/attn/k", "embed")

    @jax.jit
    def both(params, decode_params):
        cache = init_cache(cfg, 2, 10)
        first, cache, acts = extend_tapped(params, TOKENS[:, :5], cfg, cache, paths, patches=patches)
        second, cache = extend(decode_params, TOKENS[:, 5:6], cfg, cache, patches=patches)
        third, _, last = extend_tapped(decode_params, TOKENS[:, 6:], cfg, cache, paths, patches=patches)
        return jnp.concatenate([first, second, third], 1), acts, last

    logits, acts, last = both(params, for_decoding(params, cfg))
    whole, seen = jax.jit(lambda p: tapped(p, TOKENS, cfg, paths, patches=patches))(params)
    np.testing.assert_allclose(logits, whole, **CLOSE)
    # the patches change the logits
    assert np.abs(whole - jax.jit(lambda p: forward(p, TOKENS, cfg))(params)).max() > 0.1
    for path, value in seen.items():
        time = 2 if "*" in path else 1
        np.testing.assert_allclose(acts[path], np.take(value, range(5), time), **CLOSE)
        np.testing.assert_allclose(last[path], np.take(value, [6], time), **CLOSE)


@pytest.mark.slow
def test_weights_over_a_cache(tiny):
    """Attention weights span all cache slots and are 0 on empty ones; replacing them by themselves changes nothing."""
    cfg, params = tiny("llama", sliding_window=3)
    path = "blocks/*/attn/weights"

    @jax.jit
    def run(params):
        _, cache = extend(params, TOKENS[:, :5], cfg, init_cache(cfg, 2, 10))
        logits, _, acts = extend_tapped(params, TOKENS[:, 5:], cfg, cache, (path,))
        replaced, _ = extend(params, TOKENS[:, 5:], cfg, cache, patches=acts)
        return logits, acts[path], replaced, tapped(params, TOKENS, cfg, (path,))[1][path]

    logits, weights, replaced, maps = map(np.asarray, run(params))
    assert weights.shape == (2, 2, 4, 2, 10) and not weights[..., 7:].any()
    np.testing.assert_allclose(weights[..., :7], maps[..., 5:, :], **CLOSE)
    np.testing.assert_allclose(replaced, logits, **CLOSE)


def test_patches_are_data(tiny):
    """Patches are traced: new values do not recompile, and vmap over patches or tokens equals a loop."""
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
    tokens = np.random.default_rng(0).integers(0, 17, (3, 2, 7))
    shared = {"blocks/1/resid": add(noise(32))}
    single = jax.jit(lambda p, t: forward(p, t, cfg, patches=shared))
    np.testing.assert_allclose(jax.vmap(single, (None, 0))(params, tokens)[2], single(params, tokens[2]), **CLOSE)


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_with_respect_to_an_activation(tiny, remat):
    """The gradient of an offset to the embedding equals that of the position table; a replaced activation blocks it."""
    cfg, params = tiny("gpt2", remat=remat)

    def loss(params, delta, patches):
        return jnp.square(forward(params, TOKENS, cfg, patches={"embed": add(delta), **patches})).mean()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_params, of_delta = grads(params, jnp.zeros((7, 32)), {})
    np.testing.assert_allclose(of_delta, of_params["wpe"]["embedding"][:7], **CLOSE)

    blocked, none = jax.device_get(grads(params, jnp.zeros((7, 32)), {"blocks/0/resid": jnp.array(noise(2, 7, 32))}))
    assert not none.any() and not blocked["wpe"]["embedding"].any()
    assert not blocked["blocks"]["mlp"]["up"]["kernel"][0].any() and blocked["blocks"]["mlp"]["up"]["kernel"][1].any()


@pytest.mark.slow
def test_adapters_and_quantised_leaves(tiny):
    cfg, params = tiny("llama")
    lcfg = gptjax.LoraConfig(rank=4, targets="blocks/*/kernel | wte/* | lm_head/*")
    adapter = jax.tree.map(lambda a: a + 0.1, lora.init(jax.random.key(0), params, lcfg))
    patches = some_patches(cfg)

    @jax.jit
    def run(params):
        return tapped(params, TOKENS, cfg, ("*",), patches=patches)

    for params_a, params_b in (
        (lora.attach(params, adapter, lcfg), lora.merge(params, adapter, lcfg)),
        (quantize(params, "int8"), gptjax.dequantize(quantize(params, "int8"))),
    ):
        for a, b in zip(jax.tree.leaves(run(params_a)), jax.tree.leaves(run(params_b)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

    def loss(adapter):
        return jnp.square(forward(lora.attach(params, adapter, lcfg), TOKENS, cfg, patches=patches)).mean()

    def through_merged(adapter):
        return jnp.square(forward(lora.merge(params, adapter, lcfg), TOKENS, cfg, patches=patches)).mean()

    a, b = jax.jit(jax.grad(loss))(adapter), jax.jit(jax.grad(through_merged))(adapter)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3 * float(jnp.abs(y).max()))


@pytest.mark.slow
def test_order_and_dropout(tiny):
    """Patches of an activation apply in order, single-layer ones last; segment ids and dropout work as without them."""
    cfg, params = tiny("gpt2", dropout=0.5)
    ids, key = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2), jax.random.key(0)
    patches = {
        "blocks/1/resid": lambda x: x + 1,
        "blocks/*/resid": (lambda x: 0 * x, lambda x: x + 2),
        "*/resid": scale(np.full(2, 3.0, np.float32)),
    }
    context = dict(segment_ids=ids, dropout_key=key)
    run = jax.jit(lambda p: tapped(p, TOKENS, cfg, ("blocks/*/resid",), patches=patches, **context)[1])
    for layout in (params, unstack_layers(params, cfg)):
        first, second = np.asarray(run(layout)["blocks/*/resid"])
        assert set(first.flat) == {6} and set(second.flat) == {7}
    plain = jax.jit(lambda p: forward(p, TOKENS, cfg, **context))(params)
    logits, acts = jax.jit(lambda p: tapped(p, TOKENS, cfg, EVERYTHING, **context))(params)
    np.testing.assert_allclose(logits, plain, **CLOSE)
    assert not np.asarray(acts["blocks/*/attn/weights"])[..., 3:, :3].any()


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


def patched(params, cfg, path, value):
    return forward(params, TOKENS, cfg, patches={path: value})


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda p, c: tapped(p, TOKENS, c, ("blocks/*/atn/out", "embed")), "^'blocks/\\*/atn/out' matches no.*embed, "),
        (lambda p, c: tapped(p, TOKENS, c, ("blocks/2/resid",)), "one of the layers 0 to 1"),
        (lambda p, c: patched(p, c, "resid", add(1.0)), "'resid' matches no"),
        (lambda p, c: patched(p, c, "*/resid", noise(3, 32)), r"axis of 2 layers, got \(3, 32\)"),
        (lambda p, c: patched(p, c, "embed", noise(9, 32)), r"\(9, 32\)\] do not fit .*\(2, 7, 32"),
    ],
)
def test_mistakes(tiny, call, says):
    cfg, params = tiny("llama")
    with pytest.raises(UserError, match=says):
        call(params, cfg)


def test_a_patch_is_a_pytree_of_its_data():
    patch = replace(jnp.ones(3), jnp.array([True, False, True]))
    doubled = jax.tree.map(lambda a: a * 2, patch)
    assert isinstance(doubled, Patch) and doubled.fn is patch.fn and doubled.data[0].tolist() == [2, 2, 2]
