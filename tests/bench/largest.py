"""Largest batch of GPT-2 124M that fits one TPU v5e, by attention kernel, loss and remat policy; no TPU is needed.

    python tests/bench/largest.py [--on v5e-1] [--config gpt2-124m] [remat ...]

The step is compiled for different numbers of rows of 1,024 tokens; each guess extrapolates the memory linearly from two
earlier ones. Prints the largest number of rows that fits, for which one row more is known not to fit. Logits are
`whole`, [rows x 1,024, 50,257] at once, or `chunked`. Attention `xla`: without the splash kernel.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

REMAT = ("none", "dots", "full")


def largest(rows_to_bytes, limit: int) -> tuple[int, int]:
    """(largest number of rows with `rows_to_bytes(rows) <= limit`, its bytes)."""
    known = {rows: rows_to_bytes(rows) for rows in (4, 8)}
    while True:
        fit = max((rows for rows in known if known[rows] <= limit), default=0)
        too_many = min((rows for rows in known if known[rows] > limit), default=0)
        if fit + 1 == too_many or (not fit and too_many == 1):
            return fit, known.get(fit, 0)
        (a, b) = sorted(known, key=lambda rows: abs(known[rows] - limit))[:2]
        slope = (known[b] - known[a]) / (b - a)
        guess = int(a + (limit - known[a]) / slope) if slope > 0 else 2 * fit
        guess = max(guess, fit + 1)
        if too_many:
            guess = min(guess, too_many - 1)
        known[guess] = rows_to_bytes(guess)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="v5e-1")
    parser.add_argument("--config", default="gpt2-124m")
    parser.add_argument("remat", nargs="*", default=REMAT)
    args = parser.parse_args()
    from gptjax.planning.slices import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from gptjax.config import load_config
    from gptjax.ops import fused
    from gptjax.planning.plan import GIB, plan

    print(f"{args.config} on {args.on}")
    print(f"{'attention':<10}{'logits':<10}{'remat':<8}{'rows':>6}{'GiB':>8}{'compiled':>10}")
    for attention in ("splash", "xla"):
        for logits in ("chunked", "whole"):
            for remat in args.remat:
                compiled, hbm_bytes = 0, 0

                def needed(rows: int, remat=remat, logits=logits) -> int:
                    nonlocal compiled, hbm_bytes
                    compiled += 1
                    cfg = load_config(
                        args.config, "model.vocab_size=50257", f"model.remat={remat}", f"train.batch_size={rows}",
                        "train.accumulation=1",
                    )  # fmt: skip
                    whole = rows * cfg.model.context_length
                    result = plan(cfg, args.on, chunk=whole if logits == "whole" else None)
                    hbm_bytes = result.hbm_bytes
                    return result.needed_bytes if result.fits else max(result.needed_bytes, result.hbm_bytes + 1)

                fits = fused.splash_fits if attention == "splash" else lambda T: False
                with mock.patch("gptjax.ops.fused.splash_fits", fits):
                    needed(4)
                    rows, size = largest(needed, hbm_bytes)
                print(f"{attention:<10}{logits:<10}{remat:<8}{rows:>6}{size / GIB:>8.2f}{compiled:>10}", flush=True)


if __name__ == "__main__":
    main()
