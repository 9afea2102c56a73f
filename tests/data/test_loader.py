"""Training batches: a pure function of (seed, step), every window once per epoch, documents, mixtures, evaluation."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.data import Loader, TokenStore, eval_batches, permute
from gptjax.data.loader import gather
from gptjax.errors import UserError


def loader(store, *, batch_size=4, context_length=8, seed=0, vocab_size=1000, **cfg):
    return Loader(
        store, DataConfig(**cfg), batch_size=batch_size, context_length=context_length, seed=seed, vocab_size=vocab_size
    )


def batches_equal(a, b):
    return all(x is y is None or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


LINE = TokenStore.from_ids(np.arange(997))  # every token equals its position
DOCUMENTS = TokenStore.from_ids(np.arange(997), doc_starts=[0, 5, 6, 300, 301, 640, 990], source_starts=[0, 300, 997])
CASES = {
    "plain": (LINE, {}),
    "sequential": (LINE, {"order": "sequential"}),
    "book": (LINE, {"stride": 5}),
    "documents": (DOCUMENTS, {}),
    "mixed": (DOCUMENTS, {"weights": (1.0, 2.0)}),
    "temperature": (DOCUMENTS, {"temperature": 0.3}),
    "masked tokens": (DOCUMENTS, {"mask_tokens": 2}),
}
every_case = pytest.mark.parametrize(("store", "cfg"), CASES.values(), ids=CASES)


# --- the permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 99, 100, 101, 1000, 4099])
def test_permute_is_a_different_permutation_for_each_key(n):
    index = np.arange(n)
    orders = [permute(index, n, np.full(n, key, np.uint64)) for key in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == index.tolist()
    if n > 10:
        assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_of_few_indices_is_equally_likely(n):
    """Chi-square test over all n! permutations: mean n! - 1, variance twice that; at most four standard deviations."""
    keys = 400 * math.factorial(n)
    orders = permute(np.tile(np.arange(n), keys), n, np.repeat(np.arange(keys, dtype=np.uint64), n)).reshape(keys, n)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    degrees_of_freedom = math.factorial(n) - 1
    assert len(counts) == degrees_of_freedom + 1
    assert abs(((counts - 400) ** 2 / 400).sum() - degrees_of_freedom) < 4 * (2 * degrees_of_freedom) ** 0.5


@pytest.mark.parametrize("n", [25, 33, 40, 41, 47])
def test_every_token_of_the_text_is_a_target_in_some_epoch(n):
    load = loader(TokenStore.from_ids(np.arange(n)), batch_size=1)
    starts = load.starts(0, 300 * load.n_windows)
    assert set(starts.tolist()) == set(range(n - 8))


def test_permute_looks_random():
    """No position prefers a value: chi-square test of (position, value) counts over 2,000 keys."""
    n, keys = 10, 2000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, np.full(n, key * 7919, np.uint64))] += 1
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 < 140  # expected value 81, standard deviation 13
    big = permute(np.arange(10_000), 10_000, np.full(10_000, 5, np.uint64))
    assert abs(np.corrcoef(np.arange(10_000), big)[0, 1]) < 0.04
    assert (np.diff(big) == 1).sum() < 10


# --- a pure function of (seed, step)


@every_case
def test_any_step_in_any_order(store, cfg):
    steps = range(60)
    in_order = [loader(store, **cfg).batch(s) for s in steps]
    other = loader(store, **cfg)
    for s in [59, 3, 58, 3, *np.random.default_rng(0).permutation(60)]:
        assert batches_equal(other.batch(int(s)), in_order[s])
    for resumed_at in range(0, 60, 7):
        assert batches_equal(loader(store, **cfg).batch(resumed_at), in_order[resumed_at])


@every_case
def test_stacked_equals_one_by_one(store, cfg):
    single = loader(store, **cfg)
    stacked = loader(store, **cfg).batches(17, 6)
    assert stacked.tokens.shape == (6, 4, 8)
    for k in range(6):
        assert batches_equal(single.batch(17 + k), [x if x is None else x[k] for x in stacked])


@every_case
def test_shapes_never_change(store, cfg):
    load = loader(store, **cfg)
    shapes = {tuple(x if x is None else (x.shape, x.dtype.name) for x in load.batch(s)) for s in range(100)}
    assert len(shapes) == 1
    (shape,) = shapes
    assert (shape[2] is None) == (len(store.doc_starts) == 1)
    assert shape[0] == ((4, 8), "int32")


def test_seeds_differ_and_far_steps_work():
    assert not batches_equal(loader(LINE, seed=0).batch(0), loader(LINE, seed=1).batch(0))
    assert not batches_equal(loader(LINE, seed=0).batch(0), loader(LINE, seed=0).batch(1))
    far = loader(LINE, seed=-3).batch(10**12)
    assert (far.targets == far.tokens + 1).all()


# --- epochs


def epoch_starts(load, epoch):
    n, b = load.n_windows, load.batch_size
    flat = load.starts(epoch * n // b, n // b + 2)
    return flat[epoch * n % b :][:n]


def test_shuffled_epochs_hold_every_window_once():
    load = loader(LINE)
    offsets, orders = [], []
    for epoch in range(6):
        starts = epoch_starts(load, epoch)
        offset = starts.min()
        assert sorted(starts) == list(range(offset, offset + 8 * load.n_windows, 8))
        assert offset < 997 - 8 * load.n_windows and starts.max() + 9 <= 997
        offsets.append(int(offset))
        orders.append((starts - offset).tolist())
    assert len(set(offsets)) > 2 and all(a != b for a, b in pairwise(orders))


def test_sequential_reads_windows_in_order():
    load = loader(LINE, order="sequential")
    assert load.n_windows == 996 // 8
    assert epoch_starts(load, 1).tolist() == list(range(0, 8 * load.n_windows, 8))


def test_book_mode_drops_the_last_short_batch():
    load = loader(TokenStore.from_ids(np.arange(40)), stride=5, batch_size=3)  # windows at 0 5 10 15 20 25 30
    assert load.n_windows == 7 and load.steps_per_epoch == 2
    seen = Counter()
    for epoch in range(30):
        starts = load.starts(2 * epoch, 2).tolist()
        assert len(set(starts)) == 6 and set(starts) <= set(range(0, 31, 5))
        seen.update(starts)
    assert len(seen) == 7  # the window that is dropped differs between epochs


def test_smallest_texts():
    for n in (9, 10, 15, 16, 17):
        load = loader(TokenStore.from_ids(np.arange(n)))
        for step in range(5):
            batch = load.batch(step)
            assert (batch.targets == batch.tokens + 1).all()
    with pytest.raises(UserError, match=r"8 tokens.*context_length=8 needs at least 9"):
        loader(TokenStore.from_ids(np.arange(8)))


# --- documents


def test_documents_by_hand():
    #                            0  1  2  3 | 4 | 5  6  7  8  9
    store = TokenStore.from_ids([7, 8, 9, 0, 0, 3, 4, 5, 6, 0], doc_starts=[0, 4, 5])
    batch = loader(store, order="sequential", batch_size=1, context_length=6).batch(0)
    assert batch.tokens.tolist() == [[7, 8, 9, 0, 0, 3]]
    assert batch.targets.tolist() == [[8, 9, 0, 0, 3, 4]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 1, 1]]  # the second document consists of its begin token only
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_a_document_begins_with_the_token_that_ends_the_previous_one():
    store = TokenStore.from_ids([7, 8, 9, 1, 3, 4, 1, 5, 1], doc_starts=[0, 4, 7])
    assert store.begin_id == 1
    batch = loader(store, order="sequential", batch_size=1, context_length=8).batch(0)
    assert batch.tokens.tolist() == [[7, 8, 9, 1, 3, 4, 1, 5]]
    assert batch.weights.tolist() == [[1] * 8]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    live = Counter()
    for batch in eval_batches(store, context_length=4, batch_size=3):
        live.update(batch.targets[batch.weights > 0].tolist())
    assert live == Counter([8, 9, 1, 3, 4, 1, 5, 1])  # every token but the first of the first document
    for start in range(9 - 4):  # a window may start anywhere
        batch = gather(store, np.array([start]), 4, True)
        assert (batch.weights == 1).all() and batch.segment_ids[0, 0] == 1 and batch.positions[0, 0] == 0


def test_a_separate_begin_token_is_not_the_end_of_the_previous_document():
    # Documents [E a b] (truncated, so it has no end token), [E c E] and [d E]; the last begins with the E before it.
    store = TokenStore.from_ids([1, 7, 8, 1, 9, 1, 6, 1], doc_starts=[0, 3, 6], begin_id=1)
    batch = loader(store, order="sequential", batch_size=1, context_length=7).batch(0)
    assert batch.tokens.tolist() == [[1, 7, 8, 1, 9, 1, 6]]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 1, 1, 1]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert store.n_targets == 6


def test_documents_by_definition():
    document = np.searchsorted(DOCUMENTS.doc_starts, np.arange(997), "right") - 1
    load = loader(DOCUMENTS)
    for step in range(60):
        batch = load.batch(step)
        for row in range(4):
            token, target = batch.tokens[row], batch.targets[row]  # each equals its index in the store
            assert (batch.weights[row] == (document[token] == document[target])).all()
            assert (np.diff(batch.segment_ids[row]) == np.diff(document[token])).all()
            begin = np.maximum(DOCUMENTS.doc_starts[document[token]], token[0])
            assert (batch.positions[row] == token - begin).all()


def test_document_mask_off():
    batch = loader(DOCUMENTS, document_mask=False).batch(0)
    assert batch.weights is batch.segment_ids is batch.positions is None


# --- mixtures


def test_mixture_proportions_and_own_epochs():
    load = loader(DOCUMENTS, weights=(3.0, 1.0), context_length=8)
    starts = load.starts(0, 400)
    small = starts[starts < 300]
    assert abs(len(small) - 1200) <= 1
    assert (small + 9 <= 300).all()  # no window extends into the other source
    n = load.lanes[0].n_windows
    for epoch in range(5):
        assert len(set(small[epoch * n : (epoch + 1) * n].tolist())) == n


def test_without_weights_and_temperature_an_epoch_is_one_pass():
    load = loader(DOCUMENTS)
    assert len(load.lanes) == 1 and len(set(epoch_starts(load, 0).tolist())) == load.n_windows


def test_mixture_mistakes():
    with pytest.raises(UserError, match="3 values for 2 sources"):
        loader(DOCUMENTS, weights=(1.0, 1.0, 1.0))
    tiny = TokenStore.from_ids(np.arange(50), source_starts=[0, 5, 50])
    with pytest.raises(UserError, match=r"source 1 .* 5 tokens.*at least 9"):
        loader(tiny, weights=(1.0, 1.0))
    loader(tiny, weights=(0.0, 1.0)).batch(0)


# --- random tokens


@pytest.mark.parametrize("k", [1, 2, 3])
def test_mask_tokens_replaces_exactly_k_inputs(k):
    plain, mask_loader = loader(LINE), loader(LINE, mask_tokens=k)
    positions = Counter()
    for step in range(200):
        a, b = plain.batch(step), mask_loader.batch(step)
        assert (a.targets == b.targets).all()
        changed = a.tokens != b.tokens
        assert (changed.sum(1) == k).all()
        assert (b.tokens >= 0).all() and (b.tokens < 1000).all()
        positions.update(np.flatnonzero(changed.any(0)).tolist())
    assert len(positions) == 8


def test_mask_tokens_mistakes():
    with pytest.raises(UserError, match=r"mask_tokens \(9\) must be between 0 and the context length \(8\)"):
        loader(LINE, mask_tokens=9)
    with pytest.raises(UserError, match=r"mask_tokens=3 replaces tokens .* vocab_size must be at least 2, got 0"):
        loader(LINE, mask_tokens=3, vocab_size=0)


# --- evaluation


@pytest.mark.parametrize("n", [2, 8, 9, 10, 33, 100, 129])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_eval_counts_every_target_once(n, batch_size):
    batches = list(eval_batches(TokenStore.from_ids(np.arange(n)), context_length=8, batch_size=batch_size))
    seen = Counter()
    for batch in batches:
        assert batch.tokens.shape == (batch_size, 8) and batch.segment_ids is None
        live = batch.weights > 0
        assert (batch.targets[live] == batch.tokens[live] + 1).all()
        seen.update(batch.targets[live].tolist())
    assert seen == Counter(range(1, n))


def test_eval_of_documents():
    seen = Counter()
    for batch in eval_batches(DOCUMENTS, context_length=8, batch_size=5):
        live = batch.weights > 0
        seen.update(batch.targets[live].tolist())
        assert (batch.segment_ids[live] > 0).all()
    doc_starts = set(DOCUMENTS.doc_starts.tolist())
    assert seen == Counter(i for i in range(997) if i not in doc_starts)
    repeated = eval_batches(DOCUMENTS, context_length=8, batch_size=5)
    assert all(
        batches_equal(a, b)
        for a, b in zip(eval_batches(DOCUMENTS, context_length=8, batch_size=5), repeated, strict=True)
    )
