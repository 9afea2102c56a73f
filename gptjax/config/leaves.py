"""Reads settings from YAML, arguments such as `a.b=c`, and dicts into a flat list of leaves. A leaf has the key of a
setting, its value, and the place where the value was set.

This module does not use the schema: `load.build` later converts the value of each leaf to the type of its setting.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax.errors import Problems, UserError
from gptjax.files import other_encoding

if TYPE_CHECKING:
    import yaml

EXAMPLE = "optim.lr=3e-4"


class Leaf(NamedTuple):
    """One setting as the user wrote it: the key, the value (a string if the setting was read from text, None for YAML's
    null), and the place where the setting was set, such as "x.yaml:12"."""

    key: str
    value: Any
    where: str


# A `Provenance` maps the key of each setting to the place where its value was set, such as
# "configs/pretrain/x.yaml:12", "arch=modern", "command line" or "default".
Provenance = dict[str, str]


def read_text(path: Path, what: str = "file") -> str:
    """Reads a text file. Raises UserError if the file does not exist, is a folder, cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
        if other := other_encoding(data):
            raise UserError(f"{path}: {other}")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; is this the right {what}?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None


# Limits of a config file: number of characters, number of values after aliases are expanded, number of nesting levels.
MAX_YAML, MAX_VALUES, MAX_DEPTH = 1 << 18, 20_000, 16
MAX_KEYS, MAX_KEY = 500, 200  # Limits of a config file: number of settings, number of characters per key.


def from_yaml(text: str, name: str) -> list[Leaf]:
    """Returns a leaf for every scalar and list of a YAML mapping; the place where the leaf was set is `name:line`.

    Raises:
        UserError: the YAML is invalid, a key occurs twice, or the text is too large or too deeply nested for a config.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise UserError(f"{name}: {len(text):,} characters; a config can have at most {MAX_YAML:,}")
    problems = Problems()
    try:
        if not _fits_depth(text, MAX_DEPTH):
            raise UserError(f"{name}: nested more than {MAX_DEPTH} levels deep, too deep for a config")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{name}:{root.start_mark.line + 1}: expected `key: value` lines, got a {root.id}")  # type: ignore[attr-defined]
        _refuse_large(root, name)
        leaves = list(itertools.islice(_walk(loader, root, "", name, problems), MAX_KEYS + 1))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: a control character; is this a text file?") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        location = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{location}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if len(leaves) > MAX_KEYS:
        raise UserError(f"{name}: more than {MAX_KEYS} settings; is this a config?")
    problems.raise_if_any()
    return leaves


def _fits_depth(text: str, levels: int) -> bool:
    """Returns True if the mappings and lists of a YAML text are nested at most `levels` deep. `_is_shallow` is not
    recursive, so that the check also works for a text that is nested too deeply for the recursive functions of the YAML
    parser."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > levels:
            return False
    return True


def _refuse_large(root: yaml.Node, name: str) -> None:
    """Raises UserError if the aliases of a YAML document expand to too many values, or if an alias contains itself."""
    import yaml

    # `sizes` maps the id of each YAML node to the number of values in the node after aliases are expanded. `sizes[id]`
    # is 0 while the values of a node are being counted; if a YAML node is reached again while its number in `sizes` is
    # 0, the node contains itself.
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            items: Iterable[Any] = node.value if isinstance(node, yaml.CollectionNode) else ()
            children = itertools.chain.from_iterable(items) if isinstance(node, yaml.MappingNode) else items
            sizes[id(node)] = 1 + sum(map(size, children))
        elif not sizes[id(node)]:
            raise UserError(f"{name}:{node.start_mark.line + 1}: an alias that contains itself")
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise UserError(f"{name}: aliases expand to {size(root):,} values; a config can have at most {MAX_VALUES:,}")


def _walk(
    loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, name: str, problems: Problems
) -> Iterator[Leaf]:
    import yaml

    loader.flatten_mapping(node)
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or len(key_node.value) > MAX_KEY:
            problems.append(f"{name}:{line}: expected a name of at most {MAX_KEY} characters before the colon")
            continue
        key = prefix + key_node.value
        if key in seen:
            problems.append(f"{name}:{line}: {key} is set twice, first in line {seen[key]}")
        seen[key] = line
        if isinstance(value, yaml.MappingNode):
            yield from _walk(loader, value, key + ".", name, problems)
        else:
            yield Leaf(key, _plain(value, f"{name}:{line}: {key}", problems), f"{name}:{line}")


def _plain(node: yaml.Node, location: str, problems: Problems) -> str | list[str] | None:
    """Returns the value of a YAML node: a string for a scalar, a list of strings for a sequence, or None for null.
    Scalars stay strings until `load.build` converts them to the types of the settings, because a YAML parser would read
    1e-3 as a string and `on` as a bool."""
    import yaml

    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        problems.append(f"{location}: the YAML tag {node.tag} is not supported")
        return None
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    problems.append(f"{location}: expected a value or a flat list of values")
    return None


def from_args(args: Iterable[str], where: str = "command line", example: str = EXAMPLE) -> list[Leaf]:
    """Returns a leaf for each command-line argument of the form `a.b=c`, `--a.b=c` or `--a.b c`; key and value are
    split at the first `=`. A command-line argument of any other form raises UserError."""
    leaves, problems, rest = [], Problems(), list(args)
    while rest:
        arg = rest.pop(0)
        key, equals, value = arg.partition("=")
        flag = key.startswith("--")
        key = key.removeprefix("--").replace("-", "_")
        if flag and not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if not equals or not key.strip():
            form = f"{arg} VALUE" if flag else "KEY=VALUE"
            problems.append(f"{arg!r}: expected {form}, such as {example}")
            continue
        leaves.append(Leaf(key.strip(), value, where))
    problems.raise_if_any()
    return leaves


def from_mapping(values: Mapping[str, object], where: str = "dict", prefix: str = "") -> Iterator[Leaf]:
    """Yields a leaf for each setting in a nested dict whose leaves are Python values."""
    if prefix.count(".") > MAX_DEPTH:
        raise UserError(f"{where}: {prefix[:80]}..: nested more than {MAX_DEPTH} levels deep, too deep for a config")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from from_mapping(value, where, f"{prefix}{key}.")
        else:
            yield Leaf(f"{prefix}{key}", value, where)


def split_list(text: str) -> list[str]:
    """Splits the text of a list such as `[a, "b c"]` or `(a, b)` into the texts of its items. A text without brackets,
    and the name of an existing file, is returned as a list of a single item. Raises ValueError if the closing bracket
    is missing or the list is nested."""
    import yaml

    stripped = text.strip()
    if not stripped.startswith(("[", "(")) or os.path.exists(text):
        return [text]
    if len(stripped) > MAX_YAML:
        raise ValueError(f"a list of {len(stripped):,} characters; at most {MAX_YAML:,} are allowed")
    if stripped[0] == "(" and stripped[-1] == ")":
        stripped = f"[{stripped[1:-1]}]"
    try:
        items = yaml.load(stripped, Loader=yaml.BaseLoader) if _fits_depth(stripped, 1) else None
    except yaml.YAMLError:
        raise ValueError("a list that is not closed") from None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("not a flat list")
    return items
