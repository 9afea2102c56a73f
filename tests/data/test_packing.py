"""Packing of whole examples into rows, each example shifted separately; batches as a function of (seed, step)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.data import Loader, TokenStore, packing
from gptjax.data.packing import Encoded, batch, eval_batches, packed, padded
from gptjax.errors import UserError


def examples(*lengths, seed=0, vocab=17):
    """Examples of random ids and weights; `lengths` are numbers of ids."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, vocab, n).astype(np.int32) for n in lengths]
    weights = [rng.integers(0, 2, n).astype(np.float32) for n in lengths]
    for weight in weights:
        weight[-1] = 1
    return Encoded(rows, weights, 0)


def random_examples(n=200, longest=40, seed=0):
    return examples(*np.random.default_rng(seed).integers(2, longest + 2, n), seed=seed)


def segments_of(rows):
    """(inputs, targets, weights) of each segment, as a multiset. Segments must be contiguous."""
    counts = Counter()
    for tokens, targets, weights, segments in zip(*rows, strict=True):
        for k in range(1, segments.max() + 1):
            mask = segments == k
            assert mask.any() and np.diff(np.flatnonzero(mask)).max(initial=1) == 1
            counts[tuple(tokens[mask]), tuple(targets[mask]), tuple(weights[mask])] += 1
    return counts


def expected_segments(encoded):
    """(inputs, targets, weights) of each example, as a multiset."""
    examples = zip(encoded.rows, encoded.weights, strict=True)
    return Counter((tuple(ids[:-1]), tuple(ids[1:]), tuple(weights[1:])) for ids, weights in examples)


def rows_equal(a, b):
    return all(x is y is None or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


def test_a_small_example():
    encoded = Encoded([np.array([6, 7, 9]), np.array([1, 2, 3, 4, 9])], [np.ones(3), np.array([1, 0, 0, 1, 1])], 0)
    rows = packed(encoded, 8)
    assert rows.tokens.tolist() == [[1, 2, 3, 4, 6, 7, 0, 0]]
    assert rows.targets.tolist() == [[2, 3, 4, 9, 7, 9, 0, 0]]
    assert rows.weights.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 0, 0]]
    assert padded(encoded).tokens.tolist() == [[6, 7, 0, 0], [1, 2, 3, 4]]
    assert padded(encoded, 5).segment_ids.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize("make", [lambda e: packed(e, 41), lambda e: packed(e, 100), padded, lambda e: padded(e, 64)])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_occurs_whole_and_once(make, seed):
    encoded = random_examples(seed=seed)
    rows = make(encoded)
    assert segments_of(rows) == expected_segments(encoded)
    padding = rows.segment_ids == 0
    assert not any(leaf[padding].any() for leaf in rows)
    assert [leaf.dtype for leaf in rows] == [np.int32, np.int32, np.float32, np.int32]
    assert rows_equal(rows, make(encoded))


def first_fit_decreasing(lengths, context_length):
    """A simple reference implementation: (row of each example, number of tokens in each row)."""
    rows, places = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = next((k for k, used in enumerate(rows) if used + lengths[i] <= context_length), len(rows))
        rows += [0] * (k == len(rows))
        places[i] = k
        rows[k] += lengths[i]
    return places, rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("context_length", [40, 47, 100])
def test_packing_is_first_fit_decreasing(seed, context_length):
    encoded = random_examples(seed=seed)
    places, used = first_fit_decreasing([len(row) - 1 for row in encoded.rows], context_length)
    rows = packed(encoded, context_length)
    assert (rows.segment_ids > 0).sum(1).tolist() == used
    for k in range(len(used)):
        inputs = [encoded.rows[i][:-1] for i in sorted(places, key=lambda i: -len(encoded.rows[i])) if places[i] == k]
        assert rows.tokens[k][: used[k]].tolist() == np.concatenate(inputs).tolist()


def test_rows_are_nearly_full():
    rows = packed(random_examples(2000), 256)
    assert (rows.segment_ids > 0).mean() > 0.98


def test_invalid_examples():
    for make in (packed, padded):
        with pytest.raises(UserError, match="example 2 needs 9 places and a row has 8: encode with the same"):
            make(examples(4, 10), 8)
    with pytest.raises(UserError, match="example 1 has fewer than 2 tokens"):
        packed(examples(1, 10), 20)
    with pytest.raises(UserError, match="no examples"):
        padded(Encoded([], [], 3))


# --- batches


def numbered(n, length=3):
    rows = packing.empty(n, length)
    rows.tokens[:] = np.arange(n)[:, None]
    rows.weights[:] = 1
    rows.segment_ids[:] = 1
    return rows


@pytest.mark.parametrize("n", [1, 3, 10, 23])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_every_row_once_per_epoch_in_a_new_order(n, batch_size):
    rows = numbered(n)
    stream = np.concatenate([batch(rows, s, batch_size=batch_size, seed=3).tokens[:, 0] for s in range(3 * n)])
    epochs = stream[: 3 * n * batch_size // n * n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    assert n < 10 or len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_a_batch_is_a_function_of_seed_and_step():
    rows = packed(random_examples(), 64)
    first = [batch(rows, step, batch_size=5, seed=1) for step in range(20)]
    assert all(rows_equal(batch(rows, step, batch_size=5, seed=1), first[step]) for step in reversed(range(20)))
    assert not rows_equal(batch(rows, 0, batch_size=5, seed=2), first[0])
    assert first[0].tokens.shape == (5, 64) and first[0].positions is None
    assert rows_equal(batch(rows, 10**9, batch_size=5, seed=-1), batch(rows, 10**9, batch_size=5, seed=-1))


def test_the_order_equals_that_of_the_loader():
    n, t = 23, 4
    store = TokenStore.from_ids(np.arange(n * t + 1))
    loader = Loader(store, DataConfig(stride=t), batch_size=1, context_length=t, seed=5, vocab_size=1000)
    for step in (0, 1, 22, 23, 100):
        assert batch(numbered(n), step, batch_size=1, seed=5).tokens[0, 0] == loader.starts(step)[0] // t


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_evaluation_sees_all_rows_once(batch_size):
    rows = packed(random_examples(), 64)
    n = len(rows.tokens)
    batches = list(eval_batches(rows, batch_size))
    assert len(batches) == -(-n // batch_size)
    for name in rows._fields:
        leaf = np.concatenate([getattr(b, name) for b in batches])
        assert leaf.dtype == getattr(rows, name).dtype and leaf.shape == (len(batches) * batch_size, 64)
        assert np.array_equal(leaf[:n], getattr(rows, name)) and not leaf[n:].any()


# --- the model


def test_packed_and_padded_rows_have_the_same_loss(tiny):
    """The loss summed over all targets does not depend on the other examples in a row."""
    import jax
    import jax.numpy as jnp

    from gptjax.model.gpt import forward

    cfg, params = tiny("llama")
    encoded = examples(3, 9, 5, 17, 4, 6, 2)

    @jax.jit
    def total(rows):
        logits = forward(params, rows.tokens, cfg, segment_ids=rows.segment_ids)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], -1)[..., 0]
        return (losses * rows.weights).sum(), rows.weights.sum()

    from_packed, from_padded = total(packed(encoded, 16)), total(padded(encoded))
    np.testing.assert_allclose(from_packed[0], from_padded[0], rtol=1e-5)
    assert from_packed[1] == from_padded[1] > 0
