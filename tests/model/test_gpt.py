"""The decoder: initialisation, the effect of each config switch, and its equality with the functions in `ops`."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import tree
from gptjax.config import ARCHS, ModelConfig
from gptjax.errors import UserError
from gptjax.from_scratch import feed_forward, multi_head_attention
from gptjax.model.gpt import abstract_params, backbone, forward, grow_vocabulary, init_params, lm_logits
from gptjax.ops import position
from gptjax.ops.loss import cross_entropy
from gptjax.ops.norm import layer_norm

TOKENS = np.random.default_rng(0).integers(0, 17, (2, 12))


def layer(params, i):
    return jax.tree.map(lambda x: x[i], params["blocks"])


def run(cfg, params, tokens=TOKENS, **context):
    return np.asarray(jax.jit(lambda p: forward(p, tokens, cfg, **context))(params))


def test_shapes_and_dtypes(tiny):
    cfg, params = tiny("gpt2")
    hidden = jax.eval_shape(lambda p: backbone(p, TOKENS, cfg), params)
    logits = jax.eval_shape(lambda p: forward(p, TOKENS, cfg), params)
    assert (hidden.shape, logits.shape, logits.dtype) == ((2, 12, 32), (2, 12, 17), jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(cfg))} == {"float32"}


@pytest.mark.parametrize("position_kind", ["learned", "sinusoidal", "alibi"])
def test_gpt2_is_made_of_the_pieces(tiny, position_kind):
    """GPT-2 without biases against ten lines that compose functions of `ops`."""
    cfg, params = tiny("gpt2", bias=False, qkv_bias=False, n_kv_head=4, position=position_kind)

    def by_hand(params):
        x = params["wte"]["embedding"][TOKENS]
        x = x + params["wpe"]["embedding"][:12] if position_kind == "learned" else x
        x = x + position.sinusoidal(jnp.arange(12), 32) if position_kind == "sinusoidal" else x
        for i in range(cfg.n_layer):
            p = layer(params, i)
            w = [p["attn"][name]["kernel"] for name in "qkvo"]
            x = x + multi_head_attention(layer_norm(x, **p["ln_1"]), *w, cfg.n_head, alibi=position_kind == "alibi")
            x = x + feed_forward(layer_norm(x, **p["ln_2"]), p["mlp"]["up"]["kernel"], p["mlp"]["down"]["kernel"])
        return layer_norm(x, **params["ln_f"]) @ params["wte"]["embedding"].T

    np.testing.assert_allclose(run(cfg, params), jax.jit(by_hand)(params), rtol=1e-4, atol=1e-4)


def test_llamas_feed_forward_is_the_gated_piece(tiny):
    """With a zero attention output, a one-layer model is its feed-forward layer."""
    cfg, params = tiny("llama", n_layer=1, norm_scale=False)
    params["blocks"]["attn"]["o"]["kernel"] *= 0

    def by_hand(params):
        def norm(x):
            return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)

        x, mlp = params["wte"]["embedding"][TOKENS], layer(params, 0)["mlp"]
        x = x + feed_forward(norm(x), mlp["up"]["kernel"], mlp["down"]["kernel"], mlp["gate"]["kernel"])
        return norm(x) @ params["lm_head"]["kernel"]

    np.testing.assert_allclose(run(cfg, params), jax.jit(by_hand)(params), rtol=1e-4, atol=1e-4)


# One switch at a time, set to another value than the default of the arch.
SWITCHES = [
    *[("gpt2", {"position": kind}) for kind in ("sinusoidal", "rope", "alibi")],
    ("gpt2", {"norm": "rmsnorm"}), ("gpt2", {"norm_scale": False}), ("gpt2", {"norm_bias": False}),
    ("gpt2", {"norm_eps": 0.5}), ("gpt2", {"activation": "swiglu"}), ("gpt2", {"activation": "relu2"}),
    ("gpt2", {"qkv_bias": False}), ("gpt2", {"bias": False}), ("gpt2", {"tie_embeddings": False}),
    ("gpt2", {"qk_norm": True}), ("gpt2", {"embed_norm": True}), ("gpt2", {"logit_softcap": 2.0}),
    ("gpt2", {"value_residual": True}), ("gpt2", {"residual_lambdas": True}), ("gpt2", {"x0_lambdas": True}),
    ("gpt2", {"smear": True}),
    ("gpt2", {"n_kv_head": 1}), ("gpt2", {"dtype": "bfloat16"}),
    ("modern", {"qk_gain": 3.0}), ("modern", {"rope_base": 10.0}), ("modern", {"value_residual": False}),
    ("modern", {"dtype": "bfloat16"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny):
    """{(arch, n_layer): logits}. One layer compiles faster, but value_residual needs two."""
    return {
        (arch, n): run(*tiny(arch, n_layer=n, unroll=True)) for arch, n in itertools.product(("gpt2", "modern"), (1, 2))
    }


@pytest.mark.first_cases(4)
@pytest.mark.parametrize(("arch", "switch"), SWITCHES, ids=lambda x: x if isinstance(x, str) else str(x)[1:-1])
def test_each_switch_alone_works_and_does_something(tiny, base, arch, switch):
    n_layer = 2 if "value_residual" in switch else 1
    cfg, params = tiny(arch, n_layer=n_layer, unroll=True, **switch)
    before = base[arch, n_layer]

    def total(params):
        logits = forward(params, TOKENS, cfg)
        return cross_entropy(logits, np.roll(TOKENS, -1, 1)).value(), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert np.isfinite(loss) and np.abs(logits - before).max() > 1e-3
    for path, grad in tree.flatten(grads).items():
        assert np.isfinite(grad).all(), path
        # softmax is invariant to a constant, and value_mix has no effect in the first layer
        no_effect = path.endswith("attn/k/bias") or (n_layer == 1 and path.endswith("value_mix"))
        assert np.any(grad) or no_effect, f"{path} is never read"
    if "dtype" in switch:
        np.testing.assert_allclose(logits, before, atol=0.1 * np.abs(before).max())


def test_every_switch_of_the_archs_is_in_the_table():
    tested = {name for _, switch in SWITCHES for name in switch}
    assert set().union(*ARCHS.values()) - tested == {"zero_init_proj", "zero_init_head"}  # tested below


def test_dropout(tiny):
    """No dropout without a key; equal keys give equal results, different keys different ones."""
    cfg, params = tiny("gpt2", dropout=0.3)
    plain, _ = tiny("gpt2")
    np.testing.assert_array_equal(run(cfg, params), run(plain, params))
    dropped = jax.jit(lambda p, key: forward(p, TOKENS, cfg, dropout_key=key))
    a, b, c = (np.asarray(dropped(params, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1 and np.abs(a - run(plain, params)).max() > 0.1


def test_dropout_masks_differ_between_positions(tiny):
    """Dropout on equal rows: a mask that repeats would give equal outputs."""
    from gptjax.model.layers import dropout

    x = jnp.ones((200, 50))
    out = np.asarray(dropout(x, 0.2, jax.random.key(0)))
    assert set(np.unique(out)) == {0, np.float32(1.25)}
    assert out.mean() == pytest.approx(1, abs=0.02) and len(np.unique(out, axis=0)) == 200
    assert dropout(x, 0.2, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


SMALL = ModelConfig(
    vocab_size=2000, context_length=32, n_layer=2, n_head=2, d_model=64, tie_embeddings=False, unroll=False
)


def first_loss(cfg):
    def loss(key):
        tokens, targets = jax.random.randint(key, (2, 8, 32), 0, cfg.vocab_size)
        return cross_entropy(forward(init_params(key, cfg), tokens, cfg), targets).value()

    return float(jax.jit(loss)(jax.random.key(0)))


@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    ("changes", "excess"),
    [
        ({"init": "torch", "qkv_bias": False}, 1 / 6),  # logits of variance 1/3
        ({"init": "gpt2"}, 64 * 0.02**2 / 2),  # D * 0.02^2
        ({"arch": "modern", "logit_softcap": 15.0}, 0.0),  # the LM head is initialised to zero
    ],
    ids=["torch", "gpt2", "modern"],
)
def test_first_loss(changes, excess):
    """The initial loss is ln V plus half the variance of the logits."""
    assert first_loss(dataclasses.replace(SMALL, **changes)) == pytest.approx(math.log(2000) + excess, abs=0.02)


def spreads(cfg):
    params = jax.jit(lambda key: init_params(key, cfg))(jax.random.key(0))
    return params, {path: float(leaf.std()) for path, leaf in tree.flatten(params).items()}


def test_init_gpt2():
    """Weights N(0, 0.02), divided by sqrt(2L) where they write to the residual stream; biases 0, norm scales 1."""
    params, std = spreads(dataclasses.replace(SMALL, d_model=64, embed_std=0.1))
    assert std["wte/embedding"] == pytest.approx(0.1, rel=0.05)
    assert std["wpe/embedding"] == pytest.approx(0.02, rel=0.1)
    for name in ("attn/q", "attn/k", "attn/v", "mlp/up"):
        assert std[f"blocks/{name}/kernel"] == pytest.approx(0.02, rel=0.05)
    for name in ("attn/o", "mlp/down"):
        assert std[f"blocks/{name}/kernel"] == pytest.approx(0.02 / 2, rel=0.05)
    for path, leaf in tree.flatten(params).items():
        if not path.endswith(("kernel", "embedding")):
            assert (leaf == float(path.endswith("scale"))).all(), path
    q = params["blocks"]["attn"]["q"]["kernel"]
    assert (q[0] != q[1]).mean() > 0.99


def test_init_torch():
    """Embeddings N(0, 1); weights and biases U(+-1/sqrt(in))."""
    params, std = spreads(dataclasses.replace(SMALL, init="torch"))
    assert std["wte/embedding"] == pytest.approx(1, rel=0.05) and std["wpe/embedding"] == pytest.approx(1, rel=0.05)
    for name, d_in in (("attn/q", 64), ("attn/o", 64), ("mlp/up", 64), ("mlp/down", 256)):
        for leaf_name in ("kernel", "bias"):
            leaf = tree.flatten(params)[f"blocks/{name}/{leaf_name}"]
            assert std[f"blocks/{name}/{leaf_name}"] == pytest.approx(d_in**-0.5 / 3**0.5, rel=0.15), (
                name,
                leaf_name,
            )
            assert np.abs(leaf).max() <= d_in**-0.5


def test_zero_init():
    cfg = dataclasses.replace(SMALL, zero_init_proj=True, zero_init_head=True)
    _, std = spreads(cfg)
    zero = {path for path, value in std.items() if path.endswith("kernel") and value == 0}
    assert zero == {"blocks/attn/o/kernel", "blocks/mlp/down/kernel", "lm_head/kernel"}


def test_logits_are_capped(tiny):
    cfg, params = tiny("gpt2", logit_softcap=2.0)
    hidden = jnp.full((1, 32), 50.0)
    assert np.abs(lm_logits(params, hidden, cfg)).max() <= 2


def test_positions_move_a_document(tiny):
    """The argument `positions` replaces the index in the row; [T] is broadcast over the batch."""
    cfg, params = tiny("gpt2")
    whole = run(cfg, params, TOKENS, positions=jnp.arange(3, 15))
    alone = run(cfg, params, TOKENS, positions=jnp.broadcast_to(jnp.arange(3, 15), (2, 12)))
    np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-5)
    assert np.abs(whole - run(cfg, params)).max() > 0.01


@pytest.mark.parametrize("arch", ARCHS)
def test_new_tokens_leave_old_logits(tiny, arch):
    cfg, params = tiny(arch)
    bigger, larger = grow_vocabulary(params, cfg, 20)
    assert larger.vocab_size == 20
    assert jax.tree.map(jnp.shape, bigger) == jax.tree.map(lambda a: a.shape, abstract_params(larger))
    old, new = run(cfg, params), run(larger, bigger)
    np.testing.assert_allclose(new[..., :17], old, rtol=1e-5, atol=1e-5)
    assert new[..., 17:].max() <= old.max()
    np.testing.assert_allclose(bigger["wte"]["embedding"][19], params["wte"]["embedding"].mean(0), rtol=1e-6)
    grown, unchanged = grow_vocabulary(params, cfg, 16)  # the embedding already has enough rows
    assert unchanged == cfg and jax.tree.all(jax.tree.map(np.array_equal, grown, params))
    for wrong in (dict(vocab_size=20, used=18), dict(vocab_size=15, used=16), dict(vocab_size=0)):
        with pytest.raises(UserError, match="the model has 17 rows"):
            grow_vocabulary(params, cfg, **wrong)


@pytest.mark.parametrize(("arch", "vocab_size"), [("gpt2", 14), ("llama", 17), ("modern", 20)])
def test_new_tokens_take_the_spare_rows_first(tiny, arch, vocab_size):
    """A model with 17 embedding rows whose tokenizer had 12 tokens."""
    cfg, params = tiny(arch)
    bigger, larger = grow_vocabulary(params, cfg, vocab_size, used=12)
    assert larger.vocab_size == max(17, vocab_size)
    before, after = params["wte"]["embedding"], bigger["wte"]["embedding"]
    np.testing.assert_array_equal(after[:12], before[:12])
    np.testing.assert_allclose(after[12:vocab_size], np.tile(before[:12].mean(0), (vocab_size - 12, 1)), rtol=1e-5)
    np.testing.assert_array_equal(after[vocab_size:], before[vocab_size:])
    tokens = np.arange(12)[None]
    old, new = forward(params, tokens, cfg), forward(bigger, tokens, larger)
    np.testing.assert_allclose(new[..., :12], old[..., :12], atol=1e-5)


@pytest.mark.cpu
def test_new_tokens_of_a_large_vocabulary():
    """The backend may choose other kernels for other shapes; on a CPU the sums are bitwise equal."""
    cfg = ModelConfig(vocab_size=5003, n_layer=1, d_model=128, n_head=4, context_length=32)
    params = init_params(jax.random.key(0), cfg)
    bigger, larger = grow_vocabulary(params, cfg, 5005)
    np.testing.assert_array_equal(run(larger, bigger)[..., :5003], run(cfg, params))
