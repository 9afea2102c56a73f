"""Trains with differential privacy (DP-SGD), and computes the privacy loss of training with a privacy accountant.

The function `private` wraps a loss so that `make_train_step` computes the clipped and noised gradients of DP-SGD.

    step  = make_train_step(private(loss, clip=1.0, noise=1.1, batch_size=64), tx, combine=pair)
    spent = epsilon(noise=1.1, rate=64 / 1045, steps=500, delta=1e-5)

The arguments for the loss, the frozen parameters and the function `combine` are described in
`gptjax.research.influence`. The gradients of DP-SGD are clipped by `gptjax.research.influence.clipped_sum`.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tree
from gptjax._moved import moved_name
from gptjax.errors import UserError
from gptjax.research.influence import Combine, clipped_sum, identity
from gptjax.training.step import Loss
from gptjax.types import Mean, Metrics

# _ORDERS lists the orders at which the Renyi privacy accountant computes the Renyi divergence. All orders of the Renyi
# divergence are integers, because the sums that the Renyi privacy accountant computes have finitely many terms for
# integer orders.
_ORDERS = (*range(2, 65), 96, 128, 256, 512)


def pair(trained: Any, frozen: Any) -> tuple[Any, Any]:
    """Returns the trained and the frozen parameters unchanged, as a pair.

    The function `pair` serves as the `combine` argument of a train step whose loss is wrapped by `private`.
    """
    return trained, frozen


def private(
    loss: Loss,
    *,
    clip: float,
    noise: float,
    batch_size: int,
    combine: Combine = identity,
    chunk: int | None = None,
    accumulation: int = 1,
) -> Loss:
    """Wraps a loss for DP-SGD: the returned loss has the value of the original loss, but a clipped and noised gradient.

    The gradients are clipped per example and summed over the batch. Gaussian noise is added to the sum of the clipped
    gradients, and the noisy sum is divided by `batch_size` (arXiv:1607.00133, algorithm 1).

    The params of the loss that `private` returns are the pair (trained, frozen), because gradients are computed and
    clipped only for the trained parameters. The loss that `private` returns is used in a train step as follows:

        step = make_train_step(private(loss, clip=1.0, noise=1.1, batch_size=64), tx, combine=pair)

    Args:
        clip: maximum L2 norm of an example's gradient.
        noise: noise multiplier, the standard deviation of the Gaussian noise in units of `clip`.
        batch_size: expected number of rows per batch. For batches drawn from n rows by `poisson_sample`, pass
            `rate * n`, although the number of rows drawn varies from batch to batch.
        accumulation: number of micro-batches per step, as in `make_train_step`. Each micro-batch adds
            1 / accumulation of the variance of a step's noise.

    Raises:
        UserError: `clip`, `batch_size` or `accumulation` is not positive, `noise` is negative, or the loss is called
            without a key.
    """
    if not (clip > 0 and noise >= 0 and batch_size > 0 and accumulation > 0):
        raise UserError(
            f"private: expected clip, batch_size and accumulation above 0 and noise of at least 0, got clip={clip}, "
            f"batch_size={batch_size}, accumulation={accumulation}, noise={noise}"
        )

    def value(trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        mean, metrics = loss(combine(trained, frozen), batch, jax.random.fold_in(key, 1))
        return mean.total / jnp.maximum(mean.weight, 1e-9) * (batch_size / accumulation), metrics

    @jax.custom_vjp
    def total(trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return value(trained, frozen, batch, key)

    def forward(trained: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[tuple[jax.Array, Metrics], Any]:
        loss_key, noise_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
        summed, _ = clipped_sum(
            loss, trained, batch, clip=clip, frozen=frozen, combine=combine, key=loss_key, chunk=chunk
        )
        std = noise * clip / math.sqrt(accumulation)

        def noised(path: str, g: jax.Array) -> jax.Array:
            draw = jax.random.normal(jax.random.fold_in(noise_key, zlib.crc32(path.encode())), g.shape, jnp.float32)
            return g + (std * draw).astype(g.dtype)

        return value(trained, frozen, batch, key), tree.map_paths(noised, summed)

    def backward(gradient: Any, cotangent: tuple[jax.Array, Any]) -> tuple:
        return jax.tree.map(lambda g: g * cotangent[0].astype(g.dtype), gradient), None, None, None

    total.defvjp(forward, backward)

    def private_loss(params: Any, batch: Any, key: jax.Array | None) -> tuple[Mean, Metrics]:
        if key is None:
            raise UserError(
                "a private loss needs a key for its noise: evaluate with the loss that was passed to private"
            )
        trained, frozen = params
        value, metrics = total(trained, frozen, batch, key)
        return Mean(value, jnp.float32(batch_size / accumulation)), metrics

    return private_loss


def poisson_sample(
    n: int, *, rate: float, step: int, seed: int, capacity: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a Poisson sample: each of n rows is drawn independently with probability `rate`.

    Args:
        capacity: number of rows in the result, including padding. None: the expected number of rows plus six standard
            deviations, at most n. If more rows than `capacity` are drawn, a random selection of them is kept.

    Returns:
        (indices of rows [capacity] int64, mask [capacity] float32). The mask is 1 for rows drawn and 0 for padding.
        Multiply the weights of the batch by the mask.
    """
    mean = n * rate
    capacity = capacity or min(n, math.ceil(mean + 6 * math.sqrt(max(mean * (1 - rate), 1))))
    rng = np.random.default_rng((seed, step))
    chosen = rng.permutation(np.flatnonzero(rng.random(n) < rate))[:capacity]
    rows = np.zeros(capacity, np.int64)
    rows[: len(chosen)] = chosen
    return rows, (np.arange(capacity) < len(chosen)).astype(np.float32)


def epsilon(*, noise: float, rate: float, steps: int, delta: float) -> float:
    """Returns the privacy loss epsilon of training with DP-SGD for `steps` steps.

    Epsilon bounds how much adding or removing one training row can change the distribution of the trained model. The
    privacy accountant assumes that the loss is wrapped by `private`, and that batches are drawn by `poisson_sample`.
    Epsilon is computed from privacy loss distributions (arXiv:2106.02848) with Google's package dp-accounting.

    Raises:
        UserError: the package dp-accounting is not installed.
    """
    accountant = _accounting().pld.PLDAccountant()
    return float(accountant.compose(_event(noise, rate, steps)).get_epsilon(delta))


def noise_for(epsilon: float, *, rate: float, steps: int, delta: float) -> float:
    """Returns the smallest noise multiplier for which training with DP-SGD is (epsilon, delta)-differentially private.

    The privacy accountant assumes that training takes `steps` steps, that the loss is wrapped by `private`, and that
    batches are drawn by `poisson_sample`. The noise multiplier is accurate to 0.001.

    The noise multiplier is computed with a Renyi privacy accountant (arXiv:1908.10530), which is faster than the
    accountant of the function `epsilon` and slightly more conservative.
    """
    accounting = _accounting()
    return float(
        accounting.calibrate_dp_mechanism(
            lambda: accounting.rdp.RdpAccountant(_ORDERS), lambda noise: _event(noise, rate, steps), epsilon, delta,
            bracket_interval=accounting.LowerEndpointAndGuess(0.1, 1.0), tol=1e-3,
        )
    )  # fmt: skip


def _event(noise: float, rate: float, steps: int) -> Any:
    if not (noise > 0 and 0 < rate <= 1 and steps > 0):
        raise UserError(f"expected noise and steps above 0 and 0 < rate <= 1, got {noise}, {steps} and {rate}")
    accounting = _accounting()
    step_event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
    return accounting.SelfComposedDpEvent(step_event, steps)


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise UserError("the accountant needs dp-accounting: pip install -e '.[privacy]' in the checkout") from error
    return dp_accounting


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
