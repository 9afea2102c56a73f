"""From a model to text: samplers, and the compiled loop that decodes."""

from gptjax.generation.decode import generate
from gptjax.generation.sampling import chain, from_config, greedy, temperature, top_k, top_p

__all__ = ["chain", "from_config", "generate", "greedy", "temperature", "top_k", "top_p"]
