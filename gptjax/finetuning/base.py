"""What every fine-tuning shares: the base, the part of it that moves, and how the two become params again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from gptjax import lora, tree, weights
from gptjax.config import COMPUTED, Config, LoraConfig, ModelConfig
from gptjax.model.gpt import layers_apart, layers_stacked
from gptjax.ops.quant import dequantize, quantize
from gptjax.optim import make_optimizer
from gptjax.types import Params, UserError
from gptjax.weights import families


class Parts(NamedTuple):
    """A model, taken apart for training.

    trained   what the optimizer sees: {"adapter": .., "cls_head": ..}, or a part of the params, or all
    frozen    the rest
    combine   (trained, frozen) -> params with `LoraWeight` leaves, as the loss reads them
    plain     (trained, frozen) -> params of plain arrays, as they are saved
    export    (folder, trained, frozen): the adapter by itself, in peft's format, where that can hold it
    """

    trained: Any
    frozen: Any
    combine: Callable[[Any, Any], Params]
    plain: Callable[[Any, Any], Params]
    export: Callable[[Path, Any, Any], None]


def base_model(cfg: Config) -> weights.Model:
    """The base of a fine-tuning, before any tensor is read."""
    return weights.open_model(cfg.finetune.base)


def model_config(cfg: Config, base: ModelConfig, **changes: Any) -> ModelConfig:
    """The base's, computed as the config says."""
    return dataclasses.replace(base, **{name: getattr(cfg.model, name) for name in COMPUTED}, **changes)


def parts(cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array) -> Parts:
    """`params` taken apart as cfg.finetune.trainable says.

    Args:
        params: of the base. heads: new ones, which are always trained, such as {"cls_head": ..}.

    Raises:
        UserError: a pattern that matches nothing; what the adapter's config asks for and the weights cannot.
    """
    which = cfg.finetune.trainable
    if which == "lora":
        return _adapted(cfg, params, heads, model, key)
    whole = params | heads
    if which == "all":
        return Parts(whole, {}, lambda trained, _: trained, lambda trained, _: trained, _nothing)
    trained, frozen = _split(cfg, whole, heads, model)
    if "blocks_0" in trained or "blocks_0" in frozen:
        return Parts(trained, frozen, tree.join, lambda a, b: layers_stacked(tree.join(a, b), model), _nothing)
    return Parts(trained, frozen, tree.join, tree.join, _nothing)


def _split(cfg: Config, whole: Params, heads: Params, model: ModelConfig) -> tuple[Params, Params]:
    """By pattern; where one names a layer, blocks/11/*, the layers are taken apart first."""
    pattern = " | ".join([cfg.finetune.trainable, *(f"{name}/*" for name in heads)])
    if re.search(r"\bblocks/\d", pattern):
        pattern = re.sub(r"\bblocks/(\d+)", r"blocks_\1", pattern)
        whole = layers_apart(whole, model)
    try:
        return tree.split(whole, pattern)
    except UserError as error:
        raise UserError(f"finetune.trainable: {error}") from error


def _adapted(cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array) -> Parts:
    settings, start = cfg.lora, None
    fingerprint, body = weights.fingerprint(params), dataclasses.replace(model, n_classes=0)
    if settings.init != "lora":
        params, adapter = lora.split(params, settings)
        start = jax.tree.map(lambda a: a.copy(), adapter)
    params = quantize(params, cfg.finetune.quantize)
    if start is None:
        adapter = lora.init(key, params, settings)

    def combine(trained: Any, frozen: Params) -> Params:
        both = lora.attach(frozen, trained["adapter"], settings)
        return both | {name: trained[name] for name in heads}

    def plain(trained: Any, frozen: Params) -> Params:
        merged = dequantize(lora.merge(frozen, trained["adapter"], settings))
        return merged | {name: trained[name] for name in heads}

    def export(folder: Path, trained: Any, frozen: Params) -> None:
        adapter, config = trained["adapter"], settings
        if start is not None:
            adapter = lora.unsplit(adapter, start)
            config = dataclasses.replace(settings, init="lora", rank=2 * settings.rank, alpha=_same_scale(settings))
        weights.export_peft(folder, adapter, config, body, base=fingerprint, base_name=cfg.finetune.base)

    return Parts(
        {"adapter": adapter, **heads}, params, combine, plain, export if _for_peft(settings, body) else _nothing
    )


def _for_peft(settings: LoraConfig, model: ModelConfig) -> bool:
    """Whether peft's format can hold such an adapter; where it cannot, the merged model is all there is."""
    try:
        families.family_of(model)
    except UserError:
        return False
    return not (settings.dora and settings.init != "lora") and "embedding" not in settings.targets


def _same_scale(settings: Any) -> float:
    """alpha of twice the rank for the same scale."""
    return settings.alpha * {"alpha/r": 2, "alpha/sqrt(r)": 2**0.5, "alpha": 1}[settings.scaling]


def _nothing(folder: Path, trained: Any, frozen: Any) -> None:
    pass


def abstract_trained(cfg: Config, params: Params, heads: Params, model: ModelConfig) -> Any:
    """The shapes of `Parts.trained`, from shapes."""
    if cfg.finetune.trainable == "lora":
        settings = dataclasses.replace(cfg.lora, init="lora", dora=False)
        adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, settings))
        return {"adapter": adapter, **heads}
    if cfg.finetune.trainable == "all":
        return params | heads
    return jax.eval_shape(lambda whole: _split(cfg, whole, heads, model)[0], params | heads)


def optimizer(cfg: Config) -> optax.GradientTransformation:
    """The config's, with LoRA+'s larger rate for b (arXiv:2402.12354) where lora.lr_ratio is not 1."""
    tx = make_optimizer(cfg.optim, cfg.train.max_steps)
    if cfg.finetune.trainable != "lora" or cfg.lora.lr_ratio == 1:
        return tx
    faster = optax.stateless(
        lambda updates, _: tree.map_paths(
            lambda path, u: u * cfg.lora.lr_ratio if path.startswith("adapter/") and path.endswith("/b") else u, updates
        )
    )
    return optax.chain(tx, faster)


def loss_with_dropout(cfg: Config, loss: Callable) -> Callable:
    return lora.with_dropout(loss) if cfg.finetune.trainable == "lora" and cfg.lora.dropout else loss


def describe(cfg: Config, n_params: int, n_trained: int) -> list[str]:
    """Lines on what moves."""
    share = f"{n_trained:,} trained ({n_trained / n_params:.2%})"
    lines = [f"model   {cfg.finetune.base}: {n_params:,} parameters, {share}"]
    if cfg.finetune.trainable == "lora":
        lines.append(
            f"lora    rank {cfg.lora.rank}, scale {cfg.lora.scale:g} ({cfg.lora.scaling}, alpha {cfg.lora.alpha:g}), "
            f"{cfg.lora.targets}"
        )
    return lines
