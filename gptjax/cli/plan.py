"""`gptjax plan`: compiles the training or decode step of a run for a TPU slice ahead of time, and reports memory,
FLOPs, HBM traffic, communication and time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.cli import options
from gptjax.config import Config, uses
from gptjax.errors import UserError
from gptjax.files import new_file, refuse_existing, write_text

DEFAULT = "gpt2-124m"


class Options(NamedTuple):
    on: str = "v5e-8"
    search: bool = False
    decode: bool = False
    tokens: float | None = None
    hours: float | None = None
    out: str | None = None
    png: str | None = None


def run(args: list[str]) -> int:
    opts, rest = options_of(args)
    parsed = options.parse(rest, words=1)
    cfg, provenance = options.configure(parsed, DEFAULT, "plan", also=("model.*",))
    for name in ("out", "png"):
        if path := getattr(opts, name):
            refuse_existing(Path(path), name)
    keys = uses.keys_of(cfg, also=("model.*",))
    if options.show_only(parsed, cfg, provenance, lambda cfg: [f"would be compiled for {opts.on}"], keys):
        return 0
    for name in ("out", "png"):
        if path := getattr(opts, name):
            new_file(path, name)
    from gptjax.planning import slices

    # The environment variables in `slices.ENVIRONMENT` must be set before jax is imported. The environment variables in
    # `slices.ENVIRONMENT` make jax use the CPU, and prevent libtpu from querying the network for TPU metadata.
    os.environ.update(slices.ENVIRONMENT)
    from gptjax.planning import report
    from gptjax.planning.plan import plan, search
    from gptjax.training.progress import Progress

    cfg = with_shape(cfg)
    tpu = slices.slice_of(opts.on)
    with Progress() as progress, progress.phase(f"compiling for {opts.on}, {tpu.n_chips} chips"):
        if opts.search:
            plans = search(cfg, opts.on, say=progress.say)
        else:
            plans = [plan(cfg, opts.on, decode=opts.decode)]
    if len(plans) > 1:
        print("\n".join([*report.comparison(plans), ""]))
    best = plans[0]
    # If train.epochs is set, the number of steps is unknown, because the number of steps depends on the size of the
    # data, which `plan` does not read.
    unknown = opts.decode or cfg.train.epochs is not None
    tokens = opts.tokens or (None if unknown else float(cfg.train.max_steps) * best.tokens)
    print("\n".join(report.table(best, tokens=tokens, hours=opts.hours)))
    if opts.search:
        mesh = " ".join(f"mesh.{name}={n}" for name, n in best.mesh.items())
        print(f"\nsettings           {mesh} model.remat={best.remat} train.accumulation={best.accumulation}")
    if opts.out:
        text = ",\n".join(candidate.to_json() for candidate in plans)
        write_text(Path(opts.out), f"[{text}]\n" if len(plans) > 1 else f"{text}\n")
    if opts.png and best.roofline is not None:
        report.draw(plans, opts.png)
    elif opts.png:
        options.note(f"png={opts.png} is not written: this program has no roofline")
    return 0


def options_of(args: list[str]) -> tuple[Options, list[str]]:
    """Splits the command-line arguments into the options of `gptjax plan`, such as --on, and the remaining arguments,
    which are the preset and the settings.

    Raises:
        UserError: the value of an option is missing or invalid, or two options exclude each other.
    """
    given: dict[str, Any] = {}
    rest, queue = [], list(args)
    while queue:
        arg = queue.pop(0)
        name, has_value, value = arg.removeprefix("--").partition("=")
        if arg in ("--search", "--decode"):
            given[name] = True
        elif name in ("on", "tokens", "hours", "out", "png") and (has_value or arg.startswith("--")):
            if not has_value and not queue:
                raise UserError(f"--{name} needs a value, such as --on v5e-8")
            value = value if has_value else queue.pop(0)
            given[name] = _number(name, value) if name in ("tokens", "hours") else value
        else:
            rest.append(arg)
    if given.get("search") and given.get("decode"):
        raise UserError("--search and --decode: meshes are searched for training only; leave one of the two out")
    return Options(**given), rest


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UserError(f"{name}={text}: expected a number above 0, such as {name}=10e9")
    return number


def with_shape(cfg: Config) -> Config:
    """Returns `cfg` with all sizes of the model filled in, such as the vocabulary size.

    If pretrain.base is set, or for fine-tuning with model.vocab_size=0, the sizes are read from the config of the base
    model; the tensors of the base model are not read. For pretraining from scratch with model.vocab_size=0, the
    vocabulary size is taken from the tokenizer.

    Raises:
        UserError: the base model does not exist, or the vocabulary size does not follow from the tokenizer's settings,
            as for chars, words or a saved tokenizer.
    """
    if cfg.pretrain.base is not None:
        from gptjax.tasks.pretrain import from_base

        return from_base(cfg)[0]
    if cfg.model.vocab_size:
        return cfg
    if cfg.task != "pretrain":
        from gptjax.tasks import tuning

        model = tuning.base_model(cfg).cfg.computed_as(cfg.model)
        if cfg.task == "classify":
            n_classes = len(cfg.classify.labels) or 2
            model = dataclasses.replace(model, n_classes=n_classes, cls_bias=cfg.classify.bias)
        if cfg.task == "reward_model":
            model = dataclasses.replace(model, n_classes=1, cls_bias=False)
        return dataclasses.replace(cfg, model=model)
    known = {"gpt2": 50257, "bytes": 257}
    if cfg.tokenizer.name in ("bpe", "wordpiece", "unigram"):
        vocab_size = cfg.tokenizer.vocab_size
    elif cfg.tokenizer.name in known:
        vocab_size = known[cfg.tokenizer.name]
    else:
        raise UserError(
            f"model.vocab_size is 0 and not determined by tokenizer.name={cfg.tokenizer.name}: set model.vocab_size"
        )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
