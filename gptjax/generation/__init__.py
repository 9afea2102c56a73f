"""Text generation: samplers, and compiled decoding loops with a KV cache."""

from typing import Any

from gptjax._moved import moved_name
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
    "Completion", "chain", "complete", "cut", "draw", "for_decoding", "from_config", "generate", "greedy", "min_p",
    "programs", "prompt_ids", "repetition_penalty", "speculate", "stop_strings", "stream", "temperature", "text_chunks",
    "top_k", "top_p",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
