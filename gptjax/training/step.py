"""Builds training steps: pure functions of (state, batch), for any loss function and any pytree of parameters."""

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

# The type of a loss function loss(params, batch, key), which returns (Mean, metrics).
Loss = Callable[[Any, Any, Any], tuple[Mean, Metrics]]
# The type of a function gradient(params, frozen, batch, key) that returns the gradient of the loss's total, and (Mean,
# metrics).
Gradient = Callable[[Any, Any, Any, Any], tuple[Any, tuple[Mean, Metrics]]]


class TrainState(struct.PyTreeNode):
    """The training state, a pytree of arrays that can be saved, donated and sharded as a whole.

    A training step with a non-finite loss or gradient leaves `params` and `opt_state` unchanged, and increments
    `skipped` and `skipped_in_a_row`.

    Attributes:
        step: number of training steps so far.
        params: the trained params.
        opt_state: the optimizer state.
        key: random key for dropout, which never changes: training step n uses `jax.random.fold_in(key, n)`.
        frozen: params that the loss reads and the optimizer does not update.
        skipped: number of training steps with a non-finite loss or gradient so far.
        skipped_in_a_row: number of consecutive training steps with a non-finite loss or gradient up to the last step.
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
        """Creates the training state before the first training step.

        Args:
            params: the trained params, any pytree of arrays.
            tx: the optimizer, which initialises opt_state.
            key: random key for dropout; each step folds in its step number.
            frozen: params that the loss reads and the optimizer does not update.
        """
        return cls(
            step=jnp.int32(0), params=params, opt_state=tx.init(params), key=key, frozen=frozen,
            skipped=jnp.int32(0), skipped_in_a_row=jnp.int32(0),
        )  # fmt: skip


def init_state(
    init: Callable[[jax.Array, Any], Any], tx: optax.GradientTransformation, seed: int | jax.Array, start: Any
) -> TrainState:
    """Returns the initial training state of a run with the random seed `seed`.

    Args:
        init, start: the results of `Task.initial`.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    return TrainState.create(init(init_key, start), tx=tx, key=key)


def _checked(result: Any) -> tuple[Mean, Metrics]:
    """Checks that a loss function returned a pair (Mean, dict), and returns the pair.

    The check runs when the training step is traced.

    Raises:
        UserError: the loss function returned anything else.
    """
    pair = type(result) is tuple and len(result) == 2
    if pair and isinstance(result[0], Mean) and isinstance(result[1], dict):
        return result
    got = f"({', '.join(type(item).__name__ for item in result)})" if type(result) is tuple else type(result).__name__
    raise UserError(
        f"loss: expected (Mean(total, weight), metrics dict), got {got}; for a mean over n targets, "
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
    """Builds the training step for a loss function.

    The training step computes the gradient of the loss's total, divides the gradient once by the weight of the whole
    batch, and applies the optimizer `tx`. If the optimizer takes extra arguments, the training step passes the norm of
    the gradient to the optimizer as `grad_norm`.

    Args:
        loss: function (params, batch, key) that returns (Mean(total, weight), metrics). The step reports each
            metric that is a `Mean` as its total divided by its weight.
        tx: the optimizer.
        combine: function (trained, frozen) that returns the params that the loss reads, for example with LoRA applied.
        accumulation: number of micro-batches over which gradients are accumulated; it must divide the leading axis of
            every leaf of the batch. Up to rounding, the result of the step does not depend on the number of
            micro-batches, even if they differ in weight.
        transform: function that takes and returns a `Gradient`, such as `research.curvature.sam()`. It is applied to
            the function that computes the gradient of the whole batch.

    Returns:
        The training step, a function step(state, batch) that returns (state, metrics). The metrics are loss, weight,
        grad_norm, skipped, skipped_in_a_row, and those that the loss returns.
    """

    def total(params, frozen, batch, key):
        mean, metrics = _checked(loss(combine(params, frozen), batch, key))
        return mean.total, (mean, metrics)

    gradient = jax.grad(total, has_aux=True)
    tx = optax.with_extra_args_support(tx)

    def accumulated(params, frozen, batch, key):
        if accumulation == 1:
            return gradient(params, frozen, batch, key)
        micro_batches = jax.tree.map(lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), batch)

        def body(carry, batch_and_index):
            micro_batch, index = batch_and_index
            result = gradient(params, frozen, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, result), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, frozen, first, key)
        )
        return jax.lax.scan(body, zeros, (micro_batches, jnp.arange(accumulation)))[0]

    batch_gradient = transform(accumulated)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, (mean, metrics) = batch_gradient(state.params, state.frozen, batch, key)
        scale = 1.0 / jnp.maximum(mean.weight, 1e-9)
        norm = optax.tree.norm(grads) * scale
        finite = jnp.isfinite(mean.total) & jnp.isfinite(norm)

        def update(operands):
            # The gradients are scaled inside the function `update`, so that XLA fuses the scaling with the optimizer's
            # update.
            grads, scale, norm, params, opt_state = operands
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
            updates, opt_state = tx.update(grads, opt_state, params, grad_norm=norm)
            return optax.apply_updates(params, updates), opt_state

        operands = (grads, scale, norm, state.params, state.opt_state)
        # On a GPU, jnp.where selects the new or the old state, because lax.cond would copy the whole state and make the
        # host wait for `finite`. If the optimizer state is in the host memory of a GPU machine (optim.offload),
        # lax.cond selects the new or the old state, because arrays in host memory can only be copied, which rules out
        # jnp.where.
        spaces = (str(getattr(jax.typeof(m), "memory_space", "")).lower() for m in jax.tree.leaves(state.opt_state))
        if platform() == "gpu" and not any("host" in space for space in spaces):
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), update(operands), operands[-2:]
            )
        else:
            params, opt_state = jax.lax.cond(finite, update, lambda operands: operands[-2:], operands)
        skipped = 1 - finite.astype(jnp.int32)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
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
    """Returns a function steps(state, batches) that runs K training steps with one `jax.lax.scan`.

    The argument `batches` contains the batches of the K training steps, stacked along a leading axis. The function
    returns the state after the last training step, and the metrics of all steps as arrays [K].
    """

    def steps(state: TrainState, batches: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(step, state, batches)

    return steps


def evaluate(loss: Loss, params: Any, batches: Iterable[Any]) -> tuple[Mean, Metrics]:
    """Sums the totals and the weights of the loss, and of each metric that is a `Mean`, over all batches.

    The sums of the loss and the metrics are computed on the host in float64. The method `Mean.value` divides the summed
    total by the summed weight, which gives the weighted mean over the targets of all batches. In the weighted mean, a
    short last batch counts less than a full batch. The caller should jit the function `loss`.

    Returns:
        (loss, metrics): the `Mean` of the loss over all batches, and a dict with the `Mean` of each metric over all
        batches. Metrics that are not a `Mean` are left out.
    """
    sums: dict[str, Mean] = {"": Mean(0.0, 0.0)}
    for batch in batches:
        mean, metrics = loss(params, batch, None)
        for name, value in {"": mean, **metrics}.items():
            if isinstance(value, Mean):
                before = sums.get(name, Mean(0.0, 0.0))
                sums[name] = Mean(before.total + float(value.total), before.weight + float(value.weight))
    return sums.pop(""), sums
