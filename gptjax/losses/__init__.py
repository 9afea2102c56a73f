"""Losses: pure functions (params, batch, key) -> (Mean(total, weight), metrics), each made for a model config.

    loss = gptjax.losses.next_token(cfg)
    (mean, metrics) = loss(params, batch, None)         a key in the place of None: with dropout
    mean.value()                                        nats a token

A mean is kept as a sum and its weight, so that parts of a batch add up exactly.
"""

from gptjax.losses.classify import class_logits, classify
from gptjax.losses.next_token import next_token, token_log_probs
from gptjax.losses.preference import answer_log_probs, preference

__all__ = ["answer_log_probs", "class_logits", "classify", "next_token", "preference", "token_log_probs"]
