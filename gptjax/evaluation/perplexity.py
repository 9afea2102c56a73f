"""How likely a model finds texts: for outliers in a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.data import packing
from gptjax.losses import token_log_probs
from gptjax.tokenizers import Tokenizer
from gptjax.types import Params

WIDTH, ROWS = 512, 4


def losses(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    say: Callable[[str], None] | None = None,
) -> np.ndarray:
    """[n] float32: nats a token of each text, of one longer than a row (512 tokens, or the model's context) of its
    beginning; nan of a text of one token."""
    width = min(WIDTH, cfg.context_length)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = [np.array([*begin, *tokenizer.encode(text)][: width + 1], np.int32) for text in texts]
    long = [i for i, row in enumerate(ids) if len(row) > 1]
    out = np.full(len(texts), np.nan, np.float32)
    if not long:
        return out
    places = packing.first_fit(np.array([len(ids[i]) - 1 for i in long]), width)
    rows = packing.packed(
        packing.Encoded([ids[i] for i in long], [np.ones(len(ids[i]), np.float32) for i in long], 0), width
    )
    members = packing.members(places)
    scored = jax.jit(lambda params, batch: token_log_probs(params, batch, cfg))
    for k, batch in enumerate(packing.eval_batches(rows, ROWS)):
        nats = -np.asarray(scored(params, batch))
        for r, segment_ids in enumerate(batch.segment_ids[: len(members) - k * ROWS]):
            for s, i in enumerate(members[k * ROWS + r], 1):
                out[long[i]] = nats[r][segment_ids == s].mean()
        if say and k % 10 == 9:
            say(f"... {min(len(members), (k + 1) * ROWS)} of {len(members)} rows scored")
    return out
