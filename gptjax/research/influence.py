"""Training data influence: per-example gradients, their similarity (TracIn) and clipping, and gradient noise scale.

    features = gradient_features(loss, dims=1024)                compiled once, used with any params
    cosines  = similarity(features(params, test), features(params, train))       matrix [n_test, n_train]
    scores   = tracin(features, checkpoints, train, test, rates=[1e-3] * 3)      matrix [n_test, n_train]
    noise    = gradient_noise(loss, params, batch)               noise.scale: critical batch size, in examples

A loss is any function of (params, batch, key) that returns (Mean, metrics), where `gptjax.types.Mean` holds a weighted
sum and the sum of the weights. All leaves of a batch have shape [B, ..]; an example is one row of the batch.

By default, gradients are taken with respect to all parameters. To differentiate with respect to some parameters only,
pass these parameters as `params` and the remaining parameters as `frozen`, together with a function
`combine(params, frozen)` that returns the params of the whole model for the loss. To differentiate with respect to a
LoRA adapter, pass `combine=lambda adapter, base: lora.attach(base, adapter, cfg)`. To differentiate with respect to
parameters selected with `tree.split`, pass `combine=tree.join`.
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
from gptjax.training.task import identity

Combine = Callable[[Any, Any], Any]
# The type of the functions that `gradient_features` returns: a function of (params, examples, frozen=None) that returns
# an array [n, dims].
Features = Callable[..., np.ndarray]

_CHUNK_BYTES = 256 * 2**20  # The maximum size, in bytes, of the per-example gradients held in memory at the same time.


# ---------------------------------------------------------------- per-example gradients


def example_gradients(
    loss: Loss,
    params: Any,
    batch: Any,
    *,
    frozen: Any = None,
    combine: Combine = identity,
    key: jax.Array | None = None,
) -> Any:
    """Returns per-example gradients, a tree like `params` with leaves [B, ..].

    The gradient of an example is the gradient of the mean loss of one batch row. If all targets of a row have weight 0,
    the gradient of the row is 0. The dropout key of row i is `jax.random.fold_in(key, i)`.
    """

    def row_gradient(row: Any, i: jax.Array) -> Any:
        row_key = None if key is None else jax.random.fold_in(key, i)

        def value(params: Any) -> jax.Array:
            mean, _ = loss(combine(params, frozen), jax.tree.map(lambda leaf: leaf[None], row), row_key)
            return mean.total / jnp.maximum(mean.weight, 1e-9)

        return jax.grad(value)(params)

    return jax.vmap(row_gradient)(batch, jnp.arange(_rows(batch)))


def sketch(gradient: Any, dims: int, seed: int = 0) -> jax.Array:
    """Returns a count sketch (random projection) of a gradient tree, [dims] float32.

    The inner product of two gradients' count sketches is an unbiased estimate of the inner product of the two
    gradients. Every element of a gradient is added, with a random sign, to one random entry of the gradient's count
    sketch, so that no projection matrix is stored. The error of the inner product of two unit vectors, estimated from
    their count sketches, is about 1 / sqrt(dims). The count sketch is defined in arXiv:0902.2206, eq. 2; lemma 2 of the
    paper gives the error of the sketch.
    """
    out = jnp.zeros(dims)
    for path, leaf in tree.flatten(gradient).items():
        index_key, sign_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())))
        signed = leaf.astype(jnp.float32) * jax.random.rademacher(sign_key, leaf.shape, jnp.float32)
        out = out.at[jax.random.randint(index_key, leaf.shape, 0, dims).ravel()].add(signed.ravel())
    return out


def gradient_features(
    loss: Loss, *, combine: Combine = identity, dims: int | None = 1024, seed: int = 0, chunk: int | None = None
) -> Features:
    """Returns a function `features(params, examples, frozen=None)` that computes the gradient features of n examples.

    The features of an example are a count sketch of the example's gradient (`sketch`). The returned function `features`
    computes an array [n, dims] float32.

    Args:
        dims: size of the sketches. None: gradients are not sketched; the features of an example are its whole gradient
            with respect to all P parameters, flattened and concatenated in the tree's order, and the array is [n, P].
        seed: seed of the sketch's random signs and positions.
        chunk: number of examples per call of the compiled function. None: the largest number of examples whose
            gradients take at most 256 MiB, but at least 1.
    """

    @jax.jit
    def chunk_features(params: Any, frozen: Any, batch: Any) -> jax.Array:
        gradients = example_gradients(loss, params, batch, frozen=frozen, combine=combine)
        if dims is None:
            leaves = jax.tree.leaves(gradients)
            return jnp.concatenate([leaf.reshape(len(leaf), -1).astype(jnp.float32) for leaf in leaves], 1)
        return jax.vmap(lambda gradient: sketch(gradient, dims, seed))(gradients)

    def features(params: Any, examples: Any, frozen: Any = None) -> np.ndarray:
        size = chunk or max(1, _CHUNK_BYTES // (4 * tree.size(params)))
        return in_chunks(lambda batch: chunk_features(params, frozen, batch), examples, size)

    return features


def in_chunks(fn: Callable[[Any], Any], examples: Any, size: int) -> Any:
    """Applies the function `fn` to chunks of `size` rows of `examples`, and concatenates the outputs on the host.

    The last chunk is padded to `size` rows, so that `fn` is compiled only once. The outputs for the padding rows are
    removed.
    """
    n = _rows(examples)
    size, outputs = min(size, n), []
    for first in range(0, n, size):
        rows = np.minimum(np.arange(first, first + size), n - 1)
        output = jax.device_get(fn(jax.tree.map(lambda leaf, rows=rows: leaf[rows], examples)))
        outputs.append(jax.tree.map(lambda a, first=first: a[: n - first], output))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *outputs)


def _rows(examples: Any) -> int:
    sizes = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"examples: expected leaves [n, ..] with one n above 0, got n of {sorted(sizes)}")
    return sizes.pop()


# ---------------------------------------------------------------- influence


def similarity(a: np.ndarray, b: np.ndarray, *, cosine: bool = True) -> np.ndarray:
    """Returns the cosine similarity of each row of `a` to each row of `b`, as a matrix [n, m].

    The arrays `a` [n, K] and `b` [m, K] hold K features per row. If `cosine` is False, inner products are returned
    instead of cosine similarities. The cosine similarity with a row of zeros is 0.
    """
    return (unit(a) @ unit(b).T) if cosine else a @ b.T


def unit(features: np.ndarray) -> np.ndarray:
    """Divides each row of `features` by its L2 norm; a row of zeros stays zero."""
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
    """Returns the TracIn influence of each training example on each test example, [n_test, n_train] float32.

    The influence of a training example on a test example is the sum over checkpoints of learning rate * (inner product
    of the test example's gradient and the training example's gradient). To first order, a positive influence means that
    training on the training example lowered the loss of the test example.

    Args:
        features: function returned by `gradient_features`.
        checkpoints: params of each checkpoint, in any order; possibly a generator that loads one checkpoint at a time.
        rates: learning rate at each checkpoint.
        cosine: whether to replace the inner product by the cosine similarity, so that examples with large gradients do
            not dominate.

    Raises:
        UserError: the numbers of rates and checkpoints differ.
    Source: arXiv:2002.08484, TracInCP.
    """
    total: np.ndarray = np.zeros((), np.float32)
    n = 0
    for params, rate in zip(checkpoints, [*rates, None], strict=False):
        n += 1
        if rate is None:
            raise UserError(f"expected one rate for each checkpoint, got {len(rates)} rates for more checkpoints")
        test_features, train_features = features(params, test, frozen), features(params, train, frozen)
        total = total + np.float32(rate) * similarity(test_features, train_features, cosine=cosine)
    if n != len(rates) or not n:
        raise UserError(f"expected one rate for each checkpoint, got {len(rates)} rates for {n} checkpoints")
    return total


# ---------------------------------------------------------------- noise


class Noise(NamedTuple):
    """Gradient noise scale.

    Attributes:
        scale: trace / square_norm, the critical batch size in examples.
        trace: trace of the covariance of the per-example gradients.
        square_norm: estimated squared norm of the true gradient; negative estimates occur if a batch has too few
            examples.
    """

    scale: float
    trace: float
    square_norm: float


def noise_scale(small: float, big: float, *, n_small: int, n_big: int) -> Noise:
    """Estimates the gradient noise scale from mean squared gradient norms at two batch sizes.

    The attributes `trace` and `square_norm` of the result are unbiased estimates, but their quotient, the gradient
    noise scale, is biased. To estimate the gradient noise scale from several training steps, average `trace` and
    `square_norm` over the steps, then divide the averages.

    Args:
        small: squared norm of the mean gradient of n_small examples, averaged over batches of this size.
        big: squared norm of the mean gradient of n_big examples, averaged over batches of this size.

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
    """Estimates the gradient noise scale (`noise_scale`) from the per-example gradients of one batch.

    The noise scale is the batch size beyond which more examples per batch hardly improve a training step.
    """
    total, norms = jax.jit(
        lambda params, frozen, batch: clipped_sum(
            loss, params, batch, clip=math.inf, frozen=frozen, combine=combine, chunk=chunk
        )
    )(params, frozen, batch)
    n = len(norms)
    big = float(optax.tree.norm(total)) ** 2 / n**2
    return noise_scale(float(jnp.square(norms).mean()), big, n_small=1, n_big=n)


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
    """Clips the gradient of each row of a batch to a maximum L2 norm, and returns the sum of the clipped gradients.

    Args:
        clip: maximum L2 norm of a row's gradient.
        chunk: number of rows whose gradients are in memory at the same time; must divide B. None: all B rows.

    Returns:
        (sum over rows of gradient * min(1, clip / norm), norms [B] before clipping).

    Raises:
        UserError: `chunk` does not divide the number of rows B.
    Source: arXiv:1607.00133, algorithm 1.
    """
    n = _rows(batch)
    size = chunk or n
    if n % size:
        raise UserError(f"chunk ({size}) must divide the {n} rows of the batch")

    def add_chunk(total: Any, chunk_and_index: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        rows, index = chunk_and_index
        chunk_key = None if key is None else jax.random.fold_in(key, index)
        gradients = example_gradients(loss, params, rows, frozen=frozen, combine=combine, key=chunk_key)
        norms = jax.vmap(optax.tree.norm)(gradients)
        factor = jnp.minimum(1.0, clip / jnp.maximum(norms, 1e-12))

        def clipped(g: jax.Array) -> jax.Array:
            # The clipped gradients are computed in full float32, because rounding to TF32 or bfloat16 could make the
            # norm of a gradient exceed `clip` and void the guarantee of differential privacy.
            return jnp.einsum("b,b...->...", factor.astype(g.dtype), g, precision="highest")

        return jax.tree.map(lambda t, g: t + clipped(g), total, gradients), norms

    chunks = jax.tree.map(lambda leaf: leaf.reshape(n // size, size, *leaf.shape[1:]), batch)
    total, norms = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, params), (chunks, jnp.arange(n // size)))
    return total, norms.reshape(n)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
