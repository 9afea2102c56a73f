"""Memory estimates of a training step."""

from typing import get_args, get_type_hints

from gptjax import config
from gptjax.training.memory import memory_bytes


def test_the_memory_estimate_supports_every_remat():
    for remat in get_args(get_type_hints(config.ModelConfig)["remat"]):
        cfg = config.load_config("tiny-gpt2", f"model.remat={remat}", "model.vocab_size=257")
        assert memory_bytes(cfg, 1000, 257)["activations"] > 0
