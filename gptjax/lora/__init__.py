"""This package implements low-rank adapters (LoRA, rsLoRA, DoRA, PiSSA, OLoRA, MiSS) as pure functions on parameter
trees."""

from typing import Any

from gptjax._moved import moved_name
from gptjax.config import LoraConfig
from gptjax.lora.adapter import (
    Adapter,
    attach,
    average,
    bind,
    concatenate,
    init,
    init_from_weights,
    interpolate,
    merge,
    negate,
    rows,
    targets,
    to_lora,
    truncate_rank,
    with_dropout,
)
from gptjax.lora.combination import combine
from gptjax.lora.weight import LoraWeight, MissWeight

__all__ = [
    "Adapter", "LoraConfig", "LoraWeight", "MissWeight", "attach", "average", "bind", "combine", "concatenate", "init",
    "init_from_weights", "interpolate", "merge", "negate", "rows", "targets", "to_lora", "truncate_rank",
    "with_dropout",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
