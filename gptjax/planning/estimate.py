"""This module estimates the memory and the time of a training step by formula.

`plan.search` ranks candidate configs by the estimated step time, so that only the most promising candidates are
compiled.
"""

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
    memory_bytes: float  # `memory_bytes` is the estimated memory per chip in bytes.
    seconds: float  # `seconds` is the estimated time per step.


def candidate(cfg: Config, on: Slice, shape: Shape, n_params: int) -> Candidate:
    """Returns the `Candidate` for the config `cfg` and the mesh shape `shape`, with estimated memory and step time."""
    return Candidate(cfg, shape, chip_bytes(cfg, n_params, width(cfg), shape), seconds(cfg, on, shape, n_params))


def seconds(cfg: Config, on: Slice, shape: Shape, n_params: int) -> float:
    """Returns the estimated time of a training step in seconds.

    The estimated step time is the sum of the times of computation, HBM traffic and communication, without overlap.

    HBM traffic is estimated from the number of times that the program of the training step reads or writes each array.
    Each activation of a layer is read or written about 12 times per training step, as counted in compiled programs. In
    each micro-batch, weights and gradients cause 14 bytes of HBM traffic per parameter: 6 bytes for reading the
    bfloat16 weights three times, and 8 bytes for the float32 gradients. In each step, the optimizer causes 32 bytes of
    HBM traffic per parameter.

    The communication time is estimated from the bytes that a chip sends along each mesh axis. Along the mesh axis fsdp,
    each micro-batch all-gathers the bfloat16 weights for the forward pass, the backward pass and rematerialisation, and
    reduce-scatters the float32 gradients. Along the mesh axis data, the gradients are all-reduced once per micro-batch.
    Along the mesh axis tensor, the hidden states are sent eight times per layer.
    """
    model, chip = cfg.model, on.chip
    data, fsdp, tensor, _ = shape
    tokens = cfg.train.batch_size * width(cfg) / on.n_chips
    # Attention takes 6 L D T FLOPs per token instead of 12 L D T (L layers, D attention channels, T tokens per row),
    # because the causal mask hides half of the T x T scores.
    attention = 6 * model.n_layer * model.n_head * model.head_dim * width(cfg)
    recompute = {"none": 1.0, "dots": 1.05, "full": 4 / 3, "offload": 4 / 3}[model.remat]
    flops = (6 * n_params + attention) * recompute * tokens
    micro, n_local = cfg.train.accumulation, n_params / tensor
    size = itemsize(model)
    activations = 12 * size * tokens * model.n_layer * (2 * model.d_model * tensor + block_elements(model)) * recompute
    hbm = activations + 14 * n_local * micro + 32 * n_local / fsdp
    gathers = (2 if model.remat == "none" else 3) * 2 * n_local * (fsdp - 1) / fsdp * micro
    scatters = 4 * n_local * (fsdp - 1) / fsdp * micro
    sums = 8 * n_local / fsdp * (data - 1) / data * micro
    blocks = 8 * model.n_layer * size * model.d_model * tokens * (tensor - 1)
    sent = gathers + scatters + sums + blocks
    return flops / (chip.tflops * 1e12) + hbm / (chip.hbm_gbps * 1e9) + sent / (chip.ici_gbps * 1e9)


def shapes(cfg: Config, n_chips: int) -> Iterator[Shape]:
    """Yields all usable mesh shapes (data, fsdp, tensor, 1) for `n_chips` chips.

    A mesh shape is usable if `tensor` is at most 8, `tensor` divides the number of attention heads, and data x fsdp
    divides the batch size.
    """
    for fsdp in _divisors(n_chips):
        for tensor in (t for t in _divisors(n_chips // fsdp) if t <= 8 and cfg.model.n_head % t == 0):
            data = n_chips // fsdp // tensor
            if cfg.train.batch_size % (data * fsdp) == 0:
                yield data, fsdp, tensor, 1


def variants(cfg: Config, on: Slice, n_params: int) -> list[Candidate]:
    """Returns the candidates for all mesh shapes, remat policies and numbers of micro-batches, sorted by estimated step
    time."""
    candidates = []
    for shape in shapes(cfg, on.n_chips):
        rows = cfg.train.batch_size // (shape[0] * shape[1])
        for accumulation in _divisors(rows):
            for remat in ("none", "dots", "full"):
                variant = dataclasses.replace(
                    cfg,
                    model=dataclasses.replace(cfg.model, remat=remat),
                    train=dataclasses.replace(cfg.train, accumulation=accumulation),
                )
                candidates.append(candidate(variant, on, shape, n_params))
    return sorted(candidates, key=lambda c: (c.seconds, c.memory_bytes))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, math.isqrt(n) + 1) if n % d == 0] + [
        n // d for d in range(math.isqrt(n), 0, -1) if n % d == 0 and d * d != n
    ]
