"""Rows of text, and how likely a model finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.model.gpt import forward
from gptjax.research.influence import in_chunks
from gptjax.tokenizers import Tokenizer
from gptjax.types import Batch, Params

CHUNK_BYTES = 128 * 2**20  # of logits alive at once


def store_of(texts: Sequence[str], tokenizer: Tokenizer) -> TokenStore:
    """Texts as documents, each ended as the tokenizer ends them."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    ids = [[*tokenizer.encode(text), *end] for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    return TokenStore.from_ids(np.concatenate([np.asarray(own, np.int64) for own in ids]), starts[:-1])


def document_spans(store: TokenStore) -> Iterator[tuple[int, int]]:
    """(start, end) of each."""
    return zip(store.doc_starts, np.append(store.doc_starts[1:], len(store)), strict=True)


def sample(values: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of them, drawn at random, in their order."""
    if len(values) <= most:
        return values
    return values[np.sort(np.random.default_rng(seed).choice(len(values), most, replace=False))]


def pieces(store: TokenStore, length: int, *, most: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) [n] int64 of pieces of at most length + 1 tokens that cover every document and never two of them;
    `most` of them, drawn at random, in their order. A piece of one token is none."""
    found = [
        (start, min(start + length + 1, end))
        for first, end in document_spans(store)
        for start in range(first, end - 1, length)
    ]
    if not found:
        raise UserError("no text with at least two tokens")
    both = sample(np.array(found, np.int64), len(found) if most is None else most, seed)
    return both[:, 0], both[:, 1]


def rows(store: TokenStore, starts: np.ndarray, ends: np.ndarray, length: int | None = None) -> Batch:
    """One piece a row: tokens and targets [n, T] int32, weights [n, T] float32, 0 where the piece has ended."""
    length = length or int((ends - starts).max()) - 1
    at = starts[:, None] + np.arange(length + 1)
    ids = store.tokens[np.minimum(at, ends[:, None] - 1)].astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], (at[:, 1:] < ends[:, None]).astype(np.float32))


def rows_of(texts: Sequence[tuple[Sequence[int], Sequence[int]]], most: int | None = None) -> Batch:
    """One (read, predicted) pair of ids a row: the targets that count are the predicted ones.

    Rows are filled up to a multiple of 16, so that other texts find the compiled program again, or to `most`.
    """
    needed = max(len(read) + len(said) for read, said in texts) - 1
    length = max(needed, min(-(-needed // 16) * 16, most or needed))
    ids = np.zeros((len(texts), length + 1), np.int32)
    counted = np.zeros((len(texts), length + 1), np.float32)
    for i, (read, said) in enumerate(texts):
        ids[i, : len(read) + len(said)] = [*read, *said]
        counted[i, len(read) : len(read) + len(said)] = 1
    return Batch(ids[:, :-1], ids[:, 1:], counted[:, 1:])


class Scored(NamedTuple):
    """[n, T]: log-probability of each target, and whether it is the likeliest token of all."""

    log_probs: np.ndarray
    first: np.ndarray


def score(params: Params, cfg: ModelConfig, batch: Batch) -> Scored:
    """Of every row by itself, some at a time."""
    size = max(1, CHUNK_BYTES // (4 * batch.tokens.shape[1] * cfg.vocab_size))
    return Scored(*in_chunks(lambda part: _score(params, part, cfg), batch, size))


@partial(jax.jit, static_argnums=2)
def _score(params: Params, batch: Batch, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    logits = forward(params, batch.tokens, cfg)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return picked - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == batch.targets


def continuations(scored: Scored, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """([n] log-probability of what counts in each row, [n] whether greedy decoding says exactly that).

    The second needs no decoding: as long as every token so far is the likeliest, decoding has read the same tokens.
    """
    counts = batch.weights > 0
    return np.where(counts, scored.log_probs, 0).sum(1), (scored.first | ~counts).all(1)


def within(read: Sequence[int], said: Sequence[int], cfg: ModelConfig) -> Sequence[int]:
    """The end of `read`, so that both fit into the context."""
    room = cfg.context_length + 1 - len(said)
    if room < 1:
        raise UserError(f"{len(said)} tokens to predict do not fit into a context of {cfg.context_length}")
    return read[-room:]


def rank(value: float, others: np.ndarray) -> float:
    """Chance that a value drawn like the others is as large: (1 + those as large) / (1 + all)."""
    return float((1 + (others >= value).sum()) / (1 + len(others)))
