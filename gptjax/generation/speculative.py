"""Speculative decoding: a small model proposes a few tokens, the large one reads them all at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.generation.decode import bucket, drawable_ids, read_prompts, right_padded, stop_array
from gptjax.model.cache import Cache, init_cache
from gptjax.model.gpt import extend, for_decoding, refuse_classifier
from gptjax.types import Params, UserError


class Speculation(NamedTuple):
    """tokens: of each prompt, without the stop token. rounds: how often the large model was run after the prompt;
    accepted: of the proposed tokens, the part that stood."""

    tokens: list[list[int]]
    rounds: int
    accepted: float


def speculate(
    params: Params,
    draft: Params,
    prompts: Sequence[Sequence[int]],
    cfg: ModelConfig,
    draft_cfg: ModelConfig,
    *,
    max_new_tokens: int,
    ahead: int = 4,
    stop: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Speculation:
    """Greedy decoding of (params, cfg) by the help of (draft, draft_cfg): the same tokens as `generate`, sooner where
    the draft often guesses right, since reading a few tokens costs little more than reading one.

    A row keeps the proposals up to the first that the large model would not have chosen, and one token of its own;
    the caches forget the rest. Rows go on at their own pace. Source: arXiv:2211.17192, for the greedy case.

    Args:
        ahead: how many tokens the draft proposes at a time.
        vocab_size: as in `generate`; where it is given, each model may have more rows than that.

    Raises:
        UserError: vocabularies differ, one of the models is a classifier, or prompt, new tokens and `ahead` do not fit
            in one of the contexts.
    """
    refuse_classifier(draft_cfg, "the draft", "name the model that it was made from")
    refuse_classifier(cfg)
    if vocab_size is None and cfg.vocab_size != draft_cfg.vocab_size:
        raise UserError(
            f"the draft has {draft_cfg.vocab_size} tokens, the model {cfg.vocab_size}: they must be the same; "
            "where only their rows for no token differ, give vocab_size=tokenizer.vocab_size"
        )
    drawable = drawable_ids(vocab_size, min(cfg, draft_cfg, key=lambda c: c.vocab_size))
    if max_new_tokens < 1 or len(prompts) == 0:
        return Speculation([[] for _ in prompts], 0, 0.0)
    tokens, lengths = right_padded(prompts, min(cfg, draft_cfg, key=lambda c: c.context_length))
    room = bucket(max_new_tokens + ahead + 1)
    need = int(lengths.max()) + max_new_tokens + ahead + 1
    context = min(cfg.context_length, draft_cfg.context_length)
    if need > context:
        raise UserError(
            f"the longest prompt ({lengths.max()}), max_new_tokens ({max_new_tokens}) and ahead + 1 ({ahead + 1}) make "
            f"{need} tokens, the smaller context has {context}: ask for fewer, or use generate"
        )
    slots = min(tokens.shape[1] + room, context)
    end, out, rounds, accepted = jax.device_get(
        _speculate(
            for_decoding(params, cfg), for_decoding(draft, draft_cfg), tokens, jnp.array(lengths),
            stop_array(stop), jnp.int32(max_new_tokens), cfg, draft_cfg, slots,
            room, ahead, drawable,
        )
    )  # fmt: skip
    rows = []
    for row, first in enumerate(lengths):
        new = out[row, first : min(end[row], first + max_new_tokens)].tolist()
        rows.append(next((new[:i] for i, t in enumerate(new) if t in stop), new))
    return Speculation(rows, int(rounds), float(accepted) / max(1, int(rounds) * ahead * len(rows)))


class _State(NamedTuple):
    tokens: jax.Array  # [B, P + N]
    end: jax.Array  # [B]; the token before has been read by neither model
    done: jax.Array  # [B]
    cache: Cache
    draft: Cache
    rounds: jax.Array
    accepted: jax.Array


@partial(jax.jit, static_argnums=(6, 7, 8, 9, 10, 11))
def _speculate(params, draft, prompt, lengths, stop, limit, cfg, draft_cfg, slots, room, ahead, drawable):
    B = len(prompt)
    rows = jnp.arange(B)

    logits, cache = read_prompts(params, prompt, cfg, init_cache(cfg, B, slots), lengths)
    _, draft_cache = read_prompts(draft, prompt, draft_cfg, init_cache(draft_cfg, B, slots), lengths)
    first = logits[:, :drawable].argmax(-1).astype(jnp.int32)
    tokens = jnp.pad(prompt, ((0, 0), (0, room))).at[rows, lengths].set(first)
    done = (first[:, None] == stop).any(-1)

    def body(s: _State) -> _State:
        token = jnp.take_along_axis(s.tokens, s.end[:, None] - 1, 1)

        def propose(carry, _):
            token, cache = carry
            logits, cache = extend(draft, token, draft_cfg, cache)
            return (logits[:, -1:, :drawable].argmax(-1).astype(jnp.int32), cache), token[:, 0]

        # one step more than proposals: the draft reads its own last one too
        (_, draft_cache), read = jax.lax.scan(propose, (token, s.draft), None, length=ahead + 1)
        proposed = read.T  # [B, ahead + 1]: the token before, then the proposals
        logits, cache = extend(params, proposed, cfg, s.cache)
        chosen = logits[..., :drawable].argmax(-1).astype(jnp.int32)  # what follows each of them
        right = jnp.cumprod(chosen[:, :-1] == proposed[:, 1:], 1).sum(1)
        going = ~s.done & (s.end - lengths < limit)
        taken = jnp.where(going, right + 1, 0)
        places = jnp.arange(ahead + 1)
        at = jnp.where(places < taken[:, None], s.end[:, None] + places, s.tokens.shape[1])
        stopped = ((chosen[..., None] == stop).any(-1) & (places < taken[:, None])).any(1)
        length = s.cache.length + taken
        return _State(
            s.tokens.at[rows[:, None], at].set(chosen, mode="drop"),
            s.end + taken,
            s.done | stopped,
            cache.replace(length=length),
            draft_cache.replace(length=length),
            s.rounds + 1,
            s.accepted + jnp.where(going, right, 0).sum(),
        )

    state = _State(tokens, lengths + 1, done, cache, draft_cache, jnp.int32(0), jnp.int32(0))
    state = jax.lax.while_loop(lambda s: (~s.done & (s.end - lengths < limit)).any(), body, state)
    return state.end, state.tokens, state.rounds, state.accepted
