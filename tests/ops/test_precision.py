"""Tests that every matrix product, forward and backward, has the precision of `model.precision`."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision
from jax.sharding import AxisType

import gptjax
from gptjax import lora
from gptjax.config import LoraConfig
from gptjax.generation import for_decoding
from gptjax.losses import classify, next_token, preference
from gptjax.model.cache import init_cache
from gptjax.ops.attention import attention
from gptjax.ops.device import AXES, compiling_for
from gptjax.ops.quant import quantize
from gptjax.research import curvature, influence
from gptjax.types import Batch, Mean

T = 128  # long enough for two blocks of queries, and a multiple of 128 for splash
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 17, (2, T)).astype(np.int32)
SEGMENTS = np.repeat([[1, 2]], T // 2, axis=1).repeat(2, 0).astype(np.int32)
BATCH = Batch(TOKENS, TOKENS, segment_ids=SEGMENTS)
KEY = jax.random.key(0)


class Labelled:
    tokens, segment_ids = TOKENS, SEGMENTS
    labels, weights = np.zeros((2, 2), np.int32), np.ones((2, 2), np.float32)


class Pairs:
    tokens, targets, segment_ids, weights = TOKENS, TOKENS, SEGMENTS, np.ones((2, T), np.float32)
    present, reference = np.ones((2, 1), np.float32), np.zeros((2, 1, 2), np.float32)


def gradient(loss, params, batch=BATCH, key=None):
    return jax.value_and_grad(lambda p: loss(p, batch, key)[0].total), (params,)


def whole(cfg, params):
    return gradient(next_token(cfg, chunk=64), params)


def one_chunk(cfg, params):
    return gradient(next_token(cfg), params)


def late(cfg, params):
    """`grad` of a jitted loss, which is differentiated after it has been traced."""
    loss = jax.jit(lambda p: next_token(cfg)(p, BATCH, None)[0].total)
    return jax.grad(loss), (params,)


def adapter(base=lambda params: params, **settings):
    def build(cfg, params):
        settings_ = LoraConfig(rank=4, targets="blocks/*/kernel | wte/* | lm_head/*", **settings)
        if settings_.dora or settings_.miss or settings_.dropout:
            settings_ = dataclasses.replace(settings_, targets="blocks/*/kernel | lm_head/*")
        pair = lora.init(KEY, params, settings_)
        loss = lora.bind(next_token(cfg), base(params), settings_)
        return jax.grad(lambda a: loss(a, BATCH, KEY)[0].total), (pair,)

    return build


def adapters_of_rows(cfg, params):
    settings = LoraConfig(rank=4)
    pair = lora.init(KEY, params, settings)
    return jax.grad(lambda a: gptjax.forward(lora.attach(params, a, settings), TOKENS, cfg).sum()), (
        lora.rows([pair, pair], [0, 1]),
    )


def quantised(kind):
    def build(cfg, params):
        return jax.grad(lambda x: gptjax.forward(small, TOKENS, cfg, patches={"embed": x}).sum()), (
            jnp.ones((2, T, cfg.d_model)),
        )

    small = None

    def quantise_and_build(cfg, params):
        nonlocal small
        small = quantize(params, kind)
        return build(cfg, params)

    return quantise_and_build


def preferences(cfg, params):
    return gradient(preference(cfg), params, Pairs)


def classes(pooling):
    return lambda cfg, params: gradient(classify(cfg, pooling), params, Labelled)


def prompt(cfg, params):
    return lambda p: gptjax.extend(p, TOKENS, cfg, init_cache(cfg, 2, 2 * T)), (params,)


def step(cfg, params):
    cache = dataclasses.replace(init_cache(cfg, 2, 2 * T), empty=False)
    return lambda p: gptjax.extend(p, TOKENS[:, :1], cfg, cache), (for_decoding(params, cfg),)


def weights_patched(cfg, params):
    patches = {"blocks/*/attn/weights": lambda x: 2 * x}
    return jax.grad(lambda p: gptjax.forward(p, TOKENS, cfg, patches=patches).sum()), (params,)


USES = {
    "forward": lambda cfg, params: (lambda p: gptjax.forward(p, TOKENS, cfg), (params,)),
    "tapped": lambda cfg, params: (lambda p: gptjax.tapped(p, TOKENS, cfg, "*/attn/weights"), (params,)),
    "gradient": whole, "one chunk of logits": one_chunk, "gradient of a jitted loss": late,
    "lora": adapter(), "lora with dropout": adapter(dropout=0.1), "dora": adapter(dora=True),
    "lora on int8": adapter(lambda params: quantize(params, "int8")), "adapters of rows": adapters_of_rows,
    "int8": quantised("int8"), "nf4": quantised("nf4"), "preferences": preferences,
    "classes": classes("last"), "classes, mean": classes("mean"), "prompt": prompt, "step": step,
    "weights patched": weights_patched, "miss": adapter(miss=True),
}  # fmt: skip


def dots(jaxpr):
    """(precision, dtype) of every product in a jaxpr, nested ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"], eqn.invars[0].aval.dtype
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from dots(getattr(inner, "jaxpr", inner))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def products(use, cfg, params):
    fn, args = USES[use](cfg, params)
    return list(dots(jax.make_jaxpr(fn)(*args).jaxpr))


@pytest.fixture(scope="module")
def build(tiny):
    def build(**switches):
        return tiny("llama", context_length=2 * T, d_head=16, **switches)

    return build


CASES = [(use, precision) for use in USES for precision in ("default", "highest")]
CASES += [(use, "high") for use in ("forward", "gradient of a jitted loss", "dora", "int8", "step")]


@pytest.mark.first_cases(12)
@pytest.mark.parametrize(("use", "precision"), CASES)
def test_every_product_has_the_requested_precision(build, use, precision):
    """Sums that are written as products are an exception: they always have the highest precision.

    These are the sum of log-probabilities and the mean of the hidden states of a text.
    """
    cfg, params = build(precision=precision, n_classes=2)
    with jax.default_matmul_precision(None):  # override the setting of the test suite
        precisions = {p for p, _ in products(use, cfg, params)}
    expected = None if precision == "default" else (Precision(precision),) * 2
    sums = {(Precision.HIGHEST,) * 2} if use in ("preferences", "classes, mean") else set()
    assert precisions == {expected} | sums


SWITCHES = [
    dict(remat="full"), dict(remat="dots"), dict(unroll=True), dict(tie_embeddings=True), dict(sliding_window=8),
    dict(position="alibi"), dict(arch="modern"), dict(dropout=0.1),
]  # fmt: skip


ACCELERATORS = [(changes, platform) for changes in (SWITCHES[0], SWITCHES[6]) for platform in ("gpu", "tpu")]


@pytest.mark.first_cases(6)
@pytest.mark.parametrize(("changes", "platform"), [*((changes, "cpu") for changes in SWITCHES), *ACCELERATORS], ids=str)
def test_the_precision_with_other_model_settings(tiny, changes, platform):
    switches = {"arch": "llama", "context_length": 2 * T, "d_head": 16, "precision": "highest", **changes}
    cfg, params = tiny(**switches)
    with compiling_for(platform), jax.default_matmul_precision(None):
        fn, args = gradient(next_token(cfg), params, key=KEY if cfg.dropout else None)
        dot_list = list(dots(jax.make_jaxpr(fn)(*args).jaxpr))
    assert {p for p, _ in dot_list} == {(Precision.HIGHEST,) * 2}
    assert len(dot_list) >= 3 * (7 + 2)  # per linear layer one forward and two backward products


def test_the_precision_under_a_mesh(build):
    cfg, params = build(precision="high")
    mesh = jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh), jax.default_matmul_precision(None):
        assert {p for p, _ in products("gradient", cfg, params)} == {(Precision.HIGH,) * 2}


@pytest.mark.first_cases(2)
@pytest.mark.parametrize(("use", "platform"), [
    ("gradient", "cpu"), ("gradient", "gpu"), ("gradient", "tpu"), ("lora", "gpu"), ("nf4", "tpu"),
])  # fmt: skip
def test_the_precision_does_not_change_a_bfloat16_program(build, use, platform):
    programs = []
    for precision in ("default", "highest"):
        cfg, params = build(precision=precision, dtype="bfloat16")
        fn, args = USES[use](cfg, params)
        with compiling_for(platform):
            programs.append(re.sub(r"0x\w+", "", str(jax.make_jaxpr(fn)(*args))))
    assert programs[0] == programs[1] and "dot_general" in programs[0]


def test_default_keeps_the_setting_of_jax(build):
    cfg, params = build()
    with jax.default_matmul_precision("highest"):
        assert {p for p, _ in products("gradient", cfg, params)} == {(Precision.HIGHEST,) * 2}
    cfg, params = build(precision="high")
    with jax.default_matmul_precision("highest"):
        assert {p for p, _ in products("gradient", cfg, params)} == {(Precision.HIGH,) * 2}


@pytest.mark.parametrize(
    ("precision", "on_tpu"), [(None, True), ("default", True), ("high", False), ("highest", False)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_splash_is_used_with_default_precision_only(precision, dtype, on_tpu):
    q = jnp.ones((1, T, 2, 64), dtype)
    with jax.default_matmul_precision(precision), compiling_for("tpu"):
        assert ("pallas_call" in str(jax.make_jaxpr(lambda q: attention(q, q, q))(q))) == on_tpu


@pytest.mark.slow
@pytest.mark.cpu
def test_a_cpu_computes_the_same_with_every_precision(build):
    cfg, params = build()
    results = [jax.jit(whole(dataclasses.replace(cfg, precision=p), params)[0])(params) for p in ("default", "highest")]
    jax.tree.map(np.testing.assert_array_equal, *results)


def merging(cfg, params):
    settings = LoraConfig(rank=4, dora=True)
    return lambda p, a: lora.merge(p, a, settings), (params, lora.init(KEY, params, settings))


def splitting(cfg, params):
    return lambda p: lora.init_from_weights(p, LoraConfig(rank=4, init="pissa", dora=True)), (params,)


def eigenvalues(cfg, params):
    return lambda w: curvature.eigenvalues(lambda w: (w**3).sum(), w, KEY, n=1, steps=3), (jnp.ones(5),)


def soup(cfg, params):
    return curvature.mix, (jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params), jnp.ones(2) / 2)


def clipping(cfg, params):
    def loss(w, batch, key):
        return Mean((w * batch).sum(), jnp.float32(1)), {}

    return lambda w, rows: influence.clipped_sum(loss, w, rows, clip=1.0), (jnp.ones(5), jnp.ones((4, 5)))


@pytest.mark.parametrize("use", [merging, splitting, eigenvalues, soup, clipping])
def test_computations_of_weights_and_sums_have_the_highest_precision(build, use):
    fn, args = use(*build())
    with jax.default_matmul_precision(None):
        precisions = [p for p, _ in dots(jax.make_jaxpr(fn)(*args).jaxpr)]
    assert set(precisions) == {(Precision.HIGHEST,) * 2}
