"""Compile functions for a mesh: shard the state by rule and the batch by rows."""

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
    """`fn` called under `jax.set_mesh(mesh)`, from any thread; `fn` itself if mesh is None."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args, **options)

    return call


def abstract_on(fn: Callable, mesh: Mesh | None, *args: Any, offload: bool = False) -> Any:
    """Shapes, dtypes and shardings of `fn(*args)`: the target that a checkpoint is restored into.

    Args:
        offload: keep the optimizer's moments in host memory (pinned_host).
    """
    shapes = jax.eval_shape(fn, *args)
    if mesh is None:
        return shapes

    def with_sharding(path: str, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        if offload and path.startswith("opt_state/") and leaf.ndim:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return tree.map_paths(with_sharding, shapes, shardings(shapes, mesh))


def init_on(fn: Callable, mesh: Mesh | None, *args: Any, donate: tuple[int, ...] = (), offload: bool = False) -> Any:
    """`fn(*args)` compiled so that every array is created sharded, never whole on one device; see `abstract_on`."""
    out_shardings = None
    if mesh is not None:
        out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_on(fn, mesh, *args, offload=offload))
    return on_mesh(jax.jit(fn, out_shardings=out_shardings, donate_argnums=donate), mesh)(*args)


def jit_on(fn: Callable, mesh: Mesh | None) -> Callable:
    """`fn` compiled for the mesh with replicated results."""
    return on_mesh(jax.jit(fn, out_shardings=None if mesh is None else NamedSharding(mesh, P())), mesh)


def jit_step(step: Callable, mesh: Mesh | None, state: Any) -> Callable:
    """The compiled step (state, batch) -> (state, metrics): donates the state and keeps its sharding."""
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    outs = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, P()))
    return on_mesh(jax.jit(step, donate_argnums=0, out_shardings=outs), mesh)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays onto shardings. With several processes each passes the whole array and keeps its own shards."""

    def place_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf[index]))

    return jax.tree.map(place_leaf, tree, shardings)


def place_params(params: Any, mesh: Mesh | None) -> Any:
    """Params sharded by `RULES`; unchanged without a mesh."""
    return params if mesh is None else place(params, shardings(params, mesh))


def place_batch(
    batch: Any, mesh: Mesh | None, *, leading_axes: int | None = None, rows: slice | None = None, of: int = 0
) -> Any:
    """Put a batch with leaves [.., B, T] or [.., B, K] onto the mesh, sharded by `batch_shardings`.

    Args:
        leading_axes: number of axes before the rows; None: those before [B, T] of batch.tokens.
        rows: the rows that this process passes, out of `of` in the global batch; None: all.
    """
    if mesh is None:
        return batch
    n = leading_axes
    if n is None:
        n = batch.tokens.ndim - 2 if hasattr(batch, "tokens") else 0
    length = batch.tokens.shape[n + 1] if hasattr(batch, "tokens") else 0
    if rows is None:
        return place(batch, batch_shardings(batch, mesh, leading_axes=n, context_length=length))

    def global_shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leaf.shape[:n], of, *leaf.shape[n + 1 :]), leaf.dtype)

    def place_leaf(leaf: Any, shape: Any, sharding: NamedSharding) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            begin, end, _ = index[n].indices(of)
            local = slice(begin - rows.start, end - rows.start)
            return leaf[(*index[:n], local, *index[n + 1 :])]

        return jax.make_array_from_callback(shape.shape, sharding, shard)

    shapes = jax.tree.map(global_shape, batch)
    return jax.tree.map(place_leaf, batch, shapes, batch_shardings(shapes, mesh, leading_axes=n, context_length=length))


def pmap_step(step: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
    """Data-parallel `step` with the interface of `jax.pmap`: every leaf of the batch has a leading axis of devices.

    step(state, batch [n, B / n, ..]) -> (state, metrics), the same result as one device with all B rows. The state is
    replicated, not stacked. For notebooks written for `pmap`; `jit_step` with a mesh does the same and more.
    """
    from gptjax.parallel.mesh import mesh_of

    devices = jax.devices() if devices is None else list(devices)
    mesh = mesh_of((len(devices), 1, 1, 1), devices)
    compiled = on_mesh(jax.jit(step, out_shardings=NamedSharding(mesh, P())), mesh)

    def call(state: Any, batch: Any) -> Any:
        merged = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        state = jax.device_put(state, NamedSharding(mesh, P()))
        return compiled(state, jax.device_put(merged, NamedSharding(mesh, P(ROWS))))

    return call
