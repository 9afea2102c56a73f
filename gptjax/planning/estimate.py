"""Memory and time of a step by formula, in microseconds of thought: what `search` sorts by before it compiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from gptjax.config import Config
from gptjax.planning.program import width
from gptjax.planning.slices import Slice
from gptjax.training.memory import Shape, block_elements, chip_bytes, itemsize


class Candidate(NamedTuple):
    cfg: Config
    shape: Shape
    memory_bytes: float  # a chip
    seconds: float  # a step


def candidate(cfg: Config, on: Slice, shape: Shape, n_params: int) -> Candidate:
    return Candidate(cfg, shape, chip_bytes(cfg, n_params, width(cfg), shape), seconds(cfg, on, shape, n_params))


def seconds(cfg: Config, on: Slice, shape: Shape, n_params: int) -> float:
    """Of a step: to compute, to read and write HBM, and to send, one after the other.

    HBM      every number of a layer passes about a dozen times, by what compiled programs did; and the weights, for
             each micro-batch, three times in bfloat16 and as a float32 gradient
    to send  fsdp: the weights in bfloat16, forward, backward and where they are computed again, and their gradients
             in float32; data: the gradients twice, for each micro-batch; tensor: the hidden state eight times a layer
    """
    model, chip = cfg.model, on.chip
    data, fsdp, tensor, _ = shape
    tokens = cfg.train.batch_size * width(cfg) / on.n_chips
    attention = 6 * model.n_layer * model.n_head * model.head_dim * width(cfg)  # half the square
    again = {"none": 1.0, "dots": 1.05, "full": 4 / 3, "offload": 4 / 3}[model.remat]
    flops = (6 * n_params + attention) * again * tokens
    micro, part = cfg.train.accumulation, n_params / tensor
    size = itemsize(model)
    passed = 12 * size * tokens * model.n_layer * (2 * model.d_model * tensor + block_elements(model)) * again
    hbm = passed + 14 * part * micro + 32 * part / fsdp
    gathers = (2 if model.remat == "none" else 3) * 2 * part * (fsdp - 1) / fsdp * micro
    scatters = 4 * part * (fsdp - 1) / fsdp * micro
    sums = 8 * part / fsdp * (data - 1) / data * micro
    blocks = 8 * model.n_layer * size * model.d_model * tokens * (tensor - 1)
    sent = gathers + scatters + sums + blocks
    return flops / (chip.tflops * 1e12) + hbm / (chip.hbm_gbps * 1e9) + sent / (chip.ici_gbps * 1e9)


def shapes(cfg: Config, n_chips: int) -> Iterator[Shape]:
    """Every (data, fsdp, tensor, 1) of so many chips that the heads and the batch allow."""
    for fsdp in _divisors(n_chips):
        for tensor in (t for t in _divisors(n_chips // fsdp) if t <= 8 and cfg.model.n_head % t == 0):
            data = n_chips // fsdp // tensor
            if cfg.train.batch_size % (data * fsdp) == 0:
                yield data, fsdp, tensor, 1


def variants(cfg: Config, on: Slice, n_params: int) -> list[Candidate]:
    """All meshes with all remat policies and numbers of micro-batches, the fastest by formula first."""
    found = []
    for shape in shapes(cfg, on.n_chips):
        rows = cfg.train.batch_size // (shape[0] * shape[1])
        for accumulation in _divisors(rows):
            for remat in ("none", "dots", "full"):
                changed = dataclasses.replace(
                    cfg,
                    model=dataclasses.replace(cfg.model, remat=remat),
                    train=dataclasses.replace(cfg.train, accumulation=accumulation),
                )
                found.append(candidate(changed, on, shape, n_params))
    return sorted(found, key=lambda c: (c.seconds, c.memory_bytes))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, math.isqrt(n) + 1) if n % d == 0] + [
        n // d for d in range(math.isqrt(n), 0, -1) if n % d == 0 and d * d != n
    ]
