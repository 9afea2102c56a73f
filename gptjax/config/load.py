"""Loads a `Config` from presets, YAML files and command lines, and converts a `Config` to YAML.

Settings are read from several layers, and later layers override earlier layers. The layers have this order: the
defaults, the defaults of model.arch, the file that the key `base:` of a preset or YAML file names, this preset or YAML
file, and the command line (`a.b=c`).
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
    """Loads a `Config` from a preset, YAML file or run directory, with overrides such as "optim.lr=3e-4".

    Args:
        source: name of a preset, a YAML file or a run directory, or None for the default settings of gptjax. If
            `source` contains `=` and is not the path of an existing file, it is an override of the default settings.
        overrides: settings as strings "key=value".

    Raises:
        UserError: unknown keys, wrong types or invalid combinations; the message lists all of them.
    """
    return resolve(source, *overrides)[0]


def resolve(
    source: Optional[str | os.PathLike[str]] = None,
    *overrides: str,
    leaves: Iterable[Leaf] = (),
    defaults: Iterable[Leaf] = (),
) -> tuple[Config, Provenance]:
    """Loads a config like `load_config`, and also returns the place where each value was set. The command-line
    interface uses `uses.resolve` instead, which also refuses settings that the command's task does not read.

    Args:
        leaves: further settings, already parsed, which take precedence over `overrides`.
        defaults: settings that form the first layer, so that all other layers override them.
    """
    for arg in (source, *overrides):
        if not isinstance(arg, str | os.PathLike | None):
            raise UserError(
                f"load_config: expected a preset's name, a YAML file and strings such as 'optim.lr=3e-4', got "
                f"{type(arg).__name__}; for a nested dict use gptjax.config.from_dict"
            )
    if source is not None and "=" in str(source) and not Path(source).exists():
        source, overrides = None, (str(source), *overrides)
    given = from_args(overrides, "load_config")
    name = config_file(source).stem if source is not None else "default"
    return build([*defaults, *file_layers(source), *given, *leaves], f"runs/{name}")


def file_layers(source: Optional[str | os.PathLike[str]]) -> list[Leaf]:
    """Returns the settings of a preset, YAML file or run directory as leaves; [] if `source` is None. If the file has
    the key `base:`, the list begins with the leaves of the file that `base:` names."""
    if source is None:
        return []
    layers = _file_leaves(source)
    # If the run directory was moved, the run_dir in its config.yaml is wrong, so that run_dir is overridden here.
    if (Path(source) / "config.yaml").is_file():
        layers.append(Leaf("run_dir", str(source), "the run's own folder"))
    return layers


def from_yaml(text: str, name: str = "yaml") -> Config:
    """Loads a config from YAML text, such as the text that `to_yaml` returns."""
    return build(leaves_of(text, name))[0]


def from_dict(values: dict[str, Any]) -> Config:
    """Loads a config from a nested dict, such as `dataclasses.asdict(cfg)`, and validates it like a config file."""
    return build([leaf for leaf in from_mapping(values) if leaf.key != "model._derived"])[0]


def to_yaml(cfg: Config, provenance: Optional[Provenance] = None, keys: Optional[Iterable[str]] = None) -> str:
    """Returns the config as YAML text. By default the YAML text contains all settings, including settings with their
    default values, so that a later change of the defaults does not change a stored config.

    Args:
        provenance: the place where each setting was set, to be written as a comment after the value of the setting;
            None for a text without comments.
        keys: the keys of the settings to write, or None for all settings.
    """
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
    """Returns a list with a line of text for each setting that differs between two configs, such as "optim.lr: 0.001 ->
    0.0003"."""
    before, after = flat(a), flat(b)
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


# ---------------------------------------------------------------- layers


def presets() -> dict[str, Path]:
    """Returns a dict that maps the name of each preset to the path of its YAML file, in configs/ of the checkout or in
    the installed package."""
    package = Path(__file__).parents[1]
    root = next((path for path in (package / "_configs", package.parent / "configs") if path.is_dir()), None)
    return {path.stem: path for path in sorted(root.glob("*/*.yaml"))} if root else {}


def config_file(source: str | os.PathLike[str], near: Path = Path()) -> Path:
    """Returns the path of the YAML file for the name of a preset, a file path or a run directory. If the file does not
    exist, the function raises a UserError that suggests the preset with the most similar name."""
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
        raise UserError(f"{path}: no such config file; `gptjax presets ls` lists the presets")
    hint = did_you_mean(text, known)
    raise UserError(f"no preset or file {text!r}{hint or '; presets: ' + ', '.join(known)}")


def _file_leaves(source: str | os.PathLike[str], near: Path = Path(), parents: tuple[Path, ...] = ()) -> list[Leaf]:
    """Returns the settings of a config file as leaves. If the file has the key `base:`, the list begins with the leaves
    of the file that `base:` names.

    Args:
        parents: the files that were read before this file; each of them names the next one in its `base:`. UserError is
            raised if this file is one of them, because `base:` then forms a cycle.
    """
    path = config_file(source, near)
    if path.resolve() in parents:
        raise UserError(f"{path}: its `base:` leads back to itself")
    leaves = leaves_of(read_text(path, "config"), short(path))
    if not leaves:
        raise UserError(f"{path}: the config is empty; `gptjax presets show shakespeare-char` prints one to start from")
    bases = [leaf for leaf in leaves if leaf.key == "base" and leaf.value]
    leaves = [leaf for leaf in leaves if leaf.key != "base"]
    if path in presets().values():
        leaves = [Leaf("task", path.parent.name, short(path)), *leaves]
    if not bases:
        return leaves
    if not isinstance(bases[0].value, str):
        raise UserError(f"{bases[0].where}: base: expected one preset or file, got {bases[0].value}")
    try:
        config_file(bases[0].value, path.parent)
    except UserError as error:
        raise UserError(f"{bases[0].where}: base: {error}") from error
    return [*_file_leaves(bases[0].value, path.parent, (*parents, path.resolve())), *leaves]


def short(path: Path) -> str:
    """Returns the path relative to the working directory if the path is inside the working directory, otherwise the
    unchanged path."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def build(leaves: list[Leaf], run_dir: Optional[str] = None, problems: Iterable[str] = ()) -> tuple[Config, Provenance]:
    """Builds a config from leaves: converts values to the types of their fields, constructs the config and validates
    it.

    Returns the config, and the place where each of its values was set.

    Args:
        leaves: the settings; a later leaf overrides earlier leaves of the same key.
        run_dir: the run directory, if `leaves` do not set run_dir.
        problems: error texts from earlier checks, which are reported in the same UserError.

    Raises:
        UserError: unknown keys, wrong types or invalid combinations; the message lists all of them.
    """
    problems, bad = Problems(problems), set()
    values: dict[str, Any] = {}
    set_at: Provenance = {}
    for key, value, location in leaves:
        if key == "mesh" and value == "auto":
            key, value = "mesh.data", -1
        if key not in schema():
            if value is None and any(name.startswith(key + ".") for name in schema()):
                continue  # a group such as `model:` is null in YAML if all settings in the group are commented out
            problems.append(f"{location}: {unknown_key(key, list(schema()))}")
            continue
        try:
            values[key], set_at[key] = _typed(key, value), location
        except ValueError as error:
            bad.add(key)
            problems.append(f"{location}: {key}: {error}")
    problems += _drop_overruled(leaves, values, set_at)
    if run_dir and values.get("run_dir") is None:
        values["run_dir"], set_at["run_dir"] = run_dir, "name of the config"
    later = CHECKED_LATER.set(True)
    try:
        cfg = _construct(Config, values, "")
    finally:
        CHECKED_LATER.reset(later)
    derived = {f"model.{name}" for name in ARCHS[cfg.model.arch] if values.get(f"model.{name}") is None}
    provenance = {key: f"arch={cfg.model.arch}" if key in derived else set_at.get(key, "default") for key in schema()}
    if not problems:
        problems += without_effect(cfg, set_at)
    problems += [text for keys, text in complaints(cfg, provenance) if not bad.intersection(keys)]
    problems.raise_if_any()
    return cfg, provenance


# `RULED` is a tuple of pairs of settings (a, b). In each pair (a, b) of `RULED`, the setting b takes precedence over
# the setting a, such as train.epochs over train.max_steps, or b is only meaningful for a certain value of a, such as
# data.split for data.source. For each pair (a, b) in `RULED`: if a later layer sets a, the value of b from an earlier
# layer is dropped, so that b has its default value again.
RULED = (
    ("train.max_steps", "train.epochs"), ("data.source", "data.split"), ("data.source", "data.val_source"),
    ("data.split", "data.val_source"), ("data.val_fraction", "data.val_source"),
)  # fmt: skip


def _drop_overruled(leaves: list[Leaf], values: dict[str, Any], set_at: Provenance) -> Iterator[str]:
    """Drops overruled settings from `values` and `set_at`, and yields an error text for each pair of settings that
    exclude each other.

    A setting is dropped if another setting in a later layer overrules this setting; `RULED` and `_drop_base_settings`
    define which settings overrule which.
    """
    layers = list(dict.fromkeys(layer(leaf.where) for leaf in leaves))
    yield from _drop_base_settings(layers, values, set_at)
    for key, ruling in RULED:
        if values.get(key) is None or values.get(ruling) is None:
            continue
        first, second = layers.index(layer(set_at[key])), layers.index(layer(set_at[ruling]))
        if first > second:
            del values[ruling], set_at[ruling]
        elif first == second and key == "train.max_steps" and set_at[key] in ("command line", "load_config"):
            both = f"{key}={values[key]} and {ruling}={values[ruling]}"
            yield f"{set_at[key]}: {both} both set the number of steps; give one of them"


def _drop_base_settings(layers: list[str], values: dict[str, Any], set_at: Provenance) -> Iterator[str]:
    """Drops or refuses model and tokenizer settings if pretrain.base is set, because the model config and the tokenizer
    of the base model are used. The settings in `Computation`, such as model.dtype, are kept even if pretrain.base is
    set.

    Model and tokenizer settings are dropped if their layer comes before the layer that sets pretrain.base; otherwise an
    error text is yielded. If a file sets pretrain.base and more than half of all settings, the model and tokenizer
    settings in the file are kept without an error, because a file with so many settings was written by `to_yaml`.
    """
    if values.get("pretrain.base") is None:
        return
    base_layer = layers.index(layer(set_at["pretrain.base"]))
    same_layer = [key for key in schema() if key in values and layer(set_at[key]) == layers[base_layer]]
    is_complete = len(same_layer) > len(schema()) // 2
    computed, clashing = {f"model.{item.name}" for item in fields(Computation)}, []
    for key in [key for key in values if key.startswith(("model.", "tokenizer.")) and key not in computed]:
        key_layer = layers.index(layer(set_at[key]))
        if key_layer < base_layer:
            del values[key], set_at[key]
        elif key_layer > base_layer or not is_complete:
            clashing.append(f"{key} ({set_at[key]})")
    if clashing:
        base = f"pretrain.base={values['pretrain.base']}"
        yield f"{base} brings its own model and tokenizer: leave out {', '.join(clashing)}"


def layer(where: str) -> str:
    """Converts the place where a setting was set to the name of the setting's layer: returns "base.yaml" for the place
    "base.yaml:3", and "command line" for the place "command line"."""
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
    """Converts a value to the type of its setting. If a list is expected, a single value is converted to a list of one
    item.

    Raises:
        ValueError: the value cannot be converted to the type of the setting.
    """
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
            value = int(float(value))  # 1e3 -> 1000
    try:
        return tuple(_scalar(get_args(kind)[0], item) for item in value) if listed else _scalar(kind, value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {type_name(hint)}, got {written!r:.200}") from None


def _scalar(kind: Any, value: Any) -> Any:
    """Converts a value to the type `kind`: bool, int, float, str or a Literal. A value that cannot be converted exactly
    raises ValueError; numbers are never truncated."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind is bool and str(value).lower() in _BOOLEANS:
        return str(value).lower() in _BOOLEANS[::2]
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if kind is int and type(value) in (str, int):  # isinstance is not used here, because a bool is an instance of int
        return int(value)
    if kind is float and type(value) in (str, int, float):
        return float(value)
    raise ValueError


# words for true (at even indices) and for false (at odd indices)
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def yaml_value(value: object) -> str:
    import yaml

    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    style = '"' if isinstance(value, str) and not re.fullmatch(r"[\w./+@-]+", value, re.ASCII) else None
    text = yaml.safe_dump(value, default_style=style, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
