"""Functions that compile other functions for a device mesh, and place arrays on the mesh.

The train state is sharded by `RULES`. A batch is sharded by rows, and under context parallelism also by tokens.
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
    """Wraps `fn` so that it runs under `jax.set_mesh(mesh)` in any thread; returns `fn` itself if mesh is None."""
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args, **options)

    return call


def abstract_on(fn: Callable, mesh: Mesh | None, *args: Any, offload: bool = False) -> Any:
    """Returns the shapes, dtypes and shardings of `fn(*args)`: the target that a checkpoint is restored into.

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
    """Computes `fn(*args)`. Every array is created with the sharding that `abstract_on` returns for it, so that no
    device ever holds a sharded array in full."""
    out_shardings = None
    if mesh is not None:
        out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_on(fn, mesh, *args, offload=offload))
    return on_mesh(jax.jit(fn, out_shardings=out_shardings, donate_argnums=donate), mesh)(*args)


def jit_on(fn: Callable, mesh: Mesh | None) -> Callable:
    """Compiles `fn` for the mesh, with results that are replicated on all devices."""
    return on_mesh(jax.jit(fn, out_shardings=None if mesh is None else NamedSharding(mesh, P())), mesh)


def jit_step(step: Callable, mesh: Mesh | None, state: Any) -> Callable:
    """Compiles `step`, a function (state, batch) that returns (state, metrics). The state is donated and keeps its
    sharding."""
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    outs = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, P()))
    return on_mesh(jax.jit(step, donate_argnums=0, out_shardings=outs), mesh)


def place(tree: Any, shardings: Any) -> Any:
    """Places arrays on devices by `shardings`.

    Every process passes the complete arrays, but places only the shards of its own devices.
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
    """Places parameters on the mesh, sharded by `RULES`; returns them unchanged if there is no mesh."""
    return params if mesh is None else place(params, shardings(params, mesh))


def place_batch(
    batch: Any, mesh: Mesh | None, *, leading_axes: int | None = None, rows: slice | None = None, of: int = 0
) -> Any:
    """Places a batch on the mesh, sharded by `batch_shardings`.

    The leaves of the batch are [.., B, T], or [.., B, K] for K values per row, such as labels.

    Args:
        leading_axes: number of axes before the axis of rows. If None, it is the number of axes before the axis B of
            batch.tokens [.., B, T], or 0 for a batch without tokens.
        rows: range of the rows of the global batch that this process passes, or None if it passes all rows.
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
    """Compiles a data-parallel `step` with the interface of `jax.pmap`: batch leaves have a leading axis of devices.

    The returned function takes the state and a batch. For B rows and n devices, the leaves of the batch have the shape
    [n, B / n, ..]. The function returns (state, metrics), as `step` does for all B rows on one device. The state is
    replicated, not stacked. `pmap_step` is for notebooks that were written for `pmap`; `jit_step` with a mesh can do
    the same and more.
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
