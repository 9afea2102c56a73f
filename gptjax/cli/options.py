"""What the verbs share: taking a command line apart, the list of settings, the dry run's page."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptjax.config import Config, ModelConfig, Provenance, describe, resolve, to_yaml
from gptjax.config_io import Leaf, did_you_mean, from_args
from gptjax.types import UserError

SWITCHES = ("dry-run", "print-config")


class Args(NamedTuple):
    words: list[str]  # those without a `=`, in order
    leaves: list[Leaf]  # a.b=c
    dry_run: bool
    print_config: bool


def parse(args: Sequence[str], words: int) -> Args:
    """Up to `words` leading words, settings, and the two switches anywhere."""
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
    return Args(leading, from_args(rest), "dry-run" in switches, "print-config" in switches)


def is_setting(arg: str) -> bool:
    """`a.b=c`, and not a file whose name has a `=`."""
    return "=" in arg and not os.path.exists(arg)


def configure(args: Args, default: str | None) -> tuple[Config, Provenance]:
    """The configuration that a verb's arguments ask for."""
    return resolve(args.words[0] if args.words else default, leaves=args.leaves)


def note(line: str) -> None:
    """What takes time, on stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def show_only(args: Args, cfg: Config, provenance: Provenance, report: Callable[[Config], list[str]]) -> bool:
    """Print what --print-config or --dry-run asks for; True if the verb ends with that."""
    if args.print_config or args.dry_run:
        print(to_yaml(cfg, provenance), end="")
    if args.dry_run:
        print("\n" + "\n".join(report(cfg)))
    return args.print_config or args.dry_run


def settings_help(groups: Sequence[str] | None = None, strip: bool = False) -> str:
    """Every key with its type, default and comment, read from the dataclasses."""
    lines = []
    for group, doc, rows in describe():
        if groups is not None and group not in groups:
            continue
        lines += ["", f"{group}: {doc}" if group else "settings of the run"]
        for key, kind, default, comment in rows:
            name = key.rpartition(".")[2] if strip else key
            lines.append(f"  {name + '=' + default:<34} {kind}{'. ' + comment if comment else ''}")
    return "\n".join(lines).lstrip("\n").replace("None", "null")


# ---------------------------------------------------------------- what a run would cost


def human(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError


def count_params(model: ModelConfig) -> int:
    """Of the abstract tree: no memory is taken."""
    import jax

    from gptjax.model.gpt import abstract_params

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))
