"""Computes training batches as a pure function of (seed, step), so that no iterator state has to be checkpointed.

With n windows per epoch, window i of a run (i = step * batch_size + row) is window i % n of epoch i // n. A stateless
permutation keyed by (seed, epoch) maps i % n, which is the number of window i within its epoch of n windows, to the
start of the window in the token array. The batch of any step can be computed directly, without computing the batches of
earlier steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import numpy as np

from gptjax.config import DataConfig
from gptjax.data import mixture, windows
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.types import Batch

MASK_64 = (1 << 64) - 1
ROUNDS = 3
FEW = 256  # Permutations of at most FEW indices are computed by sorting.
GOLDEN = 0x9E3779B97F4A7C15
# Version number of the order in which windows are read. The version number ORDER_OF_WINDOWS is increased when a change
# of the code gives different batches for the same seed, so that a run is not resumed from a checkpoint of an older
# version.
ORDER_OF_WINDOWS = "2"
# The loader computes the start indices of at least AHEAD windows at once. If the loader computed only the few windows
# of a single batch, numpy's overhead per call would dominate the time.
AHEAD = 512
# Each purpose of random numbers has an integer that is hashed with the seed, so that different purposes use different
# random numbers.
ORDER, OFFSET, POSITION, TOKEN = range(4)


class Lane(NamedTuple):
    """The windows of one data source: window j of an epoch starts at token begin + offset + j * stride."""

    begin: int
    n_windows: int
    stride: int
    n_offsets: int  # Each epoch starts at a random offset from range(n_offsets).


class Loader:
    """Computes training batches from one `TokenStore`.

        order=shuffle     Every epoch contains each window once, in a new order. With stride=None windows do not
                          overlap, and every epoch starts at a random offset, so that tokens that are not targets in
                          one epoch can be targets in another.
        order=sequential  Windows are read from the first to the last, then again from the first.
        stride=n          Windows start every n tokens. If the last batch of an epoch is incomplete, it is dropped,
                          unless the sources are interleaved or an epoch is smaller than a batch.
        weights, temperature   If weights are given or the temperature is not 1, several sources are interleaved
                          deterministically (`mixture.assign`), and each source has its own epochs. Otherwise an
                          epoch is one pass over all sources.

    Each array of a batch has the shape [B, T]. The arrays segment_ids, positions and weights are None if there is a
    single document or document_mask=False. If there are several documents and document_mask=True, segment_ids,
    positions and weights are arrays in every batch, so that shapes never change during a run.

    Raises:
        UserError: a source with a sampling probability above 0 has fewer tokens than one window needs, or mask_tokens,
            stride or weights are invalid.
    """

    def __init__(
        self, store: TokenStore, cfg: DataConfig, *, batch_size: int, context_length: int, seed: int, vocab_size: int
    ):
        self.store, self.batch_size, self.context_length = store, batch_size, context_length
        self.seed, self.vocab_size = seed & MASK_64, vocab_size
        self.shuffle = cfg.order == "shuffle"
        self.document_mask = cfg.document_mask and len(store.doc_starts) > 1
        self.mask_tokens = cfg.mask_tokens
        if not 0 <= cfg.mask_tokens <= context_length:
            raise UserError(
                f"data.mask_tokens ({cfg.mask_tokens}) must be between 0 and the context length ({context_length})"
            )
        if cfg.mask_tokens and vocab_size < 2:
            raise UserError(
                f"data.mask_tokens={cfg.mask_tokens} replaces tokens by other ids of the vocabulary: vocab_size must "
                f"be at least 2, got {vocab_size}"
            )
        mixed = store.n_sources > 1 and (bool(cfg.weights) or cfg.temperature != 1.0)
        bounds = store.source_starts if mixed else np.asarray([0, len(store)])
        self.lanes = [_lane(int(a), int(b), cfg, context_length) for a, b in pairwise(bounds)]
        if cfg.weights and mixed and len(cfg.weights) != store.n_sources:
            raise UserError(
                f"data.weights has {len(cfg.weights)} values for {store.n_sources} sources: give one per source"
            )
        self.shares = mixture.shares(cfg.weights or np.diff(bounds), cfg.temperature) if mixed else np.ones(1)
        text = "source {} of the training text" if mixed else "the training text"
        problems = [
            f"{text.format(k + 1)} has {bounds[k + 1] - bounds[k]} tokens, and one window of model.context_length="
            f"{context_length} needs at least {context_length + 1}: give more text or lower model.context_length"
            for k, lane in enumerate(self.lanes)
            if self.shares[k] > 0 and lane.n_windows < 1
        ]
        if problems:
            raise UserError.all(problems)
        self._whole_batches = cfg.stride is not None and not mixed and self.lanes[0].n_windows >= batch_size
        self._ahead = (0, np.zeros(0, np.int64))

    @property
    def n_windows(self) -> int:
        """Returns the number of windows per epoch, summed over the sources whose sampling probability is above 0."""
        return sum(lane.n_windows for k, lane in enumerate(self.lanes) if self.shares[k] > 0)

    @property
    def steps_per_epoch(self) -> float:
        return self.n_windows // self.batch_size if self._whole_batches else self.n_windows / self.batch_size

    def batch(self, step: int) -> Batch:
        """Returns the batch for training step `step`, with arrays of shape [B, T]."""
        return self._rows(step, 1, slice(None))

    def batches(self, step: int, k: int, rows: slice = slice(None)) -> Batch:
        """Returns the batches of the training steps step .. step + k - 1, stacked into arrays of shape [k, B, T].

        Only the rows that the slice `rows` selects in each batch are read and returned.
        """
        flat = self._rows(step, k, rows)
        return Batch(*(x if x is None else x.reshape(k, -1, x.shape[-1]) for x in flat))

    def starts(self, step: int, k: int = 1) -> np.ndarray:
        """Returns the indices in `store.tokens` at which the rows of k consecutive batches begin, [k * B] int64.

        The first of the k batches is the batch of training step `step`.
        """
        first, n = step * self.batch_size, k * self.batch_size
        begin, starts = self._ahead
        if not begin <= first <= first + n <= begin + len(starts):
            begin, starts = first, self._starts(np.arange(first, first + max(n, AHEAD), dtype=np.int64))
            # Assign one tuple, so that another thread never reads an old `begin` together with new `starts`.
            self._ahead = (begin, starts)
        return starts[first - begin : first - begin + n]

    def _starts(self, samples: np.ndarray) -> np.ndarray:
        if len(self.lanes) == 1:
            if self._whole_batches:  # Skip the windows at the end of an epoch that do not fill a batch.
                n = self.lanes[0].n_windows
                used = n - n % self.batch_size
                samples = samples // used * n + samples % used
            return self._window_starts(0, samples)
        source, index = mixture.assign(samples, self.shares)
        starts = np.empty_like(samples)
        for k in np.unique(source):
            starts[source == k] = self._window_starts(int(k), index[source == k])
        return starts

    def _window_starts(self, k: int, index: np.ndarray) -> np.ndarray:
        lane = self.lanes[k]
        epoch, j = np.divmod(index, lane.n_windows)
        if self.shuffle:
            j = permute(j, lane.n_windows, self._random(ORDER + 4 * k, epoch))
        start = lane.begin + j * lane.stride
        if lane.n_offsets > 1:
            start += (self._random(OFFSET + 4 * k, epoch) % np.uint64(lane.n_offsets)).astype(np.int64)
        return start

    def _random(self, purpose: int, counters: np.ndarray) -> np.ndarray:
        """Returns pseudorandom uint64 values in the shape of `counters`: the hash of (seed, purpose, counter) for each
        counter."""
        return _mix(counters.astype(np.uint64) + np.uint64(_mix_int(self.seed ^ _mix_int(purpose + 1))))

    def _rows(self, step: int, k: int, rows: slice) -> Batch:
        def select(samples: np.ndarray) -> np.ndarray:
            return samples.reshape(k, self.batch_size)[:, rows].reshape(-1)

        batch = gather(self.store, select(self.starts(step, k)), self.context_length, self.document_mask)
        if self.mask_tokens:
            self._mask(batch.tokens, select(np.arange(step * self.batch_size, (step + k) * self.batch_size)))
        return batch

    def _mask(self, tokens: np.ndarray, samples: np.ndarray) -> None:
        """Replaces k = `mask_tokens` input tokens of every row in place by random tokens that differ from the replaced
        tokens.

        Each row is divided into k = `mask_tokens` sections, whose lengths differ by at most one token. In each of the
        `mask_tokens` sections of a row, one input token at a random position is replaced.
        """
        k, t = self.mask_tokens, self.context_length
        draws = samples[:, None] * k + np.arange(k)
        edges = np.arange(k + 1, dtype=np.uint64) * np.uint64(t) // np.uint64(k)
        columns = edges[:-1] + self._random(POSITION, draws) % (edges[1:] - edges[:-1])
        rows = np.arange(len(samples))[:, None]
        shift = 1 + (self._random(TOKEN, draws) % np.uint64(self.vocab_size - 1)).astype(np.int64)
        tokens[rows, columns] = (tokens[rows, columns] + shift) % self.vocab_size


def eval_batches(
    store: TokenStore, *, context_length: int, batch_size: int, document_mask: bool = True
) -> Iterator[Batch]:
    """Yields batches for evaluation, in which every token of the store except the first is a target exactly once.

    The windows of the evaluation batches do not overlap. The arrays of a batch have the shape [B, T], and `weights` is
    never None. The last window and the last batch are padded with tokens of weight 0 if they are incomplete.
        6 tokens, T 3, B 1    targets [1 2 3], [4 5 .]    weights [1 1 1], [1 1 0]
    """
    t, n = context_length, len(store)
    if n < 2:
        raise UserError(f"validation text of {n} tokens: at least 2 are needed for one prediction")
    masked = document_mask and len(store.doc_starts) > 1
    starts = np.arange(0, n - 1, t)
    for first in range(0, len(starts), batch_size):
        rows = starts[first : first + batch_size]
        rows = np.concatenate([rows, np.full(batch_size - len(rows), n - 1)])  # padding rows
        batch = gather(store, rows, t, masked)
        real = (rows[:, None] + 1 + np.arange(t) < n).astype(np.float32)
        segments = batch.segment_ids
        if masked:
            segments = np.where(rows[:, None] + np.arange(t) < n, segments, 0).astype(np.int32)
        yield batch._replace(weights=real * batch.weights if masked else real, segment_ids=segments)


def gather(store: TokenStore, starts: np.ndarray, context_length: int, document_mask: bool) -> Batch:
    """Returns the batch of the windows that start at the token indices `starts` [B].

    If a window extends beyond the end of the store, it is filled with copies of the last token of the store.

        tokens       7 8 9 E 3 4     documents [7 8 9 E] and [3 4 5 E]; the token E ends one document and begins the
                                     next
        targets      8 9 E 3 4 5
        weights      1 1 1 1 1 1     0 where input and target belong to different documents; here none do, because the E
                                     belongs to the first document as a target, and to the second as an input
        segment_ids  1 1 1 2 2 2
        positions    0 1 2 0 1 2     counted from the start of the document, or of the window if that is later
    """
    t = context_length
    index = starts[:, None] + np.arange(t + 1)
    if len(starts) and np.max(index[:, -1]) >= len(store):
        index = np.minimum(index, len(store) - 1)
    ids = store.tokens[index].astype(np.int32)
    batch = Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]))
    if not document_mask:
        return batch
    documents = store.doc_starts
    first, last = np.searchsorted(documents, index[:, 0], "right"), np.searchsorted(documents, index[:, -1], "right")
    ramp = np.arange(t, dtype=np.int32)
    segment_ids, positions = np.ones((len(starts), t), np.int32), np.tile(ramp, (len(starts), 1))
    weights = np.ones((len(starts), t), np.float32)
    crossing = np.flatnonzero(first != last)
    if len(crossing):
        document = np.searchsorted(documents, index[crossing], "right") - 1
        current, following = document[:, :-1], document[:, 1:]
        current = np.where((current != following) & store.begins_before(following), following, current)
        segment_ids[crossing] = current - current[:, :1] + 1
        weights[crossing] = current == following
        document_start = documents[current] - store.begins_before(current) - starts[crossing, None]
        positions[crossing] = ramp - np.maximum(document_start, 0)
    return batch._replace(weights=weights, segment_ids=segment_ids, positions=positions)


def fingerprint(*arrays: np.ndarray) -> str:
    """Returns the SHA-256, in hexadecimal, of the shapes and bytes of the arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def epoch_rows(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """Returns the indices [B] int64 of the rows that are in the batch of training step `step`.

    Every epoch contains each of the n rows once, in a random order; `permute` computes the order from the seed and the
    number of the epoch. With i = step * batch_size + b, row b of the batch is the (i % n)-th row of epoch i // n. A
    batch may contain the last rows of one epoch and the first rows of the next.
    """
    epoch, j = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), n)
    key = _mix(epoch.astype(np.uint64) + np.uint64(_mix_int((seed & MASK_64) ^ _mix_int(ORDER + 1))))
    return permute(j, n, key)


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Applies to each index[i] the pseudorandom permutation of range(n) that key[i] determines. Returns int64 indices.

    For n <= 256 the permutation is the argsort of n splitmix64 values that are seeded by the key, so that all
    permutations are equally likely. For n > 256 the permutation is a Feistel network, which needs no array of n values.
    The Feistel network permutes range(a * b), where a is sqrt(n) rounded up, and b is n / a rounded up, so that a * b
    exceeds n by less than sqrt(n). The Feistel network splits an index into two digits: left = index // b, which is
    below a, and right = index % b, which is below b. Each round of the Feistel network adds a hash of the digit `right`
    to the digit `left` modulo a, and then a hash of `left` to `right` modulo b, where `left` is below a and `right` is
    below b; a round can be inverted for any hash. If the Feistel network maps an index to n or more, the result is
    permuted again until it is below n (cycle walking).
    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators" (2014); Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains" (2002), methods 2 and 3.
    """
    if n <= FEW:
        keys, row = np.unique(key, return_inverse=True)
        steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        return np.argsort(_mix(_mix(keys)[:, None] + steps), axis=1)[row.reshape(index.shape), index]
    a = isqrt(n - 1) + 1
    out = _feistel(index.astype(np.uint64), np.uint64(a), np.uint64(-(-n // a)), key)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], np.uint64(a), np.uint64(-(-n // a)), key[outside])
    return out.astype(np.int64)


def _feistel(x: np.ndarray, a: np.uint64, b: np.uint64, key: np.ndarray) -> np.ndarray:
    left: np.ndarray = x // b
    right: np.ndarray = x % b
    for i in range(ROUNDS):
        left = (left + _mix(right + (key ^ _ROUND_KEYS[2 * i])) % a) % a
        right = (right + _mix(left + (key ^ _ROUND_KEYS[2 * i + 1])) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the splitmix64 finaliser, which is a hash function, to each element of a uint64 array.

    The argument of `_mix` is always an array, because numpy warns about the overflow of scalars, but not about the
    overflow of arrays.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    return int(_mix(np.asarray([x & MASK_64], np.uint64))[0])


_ROUND_KEYS = [np.uint64(_mix_int((i + 1) * GOLDEN)) for i in range(2 * ROUNDS)]


def _lane(begin: int, end: int, cfg: DataConfig, t: int) -> Lane:
    n = end - begin
    if cfg.stride is not None:
        if cfg.stride < 1:
            raise UserError(f"data.stride ({cfg.stride}) must be at least 1")
        return Lane(begin, windows.count(n, t, cfg.stride), cfg.stride, 1)
    if cfg.order == "sequential" or n <= t:
        return Lane(begin, max(n - 1, 0) // t, t, 1)
    # For n tokens, an epoch has n // t - 1 windows of t tokens, but at least one window. If n >= 2 * t, there are at
    # least t offsets at which the first window of an epoch can start.
    n_windows = max(1, (n - t) // t)
    return Lane(begin, n_windows, t, n - n_windows * t)
