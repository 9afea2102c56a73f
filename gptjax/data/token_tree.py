"""Merges several token sequences with common prefixes into a token tree: one example that holds each prefix once.

    tree = merge([(ids_1, weights_1), (ids_2, weights_2)])

A chat template may render an earlier turn differently once later turns follow; for example, Qwen3's template drops the
reasoning of earlier answers. If later turns change how an earlier turn is rendered, the token sequence that trains an
answer is not a prefix of the token sequence that trains the next answer:

    sequences      u 1 < t > a E            user turn "u1", answer "<t>aE" with reasoning t; E is only a target
                   u 1 a E v 2 b E          the same turn without the reasoning, a second turn "v2", answer "bE"

    index          0 1 2 3 4 5 6 7 8 9 10   a row of the tree in depth-first order
    tokens         u 1 < t > a a E v 2 b
    targets        1 < t > a E E v 2 b E
    weights        0 1 1 1 1 1 0 0 0 1 1
    positions      0 1 2 3 4 5 2 3 4 5 6    number of tokens before this one on the path from the root
    subtree_end    11 11 6 6 6 6 11 11 11 11 11

A token attends to the tokens on its own path: the earlier tokens whose `subtree_end` is larger than its index. The
losses and gradients of a token tree equal the losses and gradients of one row per sequence, because every token attends
only to the tokens on its own path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TokenTree(NamedTuple):
    """An example of n tokens as a token tree in depth-first order; every array has the shape [n]. In a `TokenTree`, the
    array weights is float32, and all other arrays are int32."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray  # Loss weight of each target.
    positions: np.ndarray  # Number of earlier tokens on the path from the root to each token.
    subtree_end: np.ndarray  # Index just after the last token of the subtree that begins at each token.


class _Node:
    """A token of a token tree, and the target of this token."""

    __slots__ = ("children", "depth", "target", "token", "weight")

    def __init__(self, token: int, depth: int):
        self.token, self.depth = token, depth
        self.target, self.weight = 0, 0.0
        self.children: list[_Node] = []

    def admits(self, target: int, weight: float) -> bool:
        """Returns whether this node of the token tree can have the target `target`; a target of weight 0 has no effect
        on the loss."""
        return target == self.target or weight == 0 or self.weight == 0

    def add(self, target: int, weight: float) -> None:
        if weight or not self.weight:
            self.target = target
        self.weight += weight


def merge(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenTree:
    """Merges token sequences into one token tree by sharing the common prefixes of the sequences.

    Each token of a token tree has one target. If two sequences begin with the same tokens, but the last of these tokens
    has different targets of non-zero weight in the two sequences, the token tree holds the last token twice. The weight
    of a target that several sequences share is the sum of their weights.

    Args:
        sequences: for each sequence its token ids [n] and the loss weight of each id as a target [n], with n >= 2. The
            first weight is not used, as the first id is no target; the last id is only a target.
    """
    return merge_paths(sequences)[0]


def merge_paths(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[TokenTree, list[np.ndarray]]:
    """Returns the token tree of `merge`, and the indices [n - 1] in the tree of the tokens of each sequence."""
    root, paths = _Node(-1, -1), list[list[_Node]]()
    for ids, weights in sequences:
        node = root
        paths.append([])
        targets = zip(ids[:-1].tolist(), ids[1:].tolist(), weights[1:].tolist(), strict=True)
        for token, target, weight in targets:
            same = (child for child in node.children if child.token == token and child.admits(target, weight))
            child = next(same, None)
            if child is None:
                child = _Node(token, node.depth + 1)
                node.children.append(child)
            child.add(target, weight)
            node = child
            paths[-1].append(node)
    tree, order = _depth_first(root)
    places = {id(node): i for i, node in enumerate(order)}
    return tree, [np.array([places[id(node)] for node in path], np.int32) for path in paths]


def _depth_first(root: _Node) -> tuple[TokenTree, list[_Node]]:
    order: list[_Node] = []
    ends: list[int] = []
    stack: list[tuple[_Node, int]] = [(child, -1) for child in reversed(root.children)]
    while stack:
        node, index = stack.pop()
        if index >= 0:  # all descendants of the node have been visited
            ends[index] = len(order)
            continue
        stack.append((node, len(order)))
        stack += [(child, -1) for child in reversed(node.children)]
        order.append(node)
        ends.append(0)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(node, name) for node in order], dtype)

    tree = TokenTree(
        column("token", np.int32), column("target", np.int32), column("weight", np.float32), column("depth", np.int32),
        np.array(ends, np.int32),
    )  # fmt: skip
    return tree, order


def children(tree: TokenTree) -> dict[int, list[int]]:
    """Maps the index of each token that has children to the indices of its children; the key -1 holds the indices of
    the tokens that begin a path."""
    found: dict[int, list[int]] = {}
    path: list[int] = []
    for i in range(len(tree.tokens)):
        while path and tree.subtree_end[path[-1]] <= i:
            path.pop()
        found.setdefault(path[-1] if path else -1, []).append(i)
        path.append(i)
    return found
