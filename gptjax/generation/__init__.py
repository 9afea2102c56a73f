"""From a model to text: samplers, and the compiled loops that decode."""

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
from gptjax.generation.text import cut, pieces, prompt_ids, stop_strings
from gptjax.model.gpt import for_decoding

__all__ = [
    "Completion", "chain", "complete", "cut", "draw", "for_decoding", "from_config", "generate", "greedy", "min_p",
    "pieces", "programs", "prompt_ids", "repetition_penalty", "speculate", "stop_strings", "stream", "temperature",
    "top_k", "top_p",
]  # fmt: skip
