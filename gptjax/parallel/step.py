"""This module compiles functions for a device mesh and places arrays on the mesh.

The train state is sharded by the rules in `RULES`. A batch is sharded by rows, and under context parallelism also by
tokens.
"""

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
    """Returns a function that runs `fn` under `jax.set_mesh(mesh)` in any thread, or `fn` unchanged if `mesh` is
    None."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args, **options)

    return call


def abstract_on(fn: Callable, mesh: Mesh | None, *args: Any, offload: bool = False) -> Any:
    """Returns the shapes, dtypes and shardings of `fn(*args)`, for example as the target for restoring a checkpoint.

    Args:
        offload: whether to keep the optimizer's moments in host memory (pinned_host).
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
    """Returns `fn(*args)`, with every array sharded as `abstract_on` describes.

    `init_on` creates each array with the final sharding, so that no device ever holds a sharded array in full.
    """
    out_shardings = None
    if mesh is not None:
        out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_on(fn, mesh, *args, offload=offload))
    return on_mesh(jax.jit(fn, out_shardings=out_shardings, donate_argnums=donate), mesh)(*args)


def jit_on(fn: Callable, mesh: Mesh | None) -> Callable:
    """Returns `fn` compiled for the mesh, with results that are replicated on all devices."""
    return on_mesh(jax.jit(fn, out_shardings=None if mesh is None else NamedSharding(mesh, P())), mesh)


def jit_step(step: Callable, mesh: Mesh | None, state: Any) -> Callable:
    """Returns the compiled training step `step`, a function (state, batch) -> (state, metrics).

    The compiled step donates the input train state, and returns a train state with the sharding of the input state.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    outs = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, P()))
    return on_mesh(jax.jit(step, donate_argnums=0, out_shardings=outs), mesh)


def place(tree: Any, shardings: Any) -> Any:
    """Returns the arrays of `tree` placed on devices with the given shardings.

    Every process passes the complete arrays, but places only the shards of the process's local devices.
    """

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
    """Returns the parameters placed on the mesh and sharded by `RULES`, or unchanged if there is no mesh."""
    return params if mesh is None else place(params, shardings(params, mesh))


def place_batch(
    batch: Any, mesh: Mesh | None, *, leading_axes: int | None = None, rows: slice | None = None, of: int = 0
) -> Any:
    """Returns the batch placed on the mesh with the shardings of `batch_shardings`.

    The leaves of the batch have the shape [.., B, T], or [.., B, K] for K values per row, such as labels.

    Args:
        leading_axes: number of axes before the axis of rows. If None, the number of axes before the axis B of
            batch.tokens [.., B, T] is used, or 0 for a batch without tokens.
        rows: range of the rows of the global batch that this process passes, or None if this process passes all rows.
        of: number of rows of the global batch, needed only if `rows` is given.
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
    """Returns a compiled data-parallel `step` with the interface of `jax.pmap`, for batches with a leading axis of
    devices.

    The function that `pmap_step` returns takes the train state and a batch. For B rows and n devices, the leaves of the
    batch have the shape [n, B / n, ..]. The function that `pmap_step` returns gives the same (state, metrics) as `step`
    for all B rows on one device. The train state is replicated, not stacked over devices as with `jax.pmap`.
    `pmap_step` is for notebooks that were written for `jax.pmap`; for new code, `jit_step` with a mesh supports every
    kind of parallelism.
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
