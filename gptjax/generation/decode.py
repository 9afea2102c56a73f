"""Autoregressive decoding: one prefill, then one token a turn, all inside one compiled loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.generation.sampling import Sampler, greedy
from gptjax.model.cache import Cache, init_cache
from gptjax.model.gpt import extend
from gptjax.types import Params, UserError


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: ModelConfig,
    *,
    max_new_tokens: int,
    key: jax.Array,
    sampler: Sampler = greedy,
    stop: Sequence[int] = (),
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens, or until one of `stop`.

    Prompts may differ in length; until the context is full every row gets what it would get alone under a greedy
    sampler. Then the last half of it is read again as a new context, from position 0, and decoding goes on: a token
    never sees more than `cfg.context_length` tokens, and never fewer than half of that once so many exist. The rows
    share their slots, padding and all, so a shorter prompt is cut sooner beside a longer one than alone.

    Args:
        prompts: token ids, at least one in each.
        sampler: (logits [B, V], key) -> tokens [B].

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        UserError: an empty prompt, or an id outside the vocabulary.
    """
    for i, prompt in enumerate(prompts):
        bad = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        if not len(prompt) or bad:
            what = f"has ids outside 0..{cfg.vocab_size - 1}: {bad[:5]}" if len(prompt) else "is empty"
            raise UserError(f"prompt {i} {what}; give at least one token of this model's tokenizer")
    if max_new_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    width = min(max(map(len, prompts)), cfg.context_length)
    tokens = np.zeros((len(prompts), width), np.int32)
    valid = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tail = prompt[-width:]
        tokens[row, width - len(tail) :], valid[row, width - len(tail) :] = tail, True
    out, length = jax.device_get(
        _decode(params, tokens, valid, key, jnp.array(stop, jnp.int32), cfg, max_new_tokens, sampler)
    )
    return [row[:n].tolist() for row, n in zip(out, length, strict=True)]


class _Turn(NamedTuple):
    i: jax.Array
    logits: jax.Array  # [B, V] after the last token
    cache: Cache
    tokens: jax.Array  # [B, P + N] prompt and what was added
    done: jax.Array  # [B]
    length: jax.Array  # [B] new tokens before the stop


@partial(jax.jit, static_argnums=(5, 6, 7))
def _decode(params, prompt, valid, key, stop, cfg, max_new_tokens, sampler):
    B, P = prompt.shape
    slots = min(cfg.context_length, P + max_new_tokens)
    half = max(slots // 2, 1)
    rolled = dataclasses.replace(cfg, unroll=False)  # reading many tokens at once is rare: compile it quickly
    logits, cache = extend(params, prompt, rolled, init_cache(cfg, B, slots), valid=valid)
    tokens = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))
    real = jnp.pad(valid, ((0, 0), (0, max_new_tokens)), constant_values=True)

    def advance(turn: _Turn, end: jax.Array) -> tuple[jax.Array, Cache]:
        """Logits and cache once the token before `end` is read, in a fresh context where the old one is full."""

        def again():
            window = [jax.lax.dynamic_slice_in_dim(a, end - half, half, 1) for a in (turn.tokens, real)]
            logits, cache = extend(params, window[0], rolled, init_cache(cfg, B, slots), valid=window[1])
            return logits[:, -1], cache

        def next_token():
            token = jax.lax.dynamic_slice_in_dim(turn.tokens, end - 1, 1, 1)
            logits, cache = extend(params, token, cfg, turn.cache)
            return logits[:, -1], cache

        return jax.lax.cond(turn.cache.length >= slots, again, next_token)

    def body(turn: _Turn) -> _Turn:
        token = sampler(turn.logits, jax.random.fold_in(key, turn.i)).astype(jnp.int32)
        done = turn.done | (token[:, None] == stop).any(-1)
        turn = turn._replace(
            tokens=jax.lax.dynamic_update_slice_in_dim(turn.tokens, token[:, None], P + turn.i, 1),
            done=done,
            length=turn.length + ~done,
        )
        logits, cache = advance(turn, P + turn.i + 1)
        return turn._replace(i=turn.i + 1, logits=logits, cache=cache)

    start = _Turn(jnp.int32(0), logits[:, -1], cache, tokens, jnp.zeros(B, bool), jnp.zeros(B, jnp.int32))
    end = jax.lax.while_loop(lambda turn: (turn.i < max_new_tokens) & ~turn.done.all(), body, start)
    return end.tokens[:, P:], end.length
