"""Paths over a tree of arrays: name a leaf, match a pattern, label, count.

A path is the keys joined by "/", such as "blocks/attn/q/kernel". A pattern is a shell glob over the whole
path, where "*" also crosses "/"; several are joined by "|": "wte/* | lm_head/*".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from gptjax.errors import UserError

T = TypeVar("T")


def path_string(path: tuple) -> str:
    """The "/"-joined name of one `jax.tree_util` key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in the tree's own order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flatten_nodes(tree: Any) -> dict[str, Any]:
    """`flatten` that ends where the dicts end: a leaf that is not a plain array stays whole."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {path_string(path): node for path, node in nodes}


def by_parent(tree: Any) -> dict[str, dict[str, Any]]:
    """{path of the dict that holds leaves: {last key: leaf}}."""
    out: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(tree).items():
        parent, _, name = path.rpartition("/")
        out.setdefault(parent, {})[name] = leaf
    return out


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` came from; every level becomes a dict."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_paths(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(path, leaf)` at every leaf; of several trees of one structure `fn(path, leaf, leaf, ..)`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(path_string(path), *leaves), tree, *rest)


def matches(pattern: str, path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, part.strip()) for part in pattern.split("|"))


def first_match(path: str, rules: Iterable[tuple[str, T]]) -> T | None:
    """The value of the first rule whose pattern matches the path; None where none does."""
    return next((value for pattern, value in rules if matches(pattern, path)), None)


def idle(pattern: str, paths: Iterable[str]) -> list[str]:
    """The parts of a pattern, between "|", that match none of the paths."""
    return [part.strip() for part in pattern.split("|") if not any(matches(part, path) for path in paths)]


def label(tree: Any, rules: tuple[tuple[str, Any], ...]) -> Any:
    """The value of the first rule whose pattern matches, at every leaf.

    Raises:
        UserError: a leaf that no rule covers; all of them are named.
    """
    missing = [path for path in flatten(tree) if not any(matches(pattern, path) for pattern, _ in rules)]
    if missing:
        raise UserError(f"no rule covers {', '.join(missing)}: add a pattern for each, or a last rule '*'")
    return map_paths(lambda path, _: first_match(path, rules), tree)


def split(tree: Any, pattern: str) -> tuple[Any, Any]:
    """(the part whose paths match, the rest), two trees; `join` makes the whole again.

    Raises:
        UserError: a part of the pattern, between "|", that matches nothing.
    """
    nodes = flatten_nodes(tree)
    if unused := idle(pattern, nodes):
        raise UserError(f"{', '.join(map(repr, unused))} matches no parameter; there are {', '.join(nodes)}")
    chosen = {path for path in nodes if matches(pattern, path)}
    return (
        unflatten({path: node for path, node in nodes.items() if path in chosen}),
        unflatten({path: node for path, node in nodes.items() if path not in chosen}),
    )


def join(first: Any, second: Any) -> Any:
    """One tree of the leaves of two that share none."""
    return unflatten(flatten_nodes(second) | flatten_nodes(first))


def size(tree: Any) -> int:
    """How many elements the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
