"""What of a model is trained: params taken apart into what the optimizer sees and the rest, and put together again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from gptjax import lora, tree, weights
from gptjax.config import Config, LoraConfig, ModelConfig
from gptjax.errors import UserError, complaints
from gptjax.model.gpt import layers_apart, layers_stacked
from gptjax.ops.dropout import off
from gptjax.ops.quant import dequantize, quantize
from gptjax.optim import make_optimizer
from gptjax.training.task import Loss, StepFunctions
from gptjax.types import Params
from gptjax.weights import families


class Trainable(NamedTuple):
    """A model, taken apart for training.

    params    what the optimizer sees: {"adapter": .., "cls_head": ..}, or a part of the params, or all
    frozen    the rest
    combine   (trained, frozen, LoraConfig) -> params with `LoraWeight` leaves, as the loss reads them; the last is left
              out but where its scale and dropout are traced
    merge     (trained, frozen) -> params of plain arrays, as they are saved
    export    (folder, trained, frozen): writes the adapter by itself, in peft's format, where that can hold it
    """

    params: Params
    frozen: Params
    combine: Callable[..., Params]
    merge: Callable[[Params, Params], Params]
    export: Callable[[Path, Params, Params], None]


def partition(
    cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, fingerprint: str = ""
) -> Trainable:
    """`params` taken apart as cfg.finetune.trainable says; it can be traced.

    Args:
        params: of the base. heads: new ones, which are always trained, such as {"cls_head": ..}. key: of the adapter's
            start. fingerprint: of the base, for an adapter that is written by itself.

    Raises:
        UserError: a pattern that matches nothing; what the adapter's config asks for and the weights cannot.
    """
    which = cfg.finetune.trainable
    if which == "lora":
        return _adapted(cfg, params, heads, model, key, fingerprint)
    whole = params | heads
    if which == "all":
        return Trainable(whole, {}, _first, _first, no_export)
    trained, frozen = _split(cfg, whole, heads, model)
    if "blocks_0" in trained or "blocks_0" in frozen:
        return Trainable(trained, frozen, _join, lambda a, b: layers_stacked(tree.join(a, b), model), no_export)
    return Trainable(trained, frozen, _join, _join, no_export)


def rules(cfg: Config, loss: Loss, combine: Callable[..., Params]) -> StepFunctions:
    """How a fine-tuning steps; `combine` as of `Trainable`. The numbers of `cfg` may be traced."""
    return StepFunctions(with_dropout(cfg, loss), partial(combine, settings=cfg.lora), optimizer(cfg))


def _first(trained: Params, frozen: Params, settings: LoraConfig | None = None) -> Params:
    return trained


def _join(trained: Params, frozen: Params, settings: LoraConfig | None = None) -> Params:
    return tree.join(trained, frozen)


def split_heads(params: Params) -> tuple[Params, Params]:
    """The base's params, and the heads that a fine-tuning adds."""
    heads = {name: leaf for name, leaf in params.items() if name == "cls_head"}
    return {name: leaf for name, leaf in params.items() if name not in heads}, heads


def frozen_share(cfg: Config, n_params: int, n_trained: int) -> float:
    """Of the model's weights, those without a gradient; an adapter's are none of them."""
    return 1.0 if cfg.finetune.trainable == "lora" else 1 - n_trained / n_params


def with_dropout(cfg: Config, loss: Loss) -> Loss:
    """`loss` with the low-rank branch's dropout, where there is any."""
    return lora.with_dropout(loss) if cfg.finetune.trainable == "lora" and not off(cfg.lora.dropout) else loss


def abstract_trained(cfg: Config, params: Params, heads: Params, model: ModelConfig) -> Params:
    """The shapes of `Trainable.params`, from shapes."""
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


def _adapted(
    cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, fingerprint: str
) -> Trainable:
    settings, start, body = cfg.lora, None, dataclasses.replace(model, n_classes=0, cls_bias=True)
    if settings.init != "lora":
        params, adapter = lora.split(params, settings)
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
            adapter = lora.unsplit(adapter, start)
            scaling = {"alpha/r": 2, "alpha/sqrt(r)": 2**0.5, "alpha": 1}  # the same scale, of twice the rank
            alpha = settings.alpha * scaling[settings.scaling]
            config = dataclasses.replace(settings, init="lora", rank=2 * settings.rank, alpha=alpha)
        head = trained.get("cls_head")
        if head and "bias" in head:
            head = None  # their format cannot hold it: the merged model does
        weights.export_peft(folder, adapter, config, body, head=head, base=fingerprint, base_name=cfg.finetune.base)

    # whether peft's format can hold such an adapter; where it cannot, the merged model is all there is
    of_a_family = not complaints(families.family_of, body)
    fits = of_a_family and not (settings.dora and settings.init != "lora") and "embedding" not in settings.targets
    return Trainable({"adapter": adapter, **heads}, params, combine, merge, export if fits else no_export)


def with_heads(trained: Params) -> Params:
    """The adapter with the heads beside it, as `lora.attach` takes both."""
    heads = {name: leaf for name, leaf in trained.items() if name != "adapter"}
    return trained["adapter"] | heads


def no_export(folder: Path, trained: Params, frozen: Params) -> None:
    pass
