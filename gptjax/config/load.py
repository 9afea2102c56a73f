"""Reading a configuration: leaves from files and command lines -> `Config`, and back to YAML.

default < arch < preset < YAML (each may name its `base:`) < `a.b=c` on the command line.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, get_args, get_origin

from gptjax.config.aliases import unknown_key
from gptjax.config.check import complaints, shown, without_effect
from gptjax.config.leaves import Leaf, Provenance, from_args, from_mapping, read_text, split_list
from gptjax.config.leaves import from_yaml as leaves_of
from gptjax.config.schema import ARCHS, CHECKED_LATER, Computation, Config, flat, schema, type_name, without_null
from gptjax.errors import Problems, UserError, did_you_mean
from gptjax.files import user_path


def load_config(source: Optional[str | os.PathLike[str]] = None, *overrides: str) -> Config:
    """A preset or YAML file, changed by `"optim.lr=3e-4"` strings.

    Raises UserError that lists every unknown key, wrong type and impossible combination at once.
    """
    return resolve(source, *overrides)[0]


def resolve(
    source: Optional[str | os.PathLike[str]] = None,
    *overrides: str,
    leaves: Iterable[Leaf] = (),
    under: Iterable[Leaf] = (),
) -> tuple[Config, Provenance]:
    """`load_config`, and where each value came from. `leaves` are overrides that were read already, `under` goes below
    all others. Of a command line, `uses.resolve` refuses more."""
    for arg in (source, *overrides):
        if not isinstance(arg, str | os.PathLike | None):
            raise UserError(
                f"load_config: expected a preset's name, a YAML file and texts such as 'optim.lr=3e-4', got "
                f"{type(arg).__name__}; a nested dict goes to gptjax.config.from_dict"
            )
    if source is not None and "=" in str(source) and not Path(source).exists():
        source, overrides = None, (str(source), *overrides)
    given = from_args(overrides, "load_config")
    name = config_file(source).stem if source is not None else "default"
    return build([*under, *file_layers(source), *given, *leaves], f"runs/{name}")


def file_layers(source: Optional[str | os.PathLike[str]]) -> list[Leaf]:
    """What a preset, a file or a run says, after those of its `base:`; of None nothing."""
    if source is None:
        return []
    layers = _file_leaves(source)
    if (Path(source) / "config.yaml").is_file():  # a run, wherever it lies now
        layers.append(Leaf("run_dir", str(source), "the run's own folder"))
    return layers


def from_yaml(text: str, name: str = "yaml") -> Config:
    """What `to_yaml` wrote, or any YAML of the schema."""
    return build(leaves_of(text, name))[0]


def from_dict(values: dict[str, Any]) -> Config:
    """A nested dict of values, as strict as a file, or what `dataclasses.asdict` made of a config."""
    return build([leaf for leaf in from_mapping(values) if leaf.key != "model._derived"])[0]


def to_yaml(cfg: Config, provenance: Optional[Provenance] = None, keys: Optional[Iterable[str]] = None) -> str:
    """Every value, so that later defaults cannot change this run; with `# where` when the provenance is given. `keys`:
    of these settings alone."""
    lines, group = [], ""
    values = flat(cfg)
    for key in values if keys is None else keys:
        value = values[key]
        head, dot, leaf = key.rpartition(".")
        if dot and head != group:
            group = head
            lines.append(f"{head}:")
        text = f"{'  ' if dot else ''}{leaf}: {yaml_value(value)}"
        lines.append(f"{text:<44} # {provenance[key]}" if provenance else text)
    return "\n".join(lines) + "\n"


def diff(a: Config, b: Config) -> list[str]:
    """["optim.lr: 0.001 -> 0.0003", ..]"""
    before, after = flat(a), flat(b)
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


# ---------------------------------------------------------------- layers


def presets() -> dict[str, Path]:
    """Name -> YAML file: from the checkout's configs/, or from the copy inside an installed package."""
    package = Path(__file__).parents[1]
    root = next((path for path in (package / "_configs", package.parent / "configs") if path.is_dir()), None)
    return {path.stem: path for path in sorted(root.glob("*/*.yaml"))} if root else {}


def config_file(source: str | os.PathLike[str], near: Path = Path()) -> Path:
    """The file of a preset's name, a YAML path, or a run directory. Raises UserError with the nearest name."""
    text, path = str(source), near / source
    user_path(path)
    if path.is_dir() and (path / "config.yaml").exists():
        return path / "config.yaml"
    if path.is_file():
        return path
    known = presets()
    if text in known:
        return known[text]
    if text.endswith((".yaml", ".yml")) or "/" in text or path.exists():
        raise UserError(f"{path}: no such config file; `gptjax presets ls` lists what is here")
    hint = did_you_mean(text, known)
    raise UserError(f"no preset or file {text!r}{hint or '; presets: ' + ', '.join(known)}")


def _file_leaves(source: str | os.PathLike[str], near: Path = Path(), inside: tuple[Path, ...] = ()) -> list[Leaf]:
    """The file's leaves after those of its `base:`."""
    path = config_file(source, near)
    if path.resolve() in inside:
        raise UserError(f"{path}: its `base:` leads back to itself")
    leaves = leaves_of(read_text(path, "config"), short(path))
    if not leaves:
        raise UserError(f"{path}: the config is empty; `gptjax presets show shakespeare-char` prints one to start from")
    bases = [leaf for leaf in leaves if leaf.key == "base" and leaf.value]
    own = [leaf for leaf in leaves if leaf.key != "base"]
    if path in presets().values():
        own = [Leaf("task", path.parent.name, short(path)), *own]
    if not bases:
        return own
    if not isinstance(bases[0].value, str):
        raise UserError(f"{bases[0].where}: base: expected one preset or file, got {bases[0].value}")
    try:
        config_file(bases[0].value, path.parent)
    except UserError as error:
        raise UserError(f"{bases[0].where}: base: {error}") from error
    return [*_file_leaves(bases[0].value, path.parent, (*inside, path.resolve())), *own]


def short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def build(leaves: list[Leaf], run_dir: Optional[str] = None, problems: Iterable[str] = ()) -> tuple[Config, Provenance]:
    """Type every leaf by itself, then build, then validate: all problems in one error, after those that are known."""
    problems, bad = Problems(problems), set()
    values: dict[str, Any] = {}
    where: Provenance = {}
    for key, value, place in leaves:
        if key == "mesh" and value == "auto":
            key, value = "mesh.data", -1
        if key not in schema():
            if value is None and any(name.startswith(key + ".") for name in schema()):
                continue  # a group with every line commented out
            problems.append(f"{place}: {unknown_key(key, list(schema()))}")
            continue
        try:
            values[key], where[key] = _typed(key, value), place
        except ValueError as error:
            bad.add(key)
            problems.append(f"{place}: {key}: {error}")
    problems += _later_wins(leaves, values, where)
    if run_dir and values.get("run_dir") is None:
        values["run_dir"], where["run_dir"] = run_dir, "name of the config"
    later = CHECKED_LATER.set(True)
    try:
        cfg = _construct(Config, values, "")
    finally:
        CHECKED_LATER.reset(later)
    derived = {f"model.{name}" for name in ARCHS[cfg.model.arch] if values.get(f"model.{name}") is None}
    provenance = {key: f"arch={cfg.model.arch}" if key in derived else where.get(key, "default") for key in schema()}
    if not problems:
        problems += without_effect(cfg, where)
    problems += [text for keys, text in complaints(cfg, provenance) if not bad.intersection(keys)]
    problems.raise_if_any()
    return cfg, provenance


# (a, b): b rules a or belongs to it, so b of an earlier layer goes back to its default where a later one says a
RULED = (
    ("train.max_steps", "train.epochs"), ("data.source", "data.split"), ("data.source", "data.val_source"),
    ("data.split", "data.val_source"), ("data.val_fraction", "data.val_source"),
)  # fmt: skip


def _later_wins(leaves: list[Leaf], values: dict[str, Any], where: Provenance) -> Iterator[str]:
    """Drops what an earlier layer said of a ruling setting, and names two that one command line sets at once."""
    layers = list(dict.fromkeys(layer(leaf.where) for leaf in leaves))
    yield from _of_the_base(layers, values, where)
    for key, ruling in RULED:
        if values.get(key) is None or values.get(ruling) is None:
            continue
        first, second = layers.index(layer(where[key])), layers.index(layer(where[ruling]))
        if first > second:
            del values[ruling], where[ruling]
        elif first == second and key == "train.max_steps" and where[key] in ("command line", "load_config"):
            both = f"{key}={values[key]} and {ruling}={values[ruling]}"
            yield f"{where[key]}: {both}: the number of steps twice; give one of them"


def _of_the_base(layers: list[str], values: dict[str, Any], where: Provenance) -> Iterator[str]:
    """Drops what earlier layers than pretrain.base said of the model and the tokenizer, and names what others did. A
    file that `to_yaml` wrote holds both."""
    if values.get("pretrain.base") is None:
        return
    own = layers.index(layer(where["pretrain.base"]))
    written = [key for key in schema() if key in values and layer(where[key]) == layers[own]]
    whole = len(written) > len(schema()) // 2
    computed, clashing = {f"model.{item.name}" for item in fields(Computation)}, []
    for key in [key for key in values if key.startswith(("model.", "tokenizer.")) and key not in computed]:
        at = layers.index(layer(where[key]))
        if at < own:
            del values[key], where[key]
        elif at > own or not whole:
            clashing.append(f"{key} ({where[key]})")
    if clashing:
        base = f"pretrain.base={values['pretrain.base']}"
        yield f"{base} brings its own model and tokenizer: leave out {', '.join(clashing)}"


def layer(where: str) -> str:
    """The file of "base.yaml:3"; the command line is a layer of its own."""
    return re.sub(r":\d+$", "", where)


def _construct(cls: type, values: dict[str, Any], prefix: str) -> Any:
    given = {}
    for item in fields(cls):
        if isinstance(item.type, type) and is_dataclass(item.type):
            given[item.name] = _construct(item.type, values, f"{prefix}{item.name}.")
        elif prefix + item.name in values:
            given[item.name] = values[prefix + item.name]
    return cls(**given)


# ---------------------------------------------------------------- types


def _typed(key: str, value: Any) -> Any:
    """The value as the field's type. Text is converted, a lone value is a list of one. Raises ValueError."""
    hint = schema()[key]
    kind = without_null(hint)
    written = value if isinstance(value, str) else shown(value)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none", "~")):
        if kind is not hint:
            return None
        if value is None:
            raise ValueError(f"expected {type_name(hint)}, got null")
    listed = get_origin(kind) is tuple
    if listed:
        value = split_list(value) if isinstance(value, str) else value
        value = list(value) if isinstance(value, list | tuple) else [value]
        if all(isinstance(item, str) for item in value) and get_args(kind)[0] is str:
            return tuple(value)
    elif kind is str and isinstance(value, str):
        return value
    elif isinstance(value, str):
        value = value.strip()
        if kind is int and re.fullmatch(r"\d+(\.\d+)?e\d\d?", value) and float(value).is_integer():
            value = int(float(value))  # 1e3 -> 1000: people write counts so
    try:
        return tuple(_scalar(get_args(kind)[0], item) for item in value) if listed else _scalar(kind, value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {type_name(hint)}, got {written!r:.200}") from None


def _scalar(kind: Any, value: Any) -> Any:
    """The value as a bool, int, float, str or one of a Literal's words. Raises ValueError, never truncates a number."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind is bool and str(value).lower() in _BOOLEANS:
        return str(value).lower() in _BOOLEANS[::2]
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if kind is int and type(value) in (str, int):  # a bool is an int to isinstance
        return int(value)
    if kind is float and type(value) in (str, int, float):
        return float(value)
    raise ValueError


_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")  # by turns true and false


def yaml_value(value: object) -> str:
    import yaml

    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    style = '"' if isinstance(value, str) and not re.fullmatch(r"[\w./+@-]+", value, re.ASCII) else None
    text = yaml.safe_dump(value, default_style=style, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
