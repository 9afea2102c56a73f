"""This package defines the training losses: next-token prediction, preference optimisation, policy gradients, reward
models, classification and distillation.

The functions `next_token`, `preference`, `policy`, `classify`, `reward_model` and `distill` each return a loss function
for a model config. A loss function is a pure function (params, batch, key) that returns a `Mean` and a dict of metrics:

    loss = gptjax.losses.next_token(cfg)
    (mean, metrics) = loss(params, batch, None)         pass a key to apply dropout
    mean.value()                                        nats per token

A `Mean` holds a weighted sum of loss terms and the sum of the weights, so that gradient accumulation can add the losses
of micro-batches exactly.
"""

from gptjax.losses.classify import class_logits, classify
from gptjax.losses.distill import distill, distill_classes
from gptjax.losses.next_token import next_token, token_log_probs, token_log_probs_and_entropies
from gptjax.losses.policy import advantages, of_answers, policy, policy_switches, policy_terms
from gptjax.losses.preference import answer_log_probs, preference
from gptjax.losses.reward_model import answer_rewards, reward_model
from gptjax.types import RolloutBatch

__all__ = [
    "RolloutBatch", "advantages", "answer_log_probs", "answer_rewards", "class_logits", "classify", "distill",
    "distill_classes", "next_token", "of_answers", "policy", "policy_switches", "policy_terms", "preference",
    "reward_model", "token_log_probs", "token_log_probs_and_entropies",
]  # fmt: skip
