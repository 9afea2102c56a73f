"""Programs on a mesh: traced for it, their state laid out by rule, their batches cut by row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import tree
from gptjax.ops.device import ROWS
from gptjax.parallel.rules import batch_shardings, shardings


def on_mesh(fn: Callable, mesh: Mesh | None) -> Callable:
    """`fn`, called with the mesh set, from any thread; without one `fn` itself."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args, **options)

    return call


def abstract_on(fn: Callable, mesh: Mesh | None, *args: Any, offload: bool = False) -> Any:
    """Shapes of `fn(*args)`, with where each leaf lies on the mesh: what a checkpoint is read into.

    Args:
        offload: an optimizer's moments lie in the memory of the devices' hosts.
    """
    shapes = jax.eval_shape(fn, *args)
    if mesh is None:
        return shapes

    def one(path: str, leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        if offload and path.startswith("opt_state/") and leaf.ndim:
            where = where.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return tree.map_paths(one, shapes, shardings(shapes, mesh))


def init_on(fn: Callable, mesh: Mesh | None, *args: Any, donate: tuple[int, ...] = (), offload: bool = False) -> Any:
    """`fn(*args)`, a tree of arrays that are made where they belong, never whole on one device; see `abstract_on`."""
    placed = None
    if mesh is not None:
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_on(fn, mesh, *args, offload=offload))
    return on_mesh(jax.jit(fn, out_shardings=placed, donate_argnums=donate), mesh)(*args)


def jit_on(fn: Callable, mesh: Mesh | None) -> Callable:
    """`fn` compiled for the mesh, its results whole on every device."""
    return on_mesh(jax.jit(fn, out_shardings=None if mesh is None else NamedSharding(mesh, P())), mesh)


def jit_step(step: Callable, mesh: Mesh | None, state: Any) -> Callable:
    """The compiled step (state, batch) -> (state, metrics): the state is given up, and stays laid out as it is."""
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    outs = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, P()))
    return on_mesh(jax.jit(step, donate_argnums=0, out_shardings=outs), mesh)


def place(tree: Any, where: Any) -> Any:
    """Arrays onto shardings. Of several processes each gives the whole array and keeps its own part."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf[index]))

    return jax.tree.map(one, tree, where)


def place_params(params: Any, mesh: Mesh | None) -> Any:
    return params if mesh is None else place(params, shardings(params, mesh))


def place_batch(
    batch: Any, mesh: Mesh | None, *, leading_axes: int | None = None, rows: slice | None = None, of: int = 0
) -> Any:
    """Leaves [.., B, T] or [.., B, K]: rows over devices, and where `context` is an axis, tokens.

    Args:
        leading_axes: how many there are before the rows; None: those before [B, T] of its tokens.
        rows: which of the batch's `of` rows are given, where they are not all.
    """
    if mesh is None:
        return batch
    n = leading_axes
    if n is None:
        n = batch.tokens.ndim - 2 if hasattr(batch, "tokens") else 0
    length = batch.tokens.shape[n + 1] if hasattr(batch, "tokens") else 0
    if rows is None:
        return place(batch, batch_shardings(batch, mesh, leading_axes=n, context_length=length))

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leaf.shape[:n], of, *leaf.shape[n + 1 :]), leaf.dtype)

    def one(leaf: Any, shape: Any, where: NamedSharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[n].indices(of)
            own = slice(begin - rows.start, end - rows.start)
            return leaf[(*index[:n], own, *index[n + 1 :])]

        return jax.make_array_from_callback(shape.shape, where, part)

    shapes = jax.tree.map(whole, batch)
    return jax.tree.map(one, batch, shapes, batch_shardings(shapes, mesh, leading_axes=n, context_length=length))


def pmap_step(step: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
    """`step` over rows alone, in the form of `jax.pmap`: every leaf of the batch has a leading axis of devices.

    step(state, batch [n, B / n, ..]) -> (state, metrics), what one device does with the rows one below the other. For
    notebooks that are written so; the state is no stack of copies. jit with a mesh does the same and more.
    """
    from gptjax.parallel.mesh import mesh_of

    devices = jax.devices() if devices is None else list(devices)
    mesh = mesh_of((len(devices), 1, 1, 1), devices)
    compiled = on_mesh(jax.jit(step, out_shardings=NamedSharding(mesh, P())), mesh)

    def call(state: Any, batch: Any) -> Any:
        whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        state = jax.device_put(state, NamedSharding(mesh, P()))
        return compiled(state, jax.device_put(whole, NamedSharding(mesh, P(ROWS))))

    return call
