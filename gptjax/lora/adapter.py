"""LoRA as functions from tree to tree. An adapter is a tree of plain arrays with the base's paths, at the targets only.

    adapter = init(key, params, cfg)            {"blocks": {"attn": {"q": {"kernel": {"a": .., "b": ..}}}}}
    both    = attach(params, adapter, cfg)      the base's tree; matched leaves are LoraWeight, nothing is computed
    plain   = merge(params, adapter, cfg)       the base's tree of plain arrays again
    loss_a  = bind(loss, params, cfg)           a loss of the adapter, for `jax.grad`, `vmap` or an optimizer of yours

The model, the losses, the optimizer and checkpoints hold no LoRA code: they see a tree.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tree
from gptjax.config import LoraConfig
from gptjax.errors import UserError
from gptjax.lora.weight import LoraWeight, column_norms
from gptjax.ops.dropout import off
from gptjax.ops.linear import dense
from gptjax.ops.precision import exact
from gptjax.types import Params

Adapter = dict[str, Any]


def targets(params: Params, cfg: LoraConfig) -> dict[str, Any]:
    """{path: leaf} of the weights that `cfg.targets` names, in the tree's order.

    A pattern may name layers: blocks/3/attn/q/kernel, blocks/[0-3]/*/kernel. The stack's other layers then have pairs
    that are zero, which stay zero: neither factor has a gradient while the other is zero.

    Raises:
        UserError: a part of the pattern that matches no matrix; DoRA on an embedding or on some layers only.
    """
    matrices = {
        path: leaf
        for path, leaf in tree.flatten_nodes(params).items()
        if path.split("/")[-1] in ("kernel", "embedding")
    }
    single = [name for path, leaf in matrices.items() for name in _layer_paths(path, leaf)]
    if unused := tree.unmatched(cfg.targets, [*matrices, *single]):
        raise UserError(
            f"lora.targets: {', '.join(map(repr, unused))} matches no weight; there are {', '.join(matrices)}, and of "
            "a layer blocks/0/.., blocks/1/.. and so on"
        )
    chosen = {path: leaf for path, leaf in matrices.items() if _layers(path, leaf, cfg).any()}
    if cfg.dora and not all(_layers(path, leaf, cfg).all() for path, leaf in chosen.items()):
        raise UserError(f"lora.targets={cfg.targets}: DoRA's lengths are of all layers of a stack; name no layer")
    if cfg.dora and (tables := [path for path in chosen if path.endswith("/embedding")]):
        raise UserError(f"lora.targets: DoRA is for kernels, not for {', '.join(tables)}; narrow the pattern")
    return chosen


def _layer_paths(path: str, leaf: Any) -> list[str]:
    """blocks/attn/q/kernel -> [blocks/0/attn/q/kernel, ..]; [] of a weight that is no stack of layers."""
    group, _, rest = path.partition("/")
    shape = jax.eval_shape(dense, leaf).shape
    return [f"{group}/{n}/{rest}" for n in range(shape[0])] if group == "blocks" and len(shape) > 2 else []


def _layers(path: str, leaf: Any, cfg: LoraConfig) -> np.ndarray:
    """Which layers of a stack, or whether a single weight, `cfg.targets` names: bool [L] or []."""
    names = _layer_paths(path, leaf)
    whole = tree.matches(cfg.targets, path)
    if not names:
        return np.array(whole)
    return np.array([whole or tree.matches(cfg.targets, name) for name in names])


def init(key: jax.Array, params: Params, cfg: LoraConfig) -> Adapter:
    """A fresh adapter that changes nothing: a is U(+-1/sqrt(in)) as PEFT's, b zero, DoRA's magnitudes m the norms of
    the columns.

    Raises:
        UserError: as `targets`; or cfg.init starts from the weights, which is `split`.
    """
    if cfg.init != "lora":
        raise UserError(f"lora.init={cfg.init} starts from the weights themselves: use lora.split(params, cfg)")
    adapter = {}
    for i, (path, leaf) in enumerate(targets(params, cfg).items()):
        *leading_axes, d_in, d_out = jax.eval_shape(dense, leaf).shape
        bound, shape = d_in**-0.5, (*leading_axes, d_in, cfg.rank)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        a = a * _layers(path, leaf, cfg)[..., None, None]
        adapter[path] = {"a": a, "b": jnp.zeros((*leading_axes, cfg.rank, d_out))}
        if cfg.dora:
            adapter[path]["m"] = column_norms(_leaf(leaf, adapter[path], cfg, None))
    return _nest(adapter)


@exact
def split(params: Params, cfg: LoraConfig) -> tuple[Params, Adapter]:
    """The weights as a frozen rest and an adapter that holds their largest part; together they are what they were.

    init=pissa: the `rank` largest singular triples, a = u sqrt(s), b = sqrt(s) v (arXiv:2404.02948, eq. 2-4).
    init=olora: QR of W [out, in] = w.T, as there: b.T the first columns of Q, a.T the first rows of R
    (arXiv:2406.01775, 3.1; peft's).

    Returns:
        (params, adapter); to export against the original weights see `unsplit`.
    """
    rest, adapter = dict(tree.flatten_nodes(params)), {}
    factors = {"pissa": _pissa, "olora": _olora}.get(cfg.init)
    if factors is None:
        raise UserError(f"lora.init={cfg.init} needs no split: use lora.init(key, params, cfg)")
    for path, leaf in targets(params, cfg).items():
        w = dense(leaf).astype(jnp.float32)
        a, b = factors(w, cfg.rank)
        share = cfg.scale**-0.5 * _layers(path, leaf, cfg)[..., None, None]
        a, b = a * (share > 0), b * (share > 0)
        adapter[path] = {"a": a * share, "b": b * share}
        rest[path] = (w - a @ b).astype(getattr(leaf, "dtype", w.dtype))
        if cfg.dora:
            adapter[path]["m"] = column_norms(_leaf(rest[path], adapter[path], cfg, None))
    return tree.unflatten(rest), _nest(adapter)


def _pissa(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]


def _olora(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
    return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)


def unsplit(adapter: Adapter, start: Adapter) -> Adapter:
    """A plain LoRA of twice the rank, for the original weights, that does what `adapter` does for the rest.

    Args:
        start: the adapter as `split` gave it.
    """
    return concatenate([adapter, start], [1.0, -1.0])


def attach(params: Params, adapter: Adapter, cfg: LoraConfig, *, scales: jax.Array | None = None) -> Params:
    """The base's tree with `LoraWeight` at the adapter's paths: what every door and every loss takes as params.

    What is no pair in the adapter, such as a new head ({"cls_head": {"kernel": ..}}), stands there as it is.

    Args:
        scales: in the place of `cfg.scale`; [] traced, or [B] with an adapter of `rows`.

    Raises:
        UserError: the adapter names a path that the base does not have, or its shapes do not fit.
    """
    leaves = tree.flatten_nodes(params)
    pairs = tree.by_parent(adapter)
    whole = {path: pairs.pop(path) for path in list(pairs) if "a" not in pairs[path]}
    leaves |= {f"{path}/{name}": leaf for path, own in whole.items() for name, leaf in own.items()}
    problems = [f"{path}: the base has no such weight" for path in pairs if path not in leaves]
    for path, pair in pairs.items():
        if path in leaves:
            *_, d_in, d_out = jax.eval_shape(dense, leaves[path]).shape
            if (pair["a"].shape[-2], pair["b"].shape[-1]) != (d_in, d_out):
                got = f"a {list(pair['a'].shape)} and b {list(pair['b'].shape)}"
                problems.append(f"{path}: {got} do not fit a weight [.., {d_in}, {d_out}]")
    if problems:
        raise UserError.all([f"the adapter is for another model: {problem}" for problem in problems])
    return tree.unflatten(
        {path: _leaf(leaf, pairs[path], cfg, scales) if path in pairs else leaf for path, leaf in leaves.items()}
    )


def _leaf(leaf: Any, pair: dict[str, jax.Array], cfg: LoraConfig, scales: jax.Array | None) -> LoraWeight:
    axes = pair["a"].shape[:-2]  # [L], [B] or [L, B]
    value = jnp.broadcast_to(jnp.float32(cfg.scale) if scales is None else jax.lax.stop_gradient(scales), axes)
    rate = None if off(cfg.dropout) else jnp.broadcast_to(jnp.float32(cfg.dropout), axes)
    return LoraWeight(leaf, pair["a"], pair["b"], value, pair.get("m"), rate=rate)


def merge(params: Params, adapter: Adapter, cfg: LoraConfig, *, scales: jax.Array | None = None) -> Params:
    """Plain arrays again, each in its base's dtype (float32 for a quantised one): to export, or to decode fastest.
    `scales` as the adapter was attached with, where that was not `cfg.scale`."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        return _dense(leaf).astype(getattr(leaf.w, "dtype", jnp.float32))

    return jax.tree.map(plain, attach(params, adapter, cfg, scales=scales), is_leaf=_is_leaf)


_dense = jax.jit(exact(dense))


def _is_leaf(node: Any) -> bool:
    return isinstance(node, LoraWeight)


def bind(loss: Callable, params: Params, cfg: LoraConfig) -> Callable:
    """The loss as a function of the adapter: (adapter, batch, key) -> what `loss` gives."""
    loss = with_dropout(loss)
    return lambda adapter, batch, key=None: loss(attach(params, adapter, cfg), batch, key)


def with_dropout(loss: Callable) -> Callable:
    """`loss` with its key handed to the adapters' dropout too, where their config has one."""

    def seeded(params: Params, batch: Any, key: jax.Array | None) -> Any:
        if key is None:
            return loss(params, batch, key)

        def seed(path: tuple, leaf: Any) -> Any:
            if not isinstance(leaf, LoraWeight) or leaf.rate is None:
                return leaf
            own = jax.random.fold_in(key, zlib.crc32(tree.path_string(path).encode()))
            return dataclasses.replace(leaf, key=jax.random.split(own, leaf.scale.shape))

        return loss(jax.tree_util.tree_map_with_path(seed, params, is_leaf=_is_leaf), batch, key)

    return seeded


def rows(adapters: Sequence[Adapter], ids: Sequence[int] | jax.Array) -> Adapter:
    """One adapter for a batch whose row i goes through adapters[ids[i]]; all of one rank and the same targets.

    Attach it with `scales=` [B] where the adapters' scales differ.

    Raises:
        UserError: DoRA's magnitudes, or adapters of embeddings.
    """
    for path, pair in (item for adapter in adapters for item in tree.by_parent(adapter).items()):
        if "m" in pair or path.endswith("/embedding"):
            raise UserError(f"{path}: rows of a batch can go through kernels' adapters without DoRA's lengths only")
    ids = jnp.asarray(ids)
    return jax.tree.map(lambda *parts: jnp.stack(parts, -3).take(ids, -3), *adapters)


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """The weighted sum of what the adapters add, exactly: their pairs side by side, along the rank.

    Attach it with the config of the parts. The same paths are not needed: what one lacks it does not change.

    Raises:
        UserError: DoRA's magnitudes, which do not add.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    found: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, pair in tree.by_parent(adapter).items():
            if "m" in pair or "a" not in pair:
                what = "DoRA's lengths" if "m" in pair else "weights of its own"
                raise UserError(f"{path} has {what}, which do not add: merge the adapters one after the other")
            found.setdefault(path, []).append((pair["a"], pair["b"] * weight))
    return _nest(
        {
            path: {"a": jnp.concatenate([a for a, _ in pairs], -1), "b": jnp.concatenate([b for _, b in pairs], -2)}
            for path, pairs in found.items()
        }
    )


def average(adapters: Sequence[Adapter]) -> Adapter:
    """The mean of what they add; the rank is the sum of theirs."""
    return concatenate(adapters, [1 / len(adapters)] * len(adapters))


def interpolate(first: Adapter, second: Adapter, t: float) -> Adapter:
    """(1 - t) of the first and t of the second."""
    return concatenate([first, second], [1 - t, t])


def negate(adapter: Adapter) -> Adapter:
    """What takes away what `adapter` adds (arXiv:2212.04089)."""
    return concatenate([adapter], [-1.0])


def masked(adapter: Adapter, rank: jax.Array | int) -> Adapter:
    """The same shapes with all but the first `rank` (may be traced) columns of a and rows of b at zero: their gradients
    are zero too, and they stay so. Adapters of several ranks fit into one vmapped program this way."""
    pairs = tree.by_parent(adapter)
    for pair in pairs.values():
        on = jnp.arange(pair["a"].shape[-1]) < rank
        pair["a"], pair["b"] = pair["a"] * on, pair["b"] * on[:, None]
    return _nest(pairs)


def _nest(pairs: dict[str, dict[str, jax.Array]]) -> Adapter:
    return tree.unflatten({f"{path}/{name}": leaf for path, pair in pairs.items() for name, leaf in pair.items()})
