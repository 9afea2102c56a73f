"""This package generates text: it has samplers, compiled decoding loops with a KV cache, and functions that choose one
of several samples."""

from typing import Any

from gptjax._moved import moved_name
from gptjax.generation.choose import best_of_n, by_logprob, majority, reward_scores, sequence_rewards
from gptjax.generation.decode import Completion, complete, generate, programs, stream
from gptjax.generation.sampling import (
    chain,
    draw,
    from_config,
    greedy,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from gptjax.generation.speculative import speculate
from gptjax.generation.text import cut, prompt_ids, stop_strings, text_chunks
from gptjax.model.gpt import for_decoding

__all__ = [
    "Completion", "best_of_n", "by_logprob", "chain", "complete", "cut", "draw", "for_decoding", "from_config",
    "generate", "greedy", "majority", "min_p", "programs", "prompt_ids", "repetition_penalty", "reward_scores",
    "sequence_rewards", "speculate", "stop_strings", "stream", "temperature", "text_chunks", "top_k", "top_p",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
