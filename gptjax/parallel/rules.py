"""This module defines sharding rules over parameter paths, and the shardings of the train state, batches and the KV
cache."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import tree
from gptjax.errors import UserError
from gptjax.ops import device
from gptjax.ops.device import CONTEXT, FSDP, ROWS, TENSOR, fit

# RULES maps each pattern of parameter paths to the mesh axes that shard the last axes of a matching parameter. The last
# two axes of a kernel are [in, out], and the leading axis of stacked layers is not sharded. For tensor parallelism, the
# kernels of q, k, v, up and gate are column-parallel and the kernels of o and down are row-parallel over `tensor`, so
# that attention and the feed-forward layer need one all-reduce each (arXiv:1909.08053, section 3). For FSDP, the mesh
# axis `fsdp` shards the axis of a matrix that `tensor` does not shard (arXiv:2004.13336). The kernels of `qkv` and
# `up_gate` are the concatenated matrices of `gpt.for_decoding`.
RULES: tuple[tuple[str, tuple], ...] = (
    ("wte/embedding", (TENSOR, FSDP)),
    ("wpe/embedding", (None, FSDP)),
    ("lm_head/kernel", (FSDP, TENSOR)),
    ("cls_head/*", ()),
    ("blocks*/attn/[qkv]/kernel | blocks*/mlp/up/kernel | blocks*/mlp/gate/kernel", (FSDP, TENSOR)),
    ("blocks*/attn/qkv/kernel | blocks*/mlp/up_gate/kernel", (FSDP, TENSOR)),
    ("blocks*/attn/o/kernel | blocks*/mlp/down/kernel", (TENSOR, FSDP)),
    ("blocks*/attn/[qkv]/bias | blocks*/mlp/up/bias | blocks*/mlp/gate/bias", (TENSOR,)),
    # The following rule covers the parameters of norms and the biases of output projections.
    ("blocks*/bias | blocks*/scale", ()),
    ("blocks*/attn/[qk]_norm | blocks*/value_mix | blocks*/*_lambda", ()),
    ("ln_f/* | smear", ()),
)
# MATRIX_AXES describes the sharding of the arrays in an adapter or in a quantised matrix by the name of the array. Each
# value of MATRIX_AXES has one entry for each of the last two axes of the array with the given name. An entry of
# MATRIX_AXES is 0 if the axis is sharded like the `in` axis of the matrix [in, out], and 1 if the axis is sharded like
# the `out` axis. An entry of MATRIX_AXES is None if the axis is not sharded, such as the rank axis of a LoRA factor.
MATRIX_AXES = {"a": (0, None), "b": (None, 1), "d": (None, 1), "m": (None, 1)}
MATRIX_AXES |= dict.fromkeys(("values", "codes", "absmax", "scale", "offset"), (0, 1))


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the PartitionSpec of the leaf at `path` in a parameter tree, an adapter or a `TrainState`.

    Inside a `TrainState`, the path of a parameter has a prefix, such as opt_state/0/mu/.

    Raises:
        UserError: no rule covers the path.
    """
    keys = path.split("/")
    # A sharding rule may match the whole path or any suffix of the path, from "opt_state/0/mu/.." to "kernel".
    for start in range(len(keys)):
        if (spec := _rule("/".join(keys[start:]))) is not None:
            return fit((None,) * (len(shape) - len(spec)) + spec, shape, mesh) if len(shape) >= len(spec) else P()
    # Scalars, counters, PRNG keys and the coefficients of Muon's Newton-Schulz iteration are replicated.
    if not shape or keys[-1] in ("step", "count", "key", "skipped", "skipped_in_a_row", "ns_coeffs"):
        return P()
    raise UserError(f"parallel: no rule covers {path} {list(shape)}: add one to gptjax.parallel.rules.RULES")


def _rule(path: str) -> tuple | None:
    parent, _, name = path.rpartition("/")
    if name in MATRIX_AXES and (matrix := _rule(parent)) is not None and len(matrix) == 2:
        return tuple(None if axis is None else matrix[axis] for axis in MATRIX_AXES[name])
    return tree.first_match(path, RULES)


def product_axes(path: str) -> tuple[str | None, ...] | None:
    """Returns the mesh axes that shard the weight matrix [in, out] at `path` during the matrix product with this
    weight.

    For the matrix product, the weight matrix is all-gathered over `fsdp` and stays sharded over `tensor` as in `RULES`.
    `product_axes` returns None if `RULES` has no rule for the path, or if the rule does not have two entries, one for
    `in` and one for `out`.
    """
    spec = _rule(path)
    return None if spec is None or len(spec) != 2 else tuple(axis if axis == TENSOR else None for axis in spec)


# The model calls `product_axes` through `gptjax.ops.device`, because the model must not import `gptjax.parallel`.
device.product_axes_by(product_axes)


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """Returns the tree of the NamedShardings of all leaves of a parameter tree, an adapter or a `TrainState`.

    Raises:
        UserError: no rule covers a leaf. The error message names all leaves that no rule covers.
    """
    problems = []

    def leaf_sharding(path: str, leaf: Any) -> NamedSharding:
        try:
            return NamedSharding(mesh, spec_of(path, leaf.shape, mesh))
        except UserError as error:
            problems.append(str(error))
            return NamedSharding(mesh, P())

    result = tree.map_paths(leaf_sharding, abstract)
    if problems:
        raise UserError.all(problems)
    return result


def batch_shardings(batch: Any, mesh: Mesh, *, leading_axes: int = 0, context_length: int = 0) -> Any:
    """Returns the shardings of a batch, whose rows are sharded over `data` and `fsdp`, and whose tokens are sharded
    over `context`.

    Args:
        leading_axes: number of axes before the axis of rows, such as an axis of steps if a call runs several steps.
        context_length: number of tokens per row. In each array, the axis after the axis of rows is the axis of tokens
            if the axis has the size `context_length`. Otherwise the array has no axis of tokens, as for labels.
    """

    def leaf_sharding(leaf: Any) -> NamedSharding:
        tokens = CONTEXT if leaf.shape[leading_axes + 1 : leading_axes + 2] == (context_length,) else None
        return NamedSharding(mesh, fit((None,) * leading_axes + (ROWS, tokens), leaf.shape, mesh))

    return jax.tree.map(leaf_sharding, batch)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a KV cache, whose rows are sharded over `data` and `fsdp`, and whose heads are sharded
    over `tensor`."""

    def leaf_sharding(path: str, leaf: Any) -> NamedSharding:
        spec = {"length": (ROWS,), "x": (ROWS,)}.get(path, (None, ROWS, TENSOR))
        return NamedSharding(mesh, fit(spec, leaf.shape, mesh))

    return tree.map_paths(leaf_sharding, cache)
