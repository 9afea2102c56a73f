"""Trains many LoRA adapters of one base model in one vmapped program.

Each adapter has its own learning rate, scale, rank and seed.

    many   = Many.of(rates=[1, 3, 10], scales=[2, 2, 1], ranks=[8, 8, 4], seeds=[0, 1, 2])
    states = create(params, many, cfg, tx)                  a TrainState whose leaves have a leading axis of 3
    step   = jax.jit(make_many_step(loss, tx, cfg))
    states, metrics = step(states, many, params, batch)     all adapters share one copy of the base model
    second = jax.tree.map(lambda leaf: leaf[1], states.params)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax import lora
from gptjax.config import LoraConfig
from gptjax.errors import UserError
from gptjax.training import vmapped
from gptjax.training.step import Loss, TrainState
from gptjax.training.task import StepFunctions
from gptjax.types import Metrics, Params


class Many(NamedTuple):
    """Hyperparameters of N LoRA adapters, as arrays of shape [N].

    Attributes:
        rates: multipliers of the optimizer's updates, and thus of its learning rate and weight decay.
        scales: multipliers of the low-rank product a b, as `LoraConfig.scale`.
        ranks: ranks of the adapters, at most lora.rank. Columns of a and rows of b beyond an adapter's rank stay zero.
        seeds: random seeds of initialisation and dropout.
    """

    rates: jax.Array
    scales: jax.Array
    ranks: jax.Array
    seeds: jax.Array

    @classmethod
    def of(cls, *, rates: Sequence[float], scales: Sequence[float], ranks: Sequence[int], seeds: Sequence[int]) -> Many:
        """Creates the arrays of hyperparameters from sequences with one element per adapter.

        Raises:
            UserError: the lengths of the sequences differ.
        """
        if len({len(rates), len(scales), len(ranks), len(seeds)}) != 1:
            raise UserError(
                f"expected as many rates as scales, ranks and seeds; got {len(rates)}, {len(scales)}, {len(ranks)} "
                f"and {len(seeds)}"
            )
        return cls(jnp.float32(rates), jnp.float32(scales), jnp.int32(ranks), jnp.uint32(seeds))


def create(params: Params, many: Many, cfg: LoraConfig, tx: optax.GradientTransformation) -> TrainState:
    """Returns the train states of N newly initialised LoRA adapters, with leaves [N, ..].

    Args:
        params: params of the base model, or only their shapes.

    Raises:
        UserError: the rank of an adapter is larger than lora.rank.
    """
    if most := [rank for rank in many.ranks.tolist() if rank > cfg.rank]:
        raise UserError(f"ranks {most} are larger than lora.rank ({cfg.rank}), the rank of the arrays of all adapters")

    def init(key: jax.Array, rank: jax.Array) -> Params:
        return lora.truncate_rank(lora.init(key, params, cfg), rank)

    return vmapped.create(init, lambda hparams: _rated(tx, hparams.rates), many.seeds, many, many.ranks)


def make_many_step(
    loss: Loss, tx: optax.GradientTransformation, cfg: LoraConfig, *, batches: bool = False
) -> Callable[[TrainState, Many, Params, Any], tuple[TrainState, Metrics]]:
    """Returns the training step of `make_train_step`, vmapped over N LoRA adapters.

    The training step is a function `step(states, many, params, batch)` that returns the new states and the metrics.
    Each metric is an array [N] with one value per adapter. The argument `params` of the training step holds the params
    of the base model, which all adapters share.

    Args:
        batches: whether every leaf of the batch has a leading axis N, with one batch per adapter. False: all adapters
            share one batch.
    """

    def build(hparams: Many) -> StepFunctions:
        def combine(adapter: Params, frozen: Params) -> Params:
            return lora.attach(frozen, adapter, cfg, scales=hparams.scales)

        return StepFunctions(lora.with_dropout(loss), combine, _rated(tx, hparams.rates))

    return vmapped.make_step(build, batches=batches)


def _rated(tx: optax.GradientTransformation, rate: jax.Array) -> optax.GradientTransformation:
    return optax.chain(tx, optax.scale(rate))
