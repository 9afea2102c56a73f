"""Autoregressive decoding with a KV cache: one prefill of the prompts, then one token per step in a compiled loop.

    generate   returns the new tokens of each prompt
    complete   returns the same, with log-probabilities, finish reasons and several samples per prompt
    stream     yields the new tokens of one prompt while they are generated

The rows of a batch are independent: a prompt gets the same tokens in a batch as in a call with this prompt alone, even
if the prompts of the batch differ in length. The lengths of prompts and continuations are rounded up to a bucket size
(16, 24, 32, 48, 64, ..), so that prompts of different lengths reuse the same compiled programs; `programs()` returns
the number of compiled programs.

When the KV cache of a row is full, the last half of the row's context is prefilled again from position 0, and decoding
continues. After the KV cache of a row has been refilled, each new token depends on the last `cfg.context_length` / 2 to
`cfg.context_length` tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptjax._moved import moved_name
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation.sampling import Sampler, greedy
from gptjax.generation.text import Until
from gptjax.model.activations import Patches, Placed, place
from gptjax.model.cache import Cache, init_cache
from gptjax.model.gpt import extend_backbone, for_decoding, lm_logits, refuse_classifier
from gptjax.ops import device
from gptjax.types import Params

_UNTIL_EVERY = 8  # Number of new tokens per row between two checks with `until`.
_COPIED_BYTES = 2**30  # Parameters of up to this size in bytes are always copied into the decoding layout on a GPU.
# Minimum prompt length in tokens for which prefill is unrolled, which runs faster but compiles more slowly.
_LONG_PROMPT = 256


class Completion(NamedTuple):
    """One continuation of a prompt.

    tokens: The new tokens, without the stop token.
    logprobs: Log-probability of each new token under the model, before any filter; empty unless log-probabilities were
      requested.
    top: The k most likely tokens at each position, as pairs (id, log-probability); empty unless log-probabilities were
      requested.
    finish: The value "stop" if a stop token was drawn or `until` returned True, otherwise "length".
    end: The stop token that was drawn, and its log-probability (NaN unless log-probabilities were requested); None if
      no stop token was drawn.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: Literal["stop", "length"]
    end: tuple[int, float] | None = None


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
    """Generates up to `max_new_tokens` tokens after each prompt, ending a row at any token in `stop`.

    Args:
        prompts: for each prompt, its token ids, at least one. A prompt longer than the context is truncated from the
            left, so that only its last tokens are used.
        sampler: function that takes logits [B, V] and a key, and returns tokens [B]; either from
            `gptjax.generation.sampling` or your own.
        until: function that takes the list of a row's new tokens so far, and returns True to end the row there; see
            `stop_strings`. After every 8 decoding steps, the function is called on the host once per new token of each
            row that has not ended.
        vocab_size: size of the tokenizer's vocabulary; ids >= vocab_size (padding rows of the embedding) are not drawn.
            If `vocab_size` is None, every id of the model may be drawn.
        cache_dtype: dtype of the KV cache: float32, bfloat16 or int8, or None for the dtype that keys and values are
            computed in (see `init_cache`).
        patches: activation patches, applied to the tokens of the prompt and to every new token. Maps paths of
            activations to their patches, as in `gptjax.model.gpt.backbone`.

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        UserError: a prompt is empty or has an id outside the vocabulary, or the model is a classifier.
    """
    completions = complete(
        params, prompts, cfg, max_new_tokens=max_new_tokens, key=key, sampler=sampler, stop=stop,
        until=until, vocab_size=vocab_size, cache_dtype=cache_dtype, patches=patches,
    )  # fmt: skip
    return [completion.tokens for completion in completions]


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
    logprobs_temperature: float = 1.0,
    cache_dtype: DTypeLike | None = None,
    patches: Patches | None = None,
) -> list[Completion]:
    """Generates tokens like `generate`, and also returns log-probabilities, finish reasons and several samples per
    prompt.

    Args:
        n: number of samples per prompt. Each prompt is prefilled once; its n samples are adjacent in the result.
        logprobs: number k of most likely tokens to return at each position, with their log-probabilities, in addition
            to the log-probability of the drawn token. None: no log-probabilities are returned.
        logprobs_temperature: temperature by which the logits are divided for all log-probabilities. With the sampler's
            temperature, they are those of the distribution that tokens are drawn from.

    The arguments that are not listed here are the same as for `generate`.
    """
    if max_new_tokens < 1 or not len(prompts):
        _check(prompts, cfg)
        return [Completion([], [], [], "length")] * (n * len(prompts))
    drawable = drawable_ids(vocab_size, cfg)
    run = _Run(
        params, prompts, cfg, max_new_tokens, key, sampler, stop, n, logprobs, drawable, cache_dtype, patches,
        logprobs_temperature,
    )  # fmt: skip
    requested = 0
    while requested < max_new_tokens and not run.done.all():
        requested = max_new_tokens if until is None else min(requested + _UNTIL_EVERY, max_new_tokens)
        run.advance(requested)
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
    """Yields the tokens that `generate` returns for one prompt, in lists of `every` tokens; the last list may be
    shorter.

    Closing the iterator stops decoding.
    """
    if max_new_tokens < 1:
        return
    drawable = drawable_ids(vocab_size, cfg)
    run = _Run(params, [prompt], cfg, max_new_tokens, key, sampler, stop, 1, None, drawable, cache_dtype, patches)
    yielded = 0
    while True:
        run.advance(min(yielded + every, max_new_tokens))
        if until is not None:
            run.end_rows(until)
        tokens, finished = run.first_row()
        if len(tokens) > yielded:
            yield tokens[yielded:]
        yielded = len(tokens)
        if finished or yielded >= max_new_tokens:
            return


def programs() -> int:
    """Returns the number of XLA programs that have been compiled for decoding in this process."""
    return _start._cache_size() + _decode_loop._cache_size()  # type: ignore[attr-defined]


def bucket(size: int) -> int:
    """Rounds `size` up to the next number in 16, 24, 32, 48, 64, 96, ..; for `size` >= 16 the result is less than 1.5 *
    `size`."""
    power = max(16, 1 << (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > 16 else power


def stop_array(stop: Sequence[int]) -> jax.Array:
    """Returns the ids of the stop tokens as an int32 array, padded with -1 to a multiple of 8, so that few shapes have
    to be compiled."""
    return jnp.array([*stop, *[-1] * (-len(stop) % 8)], jnp.int32)


def drawable_ids(vocab_size: int | None, cfg: ModelConfig) -> int:
    """Returns the number n of token ids that may be sampled, which are the ids 0 to n - 1. If `vocab_size` is None, all
    ids of the model may be sampled."""
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
        invalid = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        if not len(prompt) or invalid:
            problem = f"has ids outside 0..{cfg.vocab_size - 1}: {invalid[:5]}" if len(prompt) else "is empty"
            raise UserError(f"prompt {i} {problem}; give at least one token of this model's tokenizer")


def right_padded(prompts: Sequence[Sequence[int]], cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts padded on the right, [B, P] int32, and their lengths [B].

    The width P is the length of the longest prompt, rounded up by `bucket`, but at most the context length. A prompt
    that is longer than the context is truncated from the left, so that only its last tokens are used.

    Raises:
        UserError: a prompt is empty or has an id outside the vocabulary, or the model is a classifier.
    """
    _check(prompts, cfg)
    lengths = np.array([min(len(prompt), cfg.context_length) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(bucket(int(np.max(lengths))), cfg.context_length)), np.int32)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens[row, :length] = prompt[-length:]
    return tokens, lengths


class _State(NamedTuple):
    tokens: jax.Array  # Token ids of each row, [B, width] int32: the prompt, the new tokens, and padding.
    end: jax.Array  # Number of tokens in each row, [B] int32; the last token of a row is not in the cache yet.
    i: jax.Array  # Number of completed decoding steps, int32.
    done: jax.Array  # True for each row that has ended, for example at a stop token, [B] bool.
    cache: Cache
    # True for each token id that the row contains, [B, drawable] bool; None if the sampler does not depend on earlier
    # tokens.
    seen: jax.Array | None
    stopped: jax.Array  # Id of the stop token that ended the row, [B] int32; -1 if there is none.
    logprobs: jax.Array | None  # Log-probabilities of the new tokens, [B, N] float32.
    top: tuple[jax.Array, jax.Array] | None  # Ids and log-probabilities of the k most likely tokens, [B, N, k].


class _Settings(NamedTuple):
    """Static arguments of the jitted functions `_start` and `_decode_loop`, which jax compiles again for each new
    value."""

    cfg: ModelConfig
    sampler: Sampler
    width: int  # Maximum number of tokens per row, for prompt and new tokens together.
    max_new: int  # Maximum number N of new tokens per row.
    n: int  # Number of samples per prompt.
    logprobs: int | None
    drawable: int  # Number of token ids that may be drawn, see `drawable_ids`.
    cache_dtype: str | None
    temperature: float = 1.0  # Temperature of the returned log-probabilities.

    @property
    def slots(self) -> int:
        """The capacity of the KV cache, in tokens per row."""
        return min(self.width, self.cfg.context_length)


class _Run:
    """The state of a call of `complete` or `stream` between two runs of the compiled decoding loop."""

    def __init__(
        self, params: Params, prompts: Sequence[Sequence[int]], cfg: ModelConfig, max_new_tokens: int, key: jax.Array,
        sampler: Sampler, stop: Sequence[int], n: int, logprobs: int | None, drawable: int,
        cache_dtype: DTypeLike | None, patches: Patches | None, temperature: float = 1.0,
    ):  # fmt: skip
        tokens, self.start = right_padded(prompts, cfg)
        self.start = np.repeat(self.start, n)
        max_new = bucket(max_new_tokens)
        # The width of the array of token ids is rounded up to a power of two, so that the decoding loop, which compiles
        # slowly, is compiled for few widths.
        width = 1 << (tokens.shape[1] + max_new - 1).bit_length()
        top = None if logprobs is None else min(logprobs, drawable)
        self.settings = _Settings(
            cfg, sampler, width, max_new, n, top, drawable,
            None if cache_dtype is None else jnp.dtype(cache_dtype).name, temperature,
        )  # fmt: skip
        decode_params = for_decoding(params, cfg) if has_room(params) else params
        stacked = {name: leaf for name, leaf in decode_params.items() if not name.startswith("blocks_")}
        unrolled = tokens.shape[1] >= _LONG_PROMPT or "blocks" not in decode_params
        self.params = decode_params if unrolled else stacked
        self.decode_params, self.key, self.patches = decode_params, key, place(patches, cfg)
        self.stop = stop_array(stop)
        # True for each finished row, for which `until` is not called again.
        self.done = np.zeros(len(self.start), bool)
        self.checked = np.zeros(len(self.start), int)  # Number of new tokens per row for which `until` was called.
        lengths = jnp.array(self.start[::n])
        self.state = _start(self.params, tokens, lengths, key, self.stop, self.settings, self.patches)

    def advance(self, upto: int) -> None:
        """Decodes until `upto` tokens per row have been drawn, or every row has stopped."""
        self.state = _decode_loop(
            self.params, self.decode_params, self.state, self.key, self.stop, jnp.int32(upto), self.settings,
            self.patches,
        )  # fmt: skip

    def end_rows(self, until: Until) -> None:
        """Truncates each row after the first new token for which `until` returns True, and marks the row as done."""
        tokens, before, done = jax.device_get((self.state.tokens, self.state.end, self.state.done))
        end, done, ended = before.copy(), done.copy(), np.zeros(len(done), bool)
        for row in np.flatnonzero(~self.done):
            new = tokens[row, self.start[row] : end[row]].tolist()
            sizes = range(self.checked[row] + 1, len(new) + 1)
            stop_size = next((size for size in sizes if until(new[:size])), None)
            if stop_size is not None:
                end[row], done[row], ended[row] = self.start[row] + stop_size, True, True
            self.checked[row] = len(new)
        self.done = done
        # The decoding state is updated on the device to keep its sharding, because a different sharding would recompile
        # the decoding loop.
        removed = jnp.asarray(end - before)
        self.state = self.state._replace(
            end=self.state.end + removed,
            done=self.state.done | jnp.asarray(done),
            stopped=jnp.where(jnp.asarray(ended), -1, self.state.stopped),
        )

    def first_row(self) -> tuple[list[int], bool]:
        """Returns the new tokens of the first row, and whether the row has ended."""
        tokens, end, done = jax.device_get((self.state.tokens[0], self.state.end[0], self.state.done[0]))
        return tokens[self.start[0] : end].tolist(), bool(done)

    def completions(self) -> list[Completion]:
        state = jax.device_get(self.state._replace(cache=None, seen=None))
        out = []
        for row, (start, end) in enumerate(zip(self.start, state.end, strict=True)):
            size = end - start
            logprobs = [] if state.logprobs is None else state.logprobs[row, :size].tolist()
            top = []
            if state.top is not None and self.settings.logprobs:
                ids, values = (a[row, :size].tolist() for a in state.top)
                top = [list(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
            tokens, stop_id = state.tokens[row, start:end].tolist(), int(state.stopped[row])
            stop_logprob = math.nan if state.logprobs is None or stop_id < 0 else float(state.logprobs[row, size])
            finish: Literal["stop", "length"] = "stop" if state.done[row] else "length"
            out.append(Completion(tokens, logprobs, top, finish, None if stop_id < 0 else (stop_id, stop_logprob)))
        return out


def has_room(params: Params) -> bool:
    """Returns True if device memory has room for a second copy of the parameters, which `for_decoding` makes.

    On a GPU, a copy of up to 1 GiB is assumed to fit, and a larger copy is assumed to fit if it takes at most 70 % of
    the free memory. On a CPU or TPU, `has_room` always returns True.
    """
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
    """Prefills the prompts and draws the first token of each row."""
    cfg, n = settings.cfg, settings.n
    rolled = dataclasses.replace(cfg, unroll=False)
    cache = init_cache(cfg, len(prompt), settings.slots, settings.cache_dtype)
    logits, cache = prefill(params, prompt, rolled, cache, lengths, patches)
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
        stopped=jnp.full(B, -1, jnp.int32),
        logprobs=logprobs,
        top=top,
    )
    return _draw(state, logits, key, stop, settings)


@partial(jax.jit, static_argnums=6, donate_argnums=2)
def _decode_loop(
    params: Params, decode_params: Params, state: _State, key: jax.Array, stop: jax.Array, upto: jax.Array,
    settings: _Settings, patches: Placed,
) -> _State:  # fmt: skip
    """Runs decoding steps until `upto` steps are done or all rows have ended, and returns the new state.

    Decoding steps use `decode_params`, which is the result of `for_decoding`, or the original parameters if device
    memory is too small for a copy (see `has_room`). `params` are used to refill the KV cache of a row whose context is
    full.
    """

    def body(state: _State) -> _State:
        logits, cache = _next_logits(params, decode_params, state, settings, patches)
        return _draw(state._replace(cache=cache), logits, key, stop, settings)

    return jax.lax.while_loop(lambda state: (state.i < upto) & ~state.done.all(), body, state)


def prefill(
    params: Params, tokens: jax.Array, cfg: ModelConfig, cache: Cache, lengths: jax.Array,
    patches: Placed | Patches | None = None,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Fills the KV cache with right-padded prompts [B, P], and returns the logits [B, V] after each row's last token,
    and the filled cache."""
    hidden, cache = extend_backbone(params, tokens, cfg, cache, lengths=lengths, patches=patches)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, 1)[:, 0]
    return lm_logits(params, last, cfg), cache


def _next_logits(
    params: Params, decode_params: Params, state: _State, settings: _Settings, patches: Placed
) -> tuple[jax.Array, Cache]:
    """Returns the logits [B, V] after the last token of each row, and the new KV cache.

    If the context of a row is full, the KV cache of this row is filled again with the last half of the context.
    """
    cfg, cache = settings.cfg, state.cache
    full = (cache.length >= settings.slots) & ~state.done

    def decode_step() -> tuple[jax.Array, Cache]:
        token = jnp.take_along_axis(state.tokens, state.end[:, None] - 1, 1)
        lengths = (~state.done).astype(jnp.int32)
        hidden, new_cache = extend_backbone(decode_params, token, cfg, cache, lengths=lengths, patches=patches)
        return lm_logits(decode_params, hidden[:, 0], cfg), new_cache

    def refill() -> tuple[jax.Array, Cache]:
        half = max(settings.slots // 2, 1)
        rolled = dataclasses.replace(cfg, unroll=False)
        window = jax.vmap(lambda row, end: jax.lax.dynamic_slice_in_dim(row, end - half, half))(state.tokens, state.end)
        fresh = init_cache(cfg, len(window), settings.slots, settings.cache_dtype)
        logits, fresh = prefill(params, window, rolled, fresh, jnp.full(len(window), half), patches)
        step_logits, step_cache = decode_step()

        def select(refilled: jax.Array, stepped: jax.Array) -> jax.Array:
            # `ndim` is the number of axes after the batch axis B, over which the mask `full` [B] is broadcast. Arrays
            # of the KV cache with five axes are stacked over layers, [L, B, ..]; in all other arrays the batch axis B
            # is the first axis.
            ndim = 3 if refilled.ndim == 5 else refilled.ndim - 1
            return jnp.where(full.reshape(-1, *[1] * ndim), refilled, stepped)

        return select(logits, step_logits), jax.tree.map(select, fresh, step_cache)

    # the KV cache is never full, because it has room for all tokens of the call
    if settings.slots < cfg.context_length:
        return decode_step()
    return jax.lax.cond(full.any(), refill, decode_step)


def _draw(state: _State, logits: jax.Array, key: jax.Array, stop: jax.Array, settings: _Settings) -> _State:
    """Draws a token for each row, and appends the token to the row unless the row has ended or the token is a stop
    token."""
    rows = jnp.arange(len(logits))
    history = (state.seen,) if state.seen is not None else ()
    allowed = logits[:, : settings.drawable]
    token = settings.sampler(allowed, jax.random.fold_in(key, state.i), *history).astype(jnp.int32)
    ends = ~state.done & (token[:, None] == stop).any(-1)
    done = state.done | ends
    state = state._replace(
        tokens=state.tokens.at[rows, jnp.where(done, state.tokens.shape[1], state.end)].set(token, mode="drop"),
        end=state.end + ~done,
        i=state.i + 1,
        done=done,
        stopped=jnp.where(ends, token, state.stopped),
    )
    if state.seen is not None:
        state = state._replace(seen=state.seen.at[rows, token].set(True))
    if state.logprobs is not None and state.top is not None:
        logp = jax.nn.log_softmax(logits if settings.temperature == 1 else logits / settings.temperature)
        values, ids = jax.lax.top_k(logp[:, : settings.drawable], state.top[0].shape[-1])
        state = state._replace(
            logprobs=state.logprobs.at[:, state.i - 1].set(logp[rows, token]),
            top=(state.top[0].at[:, state.i - 1].set(ids), state.top[1].at[:, state.i - 1].set(values)),
        )
    return state


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
