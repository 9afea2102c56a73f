"""This module defines policy-gradient losses for reinforcement learning with verifiable rewards: GRPO and its variants.

A model samples N answers to each of G prompts, and a reward function scores every answer. The policy-gradient loss
raises the probability of answers with a higher reward than other answers. The following table lists the differences
between the kinds of policy-gradient loss:

    kind           advantage of an answer                     ratio per   mean over
    grpo           (reward - group mean) / group std          token       the tokens of each answer, then answers
    dr_grpo        reward - group mean                        token       answers of `max_new_tokens` tokens
    dapo           (reward - group mean) / group std          token       all tokens
    gspo           (reward - group mean) / group std          answer      answers
    rloo           reward - mean of the group's others        answer      answers
    reinforce_pp   (reward - batch mean) / batch std          token       the tokens of each answer, then answers

A group is the N answers to one prompt. The ratio is the probability of a token or answer under the policy divided by
the probability under the sampler, which is the model that generated the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.errors import Problems, UserError, nearest
from gptjax.losses.next_token import token_log_probs_and_entropies
from gptjax.ops.dropout import off
from gptjax.types import Mean, Metrics, Params, RolloutBatch

Kind = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"]

_STD_EPSILON = 1e-4  # _STD_EPSILON is added to the standard deviation of the rewards, as in TRL.
_MAX_LOG_RATIO = 20.0  # For a larger log-ratio, exp could overflow and the gradient would be NaN.


class Switches(NamedTuple):
    """Holds the settings in which the kinds of policy-gradient losses differ.

    Attributes:
        baseline: value that is subtracted from a reward: the mean reward of the group, the mean reward of the other
            answers in the group, or the mean reward of the batch.
        std: standard deviation by which the advantage is divided: of the group, of the batch, or no division.
        ratio: the ratio of each token, the ratio of each answer (the product over the answer's tokens), or the
            geometric mean of the token ratios of each answer. An answer's ratio gives one loss term per answer, and
            these terms are averaged over answers.
        mean: average of the per-token loss terms. answer_mean: mean over the tokens of each answer, then mean over
            answers. answer_sum: sum over the tokens of each answer, then mean over answers. token: mean over all tokens
            of the batch. constant: sum over all tokens, divided by `max_new_tokens` and by the number of answers.
        clip: the ratio is clipped to at least 1 - clip.
        clip_high: the ratio is clipped to at most 1 + clip_high.
        kl: coefficient of the KL penalty.
        kl_ratio: whether the KL penalty is multiplied by the ratio.
        max_new_tokens: maximum number of tokens of an answer, which only mean=constant needs.
    """

    baseline: Literal["group", "others", "batch"] = "group"
    std: Literal["group", "batch", "none"] = "group"
    ratio: Literal["token", "answer", "geometric_mean"] = "token"
    mean: Literal["answer_mean", "answer_sum", "token", "constant"] = "answer_mean"
    clip: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    kl_ratio: bool = True
    max_new_tokens: int | None = None


KINDS: dict[str, Switches] = {
    "grpo": Switches(),
    "dr_grpo": Switches(std="none", mean="constant"),
    "dapo": Switches(mean="token", clip_high=0.28),
    "gspo": Switches(ratio="geometric_mean", clip=3e-4, clip_high=4e-4),
    "rloo": Switches(baseline="others", std="none", ratio="answer", mean="answer_sum"),
    "reinforce_pp": Switches(baseline="batch", std="batch"),
}


def policy_switches(
    kind: Kind = "grpo",
    *,
    clip: float | None = None,
    clip_high: float | None = None,
    kl: float = 0.0,
    max_new_tokens: int | None = None,
) -> Switches:
    """Returns the `Switches` of a kind of policy-gradient loss; `policy` explains the arguments.

    Raises:
        UserError: the kind is unknown, a setting is out of range, or kind=dr_grpo has no `max_new_tokens`.
    """
    default = _default(kind)
    low = default.clip if clip is None else clip
    high = low if default.clip_high == default.clip else max(low, default.clip_high)
    high = high if clip_high is None else clip_high
    problems = Problems()
    for name, value in (("clip", low), ("clip_high", high)):
        if not value > 0:
            problems.append(f"{name}: expected a number above 0, got {value}")
    if not kl >= 0:
        problems.append(f"kl: expected a coefficient of 0 or more, got {kl}")
    if max_new_tokens is None and default.mean == "constant":
        problems.append(f"kind={kind} divides by the longest possible answer: pass max_new_tokens")
    elif max_new_tokens is not None and max_new_tokens < 1:
        problems.append(f"max_new_tokens: expected 1 or more, got {max_new_tokens}")
    problems.raise_if_any()
    return default._replace(clip=low, clip_high=high, kl=kl, max_new_tokens=max_new_tokens)


def _default(kind: str) -> Switches:
    if kind not in KINDS:
        meant = nearest(str(kind), KINDS)
        hint = f"; did you mean {meant}?" if meant else ""
        raise UserError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}{hint}")
    return KINDS[kind]


def advantages(rewards: jax.Array, kind: Kind = "grpo") -> jax.Array:
    """Returns the advantages [G, N] float32 of N answers to each of G prompts, computed from the rewards [G, N] of the
    answers.

        rewards     [[1, 0, 0, 1], [0, 0, 0, 0]]
        grpo        [[.87, -.87, -.87, .87], [0, 0, 0, 0]]
        dr_grpo     [[.5, -.5, -.5, .5], [0, 0, 0, 0]]
        rloo        [[.67, -.67, -.67, .67], [0, 0, 0, 0]]

    The docstring of this module lists the mean and the standard deviation that each kind of loss uses, and `policy`
    cites the papers. Standard deviations are sample standard deviations (divisor n - 1) plus 1e-4, as in TRL. Answers
    with equal rewards have advantages of exactly 0. With kind=reinforce_pp, pass the rewards of all prompts of a batch
    in one call, because the baseline is the mean over the batch.

    Raises:
        UserError: the kind is unknown, rewards is not two-dimensional, or a mean would be over a single answer.
    """
    s = _default(kind)
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2:
        raise UserError(f"rewards: expected [prompts, answers per prompt], got shape {list(rewards.shape)}")
    axis = None if s.baseline == "batch" else 1
    n = rewards.size if axis is None else rewards.shape[1]
    if n < 2:
        of = "answers in the batch" if axis is None else "answers per prompt"
        raise UserError(f"rewards: kind={kind} compares answers and needs 2 or more {of}, got {n}")
    # Subtracting the first reward makes the mean of equal rewards exact.
    rewards = rewards - (rewards[:, :1] if axis else rewards[0, 0])
    centred = rewards - rewards.mean(axis, keepdims=True)
    if s.baseline == "others":
        # For n answers, the reward minus the mean of all n rewards, times n / (n - 1), equals the reward minus the mean
        # of the other n - 1 rewards.
        centred = centred * (n / (n - 1))
    if s.std == "none":
        return centred
    return centred / (rewards.std(axis, ddof=1, keepdims=True) + _STD_EPSILON)


def policy_terms(
    new: jax.Array,
    old: jax.Array,
    reference: jax.Array | None,
    mask: jax.Array,
    advantages: jax.Array,
    switches: Switches,
) -> tuple[Mean, Metrics]:
    """Computes a policy-gradient loss from the log-probabilities of sampled tokens.

    The loss term of a token or answer is -min(r A, clip(r, 1 - clip, 1 + clip_high) A), where r is the ratio of the
    token or answer and A is the advantage of the answer. The KL penalty adds kl r (exp(d) - d - 1) per token, with the
    coefficient `switches.kl`, the ratio r of the token and d = log p_reference - log p_policy; exp(d) - d - 1 is the
    estimator k3 of the KL divergence from the reference model. If the KL penalty is multiplied by the ratio, as in
    DeepSeek-V3.2 (arXiv:2512.02556) and TRL, the expected gradient of the KL penalty is the gradient of KL(policy ||
    reference). In the GRPO paper, the KL penalty is not multiplied by the ratio, which corresponds to kl_ratio=False.

    Args:
        new: log-probabilities of the targets under the policy, [B, T] float32; only this argument receives a gradient.
        old: log-probabilities of the targets under the sampler, [B, T].
        reference: log-probabilities of the targets under the reference model, [B, T], or None if there is no KL
            penalty.
        mask: [B, T] float32, 1 for the tokens of answers; the log-probabilities of other tokens are not used.
        advantages: advantage of each answer, [B].
        switches: settings of the kind of loss, as `policy_switches` returns them.

    Returns:
        The loss and the metrics. The loss is a `Mean` whose weight is the number of answers (mean=answer_mean and
        mean=answer_sum), the number of tokens (mean=token), or the number of answers times `max_new_tokens`
        (mean=constant). The metrics are the metrics of `policy` except `entropy`.

    Raises:
        UserError: the loss has a KL penalty, and reference is None.
    """
    if switches.kl and reference is None:
        raise UserError(f"kl ({switches.kl}) needs the log-probabilities of the reference model, got reference=None")
    present = mask > 0
    count = mask.sum(-1, keepdims=True)
    tokens, answers = count.sum(), (count > 0).astype(jnp.float32).sum()
    even = mask / jnp.maximum(count, 1.0)  # Weighting tokens by `even` turns a sum over tokens into a mean per answer.
    share = even if switches.mean == "answer_mean" else mask
    weight = {"token": tokens, "constant": answers * float(switches.max_new_tokens or 0)}.get(switches.mean, answers)

    log_ratios = jnp.where(present, new - old, 0.0)  # [B, T]
    log_ratio, term_share = log_ratios, share
    if switches.ratio != "token":
        parts = log_ratios * (even if switches.ratio == "geometric_mean" else mask)
        log_ratio, term_share = jnp.broadcast_to(parts.sum(-1, keepdims=True), mask.shape), even
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
    low, high = 1 - switches.clip, 1 + switches.clip_high
    advantage = advantages[:, None]
    terms = -jnp.minimum(ratio * advantage, jnp.clip(ratio, low, high) * advantage)
    total = (terms * term_share).sum()

    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    metrics = {
        "kl": Mean((_k3(log_ratios) * mask).sum(), tokens),
        "clipped": Mean((clipped.astype(jnp.float32) * mask).sum(), tokens),
        "ratio": Mean((ratio * mask).sum(), tokens),
        "length": Mean(tokens, answers),
    }
    if reference is not None:
        divergences = _k3(jnp.where(present, reference - new, 0.0)) * (ratio if switches.kl_ratio else 1.0)
        metrics["kl_reference"] = Mean((divergences * mask).sum(), tokens)
        if switches.kl:
            total = total + switches.kl * (divergences * share).sum()
    return Mean(total, weight), jax.lax.stop_gradient(metrics)


def _k3(d: jax.Array) -> jax.Array:
    """Returns exp(d) - d - 1, which is the unbiased estimator k3 of KL(p || q) if d = log q - log p of a sample from
    p."""
    d = jnp.minimum(d, _MAX_LOG_RATIO)
    return jnp.exp(d) - d - 1.0


def policy(
    cfg: ModelConfig,
    kind: Kind = "grpo",
    *,
    clip: float | None = None,
    clip_high: float | None = None,
    kl: float = 0.0,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> Callable[..., tuple[Mean, Metrics]]:
    """Returns the policy-gradient loss named `kind`, for batches of type `RolloutBatch`.

    The docstring of `policy_terms` gives the formula of the loss, and the docstring of this module lists how the kinds
    of policy-gradient loss differ. For all kinds of policy-gradient loss, the KL penalty is a term of the loss, as in
    GRPO, although the papers of rloo and reinforce_pp subtract the KL penalty from the rewards.

    The metrics of the policy-gradient loss are `Mean`s over the tokens of the answers:

        kl             KL(sampler || policy) in nats per token, estimated by k3 from the sampled tokens
        kl_reference   KL(policy || reference) in nats per token, estimated by k3; only if the batch has `reference`
        entropy        entropy of the policy's distribution in nats, at the sampling temperature
        clipped        fraction of tokens whose ratio is clipped, which makes the gradient of the token's term zero
        ratio          probability under the policy divided by the probability under the sampler
        length         tokens per answer, including the end token

    Args:
        clip: the ratio is clipped to at least 1 - clip. None: 0.2, or 3e-4 for gspo, whose ratios are closer to 1.
        clip_high: the ratio is clipped to at most 1 + clip_high. None: equal to clip, but at least 0.28 for dapo and
            4e-4 for gspo.
        kl: coefficient of the KL penalty; 0: no penalty, and the batch needs no `reference`.
        temperature: sampling temperature. The policy's log-probabilities are computed from logits / temperature.
        max_new_tokens: maximum number of tokens of an answer. Only dr_grpo needs it.

    Raises:
        UserError: the kind is unknown, a setting is out of range, or kind=dr_grpo has no `max_new_tokens`.

    Sources: arXiv:2402.03300, eq. 3 and 4 (grpo); arXiv:2503.20783 (dr_grpo); arXiv:2503.14476, eq. 8 (dapo);
    arXiv:2507.18071, eq. 5 to 7 (gspo); arXiv:2402.14740, with clipped ratios as in TRL (rloo); arXiv:2501.03262
    (reinforce_pp, REINFORCE++).
    """
    if not temperature > 0:
        raise UserError(f"temperature: expected a number above 0, got {temperature}; greedy answers are not samples")
    s = policy_switches(kind, clip=clip, clip_high=clip_high, kl=kl, max_new_tokens=max_new_tokens)

    def loss(params: Params, batch: RolloutBatch, key: jax.Array | None) -> tuple[Mean, Metrics]:
        key = None if off(cfg.dropout) else key
        new, entropies = token_log_probs_and_entropies(params, batch, cfg, key, temperature=temperature)
        new, entropies = of_answers(new, batch), of_answers(entropies, batch)
        old, mask = (leaf.reshape(new.shape) for leaf in (batch.old, batch.weights))
        reference = None if batch.reference is None else batch.reference.reshape(new.shape)
        mean, metrics = policy_terms(new, old, reference, mask, batch.advantages.reshape(-1), s)
        entropy = jnp.where(mask > 0, entropies, 0.0).sum()
        return mean, {**metrics, "entropy": Mean(entropy, mask.sum())}

    return loss


def of_answers(values: jax.Array, batch: RolloutBatch) -> jax.Array:
    """Returns the per-token values [B, T] rearranged to one row per answer, [B N, A].

    If `batch.index` is None, every row of the batch holds one answer, and the per-token values are returned unchanged.
    """
    if batch.index is None:
        return values
    B, N, A = batch.index.shape
    return jnp.take_along_axis(values, batch.index.reshape(B, N * A), 1).reshape(B * N, A)
