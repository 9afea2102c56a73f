"""Functions for on-policy training, in which the model generates the answers that it is trained on.

The tasks reward and distill share the functions of this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gptjax import weights
from gptjax.config import Config, ModelConfig
from gptjax.data import rollouts
from gptjax.data.conversations import Conversation
from gptjax.data.rollouts import Question, Rollout
from gptjax.errors import UserError
from gptjax.generation.decode import Completion, bucket, complete
from gptjax.generation.sampling import chain, temperature
from gptjax.tasks import instruct
from gptjax.tokenizers import Tokenizer
from gptjax.types import Params, RolloutBatch


def questions(
    cfg: Config, talks: Sequence[Conversation], tokenizer: Tokenizer, width: int, because: str
) -> tuple[list[Question], int]:
    """Selects the questions that leave room for an answer in a row of `width` tokens.

    Returns:
        (the selected questions, number of questions that were dropped because they are too long).

    Args:
        because: text for the error message that names the setting which `width` comes from.

    Raises:
        UserError: no question leaves room for an answer.
    """
    most = getattr(cfg, cfg.task).max_new_tokens
    kept, dropped = rollouts.questions(talks, tokenizer, longest=width - most)
    if not kept:
        raise UserError(
            f"no question fits: each has more than {width - most} tokens, which is what {cfg.task}.max_new_tokens="
            f"{most} leaves of {width} tokens per row{because}"
        )
    return kept, dropped


def sample_answers(
    params: Params,
    questions: Sequence[Question],
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    at: float,
    key: jax.Array,
    n: int = 1,
) -> list[Completion]:
    """Samples n answers to each question at the temperature `at`.

    Each sampled answer has the log-probabilities of its tokens under the sampling distribution.

    Args:
        params: the parameters as `model.gpt.for_decoding` returns them.
    """
    return complete(
        params, [question.ids for question in questions], model, max_new_tokens=max_new_tokens, key=key,
        sampler=chain(temperature(at)), stop=weights.stop_ids(tokenizer), vocab_size=tokenizer.vocab_size, n=n,
        logprobs=0, logprobs_temperature=at,
    )  # fmt: skip


def rollout(question: Question, answer: Completion) -> Rollout:
    """Returns the rollout of a question and a sampled answer.

    If the answer ended with an end token, the end token is the last token of the rollout.
    """
    tokens, logprobs = (answer.tokens, answer.logprobs) if answer.end is None else (
        [*answer.tokens, answer.end[0]], [*answer.logprobs, answer.end[1]]
    )  # fmt: skip
    return Rollout(question.ids, tokens, logprobs)


def to_batch(made: Sequence[Rollout], advantages: np.ndarray, longest: int) -> RolloutBatch:
    """Returns a batch of rollouts, padded to a common length of at most `longest` tokens.

    The common length of the rollouts is rounded up, so that XLA compiles programs for only a few lengths.
    """
    needed = max(len(rollout.prompt) + len(rollout.tokens) for rollout in made)
    return rollouts.rollout_batch(made, advantages, min(bucket(needed), longest))


def measures(answers: Sequence[Completion]) -> dict[str, float]:
    """Computes metrics of sampled answers.

    Returns:
        A dict with three metrics. "length" is the mean number of tokens per answer, including the end token. "finished"
        is the fraction of answers that end with an end token. "entropy" is the mean of -log p over tokens, an estimate
        of the entropy of the sampling distribution.
    """
    log_probs = [p for answer in answers for p in (*answer.logprobs, *(answer.end or (0, 0.0))[1:])]
    lengths = [len(answer.tokens) + (answer.end is not None) for answer in answers]
    return {
        "length": sum(lengths) / len(lengths),
        "finished": sum(answer.end is not None for answer in answers) / len(answers),
        "entropy": -sum(log_probs) / max(sum(lengths), 1),
    }


def row(question: Question, text: str, answer: Completion, scores: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the row of the file rollouts.jsonl for an answer, including the answer's scores, such as its reward."""
    example = instruct.row_of(question.talk, "")
    return {
        **{key: value for key, value in example.items() if key not in ("answer", "constraints")},
        "answer": text,
        **(scores or {}),
        "tokens": len(answer.tokens) + (answer.end is not None),
        "finish": answer.finish,
    }
