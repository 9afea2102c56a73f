"""Which examples a model was made by: gradients of single examples, compared, measured, clipped.

features = gradient_features(loss, dims=1024)                compiled once, used with any params
near     = similarity(features(params, asked), features(params, rows))       [asked, rows]
scores   = tracin(features, checkpoints, rows, asked, rates=[1e-3] * 3)      [asked, rows]
noise    = gradient_noise(loss, params, batch)               noise.scale: examples a batch that still pays

A loss is any (params, batch, key) -> (Mean, metrics). `params` are what is differentiated; with a part of a model or an
adapter, `frozen` holds the rest and `combine(params, frozen)` makes of both what the loss reads: `tree.join`, or
`lambda adapter, base: lora.attach(base, adapter, cfg)`. An example is one row of the batch: every leaf is [B, ..].
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax import tree
from gptjax._moved import moved_name
from gptjax.errors import UserError
from gptjax.training.step import Loss
from gptjax.training.task import just_trained as identity  # the `combine` where nothing is frozen

Combine = Callable[[Any, Any], Any]
Features = Callable[..., np.ndarray]  # (params, examples, frozen=None) -> [n, dims] float32

_CHUNK_BYTES = 256 * 2**20  # of gradients alive at once


# ---------------------------------------------------------------- gradients of single examples


def example_gradients(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    frozen: Any = None,
    combine: Combine = identity,
    key: jax.Array | None = None,
) -> Any:
    """The gradient of each row's own loss, divided by the row's own weight: the tree of `params`, leaves [B, ..].

    A row of weight 0 has gradient 0. Row i gets the i-th of the key's folds.
    """

    def one(row: Any, i: jax.Array) -> Any:
        own = None if key is None else jax.random.fold_in(key, i)

        def value(params: Any) -> jax.Array:
            mean, _ = loss(combine(params, frozen), jax.tree.map(lambda leaf: leaf[None], row), own)
            return mean.total / jnp.maximum(mean.weight, 1e-9)

        return jax.grad(value)(params)

    return jax.vmap(one)(batch, jnp.arange(_rows(batch)))


def sketch(gradient: Any, dims: int, seed: int = 0) -> jax.Array:
    """A tree as [dims] float32 numbers whose inner products are those of the trees, on average over seeds.

    Every number goes to a random place with a random sign (count sketch); no matrix is held. The error of a product
    of unit vectors is about 1 / sqrt(dims).
    Source: arXiv:0902.2206, eq. 2 and lemma 2.
    """
    out = jnp.zeros(dims)
    for path, leaf in tree.flatten(gradient).items():
        place, sign = jax.random.split(jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())))
        signed = leaf.astype(jnp.float32) * jax.random.rademacher(sign, leaf.shape, jnp.float32)
        out = out.at[jax.random.randint(place, leaf.shape, 0, dims).ravel()].add(signed.ravel())
    return out


def gradient_features(
    loss: Loss, *, combine: Combine = identity, dims: int | None = 1024, seed: int = 0, chunk: int | None = None
) -> Features:
    """features(params, examples, frozen=None) -> [n, dims] float32: `example_gradients`, each as a `sketch`.

    Args:
        dims: None: the whole gradients, side by side in the tree's order, [n, P].
        chunk: examples at a time; None: as many as 256 MiB of gradients hold.
    """

    @jax.jit
    def some(params: Any, frozen: Any, batch: Any) -> jax.Array:
        found = example_gradients(loss, params, batch, frozen=frozen, combine=combine)
        if dims is None:
            leaves = jax.tree.leaves(found)
            return jnp.concatenate([leaf.reshape(len(leaf), -1).astype(jnp.float32) for leaf in leaves], 1)
        return jax.vmap(lambda gradient: sketch(gradient, dims, seed))(found)

    def features(params: Any, examples: Any, frozen: Any = None) -> np.ndarray:
        size = chunk or max(1, _CHUNK_BYTES // (4 * tree.size(params)))
        return in_chunks(lambda batch: some(params, frozen, batch), examples, size)

    return features


def in_chunks(fn: Callable[[Any], Any], examples: Any, size: int) -> Any:
    """`fn` over chunks of `size` rows, its arrays put together on the host; the last chunk is filled up and cut, so
    that one program serves all."""
    n = _rows(examples)
    size, parts = min(size, n), []
    for first in range(0, n, size):
        rows = np.minimum(np.arange(first, first + size), n - 1)
        part = jax.device_get(fn(jax.tree.map(lambda leaf, rows=rows: leaf[rows], examples)))
        parts.append(jax.tree.map(lambda a, first=first: a[: n - first], part))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _rows(examples: Any) -> int:
    sizes = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"examples: expected leaves [n, ..] with one n above 0, got n of {sorted(sizes)}")
    return sizes.pop()


# ---------------------------------------------------------------- influence


def similarity(a: np.ndarray, b: np.ndarray, *, cosine: bool = True) -> np.ndarray:
    """[n, K] and [m, K] -> [n, m]: cosines, 0 for a row of zeros; or plain inner products."""
    return (unit(a) @ unit(b).T) if cosine else a @ b.T


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of zeros stay."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def tracin(
    features: Features,
    checkpoints: Iterable[Any],
    train: Any,
    test: Any,
    *,
    rates: Sequence[float],
    frozen: Any = None,
    cosine: bool = False,
) -> np.ndarray:
    """[tests, trains] float32: how much steps on each training example lowered each test example's loss.

    The sum over checkpoints of rate * <gradient of test, gradient of train>: positive for helpers.

    Args:
        checkpoints: params of each, in any order; they may be read one after the other. rates: learning rate of each.
        cosine: of the gradients' directions only, which examples of large loss do not dominate.

    Raises:
        UserError: not as many rates as checkpoints.
    Source: arXiv:2002.08484, TracInCP.
    """
    total: np.ndarray = np.zeros((), np.float32)
    n = 0
    for params, rate in zip(checkpoints, [*rates, None], strict=False):
        n += 1
        if rate is None:
            raise UserError(f"expected one rate for each checkpoint, got {len(rates)} for more than that")
        pair = features(params, test, frozen), features(params, train, frozen)
        total = total + np.float32(rate) * similarity(*pair, cosine=cosine)
    if n != len(rates) or not n:
        raise UserError(f"expected one rate for each checkpoint, got {len(rates)} for {n}")
    return total


# ---------------------------------------------------------------- noise


class Noise(NamedTuple):
    """scale = trace / square_norm, in examples; trace of the covariance of one example's gradient; |true gradient|^2.

    Where `square_norm` comes out negative the batch is too small to see the gradient: take more examples.
    """

    scale: float
    trace: float
    square_norm: float


def noise_scale(small: float, big: float, *, n_small: int, n_big: int) -> Noise:
    """Of the mean squared length of gradients over n_small examples, and over n_big.

    Both parts are unbiased, their quotient is not: average `trace` and `square_norm` over steps, then divide.
    Source: arXiv:1812.06162, eq. A.2 and A.3.
    """
    if not 0 < n_small < n_big:
        raise UserError(f"expected 0 < n_small < n_big, got {n_small} and {n_big}")
    square_norm = (n_big * big - n_small * small) / (n_big - n_small)
    trace = (small - big) / (1 / n_small - 1 / n_big)
    return Noise(trace / square_norm if square_norm else math.inf, trace, square_norm)


def gradient_noise(
    loss: Loss, params: Any, batch: Any, *, frozen: Any = None, combine: Combine = identity, chunk: int | None = None
) -> Noise:
    """`noise_scale` of single examples against the whole batch: the batch size up to which more examples pay."""
    total, lengths = jax.jit(
        lambda params, frozen, batch: clipped_sum(
            loss, params, batch, clip=math.inf, frozen=frozen, combine=combine, chunk=chunk
        )
    )(params, frozen, batch)
    n = len(lengths)
    whole = float(optax.tree.norm(total)) ** 2 / n**2
    return noise_scale(float(jnp.square(lengths).mean()), whole, n_small=1, n_big=n)


# ---------------------------------------------------------------- clipping


def clipped_sum(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    clip: float,
    frozen: Any = None,
    combine: Combine = identity,
    key: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[Any, jax.Array]:
    """(sum over rows of gradient * min(1, clip / length), lengths before that [B]).

    Args:
        chunk: rows whose gradients are alive at once; it divides B. None: all.
    Source: arXiv:1607.00133, algorithm 1.
    """
    n = _rows(batch)
    size = chunk or n
    if n % size:
        raise UserError(f"chunk ({size}) must divide the {n} rows of the batch")

    def some(total: Any, part_and_index: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        part, index = part_and_index
        own = None if key is None else jax.random.fold_in(key, index)
        found = example_gradients(loss, params, part, frozen=frozen, combine=combine, key=own)
        lengths = jax.vmap(optax.tree.norm)(found)
        share = jnp.minimum(1.0, clip / jnp.maximum(lengths, 1e-12))

        def clipped(g: jax.Array) -> jax.Array:
            # not in TF32 or bfloat16: a rounded row could be longer than `clip`, the privacy less than promised
            return jnp.einsum("b,b...->...", share.astype(g.dtype), g, precision="highest")

        return jax.tree.map(lambda t, g: t + clipped(g), total, found), lengths

    parts = jax.tree.map(lambda leaf: leaf.reshape(n // size, size, *leaf.shape[1:]), batch)
    total, lengths = jax.lax.scan(some, jax.tree.map(jnp.zeros_like, params), (parts, jnp.arange(n // size)))
    return total, lengths.reshape(n)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
