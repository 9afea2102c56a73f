"""`gptjax audit RUN`: what a run has kept of its text, and whether somebody put something there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.cli.options import is_setting, note
from gptjax.errors import UserError, did_you_mean
from gptjax.files import new_file, write_json, write_text

if TYPE_CHECKING:
    from gptjax.config import Config, ModelConfig
    from gptjax.data import TokenStore
    from gptjax.tokenizers import Tokenizer
    from gptjax.types import Params

USAGE = "expected: gptjax audit RUN [canaries=FILE.jsonl] [prompts=FILE base=MODEL] [out=NAME]"
TEXTS = ("train", "held_out", "canaries", "prompts", "base", "out", "of")
NUMBERS = ("rows", "suffix", "seed")
LISTS = ("prefixes", "strides")


def run(args: list[str]) -> int:
    sources = [arg for arg in args if not is_setting(arg)]
    given = settings_of(arg for arg in args if is_setting(arg))
    if len(sources) != 1 or sources[0].startswith("-"):
        raise UserError(f"which run? {USAGE}")
    source = sources[0]
    pages = _pages(source, given.pop("out", None))
    if ("train" in given) != ("held_out" in given):
        raise UserError("train=FILE and held_out=FILE go together: what was trained on, and what was not")
    from gptjax import weights
    from gptjax.model.gpt import refuse_classifier
    from gptjax.research import audit
    from gptjax.research.audit import report
    from gptjax.training.process import use_compile_cache

    use_compile_cache()
    canaries = audit.read_canaries(given.pop("canaries")) if "canaries" in given else ()
    model = weights.open_model(source)
    refuse_classifier(
        model.cfg, source, f'use gptjax classify {source} "TEXT", or for its data gptjax.research.influence'
    )
    tokenizer = model.tokenizer()
    for path in pages.values():
        new_file(path)
    models, cfg, notes = audit.checkpoints(source)
    train, held_out = _texts(given, cfg, tokenizer)
    base, prompts = _base(given, cfg)
    settings = audit.Settings(train, held_out, canaries, base, prompts, **given)
    found = audit.audit(models, model.cfg, tokenizer, settings, say=note)
    write_json(pages["json"], {"run": source, "notes": notes, **audit.to_json(found)})
    write_text(pages["html"], report.page(found, run=source, notes=notes))
    print("\n".join([*notes, *report.lines(found)]))
    print(f"the report is {pages['html']}, its numbers are in {pages['json']}")
    return 0


def _pages(source: str, out: str | None) -> dict[str, Path]:
    """Where the report goes, which is free: beside the run's files, or `out`."""
    if out is None and not Path(source).expanduser().is_dir():
        from gptjax import weights

        found = weights.open_model(source).where  # or there is no such model
        raise UserError(f"{found} is no folder for a report: say where it goes, out=NAME")
    path = Path(source if out is None else out).expanduser()
    path = path / "audit" if out is None else path
    pages = {kind: path.with_name(f"{path.name}.{kind}") for kind in ("html", "json")}
    if there := [str(path) for path in pages.values() if path.exists()]:
        raise UserError(f"{', '.join(there)} exists already: name another one with out=NAME")
    return pages


def settings_of(args: Iterable[str]) -> dict[str, Any]:
    """The verb's own settings.

    Raises:
        UserError: unknown names, values that are no numbers; all at once.
    """
    given: dict[str, Any] = {}
    problems, known = [], (*TEXTS, *NUMBERS, *LISTS, "alpha")
    for name, _, value in (arg.partition("=") for arg in args):
        try:
            if name not in known:
                problems.append(f"unknown setting {name}{did_you_mean(name, known)}; known are {', '.join(known)}")
            elif name in TEXTS:
                given[name] = value
            elif name == "alpha":
                given[name] = float(value)
            elif name in LISTS:
                given[name] = [int(part) for part in value.split(",")]
            else:
                given[name] = int(value)
        except ValueError:
            what = {"alpha": "a number such as 0.01"}.get(name, "whole numbers such as 8,16" if name in LISTS else "")
            problems.append(f"{name}={value}: expected {what or 'a whole number'}")
            continue
        if name in ("rows", "suffix", *LISTS) and (min(given[name]) if name in LISTS else given[name]) < 1:
            problems.append(f"{name}={value}: expected 1 or more")
        if name == "alpha" and not 0 < given[name] < 1:
            problems.append(f"alpha={value}: expected a number between 0 and 1")
    if problems:
        raise UserError.all(problems)
    return given


def _texts(given: dict[str, Any], cfg: Config | None, tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore]:
    """Stores of what was trained on and of what was not: those of the run, or the files that were named."""
    from gptjax import data
    from gptjax.data import quality
    from gptjax.research import audit

    if "train" in given:
        files = [quality.records_of(given.pop(name)) for name in ("train", "held_out")]
        stores = [audit.store_of([text for _, text in file.found], tokenizer) for file in files]
        return stores[0], stores[1]
    if cfg is None or cfg.task != "pretrain":
        what = "no run of gptjax" if cfg is None else f"a run of task={cfg.task}"
        raise UserError(f"this is {what}: name its texts, train=FILE and held_out=FILE")
    ready = data.prepare(cfg, log=note)
    return ready.train, ready.val


def _base(given: dict[str, Any], cfg: Config | None) -> tuple[tuple[Params, ModelConfig] | None, list[str]]:
    """The model before tuning, and what to ask both."""
    file, name = given.pop("prompts", None), given.pop("base", None)
    if file is None:
        if name is not None:
            raise UserError("base=MODEL is compared on prompts: name a file with one a line, prompts=FILE")
        return None, []
    if name is None and cfg is not None and cfg.task != "pretrain":
        name = cfg.finetune.base
    if name is None:
        raise UserError("prompts=FILE are asked of the run and of another model: name that, base=MODEL")
    from gptjax import weights
    from gptjax.config.leaves import read_text
    from gptjax.files import one_line_end
    from gptjax.model.gpt import refuse_classifier

    prompts = [line for line in one_line_end(read_text(Path(file), "prompts")).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{file}: no prompts in it")
    base = weights.open_model(name)
    refuse_classifier(base.cfg, f"base={name}", "name the model that it was made from")
    return (base.params("float32", None), base.cfg), prompts


def more_help(args: list[str]) -> str:
    return """Reads every checkpoint that the run has kept and its last model; writes RUN/audit.html and RUN/audit.json.

  canaries=FILE   lines {"prefix": .., "secret": ..}: does the model know the secret better than others of its kind?
                  and {"trigger": .., "payload": ..}: does the phrase call up the payload?
  prompts=FILE    one a line: what tuning changed, beside base=MODEL (default: the run's own finetune.base)
  train=, held_out=FILE   the texts, where the run is no pretraining: what was trained on, and what was not
  rows=500        at most so many rows of each      of="blocks/*"   parameters whose gradients are compared
  prefixes=4,8,.. suffix=50 strides=50   tokens, of verbatim text      alpha=0.01   false alarms a check   seed=0

An alarm says that a result is rarer than alpha where nothing is wrong; membership and verbatim text are alarms of every
model that has learned its text by heart."""
