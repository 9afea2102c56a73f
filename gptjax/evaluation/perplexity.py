"""Computes the loss of a model on each text of a data set, to find outliers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.data import packing
from gptjax.losses import token_log_probs
from gptjax.tokenizers import Tokenizer
from gptjax.types import Params

WIDTH, ROWS = 512, 4  # Maximum number of tokens per packed row, and number of packed rows per batch.


def losses(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    say: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Returns the mean loss of each text in nats per token, [n] float32.

    The loss of a text is averaged over its first 512 predicted tokens, or over fewer tokens if the model's context
    length is shorter. The loss is nan for a text in which no token is predicted: an empty text, or a text of a single
    token if the tokenizer adds no BOS token. `say` is a function that is called with progress messages.
    """
    width = min(WIDTH, cfg.context_length)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = [np.array([*begin, *tokenizer.encode(text)][: width + 1], np.int32) for text in texts]
    # indices of the texts with at least one token to predict
    scorable = [i for i, row in enumerate(ids) if len(row) > 1]
    out = np.full(len(texts), np.nan, np.float32)
    if not scorable:
        return out
    places = packing.first_fit(np.array([len(ids[i]) - 1 for i in scorable]), width)
    rows = packing.packed(
        packing.Encoded([ids[i] for i in scorable], [np.ones(len(ids[i]), np.float32) for i in scorable], 0), width
    )
    members = packing.members(places)
    log_probs = jax.jit(lambda params, batch: token_log_probs(params, batch, cfg))
    for k, batch in enumerate(packing.eval_batches(rows, ROWS)):
        nats = -np.asarray(log_probs(params, batch))
        for r, segment_ids in enumerate(batch.segment_ids[: len(members) - k * ROWS]):
            for s, i in enumerate(members[k * ROWS + r], 1):
                out[scorable[i]] = nats[r][segment_ids == s].mean()
        if say and k % 10 == 9:
            say(f"... {min(len(members), (k + 1) * ROWS)} of {len(members)} rows scored")
    return out
