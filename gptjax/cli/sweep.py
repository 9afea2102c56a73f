"""`gptjax sweep`: trains models with all combinations of the given hyperparameters, if possible in one compiled
program, prints a table of the losses, and writes the results to files."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from gptjax.cli import options
from gptjax.config import Config, config_file, to_yaml, uses
from gptjax.errors import Problems, UserError, complaints

DEFAULT = "tiny-gpt2"
AXES = ("optim.lr=[1e-3,3e-3,1e-2]", "seed=range(4)")  # The axes of the sweep if the user gives no axis.
SHOWN = 20  # Maximum number of rows of the printed table of losses.


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=1)
    # The value of at_once is read and checked here, because at_once is an option of `gptjax sweep` and not a setting of
    # the schema.
    values = [leaf.value for leaf in parsed.leaves if leaf.key == "at_once"]
    if values and not (values[-1].isdecimal() and int(values[-1]) >= 1):
        raise UserError(f"at_once={values[-1]}: expected a whole number of runs, at least 1")
    at_once = int(values[-1]) if values else None
    source = parsed.words[0] if parsed.words else DEFAULT
    from gptjax.research import sweep

    axes, fixed = sweep.split_axes(leaf for leaf in parsed.leaves if leaf.key != "at_once")
    if not axes:
        options.note(f"no axis was given, such as optim.lr=[1e-3,3e-3]: using {' '.join(AXES)}")
        defaults, _ = sweep.split_axes(options.from_args(AXES))
        axes = {key: values for key, values in defaults.items() if key not in {leaf.key for leaf in fixed}}
    configs = sweep.combinations(source, axes, fixed)
    run_dirs = [leaf.value for leaf in fixed if leaf.key == "run_dir"]
    folder = Path(run_dirs[-1] if run_dirs else f"runs/{config_file(source).stem}-sweep")
    configs = [dataclasses.replace(cfg, run_dir=str(folder)) for cfg in configs]
    if parsed.print_config:
        print(to_yaml(configs[0], keys=uses.keys_of(configs[0])), end="")
    if parsed.print_config and not parsed.dry_run:
        return 0
    _refuse(configs[0], folder)
    if parsed.dry_run:
        print("\n".join(report(configs, axes, folder)))
        return 0
    # `_sweep` prints a command that repeats the best run of the sweep. `settings` holds the settings on the command
    # line of the repeated run, without run_dir, so that the repeated run gets a new run directory.
    settings = [f"{leaf.key}={leaf.value}" for leaf in fixed if leaf.key != "run_dir"]
    return _sweep(configs, axes, folder, at_once, [source, *settings])


def _refuse(cfg: Config, folder: Path) -> None:
    """Raises UserError if the sweep cannot start, because the run directory is in use, or because the data or base
    model is missing. The message of the UserError lists all reasons why the sweep cannot start."""
    from gptjax.research.sweep import WRITING
    from gptjax.tasks import find
    from gptjax.training import run_dir

    problems = []
    if (folder / "sweep.json").exists():
        problems.append(f"{folder} holds a sweep already, and nothing was overwritten: choose another run_dir=FOLDER")
    else:
        # The regular expression `ours` matches the names of the files of an interrupted sweep, which a new sweep may
        # overwrite.
        ours = r"sweep\.(csv|png)" if (folder / WRITING).exists() else ""
        problems += complaints(run_dir.refuse_unwritable, folder) or complaints(run_dir.refuse_foreign, folder, ours)
    problems += complaints(find(cfg.task).refuse_missing, cfg)
    Problems(problems).raise_if_any()


def _sweep(
    configs: list[Config], axes: dict[str, list[str]], folder: Path, at_once: int | None, command: list[str]
) -> int:
    from gptjax.research import sweep
    from gptjax.training.process import keep_buffers, use_compile_cache
    from gptjax.training.progress import Progress, duration

    use_compile_cache()
    keep_buffers()
    with Progress() as progress:
        progress.say(_count(configs, axes))
        results = sweep.sweep(configs, axes=tuple(axes), at_once=at_once, progress=progress)
        with progress.phase("drawing"):
            sweep.write(results, folder)
    summary = sweep.table(results.rows, results.axes)
    print("\n".join(["", *sweep.lines(summary[:SHOWN], results.axes)]))
    if len(summary) > SHOWN:
        print(f"... {len(summary) - SHOWN} more in {folder / 'sweep.json'}")
    seconds = sum(program["seconds"] for program in results.programs)
    compile_s = sum(program["compile_s"] for program in results.programs)
    print(f"\n{len(configs)} runs in {duration(seconds)}, of which {compile_s:.1f} s compilation")
    if summary[0]["val/loss"] is not None:
        verb = uses.verb_of(configs[0].task)
        best = [f"{key}={summary[0][key]}" for key in axes if key != "seed"]
        print(f"lowest validation loss: gptjax {verb} {shlex.join([*command, *best])}".rstrip())
    print(f"in {folder}: sweep.csv sweep.json sweep.png")
    return 0


def report(configs: list[Config], axes: dict[str, list[str]], folder: Path) -> list[str]:
    """Returns the lines of the report of a dry run of a sweep; the data is not read."""
    from gptjax.research import sweep

    groups = sweep.programs(configs)
    lines = [_count(configs, axes), *(f"  {key:<24} {', '.join(values)}" for key, values in axes.items())]
    apart = [key for key in axes if key != "seed" and key not in sweep.traceable(configs[0])]
    if apart:
        lines.append(f"  one program per value of {', '.join(apart)}; the other axes are vmapped in a program")
    if configs[0].task != "pretrain" and configs[0].train.epochs is not None and len(groups) < len(configs):
        lines.append("  train.epochs: seeds whose splits give different numbers of steps need programs of their own")
    steps = sum(len(group) * configs[group[0]].train.max_steps for group in groups)
    if configs[0].train.epochs is None:
        lines.append(f"  {steps:,} steps in total")
    return [*lines, f"  run directory {folder}", "dry run: no step was taken"]


def _count(configs: list[Config], axes: dict[str, list[str]]) -> str:
    from gptjax.research import sweep

    n, programs = len(configs), len(sweep.programs(configs))
    shape = " x ".join(str(len(values)) for values in axes.values())
    return f"{n} runs ({shape}) in {programs} program{'' if programs == 1 else 's'}"
