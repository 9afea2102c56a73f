"""Converts the tensors of a foreign file, which is a file in the format of another tool, to gptjax's parameter tree and
back, by a table of rules.

For example, the following rule transposes the tensor "model.layers.{i}.." [out, in] and maps the transposed tensor to
layer i of gptjax's stacked kernel [L, in, out]:

    Rule("blocks/attn/q/kernel", "model.layers.{i}.self_attn.q_proj.weight", transposed)

Unknown tensors, missing tensors and tensors with a wrong shape are errors, which one error message lists.
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

_CHUNK_SIZE = 1 << 22  # number of elements of a large matrix that are read at once


class Source(Protocol):
    """The named tensors of a file, which are read one at a time. A `Source` may have the optional method `rows(name,
    start, stop)`, which reads rows of a matrix."""

    def shapes(self) -> dict[str, Shape]: ...
    def array(self, name: str) -> np.ndarray: ...


class Form(NamedTuple):
    """Describes how a foreign file stores a tensor. The function `read` converts an array of the file to gptjax's
    array, `write` converts gptjax's array to an array of the file, and `shape` converts the shape of gptjax's array to
    the shape in the file."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


identity = Form(lambda a: a, lambda a: a, lambda shape: shape)
transposed = Form(lambda a: a.T, lambda a: a.T, lambda shape: shape[::-1])
# The form `plus_one` is for files that store norm scales as scale - 1. The form `plus_one` adds the 1 in float32,
# because an addition in bfloat16 would lose the last bits of the scale.
plus_one = Form(lambda a: a.astype(np.float32) + 1, lambda a: a.astype(np.float32) - 1, lambda shape: shape)
# The form `squeeze_leading` is for files that store weight matrices as kernels [1, in, out] of convolutions of width 1.
squeeze_leading = Form(lambda a: a[0], lambda a: a[None], lambda shape: (1, *shape))


def interleaved(n_head: int) -> Form:
    """Returns the `Form` of the matrices of q and k in llama.cpp's files for Llama, which are [out, in] with the H rows
    of each head in the order 0, H/2, 1, H/2 + 1, .."""

    def read(a: np.ndarray) -> np.ndarray:
        return np.swapaxes(a.reshape(n_head, -1, 2, a.shape[-1]), 1, 2).reshape(a.shape).T

    def write(a: np.ndarray) -> np.ndarray:
        return np.swapaxes(a.T.reshape(n_head, 2, -1, a.shape[0]), 1, 2).reshape(a.T.shape)

    return Form(read, write, lambda shape: shape[::-1])


class Rule(NamedTuple):
    """Maps a parameter of gptjax to a tensor of a foreign file. In the tensor name `theirs`, `{i}` stands for the layer
    index."""

    ours: str
    theirs: str
    form: Form = identity
    # If `slice` is (k, n), the array that `form.read` returns is divided into n equal slices along the last axis, and
    # the parameter is slice k, counted from 0.
    slice: tuple[int, int] | None = None
    fill: float | None = None  # Value to write if the model lacks the parameter; None skips the rule.


class Tensor(NamedTuple):
    """A tensor of a foreign file, with the rules that map its slices, in the order of the slices."""

    name: str
    layer: int | None
    rules: tuple[Rule, ...]


def tensors_of(rules: Sequence[Rule], ours: Collection[str], n_layer: int) -> list[Tensor]:
    """Returns the tensors of a foreign file that holds a model of n_layer layers with the parameter paths `ours`."""
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        if rule.ours not in ours and rule.fill is None:
            continue
        for i in range(n_layer) if "{i}" in rule.theirs else (None,):
            name = rule.theirs.format(i=i)
            earlier = tensors[name].rules if name in tensors else ()
            tensors[name] = Tensor(name, i, (*earlier, rule))
    return list(tensors.values())


def _their_shape(tensor: Tensor, ours: Mapping[str, Any], optional: dict[str, Shape]) -> Shape:
    shapes = []
    for rule in tensor.rules:
        shape = ours[rule.ours].shape[tensor.layer is not None :] if rule.ours in ours else optional[rule.ours]
        shapes.append(tuple(shape))
    joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes)) if tensor.rules[0].slice else shapes[0]
    return tensor.rules[0].form.shape(joined)


def optional_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Returns a dict that maps the paths of the biases and norm vectors that a model may lack to their shapes, without
    the layer axis."""
    D, F, H = cfg.d_model, cfg.d_ff, cfg.head_dim
    bias_sizes = {"q": cfg.n_head * H, "k": cfg.n_kv_head * H, "v": cfg.n_kv_head * H, "o": D}
    shapes: dict[str, Shape] = {f"blocks/attn/{name}/bias": (size,) for name, size in bias_sizes.items()}
    shapes |= {"blocks/mlp/up/bias": (F,), "blocks/mlp/gate/bias": (F,), "blocks/mlp/down/bias": (D,)}
    norms = ("blocks/ln_1", "blocks/ln_2", "blocks/ln_1_post", "blocks/ln_2_post", "ln_f")
    return shapes | {f"{norm}/{leaf}": (D,) for norm in norms for leaf in ("scale", "bias")}


# ---------------------------------------------------------------- reading


def read(
    source: Source,
    rules: Sequence[Rule],
    cfg: ModelConfig,
    location: str,
    *,
    dtype: Any = np.float32,
    shardings: Any = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Reads the parameter tree of `cfg` from `source`. The peak memory is the memory of the parameters and of one
    tensor.

    Args:
        location: path of the file or folder, for error messages.
        dtype: dtype of the returned parameters.
        shardings: one sharding for all parameters, or a tree of shardings, or None for the default device. Each
            parameter is put on its devices before the next one is read.
        ignored: function (name) that returns True if the tensor of this name can be ignored, such as a causal mask,
            RoPE frequencies or a tied LM head.

    Raises:
        UserError: tensors are missing, unknown, of a wrong shape, of an integer dtype or not finite; the message lists
            them.
    """
    shapes = source.shapes()
    if cfg.n_layer > len(shapes) and any("{i}" in rule.theirs for rule in rules):
        refuse(location, [f"{cfg.n_layer} layers are announced, but there are only {len(shapes)} tensors"])
    ours = tree.flatten(abstract_params(cfg))
    tensors = tensors_of(rules, ours, cfg.n_layer)
    optional = optional_shapes(cfg)
    expected = {tensor.name: _their_shape(tensor, ours, optional) for tensor in tensors}
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
    refuse(location, problems)
    by_leaf: dict[str, list[tuple[Tensor, Rule]]] = {path: [] for path in ours}
    for tensor in tensors:
        for rule in tensor.rules:
            if rule.ours in by_leaf:
                by_leaf[rule.ours].append((tensor, rule))
    sharding_of = shardings_by_path(shardings, ours)
    leaves, broken = {}, []
    for path, leaf in ours.items():
        out = _aligned(leaf.shape, dtype)
        for tensor, rule in by_leaf[path]:
            target = out if tensor.layer is None else out[tensor.layer]
            for index, chunk in _chunks(source, tensor.name, rule, shapes[tensor.name]):
                if not is_float(chunk):
                    broken.append(f"{tensor.name} holds {chunk.dtype}, expected floating-point values")
                    break
                target[index] = chunk
                if not np.isfinite(chunk.sum(dtype=np.float64)) and not np.isfinite(chunk).all():
                    broken.append(f"{tensor.name} has non-finite values")
        leaves[path] = jax.device_put(out, sharding_of[path], may_alias=True)
        del out
    refuse(location, list(dict.fromkeys(broken)))
    return tree.unflatten(leaves)


def is_float(array: np.ndarray) -> bool:
    """Returns True if the array has a floating-point dtype, as weights must have. Arrays of integers are rejected,
    because integers belong to a quantised format or would be read as huge values."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _chunks(source: Source, name: str, rule: Rule, shape: Shape) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields pairs of an index into the array of the parameter and the values at this index. A large matrix, such as an
    embedding, is read a few rows at a time."""
    rows = getattr(source, "rows", None)
    if rule.slice or rule.form not in (identity, transposed) or len(shape) != 2 or rows is None:
        array = rule.form.read(source.array(name))
        if rule.slice:
            k, n = rule.slice
            width = array.shape[-1] // n
            array = array[..., k * width : (k + 1) * width]
        yield ..., array
        return
    step = max(1, _CHUNK_SIZE // shape[1])
    for start in range(0, shape[0], step):
        span = slice(start, min(start + step, shape[0]))
        chunk = rule.form.read(rows(name, span.start, span.stop))
        yield (span if rule.form is identity else (slice(None), span)), chunk


def shardings_by_path(shardings: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dict that maps the paths of the parameters `ours` to their shardings, or to None for the default
    device."""
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(ours, shardings)
    return tree.flatten(shardings)


def _aligned(shape: Shape, dtype: Any) -> np.ndarray:
    """Returns an uninitialised array that is aligned to 64 bytes, so that `jax.device_put` to a CPU device does not
    copy it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# ---------------------------------------------------------------- writing


def write(params: Params, rules: Sequence[Rule], cfg: ModelConfig) -> Iterable[Out]:
    """Yields the tensors of the parameters `params` in the foreign format that the rules describe."""
    ours, optional = tree.flatten(params), optional_shapes(cfg)
    refuse("this format has no place for", sorted(ours.keys() - {rule.ours for rule in rules}))
    for tensor in tensors_of(rules, ours, cfg.n_layer):
        yield Out(tensor.name, _their_shape(tensor, ours, optional), partial(_their_array, tensor, ours, optional))


def _their_array(tensor: Tensor, ours: Mapping[str, Any], optional: dict[str, Shape]) -> np.ndarray:
    arrays = []
    for rule in tensor.rules:
        if rule.ours in ours:
            leaf = ours[rule.ours]
            arrays.append(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]))
        else:
            arrays.append(np.full(optional[rule.ours], rule.fill, np.float32))
    joined = np.concatenate(arrays, -1) if tensor.rules[0].slice else arrays[0]
    return np.ascontiguousarray(tensor.rules[0].form.write(joined))
