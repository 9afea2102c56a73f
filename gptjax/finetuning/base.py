"""What every fine-tuning shares: the base, the part of it that moves, and how the two become params again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gptjax import assets, lora, tree, weights
from gptjax.config import COMPUTED, Config, LoraConfig, ModelConfig
from gptjax.data import instructions
from gptjax.errors import UserError, complaints
from gptjax.model.gpt import abstract_params, layers_apart, layers_stacked, refuse_classifier
from gptjax.ops.dropout import off
from gptjax.ops.quant import dequantize, quantize
from gptjax.optim import make_optimizer
from gptjax.training.job import Job, Rules
from gptjax.training.loop import flops_per_token
from gptjax.types import Params
from gptjax.weights import families

HELD_OUT = 80, 200  # at most so many synthetic questions to validate and test on: they are answered one by one


class Parts(NamedTuple):
    """A model, taken apart for training.

    trained   what the optimizer sees: {"adapter": .., "cls_head": ..}, or a part of the params, or all
    frozen    the rest
    combine   (trained, frozen) -> params with `LoraWeight` leaves, as the loss reads them
    plain     (trained, frozen) -> params of plain arrays, as they are saved
    export    (folder, trained, frozen): the adapter by itself, in peft's format, where that can hold it
    combine_as    of an adapter: LoraConfig -> such a `combine`, with a scale and dropout that may be traced
    n_params, flops_per_token, fingerprint    of all of it; the last of the base alone
    """

    trained: Any
    frozen: Any
    combine: Callable[[Any, Any], Params]
    plain: Callable[[Any, Any], Params]
    export: Callable[[Path, Any, Any], None]
    combine_as: Callable[[LoraConfig], Callable[[Any, Any], Params]] | None = None
    n_params: int = 0
    flops_per_token: float = 0.0
    fingerprint: str = ""


class Thirds(NamedTuple):
    """Records to train, validate and test on."""

    train: list[Any]
    val: list[Any]
    test: list[Any]


def thirds(
    settings: Any,
    seed: int,
    read: Callable[[str, list[str] | None], list],
    made: Callable[..., list],
    notes: list[str] | None = None,
) -> Thirds:
    """Of a file in its order: what is trained on, then test, then validation, as the book cuts it. Of the synthetic
    skills: test and validation ask about words and numbers that training never shows.

    Args:
        settings: with source, examples, val_fraction, test_fraction. made: (n, seed, held_out) -> records.
        notes: as of `instructions.read`.
    """
    if settings.source is None:
        n = settings.examples
        shares = settings.val_fraction, settings.test_fraction
        held = [min(most, max(1, round(n * share))) for most, share in zip(HELD_OUT, shares, strict=True)]
        unseen = made(sum(held), seed, held_out=True)
        return Thirds(made(n, seed), unseen[: held[0]], unseen[held[0] :])
    found = read(settings.source, notes)
    n = len(found)
    test = int(n * settings.test_fraction)
    train = int(n * (1 - settings.test_fraction - settings.val_fraction) + 1e-9)
    parts = Thirds(found[:train], found[train + test :], found[train : train + test])
    if not all(parts):
        raise UserError(f"{settings.source}: {n} records are too few for a part to test and one to validate on")
    return parts


def refuse_missing(cfg: Config) -> None:
    """A cheap look before the data is read; nothing is fetched.

    Raises:
        UserError: a base or a file of data that is not there, both at once.
    """
    name, source, problems = cfg.finetune.base, getattr(cfg, cfg.task).source, []
    if cfg.task == "classify" and not source:
        problems.append("classify.source is missing: name a .csv, .tsv, .jsonl or .parquet file, or hf:org/name")
    if source and not source.startswith("hf:") and not Path(source).expanduser().exists():
        problems.append(f"{cfg.task}.source={source}: no such file")
    if not name.startswith("hf:") and name not in assets.ASSETS:
        problems += [f"finetune.base: {problem}" for problem in complaints(base_model, cfg)]
    if problems:
        raise UserError.all(problems)


def base_model(cfg: Config) -> weights.Model:
    """The base of a fine-tuning, before any tensor is read.

    Raises:
        UserError: no such model, or a classifier whose answers would be trained.
    """
    found = weights.open_model(cfg.finetune.base)
    if cfg.task != "classify":
        refuse_classifier(found.cfg, cfg.finetune.base, "name the model that it was made from")
    return found


def styled(base: weights.Model, style: instructions.Style | None) -> tuple[Any, list[str]]:
    """The base's tokenizer with the template of the style, as the tuned model will have it, and lines that say so."""
    tokenizer = base.tokenizer()
    return instructions.styled(tokenizer, style), instructions.describe_style(tokenizer, style)


def model_config(cfg: Config, base: ModelConfig, **changes: Any) -> ModelConfig:
    """The base's, computed as the config says."""
    return dataclasses.replace(base, **{name: getattr(cfg.model, name) for name in COMPUTED}, **changes)


def parts(cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, width: int) -> Parts:
    """`params` taken apart as cfg.finetune.trainable says.

    Args:
        params: of the base. heads: new ones, which are always trained, such as {"cls_head": ..}.
        width: tokens of a row.

    Raises:
        UserError: a pattern that matches nothing; what the adapter's config asks for and the weights cannot.
    """
    n_params, own = tree.size(params | heads), weights.fingerprint(params)
    apart = take_apart(cfg, params, heads, model, key, own)
    frozen = frozen_share(cfg, n_params, tree.size(apart.trained))
    flops = flops_per_token(model, params, width=width, frozen=frozen)
    return apart._replace(n_params=n_params, flops_per_token=flops, fingerprint=own)


def longest_row(cfg: Config, model: ModelConfig) -> int:
    """The most tokens that a row of the task can have."""
    settings = getattr(cfg, cfg.task)
    most = settings.max_length if cfg.task == "classify" else settings.context_length
    return min(most or model.context_length, model.context_length)


def why_so_long(cfg: Config, model: ModelConfig) -> str:
    """Where the number of `longest_row` comes from, for an error."""
    asked = getattr(cfg, cfg.task).context_length
    if asked > model.context_length:
        return f" (that of the base {cfg.finetune.base}; {cfg.task}.context_length is {asked})"
    return f" ({cfg.task}.context_length)"


def split_heads(params: Params) -> tuple[Params, Params]:
    """The base's params, and the heads that a fine-tuning adds."""
    heads = {name: leaf for name, leaf in params.items() if name == "cls_head"}
    return {name: leaf for name, leaf in params.items() if name not in heads}, heads


def frozen_share(cfg: Config, n_params: int, n_trained: int) -> float:
    """Of the model's weights, those without a gradient; an adapter's are none of them."""
    return 1.0 if cfg.finetune.trainable == "lora" else 1 - n_trained / n_params


def with_dropout(cfg: Config, loss: Callable) -> Callable:
    """`loss` with the low-rank branch's dropout, where there is any."""
    return lora.with_dropout(loss) if cfg.finetune.trainable == "lora" and not off(cfg.lora.dropout) else loss


def take_apart(
    cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, fingerprint: str = ""
) -> Parts:
    """`parts` without what it counts: it can be traced."""
    which = cfg.finetune.trainable
    if which == "lora":
        return _adapted(cfg, params, heads, model, key, fingerprint)
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


def _adapted(cfg: Config, params: Params, heads: Params, model: ModelConfig, key: jax.Array, fingerprint: str) -> Parts:
    settings, start, body = cfg.lora, None, dataclasses.replace(model, n_classes=0, cls_bias=True)
    if settings.init != "lora":
        params, adapter = lora.split(params, settings)
        start = jax.tree.map(lambda a: a.copy(), adapter)
    params = quantize(params, cfg.finetune.quantize)
    if start is None:
        adapter = lora.init(key, params, settings)

    def combine_as(settings: LoraConfig) -> Callable[[Any, Any], Params]:
        def combine(trained: Any, frozen: Params) -> Params:
            return lora.attach(frozen, _flat(trained), settings)

        return combine

    def plain(trained: Any, frozen: Params) -> Params:
        return dequantize(lora.merge(frozen, _flat(trained), settings))

    def export(folder: Path, trained: Any, frozen: Params) -> None:
        adapter, config = trained["adapter"], settings
        if start is not None:
            adapter = lora.unsplit(adapter, start)
            config = dataclasses.replace(settings, init="lora", rank=2 * settings.rank, alpha=_same_scale(settings))
        head = trained.get("cls_head")
        if head and "bias" in head:
            head = None  # their format cannot hold it: the merged model does
        weights.export_peft(folder, adapter, config, body, head=head, base=fingerprint, base_name=cfg.finetune.base)

    return Parts(
        {"adapter": adapter, **heads}, params, combine_as(settings), plain,
        export if _for_peft(settings, body) else _nothing, combine_as,
    )  # fmt: skip


def _flat(trained: Any) -> Params:
    """The adapter with the heads beside it, as `lora.attach` takes both."""
    heads = {name: leaf for name, leaf in trained.items() if name != "adapter"}
    return trained["adapter"] | heads


def _base_to_name(cfg: Config, fingerprint: str) -> dict[str, Any] | None:
    """What `weights.save` writes where the adapter is kept alone; None where the merged weights are."""
    name, asked = cfg.finetune.base, cfg.finetune.save_merged
    if cfg.finetune.trainable != "lora" or cfg.lora.init != "lora" or asked:
        return None
    shared = name.startswith("hf:") or (name in assets.ASSETS and not Path(name).exists())
    if not shared and asked is None:
        return None
    source = name if shared else str(Path(name).expanduser().absolute())
    return weights.native.Base(source, fingerprint, cfg.finetune.quantize, dataclasses.asdict(cfg.lora))._asdict()


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


def job(
    cfg: Config,
    parts: Parts,
    *,
    model: ModelConfig,
    tokenizer: Any,
    loss: Callable[[Config], Callable],
    batch: Callable[[int], Any],
    where: Callable[[int], str],
    eval_batches: Callable[[bool], Iterable[Any]],
    tokens_per_step: int,
    data: str,
    lines: Sequence[str],
    files: dict[str, str] | None = None,
) -> Job:
    """The job of a fine-tuning, from what only its kind knows.

    Args:
        loss: what the config, whose dropout may be traced, makes of it.
        data: hash of what is trained and validated on. lines: about the data, for the start. files: beside the model.
    """
    # not `parts`, which would keep the weights that training replaces
    plain, export, n_params = parts.plain, parts.export, parts.n_params
    combine, combine_as = parts.combine, parts.combine_as

    def rules(cfg: Config) -> Rules:
        own = with_dropout(cfg, loss(cfg))
        return own, combine if combine_as is None else combine_as(cfg.lora), optimizer(cfg)

    own_loss, _, tx = rules(cfg)

    def batches(step: int, k: int) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(batch(step + i) for i in range(k)))

    base = _base_to_name(cfg, parts.fingerprint)

    def write(folder: Path, trained: Any, frozen: Any, texts: dict[str, str]) -> None:
        weights.save(
            folder, plain(trained, frozen) if base is None else _flat(trained), model, tokenizer, texts | (files or {}),
            add=lambda partial: export(partial / "adapter", trained, frozen), twin=folder.with_name("best"), base=base,
        )  # fmt: skip

    return Job(
        tokenizer=tokenizer,
        batch=batch,
        batches=batches,
        where=where,
        eval_batches=eval_batches,
        loss=own_loss,
        rules=rules,
        init=lambda key, start: start,
        start=parts.trained,
        frozen=parts.frozen,
        combine=combine,
        optimizer=tx,
        tokens_per_step=tokens_per_step,
        flops_per_token=parts.flops_per_token,
        identity={"base": parts.fingerprint, "data": data},
        source=f"finetune.base={cfg.finetune.base} or {cfg.task}.source={getattr(cfg, cfg.task).source}",
        describe=lambda n_trained: [*lines, *_describe(cfg, n_params, n_trained)],
        write=write,
    )


def plan(cfg: Config, found: weights.Model, model: ModelConfig) -> str:
    """A line on the base and what of it would be trained, from shapes."""
    shapes = abstract_params(model)
    n, n_trained = tree.size(shapes), tree.size(abstract_trained(cfg, *split_heads(shapes), model))
    return f"base               {found.where}: {n:,} parameters, {n_trained:,} trained ({n_trained / n:.2%})"


def _describe(cfg: Config, n_params: int, n_trained: int) -> list[str]:
    share = f"{n_trained:,} trained ({n_trained / n_params:.2%})"
    lines = [f"model   {cfg.finetune.base}: {n_params:,} parameters, {share}"]
    if cfg.finetune.trainable == "lora":
        lines.append(
            f"lora    rank {cfg.lora.rank}, scale {cfg.lora.scale:g} ({cfg.lora.scaling}, alpha {cfg.lora.alpha:g}), "
            f"{cfg.lora.targets}"
        )
    rate = f"lr {cfg.optim.lr:g}, {cfg.train.max_steps:,} steps of {cfg.train.batch_size} rows"
    return [*lines, f"train   {cfg.optim.name}, {rate}"]
