"""Reading settings from YAML, `a.b=c` and dicts into flat leaves that remember where they stand.

Nothing here knows the schema: a leaf's text is typed later, by the field it is for.
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
    """One setting as it was written. `value` is text when it came from text, None for YAML's null."""

    key: str
    value: Any
    where: str


Provenance = dict[str, str]  # "optim.lr" -> "configs/pretrain/x.yaml:12", "arch=modern", "command line" or "default"


def read_text(path: Path, what: str = "file") -> str:
    """The file's text. Raises UserError: missing, a folder, unreadable, not UTF-8."""
    try:
        data = path.read_bytes()
        if other := other_encoding(data):
            raise UserError(f"{path}: {other}")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, byte {error.start} is not; is this the right {what}?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None


MAX_YAML, MAX_VALUES, MAX_DEPTH = 1 << 18, 20_000, 16  # characters; values after aliases; levels of mappings and lists
MAX_KEYS, MAX_KEY = 500, 200  # names, their characters


def from_yaml(text: str, name: str) -> list[Leaf]:
    """Every scalar and list of a YAML mapping, with `name:line`. Raises UserError at YAML mistakes, double keys, and
    what is no config by its size or nesting."""
    import yaml

    if len(text) > MAX_YAML:
        raise UserError(f"{name}: {len(text):,} characters, more than a config can have ({MAX_YAML:,})")
    problems = Problems()
    try:
        if not _is_flat(text, MAX_DEPTH):
            raise UserError(f"{name}: more than {MAX_DEPTH} levels, too many for a config")
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
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{at}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if len(leaves) > MAX_KEYS:
        raise UserError(f"{name}: more than {MAX_KEYS} settings; is this a config?")
    problems.raise_if_any()
    return leaves


def _is_flat(text: str, levels: int) -> bool:
    """Whether mappings and lists stand in at most so many levels; looked at before anything recursive is done."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > levels:
            return False
    return True


def _refuse_large(root: yaml.Node, name: str) -> None:
    """Raises UserError where a few aliases stand for many values, or one leads back to itself."""
    import yaml

    sizes: dict[int, int] = {}  # by node, with what its aliases stand for; 0 while it is counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            inner: Iterable[Any] = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = itertools.chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
            sizes[id(node)] = 1 + sum(map(size, parts))
        elif not sizes[id(node)]:
            raise UserError(f"{name}:{node.start_mark.line + 1}: an alias that stands inside what it stands for")
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise UserError(f"{name}: its aliases stand for {size(root):,} values, a config has {MAX_VALUES:,} at most")


def _walk(
    loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, name: str, problems: Problems
) -> Iterator[Leaf]:
    import yaml

    loader.flatten_mapping(node)
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or len(key_node.value) > MAX_KEY:
            problems.append(f"{name}:{line}: expected a name before the colon, of at most {MAX_KEY} characters")
            continue
        key = prefix + key_node.value
        if key in seen:
            problems.append(f"{name}:{line}: {key} is given twice, first in line {seen[key]}")
        seen[key] = line
        if isinstance(value, yaml.MappingNode):
            yield from _walk(loader, value, key + ".", name, problems)
        else:
            yield Leaf(key, _plain(value, f"{name}:{line}: {key}", problems), f"{name}:{line}")


def _plain(node: yaml.Node, what: str, problems: Problems) -> str | list[str] | None:
    """A scalar's own text (the schema types it: YAML reads 1e-3 as a string and `on` as a bool), a list, or None."""
    import yaml

    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        problems.append(f"{what}: the YAML tag {node.tag} means nothing here")
        return None
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    problems.append(f"{what}: expected a value or a flat list of values")
    return None


def from_args(args: Iterable[str], where: str = "command line", example: str = EXAMPLE) -> list[Leaf]:
    """`a.b=c`, `--a.b=c` and `--a.b c`, split at the first `=` only. Raises UserError for anything else."""
    leaves, problems, rest = [], Problems(), list(args)
    while rest:
        arg = rest.pop(0)
        key, equals, value = arg.partition("=")
        flag = key.startswith("--")
        key = key.removeprefix("--").replace("-", "_")
        if flag and not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if not equals or not key.strip():
            shape = f"{arg} VALUE" if flag else "KEY=VALUE"
            problems.append(f"{arg!r}: expected {shape}, such as {example}")
            continue
        leaves.append(Leaf(key.strip(), value, where))
    problems.raise_if_any()
    return leaves


def from_mapping(values: Mapping[str, object], where: str = "dict", prefix: str = "") -> Iterator[Leaf]:
    """Every leaf of a nested dict of Python values."""
    if prefix.count(".") > MAX_DEPTH:
        raise UserError(f"{where}: {prefix[:80]}..: more than {MAX_DEPTH} levels, too many for a config")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from from_mapping(value, where, f"{prefix}{key}.")
        else:
            yield Leaf(f"{prefix}{key}", value, where)


def split_list(text: str) -> list[str]:
    """`[a, "b c"]` or `(a, b)` -> its parts as text; anything else -> one part, and so the name of a file that is
    there, whatever it looks like. Raises ValueError when not closed."""
    import yaml

    stripped = text.strip()
    if not stripped.startswith(("[", "(")) or os.path.exists(text):
        return [text]
    if len(stripped) > MAX_YAML:
        raise ValueError(f"a list of {len(stripped):,} characters, at most {MAX_YAML:,} are read")
    if stripped[0] == "(" and stripped[-1] == ")":
        stripped = f"[{stripped[1:-1]}]"
    try:
        items = yaml.load(stripped, Loader=yaml.BaseLoader) if _is_flat(stripped, 1) else None
    except yaml.YAMLError:
        raise ValueError("a list that is not closed") from None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("not a flat list")
    return items
