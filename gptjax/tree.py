"""Functions that address the leaves of a pytree by their paths: they match patterns, label and split leaves, and count
elements.

The path of a leaf consists of the keys that lead to the leaf, joined by "/", such as "blocks/attn/q/kernel". A pattern
is a shell glob that must match the whole path. In a pattern, "*" also matches "/", and alternatives are joined by "|":
"wte/* | lm_head/*". A key in brackets that consists of ranges of numbers matches all numbers in the ranges:
"blocks/[0-3,8-11]/*" matches blocks/3/.. and blocks/10/...
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from gptjax._moved import moved_name
from gptjax.errors import UserError

T = TypeVar("T")
# `_RANGES` matches a whole key in a pattern, such as [8-11] or [0-3,8-11]. Brackets without "-" and "," in a pattern
# are a set of characters, as in a shell glob.
_RANGES = re.compile(r"(?<![^/])\[(?=[^]]*[-,])(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\](?![^/])")


def path_string(path: tuple) -> str:
    """Returns the keys of a `jax.tree_util` key path, joined by "/", as a string."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten a pytree to a dict that maps each path to its leaf, in the order of `jax.tree.leaves`."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flatten_nodes(tree: Any) -> dict[str, Any]:
    """Flatten nested dicts to a dict that maps each path to its leaf; unlike in `flatten`, any pytree node that is not
    a dict counts as one leaf."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {path_string(path): node for path, node in nodes}


def by_parent(tree: Any) -> dict[str, dict[str, Any]]:
    """Group the leaves by their parent dict: returns a dict that maps the path of each parent to a dict of the parent's
    leaves, whose keys are the last keys of the leaves' paths.
    """
    out: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(tree).items():
        parent, _, name = path.rpartition("/")
        out.setdefault(parent, {})[name] = leaf
    return out


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Build nested dicts from a flat dict whose keys are paths; `unflatten` is the inverse of `flatten`.

    Args:
        leaves: dict that maps the paths to the leaves.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_paths(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Replace every leaf of a tree by `fn(path, leaf)`. If `rest` holds further trees of the same structure, `fn` also
    receives the corresponding leaves of these trees: `fn(path, leaf, leaf, ..)`.
    """
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(path_string(path), *leaves), tree, *rest)


def matches(pattern: str, path: str) -> bool:
    """Returns True if the pattern, or any of its alternatives, matches the path."""
    return any(_matches_glob(glob.strip(), path) for glob in pattern.split("|"))


def _matches_glob(glob: str, path: str) -> bool:
    match = _RANGES.search(glob)
    if match is None:
        return fnmatch.fnmatchcase(path, glob)
    ranges = _parse_ranges(match[1])
    numbers = {
        key for key in path.split("/") if key.isdecimal() and any(low <= int(key) <= high for low, high in ranges)
    }
    return any(_matches_glob(glob[: match.start()] + number + glob[match.end() :], path) for number in numbers)


def number_ranges(glob: str) -> list[tuple[int, int]]:
    """Returns the ranges of numbers in the brackets of a pattern, as pairs (first, last): [(0, 3), (8, 8)] for the
    brackets [0-3,8]."""
    return [numbers for match in _RANGES.finditer(glob) for numbers in _parse_ranges(match[1])]


def _parse_ranges(text: str) -> list[tuple[int, int]]:
    ends = [part.split("-") for part in text.split(",")]
    return [(int(part[0]), int(part[-1])) for part in ends]


def first_match(path: str, rules: Iterable[tuple[str, T]]) -> T | None:
    """Returns the value of the first rule (pattern, value) whose pattern matches the path, or None if none matches."""
    return next((value for pattern, value in rules if matches(pattern, path)), None)


def unmatched(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the alternatives of a pattern that match none of the paths."""
    return [glob.strip() for glob in pattern.split("|") if not any(matches(glob, path) for path in paths)]


def label(tree: Any, rules: tuple[tuple[str, Any], ...]) -> Any:
    """Replace every leaf by the value of the first rule (pattern, value) whose pattern matches the path of the leaf.

    Raises:
        UserError: a leaf's path matches no rule; the message names all such leaves.
    """
    missing = [path for path in flatten(tree) if not any(matches(pattern, path) for pattern, _ in rules)]
    if missing:
        raise UserError(f"no rule covers {', '.join(missing)}: add a pattern for each, or a last rule '*'")
    return map_paths(lambda path, _: first_match(path, rules), tree)


def split(tree: Any, pattern: str) -> tuple[Any, Any]:
    """Split a tree into two trees: the first tree has the leaves whose paths match the pattern, and the second tree has
    all other leaves. `join` is the inverse.

    Raises:
        UserError: an alternative of the pattern matches no leaf.
    """
    nodes = flatten_nodes(tree)
    if unused := unmatched(pattern, nodes):
        raise UserError(f"{', '.join(map(repr, unused))} matches no parameter; there are {', '.join(nodes)}")
    chosen = {path for path in nodes if matches(pattern, path)}
    return (
        unflatten({path: node for path, node in nodes.items() if path in chosen}),
        unflatten({path: node for path, node in nodes.items() if path not in chosen}),
    )


def join(first: Any, second: Any) -> Any:
    """Merge two trees that have no leaf in common."""
    return unflatten(flatten_nodes(second) | flatten_nodes(first))


def size(tree: Any) -> int:
    """Returns the number of elements in all arrays of the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
