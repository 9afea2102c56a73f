"""Batches: a pure function of (seed, step), so there is no iterator state to save or lose.

The i-th window of a run (i = step * batch_size + row) is number i % n of epoch i // n, and a stateless
permutation keyed by (seed, epoch) says where it lies in the tokens. Any step costs the same to find.
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
FEW = 256  # places whose permutation is a table
GOLDEN = 0x9E3779B97F4A7C15
ORDER_OF_WINDOWS = "2"  # raised when a seed gives other batches than before: a checkpoint of before is refused
AHEAD = 512  # places of windows that are computed together: the cost lies in the calls, not in the numbers
ORDER, OFFSET, POSITION, TOKEN = range(4)  # what a random number is for


class Lane(NamedTuple):
    """The windows of one corpus: window j of an epoch starts at begin + offset + j * stride."""

    begin: int
    n_windows: int
    stride: int
    n_offsets: int  # offsets an epoch draws from; 1: always 0


class Loader:
    """Training batches of one store.

    order=shuffle     every window once an epoch, in a new order. With stride=None the windows do not
                      overlap and each epoch cuts at another random offset, so that every token is a target.
    order=sequential  from the first window to the last, then again.
    stride=n          windows start every n tokens; the last short batch of an epoch is dropped.
    weights, temperature   with several sources: a fixed interleaving of them (`mixture.assign`), each with
                      its own epochs. Neither given: one pass over all sources is one epoch.

    Batch leaves are [B, T]; segment_ids, positions and weights are None with one document or
    document_mask=False, and arrays in every batch otherwise: the shapes of a store never change.
    """

    def __init__(
        self, store: TokenStore, cfg: DataConfig, *, batch_size: int, context_length: int, seed: int, vocab_size: int
    ):
        self.store, self.batch_size, self.context_length = store, batch_size, context_length
        self.seed, self.vocab_size = seed & MASK_64, vocab_size
        self.shuffle = cfg.order == "shuffle"
        self.document_mask = cfg.document_mask and len(store.doc_starts) > 1
        self.mask_tokens = cfg.mask_tokens
        if not 0 <= cfg.mask_tokens <= context_length or (cfg.mask_tokens and vocab_size < 2):
            raise UserError(
                f"data.mask_tokens ({cfg.mask_tokens}) must be between 0 and the context ({context_length})"
            )
        mixed = store.n_sources > 1 and (bool(cfg.weights) or cfg.temperature != 1.0)
        bounds = store.source_starts if mixed else np.asarray([0, len(store)])
        self.lanes = [_lane(int(a), int(b), cfg, context_length) for a, b in pairwise(bounds)]
        if cfg.weights and mixed and len(cfg.weights) != store.n_sources:
            raise UserError(
                f"data.weights has {len(cfg.weights)} numbers for {store.n_sources} sources: give one for each source"
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
        """Windows of one epoch, over all sources."""
        return sum(lane.n_windows for k, lane in enumerate(self.lanes) if self.shares[k] > 0)

    @property
    def steps_per_epoch(self) -> float:
        return self.n_windows // self.batch_size if self._whole_batches else self.n_windows / self.batch_size

    def batch(self, step: int) -> Batch:
        """The batch of `step`, leaves [B, T]."""
        return self._rows(step, 1, slice(None))

    def batches(self, step: int, k: int, rows: slice = slice(None)) -> Batch:
        """The batches of steps step .. step + k - 1, leaves [k, B, T]; of `rows` of each only, nothing else is read."""
        flat = self._rows(step, k, rows)
        return Batch(*(x if x is None else x.reshape(k, -1, x.shape[-1]) for x in flat))

    def starts(self, step: int, k: int = 1) -> np.ndarray:
        """Index in `store.tokens` of the first token of each row of k steps, [k * B] int64."""
        first, n = step * self.batch_size, k * self.batch_size
        begin, places = self._ahead
        if not begin <= first <= first + n <= begin + len(places):
            begin, places = first, self._starts(np.arange(first, first + max(n, AHEAD), dtype=np.int64))
            self._ahead = (begin, places)  # one assignment: threads see the old pair or the new
        return places[first - begin : first - begin + n]

    def _starts(self, samples: np.ndarray) -> np.ndarray:
        if len(self.lanes) == 1:
            if self._whole_batches:  # skip the windows that do not fill a batch
                n = self.lanes[0].n_windows
                used = n - n % self.batch_size
                samples = samples // used * n + samples % used
            return self._place(0, samples)
        source, number = mixture.assign(samples, self.shares)
        starts = np.empty_like(samples)
        for k in np.unique(source):
            starts[source == k] = self._place(int(k), number[source == k])
        return starts

    def _place(self, k: int, number: np.ndarray) -> np.ndarray:
        lane = self.lanes[k]
        epoch, j = np.divmod(number, lane.n_windows)
        if self.shuffle:
            j = permute(j, lane.n_windows, self._random(ORDER + 4 * k, epoch))
        start = lane.begin + j * lane.stride
        if lane.n_offsets > 1:
            start += (self._random(OFFSET + 4 * k, epoch) % np.uint64(lane.n_offsets)).astype(np.int64)
        return start

    def _random(self, purpose: int, numbers: np.ndarray) -> np.ndarray:
        """uint64 from (seed, purpose, number), the same shape as `numbers`."""
        return _mix(numbers.astype(np.uint64) + np.uint64(_mix_int(self.seed ^ _mix_int(purpose + 1))))

    def _rows(self, step: int, k: int, rows: slice) -> Batch:
        def chosen(samples: np.ndarray) -> np.ndarray:
            return samples.reshape(k, self.batch_size)[:, rows].reshape(-1)

        batch = gather(self.store, chosen(self.starts(step, k)), self.context_length, self.document_mask)
        if self.mask_tokens:
            self._mask(batch.tokens, chosen(np.arange(step * self.batch_size, (step + k) * self.batch_size)))
        return batch

    def _mask(self, tokens: np.ndarray, samples: np.ndarray) -> None:
        """Replace `mask_tokens` inputs a row by another id; one in each of as many equal parts of the row."""
        k, t = self.mask_tokens, self.context_length
        draws = samples[:, None] * k + np.arange(k)
        edges = np.arange(k + 1, dtype=np.uint64) * np.uint64(t) // np.uint64(k)
        at = edges[:-1] + self._random(POSITION, draws) % (edges[1:] - edges[:-1])
        rows = np.arange(len(samples))[:, None]
        shift = 1 + (self._random(TOKEN, draws) % np.uint64(self.vocab_size - 1)).astype(np.int64)
        tokens[rows, at] = (tokens[rows, at] + shift) % self.vocab_size


def eval_batches(
    store: TokenStore, *, context_length: int, batch_size: int, document_mask: bool = True
) -> Iterator[Batch]:
    """Every target of the split once, in windows that do not overlap; leaves [B, T], weights always there.

    The last window may be short and the last batch may lack rows: both are padded with weight 0.
        6 tokens, T 3, B 1    targets [1 2 3], [4 5 .]    weights [1 1 1], [1 1 0]
    """
    t, n = context_length, len(store)
    if n < 2:
        raise UserError(f"validation text of {n} tokens: at least 2 are needed for one prediction")
    masked = document_mask and len(store.doc_starts) > 1
    starts = np.arange(0, n - 1, t)
    for first in range(0, len(starts), batch_size):
        rows = starts[first : first + batch_size]
        rows = np.concatenate([rows, np.full(batch_size - len(rows), n - 1)])  # nothing but padding
        batch = gather(store, rows, t, masked)
        here = (rows[:, None] + 1 + np.arange(t) < n).astype(np.float32)
        segments = batch.segment_ids
        if masked:
            segments = np.where(rows[:, None] + np.arange(t) < n, segments, 0).astype(np.int32)
        yield batch._replace(weights=here * batch.weights if masked else here, segment_ids=segments)


def gather(store: TokenStore, starts: np.ndarray, context_length: int, document_mask: bool) -> Batch:
    """Windows at `starts` [B] as a batch. Past the end of the store the last token is repeated.

    tokens       7 8 9 E 3 4     documents [7 8 9 E] [3 4 5 E], which begin with E
    targets      8 9 E 3 4 5
    weights      1 1 1 1 1 1     0 at the end of a document where the next begins with a token of its own
    segment_ids  1 1 1 2 2 2
    positions    0 1 2 0 1 2     never more than the place in the window
    """
    t = context_length
    at = starts[:, None] + np.arange(t + 1)
    if len(starts) and np.max(at[:, -1]) >= len(store):
        at = np.minimum(at, len(store) - 1)
    ids = store.tokens[at].astype(np.int32)
    batch = Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]))
    if not document_mask:
        return batch
    documents = store.doc_starts
    first, last = np.searchsorted(documents, at[:, 0], "right"), np.searchsorted(documents, at[:, -1], "right")
    ramp = np.arange(t, dtype=np.int32)
    segment_ids, positions = np.ones((len(starts), t), np.int32), np.tile(ramp, (len(starts), 1))
    weights = np.ones((len(starts), t), np.float32)
    crossing = np.flatnonzero(first != last)
    if len(crossing):
        document = np.searchsorted(documents, at[crossing], "right") - 1
        now, following = document[:, :-1], document[:, 1:]
        now = np.where((now != following) & store.begins_before(following), following, now)
        segment_ids[crossing] = now - now[:, :1] + 1
        weights[crossing] = now == following
        begun = documents[now] - store.begins_before(now) - starts[crossing, None]
        positions[crossing] = ramp - np.maximum(begun, 0)
    return batch._replace(weights=weights, segment_ids=segment_ids, positions=positions)


def fingerprint(*arrays: np.ndarray) -> str:
    """A hash of shapes and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def epoch_rows(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """Which of n rows make up the batch of `step`, [B] int64: each once an epoch, in a new order each time.

    Sample i = step * batch_size + b is number i % n of epoch i // n, in the order that `Loader` gives n windows. A
    batch may begin in one epoch and end in the next.
    """
    epoch, j = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), n)
    key = _mix(epoch.astype(np.uint64) + np.uint64(_mix_int((seed & MASK_64) ^ _mix_int(ORDER + 1))))
    return permute(j, n, key)


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where each index in [0, n) goes under the permutation of `key`: int64, same shape.

    Few places (n <= 256) are sorted by random numbers of their own (splitmix64 from the key), so that every
    permutation is equally likely. More need no table: a Feistel network on the digits (a, b) of a number in mixed
    radix, where each half is shifted by a hash of the other, which can be undone whatever the hash is. The square is
    at most sqrt(n) larger than n, and a number that lands outside is sent through again until it comes back in (cycle
    walking).
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
    """The finaliser of splitmix64 on an array of uint64 (which wraps around silently; scalars would warn)."""
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
    n_windows = max(1, (n - t) // t)  # one less than fit, so that every offset leaves room for all
    return Lane(begin, n_windows, t, n - n_windows * t)
