"""Checks of the dtypes in a program of a bfloat16 model, read from its jaxpr.

An array is taken for activations if ROWS divides its size (see `traced_programs.ROWS`). Exceptions that may be float32
are listed in the functions below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.activations import WEIGHTS

# Sums, and functions such as exp, which amplify rounding errors. Not included: logistic, because silu is computed in
# the dtype of the activations, as in transformers; maxima, which are exact.
SCATTER = {"scatter-add", "scatter_add"}
FLOAT32_ONLY = {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "sqrt", "rsqrt", "erf", "erf_inv", "sin", "cos", "pow",
    "reduce_sum", "reduce_prod", "reduce_window_sum", "cumsum", "cumlogsumexp", "cumprod", *SCATTER,
}  # fmt: skip
KERNELS = {"pallas_call", "run_scoped", "core_map"}  # kernels, whose inside is not checked


class Limits(NamedTuple):
    """Distinguishes activations from their statistics and from RoPE's table."""

    rows: int
    layers: int
    statistics: int  # B * T * N: an array with at most this many elements per layer has one value per token and head
    allowed: frozenset[tuple[int, ...]]  # shapes that may be float32


def is_float(aval: Any, dtype: Any = None) -> bool:
    if not hasattr(aval, "dtype") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return aval.dtype == dtype if dtype is not None else jnp.issubdtype(aval.dtype, jnp.floating)


def is_activations(aval: Any, rows: int) -> bool:
    size = math.prod(aval.shape) if hasattr(aval, "shape") else 0
    return size > 0 and size % rows == 0


def too_wide(aval: Any, limits: Limits) -> bool:
    """Whether an array holds float32 activations.

    Statistics, with one value per token and head, do not count: those of softmax and norms, scales of an int8 cache.
    """
    if not is_float(aval, jnp.float32) or not is_activations(aval, limits.rows):
        return False
    per_layer = aval.shape[1:] if aval.shape[0] == limits.layers else aval.shape
    return math.prod(per_layer) > limits.statistics and aval.shape[-1] > 1 and aval.shape not in limits.allowed


# ---------------------------------------------------------------- jaxprs


def _inner(value: Any) -> Any:
    """The jaxpr of a ClosedJaxpr, a jaxpr itself, or None for anything else."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def subjaxprs(eqn: Any) -> list[Any]:
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
    return [jaxpr for v in values if (jaxpr := _inner(v)) is not None]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, including those of loops, branches and called functions."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name not in KERNELS:
            for inner in subjaxprs(eqn):
                yield from equations(inner)


def describe(eqn: Any) -> str:
    """An equation as text: primitive, input and output types, name scope."""

    def kind(var: Any) -> str:
        aval = var.aval
        return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else str(aval)

    scope = str(eqn.source_info.name_stack)
    return (
        f"{eqn.primitive.name}({', '.join(map(kind, eqn.invars))}) -> {', '.join(map(kind, eqn.outvars))} in {scope!r}"
    )


def _called(eqn: Any) -> Any:
    """The jaxpr of a function that an equation calls once (jit, remat, custom rules), else None."""
    if eqn.primitive.name in KERNELS | {"scan", "while", "cond", "shard_map"}:
        return None
    inner = [jaxpr for jaxpr in subjaxprs(eqn) if len(jaxpr.outvars) == len(eqn.outvars)]
    return inner[0] if inner else None


class Value(NamedTuple):
    """A value, the equation that computes it and the inputs of that equation."""

    aval: Any
    eqn: Any = None
    inputs: tuple[Value, ...] = ()


def results(jaxpr: Any, args: list[Value]) -> list[Value]:
    """The results of a jaxpr as `Value`s, with called functions inlined."""
    known = {var: Value(var.aval) for var in jaxpr.constvars} | dict(zip(jaxpr.invars, args, strict=True))

    def read(var: Any) -> Value:
        return Value(var.aval) if hasattr(var, "val") else known[var]

    for eqn in jaxpr.eqns:
        inputs = tuple(read(var) for var in eqn.invars)
        if (inner := _called(eqn)) is None:
            outs = [Value(var.aval, eqn, inputs) for var in eqn.outvars]
        else:
            outs = results(inner, inputs[len(inputs) - len(inner.invars) :])
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


# ---------------------------------------------------------------- the checks


def complaints(traced: Any, cfg: ModelConfig, program: Any, *, rows: int, tokens: int) -> list[str]:
    """All violations in a traced program of `cfg`, one line each.

    Args:
        traced: `jax.jit(program.fn).trace(...)`.
        program: `traced_programs.Program`, which says which exceptions are allowed.
        rows: B.
        tokens: T of the longest row.
    """
    jaxpr = _inner(traced.jaxpr)
    out = traced.out_info
    lines = _outputs(out)
    if cfg.dtype == "float32":
        wrong = (eqn for eqn in equations(jaxpr) if any(is_float(v.aval, jnp.bfloat16) for v in eqn.outvars))
        lines += [f"bfloat16 in a float32 model: {describe(eqn)}" for eqn in wrong]
        return lines + _imprecise(jaxpr, cfg, rows)
    limits = Limits(rows, cfg.n_layer, rows * tokens * cfg.n_head, _allowed(jaxpr, out, cfg, rows))
    lines += _activations(out)
    lines += [] if "saved" in program.unchecked else _saved(out, limits)
    lines += [] if "loops" in program.unchecked else _loops(jaxpr, limits)
    lines += _products(jaxpr, rows, program.wide_products)
    lines += _sums(jaxpr, rows, program.scattered)
    return lines + _logits(jaxpr, out, rows)


def _allowed(jaxpr: Any, out: dict[str, Any], cfg: ModelConfig, rows: int) -> frozenset[tuple[int, ...]]:
    """Shapes that may be float32.

    These are attention probabilities that are an output, RoPE's tables [.., H/2] (two or four for all layers), and the
    loss weights of the batch, split into micro-batches.
    """
    probabilities = {leaf.shape for path, leaf in _named(out, "activations") if WEIGHTS in path}
    angles = [v.aval for eqn in equations(jaxpr) if eqn.primitive.name == "sin" for v in eqn.outvars]
    tables = {(*a.shape[:-1], cfg.head_dim // 2) for a in angles if a.shape}
    batch = [v.aval.shape for v in jaxpr.invars if is_activations(v.aval, rows) and is_float(v.aval, jnp.float32)]
    micro = {(n // rows, rows, *rest) for n, *rest in batch if n % rows == 0}
    return frozenset(probabilities | tables | micro | {(2, *shape) for shape in tables})


def _named(out: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    """(path, leaf) of the leaves of the entry `name` of a program's result."""
    leaves = jax.tree_util.tree_leaves_with_path(out.get(name, ()))
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _outputs(out: dict[str, Any]) -> list[str]:
    """Logits, losses, parameters and gradients in the result of a program must be float32 for every model dtype."""
    leaves = [leaf for name in ("logits", "loss", "params", "gradient") for leaf in _named(out, name)]
    wrong = [(path, leaf) for path, leaf in leaves if is_float(leaf) and leaf.dtype != jnp.float32]
    return [f"{path} is {leaf.dtype}, not float32" for path, leaf in wrong]


def _activations(out: dict[str, Any]) -> list[str]:
    """All activations between the products, and the cache, must be bfloat16.

    Attention probabilities are excluded: if they are read, they are computed without a kernel by a float32 softmax.
    """
    leaves = [(path, leaf) for path, leaf in _named(out, "activations") if WEIGHTS not in path]
    wrong = [(path, leaf) for path, leaf in leaves if leaf.dtype != jnp.bfloat16]
    cache = [(path, leaf) for path, leaf in _named(out, "cache") if is_float(leaf) and leaf.shape[-1] > 1]
    wrong += [(path, leaf) for path, leaf in cache if leaf.dtype != jnp.bfloat16]
    return [f"{path} is {leaf.dtype}, not bfloat16" for path, leaf in wrong]


def _saved(out: dict[str, Any], limits: Limits) -> list[str]:
    """The residuals of `jax.vjp`, which are saved for the backward pass, must not be float32 activations."""
    wrong = [(path, leaf) for path, leaf in _named(out, "saved") if too_wide(leaf, limits)]
    return [f"{path} for the backward pass is float32{list(leaf.shape)}" for path, leaf in wrong]


def _loops(jaxpr: Any, limits: Limits) -> list[str]:
    """Inputs, carries and outputs of scans must not be float32 activations.

    In the forward pass these are the residual stream and the residuals of each layer, in the backward pass their
    cotangents. Cotangents of weights may be float32.
    """
    lines = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name != "scan":
            continue
        avals = [var.aval for var in (*eqn.invars, *eqn.outvars) if too_wide(var.aval, limits)]
        wrong = [aval for aval in avals if not _is_bias(aval, limits)]
        scope = str(eqn.source_info.name_stack)
        lines += [f"a scan of {eqn.params['length']} carries or stacks {aval} in {scope!r}" for aval in wrong]
    return lines


def _imprecise(jaxpr: Any, cfg: ModelConfig, rows: int) -> list[str]:
    """Products of a float32 model must have the precision of cfg.precision, or the highest, as sums do."""
    if cfg.precision == "default":
        return []
    stated = getattr(jax.lax.Precision, cfg.precision.upper())
    products = [eqn for eqn in equations(jaxpr) if _is_product(eqn)]
    activation_products = [eqn for eqn in products if any(is_activations(var.aval, rows) for var in eqn.invars)]
    allowed = [pair for p in (stated, jax.lax.Precision.HIGHEST) for pair in (p, (p, p))]
    wrong = [eqn for eqn in activation_products if eqn.params["precision"] not in allowed]
    return [f"a product is not of precision {cfg.precision}: {describe(eqn)}" for eqn in wrong]


def _is_bias(aval: Any, limits: Limits) -> bool:
    """Whether an array is attention's mask [B, 1, 1, T, S] or ALiBi bias [B, K, G, T, S], shared by all layers."""
    return len(aval.shape) == 5 and aval.shape[0] % limits.rows == 0


def _products(jaxpr: Any, rows: int, wide_products: int) -> list[str]:
    """Every product with activations must have bfloat16 operands and float32 sums.

    Exactly `wide_products` products may have a float32 operand. Products of weights only (DoRA's norms, Muon) are not
    checked.
    """
    lines, wide = [], []
    for eqn in equations(jaxpr):
        avals = [var.aval for var in (*eqn.invars, *eqn.outvars)]
        if not _is_product(eqn) or not any(is_activations(aval, rows) for aval in avals[:2]):
            continue
        dtypes = [aval.dtype.name for aval in avals]
        if dtypes[2] != "float32":
            lines.append(f"a product is not summed in float32: {describe(eqn)}")
        elif dtypes[:2] != ["bfloat16"] * 2:
            wide.append(describe(eqn))
    if len(wide) != wide_products:
        details = "".join(f"\n    {line}" for line in wide)
        lines.append(f"{len(wide)} products with float32 operands, expected {wide_products}{details}")
    return lines


def _is_product(eqn: Any) -> bool:
    """Whether an equation is a matrix product.

    A dot_general in which neither operand has a free axis is a sum of elementwise products, such as splash's sum of an
    output times its cotangent over a head.
    """
    if eqn.primitive.name != "dot_general":
        return False
    contracted, batch = eqn.params["dimension_numbers"]
    operands = zip(eqn.invars, contracted, batch, strict=True)
    return any(len(var.aval.shape) > len(summed) + len(kept) for var, summed, kept in operands)


def _sums(jaxpr: Any, rows: int, scattered: int) -> list[str]:
    """Norms, softmax, losses and sums over activations (such as the gradient of a bias) must be computed in float32.

    `scattered`: number of scatter-adds that may be bfloat16.
    """
    wrong = [
        eqn
        for eqn in equations(jaxpr)
        if (eqn.primitive.name in FLOAT32_ONLY or (eqn.primitive.name == "dot_general" and not _is_product(eqn)))
        and any(is_float(v.aval, jnp.bfloat16) and is_activations(v.aval, rows) for v in eqn.invars)
    ]
    scatter_adds = [eqn for eqn in wrong if eqn.primitive.name in SCATTER]
    if len(scatter_adds) == scattered:
        wrong = [eqn for eqn in wrong if eqn.primitive.name not in SCATTER]
    return [f"computed in bfloat16: {describe(eqn)}" for eqn in wrong]


def _logits(jaxpr: Any, out: dict[str, Any], rows: int) -> list[str]:
    """Nothing between the product of the head, which is summed in float32, and the logits may be bfloat16."""
    paths = jax.tree_util.tree_leaves_with_path(out)
    is_logits_leaf = [str(getattr(path[0], "key", "")) == "logits" for path, _ in paths]
    values = results(jaxpr, [Value(var.aval) for var in jaxpr.invars])
    lines, visited = [], set()
    todo = [value for value, is_logits in zip(values, is_logits_leaf, strict=True) if is_logits]
    while todo:
        value = todo.pop()
        if id(value) in visited or not is_float(value.aval) or not is_activations(value.aval, rows):
            continue
        visited.add(id(value))
        if value.eqn is None or value.eqn.primitive.name in ("scan", "while", "cond", "shard_map", *KERNELS):
            source = "an argument" if value.eqn is None else value.eqn.primitive.name
            lines.append(f"logits come from {source}, not from a product: {value.aval}")
        elif is_float(value.aval, jnp.bfloat16):
            lines.append(f"logits are rounded to bfloat16 by {describe(value.eqn)}")
        elif value.eqn.primitive.name != "dot_general":
            todo += value.inputs
    return lines
