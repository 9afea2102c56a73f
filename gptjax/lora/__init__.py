"""Low-rank adapters: small trees beside a frozen one, and the functions between them."""

from gptjax.config import LoraConfig
from gptjax.lora.adapter import (
    Adapter,
    attach,
    average,
    bind,
    concatenate,
    init,
    interpolate,
    masked,
    merge,
    negate,
    rows,
    split,
    targets,
    unsplit,
    with_dropout,
)
from gptjax.lora.weight import LoraWeight

__all__ = [
    "Adapter", "LoraConfig", "LoraWeight", "attach", "average", "bind", "concatenate", "init", "interpolate", "masked",
    "merge", "negate", "rows", "split", "targets", "unsplit", "with_dropout",
]  # fmt: skip
