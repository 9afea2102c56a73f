"""This module reports plans as tables for the terminal and as a roofline plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptjax.planning.plan import GIB, Plan
from gptjax.show import log_ticks
from gptjax.training.progress import duration

_FORMULA = {
    "train": "6 per matrix weight (4 if frozen) + 12 L D T for attention, of which kernels skip half",
    "decode": "2 per parameter + 4 L D T for attention",
}
SOURCES = "peaks: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; v4's interconnect: arXiv:2304.01433, table 4"


def table(plan: Plan, *, tokens: float | None = None, hours: float | None = None) -> list[str]:
    """Returns a plan as a text table, which is a list of lines.

    Args:
        tokens: number of training tokens. If `tokens` is given, the table also shows the time for training on this
            number of tokens.
        hours: training time in hours. If `hours` is given, the table also shows the number of tokens processed in this
            time.
    """
    lines = [
        f"{plan.what} step on {plan.slice}: {plan.chips} chips ({plan.topology}), {_mesh(plan) or 'no mesh'}, "
        f"remat={plan.remat}, compiled in {plan.compile_s:.0f} s",
        f"parameters         {plan.n_params:,}",
        f"per step           {plan.rows:,} rows, {plan.tokens:,} tokens, {plan.accumulation} micro-batches",
        "",
        f"HBM per chip       {_gib(plan.needed_bytes)} of {_gib(plan.hbm_bytes)} GiB"
        + ("" if plan.fits else ": does not fit"),
        *(f"  {name:<34} {_gib(size):>8} GiB" for name, size in plan.parts.items()),
        *([f"  {'in host memory, per chip':<34} {_gib(plan.host_bytes):>8} GiB"] if plan.host_bytes else []),
    ]
    if plan.roofline is None:
        return [*lines, "", "it would fit with", *(f"  {text}" for text in plan.advice)]
    times, peaks = plan.roofline, plan.peaks
    sent = sorted(plan.collectives.items(), key=lambda item: -item[1])
    lines += [
        "",
        f"{'per chip and step':<34}{'work':>12}{'peak per second':>20}{'ms at peak':>13}",
        _row("  matrix products", plan.flops / 1e12, "TFLOP", peaks["tflops"], times.compute_s),
        _row("  HBM", plan.hbm_traffic_bytes / 1e9, "GB", peaks["hbm_gbps"], times.hbm_s),
        _row("  interconnect", sum(size for _, size in sent) / 1e9, "GB", peaks["ici_gbps"], times.ici_s),
        *(f"    {kind:<24}{size / 1e9:>12.4g} GB" for kind, size in sent),
        "",
        f"step time          {1e3 * times.best:,.1f} ms if all three overlap, {1e3 * times.worst:,.1f} ms if none do",
        f"tokens per second  {plan.tokens_per_s(times.best):,.0f} to {plan.tokens_per_s(times.worst):,.0f}",
        f"model FLOPs        {plan.model_flops:.4g} per step: {_FORMULA[plan.what]}",
        f"MFU                {plan.mfu(times.best):.1%} to {plan.mfu(times.worst):.1%}: bounds, not a measurement",
    ]
    return [*lines, *_budget(plan, tokens, hours), SOURCES]


def _row(name: str, work: float, unit: str, peak: float, seconds: float) -> str:
    return f"{name:<28}{work:>12.4g} {unit:<5}{peak:>14g} {unit:<5}{1e3 * seconds:>13,.1f}"


def _budget(plan: Plan, tokens: float | None, hours: float | None) -> list[str]:
    rates = [plan.tokens_per_s(step_s) for step_s in plan.step_s]
    lines = []
    if tokens:
        times = [tokens / rate for rate in rates]
        chip_hours = [plan.chips * time / 3600 for time in times]
        lines.append(
            f"{tokens:.4g} tokens   {duration(times[0])} to {duration(times[1])} (h:min:s), {chip_hours[0]:,.1f} to "
            f"{chip_hours[1]:,.1f} chip hours, {tokens / plan.tokens:,.0f} steps"
        )
    if hours:
        lines.append(f"{hours:g} hours           {hours * 3600 * rates[1]:.4g} to {hours * 3600 * rates[0]:.4g} tokens")
    return lines


def comparison(plans: Sequence[Plan]) -> list[str]:
    """Returns a text table of the plans that `plan.search` returned, with a header and one line per plan."""
    lines = [f"{'mesh':<28}{'remat':<7}{'micro':>6}{'GiB per chip':>14}{'ms per step':>18}{'tokens/s':>24}{'MFU':>16}"]
    for plan in plans:
        mesh = _mesh(plan) or "no mesh"
        ms = " to ".join(f"{1e3 * s:,.0f}" for s in plan.step_s)
        rate = " to ".join(f"{plan.tokens_per_s(s):,.0f}" for s in plan.step_s)
        mfu = " to ".join(f"{plan.mfu(s):.0%}" for s in plan.step_s)
        lines.append(
            f"{mesh:<28}{plan.remat:<7}{plan.accumulation:>6}{_gib(plan.needed_bytes):>14}{ms:>18}{rate:>24}{mfu:>16}"
        )
    return lines


def _mesh(plan: Plan) -> str:
    return " ".join(f"{name}={n}" for name, n in plan.mesh.items() if n > 1)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.2f}"


def draw(plans: Sequence[Plan], path: str | Path) -> None:
    """Draws two roofline plots, for HBM and for the interconnect, and writes both plots to the image file `path`.

    Each plot shows attainable FLOP/s against arithmetic intensity, with one point per plan.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    peaks = plans[0].peaks
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    resources = (
        ("HBM", peaks["hbm_gbps"], lambda p: p.hbm_traffic_bytes),
        ("interconnect", peaks["ici_gbps"], lambda p: sum(p.collectives.values())),
    )
    for axis, (name, gbps, traffic) in zip(axes, resources, strict=True):
        ridge = peaks["tflops"] * 1e3 / gbps
        x = [ridge / 100, ridge, ridge * 100]
        axis.loglog(x, [peaks["tflops"] / 100, peaks["tflops"], peaks["tflops"]], color="black", linewidth=1)
        for plan in plans:
            if plan.roofline is not None and traffic(plan):
                intensity = plan.flops / traffic(plan)
                label = _mesh(plan) or "one chip"
                axis.plot(
                    intensity, min(peaks["tflops"], intensity * gbps / 1e3), "o", label=f"{label}, remat={plan.remat}"
                )
        log_ticks(axis.xaxis)
        log_ticks(axis.yaxis)
        axis.set_xlabel(f"FLOP per byte of {name} traffic")
        axis.set_title(f"{name}: {gbps:g} GB/s per chip")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("attainable TFLOP/s per chip")
    figure.suptitle(f"{plans[0].what} step on {plans[0].slice}, {plans[0].n_params:,} parameters")
    figure.savefig(path, dpi=130)
    plt.close(figure)
