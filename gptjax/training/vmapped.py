"""N runs in one compiled program: `make_train_step`, its loss and its initial state, vmapped over runs.

states = create(init, lambda own: rules(own).optimizer, seeds, own)     a TrainState of leaves [N, ..]
step   = jax.jit(make_step(rules))
states, metrics = step(states, own, frozen, batch)     `frozen` is read by all runs and copied by none

`own` is a pytree of leaves [N, ..]: hyperparameters of each run, which are traced. rules: own of one run -> `Rules`.

There are two forms, which differ in rounding:

make_step   N independent runs, each with its own step counter, key and skipped steps: sweeps, and many adapters.
as_one      N runs as one run of the loop, with one step counter and one checkpoint: the seeds of a fine-tuning. The
            loss is the sum of the runs' means, so the step divides gradients by N and the optimizer multiplies them
            again; dropout keys are split from one key; a step that is not finite for one run is skipped by all.
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
from gptjax.training.task import Rules
from gptjax.types import Mean, Metrics


def make_step(
    rules: Callable[[Any], Rules], *, batches: bool = False, accumulation: int = 1
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Metrics]]:
    """step(states, own, frozen, batch) -> (states, metrics [N]): what N steps of `make_train_step` do.

    Args:
        batches: every leaf of the batch has a leading axis N, a batch for each run; otherwise all runs see the same.
        accumulation: as of `make_train_step`.
    """

    def one(state: TrainState, own: Any, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        loss, combine, tx = rules(own)
        step = make_train_step(loss, tx, combine=combine, accumulation=accumulation)
        state, metrics = step(state.replace(frozen=frozen), batch)
        return state.replace(frozen=None), metrics

    return jax.vmap(one, in_axes=(0, 0, None, 0 if batches else None))


def make_loss(rules: Callable[[Any], Rules], *, batches: bool = False) -> Callable[..., tuple[Mean, Metrics]]:
    """(params, own, frozen, batch, keys=None) -> each run's loss [N] and metrics [N]; arguments as of `make_step`.

    keys: [N], of dropout; None: without dropout.
    """

    def one(params: Any, own: Any, frozen: Any, batch: Any, key: jax.Array | None) -> tuple[Mean, Metrics]:
        loss, combine, _ = rules(own)
        return loss(combine(params, frozen), batch, key)

    each = jax.vmap(one, in_axes=(0, 0, None, 0 if batches else None, 0))
    return lambda params, own, frozen, batch, keys=None: each(params, own, frozen, batch, keys)


def create(
    init: Callable[[jax.Array, Any], Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    seeds: jax.Array,
    own: Any = None,
    start: Any = None,
) -> TrainState:
    """The states before the first step, leaves [N, ..]: of each seed the `init_state` that the loop starts from.

    Args:
        init: (key, start of one run) -> what it trains, as of `Task.initial`. optimizer: own of one run -> its
            optimizer. seeds: [N]. own, start: leaves [N, ..], or None.
    """
    return jax.vmap(lambda seed, own, start: init_state(init, optimizer(own), seed, start))(seeds, own, start)


def as_one(rules: Rules, n: int) -> Rules:
    """The rules of one run that trains n: trained leaves and batches have a leading axis n, `frozen` has none."""
    losses = make_loss(lambda own: rules, batches=True)
    tx = optax.with_extra_args_support(rules.optimizer)

    def loss(both: tuple[Any, Any], batch: Any, key: jax.Array | None) -> tuple[Mean, Metrics]:
        trained, frozen = both
        mean, metrics = losses(trained, None, frozen, batch, None if key is None else jax.random.split(key, n))
        metrics = {k: Mean(v.total.sum(), v.weight.sum()) for k, v in metrics.items() if isinstance(v, Mean)}
        if key is None:  # validation: sums over batches come first
            return Mean(mean.total.sum(), mean.weight.sum()), metrics
        return Mean((mean.total / jnp.maximum(mean.weight, 1e-9)).sum(), jnp.float32(n)), metrics

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        """Of each run by itself, its clipping by norm included; the gradients come divided by n."""
        whole = jax.tree.map(lambda g: g * n, grads)
        return jax.vmap(lambda g, s, p: tx.update(g, s, p))(whole, state, params)

    optimizer = optax.GradientTransformation(jax.vmap(tx.init), update)
    return Rules(loss, lambda trained, frozen: (trained, frozen), optimizer)


def stack(batches: Sequence[Any], axis: int = 0) -> Any:
    """The batches of N runs as one, with an axis N. Smaller leaves are padded with zeros, which are padding in every
    kind of batch."""

    def padded(*leaves: np.ndarray) -> np.ndarray:
        out = np.zeros((len(leaves), *np.max([leaf.shape for leaf in leaves], 0)), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            out[i][tuple(map(slice, leaf.shape))] = leaf
        return np.moveaxis(out, 0, axis)

    return jax.tree.map(padded, *batches)


def zip_batches(several: Sequence[Iterable[Any]]) -> Iterator[Any]:
    """The i-th batches of N runs as one, [N, ..] each; a run with fewer batches than another ends in empty ones."""
    for group in itertools.zip_longest(*several):
        blank = jax.tree.map(np.zeros_like, next(batch for batch in group if batch is not None))
        yield stack([blank if batch is None else batch for batch in group])
