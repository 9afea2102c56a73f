"""Trains N runs in one compiled program.

To train N runs in one program, the training step of `make_train_step`, the loss and the initial state are vmapped over
the runs:

    states = create(init, lambda hparams: build(hparams).optimizer, seeds, hparams)     a TrainState of leaves [N, ..]
    step   = jax.jit(make_step(build))
    states, metrics = step(states, hparams, frozen, batch)     `frozen` is shared by all runs, not copied

The argument `hparams` is a pytree of leaves [N, ..] that contains the traced hyperparameters of each run. The function
`build` maps the hyperparameters of one run to the run's `StepFunctions`.

The vmapped training step can be built with the function `make_step` or with the function `as_one`. The results of
`make_step` and `as_one` differ in rounding.

The function `make_step` trains N independent runs, each with its own step counter, random key and number of skipped
steps. Sweeps and the training of many adapters use `make_step`.

The function `as_one` makes N runs look like one run to the training loop, with one step counter and one checkpoint.
Fine-tuning with several seeds uses `as_one`. The loss function of `as_one` returns the sum of the mean losses of the
runs, with weight N. The training step divides the gradients by the weight of the loss of `as_one`, N, and the optimizer
of `as_one` multiplies the gradients by N again. With `as_one`, the dropout keys of all runs are split from one key.
With `as_one`, all runs skip a training step in which the loss or gradient of one run is not finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.training.step import TrainState, init_state, make_train_step
from gptjax.training.task import StepFunctions
from gptjax.types import Mean, Metrics


def make_step(
    build: Callable[[Any], StepFunctions], *, batches: bool = False, accumulation: int = 1
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Metrics]]:
    """Returns the training step of `make_train_step`, vmapped over N runs.

    The training step is a function step(states, hparams, frozen, batch) that returns the new states, and metrics with
    leaves [N].

    Args:
        batches: if True, every leaf of the batch has a leading axis N, with one batch per run; if False, all runs share
            one batch.
        accumulation: number of micro-batches, as in `make_train_step`.
    """

    def step_of_run(state: TrainState, hparams: Any, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        loss, combine, tx = build(hparams)
        step = make_train_step(loss, tx, combine=combine, accumulation=accumulation)
        state, metrics = step(state.replace(frozen=frozen), batch)
        return state.replace(frozen=None), metrics

    return jax.vmap(step_of_run, in_axes=(0, 0, None, 0 if batches else None))


def make_loss(build: Callable[[Any], StepFunctions], *, batches: bool = False) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the loss function that `build` returns, vmapped over N runs.

    The vmapped loss is a function loss(params, hparams, frozen, batch, keys=None) that returns (Mean, metrics) with
    leaves [N]. The argument `params` contains the trained params of the N runs. The argument `keys` [N] contains the
    random keys for dropout, or is None for no dropout. The arguments `hparams`, `frozen` and `batch` are described in
    `make_step`.
    """

    def loss_of_run(params: Any, hparams: Any, frozen: Any, batch: Any, key: jax.Array | None) -> tuple[Mean, Metrics]:
        loss, combine, _ = build(hparams)
        return loss(combine(params, frozen), batch, key)

    losses = jax.vmap(loss_of_run, in_axes=(0, 0, None, 0 if batches else None, 0))
    return lambda params, hparams, frozen, batch, keys=None: losses(params, hparams, frozen, batch, keys)


def create(
    init: Callable[[jax.Array, Any], Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    seeds: jax.Array,
    hparams: Any = None,
    start: Any = None,
) -> TrainState:
    """Returns the training states of N runs before the first step, with leaves [N, ..].

    Args:
        init: function (key, start) that returns the initial trained params of one run. `Task.initial` returns such a
            function.
        optimizer: function that maps the hparams of one run to the optimizer of this run.
        seeds: random seeds of the runs, [N].
        hparams, start: arguments of `optimizer` and `init` for all runs, pytrees with leaves [N, ..], or None.
    """
    init_run = jax.vmap(lambda seed, hparams, start: init_state(init, optimizer(hparams), seed, start))
    return init_run(seeds, hparams, start)


def as_one(functions: StepFunctions, n: int) -> StepFunctions:
    """Returns the `StepFunctions` of one run that trains n models.

    Every leaf of the trained params and of the batches has a leading axis of size n. The frozen params have no leading
    axis of size n, because all models share the frozen params.
    """
    losses = make_loss(lambda _: functions, batches=True)
    tx = optax.with_extra_args_support(functions.optimizer)

    def loss(params: tuple[Any, Any], batch: Any, key: jax.Array | None) -> tuple[Mean, Metrics]:
        trained, frozen = params
        mean, metrics = losses(trained, None, frozen, batch, None if key is None else jax.random.split(key, n))
        metrics = {k: Mean(v.total.sum(), v.weight.sum()) for k, v in metrics.items() if isinstance(v, Mean)}
        # During validation, `key` is None. The total of one validation batch must not be divided by its weight in
        # `loss`, because the caller sums the totals and the weights over all batches and divides the summed total by
        # the summed weight.
        if key is None:
            return Mean(mean.total.sum(), mean.weight.sum()), metrics
        return Mean((mean.total / jnp.maximum(mean.weight, 1e-9)).sum(), jnp.float32(n)), metrics

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        """Updates each run separately, so that the gradients of a run are clipped by the norm of its own gradients.

        The gradients are first multiplied by n, because the training step has divided the gradients by the loss's
        weight, which is n.
        """
        undivided = jax.tree.map(lambda g: g * n, grads)
        return jax.vmap(lambda g, s, p: tx.update(g, s, p))(undivided, state, params)

    optimizer = optax.GradientTransformation(jax.vmap(tx.init), update)
    return StepFunctions(loss, lambda trained, frozen: (trained, frozen), optimizer)


def stack(batches: Sequence[Any], axis: int = 0) -> Any:
    """Stacks the batches of N runs along a new axis.

    A leaf whose size differs between the batches is padded with zeros to the largest size. In the batches of all tasks,
    zeros stand for padding.
    """

    def padded(*leaves: np.ndarray) -> np.ndarray:
        out = np.zeros((len(leaves), *np.max([leaf.shape for leaf in leaves], 0)), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            out[i][tuple(map(slice, leaf.shape))] = leaf
        return np.moveaxis(out, 0, axis)

    return jax.tree.map(padded, *batches)


def zip_batches(batches_of_runs: Sequence[Iterable[Any]]) -> Iterator[Any]:
    """Iterates over the batches of N runs in parallel, and yields stacked batches with leaves [N, ..].

    If a run has fewer batches than other runs, batches of zeros, which stand for padding, replace the missing batches.
    """
    for group in itertools.zip_longest(*batches_of_runs):
        blank = jax.tree.map(np.zeros_like, next(batch for batch in group if batch is not None))
        yield stack([blank if batch is None else batch for batch in group])
