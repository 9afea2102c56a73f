"""Which part of every array lies on which device: rules over paths, for params and all that is shaped after them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import tree
from gptjax.errors import UserError
from gptjax.ops import device
from gptjax.ops.device import CONTEXT, FSDP, ROWS, TENSOR, fit

# The last two axes of a matrix are in and out; a stack of layers comes first and stays whole. Matrices into a block
# are column-parallel over `tensor`, those out of it row-parallel, so that a block needs one sum (arXiv:1909.08053, 3);
# `fsdp` shards the other axis (arXiv:2004.13336). `qkv` and `up_gate` are matrices that decoding keeps side by side.
RULES: tuple[tuple[str, tuple], ...] = (
    ("wte/embedding", (TENSOR, FSDP)),
    ("wpe/embedding", (None, FSDP)),
    ("lm_head/kernel", (FSDP, TENSOR)),
    ("cls_head/*", ()),
    ("blocks*/attn/[qkv]/kernel | blocks*/mlp/up/kernel | blocks*/mlp/gate/kernel", (FSDP, TENSOR)),
    ("blocks*/attn/qkv/kernel | blocks*/mlp/up_gate/kernel", (FSDP, TENSOR)),
    ("blocks*/attn/o/kernel | blocks*/mlp/down/kernel", (TENSOR, FSDP)),
    ("blocks*/attn/[qkv]/bias | blocks*/mlp/up/bias | blocks*/mlp/gate/bias", (TENSOR,)),
    ("blocks*/bias | blocks*/scale", ()),  # norms, and what a projection adds
    ("blocks*/attn/[qk]_norm | blocks*/value_mix | blocks*/*_lambda", ()),
    ("ln_f/* | smear", ()),
)
# The last two axes of an array that belongs to a matrix (of an adapter, of a quantised matrix): which axis of the
# matrix each is.
MATRIX_AXES = {"a": (0, None), "b": (None, 1), "m": (None, 1)}
MATRIX_AXES |= dict.fromkeys(("values", "codes", "absmax", "scale", "offset"), (0, 1))


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Of the leaf at `path` of params, of an adapter, or of anything that has such a path at its end.

    Raises:
        UserError: no rule covers it.
    """
    parts = path.split("/")
    for start in range(len(parts)):  # "opt_state/0/mu/blocks/attn/q/kernel", "0/mu/..", .., "kernel"
        if (found := _rule("/".join(parts[start:]))) is not None:
            return fit((None,) * (len(shape) - len(found)) + found, shape, mesh) if len(shape) >= len(found) else P()
    # what a step counts, draws from or multiplies with is the same on every device
    if not shape or parts[-1] in ("step", "count", "key", "skipped", "skipped_in_a_row", "ns_coeffs"):
        return P()
    raise UserError(f"parallel: no rule covers {path} {list(shape)}: add one to gptjax.parallel.rules.RULES")


def _rule(path: str) -> tuple | None:
    parent, _, name = path.rpartition("/")
    if name in MATRIX_AXES and (whole := _rule(parent)) is not None and len(whole) == 2:
        return tuple(None if axis is None else whole[axis] for axis in MATRIX_AXES[name])
    return tree.first_match(path, RULES)


def product_axes(path: str) -> tuple[str | None, ...] | None:
    """How the kernel [in, out] at `path` lies while it is multiplied: gathered over `fsdp`, sharded over `tensor` as
    `RULES` says. None: no rule for a matrix covers it."""
    found = _rule(path)
    return None if found is None or len(found) != 2 else tuple(axis if axis == TENSOR else None for axis in found)


device.product_axes_by(product_axes)  # the model reads it there: it imports nothing from here


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """A NamedSharding at every leaf of params, an adapter or a whole `TrainState`.

    Raises:
        UserError: leaves that no rule covers; all of them are named.
    """
    problems = []

    def one(path: str, leaf: Any) -> NamedSharding:
        try:
            return NamedSharding(mesh, spec_of(path, leaf.shape, mesh))
        except UserError as error:
            problems.append(str(error))
            return NamedSharding(mesh, P())

    found = tree.map_paths(one, abstract)
    if problems:
        raise UserError.all(problems)
    return found


def batch_shardings(batch: Any, mesh: Mesh, *, leading_axes: int = 0, context_length: int = 0) -> Any:
    """Rows over `data` and `fsdp`; the axis after them over `context` where it is the tokens'.

    Args:
        leading_axes: how many there are before the rows, as of several steps in one call.
        context_length: tokens of a row.
    """

    def one(leaf: Any) -> NamedSharding:
        tokens = CONTEXT if leaf.shape[leading_axes + 1 : leading_axes + 2] == (context_length,) else None
        return NamedSharding(mesh, fit((None,) * leading_axes + (ROWS, tokens), leaf.shape, mesh))

    return jax.tree.map(one, batch)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """Of a key-value cache: rows over `data` and `fsdp`, heads over `tensor`."""

    def one(path: str, leaf: Any) -> NamedSharding:
        spec = {"length": (ROWS,), "x": (ROWS,)}.get(path, (None, ROWS, TENSOR))
        return NamedSharding(mesh, fit(spec, leaf.shape, mesh))

    return tree.map_paths(one, cache)
