"""Speculative decoding: a few tokens are proposed cheaply, and the model reads them all at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.generation.decode import bucket, drawable_ids, has_room, read_prompts, right_padded, stop_array
from gptjax.generation.sampling import Sampler, greedy, probabilities
from gptjax.model.cache import Cache, init_cache
from gptjax.model.gpt import extend, for_decoding, refuse_classifier
from gptjax.types import Params


class Speculation(NamedTuple):
    """tokens: of each prompt, without the stop token. rounds: how often the large model was run after the prompt;
    accepted: of the proposed tokens, the part that stood."""

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
    """What `generate` draws from (params, cfg), sooner where the proposals are often right, since reading a few tokens
    costs little more than reading one.

    The proposals come from a smaller model (draft, draft_cfg), drawn by the same sampler; or, with draft=None, from the
    row itself: what followed the last place that agrees with the row's end in the most tokens, up to `ngram`.

    A proposal x with probability q(x) stands with probability min(1, p(x) / q(x)), p the large model's; for the first
    that does not, a token is drawn from max(p - q, 0). So every token has the probability p that it has in `generate`,
    at any temperature, and under `greedy` the tokens are the same ones. Rows go on at their own pace.
    Sources: arXiv:2211.17192, algorithm 1; proposals from the row: prompt lookup, as in transformers and vLLM.

    Args:
        ahead: how many tokens are proposed at a time.
        sampler: `greedy`, `draw` or a `chain` of filters that look at the logits alone. key: for all but greedy.
        cache_dtype: as in `generate`.
        vocab_size: as there; where it is given, each model may have more rows than that.

    Raises:
        UserError: vocabularies differ, one of the models is a classifier, the sampler's probabilities are not known,
            or prompt, new tokens and `ahead` do not fit in one of the contexts.
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
                "where only their rows for no token differ, give vocab_size=tokenizer.vocab_size"
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
    room = bucket(max_new_tokens + ahead + 1)
    need = int(lengths.max()) + max_new_tokens + ahead + 1
    context = min(c.context_length for c in models)
    if need > context:
        raise UserError(
            f"the longest prompt ({lengths.max()}), max_new_tokens ({max_new_tokens}) and ahead + 1 ({ahead + 1}) make "
            f"{need} tokens, the {'smaller ' if draft is not None else ''}context has {context}: ask for fewer, or use "
            "generate"
        )
    settings = _Settings(
        cfg, draft_cfg if draft is not None else None, sampler, min(tokens.shape[1] + room, context), room, ahead,
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
    for row, first in enumerate(lengths):
        new = out[row, first : min(end[row], first + max_new_tokens)].tolist()
        rows.append(next((new[:i] for i, t in enumerate(new) if t in stop), new))
    return Speculation(rows, int(rounds), float(accepted) / max(1, int(rounds) * ahead * len(rows)))


class _Settings(NamedTuple):
    """What the program is compiled for."""

    cfg: ModelConfig
    draft_cfg: ModelConfig | None
    sampler: Sampler
    slots: int
    room: int
    ahead: int
    ngram: int
    drawable: int
    cache_dtype: str | None


class _State(NamedTuple):
    tokens: jax.Array  # [B, P + N]
    end: jax.Array  # [B]; the token before has been read by neither model
    done: jax.Array  # [B]
    cache: Cache
    draft: Cache | None
    rounds: jax.Array
    accepted: jax.Array


@partial(jax.jit, static_argnums=7)
def _speculate(
    params: Params, draft: Params | None, prompt: jax.Array, lengths: jax.Array, stop: jax.Array, limit: jax.Array,
    key: jax.Array, settings: _Settings,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(end, tokens, rounds, accepted), as of `_State`."""
    cfg, draft_cfg, sampler, slots, room, ahead, ngram, drawable, dtype = settings
    B = len(prompt)
    rows, places = jnp.arange(B), jnp.arange(ahead + 1)
    probable = probabilities(sampler)

    def pick(p: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)

    logits, cache = read_prompts(params, prompt, cfg, init_cache(cfg, B, slots, dtype), lengths)
    first = pick(probable(logits[:, :drawable]), jax.random.fold_in(key, 0))
    draft_cache = None
    if draft is not None and draft_cfg is not None:
        _, draft_cache = read_prompts(draft, prompt, draft_cfg, init_cache(draft_cfg, B, slots, dtype), lengths)
    tokens = jnp.pad(prompt, ((0, 0), (0, room))).at[rows, lengths].set(first)
    done = (first[:, None] == stop).any(-1)

    def proposals(s: _State, key: jax.Array) -> tuple[jax.Array, jax.Array | None, Cache | None]:
        """[B, ahead + 1]: the token before, then the proposals; their probabilities [B, ahead, V], None: all 1."""
        token = jnp.take_along_axis(s.tokens, s.end[:, None] - 1, 1)
        if draft is None or draft_cfg is None:
            return jnp.concatenate([token, repeated(s.tokens, s.end, ahead, ngram)], 1), None, None

        def propose(carry: Any, key: jax.Array) -> Any:
            token, cache = carry
            logits, cache = extend(draft, token, draft_cfg, cache)
            q = probable(logits[:, -1, :drawable])
            return (pick(q, key)[:, None], cache), (token[:, 0], q)

        # one step more than proposals: the draft reads its own last one too
        (_, cache), (read, q) = jax.lax.scan(propose, (token, s.draft), jax.random.split(key, ahead + 1))
        return read.T, q[:-1].transpose(1, 0, 2), cache

    def body(s: _State) -> _State:
        keys = jax.random.split(jax.random.fold_in(key, s.rounds + 1), 3)
        proposed, q, draft_cache = proposals(s, keys[0])
        logits, cache = extend(params, proposed, cfg, s.cache)
        p = probable(logits[..., :drawable])  # of what follows each of them
        ids = proposed[:, 1:, None]
        q_ids = 1.0 if q is None else jnp.take_along_axis(q, ids, 2)[..., 0]
        stands = jax.random.uniform(keys[1], (B, ahead)) * q_ids < jnp.take_along_axis(p[:, :-1], ids, 2)[..., 0]
        right = jnp.cumprod(stands, 1).sum(1)
        q = jax.nn.one_hot(proposed[:, 1:], drawable) if q is None else q
        q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # where all stand, nothing is taken from p
        p_next, q_next = (jnp.take_along_axis(a, right[:, None, None], 1)[:, 0] for a in (p, q))
        rest = jnp.maximum(p_next - q_next, 0)
        rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p_next)
        own = pick(rest, keys[2])
        chosen = jnp.where(places < right[:, None], jnp.pad(proposed[:, 1:], ((0, 0), (0, 1))), own[:, None])
        going = ~s.done & (s.end - lengths < limit)
        taken = jnp.where(going, right + 1, 0)
        at = jnp.where(places < taken[:, None], s.end[:, None] + places, s.tokens.shape[1])
        stopped = ((chosen[..., None] == stop).any(-1) & (places < taken[:, None])).any(1)
        length = s.cache.length + taken
        return _State(
            s.tokens.at[rows[:, None], at].set(chosen, mode="drop"),
            s.end + taken,
            s.done | stopped,
            dataclasses.replace(cache, length=length),
            draft_cache if draft_cache is None else dataclasses.replace(draft_cache, length=length),
            s.rounds + 1,
            s.accepted + jnp.where(going, right, 0).sum(),
        )

    state = _State(tokens, lengths + 1, done, cache, draft_cache, jnp.int32(0), jnp.int32(0))
    state = jax.lax.while_loop(lambda s: (~s.done & (s.end - lengths < limit)).any(), body, state)
    return state.end, state.tokens, state.rounds, state.accepted


def repeated(tokens: jax.Array, end: jax.Array, ahead: int, ngram: int) -> jax.Array:
    """What may follow the first `end` [B] tokens of each row, tokens [B, W] -> [B, ahead].

    It is what followed the place before whose last tokens, up to `ngram`, agree with the row's last ones in the most
    places; of several the latest; over again where less than `ahead` followed. Without any such place, the last token
    over again.
    """
    W = tokens.shape[1]
    starts = jnp.arange(W)  # of a continuation
    same = jnp.ones(tokens.shape, bool)
    agreed = jnp.zeros(tokens.shape, jnp.int32)
    for back in range(1, ngram + 1):
        last = jnp.take_along_axis(tokens, jnp.maximum(end[:, None] - back, 0), 1)
        there = jnp.roll(tokens, back, 1)  # at each start, the token so many places before
        same &= (there == last) & (starts >= back)
        agreed += same
    score = jnp.where((starts < end[:, None]) & (agreed > 0), agreed * W + starts, -1)
    start = jnp.where(score.max(1) < 0, end - 1, score.argmax(1))
    period = end - start
    return jnp.take_along_axis(tokens, start[:, None] + jnp.arange(ahead) % period[:, None], 1)
