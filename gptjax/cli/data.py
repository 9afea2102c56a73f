"""`gptjax data prepare | inspect | check`: tokenizes a data set, shows its batches, or checks its quality."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gptjax.cli import options
from gptjax.cli.pretrain import DEFAULT, plan
from gptjax.config import Config, file_layers
from gptjax.config.uses import TUNINGS, task_of
from gptjax.errors import UserError, did_you_mean
from gptjax.files import new_file, write_json

if TYPE_CHECKING:
    from gptjax.data import Prepared

ACTIONS = ("prepare", "inspect", "check")
CHECK = "gptjax data check FILE [FILE ...] [field=NAME] [threshold=0.8] [near=false] [model=MODEL] [out=REPORT.json]"
# Maximum number of findings that `gptjax data check` prints of each kind: exact duplicates, near duplicates, secrets,
# outliers.
SHOWN = 5


def run(args: list[str]) -> int:
    action, *rest = args or [""]
    if action not in ACTIONS:
        raise UserError(f"data {action}: expected {', '.join(ACTIONS)}{did_you_mean(action, ACTIONS)}")
    if action == "check":
        return check(rest)
    parsed = options.parse(rest, words=1)
    if action == "inspect":
        layers = file_layers(parsed.words[0]) if parsed.words else []
        if task_of([*layers, *parsed.leaves]) in TUNINGS:
            return inspect_conversation(parsed)
    cfg, provenance = options.configure(parsed, DEFAULT, f"data {action}", "pretrain")
    if options.show_only(parsed, cfg, provenance, lambda cfg: [*plan(cfg), "dry run: no step was taken"]):
        return 0
    from gptjax import data

    prepared = data.prepare(cfg, log=options.note)
    print("\n".join(data.describe(prepared)))
    if action == "inspect":
        print("\n".join(first_window(prepared, cfg)))
    return 0


def inspect_conversation(args: options.Args) -> int:
    """Prints the first conversation on which `gptjax finetune instruct` with the same arguments would train: its text,
    in which the tokens that count in the loss are marked or, with instruct.branches=tree, the branches of the tree of
    tokens into which the answers of the conversation are merged."""
    cfg, provenance = options.configure(args, "instruct", "data inspect", "instruct")
    from gptjax.tasks import instruct
    from gptjax.training.progress import without_colours

    if options.show_only(args, cfg, provenance, lambda cfg: options.report(cfg, instruct.plan)):
        return 0
    text = "\n".join(instruct.inspect(cfg))
    print(text if sys.stdout.isatty() else without_colours(text))
    return 0


def first_window(prepared: Prepared, cfg: Config, most: int = 24) -> list[str]:
    """Returns lines of text about the first `most` tokens of the first row of the first training batch: each line shows
    an input token, the target token, and whether the target counts in the loss."""
    from gptjax.data import Loader

    batch = Loader(
        prepared.train,
        cfg.data,
        batch_size=cfg.train.batch_size,
        context_length=cfg.model.context_length,
        seed=cfg.seed,
        vocab_size=prepared.tokenizer.vocab_size,
    ).batch(0)
    show = prepared.tokenizer.decode
    rows = ["", f"step 0, window 0, first {min(most, cfg.model.context_length)} tokens", "  input -> target"]
    for t in range(min(most, cfg.model.context_length)):
        token, target = int(batch.tokens[0, t]), int(batch.targets[0, t])
        weight = 1.0 if batch.weights is None else float(batch.weights[0, t])
        suffix = "" if weight else " not in the loss"
        rows.append(f"  {token:>6} {show([token])!r:<12} -> {target:>6} {show([target])!r:<12}{suffix}")
    return rows


def check(args: list[str]) -> int:
    """Prints a report of the duplicates, secrets and outliers in files that are splits of one data set. The exit code
    is 0 even if duplicates, secrets or outliers are found."""
    given = dict(arg.split("=", 1) for arg in args if options.is_setting(arg))
    files = [arg for arg in args if not options.is_setting(arg)]
    known = ("field", "threshold", "near", "model", "out")
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"data check: unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
    if not files:
        raise UserError(f"expected: {CHECK}")
    if (near := given.get("near", "true")) not in ("true", "false"):
        raise UserError(f"near: expected true or false, got {near!r}")
    try:
        threshold = float(given.get("threshold", 0.8))
    except ValueError:
        threshold = 0.0
    if not 0 < threshold <= 1:
        raise UserError(f"threshold: expected a number above 0 and at most 1, got {given['threshold']!r}")
    model = None
    if "model" in given:
        from gptjax import weights
        from gptjax.model.gpt import refuse_classifier

        model = weights.open_model(given["model"])
        refuse_classifier(model.cfg, f"model={given['model']}", "name the model it was fine-tuned from")
        tokenizer = model.tokenizer()
    out = new_file(given["out"]) if "out" in given else None
    from gptjax.data import quality

    options.note("reading")
    texts = [quality.records_of(file, given.get("field")) for file in dict.fromkeys(files)]
    losses = None
    if model is not None:
        from gptjax.evaluation.perplexity import losses as score

        every = [text for file in texts for _, text in file.records]
        losses = score(model.params("float32", None), model.cfg, tokenizer, every, options.note)
    report = quality.check(texts, threshold=threshold if near == "true" else None, losses=losses)
    print("\n".join(_report(report)))
    if out is not None:
        write_json(out, report)
        print(f"full report: {out}")
    return 0


def _report(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{row['file']}: {row['records']:,} records, {row['characters']:,} characters"
        + (f", {row['bytes']:,} bytes, sha256 {row['sha256'][:16]}..." if "bytes" in row else "")
        for row in report["files"]
    ]
    for kind, title in (("exact", "groups of exact duplicates"), ("near", "pairs of near duplicates")):
        rows = report[kind]
        lines.append(f"{len(rows):,} {title}, {sum(row['across'] for row in rows):,} of them across files")
        lines += [f"  {', '.join(row['where'][:4])}: {row['text']!r}" for row in rows[:SHOWN]]
    lines.append(f"{len(report['sensitive']):,} matches of patterns for secrets and personal data")
    lines += [f"  {row['where']}: {row['kind']} {row['hidden']}" for row in report["sensitive"][:SHOWN]]
    if "outliers" in report:
        lines.append(f"{len(report['outliers']):,} texts of unusual loss")
        lines += [
            f"  {row['where']}: {row['loss']:.2f} nats/token: {row['text']!r}" for row in report["outliers"][:SHOWN]
        ]
    return lines
