"""This module implements LoRA and its variants as pure functions on parameter trees.

An adapter is a parameter tree. At the path of each adapted weight, an adapter holds the low-rank factors a and b, or
for the method MiSS the matrix d:

    adapter  = init(key, params, cfg)           {"blocks": {"attn": {"q": {"kernel": {"a": .., "b": ..}}}}}
    adapted  = attach(params, adapter, cfg)     params with a LoraWeight in place of every adapted weight
    merged   = merge(params, adapter, cfg)      params with the adapter added to the weights, as plain arrays
    adapter_loss = bind(loss, params, cfg)      loss as a function of the adapter, for `jax.grad`, `vmap` or optax

The model, the losses, the optimizer and the checkpoints contain no LoRA code, because an adapted model is an ordinary
parameter tree.
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
from gptjax._moved import moved_name
from gptjax.config import LoraConfig
from gptjax.errors import UserError
from gptjax.lora.weight import LoraWeight, MissWeight, column_norms
from gptjax.ops.dropout import off
from gptjax.ops.linear import dense
from gptjax.ops.precision import exact
from gptjax.types import Params

Adapter = dict[str, Any]


def targets(params: Params, cfg: LoraConfig) -> dict[str, Any]:
    """Returns a dict of the weights whose paths match `cfg.targets`, by path, in the order of the parameter tree.

    A pattern in `cfg.targets` may select individual layers of a stacked weight, such as blocks/3/attn/q/kernel or
    blocks/[0-3,8-11]/*/kernel. In layers that `cfg.targets` does not select, the LoRA factors a and b are zero. LoRA
    factors a and b that are both zero stay zero in training, because the gradient of each factor is zero while the
    other factor is zero. In layers that `cfg.targets` does not select, the matrix d of MiSS is zero, and `attach` sets
    the scale of d to 0.

    Raises:
        UserError: a pattern matches no weight, or names a layer that the model lacks; or `cfg` applies DoRA or MiSS to
            an embedding, DoRA to only some layers of a stack, MiSS with a rank above a weight's input size, or both.
    """
    matrices = {
        path: leaf
        for path, leaf in tree.flatten_nodes(params).items()
        if path.split("/")[-1] in ("kernel", "embedding")
    }
    single = [name for path, leaf in matrices.items() for name in _layer_paths(path, leaf)]
    _refuse_layers(cfg.targets, single)
    if unused := tree.unmatched(cfg.targets, [*matrices, *single]):
        raise UserError(
            f"lora.targets: {', '.join(map(repr, unused))} matches no weight; there are {', '.join(matrices)}, and for "
            "single layers blocks/0/.., blocks/1/.. and so on"
        )
    chosen = {path: leaf for path, leaf in matrices.items() if _layers(path, leaf, cfg).any()}
    if cfg.dora and not all(_layers(path, leaf, cfg).all() for path, leaf in chosen.items()):
        raise UserError(f"lora.targets={cfg.targets}: DoRA adapts all layers of a stack: do not select layers")
    if (cfg.dora or cfg.miss) and (tables := [path for path in chosen if path.endswith("/embedding")]):
        name = "DoRA" if cfg.dora else "MiSS"
        raise UserError(f"lora.targets: {name} supports kernels, not {', '.join(tables)}: narrow the pattern")
    if cfg.miss and cfg.dora:
        raise UserError("lora.miss=true and lora.dora=true: MiSS has no magnitude vectors; set one of them to false")
    if cfg.miss and (most := min(jax.eval_shape(dense, leaf).shape[-2] for leaf in chosen.values())) < cfg.rank:
        raise UserError(f"lora.rank ({cfg.rank}): MiSS needs a rank of at most {most}, the smallest input size")
    return chosen


def _refuse_layers(pattern: str, single: Sequence[str]) -> None:
    """Raises UserError if a range of layers in the pattern, such as [8-11], is decreasing or exceeds the model's
    layers."""
    n_layer = 1 + max((int(path.split("/")[1]) for path in single), default=-1)
    for glob in pattern.split("|"):
        for low, high in tree.number_ranges(glob):
            if single and not low <= high < n_layer:
                raise UserError(
                    f"lora.targets: {glob.strip()!r} has the range {low}-{high}: expected first-last within the layers "
                    f"of this model, 0-{n_layer - 1}"
                )


def _layer_paths(path: str, leaf: Any) -> list[str]:
    """Returns one path per layer of a stacked weight, or an empty list if the weight is not stacked over layers.

    For example, the stacked weight blocks/attn/q/kernel has the paths blocks/0/attn/q/kernel, blocks/1/attn/q/kernel
    and so on.
    """
    group, _, rest = path.partition("/")
    shape = jax.eval_shape(dense, leaf).shape
    return [f"{group}/{n}/{rest}" for n in range(shape[0])] if group == "blocks" and len(shape) > 2 else []


def _layers(path: str, leaf: Any, cfg: LoraConfig) -> np.ndarray:
    """Returns the mask of the layers that `cfg.targets` selects, bool [L], or a scalar bool if the weight is not
    stacked."""
    names = _layer_paths(path, leaf)
    whole = tree.matches(cfg.targets, path)
    if not names:
        return np.array(whole)
    return np.array([whole or tree.matches(cfg.targets, name) for name in names])


def init(key: jax.Array, params: Params, cfg: LoraConfig) -> Adapter:
    """Initialises an adapter that leaves the model's outputs unchanged.

    The LoRA factors are a ~ U(-1/sqrt(in), 1/sqrt(in)), as in PEFT, and b = 0. For DoRA, the magnitude vector m is
    initialised with the column norms of the weight. For MiSS, the matrix d is initialised with zeros.

    Raises:
        UserError: `cfg.targets` is invalid (see `targets`), or cfg.init is pissa or olora, which need
            `init_from_weights`.
    """
    if cfg.init != "lora":
        raise UserError(f"lora.init={cfg.init} starts from the weights: use lora.init_from_weights(params, cfg)")
    adapter = {}
    for i, (path, leaf) in enumerate(targets(params, cfg).items()):
        *leading_axes, d_in, d_out = jax.eval_shape(dense, leaf).shape
        if cfg.miss:
            adapter[path] = {"d": jnp.zeros((*leading_axes, cfg.rank, d_out))}
            continue
        bound, shape = d_in**-0.5, (*leading_axes, d_in, cfg.rank)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        a = a * _layers(path, leaf, cfg)[..., None, None]
        adapter[path] = {"a": a, "b": jnp.zeros((*leading_axes, cfg.rank, d_out))}
        if cfg.dora:
            adapter[path]["m"] = column_norms(_leaf(leaf, adapter[path], cfg, None))
    return _nest(adapter)


@exact
def init_from_weights(params: Params, cfg: LoraConfig) -> tuple[Params, Adapter]:
    """Initialises an adapter from the weights, and subtracts the adapter's contribution, scale * a @ b, from the
    weights.

    The weights minus the adapter's contribution, scale * a @ b, are called the residual weights. Attaching the new
    adapter to the residual weights restores the original weights.

    With init=pissa, the LoRA factors are a = u sqrt(s) and b = sqrt(s) v, where s contains the `rank` largest singular
    values of the weight, and u and v contain the left and right singular vectors of these singular values
    (arXiv:2404.02948, eq. 2-4).

    With init=olora, the LoRA factors a and b are taken from the QR decomposition of the transposed weight, w.T [out,
    in] = Q R: b.T is the first `rank` columns of Q, and a.T is the first `rank` rows of R (arXiv:2406.01775, 3.1; as in
    PEFT).

    With init=pissa and init=olora, the factors a and b are divided by sqrt(cfg.scale), because an attached adapter
    multiplies the product a @ b by cfg.scale.

    Returns:
        the params with the residual weights, and the initial adapter. After training, use `to_lora` to convert the
        trained adapter into an adapter for the original weights.

    Raises:
        UserError: `cfg.targets` is invalid (see `targets`), or cfg.init is lora, or cfg.miss is set, which need `init`.
    """
    residual, adapter = dict(tree.flatten_nodes(params)), {}
    factors = {"pissa": _pissa, "olora": _olora}.get(cfg.init)
    if factors is None:
        raise UserError(f"lora.init={cfg.init} does not start from the weights: use lora.init(key, params, cfg)")
    if cfg.miss:
        raise UserError(f"lora.miss=true starts from zero: set lora.init=lora, not {cfg.init}")
    for path, leaf in targets(params, cfg).items():
        w = dense(leaf).astype(jnp.float32)
        a, b = factors(w, cfg.rank)
        factor = cfg.scale**-0.5 * _layers(path, leaf, cfg)[..., None, None]
        a, b = a * (factor > 0), b * (factor > 0)
        adapter[path] = {"a": a * factor, "b": b * factor}
        residual[path] = (w - a @ b).astype(getattr(leaf, "dtype", w.dtype))
        if cfg.dora:
            adapter[path]["m"] = column_norms(_leaf(residual[path], adapter[path], cfg, None))
    return tree.unflatten(residual), _nest(adapter)


def _pissa(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]


def _olora(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
    return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)


def to_lora(adapter: Adapter, start: Adapter) -> Adapter:
    """Converts a PiSSA or OLoRA adapter into a LoRA adapter of twice the rank, to be attached to the original weights.

    Args:
        adapter: the trained adapter, to be attached to the residual weights that `init_from_weights` returned.
        start: the adapter before training, as `init_from_weights` returned it.
    """
    return concatenate([adapter, start], [1.0, -1.0])


def attach(params: Params, adapter: Adapter, cfg: LoraConfig, *, scales: jax.Array | None = None) -> Params:
    """Returns `params` with every adapted weight replaced by a `LoraWeight`, or by a `MissWeight` for a MiSS adapter.

    The params that `attach` returns can be passed to `forward` or to any loss.

    In addition to low-rank factors, the adapter may hold complete weights, such as the weights of a new head
    ({"cls_head": {"kernel": ..}}). Complete weights in the adapter are copied into the returned params unchanged.

    Args:
        scales: the scale of the adapter, which replaces `cfg.scale`: a scalar array, or for a batched adapter (see
            `rows`) an array [B] with one scale per row of the batch. The array may be traced.

    Raises:
        UserError: the adapter has a path that the base model lacks, or a shape that does not fit the base model; or
            cfg.miss does not fit the adapter.
    """
    leaves = tree.flatten_nodes(params)
    pairs = tree.by_parent(adapter)
    whole = {path: pairs.pop(path) for path in list(pairs) if not {"a", "d"} & pairs[path].keys()}
    leaves |= {f"{path}/{name}": leaf for path, node in whole.items() for name, leaf in node.items()}
    problems = [f"{path}: the base has no such weight" for path in pairs if path not in leaves]
    for path, pair in pairs.items():
        if path in leaves:
            *_, d_in, d_out = jax.eval_shape(dense, leaves[path]).shape
            sizes = (pair["a"].shape[-2], pair["b"].shape[-1]) if "a" in pair else (d_in, pair["d"].shape[-1])
            if sizes != (d_in, d_out):
                got = " and ".join(f"{name} {list(pair[name].shape)}" for name in ("a", "b", "d") if name in pair)
                problems.append(f"{path}: {got} do not fit a weight [.., {d_in}, {d_out}]")
    if other := [path for path, pair in pairs.items() if ("d" in pair) != cfg.miss]:
        kind = "LoRA" if cfg.miss else "MiSS"
        raise UserError(
            f"lora.miss={str(cfg.miss).lower()}, but {other[0]} has a {kind} adapter: attach it with its config"
        )
    if problems:
        raise UserError.all([f"the adapter is for another model: {problem}" for problem in problems])
    return tree.unflatten(leaves | {path: _adapted(path, leaves[path], pairs[path], cfg, scales) for path in pairs})


def _adapted(
    path: str, leaf: Any, pair: dict[str, jax.Array], cfg: LoraConfig, scales: jax.Array | None
) -> LoraWeight | MissWeight:
    if "d" not in pair:
        return _leaf(leaf, pair, cfg, scales)
    axes, selected = pair["d"].shape[:-2], _layers(path, leaf, cfg)
    value = jnp.broadcast_to(jnp.float32(cfg.scale) if scales is None else jax.lax.stop_gradient(scales), axes)
    # A scale of 0 makes the gradient of the MiSS matrix d zero, so that d stays zero in the layers that cfg.targets
    # does not select.
    value = value * selected if selected.any() else value
    return MissWeight(leaf, pair["d"], value, rate=_rates(cfg, axes))


def _leaf(leaf: Any, pair: dict[str, jax.Array], cfg: LoraConfig, scales: jax.Array | None) -> LoraWeight:
    # The leading axes of the LoRA factor `a` are the layers [L], the rows of the batch [B], or both [L, B].
    axes = pair["a"].shape[:-2]
    value = jnp.broadcast_to(jnp.float32(cfg.scale) if scales is None else jax.lax.stop_gradient(scales), axes)
    return LoraWeight(leaf, pair["a"], pair["b"], value, pair.get("m"), rate=_rates(cfg, axes))


def _rates(cfg: LoraConfig, axes: tuple[int, ...]) -> jax.Array | None:
    return None if off(cfg.dropout) else jnp.broadcast_to(jnp.float32(cfg.dropout), axes)


def merge(params: Params, adapter: Adapter, cfg: LoraConfig, *, scales: jax.Array | None = None) -> Params:
    """Returns `params` with the adapter added to the weights, for export or for the fastest decoding.

    Each merged weight has the dtype of the original weight, except that a quantised weight becomes float32. The
    docstring of `attach` describes the argument `scales`.
    """

    def merged(leaf: Any) -> Any:
        if not _is_leaf(leaf):
            return leaf
        return _dense(leaf).astype(getattr(leaf.w, "dtype", jnp.float32))

    return jax.tree.map(merged, attach(params, adapter, cfg, scales=scales), is_leaf=_is_leaf)


_dense = jax.jit(exact(dense))


def _is_leaf(node: Any) -> bool:
    return isinstance(node, LoraWeight | MissWeight)


def bind(loss: Callable, params: Params, cfg: LoraConfig) -> Callable:
    """Returns a function (adapter, batch, key=None) that evaluates `loss` on the frozen `params` with the adapter
    attached."""
    loss = with_dropout(loss)
    return lambda adapter, batch, key=None: loss(attach(params, adapter, cfg), batch, key)


def with_dropout(loss: Callable) -> Callable:
    """Returns `loss` with dropout applied to the input of each attached adapter, in addition to the model's own
    dropout.

    The dropout rate is the field `dropout` of the `LoraConfig` that was passed to `attach`. The PRNG key of each
    adapter's dropout is derived from the key that is passed to the loss. If the key passed to the loss is None, no
    dropout is applied.
    """

    def seeded(params: Params, batch: Any, key: jax.Array | None) -> Any:
        if key is None:
            return loss(params, batch, key)

        def seed(path: tuple, leaf: Any) -> Any:
            if not _is_leaf(leaf) or leaf.rate is None:
                return leaf
            leaf_key = jax.random.fold_in(key, zlib.crc32(tree.path_string(path).encode()))
            return dataclasses.replace(leaf, key=jax.random.split(leaf_key, leaf.scale.shape))

        return loss(jax.tree_util.tree_map_with_path(seed, params, is_leaf=_is_leaf), batch, key)

    return seeded


def rows(adapters: Sequence[Adapter], ids: Sequence[int] | jax.Array) -> Adapter:
    """Returns a batched adapter that applies adapters[ids[i]] to row i of a batch (multi-LoRA serving).

    All adapters must have the same rank and the same targets. If the scales of the adapters differ, pass the scale of
    each row of the batch to `attach` as `scales` [B].

    Raises:
        UserError: an adapter uses DoRA or MiSS, or adapts an embedding.
    """
    for path, pair in (item for adapter in adapters for item in tree.by_parent(adapter).items()):
        if {"m", "d"} & pair.keys() or path.endswith("/embedding"):
            raise UserError(f"{path}: one adapter per row is supported for kernels without DoRA or MiSS only")
    ids = jnp.asarray(ids)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, -3).take(ids, -3), *adapters)


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Returns the exact weighted sum of several adapters by concatenating the adapters' factors along the rank axis.

    To attach the weighted sum, pass the config of the input adapters to `attach`. The adapters to be summed must have
    the same scale. The targets of the input adapters may differ, because an adapter does not change a weight for which
    the adapter has no factors.

    Raises:
        UserError: an adapter has DoRA magnitude vectors, MiSS matrices or complete weights, such as a new head, which
            cannot be added.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    weighted = {
        path: [(a, b * weights[i]) for i, (a, b) in pairs.items()] for path, pairs in factors_by_path(adapters).items()
    }
    return _nest({path: concatenate_factors(pairs) for path, pairs in weighted.items()})


def concatenate_factors(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    """Returns concatenated factors {a, b} whose product a @ b equals the sum of the products a_i @ b_i of all
    `pairs`."""
    return {"a": jnp.concatenate([a for a, _ in pairs], -1), "b": jnp.concatenate([b for _, b in pairs], -2)}


def factors_by_path(adapters: Sequence[Adapter]) -> dict[str, dict[int, tuple[jax.Array, jax.Array]]]:
    """Returns a dict from each weight's path to the LoRA factors (a, b) of the adapters of that weight, by adapter
    index.

    Raises:
        UserError: an adapter has arrays other than a and b.
    """
    factors: dict[str, dict[int, tuple[jax.Array, jax.Array]]] = {}
    for i, adapter in enumerate(adapters):
        for path, pair in tree.by_parent(adapter).items():
            if pair.keys() != {"a", "b"}:
                kind = {"m": "a DoRA magnitude vector", "d": "a MiSS matrix"}
                name = next((kind[key] for key in kind if key in pair), "whole weights")
                raise UserError(f"{path} has {name}, which cannot be added: merge the adapters one after the other")
            factors.setdefault(path, {})[i] = pair["a"], pair["b"]
    return factors


def average(adapters: Sequence[Adapter]) -> Adapter:
    """Returns the mean of several adapters. The rank of the mean adapter is the sum of the ranks of the input
    adapters."""
    return concatenate(adapters, [1 / len(adapters)] * len(adapters))


def interpolate(first: Adapter, second: Adapter, t: float) -> Adapter:
    """Returns the linear interpolation of two adapters, (1 - t) * first + t * second.

    The rank of the returned adapter is the sum of the ranks of `first` and `second`.
    """
    return concatenate([first, second], [1 - t, t])


def negate(adapter: Adapter) -> Adapter:
    """Returns an adapter that adds -scale * a @ b instead of scale * a @ b, for task negation (arXiv:2212.04089)."""
    return concatenate([adapter], [-1.0])


def truncate_rank(adapter: Adapter, rank: jax.Array | int) -> Adapter:
    """Returns the adapter with all columns of `a` and all rows of `b` beyond the first `rank` set to zero.

    The shapes of the LoRA factors a and b do not change, and `rank` may be a tracer. The elements of a and b beyond the
    first `rank` columns or rows stay zero in training, because the gradients of these elements are zero. Adapters of
    different ranks can be zero-padded to the same shape and trained in one vmapped program.

    Raises:
        UserError: the adapter is a MiSS adapter, whose rank is also the block size by which its input is summed.
    """
    pairs = tree.by_parent(adapter)
    for path, pair in pairs.items():
        if "d" in pair:
            raise UserError(f"{path}: the rank of a MiSS adapter cannot be truncated: initialise one per rank")
        mask = jnp.arange(pair["a"].shape[-1]) < rank
        pair["a"], pair["b"] = pair["a"] * mask, pair["b"] * mask[:, None]
    return _nest(pairs)


def _nest(pairs: dict[str, dict[str, jax.Array]]) -> Adapter:
    return tree.unflatten({f"{path}/{name}": leaf for path, pair in pairs.items() for name, leaf in pair.items()})


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
