"""Makes batches of text, and computes the log-probabilities that a model assigns to the text."""

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

CHUNK_BYTES = 128 * 2**20  # The maximum size, in bytes, of the logits that are held in memory at the same time.


def store_of(texts: Sequence[str], tokenizer: Tokenizer) -> TokenStore:
    """Tokenises texts, and returns a token store with one document per text.

    If the tokenizer has an end-of-text token, every document ends with the end-of-text token.
    """
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    ids = [[*tokenizer.encode(text), *end] for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    return TokenStore.from_ids(np.concatenate([np.asarray(row, np.int64) for row in ids]), starts[:-1])


def document_spans(store: TokenStore) -> Iterator[tuple[int, int]]:
    """Iterates over the documents of a token store, as pairs (index of the first token, index after the last token)."""
    return zip(store.doc_starts, np.append(store.doc_starts[1:], len(store)), strict=True)


def sample(values: np.ndarray, max_n: int, seed: int) -> np.ndarray:
    """Returns at most `max_n` of the values, drawn at random without replacement. The drawn values keep their order."""
    if len(values) <= max_n:
        return values
    return values[np.sort(np.random.default_rng(seed).choice(len(values), max_n, replace=False))]


def chunks(store: TokenStore, length: int, *, most: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits every document into chunks of at most length + 1 tokens; no chunk spans two documents.

    Consecutive chunks share one token: the last target of a chunk is the first input of the next chunk. A chunk of one
    token is dropped, because the chunk has no target.

    Args:
        most: maximum number of chunks; if there are more, a random selection is kept, in order. None: all chunks.

    Returns:
        (starts, ends) of the chunks as token indices, [n] int64 each.

    Raises:
        UserError: no document has at least two tokens.
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
    """Returns a batch with one chunk of the token store per row.

    The batch has tokens and targets [n, T] int32, and weights [n, T] float32, which are 0 for padding. The number of
    targets per row, T, is `length`, or the length of the longest chunk minus 1 if `length` is None.
    """
    length = length or int((ends - starts).max()) - 1
    positions = starts[:, None] + np.arange(length + 1)
    ids = store.tokens[np.minimum(positions, ends[:, None] - 1)].astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], (positions[:, 1:] < ends[:, None]).astype(np.float32))


def rows_of(texts: Sequence[tuple[Sequence[int], Sequence[int]]], most: int | None = None) -> Batch:
    """Returns a batch with one pair (prompt, continuation) per row. Only continuation tokens have loss weight 1.

    Rows are padded to a multiple of 16 tokens, but to at most `most` tokens, so that batches of similar lengths share
    one compiled program.
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
    """The log-probability of each target of a batch, and whether each target is the most likely token.

    Attributes:
        log_probs: log-probability of each target, [n, T].
        top1: whether each target is the most likely token (argmax), [n, T].
    """

    log_probs: np.ndarray
    top1: np.ndarray


def score(params: Params, cfg: ModelConfig, batch: Batch) -> Scored:
    """Computes the log-probability of every target of a batch.

    The rows of the batch are processed in chunks, so that the logits of a chunk take at most `CHUNK_BYTES` bytes.
    """
    size = max(1, CHUNK_BYTES // (4 * batch.tokens.shape[1] * cfg.vocab_size))
    return Scored(*in_chunks(lambda chunk: _score(params, chunk, cfg), batch, size))


@partial(jax.jit, static_argnums=2)
def _score(params: Params, batch: Batch, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    logits = forward(params, batch.tokens, cfg)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return picked - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == batch.targets


def continuations(scored: Scored, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-probability of each row's continuation, and whether greedy decoding produces the continuation.

    The function runs no decoding, because greedy decoding produces a continuation if and only if each token of the
    continuation is the most likely token (argmax) given the preceding tokens.

    Returns:
        (log-probabilities [n], whether greedy decoding produces the continuation [n] bool).
    """
    counts = batch.weights > 0
    return np.where(counts, scored.log_probs, 0).sum(1), (scored.top1 | ~counts).all(1)


def truncate_prompt(prompt: Sequence[int], continuation: Sequence[int], cfg: ModelConfig) -> Sequence[int]:
    """Returns the last tokens of a prompt: as many tokens as fit into the context together with the continuation."""
    max_prompt = cfg.context_length + 1 - len(continuation)
    if max_prompt < 1:
        raise UserError(f"{len(continuation)} tokens to predict do not fit into a context of {cfg.context_length}")
    return prompt[-max_prompt:]


def rank(value: float, others: np.ndarray) -> float:
    """Returns the empirical p-value of `value` among `others`.

    The empirical p-value is (1 + number of others that are at least `value`) / (1 + number of others).
    """
    return float((1 + (others >= value).sum()) / (1 + len(others)))
