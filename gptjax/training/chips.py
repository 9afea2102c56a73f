"""Peak performance of GPUs and TPUs, from their vendors' data sheets, for computing MFU and for `gptjax plan`."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Specification of one accelerator chip.

    The memory and the bandwidths are 0 for chips that `gptjax plan` does not support. The TPU values are from
    cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, and the interconnect bandwidth of TPU v4 is from arXiv:2304.01433, table
    4. The interconnect bandwidth is the sum over all links of a chip in the sending direction, which is half of the
    bidirectional bandwidth in the TPU documentation.

    Attributes:
        kinds: substrings that identify the chip in JAX's `device_kind`.
        tflops: peak TFLOP/s of dense bfloat16 matrix multiplications.
        hbm_gib: memory in GiB.
        hbm_gbps: memory bandwidth in 1e9 bytes per second.
        ici_gbps: interconnect bandwidth in 1e9 bytes per second.
    """

    kinds: tuple[str, ...]
    tflops: float
    hbm_gib: float = 0.0
    hbm_gbps: float = 0.0
    ici_gbps: float = 0.0


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
