"""Functions that all commands use: they parse the command line, list the settings, and report a dry run."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gptjax.config import (
    Config,
    Provenance,
    describe,
    file_layers,
    flat,
    schema,
    to_yaml,
    uses,
    yaml_value,
)
from gptjax.config.aliases import ALIASES
from gptjax.config.leaves import EXAMPLE, Leaf, from_args
from gptjax.config.uses import matches
from gptjax.errors import Problems, UserError, did_you_mean

if TYPE_CHECKING:
    from gptjax.cli.manual import Page

SWITCHES = ("dry-run", "print-config")


class Args(NamedTuple):
    words: list[str]  # Positional arguments, in the order of the command line.
    leaves: list[Leaf]  # Settings, which are written a.b=c on the command line.
    dry_run: bool
    print_config: bool


def parse(args: Sequence[str], words: int, example: str = EXAMPLE) -> Args:
    """Parses a command line, which has up to `words` positional arguments, followed by settings. The options --dry-run
    and --print-config may appear anywhere on the command line.

    Args:
        words: maximum number of positional arguments.
        example: a setting that error messages show as an example.
    """
    rest, switches = [], set()
    for arg in args:
        name = arg.removeprefix("--").replace("_", "-")
        if arg.startswith("--") and name in SWITCHES:
            switches.add(name)
        else:
            rest.append(arg)
    leading: list[str] = []
    while rest and not rest[0].startswith("--") and len(leading) < words and not is_setting(rest[0]):
        leading.append(rest.pop(0))
    for arg in rest:
        if arg.startswith("--") and "=" not in arg and (hint := did_you_mean(arg, [f"--{name}" for name in SWITCHES])):
            raise UserError(f"unknown option {arg}{hint}")
    return Args(leading, from_args(rest, example=example), "dry-run" in switches, "print-config" in switches)


def is_setting(arg: str) -> bool:
    """Returns True if the argument is a setting such as a.b=c, and not the name of an existing file that contains
    `=`."""
    return "=" in arg and not os.path.exists(arg)


def keys_of(*patterns: str) -> list[str]:
    """Returns the keys of the settings that match any of the patterns, in the order of the schema."""
    return [key for key in schema() if any(matches(pattern, key) for pattern in patterns)]


def configure(
    args: Args, default: str | None, verb: str, task: str | None = None, also: Sequence[str] = ()
) -> tuple[Config, Provenance]:
    """Returns the config that results from the arguments of a command, and the place where each value of the config was
    set.

    train.batch_size=auto is replaced with the largest batch size that is estimated to fit in device memory, and
    model.remat is set to the value that this batch size needs.

    Args:
        default: the preset that is used if `args` name no preset, or None for the default settings of gptjax.
        verb: name of the command, for error messages.
        task: the task of the command, or None if the preset or the settings name the task.
        also: patterns of settings that the command reads in addition to those of its task.
    """
    source = args.words[0] if args.words else default
    leaves = args.leaves
    auto = [leaf for leaf in leaves if leaf.key == "train.batch_size" and leaf.value == "auto"]
    if auto and verb.startswith(("pretrain", "finetune")):
        from gptjax.planning.fit import fitted

        layers = [*file_layers(source), *leaves]
        n_micro = next((leaf.value for leaf in reversed(layers) if leaf.key == "train.accumulation"), 1)
        # With train.batch_size=auto, the batch size is not known yet, so the config is built with the smallest valid
        # batch size, which is one row per micro-batch.
        one_row_each = [leaf._replace(value=n_micro) if leaf in auto else leaf for leaf in leaves]
        before, _ = uses.resolve(source, one_row_each, verb=verb, task=task, also=also)
        cfg = fitted(before)
        leaves = [leaf._replace(value=cfg.train.batch_size) if leaf in auto else leaf for leaf in leaves]
        if cfg.model.remat != before.model.remat:
            leaves.append(Leaf("model.remat", cfg.model.remat, "train.batch_size=auto"))
    return uses.resolve(source, leaves, verb=verb, task=task, also=also)


def refuse_others(leaves: Sequence[Leaf], known: Sequence[str], verb: str, prefix: str = "") -> None:
    """Raises UserError if `leaves` contains settings that the command does not read.

    Args:
        known: the keys of the settings that the command reads.
        prefix: a prefix such as "sample." that may be omitted from a setting: `prompt=` then means `sample.prompt=`.

    Raises:
        UserError: some settings are not in `known`; the message lists all of them.
    """
    short = [key.removeprefix(prefix) for key in known]
    problems = Problems()
    for key, _, location in leaves:
        if key in short or key in known:
            continue
        if key in schema():
            problems.append(f"{location}: {key}: not a setting of gptjax {verb}, which reads {', '.join(short)}")
        elif ALIASES.get(key) in known:
            problems.append(f"{location}: unknown setting {key}; here it is called {ALIASES[key]}")
        else:
            hint = did_you_mean(key, short) or f"; gptjax {verb} reads {', '.join(short)}"
            problems.append(f"{location}: unknown setting {key}{hint}")
    problems.raise_if_any()


def note(line: str) -> None:
    """Prints a progress message to stderr, because stdout is for results only."""
    print(line, file=sys.stderr, flush=True)


def show_only(
    args: Args,
    cfg: Config,
    provenance: Provenance,
    report: Callable[[Config], list[str]],
    keys: Sequence[str] | None = None,
) -> bool:
    """Handles the options --print-config and --dry-run.

    --print-config prints all settings that the command reads. --dry-run prints a report, and the settings that differ
    from their defaults or were given on the command line.

    Args:
        report: function that takes the config and returns the lines of the report.
        keys: the keys of the settings that the command reads, or None for all settings that the task `cfg.task`
            reads.

    Returns:
        True if --print-config or --dry-run was given. The command should then return without doing anything else.
    """
    if not (args.print_config or args.dry_run):
        return False
    keys = uses.keys_of(cfg) if keys is None else keys
    # The report is computed before anything is printed, because the function `report` may raise UserError.
    lines = report(cfg) if args.dry_run else []
    if not args.print_config:
        values, defaults = flat(cfg), flat(Config())
        given = [key for key in keys if provenance[key] != "default" and not provenance[key].startswith("arch=")]
        keys = [key for key in given if values[key] != defaults[key] or provenance[key] == "command line"]
    print(to_yaml(cfg, provenance, keys), end="")
    if lines:
        print("\n" + "\n".join(lines))
    return True


def settings_help(cfg: Config, patterns: Sequence[str], section: str = "", width: int = 100) -> str:
    """Returns a text that lists the settings that match `patterns`, each with its value in `cfg`, its type and its help
    text. The settings are listed in the order of the patterns.

    Args:
        section: a section such as "sample", whose settings are listed without the name of the section; "" for no
            section.
        width: maximum number of columns per line.
    """
    titles = {group: f"Section {group}. {doc}".replace("None", "null") for group, doc, _ in describe()} | {
        "": "The run itself."
    }
    rows = {row[0]: row for _, _, rows in describe() for row in rows}
    values, lines, last = flat(cfg), [], None
    for key, kind, text in (rows[key] for pattern in patterns for key in rows if matches(pattern, key)):
        group = key.rpartition(".")[0]
        if group != last:
            lines += ["", titles[group]]
            last = group
        name = key.removeprefix(f"{section}.") if section else key
        lines.append(f"  {name}={yaml_value(values[key])}")
        lines += textwrap.wrap(f"{text} [{kind}]", width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).lstrip("\n")


def values_help(page: Page, args: Sequence[str], width: int = 100) -> str:
    """Returns the list of settings on the help page of a command, with the values that result from the arguments
    `args`. If `args` are invalid, the list of settings shows the values of the command's default preset. For a command
    that takes no preset, the list of settings shows the default values."""
    patterns = page.settings or uses.USES[page.reads]
    if not page.preset:
        return f"Settings, with their defaults:\n\n{settings_help(Config(), patterns, page.section, width)}"
    (task,) = page.tasks
    verb = uses.verb_of(task)
    try:
        parsed = parse(args, words=1)
        cfg, _ = configure(parsed, page.preset, verb, task)
    except UserError:
        parsed = Args([], [], False, False)
        cfg, _ = configure(parsed, page.preset, verb, task)
    source = parsed.words[0] if parsed.words else page.preset
    return f"Settings, with the values of {source}:\n\n{settings_help(cfg, patterns, page.section, width)}"


# ---------------------------------------------------------------- dry run


def report(cfg: Config, plan: Callable[[Config], list[str]]) -> list[str]:
    """Returns the lines of the report of a dry run: the run directory, and the lines of `plan(cfg)`.

    Raises:
        UserError: an error that the run itself would raise before its first step.
    """
    from gptjax.tasks import refuse

    done = refuse(cfg)
    first = f"run directory      {cfg.run_dir}{' is finished: a run would do nothing' if done else ''}"
    return [first, *([] if done else plan(cfg)), "dry run: no step was taken"]


def human(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError
