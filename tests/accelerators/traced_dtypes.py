"""What a bfloat16 program must look like, read from its jaxpr.

An array holds activations if ROWS divides its size (see `traced_programs.ROWS`). What is allowed to be float32 is named
where it is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.activations import WEIGHTS

# Sums, and functions whose error grows with the exponent. Not among them: logistic, which silu is computed with, in the
# activations' dtype as in transformers; maxima, which are exact.
SCATTER = {"scatter-add", "scatter_add"}
FLOAT32_ONLY = {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "sqrt", "rsqrt", "erf", "erf_inv", "sin", "cos", "pow",
    "reduce_sum", "reduce_prod", "reduce_window_sum", "cumsum", "cumlogsumexp", "cumprod", *SCATTER,
}  # fmt: skip
KERNELS = {"pallas_call", "run_scoped", "core_map"}  # what happens inside of a kernel is its own affair


class Limits(NamedTuple):
    """What tells activations of a model from their statistics and from rope's table."""

    rows: int
    layers: int
    statistics: int  # B * T * N: an array with no more elements, per layer, has one number per token and head
    allowed: frozenset[tuple[int, ...]]  # shapes


def is_float(aval: Any, dtype: Any = None) -> bool:
    if not hasattr(aval, "dtype") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return aval.dtype == dtype if dtype is not None else jnp.issubdtype(aval.dtype, jnp.floating)


def of_activations(aval: Any, rows: int) -> bool:
    size = math.prod(aval.shape) if hasattr(aval, "shape") else 0
    return size > 0 and size % rows == 0


def too_wide(aval: Any, limits: Limits) -> bool:
    """A float32 array of activations that is no statistic of them: softmax's and a norm's have one number per token
    and head, so has the scale of an int8 cache."""
    if not is_float(aval, jnp.float32) or not of_activations(aval, limits.rows):
        return False
    per_layer = aval.shape[1:] if aval.shape[0] == limits.layers else aval.shape
    return math.prod(per_layer) > limits.statistics and aval.shape[-1] > 1 and aval.shape not in limits.allowed


# ---------------------------------------------------------------- jaxprs


def _inner(value: Any) -> Any:
    """The jaxpr in a ClosedJaxpr, or the jaxpr itself; None of anything else."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def subjaxprs(eqn: Any) -> list[Any]:
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
    return [jaxpr for v in values if (jaxpr := _inner(v)) is not None]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of loops, branches and called functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name not in KERNELS:
            for inner in subjaxprs(eqn):
                yield from equations(inner)


def shown(eqn: Any) -> str:
    def kind(var: Any) -> str:
        aval = var.aval
        return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else str(aval)

    where = str(eqn.source_info.name_stack)
    return (
        f"{eqn.primitive.name}({', '.join(map(kind, eqn.invars))}) -> {', '.join(map(kind, eqn.outvars))} in {where!r}"
    )


def _called(eqn: Any) -> Any:
    """The jaxpr of a function that is called once with these arguments (jit, remat, custom rules); else None."""
    if eqn.primitive.name in KERNELS | {"scan", "while", "cond", "shard_map"}:
        return None
    inner = [jaxpr for jaxpr in subjaxprs(eqn) if len(jaxpr.outvars) == len(eqn.outvars)]
    return inner[0] if inner else None


class Value(NamedTuple):
    """A result, and where it comes from."""

    aval: Any
    eqn: Any = None
    inputs: tuple[Value, ...] = ()


def results(jaxpr: Any, args: list[Value]) -> list[Value]:
    """What the jaxpr gives, with called functions written out in place."""
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


# ---------------------------------------------------------------- what is wrong with a program


def complaints(traced: Any, cfg: ModelConfig, program: Any, *, rows: int, tokens: int) -> list[str]:
    """Everything that is not as it must be in a traced program of `cfg`, one line each.

    Args:
        traced: `jax.jit(program.fn).trace(...)`. program: `traced_programs.Program`, which says what is allowed.
        rows: B. tokens: T of the longest row.
    """
    jaxpr = _inner(traced.jaxpr)
    out = traced.out_info
    found = _outputs(out)
    if cfg.dtype == "float32":
        wrong = (eqn for eqn in equations(jaxpr) if any(is_float(v.aval, jnp.bfloat16) for v in eqn.outvars))
        found += [f"bfloat16 in a float32 model: {shown(eqn)}" for eqn in wrong]
        return found + _imprecise(jaxpr, cfg, rows)
    limits = Limits(rows, cfg.n_layer, rows * tokens * cfg.n_head, _allowed(jaxpr, out, cfg, rows))
    found += _activations(out)
    found += [] if "saved" in program.unchecked else _saved(out, limits)
    found += [] if "loops" in program.unchecked else _loops(jaxpr, limits)
    found += _products(jaxpr, rows, program.wide_products)
    found += _sums(jaxpr, rows, program.scattered)
    return found + _logits(jaxpr, out, rows)


def _allowed(jaxpr: Any, out: dict[str, Any], cfg: ModelConfig, rows: int) -> frozenset[tuple[int, ...]]:
    """Shapes that may be float32: attention's probabilities where they are asked for, rope's tables [.., H/2], of
    which there are two for all layers, or four, and the batch's loss weights in micro-batches."""
    probabilities = {leaf.shape for path, leaf in _named(out, "activations") if WEIGHTS in path}
    angles = [v.aval for eqn in equations(jaxpr) if eqn.primitive.name == "sin" for v in eqn.outvars]
    tables = {(*a.shape[:-1], cfg.head_dim // 2) for a in angles if a.shape}
    batch = [v.aval.shape for v in jaxpr.invars if of_activations(v.aval, rows) and is_float(v.aval, jnp.float32)]
    micro = {(n // rows, rows, *rest) for n, *rest in batch if n % rows == 0}
    return frozenset(probabilities | tables | micro | {(2, *shape) for shape in tables})


def _named(out: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    """(path, shape and dtype) of the leaves of one entry of a program's result."""
    leaves = jax.tree_util.tree_leaves_with_path(out.get(name, ()))
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _outputs(out: dict[str, Any]) -> list[str]:
    """What leaves a program is float32, whatever the model computes in: logits, losses, parameters, gradients."""
    leaves = [leaf for name in ("logits", "loss", "params", "gradient") for leaf in _named(out, name)]
    wrong = [(path, leaf) for path, leaf in leaves if is_float(leaf) and leaf.dtype != jnp.float32]
    return [f"{path} is {leaf.dtype}, not float32" for path, leaf in wrong]


def _activations(out: dict[str, Any]) -> list[str]:
    """The residual stream, queries, keys, values and all that lies between the products; not attention's
    probabilities, which are made beside the kernels, by a float32 softmax. The cache is in the dtype asked for."""
    leaves = [(path, leaf) for path, leaf in _named(out, "activations") if WEIGHTS not in path]
    wrong = [(path, leaf) for path, leaf in leaves if leaf.dtype != jnp.bfloat16]
    cache = [(path, leaf) for path, leaf in _named(out, "cache") if is_float(leaf) and leaf.shape[-1] > 1]
    wrong += [(path, leaf) for path, leaf in cache if leaf.dtype != jnp.bfloat16]
    return [f"{path} is {leaf.dtype}, not bfloat16" for path, leaf in wrong]


def _saved(out: dict[str, Any], limits: Limits) -> list[str]:
    """What is kept for the backward pass, from where `jax.vjp` keeps it."""
    wrong = [(path, leaf) for path, leaf in _named(out, "saved") if too_wide(leaf, limits)]
    return [f"{path} for the backward pass is float32{list(leaf.shape)}" for path, leaf in wrong]


def _loops(jaxpr: Any, limits: Limits) -> list[str]:
    """What scans read, carry and stack: forwards the residual stream and what is saved of each layer, backwards its
    cotangent. Cotangents of weights may be float32: they are no activations."""
    found = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name != "scan":
            continue
        avals = [var.aval for var in (*eqn.invars, *eqn.outvars) if too_wide(var.aval, limits)]
        wrong = [aval for aval in avals if not _of_scores(aval, limits)]
        where = str(eqn.source_info.name_stack)
        found += [f"a scan of {eqn.params['length']} carries or stacks {aval} in {where!r}" for aval in wrong]
    return found


def _imprecise(jaxpr: Any, cfg: ModelConfig, rows: int) -> list[str]:
    """Products of a float32 model have its `precision`, where it states one, or the highest, as sums have."""
    if cfg.precision == "default":
        return []
    stated = getattr(jax.lax.Precision, cfg.precision.upper())
    products = [eqn for eqn in equations(jaxpr) if _is_product(eqn)]
    of = [eqn for eqn in products if any(of_activations(var.aval, rows) for var in eqn.invars)]
    enough = [pair for one in (stated, jax.lax.Precision.HIGHEST) for pair in (one, (one, one))]
    wrong = [eqn for eqn in of if eqn.params["precision"] not in enough]
    return [f"a product is not of precision {cfg.precision}: {shown(eqn)}" for eqn in wrong]


def _of_scores(aval: Any, limits: Limits) -> bool:
    """[B, 1, 1, T, S] or [B, K, G, T, S]: attention's mask or linear bias, made once for all layers."""
    return len(aval.shape) == 5 and aval.shape[0] % limits.rows == 0


def _products(jaxpr: Any, rows: int, wide_products: int) -> list[str]:
    """Every product of activations has bfloat16 operands and float32 sums, but for the wide ones that a use has by
    intention, with a float32 operand. Products of weights among themselves (DoRA's norms, Muon) are none of these."""
    found, wide = [], []
    for eqn in equations(jaxpr):
        avals = [var.aval for var in (*eqn.invars, *eqn.outvars)]
        if not _is_product(eqn) or not any(of_activations(aval, rows) for aval in avals[:2]):
            continue
        dtypes = [aval.dtype.name for aval in avals]
        if dtypes[2] != "float32":
            found.append(f"a product is not summed in float32: {shown(eqn)}")
        elif dtypes[:2] != ["bfloat16"] * 2:
            wide.append(shown(eqn))
    if len(wide) != wide_products:
        lines = "".join(f"\n    {line}" for line in wide)
        found.append(f"{len(wide)} products with float32 operands, expected {wide_products}{lines}")
    return found


def _is_product(eqn: Any) -> bool:
    """Whether it is a product of matrices. Without a free axis it is a sum of elementwise products, such as splash's
    sum of an output times its cotangent over a head."""
    if eqn.primitive.name != "dot_general":
        return False
    contracted, batch = eqn.params["dimension_numbers"]
    sides = zip(eqn.invars, contracted, batch, strict=True)
    return any(len(var.aval.shape) > len(summed) + len(kept) for var, summed, kept in sides)


def _sums(jaxpr: Any, rows: int, scattered: int) -> list[str]:
    """Norms, softmax, losses, and every sum over activations (the gradient of a bias) are computed in float32."""
    wrong = [
        eqn
        for eqn in equations(jaxpr)
        if (eqn.primitive.name in FLOAT32_ONLY or (eqn.primitive.name == "dot_general" and not _is_product(eqn)))
        and any(is_float(v.aval, jnp.bfloat16) and of_activations(v.aval, rows) for v in eqn.invars)
    ]
    of_scatter = [eqn for eqn in wrong if eqn.primitive.name in SCATTER]
    if len(of_scatter) == scattered:
        wrong = [eqn for eqn in wrong if eqn.primitive.name not in SCATTER]
    return [f"computed in bfloat16: {shown(eqn)}" for eqn in wrong]


def _logits(jaxpr: Any, out: dict[str, Any], rows: int) -> list[str]:
    """Between the head's product, summed in float32, and the logits nothing is bfloat16."""
    paths = jax.tree_util.tree_leaves_with_path(out)
    wanted = [str(getattr(path[0], "key", "")) == "logits" for path, _ in paths]
    values = results(jaxpr, [Value(var.aval) for var in jaxpr.invars])
    found, seen = [], set()
    todo = [value for value, is_logits in zip(values, wanted, strict=True) if is_logits]
    while todo:
        value = todo.pop()
        if id(value) in seen or not is_float(value.aval) or not of_activations(value.aval, rows):
            continue
        seen.add(id(value))
        if value.eqn is None or value.eqn.primitive.name in ("scan", "while", "cond", "shard_map", *KERNELS):
            where = "an argument" if value.eqn is None else value.eqn.primitive.name
            found.append(f"logits come from {where}, not from a product: {value.aval}")
        elif is_float(value.aval, jnp.bfloat16):
            found.append(f"logits are rounded to bfloat16 by {shown(value.eqn)}")
        elif value.eqn.primitive.name != "dot_general":
            todo += value.inputs
    return found
