"""One training step as a pure function of (state, batch), for any loss over any tree of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gptjax.errors import UserError
from gptjax.ops.device import platform
from gptjax.types import Mean, Metrics

Loss = Callable[[Any, Any, Any], tuple[Mean, Metrics]]  # (params, batch, key) -> (Mean, metrics)
# (params, frozen, batch, key) -> (gradient of the total, (Mean, metrics))
Gradient = Callable[[Any, Any, Any, Any], tuple[Any, tuple[Mean, Metrics]]]


class TrainState(struct.PyTreeNode):
    """Everything a step reads and writes; a pytree of arrays alone, so that it saves, donates and shards as one.

    `key` never changes: the randomness of step n is `fold_in(key, n)`. `frozen` is what the loss reads and the
    optimizer never sees. A step whose loss or gradient is not finite leaves params and opt_state as they were and
    counts in `skipped` and `skipped_in_a_row`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    frozen: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @classmethod
    def create(cls, params: Any, *, tx: optax.GradientTransformation, key: jax.Array, frozen: Any = None) -> TrainState:
        """The state before the first step.

        Args:
            params: what is trained, any tree of arrays. tx: whose state starts here.
            key: of dropout; each step folds its number in. frozen: what the loss reads beside it, never updated.
        """
        return cls(
            step=jnp.int32(0), params=params, opt_state=tx.init(params), key=key, frozen=frozen,
            skipped=jnp.int32(0), skipped_in_a_row=jnp.int32(0),
        )  # fmt: skip


def init_state(
    init: Callable[[jax.Array, Any], Any], tx: optax.GradientTransformation, seed: int | jax.Array, start: Any
) -> TrainState:
    """The state that a run of this seed starts from; `init` and `start` as of `Task.initial`."""
    init_key, key = jax.random.split(jax.random.key(seed))
    return TrainState.create(init(init_key, start), tx=tx, key=key)


def _checked(result: Any) -> tuple[Mean, Metrics]:
    """What a loss returned. Raises UserError if it has another form; runs while the step is traced."""
    pair = type(result) is tuple and len(result) == 2
    if pair and isinstance(result[0], Mean) and isinstance(result[1], dict):
        return result
    got = f"({', '.join(type(part).__name__ for part in result)})" if type(result) is tuple else type(result).__name__
    raise UserError(
        f"loss: expected (Mean(total, weight), metrics dict), got {got}; a mean over n targets is "
        "`return gptjax.types.Mean(total, n), {}`"
    )


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    combine: Callable[[Any, Any], Any] = lambda params, frozen: params,
    accumulation: int = 1,
    transform: Callable[[Gradient], Gradient] = lambda gradient: gradient,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The step for `loss`: gradient of the total, divided once by the weight of the whole batch, then `tx`, which is
    told the gradient's norm as `grad_norm` where it takes extra arguments.

    Args:
        loss: (params, batch, key) -> (Mean(total, weight), metrics); metrics that are `Mean` are divided too.
        combine: (trained, frozen) -> the params the loss reads; LoRA attaches here.
        accumulation: micro-batches; every leaf of the batch has a leading axis that it divides. The result equals
            the undivided batch up to rounding, whatever the weights in each part.
        transform: of the function that gives the whole batch's gradient, such as `research.curvature.sam`.

    Returns:
        step(state, batch) -> (state, metrics): loss, weight, grad_norm, skipped, and what the loss reports.
    """

    def total(params, frozen, batch, key):
        mean, metrics = _checked(loss(combine(params, frozen), batch, key))
        return mean.total, (mean, metrics)

    gradient = jax.grad(total, has_aux=True)
    tx = optax.with_extra_args_support(tx)

    def accumulated(params, frozen, batch, key):
        if accumulation == 1:
            return gradient(params, frozen, batch, key)
        parts = jax.tree.map(lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), batch)

        def body(carry, part_and_index):
            part, index = part_and_index
            result = gradient(params, frozen, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, result), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, frozen, first, key)
        )
        return jax.lax.scan(body, zeros, (parts, jnp.arange(accumulation)))[0]

    whole = transform(accumulated)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, (mean, metrics) = whole(state.params, state.frozen, batch, key)
        scale = 1.0 / jnp.maximum(mean.weight, 1e-9)
        norm = optax.tree.norm(grads) * scale
        good = jnp.isfinite(mean.total) & jnp.isfinite(norm)

        def update(operands):  # grads are scaled in here, so that XLA fuses it with the optimizer's arithmetic
            grads, scale, norm, params, opt_state = operands
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
            updates, opt_state = tx.update(grads, opt_state, params, grad_norm=norm)
            return optax.apply_updates(params, updates), opt_state

        operands = (grads, scale, norm, state.params, state.opt_state)
        # On a GPU a branch copies all of the state in and out, and the host waits for `good`. Of moments in host memory
        # (optim.offload) only copies can be made.
        spaces = (str(getattr(jax.typeof(m), "memory_space", "")).lower() for m in jax.tree.leaves(state.opt_state))
        if platform() == "gpu" and not any("host" in space for space in spaces):
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old), update(operands), operands[-2:]
            )
        else:
            params, opt_state = jax.lax.cond(good, update, lambda operands: operands[-2:], operands)
        bad = 1 - good.astype(jnp.int32)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        divided = {k: v.value() if isinstance(v, Mean) else v for k, v in metrics.items()}
        return state, {
            **divided,
            "loss": mean.total * scale,
            "weight": mean.weight,
            "grad_norm": norm,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }

    return step


def make_multi_step(step: Callable) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """steps(state, batches [K, ...]) -> (state, metrics [K]): K steps inside one compiled call."""

    def steps(state: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(step, state, batches)

    return steps


def evaluate(loss: Loss, params: Any, batches: Iterable[Any]) -> tuple[Mean, Metrics]:
    """The sum of losses and of weights over all batches, on the host in float64: divide for the mean; and the same of
    each metric that is a `Mean`.

    Token-weighted: a short last batch counts for what it holds. `loss` should be jitted by the caller.
    """
    sums: dict[str, Mean] = {"": Mean(0.0, 0.0)}
    for batch in batches:
        mean, metrics = loss(params, batch, None)
        for name, part in {"": mean, **metrics}.items():
            if isinstance(part, Mean):
                before = sums.get(name, Mean(0.0, 0.0))
                sums[name] = Mean(before.total + float(part.total), before.weight + float(part.weight))
    return sums.pop(""), sums
