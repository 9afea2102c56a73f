"""Programs of gptjax to trace for an accelerator: functions and the shapes of their arguments.

Nothing is allocated or run: every argument is a `jax.ShapeDtypeStruct`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp

from gptjax import LoraConfig, lora
from gptjax.config import ARCHS, Config, ModelConfig
from gptjax.config.uses import TUNINGS
from gptjax.data.classification import LabelledBatch
from gptjax.data.preferences import PairBatch
from gptjax.generation import decode, sampling, speculative
from gptjax.losses import classify, next_token, preference, reward_model
from gptjax.losses.preference import LOSSES
from gptjax.model import activations, gpt
from gptjax.model.cache import init_cache
from gptjax.ops import device
from gptjax.ops.quant import quantize
from gptjax.optim import make_optimizer
from gptjax.planning import program as planning
from gptjax.tasks import find, trainable
from gptjax.training.step import make_train_step
from gptjax.types import Batch

# Rows of a batch. 11 divides the size of no parameter, so an array holds activations if and only if 11 divides its
# size. `traced_dtypes` relies on this.
ROWS = 11
LOWERING = {"gpu": "cuda", "tpu": "tpu"}  # platform name in gptjax: platform name for lowering in jax
HINTS = get_type_hints(ModelConfig)
BOTH = list(itertools.product(LOWERING, get_args(HINTS["dtype"])))  # (platform, dtype)
ALL = bool(os.environ.get("GPTJAX_ALL_TRACES"))
KEY = jax.eval_shape(lambda: jax.random.key(0))
LORA = LoraConfig(rank=8, targets="*/kernel", dropout=0.1)
DORA = LoraConfig(rank=8, dora=True)
MISS = LoraConfig(rank=8, miss=True, dropout=0.1)
TABLES = LoraConfig(rank=8, targets="*/embedding")
SAMPLER = sampling.chain(
    sampling.repetition_penalty(1.2), sampling.temperature(0.8), sampling.top_k(20), sampling.top_p(0.9),
    sampling.min_p(0.05),
)  # fmt: skip


class Setting(NamedTuple):
    """Shape of the batch: B rows of T tokens, with documents (`segment_ids`) or without."""

    documents: bool = True
    length: int = 128
    rows: int = ROWS


class Program(NamedTuple):
    """A function and its arguments.

    fn                  returns a dict; `traced_dtypes` checks the entries logits, loss, gradient, params, saved,
                        activations and cache
    wide_products       number of products with activations that have a float32 operand in a bfloat16 model
    scattered           number of scatter-adds that are bfloat16
    unchecked           checks to skip, "loops" or "saved"; the docstring of the program gives the reason
    """

    fn: Callable[..., dict[str, Any]]
    args: tuple
    wide_products: int = 0
    scattered: int = 0
    unchecked: tuple[str, ...] = ()


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def parameters(cfg: ModelConfig) -> Any:
    params = gpt.abstract_params(cfg)
    assert all(math.prod(leaf.shape) % ROWS for leaf in jax.tree.leaves(params)), "11 divides the size of a parameter"
    return params


def eager(jitted: Callable) -> Callable:
    """The function inside `jax.jit`, which would reuse its trace for another platform.

    jax caches traces by the arguments, and `compiling_for` is not among them.
    """
    return jitted.__wrapped__


def _batch(setting: Setting) -> Batch:
    tokens = ids(setting.rows, setting.length)
    return Batch(tokens, tokens, floats(*tokens.shape), tokens if setting.documents else None)


def _gradient(loss: Callable, trained: Any, *rest: Any) -> dict[str, Any]:
    """Value and gradient of `loss(trained, *rest) -> (Mean, metrics)`.

    "saved" has the residuals of the backward pass, the leaves of the function that `jax.vjp` returns.
    """

    def total(trained: Any) -> Any:
        mean, metrics = loss(trained, *rest)
        return mean.total, (mean.weight, metrics)

    value, backward, metrics = jax.vjp(total, trained, has_aux=True)
    saved = [leaf for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)]
    return {"loss": value, "gradient": backward(jnp.ones_like(value))[0], "saved": saved, "metrics": metrics}


# ---------------------------------------------------------------- uses of a model: (cfg, setting) -> Program


def init(cfg: ModelConfig, setting: Setting) -> Program:
    rolled = dataclasses.replace(cfg, unroll=False)
    return Program(lambda key: {"params": eager(gpt._init)(key, rolled)}, (KEY,))


def forward(cfg: ModelConfig, setting: Setting) -> Program:
    def fn(params, batch):
        return {"logits": gpt.forward(params, batch.tokens, cfg, segment_ids=batch.segment_ids)}

    return Program(fn, (parameters(cfg), _batch(setting)))


def gradient(cfg: ModelConfig, setting: Setting, arrange: Callable = lambda params, cfg: params) -> Program:
    """Value and gradient of the pretraining loss; `arrange` changes the parameters first."""
    loss = next_token(cfg)
    params = jax.eval_shape(lambda params: arrange(params, cfg), parameters(cfg))
    return Program(functools.partial(_gradient, loss), (params, _batch(setting), KEY))


def cached_step(cfg: ModelConfig, setting: Setting, cache_dtype: str | None = None) -> Program:
    """Prefill of an empty cache with a prompt, then a step with one token."""
    rows, T = setting.rows, setting.length // 2

    def fn(params, prompt, lengths, token):
        cache = init_cache(cfg, rows, setting.length, cache_dtype)
        first, cache = gpt.extend(params, prompt, cfg, cache, lengths=lengths)
        logits, cache = gpt.extend(gpt.for_decoding(params, cfg), token, cfg, cache)
        return {"logits": (first, logits), "cache": cache}

    return Program(fn, (parameters(cfg), ids(rows, T), ids(rows), ids(rows, 1)))


def generate(cfg: ModelConfig, setting: Setting) -> Program:
    """The whole decoding loop with all filters and two samples per prompt.

    More tokens are generated than the context holds, so that the program contains the refill of the cache.
    """
    max_new = 2 * cfg.context_length
    prompt = min(32, cfg.context_length)
    settings = decode._Settings(cfg, SAMPLER, prompt + max_new, max_new, 2, 3, cfg.vocab_size - 1, cfg.dtype)

    def fn(params, prompt, lengths, key, stop):
        decode_params = gpt.for_decoding(params, cfg)
        state = eager(decode._start)(params, prompt, lengths, key, stop, settings, {})
        state = eager(decode._decode_loop)(params, decode_params, state, key, stop, jnp.int32(max_new), settings, {})
        return state._asdict()

    return Program(fn, (parameters(cfg), ids(setting.rows, prompt), ids(setting.rows), KEY, ids(8)))


def speculate(cfg: ModelConfig, setting: Setting) -> Program:
    """Speculative decoding, with the model itself as the draft."""
    rows, T, max_new = setting.rows, setting.length // 4, setting.length // 2
    settings = speculative._Settings(cfg, cfg, sampling.draw, T + max_new, max_new, 4, 3, cfg.vocab_size - 1, None)

    def fn(params, prompt, lengths, key, stop):
        out = eager(speculative._speculate)(params, params, prompt, lengths, stop, jnp.int32(8), key, settings)
        return {"tokens": out}

    return Program(fn, (parameters(cfg), ids(rows, T), ids(rows), KEY, ids(8)))


def adapter(cfg: ModelConfig, setting: Setting, settings: LoraConfig = LORA, **allowed: Any) -> Program:
    """LoRA: loss and gradient of the adapter, and the merged weights."""
    loss = lora.with_dropout(next_token(cfg))

    def fn(adapter, params, batch, key):
        out = _gradient(lambda adapter, *rest: loss(lora.attach(params, adapter, settings), *rest), adapter, batch, key)
        return {**out, "params": lora.merge(params, adapter, settings)}

    params = parameters(cfg)
    trained = jax.eval_shape(lambda key, params: lora.init(key, params, settings), KEY, params)
    return Program(fn, (trained, params, _batch(setting), KEY), **allowed)


def adapter_of_tables(cfg: ModelConfig, setting: Setting) -> Program:
    """LoRA of the embedding tables, which is computed in float32, as the lookup in the table is.

    Each table has one product in the forward and two in the backward pass, for which rows of `a` are saved. A tied head
    uses the sum of table and adapter in one plain product.
    """
    tables = 2 if cfg.position == "learned" else 1
    return adapter(cfg, setting, TABLES, wide_products=3 * tables, unchecked=("saved",))


def adapters_by_row(cfg: ModelConfig, setting: Setting) -> Program:
    """Another adapter for each row. 11 divides the sizes of the stacked adapters, so loops are not checked."""
    settings = LoraConfig(rank=8)

    def fn(adapters, params, tokens, rows, scales):
        attached = lora.attach(params, lora.rows(adapters, rows), settings, scales=scales)
        return {"logits": gpt.forward(attached, tokens, cfg)}

    params = parameters(cfg)
    pair = jax.eval_shape(lambda key, params: lora.init(key, params, settings), KEY, params)
    rows, T = setting.rows, setting.length
    return Program(fn, ([pair, pair], params, ids(rows, T), ids(rows), floats(rows)), unchecked=("loops",))


def quantized(cfg: ModelConfig, setting: Setting, kind: str) -> Program:
    """A quantised base: gradient of an adapter of two kernels, and a decode step of one token."""
    settings, loss = (
        LoraConfig(rank=8, targets="blocks/attn/q/kernel | blocks/mlp/down/kernel"),
        next_token(cfg),
    )

    def fn(adapter, base, batch, key, token):
        out = _gradient(lambda adapter, *rest: loss(lora.attach(base, adapter, settings), *rest), adapter, batch, key)
        cache = init_cache(cfg, setting.rows, setting.length, cfg.dtype).replace(empty=False)
        logits, cache = gpt.extend(base, token, cfg, cache)
        return {**out, "logits": logits, "cache": cache}

    base = jax.eval_shape(lambda params: quantize(params, kind), parameters(cfg))
    trained = jax.eval_shape(lambda key, base: lora.init(key, base, settings), KEY, base)
    return Program(fn, (trained, base, _batch(setting), KEY, ids(setting.rows, 1)))


def classifier(cfg: ModelConfig, setting: Setting, pooling: str = "last") -> Program:
    """Classification loss and gradient.

    The products of the head are float32 (one vector per text), one in the forward and two in the backward pass. Mean
    pooling adds two. Without it, the gradient of the pooled token is a scatter-add, which never adds two terms.
    """
    cfg = dataclasses.replace(cfg, n_classes=3)
    tokens, labels = ids(setting.rows, setting.length), ids(setting.rows, 2)
    batch = LabelledBatch(tokens, tokens, labels, floats(*labels.shape))
    loss = classify(cfg, pooling)
    args = (parameters(cfg), batch, KEY)
    return Program(functools.partial(_gradient, loss), args, 5 if pooling == "mean" else 3, int(pooling != "mean"))


def preferences(cfg: ModelConfig, setting: Setting, kind: str) -> Program:
    """Preference loss: log-probabilities are summed per answer by a float32 product, forward and backward."""
    tokens, pairs = ids(setting.rows, setting.length), 2
    weights, present, reference = (
        floats(*shape) for shape in (tokens.shape, (setting.rows, pairs), (setting.rows, pairs, 2))
    )
    batch = PairBatch(tokens, tokens, weights, tokens, present, reference)
    loss = preference(cfg, kind)
    return Program(functools.partial(_gradient, loss), (parameters(cfg), batch, KEY), 2)


def rewards(cfg: ModelConfig, setting: Setting) -> Program:
    """Loss and gradient of a reward model, whose head is that of `classifier`."""
    cfg = dataclasses.replace(cfg, n_classes=1)
    tokens, pairs = ids(setting.rows, setting.length), 2
    weights, present, reference = (
        floats(*shape) for shape in (tokens.shape, (setting.rows, pairs), (setting.rows, pairs, 2))
    )
    batch = PairBatch(tokens, tokens, weights, tokens, present, reference)
    return Program(functools.partial(_gradient, reward_model(cfg, 0.01)), (parameters(cfg), batch, KEY), 3, 1)


def tapped(cfg: ModelConfig, setting: Setting) -> Program:
    """Reads every activation, in the forward pass and in a step with a cache."""
    names = activations.names(cfg)

    def fn(params, batch):
        logits, acts = gpt.tapped(params, batch.tokens, cfg, names, segment_ids=batch.segment_ids)
        cache = init_cache(cfg, setting.rows, setting.length, cfg.dtype)
        cached_logits, cache, cached_acts = gpt.extend_tapped(params, batch.tokens, cfg, cache, names)
        return {"logits": (logits, cached_logits), "activations": (acts, cached_acts), "cache": cache}

    return Program(fn, (parameters(cfg), _batch(setting)))


def patched(cfg: ModelConfig, setting: Setting) -> Program:
    """Replaces every activation."""

    def fn(params, batch, factors, direction):
        return {"logits": _patched_logits(cfg, params, batch, factors, direction)}

    return Program(fn, (parameters(cfg), _batch(setting), *_patches(cfg)))


def gradient_of_patches(cfg: ModelConfig, setting: Setting) -> Program:
    """Gradient of the logits with respect to the parameters of patches.

    The patches compute and save activations in their own dtype, float32. Patched attention probabilities disable the
    kernel and lead to four float32 products.
    """

    def fn(params, batch, *patches):
        out, backward = jax.vjp(functools.partial(_patched_logits, cfg, params, batch), *patches)
        return {"logits": out, "gradient": backward(out)}

    args = (parameters(cfg), _batch(setting), *_patches(cfg))
    return Program(fn, args, wide_products=4, unchecked=("loops",))


def _patches(cfg: ModelConfig) -> tuple[Any, Any]:
    factors = {name: floats(cfg.n_layer) if "*" in name else floats() for name in activations.names(cfg)}
    return factors, floats(cfg.d_model)


def _patched_logits(cfg: ModelConfig, params: Any, batch: Batch, factors: Any, direction: Any) -> jax.Array:
    patches = {name: activations.scale(factor) for name, factor in factors.items()}
    patches[f"blocks/{cfg.n_layer - 1}/resid"] = activations.add(direction)
    return gpt.forward(params, batch.tokens, cfg, segment_ids=batch.segment_ids, patches=patches)


def traced_dropout(cfg: ModelConfig, setting: Setting) -> Program:
    """The dropout rate is a traced argument, as in a sweep over it."""

    def fn(params, batch, key, rate):
        loss = next_token(dataclasses.replace(cfg, dropout=rate))
        return _gradient(loss, params, batch, key)

    return Program(fn, (parameters(cfg), _batch(setting), KEY, floats()))


USES: dict[str, Callable[[ModelConfig, Setting], Program]] = {
    "init": init,
    "forward": forward,
    "gradient": gradient,
    "cached step": cached_step,
    "generate": generate,
    "lora": adapter,
    "dora": functools.partial(adapter, settings=DORA),
    "int8": functools.partial(quantized, kind="int8"),
    "nf4": functools.partial(quantized, kind="nf4"),
    "classify": classifier,
    "dpo": functools.partial(preferences, kind="dpo"),
    "taps": tapped,
    "patches": patched,
}
MORE_USES: dict[str, Callable[[ModelConfig, Setting], Program]] = {
    "unstacked layers": functools.partial(gradient, arrange=gpt.unstack_layers),
    "traced dropout": traced_dropout,
    "miss": functools.partial(adapter, settings=MISS),
    "gradient of patches": gradient_of_patches,
    "lora of tables": adapter_of_tables,
    "cached step, int8 cache": functools.partial(cached_step, cache_dtype="int8"),
    "speculate": speculate,
    "adapters by row": adapters_by_row,
    "classify, mean": functools.partial(classifier, pooling="mean"),
    "reward model": rewards,
    **{kind: functools.partial(preferences, kind=kind) for kind in LOSSES if kind != "dpo"},
}


# ---------------------------------------------------------------- training step of a preset


def train_step(cfg: Config) -> Program:
    """The training step of `gptjax pretrain` or `gptjax finetune` with its optimizer; cfg.model is that of the base."""
    rows, T = ROWS * cfg.train.accumulation, planning.width(cfg)
    if cfg.task == "pretrain":
        tx, loss = make_optimizer(cfg.optim, cfg.train.max_steps), next_token(cfg.model)
    else:
        tx, loss = trainable.optimizer(cfg), trainable.with_dropout(cfg, find(cfg.task).loss(cfg))
    create, combine = planning._state(cfg, tx)
    step = make_train_step(loss, tx, combine=combine, accumulation=cfg.train.accumulation)
    state = jax.eval_shape(create, KEY)

    def fn(state, batch):
        state, metrics = step(state, batch)
        return {"params": state.params, "loss": metrics["loss"], "state": state}

    mean = cfg.classify.pooling == "mean"
    wide = {"prefer": 2, "classify": 5 if mean else 3, "reward_model": 3}
    wide = dict.fromkeys(("pretrain", *TUNINGS), 0) | wide
    scattered = int(cfg.task == "reward_model" or (cfg.task == "classify" and not mean))
    return Program(fn, (state, find(cfg.task).batch_shapes(cfg, rows, T)), wide[cfg.task], scattered)


# ---------------------------------------------------------------- fields of ModelConfig

SIZES = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, vocab_size=96, context_length=256)
EVERYWHERE = ("arch", "dtype")  # fields that are varied in all tests anyway

# Other values to test of fields that are neither flags nor choices.
VALUES: dict[str, tuple[Any, ...]] = dict(
    vocab_size=(130,), context_length=(200,), n_layer=(3,), n_head=(8,), n_kv_head=(1, 4), d_head=(32,), d_model=(96,),
    d_ff=(160,), rope_base=(500_000.0,), rope_factor=(8.0,), rope_slow=(2.0,), rope_fast=(8.0,),
    rope_original_context=(64,), rope_local_base=(1000.0,), sliding_window=(40,), window_pattern=("SL",),
    norm_eps=(1e-3,), n_classes=(3,), qk_gain=(1.2,), attention_scale=(0.1,), embed_gain=(8.0,), logit_softcap=(15.0,),
    embed_std=(1.0,), dropout=(0.1,),
)  # fmt: skip

# Values of other fields without which a field has no effect.
_LLAMA3 = dict(position="rope", rope_scaling="llama3", rope_factor=8.0)
COMPANIONS: dict[str, dict[str, Any]] = dict(
    rope_base=dict(position="rope"), rope_scaling=dict(position="rope", rope_factor=8.0),
    rope_factor=dict(position="rope", rope_scaling="linear"), rope_slow=_LLAMA3, rope_fast=_LLAMA3,
    rope_original_context=_LLAMA3, rope_local_base=dict(position="rope", sliding_window=40, window_pattern="SL"),
    window_pattern=dict(sliding_window=40), qk_norm_over=dict(qk_norm=True), qk_gain=dict(qk_norm=True),
    cls_bias=dict(n_classes=3), zero_init_head=dict(tie_embeddings=False),
)  # fmt: skip

# Fields that only change constants of a program: `constants` changes all of them at once.
CONSTANTS = ("rope_base", "rope_slow", "rope_fast", "rope_original_context", "norm_eps", "embed_std")


def model(arch: str = "gpt2", **switches: Any) -> ModelConfig:
    return ModelConfig(**{"arch": arch, **SIZES, **switches})


def other_values(name: str, base: ModelConfig, values: dict[str, tuple[Any, ...]] = VALUES) -> tuple[Any, ...]:
    """Values of a field of ModelConfig other than that of `base`: the other choices, or those in `values`.

    Raises:
        KeyError: the field is a number or a text and `values` does not have it.
    """
    hint, current = HINTS[name], getattr(base, name)
    optional = get_args(hint) if get_origin(hint) is Union else (hint,)
    kind = next(option for option in optional if option is not type(None))
    choices = get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else values[name]
    return tuple(value for value in choices if value != current)


def switches(base: ModelConfig) -> dict[str, ModelConfig]:
    """{"name=value": config} for each field of ModelConfig, changed with its companions only."""
    configs = {}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("_derived", *EVERYWHERE):
            companions = COMPANIONS.get(field.name, {})
            for value in other_values(field.name, dataclasses.replace(base, **companions)):
                configs[f"{field.name}={value}"] = dataclasses.replace(base, **{**companions, field.name: value})
    return configs


def constants(base: ModelConfig) -> ModelConfig:
    changed = {name: other_values(name, base)[0] for name in CONSTANTS}
    return dataclasses.replace(base, **_LLAMA3, **changed)


def uses_of(subject: int, platform: str, dtype: str, uses: Iterable[str], core: Iterable[str]) -> tuple[str, ...]:
    """The uses that the slow tests trace for a platform and dtype.

    `core` is traced for both platforms and dtypes. The other uses are traced in bfloat16 only, because float32 cannot
    be promoted, and on alternating platforms, because these differ in attention only. GPTJAX_ALL_TRACES=1: all uses.

    Args:
        subject: index of the config, which decides which platform comes first.
    """
    platform_index = list(LOWERING).index(platform)
    return tuple(
        use
        for i, use in enumerate(uses)
        if ALL or use in core or (dtype == "bfloat16" and (subject + i) % len(LOWERING) == platform_index)
    )


def switch_cases() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """("arch field=value", platform, dtype, uses): all fields with arch=gpt2, and the flags that `modern` sets."""
    names = [f"gpt2 {name}" for name in switches(model("gpt2"))]
    flags = {f"{name}={not on}" for name, on in ARCHS["modern"].items() if isinstance(on, bool)}
    names += [f"modern {name}" for name in switches(model("modern")) if name in flags]
    return [
        (name, platform, dtype, uses_of(n, platform, dtype, USES, ("gradient", "cached step")))
        for n, name in enumerate(names)
        for platform, dtype in BOTH
    ]


# ---------------------------------------------------------------- tracing


def trace(program: Program, platform: str) -> Any:
    with device.compiling_for(platform):
        return jax.jit(lambda *args: program.fn(*args)).trace(*program.args)


def lower(traced: Any, platform: str) -> Any:
    with device.compiling_for(platform):
        return traced.lower(lowering_platforms=(LOWERING[platform],))
