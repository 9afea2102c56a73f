"""Every LoRA variant against its dense matrix, and every function on adapter trees against its definition."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import UserError, lora, tree
from gptjax.config import LoraConfig, ModelConfig
from gptjax.losses import next_token
from gptjax.ops.loss import cross_entropy
from gptjax.ops.quant import quantize
from gptjax.types import Batch

ALL = "blocks/*/kernel | wte/* | lm_head/*"
MEMBERS = {
    "lora": LoraConfig(rank=4),
    "miss": LoraConfig(rank=5, miss=True),  # 5 divides neither 32 nor 48
    "rslora": LoraConfig(rank=4, scaling="alpha/sqrt(r)", alpha=8),
    "alpha": LoraConfig(rank=3, scaling="alpha", alpha=2, targets="blocks/attn/q/* | blocks/attn/v/*"),
    "embeddings and head": LoraConfig(rank=4, targets=ALL),
    "dora": LoraConfig(rank=4, dora=True),
    "pissa": LoraConfig(rank=4, init="pissa"),
    "olora": LoraConfig(rank=4, init="olora", targets="blocks/mlp/*/kernel"),
    "pissa with dora": LoraConfig(rank=4, init="pissa", dora=True),
}
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 13))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
KEY = jax.random.key(3)


def start(params, cfg):
    return lora.init_from_weights(params, cfg) if cfg.init != "lora" else (params, lora.init(KEY, params, cfg))


def moved(adapter, seed=0):
    """Perturb an adapter randomly, so that zeros from initialisation hide nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), adapter)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


@pytest.fixture(scope="module", params=MEMBERS)
def member(request, model):
    cfg, params = model
    return cfg, params, MEMBERS[request.param], *start(params, MEMBERS[request.param])


def run(params, cfg):
    return np.asarray(jax.jit(lambda p: gptjax.forward(p, BATCH.tokens, cfg))(params))


@pytest.mark.first_cases(4)
def test_at_the_start_nothing_changes(member):
    """A new adapter adds exactly zero, up to different fusion. DoRA (division by norms) and `init_from_weights` (adds
    what it subtracted) have rounding errors."""
    cfg, params, lcfg, base, adapter = member
    got, want = run(lora.attach(base, adapter, lcfg), cfg), run(params, cfg)
    np.testing.assert_allclose(got, want, atol=2e-5 if lcfg.dora or lcfg.init != "lora" else 1e-5)


@pytest.mark.first_cases(4)
def test_attached_is_merged(member):
    cfg, _, lcfg, base, adapter = member
    adapter = moved(adapter)
    merged = lora.merge(base, adapter, lcfg)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got, want = run(lora.attach(base, adapter, lcfg), cfg), run(merged, cfg)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - run(base, cfg)).max() > 0.1


@pytest.mark.first_cases(2)
def test_gradients_are_those_of_the_merged_matrices(member):
    """DoRA's column norms are treated as constants on both sides."""
    cfg, _, lcfg, base, adapter = member
    loss = next_token(cfg)
    adapter = moved(adapter)

    def through_matrices(adapter):
        both = lora.attach(base, adapter, lcfg)

        def plain(leaf):
            if isinstance(leaf, lora.MissWeight):
                blocks = jnp.tile(leaf.d, (1, -(-leaf.w.shape[-2] // leaf.d.shape[-2]), 1))
                return leaf.w + blocks[..., : leaf.w.shape[-2], :]
            if not isinstance(leaf, lora.LoraWeight):
                return leaf
            w = leaf.w + leaf.scale[..., None, None] * (leaf.a @ leaf.b)
            if leaf.m is None:
                return w
            return w * (leaf.m / jax.lax.stop_gradient(jnp.linalg.norm(w, axis=-2, keepdims=True)))

        leaves = (lora.LoraWeight, lora.MissWeight)
        plain_params = jax.tree.map(plain, both, is_leaf=lambda node: isinstance(node, leaves))
        return loss(plain_params, BATCH, None)[0].total

    got = jax.jit(jax.grad(lambda a: lora.bind(loss, base, lcfg)(a, BATCH)[0].total))(adapter)
    want = jax.jit(jax.grad(through_matrices))(adapter)
    for path, leaf in tree.flatten(want).items():
        size = np.abs(leaf).max()
        np.testing.assert_allclose(tree.flatten(got)[path], leaf, atol=1e-4 * size, err_msg=path)


def test_no_product_of_the_weights_shape_in_the_backward_pass(tiny):
    """The compiled program has no [in, out] product, which the gradient of a frozen weight would be."""
    cfg, params = tiny("gpt2", d_model=40, d_ff=56, n_head=4, n_kv_head=4, tie_embeddings=False)
    lcfg = LoraConfig(rank=4)
    adapter = lora.init(KEY, params, lcfg)
    shapes = [r"\[40,40\]", r"\[40,56\]", r"\[56,40\]"]

    def products(fn, x):
        text = jax.jit(jax.grad(fn)).lower(x).compiler_ir("hlo").as_hlo_text()
        return [line for line in text.splitlines() if re.search(rf"= f32(?:{'|'.join(shapes)})\S* dot\(", line)]

    loss = next_token(cfg)
    assert not products(lambda a: lora.bind(loss, params, lcfg)(a, BATCH)[0].total, adapter)
    assert products(lambda p: loss(p, BATCH, None)[0].total, params)  # training the weights needs such a product


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("name", ["lora", "dora", "miss"])
def test_vmap_over_adapters_is_a_loop(model, name):
    cfg, params = model
    lcfg = MEMBERS[name]
    adapters = [moved(lora.init(KEY, params, lcfg), seed) for seed in range(3)]
    scales = jnp.array([0.5, 1.0, 2.0])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *adapters)

    def logits(adapter, scale):
        return gptjax.forward(lora.attach(params, adapter, lcfg, scales=scale), BATCH.tokens, cfg)

    vmapped = jax.jit(jax.vmap(logits))(stacked, scales)
    for adapter, scale, row in zip(adapters, scales, vmapped, strict=True):
        np.testing.assert_allclose(row, logits(adapter, scale), atol=1e-4)


@pytest.mark.slow
def test_rows_of_a_batch_through_adapters_of_their_own(model):
    cfg, params = model
    lcfg = MEMBERS["lora"]
    adapters = [moved(lora.init(KEY, params, lcfg), seed) for seed in range(3)]
    ids, tokens = [2, 0, 1, 2], np.random.default_rng(1).integers(0, 17, (4, 9))
    scales = jnp.array([0.5, 1.0, 2.0])
    both = lora.attach(params, lora.rows(adapters, ids), lcfg, scales=scales[jnp.array(ids)])
    logits = gptjax.forward(both, tokens, cfg)
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(tokens)]
    written = gptjax.generate(both, prompts, cfg, max_new_tokens=5, key=KEY)
    for i, k in enumerate(ids):
        single = lora.attach(params, adapters[k], lcfg, scales=scales[k])
        np.testing.assert_allclose(logits[i], gptjax.forward(single, tokens[i : i + 1], cfg)[0], atol=1e-4)
        assert written[i] == gptjax.generate(single, [prompts[i]], cfg, max_new_tokens=5, key=KEY)[0]
    merged = lora.merge(params, adapters[2], lcfg, scales=scales[2])
    np.testing.assert_allclose(logits[0], gptjax.forward(merged, tokens[:1], cfg)[0], atol=1e-4)
    for name in ("dora", "miss"):
        with pytest.raises(UserError, match="for kernels without DoRA or MiSS only"):
            lora.rows([lora.init(KEY, params, MEMBERS[name])], [0])


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["lora", "dora", "miss"])
def test_on_quantized_weights(tiny, name, kind):
    cfg, params = tiny("llama", d_ff=64)
    lcfg, small = MEMBERS[name], quantize(params, kind)
    adapter = moved(lora.init(KEY, small, lcfg))
    got, want = run(lora.attach(small, adapter, lcfg), cfg), run(lora.merge(small, adapter, lcfg), cfg)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    grads = jax.jit(jax.grad(lambda a: lora.bind(next_token(cfg), small, lcfg)(a, BATCH)[0].total))(adapter)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_training_touches_the_adapter_only(model):
    import optax

    cfg, params = model
    lcfg = LoraConfig(rank=4, dropout=0.1)
    tx = optax.adam(1e-2)
    state = gptjax.TrainState.create(lora.init(KEY, params, lcfg), frozen=params, tx=tx, key=KEY)
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    loss = lora.with_dropout(next_token(cfg))
    step = jax.jit(gptjax.make_train_step(loss, tx, combine=lambda a, base: lora.attach(base, a, lcfg)))
    losses = []
    for _ in range(8):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.frozen)] == before


def test_dropout_is_in_the_low_rank_branch_and_follows_the_key(model):
    cfg, params = model
    lcfg = LoraConfig(rank=4, dropout=0.5)
    adapter = lora.init(KEY, params, lcfg)
    loss = jax.jit(lora.bind(next_token(cfg), params, lcfg))
    plain = loss(adapter, BATCH, None)[0].total
    # b is zero, and dropout does not affect the base branch
    assert loss(adapter, BATCH, KEY)[0].total == pytest.approx(float(plain), rel=1e-6)
    adapter = moved(adapter)
    values = {float(loss(adapter, BATCH, key)[0].total) for key in (KEY, KEY, jax.random.key(9), None)}
    assert len(values) == 3


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("more", [{}, dict(dora=True), dict(miss=True)], ids=["lora", "dora", "miss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_reaches_the_head_inside_the_loss(more, dtype):
    """The loss, which computes logits in chunks, equals the loss from `forward` with the same dropout key."""
    cfg = ModelConfig(arch="llama", vocab_size=37, context_length=16, n_layer=1, n_head=2, d_model=16, dtype=dtype)
    params = gptjax.init_params(KEY, cfg)
    lcfg = LoraConfig(rank=3, targets="lm_head/kernel", dropout=0.5, **more)
    adapter = moved(lora.init(KEY, params, lcfg))
    ids = jax.random.randint(jax.random.key(1), (2, 11), 0, 37)
    batch = Batch(ids[:, :-1], ids[:, 1:])

    def by_forward(params, batch, key):
        return cross_entropy(gptjax.forward(params, batch.tokens, cfg), batch.targets), {}

    pair = [lora.bind(loss, params, lcfg) for loss in (next_token(cfg), by_forward)]
    values = set()
    for key in (None, KEY, jax.random.key(9)):
        (got, grad), (want, wanted) = (
            jax.jit(jax.value_and_grad(lambda a, f=f, key=key: f(a, batch, key)[0].value()))(adapter) for f in pair
        )
        close = dict(rtol=1e-5, atol=1e-6) if dtype == "float32" else dict(rtol=3e-2, atol=3e-3)
        np.testing.assert_allclose(got, want, **close)
        jax.tree.map(lambda a, b, close=close: np.testing.assert_allclose(a, b, **close), grad, wanted)
        values.add(round(float(got), 4))
    assert len(values) == 3


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    "more",
    [dict(miss=True), dict(init="lora"), dict(init="pissa"), dict(init="olora")],
    ids=["miss", "lora", "pissa", "olora"],
)
def test_some_layers_only(more):
    import optax

    cfg = ModelConfig(arch="llama", vocab_size=17, context_length=16, n_layer=4, n_head=2, d_model=16)
    params = gptjax.init_params(KEY, cfg)
    targets = "blocks/1/attn/q/kernel | blocks/[0,2-3]/mlp/*/kernel | lm_head/*"
    lcfg = LoraConfig(rank=2, targets=targets, **more)
    residual, adapter = start(params, lcfg)
    tx = optax.adamw(1e-2)
    state = gptjax.TrainState.create(adapter, frozen=residual, tx=tx, key=KEY)
    step = jax.jit(gptjax.make_train_step(next_token(cfg), tx, combine=lambda a, base: lora.attach(base, a, lcfg)))
    for _ in range(3):
        state, _ = step(state, BATCH)
    merged = lora.merge(state.frozen, state.params, lcfg)
    for path, leaf in tree.flatten(merged).items():
        before = tree.flatten(params)[path]
        moved = {
            "blocks/attn/q/kernel": [1], "blocks/mlp/up/kernel": [0, 2, 3], "blocks/mlp/gate/kernel": [0, 2, 3],
            "blocks/mlp/down/kernel": [0, 2, 3],
        }.get(path, [])  # fmt: skip
        if path.startswith("blocks/"):
            changed = np.flatnonzero([not np.array_equal(a, b) for a, b in zip(leaf, before, strict=True)]).tolist()
            assert changed == moved, path
        else:
            assert np.array_equal(leaf, before) == (path != "lm_head/kernel"), path


def test_layers_that_are_not_there_and_dora_on_some():
    cfg = ModelConfig(arch="llama", vocab_size=17, context_length=16, n_layer=2, n_head=2, d_model=16)
    params = gptjax.init_params(KEY, cfg)
    with pytest.raises(UserError, match=r"blocks/2/attn/q/kernel' matches no weight.*for single layers blocks/0/"):
        lora.init(KEY, params, LoraConfig(targets="blocks/2/attn/q/kernel"))
    with pytest.raises(UserError, match="do not select layers"):
        lora.init(KEY, params, LoraConfig(targets="blocks/1/*/kernel", dora=True))
    lora.init(KEY, params, LoraConfig(targets="blocks/[01]/attn/q/kernel", dora=True))


def test_ranges_of_layers():
    """Numbers of several digits are matched as numbers, and a range must lie within the model."""
    cfg = ModelConfig(arch="llama", vocab_size=17, context_length=16, n_layer=14, n_head=2, d_model=8)
    params = gptjax.init_params(KEY, cfg)
    for ranges, want in (("[0-11]", range(12)), ("[2,10-12]", [2, 10, 11, 12]), ("[13]", [1, 3]), ("13", [13])):
        adapter = lora.init(KEY, params, LoraConfig(rank=2, targets=f"blocks/{ranges}/attn/*/kernel"))
        assert list(adapter["blocks"]) == ["attn"]
        for node in adapter["blocks"]["attn"].values():
            assert np.flatnonzero(np.abs(node["kernel"]["a"]).max((1, 2))).tolist() == list(want)
    outside = {"[0-14]": "range 0-14: .* layers of this model, 0-13", "[3-1]": "range 3-1", "[2,20]": "range 20-20"}
    for ranges, words in outside.items():
        for more in ({}, dict(miss=True), dict(dora=True)):
            with pytest.raises(UserError, match=words):
                lora.init(KEY, params, LoraConfig(targets=f"lm_head/* | blocks/{ranges}/*/kernel", **more))


def test_parameter_counts_of_the_book():
    """2,666,528: GPT-2 small with a two-class head, rank 16 on every linear layer including the head."""
    shapes = gptjax.abstract_params(ModelConfig(vocab_size=50257))
    count = tree.size(jax.eval_shape(lambda: lora.init(KEY, shapes, LoraConfig(rank=16))))
    assert count + 16 * (768 + 2) == 2_666_528
    medium = ModelConfig(vocab_size=50257, n_layer=24, n_head=16, d_model=1024, tie_embeddings=False)
    lcfg = LoraConfig(rank=16, targets="blocks/*/kernel | lm_head/*")
    shapes = gptjax.abstract_params(medium)
    assert tree.size(jax.eval_shape(lambda: lora.init(KEY, shapes, lcfg))) == 7_898_384


def test_scales():
    assert LoraConfig(rank=16, alpha=32).scale == 2
    assert LoraConfig(rank=16, alpha=32, scaling="alpha/sqrt(r)").scale == 8
    assert LoraConfig(rank=16, alpha=32, scaling="alpha").scale == 32


def delta(params, adapter, lcfg):
    return jax.tree.map(lambda a, b: a - b, lora.merge(params, adapter, lcfg), params)


def test_algebra(model):
    _, params = model
    lcfg = MEMBERS["lora"]
    first, second = (moved(lora.init(KEY, params, lcfg), seed) for seed in (1, 2))
    d1, d2 = delta(params, first, lcfg), delta(params, second, lcfg)
    for made, want in (
        (lora.concatenate([first, second]), lambda a, b: a + b),
        (lora.concatenate([first, second], [2.0, -0.5]), lambda a, b: 2 * a - b / 2),
        (lora.average([first, second]), lambda a, b: (a + b) / 2),
        (lora.interpolate(first, second, 0.25), lambda a, b: 0.75 * a + 0.25 * b),
        (lora.negate(first), lambda a, b: -a),
    ):
        jax.tree.map(
            lambda got, a, b, want=want: np.testing.assert_allclose(got, want(a, b), atol=2e-5),
            delta(params, made, lcfg), d1, d2,
        )  # fmt: skip
    for name, words in (("dora", "magnitude vector, which cannot"), ("miss", "MiSS matrix, which cannot")):
        with pytest.raises(UserError, match=words):
            lora.concatenate([lora.init(KEY, params, MEMBERS[name])])


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_from_the_weights_becomes_a_plain_one(model, kind):
    _, params = model
    lcfg = LoraConfig(rank=4, init=kind)
    residual, begin = lora.init_from_weights(params, lcfg)
    now = moved(begin)
    want, got = lora.merge(residual, now, lcfg), lora.merge(params, lora.to_lora(now, begin), lcfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.slow
def test_a_truncated_rank_stays_truncated(model):
    import optax

    cfg, params = model
    lcfg = LoraConfig(rank=6)
    loss = lora.bind(next_token(cfg), params, lcfg)
    narrow = lora.init(KEY, params, dataclasses.replace(lcfg, rank=6))
    narrow = lora.truncate_rank(narrow, 2)
    tx = optax.adam(1e-2)
    state = tx.init(narrow)
    for _ in range(3):
        updates, state = tx.update(jax.grad(lambda a: loss(a, BATCH)[0].total)(narrow), state)
        narrow = optax.apply_updates(narrow, updates)
    for path, leaf in tree.flatten(narrow).items():
        rank_axis = -1 if path.endswith("/a") else -2
        off = np.moveaxis(np.asarray(leaf), rank_axis, 0)[2:]
        assert not off.any() and np.asarray(leaf).any()


def test_mistakes(model, tiny):
    _, params = model
    with pytest.raises(UserError, match=r"'blocks/attn/w/\*' matches no weight; there are .*blocks/attn/k/kernel"):
        lora.init(KEY, params, LoraConfig(targets="blocks/attn/w/* | blocks/attn/q/*"))
    with pytest.raises(UserError, match="DoRA supports kernels, not wte/embedding"):
        lora.init(KEY, params, LoraConfig(targets="*", dora=True))
    for settings, words in (
        (dict(targets="*"), "MiSS supports kernels, not wte/embedding"),
        (dict(dora=True), "MiSS has no magnitude vectors"),
        (dict(rank=33), "MiSS needs a rank of at most 32"),
    ):
        with pytest.raises(UserError, match=words):
            lora.init(KEY, params, LoraConfig(**({"rank": 4, "miss": True} | settings)))
    with pytest.raises(UserError, match="lora.miss=true starts from zero"):
        lora.init_from_weights(params, LoraConfig(init="pissa", miss=True))
    with pytest.raises(UserError, match="rank of a MiSS adapter cannot be truncated"):
        lora.truncate_rank(lora.init(KEY, params, MEMBERS["miss"]), 2)
    with pytest.raises(UserError, match="use lora.init_from_weights"):
        lora.init(KEY, params, LoraConfig(init="pissa"))
    with pytest.raises(UserError, match="use lora.init"):
        lora.init_from_weights(params, LoraConfig())
    adapter = lora.init(KEY, params, LoraConfig(rank=2))
    for given, lcfg, kind in (
        (adapter, MEMBERS["miss"], "LoRA"),
        (lora.init(KEY, params, MEMBERS["miss"]), LoraConfig(), "MiSS"),
    ):
        with pytest.raises(UserError, match=f"has a {kind} adapter: attach it with its config"):
            lora.attach(params, given, lcfg)
    other = tiny("gpt2", d_model=16, d_ff=20)[1]
    with pytest.raises(UserError, match=r"(?s)mlp/gate/kernel: the base has no such weight.*do not fit a weight"):
        lora.attach(other, adapter, LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"(?s)mlp/gate/kernel: the base has no such weight.*d \[.* do not fit"):
        lora.attach(other, lora.init(KEY, params, MEMBERS["miss"]), MEMBERS["miss"])
