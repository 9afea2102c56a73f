"""Partitions a model's params into trainable and frozen params, and combines the params again.

The setting `finetune.trainable` selects the trainable params.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from gptjax import lora, tree, weights
from gptjax._moved import moved_name
from gptjax.config import Config, LoraConfig, ModelConfig
from gptjax.errors import UserError, complaints
from gptjax.model.gpt import stack_layers, unstack_layers
from gptjax.ops.dropout import off
from gptjax.ops.quant import dequantize, quantize
from gptjax.optim import make_optimizer
from gptjax.training.task import Loss, StepFunctions
from gptjax.types import Params
from gptjax.weights import families


class Trainable(NamedTuple):
    """The trained and frozen params of a model, and functions that combine and save the params.

    Attributes:
        params: the trained params: {"adapter": .., "cls_head": ..}, a subset of the model's params, or all its params.
        frozen: the params that the optimizer does not update.
        combine: function (trained, frozen, settings) that returns the params for the loss. Weights with an adapter are
            `LoraWeight`s. `settings` is a LoraConfig whose scale and dropout may be tracers, by default cfg.lora.
        merge: function (trained, frozen) that returns the params to save: plain arrays, with the adapter merged.
        export: function (folder, trained, frozen) that writes the adapter in peft's format. The function does nothing
            if peft's format cannot represent the adapter.
    """

    params: Params
    frozen: Params
    combine: Callable[..., Params]
    merge: Callable[[Params, Params], Params]
    export: Callable[[Path, Params, Params], None]


def partition(
    cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, fingerprint: str = ""
) -> Trainable:
    """Partitions the params of a model into trained and frozen params, as set by cfg.finetune.trainable.

    The function `partition` can be traced by JAX.

    Args:
        params: the params of the base model.
        heads: params of new heads, such as {"cls_head": ..}, which are always trained.
        key: random key for the adapter's initialisation.
        fingerprint: hash of the base model's weights, written with an exported adapter.

    Raises:
        UserError: an alternative of the pattern finetune.trainable matches no parameter, or the adapter config does not
            fit the weights.
    """
    which = cfg.finetune.trainable
    if which == "lora":
        return _adapted(cfg, params, heads, model, key, fingerprint)
    whole = params | heads
    if which == "all":
        return Trainable(whole, {}, _trained_only, _trained_only, no_export)
    trained, frozen = _split(cfg, whole, heads, model)
    if "blocks_0" in trained or "blocks_0" in frozen:
        return Trainable(trained, frozen, _join, lambda a, b: stack_layers(tree.join(a, b), model), no_export)
    return Trainable(trained, frozen, _join, _join, no_export)


def step_functions(cfg: Config, loss: Loss, combine: Callable[..., Params]) -> StepFunctions:
    """Returns the `StepFunctions` of a fine-tuning run: the loss, the function `combine` and the optimizer.

    Args:
        cfg: the config, whose hyperparameters may be tracers.
        combine: function that returns the params for the loss, as `Trainable.combine`.
    """
    return StepFunctions(with_dropout(cfg, loss), partial(combine, settings=cfg.lora), optimizer(cfg))


def _trained_only(trained: Params, frozen: Params, settings: LoraConfig | None = None) -> Params:
    return trained


def _join(trained: Params, frozen: Params, settings: LoraConfig | None = None) -> Params:
    return tree.join(trained, frozen)


def split_heads(params: Params) -> tuple[Params, Params]:
    """Splits params into the params of the base model and the params of the heads that fine-tuning adds."""
    heads = {name: leaf for name, leaf in params.items() if name == "cls_head"}
    return {name: leaf for name, leaf in params.items() if name not in heads}, heads


def frozen_share(cfg: Config, n_params: int, n_trained: int) -> float:
    """Returns the fraction of the model's parameters that are frozen.

    If an adapter is trained, the fraction of frozen parameters is 1, because the whole base model is frozen.
    """
    return 1.0 if cfg.finetune.trainable == "lora" else 1 - n_trained / n_params


def with_dropout(cfg: Config, loss: Loss) -> Loss:
    """Adds dropout on the adapter's input to the loss function, if an adapter is trained and lora.dropout is not 0."""
    return lora.with_dropout(loss) if cfg.finetune.trainable == "lora" and not off(cfg.lora.dropout) else loss


def abstract_trained(cfg: Config, params: Params, heads: Params, model: ModelConfig) -> Params:
    """Returns the shapes of the trained params, given the shapes of the base model's params and of the heads."""
    if cfg.finetune.trainable == "lora":
        settings = dataclasses.replace(cfg.lora, init="lora", dora=False)
        adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, settings))
        return {"adapter": adapter, **heads}
    if cfg.finetune.trainable == "all":
        return params | heads
    return jax.eval_shape(lambda whole: _split(cfg, whole, heads, model)[0], params | heads)


def optimizer(cfg: Config) -> optax.GradientTransformation:
    """Returns the config's optimizer, with LoRA+ (arXiv:2402.12354) if lora.lr_ratio is not 1.

    In LoRA+, the learning rate of the adapter's matrices `b` (B in the paper) is multiplied by lora.lr_ratio.
    """
    tx = make_optimizer(cfg.optim, cfg.train.max_steps)
    if cfg.finetune.trainable != "lora" or cfg.lora.lr_ratio == 1:
        return tx
    faster = optax.stateless(
        lambda updates, _: tree.map_paths(
            lambda path, u: u * cfg.lora.lr_ratio if path.startswith("adapter/") and path.endswith("/b") else u, updates
        )
    )
    return optax.chain(tx, faster)


def _split(cfg: Config, whole: Params, heads: Params, model: ModelConfig) -> tuple[Params, Params]:
    """Splits the params of the whole model into (trained, frozen) by the pattern in finetune.trainable.

    If the pattern in finetune.trainable names a single layer, such as blocks/11/*, the stacked layers are unstacked
    first.
    """
    pattern = " | ".join([cfg.finetune.trainable, *(f"{name}/*" for name in heads)])
    if re.search(r"\bblocks/\d", pattern):
        pattern = re.sub(r"\bblocks/(\d+)", r"blocks_\1", pattern)
        whole = unstack_layers(whole, model)
    try:
        return tree.split(whole, pattern)
    except UserError as error:
        raise UserError(f"finetune.trainable: {error}") from error


def _adapted(
    cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, fingerprint: str
) -> Trainable:
    settings, start, body = cfg.lora, None, dataclasses.replace(model, n_classes=0, cls_bias=True)
    if settings.init != "lora":
        params, adapter = lora.init_from_weights(params, settings)
        start = jax.tree.map(lambda a: a.copy(), adapter)
    params = quantize(params, cfg.finetune.quantize)
    if start is None:
        adapter = lora.init(key, params, settings)

    def combine(trained: Params, frozen: Params, settings: LoraConfig = settings) -> Params:
        return lora.attach(frozen, with_heads(trained), settings)

    def merge(trained: Params, frozen: Params) -> Params:
        return dequantize(lora.merge(frozen, with_heads(trained), settings))

    def export(folder: Path, trained: Params, frozen: Params) -> None:
        adapter, config = trained["adapter"], settings
        if start is not None:
            adapter = lora.to_lora(adapter, start)
            # The adapter that `to_lora` returns has twice the rank of the trained adapter. An adapter's scale depends
            # on alpha and the rank, so alpha is multiplied by the factor that keeps the scale unchanged when the rank
            # is doubled.
            scaling = {"alpha/r": 2, "alpha/sqrt(r)": 2**0.5, "alpha": 1}
            alpha = settings.alpha * scaling[settings.scaling]
            config = dataclasses.replace(settings, init="lora", rank=2 * settings.rank, alpha=alpha)
        head = trained.get("cls_head")
        if head and "bias" in head:
            head = None  # A head with a bias is not exported, because peft's format does not support it.
        weights.export_peft(folder, adapter, config, body, head=head, base=fingerprint, base_name=cfg.finetune.base)

    # The adapter is exported only if `fits` is True, which means that peft's format can represent the adapter.
    has_family = not complaints(families.family_of, body)
    fits = has_family and not (settings.dora and settings.init != "lora") and "embedding" not in settings.targets
    fits = fits and not (settings.miss and weights.peft.has_conv1d(body))
    return Trainable({"adapter": adapter, **heads}, params, combine, merge, export if fits else no_export)


def with_heads(trained: Params) -> Params:
    """Returns one dict with the params of the adapter and of the heads, for the argument `adapter` of `lora.attach`."""
    heads = {name: leaf for name, leaf in trained.items() if name != "adapter"}
    return trained["adapter"] | heads


def no_export(folder: Path, trained: Params, frozen: Params) -> None:
    pass


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
