"""A plan for people: tables on the terminal, a roofline as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptjax.planning.plan import GIB, Plan
from gptjax.show import log_ticks
from gptjax.training.progress import duration

_FORMULA = {
    "train": "6 a weight (4 a frozen one), 12 L D T of attention, of which kernels skip half",
    "decode": "2 a weight, 4 L D T of attention",
}
SOURCES = "peaks: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; v4's interconnect: arXiv:2304.01433, table 4"


def table(found: Plan, *, tokens: float | None = None, hours: float | None = None) -> list[str]:
    """The lines of one plan.

    Args:
        tokens, hours: a budget; its time, or what it reads, is added.
    """
    lines = [
        f"{found.what} step on {found.slice}: {found.chips} chips ({found.topology}), {_mesh(found) or 'no mesh'}, "
        f"remat={found.remat}, compiled in {found.compile_s:.0f} s",
        f"parameters         {found.n_params:,}",
        f"a step             {found.rows:,} rows, {found.tokens:,} tokens, {found.accumulation} micro-batches",
        "",
        f"HBM of a chip      {_gib(found.needed_bytes)} of {_gib(found.hbm_bytes)} GiB"
        + ("" if found.fits else ": does not fit"),
        *(f"  {name:<34} {_gib(size):>8} GiB" for name, size in found.parts.items()),
        *([f"  in the host's memory, for a chip    {_gib(found.host_bytes):>8} GiB"] if found.host_bytes else []),
    ]
    if found.roofline is None:
        return [*lines, "", "it would fit with", *(f"  {text}" for text in found.advice)]
    times, peaks = found.roofline, found.peaks
    sent = sorted(found.collectives.items(), key=lambda item: -item[1])
    lines += [
        "",
        f"{'of a chip and step':<34}{'work':>12}{'peak a second':>20}{'ms at peak':>13}",
        _row("  products", found.flops / 1e12, "TFLOP", peaks["tflops"], times.compute_s),
        _row("  HBM", found.hbm_traffic_bytes / 1e9, "GB", peaks["hbm_gbps"], times.hbm_s),
        _row("  interconnect", sum(size for _, size in sent) / 1e9, "GB", peaks["ici_gbps"], times.ici_s),
        *(f"    {kind:<24}{size / 1e9:>12.4g} GB" for kind, size in sent),
        "",
        f"step time          {1e3 * times.best:,.1f} ms if all three overlap, {1e3 * times.worst:,.1f} ms if none do",
        f"tokens a second    {found.tokens_per_s(times.best):,.0f} to {found.tokens_per_s(times.worst):,.0f}",
        f"model FLOPs        {found.model_flops:.4g} a step: {_FORMULA[found.what]}",
        f"MFU                {found.mfu(times.best):.1%} to {found.mfu(times.worst):.1%}: bounds, not a measurement",
    ]
    return [*lines, *_budget(found, tokens, hours), SOURCES]


def _row(name: str, work: float, unit: str, peak: float, seconds: float) -> str:
    return f"{name:<28}{work:>12.4g} {unit:<5}{peak:>14g} {unit:<5}{1e3 * seconds:>13,.1f}"


def _budget(found: Plan, tokens: float | None, hours: float | None) -> list[str]:
    rates = [found.tokens_per_s(step_s) for step_s in found.step_s]
    lines = []
    if tokens:
        times = [tokens / rate for rate in rates]
        chip_hours = [found.chips * time / 3600 for time in times]
        lines.append(
            f"{tokens:.4g} tokens   {duration(times[0])} to {duration(times[1])} (h:min:s), {chip_hours[0]:,.1f} to "
            f"{chip_hours[1]:,.1f} chip hours, {tokens / found.tokens:,.0f} steps"
        )
    if hours:
        lines.append(f"{hours:g} hours           {hours * 3600 * rates[1]:.4g} to {hours * 3600 * rates[0]:.4g} tokens")
    return lines


def comparison(found: Sequence[Plan]) -> list[str]:
    """One line a plan, as `search` gives them."""
    lines = [f"{'mesh':<28}{'remat':<7}{'micro':>6}{'GiB a chip':>12}{'ms a step':>18}{'tokens/s':>24}{'MFU':>16}"]
    for one in found:
        mesh = _mesh(one) or "no mesh"
        ms = " to ".join(f"{1e3 * s:,.0f}" for s in one.step_s)
        rate = " to ".join(f"{one.tokens_per_s(s):,.0f}" for s in one.step_s)
        mfu = " to ".join(f"{one.mfu(s):.0%}" for s in one.step_s)
        lines.append(
            f"{mesh:<28}{one.remat:<7}{one.accumulation:>6}{_gib(one.needed_bytes):>12}{ms:>18}{rate:>24}{mfu:>16}"
        )
    return lines


def _mesh(found: Plan) -> str:
    return " ".join(f"{name}={n}" for name, n in found.mesh.items() if n > 1)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.2f}"


def draw(found: Sequence[Plan], path: str | Path) -> None:
    """Work over traffic: each plan against what a chip computes, reads and receives at most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    peaks = found[0].peaks
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    sides = (
        ("HBM", peaks["hbm_gbps"], lambda p: p.hbm_traffic_bytes),
        ("interconnect", peaks["ici_gbps"], lambda p: sum(p.collectives.values())),
    )
    for axis, (name, gbps, traffic) in zip(axes, sides, strict=True):
        ridge = peaks["tflops"] * 1e3 / gbps
        x = [ridge / 100, ridge, ridge * 100]
        axis.loglog(x, [peaks["tflops"] / 100, peaks["tflops"], peaks["tflops"]], color="black", linewidth=1)
        for one in found:
            if one.roofline is not None and traffic(one):
                intensity = one.flops / traffic(one)
                label = _mesh(one) or "one chip"
                axis.plot(
                    intensity, min(peaks["tflops"], intensity * gbps / 1e3), "o", label=f"{label}, remat={one.remat}"
                )
        log_ticks(axis.xaxis)
        log_ticks(axis.yaxis)
        axis.set_xlabel(f"FLOP a byte of {name}")
        axis.set_title(f"{name}: {gbps:g} GB/s a chip")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("TFLOP/s a chip at most")
    figure.suptitle(f"{found[0].what} step on {found[0].slice}, {found[0].n_params:,} parameters")
    figure.savefig(path, dpi=130)
    plt.close(figure)
