"""`gptjax presets ls | show | cp`: lists, prints or copies the presets, the config files that come with gptjax."""

from __future__ import annotations

import itertools
from pathlib import Path

from gptjax.config import config_file, presets
from gptjax.config.leaves import read_text
from gptjax.config.uses import verb_of
from gptjax.errors import UserError, did_you_mean

ACTIONS = ("ls", "show", "cp")


def run(args: list[str]) -> int:
    action, *rest = args or ["ls"]
    if action == "ls" and not rest:
        for task, group in itertools.groupby(presets().items(), lambda item: item[1].parent.name):
            print(f"gptjax {verb_of(task)} PRESET")
            for name, _ in group:
                print(f"  {name:<24} {_read(name).partition(chr(10))[0].removeprefix('#').strip()}")
    elif action == "show" and len(rest) == 1:
        print(_read(rest[0]), end="")
    elif action == "cp" and len(rest) == 2:
        text, path = _read(rest[0]), Path(rest[1])
        if path.is_dir():
            path = path / f"{rest[0]}.yaml"
        try:
            with open(path, "x", encoding="utf-8") as out:
                out.write(text)
        except FileExistsError:
            raise UserError(f"{path} exists already: choose another name") from None
        preset = presets().get(rest[0])  # `preset` is None if the user named a file or run directory
        print(f"{path}  (run it: gptjax {verb_of(preset.parent.name)} {path})" if preset else path)
    elif action not in ACTIONS:
        raise UserError(f"presets {action}: expected {', '.join(ACTIONS)}{did_you_mean(action, ACTIONS)}")
    else:
        raise UserError("expected: gptjax presets ls | show PRESET | cp PRESET FILE.yaml")
    return 0


def _read(name: str) -> str:
    return read_text(config_file(name), "config")
