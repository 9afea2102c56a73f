"""Peak figures of accelerators, from their vendors' data sheets: what a measured or planned rate is compared with."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip. Only those that `gptjax plan` knows have all figures.

    TPU figures are of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; of v4's interconnect, arXiv:2304.01433, table 4. The
    interconnect's is what all links of a chip send together, half of the bidirectional figure of those pages.
    """

    kinds: tuple[str, ...]  # parts of jax's device_kind
    tflops: float  # dense bfloat16
    hbm_gib: float = 0.0
    hbm_gbps: float = 0.0  # 1e9 bytes a second
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
    """FLOP/s of one chip; None on a CPU or an unknown chip."""
    if platform == "cpu":
        return None
    kind = device_kind.lower()
    return next((chip.tflops * 1e12 for chip in CHIPS.values() if any(name in kind for name in chip.kinds)), None)
