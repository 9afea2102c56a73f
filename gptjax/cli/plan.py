"""`gptjax plan`: compile a run's step for a TPU slice that is not here, and say what it takes."""

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


class Wishes(NamedTuple):
    on: str = "v5e-8"
    search: bool = False
    decode: bool = False
    tokens: float | None = None
    hours: float | None = None
    out: str | None = None
    png: str | None = None


def run(args: list[str]) -> int:
    wishes, rest = wishes_of(args)
    parsed = options.parse(rest, words=1)
    cfg, provenance = options.configure(parsed, DEFAULT, "plan", also=("model.*",))
    for name in ("out", "png"):
        if path := getattr(wishes, name):
            refuse_existing(Path(path), name)
    keys = uses.keys_of(cfg, also=("model.*",))
    if options.show_only(parsed, cfg, provenance, lambda cfg: [f"would be compiled for {wishes.on}"], keys):
        return 0
    for name in ("out", "png"):
        if path := getattr(wishes, name):
            new_file(path, name)
    from gptjax.planning import slices

    # before jax is imported: on this machine's processor, and without the driver's questions to a network
    os.environ.update(slices.ENVIRONMENT)
    from gptjax.planning import report
    from gptjax.planning.plan import plan, search
    from gptjax.training.progress import Progress

    cfg = with_shape(cfg)
    where = slices.slice_of(wishes.on)
    with Progress() as progress, progress.phase(f"compiling for {wishes.on}, {where.n_chips} chips"):
        if wishes.search:
            found = search(cfg, wishes.on, say=progress.say)
        else:
            found = [plan(cfg, wishes.on, decode=wishes.decode)]
    if len(found) > 1:
        print("\n".join([*report.comparison(found), ""]))
    best = found[0]
    unknown = wishes.decode or cfg.train.epochs is not None  # of which only the data knows the steps
    tokens = wishes.tokens or (None if unknown else float(cfg.train.max_steps) * best.tokens)
    print("\n".join(report.table(best, tokens=tokens, hours=wishes.hours)))
    if wishes.search:
        mesh = " ".join(f"mesh.{name}={n}" for name, n in best.mesh.items())
        print(f"\nsettings           {mesh} model.remat={best.remat} train.accumulation={best.accumulation}")
    if wishes.out:
        text = ",\n".join(one.to_json() for one in found)
        write_text(Path(wishes.out), f"[{text}]\n" if len(found) > 1 else f"{text}\n")
    if wishes.png and best.roofline is not None:
        report.draw(found, wishes.png)
    elif wishes.png:
        options.note(f"png={wishes.png} is not written: there is no roofline of this program")
    return 0


def wishes_of(args: list[str]) -> tuple[Wishes, list[str]]:
    """What is this verb's own, and the rest.

    Raises:
        UserError: a value is missing or no number; things that exclude each other.
    """
    given: dict[str, Any] = {}
    rest, waiting = [], list(args)
    while waiting:
        arg = waiting.pop(0)
        name, has_value, value = arg.removeprefix("--").partition("=")
        if arg in ("--search", "--decode"):
            given[name] = True
        elif name in ("on", "tokens", "hours", "out", "png") and (has_value or arg.startswith("--")):
            if not has_value and not waiting:
                raise UserError(f"--{name} needs a value, such as --on v5e-8")
            value = value if has_value else waiting.pop(0)
            given[name] = _number(name, value) if name in ("tokens", "hours") else value
        else:
            rest.append(arg)
    if given.get("search") and given.get("decode"):
        raise UserError("--search and --decode: meshes are searched for training only; leave one of the two out")
    return Wishes(**given), rest


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UserError(f"{name}={text}: expected a number above 0, such as {name}=10e9")
    return number


def with_shape(cfg: Config) -> Config:
    """`cfg` with the model's whole shape, where model.vocab_size does not say that it is there: a fine-tuning's is its
    base's, of which no tensor is read; the number of words is the tokenizer's.

    Raises:
        UserError: there is no such base; the number of words is not known before the tokenizer is trained.
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
        return dataclasses.replace(cfg, model=model)
    known = {"gpt2": 50257, "bytes": 257}
    if cfg.tokenizer.name in ("bpe", "wordpiece", "unigram"):
        words = cfg.tokenizer.vocab_size
    elif cfg.tokenizer.name in known:
        words = known[cfg.tokenizer.name]
    else:
        raise UserError(f"model.vocab_size is 0, and tokenizer.name={cfg.tokenizer.name} does not say: name a number")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=words))


def more_help(args: list[str]) -> str:
    return f"""Without a preset it is {DEFAULT}. The slice is a name or a topology (v5p:4x4x8): v5e-1 to v5e-256 and
v6e-1 to v6e-256 count chips; v5p-8 to v5p-8192 and v4-8 to v4-8192 count TensorCores, two a chip, as Google does.

  --on SLICE    default v5e-8
  --search      meshes, model.remat and train.accumulation for the same batch; the fastest by formula are compiled
  --decode      the step that writes one token, sample.batch_size rows a data shard, after a cache of the whole context
  tokens=N      how long so many tokens take; without it those of train.max_steps
  hours=X       how many tokens are read in this time
  out=FILE      everything as JSON        png=FILE  the roofline

The step is the one that `gptjax pretrain` or, for a preset of theirs, `gptjax finetune classify | instruct | prefer`
runs, for a base whose shape is known without its tensors, or the one that model.* describes where model.vocab_size is
given. The TPU compiler compiles it: memory and traffic are the program's own, times are bounds at the chip's peak
figures. It needs no TPU: pip install -e '.[tpu-plan]' in the checkout. `gptjax pretrain --help` and
`gptjax finetune TASK --help` list the settings."""
