"""Tensor by tensor between a foreign file and the parameter tree, by a table of rules, both ways.

    Rule("blocks/attn/q/kernel", "model.layers.{i}.self_attn.q_proj.weight", transposed)

says that layer i of our stacked [L, in, out] kernel is that tensor, [out, in], transposed. Nothing is guessed: a tensor
that no rule names, one that a rule names and the file lacks, and one of another shape are refused, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tree
from gptjax.config import ModelConfig
from gptjax.errors import refuse
from gptjax.formats.tensors import Out, Shape
from gptjax.model.gpt import abstract_params
from gptjax.types import Params

_PIECE = 1 << 22  # elements of a matrix that are read at once


class Source(Protocol):
    """Named tensors that are read one at a time; `rows(name, start, stop)`, if there is such, reads a part."""

    def shapes(self) -> dict[str, Shape]: ...
    def array(self, name: str) -> np.ndarray: ...


class Form(NamedTuple):
    """How a tensor is written elsewhere: `read` makes it ours, `write` theirs, `shape` tells theirs from ours."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


identity = Form(lambda a: a, lambda a: a, lambda shape: shape)
transposed = Form(lambda a: a.T, lambda a: a.T, lambda shape: shape[::-1])
# a norm's scale is stored as scale - 1; added in float32, as a bfloat16 sum would lose its last bits
plus_one = Form(lambda a: a.astype(np.float32) + 1, lambda a: a.astype(np.float32) - 1, lambda shape: shape)
squeeze_leading = Form(lambda a: a[0], lambda a: a[None], lambda shape: (1, *shape))  # a convolution of width 1


def interleaved(n_head: int) -> Form:
    """Rows of a [out, in] matrix in pairs (0, H/2), (1, H/2 + 1), ..: llama.cpp's order for Llama's q and k."""

    def read(a: np.ndarray) -> np.ndarray:
        return np.swapaxes(a.reshape(n_head, -1, 2, a.shape[-1]), 1, 2).reshape(a.shape).T

    def write(a: np.ndarray) -> np.ndarray:
        return np.swapaxes(a.T.reshape(n_head, 2, -1, a.shape[0]), 1, 2).reshape(a.T.shape)

    return Form(read, write, lambda shape: shape[::-1])


class Rule(NamedTuple):
    """One leaf of ours and where it stands elsewhere. `{i}` in the name counts the layers."""

    ours: str
    theirs: str
    form: Form = identity
    part: tuple[int, int] | None = None  # (k, n): ours is the k-th of n equal parts of theirs, along the last axis
    fill: float | None = None  # written where our model has no such leaf; None: then the rule does not count


class Tensor(NamedTuple):
    """One tensor of theirs with the rules that share it, in the order of their parts."""

    name: str
    layer: int | None
    rules: tuple[Rule, ...]


def tensors_of(rules: Sequence[Rule], ours: Collection[str], n_layer: int) -> list[Tensor]:
    """Every tensor that the rules name for a model with these leaves."""
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        if rule.ours not in ours and rule.fill is None:
            continue
        for i in range(n_layer) if "{i}" in rule.theirs else (None,):
            name = rule.theirs.format(i=i)
            before = tensors[name].rules if name in tensors else ()
            tensors[name] = Tensor(name, i, (*before, rule))
    return list(tensors.values())


def _their_shape(tensor: Tensor, ours: Mapping[str, Any], blanks: dict[str, Shape]) -> Shape:
    shapes = []
    for rule in tensor.rules:
        shape = ours[rule.ours].shape[tensor.layer is not None :] if rule.ours in ours else blanks[rule.ours]
        shapes.append(tuple(shape))
    joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes)) if tensor.rules[0].part else shapes[0]
    return tensor.rules[0].form.shape(joined)


def blank_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """The shapes, without the layers, of vectors that a model may lack."""
    D, F, H = cfg.d_model, cfg.d_ff, cfg.head_dim
    wide = {"q": cfg.n_head * H, "k": cfg.n_kv_head * H, "v": cfg.n_kv_head * H, "o": D}
    shapes: dict[str, Shape] = {f"blocks/attn/{name}/bias": (size,) for name, size in wide.items()}
    shapes |= {"blocks/mlp/up/bias": (F,), "blocks/mlp/gate/bias": (F,), "blocks/mlp/down/bias": (D,)}
    norms = ("blocks/ln_1", "blocks/ln_2", "blocks/ln_1_post", "blocks/ln_2_post", "ln_f")
    return shapes | {f"{norm}/{leaf}": (D,) for norm in norms for leaf in ("scale", "bias")}


# ---------------------------------------------------------------- in


def read(
    source: Source,
    rules: Sequence[Rule],
    cfg: ModelConfig,
    where: str,
    *,
    dtype: Any = np.float32,
    shardings: Any = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Params:
    """The parameter tree of `cfg` from `source`, one tensor in memory beside it at a time.

    Args:
        where: the file or folder, for errors.
        dtype: of every leaf.
        shardings: None, one sharding, or a tree of them; a leaf goes straight to its place.
        ignored: names that hold no parameters (masks, tables that the code computes).

    Raises:
        UserError: missing, unknown or misshapen tensors, integers, and values that are not finite; all of them.
    """
    shapes = source.shapes()
    if cfg.n_layer > len(shapes) and any("{i}" in rule.theirs for rule in rules):
        refuse(where, [f"{cfg.n_layer} layers are announced, but there are only {len(shapes)} tensors"])
    ours = tree.flatten(abstract_params(cfg))
    tensors = tensors_of(rules, ours, cfg.n_layer)
    blanks = blank_shapes(cfg)
    expected = {tensor.name: _their_shape(tensor, ours, blanks) for tensor in tensors}
    problems = [f"{name} is missing, expected shape {list(expected[name])}" for name in expected.keys() - shapes.keys()]
    problems += [
        f"{name} {list(shapes[name])} is unknown to this kind of model"
        for name in shapes.keys() - expected.keys()
        if not ignored(name)
    ]
    problems += [
        f"{name} is {list(shapes[name])}, expected {list(expected[name])}"
        for name in expected.keys() & shapes.keys()
        if tuple(shapes[name]) != expected[name]
    ]
    refuse(where, problems)
    by_leaf: dict[str, list[tuple[Tensor, Rule]]] = {path: [] for path in ours}
    for tensor in tensors:
        for rule in tensor.rules:
            if rule.ours in by_leaf:
                by_leaf[rule.ours].append((tensor, rule))
    places = places_of(shardings, ours)
    leaves, broken = {}, []
    for path, leaf in ours.items():
        out = _aligned(leaf.shape, dtype)
        for tensor, rule in by_leaf[path]:
            ours_here = out if tensor.layer is None else out[tensor.layer]
            for at, piece in _pieces(source, tensor.name, rule, shapes[tensor.name]):
                if not is_float(piece):
                    broken.append(f"{tensor.name} holds {piece.dtype}, expected floating-point numbers")
                    break
                ours_here[at] = piece
                if not np.isfinite(piece.sum(dtype=np.float64)) and not np.isfinite(piece).all():
                    broken.append(f"{tensor.name} has numbers that are not finite")
        leaves[path] = jax.device_put(out, places[path], may_alias=True)
        del out
    refuse(where, list(dict.fromkeys(broken)))
    return tree.unflatten(leaves)


def is_float(array: np.ndarray) -> bool:
    """Whether it can be a weight: integers would be read as values in the millions, or belong to a quantised format."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _pieces(source: Source, name: str, rule: Rule, shape: Shape) -> Iterator[tuple[Any, np.ndarray]]:
    """Where in our array, and what; a large matrix (an embedding) comes a few rows at a time."""
    rows = getattr(source, "rows", None)
    if rule.part or rule.form not in (identity, transposed) or len(shape) != 2 or rows is None:
        array = rule.form.read(source.array(name))
        if rule.part:
            k, n = rule.part
            width = array.shape[-1] // n
            array = array[..., k * width : (k + 1) * width]
        yield ..., array
        return
    step = max(1, _PIECE // shape[1])
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        piece = rule.form.read(rows(name, part.start, part.stop))
        yield (part if rule.form is identity else (slice(None), part)), piece


def places_of(shardings: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(ours, shardings)
    return tree.flatten(shardings)


def _aligned(shape: Shape, dtype: Any) -> np.ndarray:
    """An empty array that starts on a 64-byte border: a CPU device takes it over as it lies, without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# ---------------------------------------------------------------- out


def write(params: Params, rules: Sequence[Rule], cfg: ModelConfig) -> Iterable[Out]:
    """The tensors of `params` as the rules name and shape them."""
    ours, blanks = tree.flatten(params), blank_shapes(cfg)
    refuse("this format has no place for", sorted(ours.keys() - {rule.ours for rule in rules}))
    for tensor in tensors_of(rules, ours, cfg.n_layer):
        yield Out(tensor.name, _their_shape(tensor, ours, blanks), partial(_their_array, tensor, ours, blanks))


def _their_array(tensor: Tensor, ours: Mapping[str, Any], blanks: dict[str, Shape]) -> np.ndarray:
    parts = []
    for rule in tensor.rules:
        if rule.ours in ours:
            leaf = ours[rule.ours]
            parts.append(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]))
        else:
            parts.append(np.full(blanks[rule.ours], rule.fill, np.float32))
    joined = np.concatenate(parts, -1) if tensor.rules[0].part else parts[0]
    return np.ascontiguousarray(tensor.rules[0].form.write(joined))
