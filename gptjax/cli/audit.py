"""`gptjax audit RUN`: tests a trained model for memorisation, membership inference, poisoning and backdoors."""

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
        raise UserError("train=FILE (training texts) and held_out=FILE (texts not trained on) go together: give both")
    from gptjax import weights
    from gptjax.model.gpt import refuse_classifier
    from gptjax.research import audit
    from gptjax.research.audit import report
    from gptjax.training.process import use_compile_cache

    use_compile_cache()
    canaries = audit.read_canaries(given.pop("canaries")) if "canaries" in given else ()
    model = weights.open_model(source)
    refuse_classifier(
        model.cfg, source, f'use gptjax classify {source} "TEXT"; for its training data: gptjax.research.influence'
    )
    tokenizer = model.tokenizer()
    for path in pages.values():
        new_file(path)
    models, cfg, notes = audit.checkpoints(source)
    train, held_out = _texts(given, cfg, tokenizer)
    base, prompts = _base(given, cfg)
    settings = audit.Settings(train, held_out, canaries, base, prompts, **given)
    results = audit.audit(models, model.cfg, tokenizer, settings, say=note)
    write_json(pages["json"], {"run": source, "notes": notes, **audit.to_json(results)})
    write_text(pages["html"], report.page(results, run=source, notes=notes))
    print("\n".join([*notes, *report.lines(results)]))
    print(f"report: {pages['html']}, as JSON: {pages['json']}")
    return 0


def _pages(source: str, out: str | None) -> dict[str, Path]:
    """Returns the paths of the two report files of `gptjax audit`, in a dict with the keys "html" and "json". The
    report files are OUT.html and OUT.json if the argument `out` is given, otherwise audit.html and audit.json in the
    run directory.

    Raises:
        UserError: one of the report files exists already, or `source` is not a folder and `out` is None.
    """
    if out is None and not Path(source).expanduser().is_dir():
        from gptjax import weights

        location = weights.open_model(source).location  # `open_model` raises UserError if the model does not exist
        raise UserError(f"{location} is not a run directory, so the report needs a name: out=NAME")
    path = Path(source if out is None else out).expanduser()
    path = path / "audit" if out is None else path
    pages = {kind: path.with_name(f"{path.name}.{kind}") for kind in ("html", "json")}
    if existing := [str(path) for path in pages.values() if path.exists()]:
        raise UserError(f"{', '.join(existing)} exists already: choose another name with out=NAME")
    return pages


def settings_of(args: Iterable[str]) -> dict[str, Any]:
    """Parses arguments of the form NAME=VALUE into the settings of `gptjax audit`.

    Raises:
        UserError: the name of a setting is unknown or a value is invalid; the message lists all problems.
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
                given[name] = [int(item) for item in value.split(",")]
            else:
                given[name] = int(value)
        except ValueError:
            kind = {"alpha": "a number such as 0.01"}.get(name, "whole numbers such as 8,16" if name in LISTS else "")
            problems.append(f"{name}={value}: expected {kind or 'a whole number'}")
            continue
        if name in ("rows", "suffix", *LISTS) and (min(given[name]) if name in LISTS else given[name]) < 1:
            problems.append(f"{name}={value}: expected 1 or more")
        if name == "alpha" and not 0 < given[name] < 1:
            problems.append(f"alpha={value}: expected a number between 0 and 1")
    if problems:
        raise UserError.all(problems)
    return given


def _texts(given: dict[str, Any], cfg: Config | None, tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore]:
    """Returns the tokenized training texts and the tokenized held-out texts. The texts are read from the files that
    train=FILE and held_out=FILE name; if these settings are not given, the texts are the training and validation data
    of the run."""
    from gptjax import data
    from gptjax.data import quality
    from gptjax.research import audit

    if "train" in given:
        files = [quality.records_of(given.pop(name)) for name in ("train", "held_out")]
        stores = [audit.store_of([text for _, text in file.records], tokenizer) for file in files]
        return stores[0], stores[1]
    if cfg is None or cfg.task != "pretrain":
        kind = "not a run of gptjax" if cfg is None else f"a run of task={cfg.task}"
        raise UserError(f"this is {kind}: give its training and held-out texts, train=FILE and held_out=FILE")
    prepared = data.prepare(cfg, log=note)
    return prepared.train, prepared.val


def _base(given: dict[str, Any], cfg: Config | None) -> tuple[tuple[Params, ModelConfig] | None, list[str]]:
    """Returns the base model, from which the audited model was fine-tuned, and the prompts on which the two models are
    compared."""
    file, name = given.pop("prompts", None), given.pop("base", None)
    if file is None:
        if name is not None:
            raise UserError("base=MODEL is compared on prompts: give a file with one prompt per line, prompts=FILE")
        return None, []
    if name is None and cfg is not None and cfg.task != "pretrain":
        name = cfg.finetune.base
    if name is None:
        raise UserError("prompts=FILE compares the run with the model before fine-tuning: name that model, base=MODEL")
    from gptjax import weights
    from gptjax.config.leaves import read_text
    from gptjax.files import one_line_end
    from gptjax.model.gpt import refuse_classifier

    prompts = [line for line in one_line_end(read_text(Path(file), "prompts")).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts")
    base = weights.open_model(name)
    refuse_classifier(base.cfg, f"base={name}", "name the model it was fine-tuned from")
    return (base.params("float32", None), base.cfg), prompts
