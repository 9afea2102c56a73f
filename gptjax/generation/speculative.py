"""Speculative decoding: a cheap draft model proposes a few tokens, and the target model verifies these tokens in one
forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax._moved import moved_name
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation.decode import bucket, drawable_ids, has_room, prefill, right_padded, stop_array
from gptjax.generation.sampling import Sampler, greedy, probabilities
from gptjax.model.cache import Cache, init_cache
from gptjax.model.gpt import extend, for_decoding, refuse_classifier
from gptjax.types import Params


class Speculation(NamedTuple):
    """The result of `speculate`.

    tokens: The new tokens of each prompt, without the stop token.
    rounds: Number of forward passes of the target model after the prefill.
    accepted: Proportion of the proposed tokens that were accepted; tokens proposed for rows that have already ended
      count as rejected.
    """

    tokens: list[list[int]]
    rounds: int
    accepted: float


def speculate(
    params: Params,
    draft: Params | None,
    prompts: Sequence[Sequence[int]],
    cfg: ModelConfig,
    draft_cfg: ModelConfig | None = None,
    *,
    max_new_tokens: int,
    ahead: int = 4,
    ngram: int = 3,
    sampler: Sampler = greedy,
    key: jax.Array | None = None,
    stop: Sequence[int] = (),
    vocab_size: int | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Speculation:
    """Samples tokens from the model (params, cfg) like `generate`, but needs fewer forward passes if proposed tokens
    are accepted.

    A draft model (draft, draft_cfg) proposes tokens with the sampler of the target model. With draft=None, tokens are
    proposed by prompt lookup, which finds an earlier occurrence of the row's last tokens and proposes the tokens that
    followed it (see `prompt_lookup`).

    A proposed token x is accepted with probability min(1, p(x) / q(x)), where p is the distribution of the target model
    and q is the distribution of the draft model. At the first rejection, a token is drawn from the normalised
    distribution max(p - q, 0); if no proposal is rejected, a token is drawn from p. With speculative decoding, every
    token has the same distribution as in `generate`, at any temperature, and `greedy` gives the same tokens. In each
    round of speculative decoding, the accepted proposals and one more token are appended to each row. Sources:
    arXiv:2211.17192, algorithm 1. Prompt lookup is implemented as in the libraries transformers and vLLM.

    Args:
        ahead: number of tokens proposed per round.
        ngram: maximum number of tokens of the n-grams that prompt lookup matches.
        sampler: `greedy`, `draw` or a `chain` of filters that depend on the logits only.
        key: random key, required by every sampler except `greedy`.
        cache_dtype: dtype of the KV caches, as in `generate`.
        vocab_size: size of the tokenizer's vocabulary, as in `generate`. With a `vocab_size`, the embeddings of the two
            models may have different numbers of padding rows.

    Raises:
        UserError: the vocabularies differ, one of the models is a classifier, `sampler` is not one of those listed
            above, or the prompt, the new tokens and `ahead` + 1 tokens do not fit in the context of one of the models.
    """
    refuse_classifier(cfg)
    models = [cfg]
    if draft is not None:
        if draft_cfg is None:
            raise UserError("draft_cfg: expected the draft's ModelConfig, got None")
        refuse_classifier(draft_cfg, "the draft", "name the model that it was made from")
        models.append(draft_cfg)
        if vocab_size is None and cfg.vocab_size != draft_cfg.vocab_size:
            raise UserError(
                f"the draft has {draft_cfg.vocab_size} tokens, the model {cfg.vocab_size}: they must be the same; "
                "if they differ only in padding rows, pass vocab_size=tokenizer.vocab_size"
            )
    if ahead < 1 or ngram < 1:
        raise UserError(f"ahead={ahead}, ngram={ngram}: expected at least 1")
    if key is None and sampler is not greedy:
        raise UserError("key: expected a jax.random.key, got None; only greedy needs none")
    probabilities(sampler)
    drawable = drawable_ids(vocab_size, min(models, key=lambda c: c.vocab_size))
    if max_new_tokens < 1 or len(prompts) == 0:
        return Speculation([[] for _ in prompts], 0, 0.0)
    tokens, lengths = right_padded(prompts, min(models, key=lambda c: c.context_length))
    max_new = bucket(max_new_tokens + ahead + 1)
    needed = int(lengths.max()) + max_new_tokens + ahead + 1
    context = min(c.context_length for c in models)
    if needed > context:
        raise UserError(
            f"the longest prompt ({lengths.max()}), max_new_tokens ({max_new_tokens}) and ahead + 1 ({ahead + 1}) make "
            f"{needed} tokens, the {'smaller ' if draft is not None else ''}context has {context}: ask for fewer, or "
            "use generate"
        )
    settings = _Settings(
        cfg, draft_cfg if draft is not None else None, sampler, min(tokens.shape[1] + max_new, context), max_new, ahead,
        ngram, drawable, None if cache_dtype is None else jnp.dtype(cache_dtype).name,
    )  # fmt: skip
    params = for_decoding(params, cfg) if has_room(params) else params
    if draft is not None and draft_cfg is not None and has_room(draft):
        draft = for_decoding(draft, draft_cfg)
    end, out, rounds, accepted = jax.device_get(
        _speculate(
            params, draft, tokens, jnp.array(lengths), stop_array(stop), jnp.int32(max_new_tokens),
            jax.random.key(0) if key is None else key, settings,
        )
    )  # fmt: skip
    rows = []
    for row, start in enumerate(lengths):
        new = out[row, start : min(end[row], start + max_new_tokens)].tolist()
        rows.append(next((new[:i] for i, t in enumerate(new) if t in stop), new))
    return Speculation(rows, int(rounds), float(accepted) / max(1, int(rounds) * ahead * len(rows)))


class _Settings(NamedTuple):
    """Static arguments of the jitted function `_speculate`, which jax compiles again for each new value."""

    cfg: ModelConfig
    draft_cfg: ModelConfig | None
    sampler: Sampler
    slots: int  # Capacity of each KV cache, in tokens per row.
    # Space N for new tokens in each row. The space N exceeds max_new_tokens, because the last round of speculative
    # decoding may draw more tokens than are needed.
    max_new: int
    ahead: int
    ngram: int
    drawable: int
    cache_dtype: str | None


class _State(NamedTuple):
    tokens: jax.Array  # Token ids of each row, [B, P + N]: the prompt, the new tokens, and padding.
    end: jax.Array  # Number of tokens in each row, [B]; the last token of a row is not in the KV caches yet.
    done: jax.Array  # True for each row in which a stop token was drawn, [B].
    cache: Cache
    draft: Cache | None
    rounds: jax.Array
    accepted: jax.Array


@partial(jax.jit, static_argnums=7)
def _speculate(
    params: Params, draft: Params | None, prompt: jax.Array, lengths: jax.Array, stop: jax.Array, limit: jax.Array,
    key: jax.Array, settings: _Settings,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Decodes the prompts, and returns the fields `end`, `tokens`, `rounds` and `accepted` of the final `_State`."""
    cfg, draft_cfg, sampler, slots, max_new, ahead, ngram, drawable, dtype = settings
    B = len(prompt)
    rows, positions = jnp.arange(B), jnp.arange(ahead + 1)
    to_probs = probabilities(sampler)

    def pick(p: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)

    logits, cache = prefill(params, prompt, cfg, init_cache(cfg, B, slots, dtype), lengths)
    first = pick(to_probs(logits[:, :drawable]), jax.random.fold_in(key, 0))
    draft_cache = None
    if draft is not None and draft_cfg is not None:
        _, draft_cache = prefill(draft, prompt, draft_cfg, init_cache(draft_cfg, B, slots, dtype), lengths)
    tokens = jnp.pad(prompt, ((0, 0), (0, max_new))).at[rows, lengths].set(first)
    done = (first[:, None] == stop).any(-1)

    def proposals(state: _State, key: jax.Array) -> tuple[jax.Array, jax.Array | None, Cache | None]:
        """Returns (tokens, q, cache). `tokens` [B, ahead + 1] holds the last token of each row and the proposed tokens,
        which are the input of the target model.

        `q` [B, ahead, drawable] holds the distributions from which the draft model drew the proposals, and `cache` is
        the new KV cache of the draft model. For prompt lookup, `q` and `cache` are None.
        """
        token = jnp.take_along_axis(state.tokens, state.end[:, None] - 1, 1)
        if draft is None or draft_cfg is None:
            return jnp.concatenate([token, prompt_lookup(state.tokens, state.end, ahead, ngram)], 1), None, None

        def propose(carry: Any, key: jax.Array) -> Any:
            token, cache = carry
            logits, cache = extend(draft, token, draft_cfg, cache)
            q = to_probs(logits[:, -1, :drawable])
            return (pick(q, key)[:, None], cache), (token[:, 0], q)

        # The scan over the draft model's decoding steps runs ahead + 1 steps for `ahead` proposals, so that the last
        # proposal is also added to the draft model's KV cache.
        (_, cache), (read, q) = jax.lax.scan(propose, (token, state.draft), jax.random.split(key, ahead + 1))
        return read.T, q[:-1].transpose(1, 0, 2), cache

    def body(state: _State) -> _State:
        keys = jax.random.split(jax.random.fold_in(key, state.rounds + 1), 3)
        proposed, q, draft_cache = proposals(state, keys[0])
        logits, cache = extend(params, proposed, cfg, state.cache)
        p = to_probs(logits[..., :drawable])  # target distribution after each input token, [B, ahead + 1, drawable]
        ids = proposed[:, 1:, None]
        q_ids = 1.0 if q is None else jnp.take_along_axis(q, ids, 2)[..., 0]
        accept = jax.random.uniform(keys[1], (B, ahead)) * q_ids < jnp.take_along_axis(p[:, :-1], ids, 2)[..., 0]
        n_accepted = jnp.cumprod(accept, 1).sum(1)
        q = jax.nn.one_hot(proposed[:, 1:], drawable) if q is None else q
        # After the last proposal, the draft model's distribution q is set to 0, so that the next token is drawn from
        # the target model's distribution p if all proposals are accepted.
        q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
        p_next, q_next = (jnp.take_along_axis(a, n_accepted[:, None, None], 1)[:, 0] for a in (p, q))
        residual = jnp.maximum(p_next - q_next, 0)
        residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_next)
        resampled = pick(residual, keys[2])
        drafted = jnp.pad(proposed[:, 1:], ((0, 0), (0, 1)))
        new = jnp.where(positions < n_accepted[:, None], drafted, resampled[:, None])
        active = ~state.done & (state.end - lengths < limit)
        n_new = jnp.where(active, n_accepted + 1, 0)
        index = jnp.where(positions < n_new[:, None], state.end[:, None] + positions, state.tokens.shape[1])
        stopped = ((new[..., None] == stop).any(-1) & (positions < n_new[:, None])).any(1)
        length = state.cache.length + n_new
        return _State(
            state.tokens.at[rows[:, None], index].set(new, mode="drop"),
            state.end + n_new,
            state.done | stopped,
            dataclasses.replace(cache, length=length),
            draft_cache if draft_cache is None else dataclasses.replace(draft_cache, length=length),
            state.rounds + 1,
            state.accepted + jnp.where(active, n_accepted, 0).sum(),
        )

    state = _State(tokens, lengths + 1, done, cache, draft_cache, jnp.int32(0), jnp.int32(0))
    state = jax.lax.while_loop(lambda state: (~state.done & (state.end - lengths < limit)).any(), body, state)
    return state.end, state.tokens, state.rounds, state.accepted


def prompt_lookup(tokens: jax.Array, end: jax.Array, ahead: int, ngram: int) -> jax.Array:
    """Proposes the next tokens of each row by prompt lookup, and returns them as [B, ahead].

    `tokens` [B, W] are the rows, padded on the right, and `end` [B] are their lengths in tokens. A match is an earlier
    occurrence of the last n tokens of a row, with n <= `ngram`. The tokens that follow the match with the largest n are
    proposed; among several matches with the same n, the last match in the row is used. If fewer than `ahead` tokens
    follow the match, the tokens after the match are repeated cyclically. If not even the last token of a row occurs
    earlier in the row, the last token is proposed `ahead` times.
    """
    W = tokens.shape[1]
    starts = jnp.arange(W)  # all positions are candidates for the first token after a match
    match = jnp.ones(tokens.shape, bool)
    match_length = jnp.zeros(tokens.shape, jnp.int32)
    for offset in range(1, ngram + 1):
        last = jnp.take_along_axis(tokens, jnp.maximum(end[:, None] - offset, 0), 1)
        before = jnp.roll(tokens, offset, 1)  # the token that is `offset` positions before each candidate position
        match &= (before == last) & (starts >= offset)
        match_length += match
    score = jnp.where((starts < end[:, None]) & (match_length > 0), match_length * W + starts, -1)
    start = jnp.where(score.max(1) < 0, end - 1, score.argmax(1))
    period = end - start
    return jnp.take_along_axis(tokens, start[:, None] + jnp.arange(ahead) % period[:, None], 1)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
