"""Packs or pads examples into rows of equal length, and computes each batch as a pure function of (seed, step).

Each example is split into inputs and next-token targets before packing, so that no target comes from another example:

    examples      a b c d E    p q E       lower case: inputs, E: end of the answer
    tokens        a b c d p q . .          both examples in one row of 8 tokens
    targets       b c d E q E . .
    segment_ids   1 1 1 1 2 2 0 0          0: padding, with weight 0

An example is either one sequence of token ids or a token tree (`data.token_tree`). Rows that hold token trees have the
additional arrays positions and subtree_end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.loader import epoch_rows
from gptjax.data.token_tree import TokenTree
from gptjax.errors import UserError
from gptjax.types import Batch


class Encoded(NamedTuple):
    """Examples as token ids.

    Attributes:
        rows     token ids of each example, [n] int32
        weights  loss weight of each id as a target, [n] float32; the first weight is not used, as the first id is no
                 target
        dropped  number of examples left out because they are longer than the context
        trees    further examples that are token trees; they come after the examples in `rows`
    """

    rows: list[np.ndarray]
    weights: list[np.ndarray]
    dropped: int
    trees: Sequence[TokenTree] = ()


class Rows(NamedTuple):
    """Packed or padded examples as n rows of T tokens; every array has the shape [n, T]. In `Rows`, the array weights
    is float32, and all other arrays are int32."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray  # Number of the example within its row, counted from 1, or 0 for padding.


class TreeRows(NamedTuple):
    """Rows of T tokens in which at least one example is a token tree; every array has the shape [n, T]."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray  # Number of earlier tokens on the path from the root of the token tree to each token, int32.
    subtree_end: np.ndarray  # Index in the row just after the last token of each token's subtree, int32.


def packed(encoded: Encoded, context_length: int) -> Rows | TreeRows:
    """Packs several examples per row by first-fit decreasing. No example is split between rows.

    The examples are placed from the longest to the shortest, each in the first row with enough space. Examples of equal
    length keep their input order.

    Raises:
        UserError: an example is longer than a row.
    Source: Johnson (1973). Dosa (2007) proves that first-fit decreasing needs at most 11/9 of the smallest possible
    number of rows, plus 6/9.
    """
    return _fill(encoded, first_fit(_lengths(encoded, context_length), context_length), context_length)


def padded(encoded: Encoded, context_length: int | None = None) -> Rows | TreeRows:
    """Returns rows of one example each, in input order, padded to `context_length` tokens.

    If `context_length` is None, rows have the length of the longest example.

    Raises:
        UserError: an example is longer than a row.
    """
    lengths = _lengths(encoded, context_length)
    length = int(lengths.max()) if context_length is None else context_length
    return _fill(encoded, [(i, 0) for i in range(len(lengths))], length)


def first_fit(lengths: np.ndarray, context_length: int) -> list[tuple[int, int]]:
    """Computes the row and the start position in the row of each example by first-fit decreasing.

    The array `lengths` [n] holds the number of input tokens of each example, at most `context_length`.
    """
    free = np.full(len(lengths), context_length)
    places = [(0, 0)] * len(lengths)
    first, n_rows, last = 0, 0, None
    for i in np.argsort(-lengths, kind="stable"):
        if lengths[i] != last:
            first, last = 0, lengths[i]
        # Start the search for a row at the row of the previous example of the same length, because no earlier row has
        # enough space.
        first += int(np.argmax(free[first : n_rows + 1] >= lengths[i]))
        places[i] = (first, context_length - int(free[first]))
        free[first] -= lengths[i]
        n_rows = max(n_rows, first + 1)
    return places


def _lengths(encoded: Encoded, context_length: int | None) -> np.ndarray:
    """Returns the number of input tokens of each example: the number of token ids minus 1, or the size of the token
    tree."""
    lengths = np.array([len(row) - 1 for row in encoded.rows] + [len(tree.tokens) for tree in encoded.trees])
    if not len(lengths):
        raise UserError("no examples to make rows of")
    if lengths.min() < 1:
        raise UserError(f"example {int(np.argmin(lengths)) + 1} has fewer than 2 tokens: there is nothing to predict")
    if context_length is not None and lengths.max() > context_length:
        raise UserError(
            f"example {int(np.argmax(lengths)) + 1} needs {np.max(lengths)} places and a row has {context_length}: "
            "encode with the same context_length"
        )
    return lengths


def members(places: list[tuple[int, int]]) -> list[list[int]]:
    """Returns a list of example indices for each row, sorted by the position at which the example starts."""
    rows: list[list[int]] = [[] for _ in range(1 + max(row for row, _ in places))]
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        rows[places[i][0]].append(i)
    return rows


def _fill(encoded: Encoded, places: list[tuple[int, int]], length: int) -> Rows | TreeRows:
    """Returns rows of `length` tokens that contain the examples.

    places[i] is the row of example i and the position in the row at which the example starts. There are no gaps between
    the examples of a row; all padding is at the end of the row.
    """
    rows = (empty_trees if encoded.trees else empty)(1 + max(row for row, _ in places), length)
    examples = [*map(_path, encoded.rows, encoded.weights), *encoded.trees]
    for (row, start), example in sorted(zip(places, examples, strict=True), key=lambda item: item[0]):
        span = slice(start, start + len(example.tokens))
        rows.tokens[row, span] = example.tokens
        rows.targets[row, span] = example.targets
        rows.weights[row, span] = example.weights
        rows.segment_ids[row, span] = rows.segment_ids[row, start - 1] + 1 if start else 1
        if isinstance(rows, TreeRows):
            rows.positions[row, span] = example.positions
            rows.subtree_end[row, span] = start + example.subtree_end
    return rows


def _path(ids: np.ndarray, weights: np.ndarray) -> TokenTree:
    """Returns an example of n + 1 token ids as a token tree with a single path of n tokens."""
    n = len(ids) - 1
    return TokenTree(ids[:-1], ids[1:], weights[1:], np.arange(n), np.full(n, n))


def empty(n: int, length: int) -> Rows:
    """Returns n rows of padding."""
    return Rows(*(np.zeros((n, length), kind) for kind in (np.int32, np.int32, np.float32, np.int32)))


def empty_trees(n: int, length: int) -> TreeRows:
    """Returns n rows of padding with the same arrays as rows that hold token trees."""
    return TreeRows(*empty(n, length), np.zeros((n, length), np.int32), np.full((n, length), length, np.int32))


def batch(rows: Rows | TreeRows, step: int, *, batch_size: int, seed: int) -> Batch:
    """Returns the batch for training step `step`, with arrays of shape [B, T].

    Every epoch contains each row once, in a random order that changes from epoch to epoch.
    """
    return _batch(rows, epoch_rows(step, batch_size, len(rows.tokens), seed))


def eval_batches(rows: Rows | TreeRows, batch_size: int) -> Iterator[Batch]:
    """Yields batches that contain every row once, in order; the last batch is padded with rows of weight 0."""
    n = len(rows.tokens)
    filler = (empty_trees if isinstance(rows, TreeRows) else empty)(-n % batch_size, rows.tokens.shape[1])
    for first in range(0, n, batch_size):
        batch = _batch(rows, np.arange(first, min(first + batch_size, n)))
        if len(batch.tokens) < batch_size:
            batch = batch._replace(**{k: np.concatenate([getattr(batch, k), x]) for k, x in filler._asdict().items()})
        yield batch


def _batch(rows: Rows | TreeRows, index: np.ndarray) -> Batch:
    """Returns the batch of the rows with indices `index`.

    If no example is a token tree, `positions` is None, because the model derives the positions from segment_ids.
    """
    return Batch(**{name: leaf[index] for name, leaf in rows._asdict().items()})
