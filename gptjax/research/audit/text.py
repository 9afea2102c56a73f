"""Batches of text, and the log-probability that a model assigns to them."""

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

CHUNK_BYTES = 128 * 2**20  # size of the logits that are in memory at once


def store_of(texts: Sequence[str], tokenizer: Tokenizer) -> TokenStore:
    """A store with one document per text, each terminated by the tokenizer's end-of-text token, if it has one."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    ids = [[*tokenizer.encode(text), *end] for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    return TokenStore.from_ids(np.concatenate([np.asarray(row, np.int64) for row in ids]), starts[:-1])


def document_spans(store: TokenStore) -> Iterator[tuple[int, int]]:
    """(start, end) of each document, in tokens."""
    return zip(store.doc_starts, np.append(store.doc_starts[1:], len(store)), strict=True)


def sample(values: np.ndarray, max_n: int, seed: int) -> np.ndarray:
    """At most `max_n` values, drawn at random without replacement; their order is kept."""
    if len(values) <= max_n:
        return values
    return values[np.sort(np.random.default_rng(seed).choice(len(values), max_n, replace=False))]


def chunks(store: TokenStore, length: int, *, most: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split every document into chunks of at most length + 1 tokens; no chunk spans two documents.

    Consecutive chunks share one token: the last target of a chunk is the first input of the next. A chunk of one token
    is dropped, because it predicts nothing.

    Args:
        most: maximum number of chunks; if there are more, a random selection is kept in order. None: all.

    Returns:
        (starts, ends), [n] int64 each.

    Raises:
        UserError: no document has two tokens.
    """
    spans = [
        (start, min(start + length + 1, end))
        for first, end in document_spans(store)
        for start in range(first, end - 1, length)
    ]
    if not spans:
        raise UserError("no text with at least two tokens")
    kept = sample(np.array(spans, np.int64), len(spans) if most is None else most, seed)
    return kept[:, 0], kept[:, 1]


def rows(store: TokenStore, starts: np.ndarray, ends: np.ndarray, length: int | None = None) -> Batch:
    """One chunk per row: tokens and targets [n, T] int32, weights [n, T] float32, 0 for padding."""
    length = length or int((ends - starts).max()) - 1
    positions = starts[:, None] + np.arange(length + 1)
    ids = store.tokens[np.minimum(positions, ends[:, None] - 1)].astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], (positions[:, 1:] < ends[:, None]).astype(np.float32))


def rows_of(texts: Sequence[tuple[Sequence[int], Sequence[int]]], most: int | None = None) -> Batch:
    """One (prompt, continuation) pair of token ids per row; only the continuation's targets have weight 1.

    Rows are padded to a multiple of 16 tokens, but to no more than `most`, so that batches of similar lengths share one
    compiled program.
    """
    needed = max(len(prompt) + len(continuation) for prompt, continuation in texts) - 1
    length = max(needed, min(-(-needed // 16) * 16, most or needed))
    ids = np.zeros((len(texts), length + 1), np.int32)
    counted = np.zeros((len(texts), length + 1), np.float32)
    for i, (prompt, continuation) in enumerate(texts):
        end = len(prompt) + len(continuation)
        ids[i, :end] = [*prompt, *continuation]
        counted[i, len(prompt) : end] = 1
    return Batch(ids[:, :-1], ids[:, 1:], counted[:, 1:])


class Scored(NamedTuple):
    """[n, T]: log-probability of each target, and whether the target is the most likely token (argmax)."""

    log_probs: np.ndarray
    top1: np.ndarray


def score(params: Params, cfg: ModelConfig, batch: Batch) -> Scored:
    """Score the targets of every row, in chunks of rows that fit `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (4 * batch.tokens.shape[1] * cfg.vocab_size))
    return Scored(*in_chunks(lambda chunk: _score(params, chunk, cfg), batch, size))


@partial(jax.jit, static_argnums=2)
def _score(params: Params, batch: Batch, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    logits = forward(params, batch.tokens, cfg)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return picked - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == batch.targets


def continuations(scored: Scored, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """([n] log-probability of each row's continuation, [n] whether greedy decoding produces exactly that continuation).

    The second needs no decoding: if every target is the argmax, greedy decoding would have read the same tokens.
    """
    counts = batch.weights > 0
    return np.where(counts, scored.log_probs, 0).sum(1), (scored.top1 | ~counts).all(1)


def truncate_prompt(prompt: Sequence[int], continuation: Sequence[int], cfg: ModelConfig) -> Sequence[int]:
    """The last tokens of `prompt`, as many as fit into the context together with `continuation`."""
    max_prompt = cfg.context_length + 1 - len(continuation)
    if max_prompt < 1:
        raise UserError(f"{len(continuation)} tokens to predict do not fit into a context of {cfg.context_length}")
    return prompt[-max_prompt:]


def rank(value: float, others: np.ndarray) -> float:
    """Empirical p-value of `value` among `others`: (1 + number of others >= value) / (1 + number of others)."""
    return float((1 + (others >= value).sum()) / (1 + len(others)))
