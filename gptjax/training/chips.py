"""Peak performance of accelerators, from their vendors' data sheets; used for MFU and `gptjax plan`."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Specification of one chip. Only the chips that `gptjax plan` supports have all values; for the others, memory
    and bandwidths are 0.

    TPU values are from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, and v4's interconnect bandwidth from
    arXiv:2304.01433, table 4. The interconnect bandwidth is the sum over all links of a chip in the sending direction,
    which is half of the bidirectional bandwidth in the TPU documentation.
    """

    kinds: tuple[str, ...]  # substrings that identify the chip in jax's device_kind
    tflops: float  # peak TFLOP/s of dense bfloat16 matrix multiplications
    hbm_gib: float = 0.0  # memory in GiB
    hbm_gbps: float = 0.0  # memory bandwidth in 1e9 bytes per second
    ici_gbps: float = 0.0  # interconnect bandwidth in 1e9 bytes per second


CHIPS = {
    "v6e": Chip(("v6e", "v6 lite"), 918, 32, 1638, 400),
    "v5e": Chip(("v5e", "v5 lite"), 197, 16, 819, 200),
    "v5p": Chip(("v5p", "v5"), 459, 95, 2765, 600),
    "v4": Chip(("v4",), 275, 32, 1200, 300),
    "v3": Chip(("v3",), 123),
    "v2": Chip(("v2",), 45),
    "b200": Chip(("b200",), 2250),
    "h200": Chip(("h200",), 989),
    "h100": Chip(("h100",), 989),
    "a100": Chip(("a100",), 312),
    "l40": Chip(("l40",), 362),
    "l4": Chip(("l4",), 121),
    "a10g": Chip(("a10g",), 70),
    "t4": Chip(("t4",), 65),
}


def peak_flops(platform: str, device_kind: str) -> float | None:
    """Returns the peak FLOP/s of one chip in bfloat16, or None for a CPU or an unknown chip."""
    if platform == "cpu":
        return None
    kind = device_kind.lower()
    return next((chip.tflops * 1e12 for chip in CHIPS.values() if any(name in kind for name in chip.kinds)), None)
