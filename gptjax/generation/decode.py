"""Autoregressive decoding: the prompts are read once, then one token a turn, inside one compiled loop.

    generate   prompts -> new tokens
    complete   the same with log-probabilities and the reason for ending, several samples a prompt
    stream     the same again, a few tokens at a time as they come

Rows never touch each other: a row of a ragged batch gets what it would get alone. Sizes are rounded up to buckets
(16, 24, 32, 48, 64, ..), so that prompts of other lengths find the compiled programs again; `programs()` counts them.

When a row's context is full, the last half of it is read again as a new context from position 0, and decoding goes
on: a token never sees more than `cfg.context_length` tokens, and never fewer than half of that once so many exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation.sampling import Sampler, greedy
from gptjax.generation.text import Until
from gptjax.model.activations import Patches, Placed, place
from gptjax.model.cache import Cache, init_cache
from gptjax.model.gpt import extend_backbone, for_decoding, lm_logits, refuse_classifier
from gptjax.ops import device
from gptjax.types import Params

_WATCH = 8  # tokens between two questions to `until`
_COPIED_BYTES = 2**30  # of parameters that a GPU lays out anew at each call, however full it is
_LONG = 256  # a prompt from which on reading it quickly is worth compiling every layer by itself


class Completion(NamedTuple):
    """One continuation.

    tokens    the new tokens, without the stop token
    logprobs  of each under the model itself, before any filter; empty unless asked for
    top       for each token the likeliest k as (id, log-probability); empty unless asked for
    finish    "stop" (one of the stop tokens came, or `until` said so) or "length"
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: Literal["stop", "length"]


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: ModelConfig,
    *,
    max_new_tokens: int,
    key: jax.Array,
    sampler: Sampler = greedy,
    stop: Sequence[int] = (),
    until: Until | None = None,
    vocab_size: int | None = None,
    cache_dtype: DTypeLike | None = None,
    patches: Patches | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens, or until one of `stop`.

    Args:
        prompts: token ids, at least one in each; of one longer than the context the end counts.
        sampler: (logits [B, V], key) -> tokens [B].
        until: (a row's new tokens) -> whether they are enough, asked on the host every 8 tokens; the row ends with the
            token that made it true. `stop_strings` makes one.
        vocab_size: of the tokenizer; the model's further rows, which belong to no token, are never drawn. None: all may
            be.
        cache_dtype: float32, bfloat16 or int8, of the keys and values that are kept; None: as they are computed, see
            `init_cache`.
        patches: as `extend` takes them, at the prompt and at every new token, so whatever their number.

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or a model that is a classifier.
    """
    done = complete(
        params, prompts, cfg, max_new_tokens=max_new_tokens, key=key, sampler=sampler, stop=stop,
        until=until, vocab_size=vocab_size, cache_dtype=cache_dtype, patches=patches,
    )  # fmt: skip
    return [completion.tokens for completion in done]


def complete(
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: ModelConfig,
    *,
    max_new_tokens: int,
    key: jax.Array,
    sampler: Sampler = greedy,
    stop: Sequence[int] = (),
    until: Until | None = None,
    vocab_size: int | None = None,
    n: int = 1,
    logprobs: int | None = None,
    cache_dtype: DTypeLike | None = None,
    patches: Patches | None = None,
) -> list[Completion]:
    """`generate` with all there is to know about each continuation.

    Args:
        n: samples of each prompt, which is read once; those of the first prompt come first.
        logprobs: None, or how many of the likeliest tokens to give beside the chosen one's log-probability.
    """
    if max_new_tokens < 1 or not len(prompts):
        _check(prompts, cfg)
        return [Completion([], [], [], "length")] * (n * len(prompts))
    drawable = drawable_ids(vocab_size, cfg)
    run = _Run(params, prompts, cfg, max_new_tokens, key, sampler, stop, n, logprobs, drawable, cache_dtype, patches)
    drawn = 0
    while drawn < max_new_tokens and not run.done.all():
        drawn = max_new_tokens if until is None else min(drawn + _WATCH, max_new_tokens)
        run.advance(drawn)
        if until is not None:
            run.end_rows(until)
    return run.completions()


def stream(
    params: Params,
    prompt: Sequence[int],
    cfg: ModelConfig,
    *,
    max_new_tokens: int,
    key: jax.Array,
    sampler: Sampler = greedy,
    stop: Sequence[int] = (),
    until: Until | None = None,
    vocab_size: int | None = None,
    every: int = 1,
    cache_dtype: DTypeLike | None = None,
    patches: Patches | None = None,
) -> Iterator[list[int]]:
    """The tokens of `generate` for one prompt as they come, `every` at a time. Closing the iterator ends the work."""
    if max_new_tokens < 1:
        return
    drawable = drawable_ids(vocab_size, cfg)
    run = _Run(params, [prompt], cfg, max_new_tokens, key, sampler, stop, 1, None, drawable, cache_dtype, patches)
    given = 0
    while True:
        run.advance(min(given + every, max_new_tokens))
        if until is not None:
            run.end_rows(until)
        tokens, finished = run.so_far()
        if len(tokens) > given:
            yield tokens[given:]
        given = len(tokens)
        if finished or given >= max_new_tokens:
            return


def programs() -> int:
    """How many programs decoding has compiled in this process."""
    return _start._cache_size() + _decode_loop._cache_size()  # type: ignore[attr-defined]  # every jitted function has it


def bucket(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ..: at most half as much again is computed for nothing."""
    power = max(16, 1 << (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > 16 else power


def stop_array(stop: Sequence[int]) -> jax.Array:
    """Filled up with ids that no token has, so that there are few different shapes."""
    return jnp.array([*stop, *[-1] * (-len(stop) % 8)], jnp.int32)


def drawable_ids(vocab_size: int | None, cfg: ModelConfig) -> int:
    """How many ids may be drawn: the tokenizer's, which are the first of the model's rows."""
    if vocab_size is None:
        return cfg.vocab_size
    if vocab_size < 1:
        raise UserError(f"vocab_size={vocab_size}: expected the number of tokens of the model's tokenizer, at least 1")
    return min(vocab_size, cfg.vocab_size)


def _check(prompts: Sequence[Sequence[int]], cfg: ModelConfig) -> None:
    refuse_classifier(cfg)
    if isinstance(prompts, str) or hasattr(prompts, "dtype") or any(isinstance(p, str | int) for p in prompts):
        raise UserError(
            f"prompts: expected lists of token ids, one per prompt, got {type(prompts).__name__}: "
            "[tokenizer.encode(text)], or array.tolist()"
        )
    for i, prompt in enumerate(prompts):
        bad = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        if not len(prompt) or bad:
            what = f"has ids outside 0..{cfg.vocab_size - 1}: {bad[:5]}" if len(prompt) else "is empty"
            raise UserError(f"prompt {i} {what}; give at least one token of this model's tokenizer")


def right_padded(prompts: Sequence[Sequence[int]], cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, P] int32 with P a bucket, and lengths [B]; of a prompt longer than the context its end.

    Raises:
        UserError: an empty prompt, or an id outside the vocabulary.
    """
    _check(prompts, cfg)
    lengths = np.array([min(len(prompt), cfg.context_length) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(bucket(int(np.max(lengths))), cfg.context_length)), np.int32)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens[row, :length] = prompt[-length:]
    return tokens, lengths


class _State(NamedTuple):
    tokens: jax.Array  # [B, width] int32: the prompt, what was added, then nothing
    end: jax.Array  # [B] int32: where it ends; the token before has not been read yet
    i: jax.Array  # int32: tokens drawn
    done: jax.Array  # [B] bool: a stop token came
    cache: Cache
    seen: jax.Array | None  # [B, drawable] bool: tokens so far, for samplers that look at them
    logprobs: jax.Array | None  # [B, N] float32
    top: tuple[jax.Array, jax.Array] | None  # ids and log-probabilities [B, N, k]


class _Settings(NamedTuple):
    """What the compiled programs are made for."""

    cfg: ModelConfig
    sampler: Sampler
    width: int  # of prompt and new tokens
    max_new: int  # N, for new tokens
    n: int
    logprobs: int | None
    drawable: int  # the first so many rows of the vocabulary are tokens
    cache_dtype: str | None

    @property
    def slots(self) -> int:
        """Of the cache."""
        return min(self.width, self.cfg.context_length)


class _Run:
    """One call's state between compiled stretches."""

    def __init__(
        self, params: Params, prompts: Sequence[Sequence[int]], cfg: ModelConfig, max_new_tokens: int, key: jax.Array,
        sampler: Sampler, stop: Sequence[int], n: int, logprobs: int | None, drawable: int,
        cache_dtype: DTypeLike | None, patches: Patches | None,
    ):  # fmt: skip
        tokens, self.start = right_padded(prompts, cfg)
        self.start = np.repeat(self.start, n)
        max_new = bucket(max_new_tokens)
        width = 1 << (tokens.shape[1] + max_new - 1).bit_length()  # few sizes: the loop is what compiles longest
        top = None if logprobs is None else min(logprobs, drawable)
        self.settings = _Settings(
            cfg, sampler, width, max_new, n, top, drawable, None if cache_dtype is None else jnp.dtype(cache_dtype).name
        )
        both = for_decoding(params, cfg) if has_room(params) else params
        stacked = {name: leaf for name, leaf in both.items() if not name.startswith("blocks_")}
        self.params = both if tokens.shape[1] >= _LONG or "blocks" not in both else stacked
        self.decode_params, self.key, self.patches = both, key, place(patches, cfg)
        self.stop = stop_array(stop)
        self.done = np.zeros(len(self.start), bool)  # rows that `until` need not be asked about any more
        self.checked = np.zeros(len(self.start), int)  # new tokens of each row that it has been asked about
        lengths = jnp.array(self.start[::n])
        self.state = _start(self.params, tokens, lengths, key, self.stop, self.settings, self.patches)

    def advance(self, upto: int) -> None:
        """Until `upto` tokens have been drawn in all, or every row has met its stop."""
        self.state = _decode_loop(
            self.params, self.decode_params, self.state, self.key, self.stop, jnp.int32(upto), self.settings,
            self.patches,
        )  # fmt: skip

    def end_rows(self, until: Until) -> None:
        """A row ends with the first token of which `until` is true."""
        tokens, before, done = jax.device_get((self.state.tokens, self.state.end, self.state.done))
        end, done = before.copy(), done.copy()
        for row in np.flatnonzero(~self.done):
            new = tokens[row, self.start[row] : end[row]].tolist()
            sizes = range(self.checked[row] + 1, len(new) + 1)
            enough = next((size for size in sizes if until(new[:size])), None)
            if enough is not None:
                end[row], done[row] = self.start[row] + enough, True
            self.checked[row] = len(new)
        self.done = done
        # added to what lies on the devices, whose placement stays: the compiled loop is found again
        back = jnp.asarray(end - before)
        self.state = self.state._replace(end=self.state.end + back, done=self.state.done | jnp.asarray(done))

    def so_far(self) -> tuple[list[int], bool]:
        """The new tokens of the first row, and whether it has ended."""
        tokens, end, done = jax.device_get((self.state.tokens[0], self.state.end[0], self.state.done[0]))
        return tokens[self.start[0] : end].tolist(), bool(done)

    def completions(self) -> list[Completion]:
        s = jax.device_get(self.state._replace(cache=None, seen=None))
        out = []
        for row, (first, end) in enumerate(zip(self.start, s.end, strict=True)):
            size = end - first
            logprobs = [] if s.logprobs is None else s.logprobs[row, :size].tolist()
            top = []
            if s.top is not None and self.settings.logprobs:
                ids, values = (a[row, :size].tolist() for a in s.top)
                top = [list(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
            tokens = s.tokens[row, first:end].tolist()
            out.append(Completion(tokens, logprobs, top, "stop" if s.done[row] else "length"))
        return out


def has_room(params: Params) -> bool:
    """Whether what `for_decoding` makes of them fits beside them."""
    if device.platform() != "gpu":
        return True
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= max(_COPIED_BYTES, 0.7 * free)


@partial(jax.jit, static_argnums=5)
def _start(
    params: Params, prompt: jax.Array, lengths: jax.Array, key: jax.Array, stop: jax.Array, settings: _Settings,
    patches: Placed,
) -> _State:  # fmt: skip
    """The prompts are read, and the first token of each row is drawn."""
    cfg, n = settings.cfg, settings.n
    rolled = dataclasses.replace(cfg, unroll=False)
    cache = init_cache(cfg, len(prompt), settings.slots, settings.cache_dtype)
    logits, cache = read_prompts(params, prompt, rolled, cache, lengths, patches)
    logits, prompt, lengths = (jnp.repeat(a, n, 0) for a in (logits, prompt, lengths))
    cache = jax.tree.map(lambda a: jnp.repeat(a, n, 1 if a.ndim == 5 else 0), cache)
    B, N = len(prompt), settings.max_new
    seen = None
    if getattr(settings.sampler, "history", False):
        real = jnp.arange(prompt.shape[1]) < lengths[:, None]
        seen = (
            jnp.zeros((B, settings.drawable), jnp.int32).at[jnp.arange(B)[:, None], prompt].max(real, mode="drop") > 0
        )
    logprobs = top = None
    if settings.logprobs is not None:
        logprobs = jnp.zeros((B, N))
        top = jnp.zeros((B, N, settings.logprobs), jnp.int32), jnp.zeros((B, N, settings.logprobs))
    state = _State(
        tokens=jnp.pad(prompt, ((0, 0), (0, settings.width - prompt.shape[1]))),
        end=lengths,
        i=jnp.int32(0),
        done=jnp.zeros(B, bool),
        cache=cache,
        seen=seen,
        logprobs=logprobs,
        top=top,
    )
    return _draw(state, logits, key, stop, settings)


@partial(jax.jit, static_argnums=6, donate_argnums=2)
def _decode_loop(
    params: Params, decode_params: Params, state: _State, key: jax.Array, stop: jax.Array, upto: jax.Array,
    settings: _Settings, patches: Placed,
) -> _State:  # fmt: skip
    """Tokens are read and drawn until there are `upto` of them; `decode_params` is `params` laid out for one token."""

    def body(state: _State) -> _State:
        logits, cache = _next_logits(params, decode_params, state, settings, patches)
        return _draw(state._replace(cache=cache), logits, key, stop, settings)

    return jax.lax.while_loop(lambda state: (state.i < upto) & ~state.done.all(), body, state)


def read_prompts(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, lengths: jax.Array,
    patches: Placed | Patches | None = None,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Logits [B, V] after the last real token of each row."""
    hidden, cache = extend_backbone(params, tokens, cfg, cache, lengths=lengths, patches=patches)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, 1)[:, 0]
    return lm_logits(params, last, cfg), cache


def _next_logits(
    params: Params, decode_params: Params, state: _State, settings: _Settings, patches: Placed
) -> tuple[jax.Array, Cache]:
    """The token that was drawn last is read; where the context is full, its last half is, from the beginning."""
    cfg, cache = settings.cfg, state.cache
    full = (cache.length >= settings.slots) & ~state.done

    def one_more() -> tuple[jax.Array, Cache]:
        token = jnp.take_along_axis(state.tokens, state.end[:, None] - 1, 1)
        lengths = (~state.done).astype(jnp.int32)
        hidden, after = extend_backbone(decode_params, token, cfg, cache, lengths=lengths, patches=patches)
        return lm_logits(decode_params, hidden[:, 0], cfg), after

    def refill() -> tuple[jax.Array, Cache]:
        half = max(settings.slots // 2, 1)
        rolled = dataclasses.replace(cfg, unroll=False)
        window = jax.vmap(lambda row, end: jax.lax.dynamic_slice_in_dim(row, end - half, half))(state.tokens, state.end)
        fresh = init_cache(cfg, len(window), settings.slots, settings.cache_dtype)
        logits, fresh = read_prompts(params, window, rolled, fresh, jnp.full(len(window), half), patches)
        others, after = one_more()

        def pick(a: jax.Array, b: jax.Array) -> jax.Array:
            rows = full.reshape(-1, *[1] * 3) if a.ndim == 5 else full.reshape(-1, *[1] * (a.ndim - 1))
            return jnp.where(rows, a, b)

        return pick(logits, others), jax.tree.map(pick, fresh, after)

    if settings.slots < cfg.context_length:  # the cache is as large as all there will be
        return one_more()
    return jax.lax.cond(full.any(), refill, one_more)


def _draw(state: _State, logits: jax.Array, key: jax.Array, stop: jax.Array, settings: _Settings) -> _State:
    """The sampler's token for each row, put behind its others."""
    rows = jnp.arange(len(logits))
    look = (state.seen,) if state.seen is not None else ()
    allowed = logits[:, : settings.drawable]
    token = settings.sampler(allowed, jax.random.fold_in(key, state.i), *look).astype(jnp.int32)
    done = state.done | (token[:, None] == stop).any(-1)
    state = state._replace(
        tokens=state.tokens.at[rows, jnp.where(done, state.tokens.shape[1], state.end)].set(token, mode="drop"),
        end=state.end + ~done,
        i=state.i + 1,
        done=done,
    )
    if state.seen is not None:
        state = state._replace(seen=state.seen.at[rows, token].set(True))
    if state.logprobs is not None and state.top is not None:
        logp = jax.nn.log_softmax(logits)
        values, ids = jax.lax.top_k(logp[:, : settings.drawable], state.top[0].shape[-1])
        state = state._replace(
            logprobs=state.logprobs.at[:, state.i - 1].set(logp[rows, token]),
            top=(state.top[0].at[:, state.i - 1].set(ids), state.top[1].at[:, state.i - 1].set(values)),
        )
    return state
