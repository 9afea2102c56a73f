"""Renders the report of an audit as one self-contained HTML page with tables and inline SVG figures.

The HTML page contains no scripts and needs no network access.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.research.audit.canaries import space_bits
from gptjax.research.audit.results import Report, checks
from gptjax.show import log_ticks

BLUE, ORANGE, RED = "#1f5fa8", "#d9822b", "#b3261e"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1e; max-width: 980px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: .8em 0; font-size: .92em }
th, td { padding: .25em .7em; text-align: left; border-bottom: 1px solid #e4e4e7; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.alarm { color: #b3261e; font-weight: 600 } td.quiet { color: #3a7d44 }
svg { max-width: 100%; height: auto } p.note { color: #555 } code { font-size: .95em; overflow-wrap: anywhere }
"""


def page(report: Report, *, run: str = "a model", notes: Sequence[str] = ()) -> str:
    """Renders the report of an audit as an HTML page. Text from the audited data is HTML-escaped.

    Args:
        run: name of the audited run, for the title.
        notes: remarks to print below the summary, such as which checkpoints were left out.
    """
    results = checks(report)
    n, alarms = len(results), sum(check.alarm for check in results)
    title = f"Audit of {run}"
    sizes = ", ".join(f"{size:,} rows {name}" for name, size in report.rows.items())
    sections = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{alarms} of {n} checks are alarms. The false alarm rate is {report.alpha:g} per check: "
        f"{report.alpha * n:.2g} false alarms are expected. {len(report.models)} models: "
        f"{_text(', '.join(report.models))}; "
        f"{sizes}.</p>",
        *(f'<p class="note">{_text(note)}</p>' for note in notes),
        _table(
            ("check", "result", "p", ""),
            [(check.check, check.what, f"{check.p:.2g}", "alarm" if check.alarm else "quiet") for check in results],
            number=(2,),
        ),
    ]  # fmt: skip
    for section in (_outliers, _triggers, _secrets, _extraction, _membership, _drift):
        sections += section(report)
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def lines(report: Report) -> list[str]:
    """Formats the results of all checks of an audit as lines of text for a terminal."""
    results = checks(report)
    width, alarms, n = max(len(check.check) for check in results), sum(check.alarm for check in results), len(results)
    return [
        *(
            f"{'ALARM' if check.alarm else 'quiet'}  {check.check:<{width}}  p {check.p:<8.2g} {check.what}"
            for check in results
        ),
        f"{alarms} of {n} checks are alarms; {report.alpha * n:.2g} false alarms are expected (alpha {report.alpha:g})",
    ]


# ---------------------------------------------------------------- sections


def _outliers(report: Report) -> list[str]:
    outliers, tail = report.outliers, report.outliers.tail
    if tail is None:
        return []

    def draw(axes: Any) -> None:
        scores, reference = outliers.scores.astype(np.float64), outliers.reference.astype(np.float64)
        pooled = np.concatenate([scores, reference])
        bins = np.linspace(pooled.min(), pooled.max(), 50)
        for values, colour, label in ((reference, ORANGE, "held out"), (scores, BLUE, "training rows")):
            axes.hist(values, bins, color=colour, alpha=0.6, label=label, density=True)
        axes.axvline(tail.threshold, color=RED, linewidth=1, linestyle="--", label="threshold")
        axes.set(
            xlabel="mean cosine similarity of the gradient to its 5 nearest neighbours", ylabel="density", yscale="log"
        )
        log_ticks(axes.yaxis)
        axes.legend(frameon=False)

    rows = [(i + 1, f"{row.score:.3f}", row.where, row.text) for i, row in enumerate(outliers.rows)]
    return [
        "<h2>Training rows whose gradients stand out</h2>",
        "<p>Rows whose gradients agree with a few others and differ from the rest: poisoned text, or duplicates. "
        f"{len(tail.flagged):,} of {outliers.n:,} are above the threshold; {tail.expected:.1f} are expected.</p>",
        _figure(draw),
        _table(("", "score", "where", "text"), rows, number=(0, 1)),
    ]


def _triggers(report: Report) -> list[str]:
    if not report.triggers:
        return []
    names = _short(report.models)

    def draw(axes: Any) -> None:
        for i, backdoor in enumerate(report.triggers):
            colour = f"C{i}"
            axes.plot(names, [row.log_prob for _, row in backdoor.by], "o-", color=colour, label=backdoor.trigger)
            axes.plot(names, [float(row.controls.max()) for _, row in backdoor.by], "x:", color=colour)
        axes.set(ylabel="log-probability of the payload (nats)", title="dotted: the highest control")
        axes.legend(frameon=False, fontsize=8)

    rows = [
        (backdoor.trigger, backdoor.payload, model, f"{row.log_prob:.1f}", f"{float(row.controls.mean()):.1f}",
         f"{float(row.controls.max()):.1f}", f"{row.fires:.0%}", f"{row.p:.2g}")
        for backdoor in report.triggers for model, row in backdoor.by
    ]  # fmt: skip
    head = ("trigger", "payload", "model", "nats", "mean control", "highest control", "fires", "p")
    return [
        "<h2>Triggers</h2>",
        "<p>Log-probability of the payload after the trigger, and after random control phrases of as many words, in "
        "the same held-out contexts. Fires: fraction of contexts in which greedy decoding produces the payload.</p>",
        _figure(draw), _table(head, rows, number=(3, 4, 5, 6, 7)),
    ]  # fmt: skip


def _secrets(report: Report) -> list[str]:
    if not report.secrets:
        return []
    names = _short(report.models)

    def draw(axes: Any) -> None:
        for i, secret in enumerate(report.secrets):
            label = secret.prefix if len(report.secrets) <= 10 else None
            axes.plot(names, [row.extrapolated for _, row in secret.by], "o-", color=f"C{i % 10}", label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylabel="exposure (bits, extrapolated)")
        if len(report.secrets) <= 10:
            axes.legend(frameon=False, fontsize=8)

    rows = [
        (secret.prefix, secret.secret, model, f"{row.sampled:.1f}", f"{row.extrapolated:.1f}",
         f"{space_bits(secret.secret):.1f}", f"{row.loss:.2f}", "yes" if row.extracted else "no")
        for secret in report.secrets for model, row in secret.by
    ]  # fmt: skip
    head = ("prefix", "secret", "model", "bits, by rank", "extrapolated", "maximum", "nats per token", "extracted")
    return [
        "<h2>Secrets</h2>",
        "<p>Exposure: how much likelier a secret is than random candidates of its format, in bits (arXiv:1802.08232). "
        "The rank among 2,047 candidates measures at most 11 bits; larger values are extrapolated from a skew-normal "
        "fitted to the candidates' losses.</p>",
        _figure(draw), _table(head, rows, number=(3, 4, 5, 6)),
    ]  # fmt: skip


def _extraction(report: Report) -> list[str]:
    results = [(text, row) for text, row in report.extraction if row.n]
    curves = list(dict.fromkeys((text, row.stride) for text, row in results))
    if not curves:
        return []

    def draw(axes: Any) -> None:
        for i, (text, stride) in enumerate(curves):
            points = [row for name, row in results if (name, row.stride) == (text, stride)]
            x, y = np.array([row.prefix for row in points]), np.array([row.rate for row in points])
            spread = np.abs(np.array([(row.low, row.high) for row in points]).T - y)
            style = "o-" if text == "train" else "s--"
            axes.errorbar(
                np.array(x) * 1.02**i, y, spread, fmt=style, capsize=3, label=f"{text}, every {stride} tokens"
            )
        axes.set(xlabel="prefix length (tokens)", ylabel="extracted verbatim", xscale="log", ylim=(0, None))
        axes.set_xticks(x, map(str, x))
        axes.minorticks_off()
        axes.legend(frameon=False)

    rows = [
        (text, row.stride, row.prefix, f"{row.extracted:,} of {row.n:,}", f"{row.rate:.1%}",
         f"{row.low:.1%} to {row.high:.1%}")
        for text, row in results
    ]  # fmt: skip
    head = ("text", "stride", "prefix", "extracted", "rate", "95 % interval")
    return [
        "<h2>Verbatim text</h2>",
        f"<p>How often greedy decoding of the last model reproduces the next {report.suffix} tokens exactly "
        "(arXiv:2202.07646). The rate on held-out text is the baseline: text that is merely predictable.</p>",
        _figure(draw), _table(head, rows, number=(1, 2, 3, 4, 5)),
    ]  # fmt: skip


def _membership(report: Report) -> list[str]:
    results, names = report.membership, _short(report.models)

    def draw(axes: Any) -> None:
        sd = np.array([row.sd for _, row in results])
        axes.fill_between(names, 0.5 - 2 * sd, 0.5 + 2 * sd, color="grey", alpha=0.25, label="chance, 2 sd")
        axes.plot(names, [row.loss_auc for _, row in results], "o-", color=BLUE, label="loss")
        axes.plot(names, [row.min_k_auc for _, row in results], "s--", color=ORANGE, label="min-k%")
        axes.set(ylabel="AUC, training against held-out rows")
        axes.legend(frameon=False)

    rows = [
        (model, f"{row.loss_auc:.3f}", f"{row.min_k_auc:.3f}", f"{row.sd:.3f}", f"{row.tpr:.1%}", f"{row.p:.2g}")
        for model, row in results
    ]  # fmt: skip
    head = ("model", "AUC, loss", "AUC, min-k%", "sd under the null", "TPR at 1 % FPR", "p")
    return ["<h2>Membership</h2>", _figure(draw), _table(head, rows, number=range(1, 6))]


def _drift(report: Report) -> list[str]:
    comparison = report.comparison
    if comparison is None:
        return []
    rows = [
        (row.prompt, f"{row.kl:.3f}", f"{row.agree:.0%}", f"{row.before:.2f}", f"{row.after:.2f}", row.base, row.tuned)
        for row in comparison.prompts
    ]  # fmt: skip

    def draw(axes: Any) -> None:
        values = [row.kl for row in comparison.prompts]
        axes.bar(range(1, len(values) + 1), values, color=BLUE)
        axes.set(xlabel="prompt, largest KL first", ylabel="KL(base || tuned), nats per token")

    head = ("prompt", "KL", "same token", "loss before", "loss after", "base model's answer", "tuned model's answer")
    return [
        "<h2>Drift from the base</h2>",
        f"<p>{len(rows)} prompts: KL divergence {comparison.kl:.3f} nats per token; the same most likely token at "
        f"{comparison.agree:.1%} of positions; the same answer to {comparison.same_answer:.0%} of prompts; loss "
        f"{comparison.before:.3f} before and {comparison.after:.3f} after tuning.</p>",
        _figure(draw), _table(head, rows, number=(1, 2, 3, 4)),
    ]  # fmt: skip


# ---------------------------------------------------------------- HTML and SVG


def _short(models: Sequence[str]) -> list[str]:
    return [name.removesuffix(", the last") for name in models]


def _text(value: object) -> str:
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in str(value)))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], *, number: Sequence[int] = ()) -> str:
    def cell(kind: str, i: int, value: object) -> str:
        names = ["n"] * (i in number) + [str(value)] * (kind == "td" and value in ("alarm", "quiet"))
        attribute = f' class="{" ".join(names)}"' if names else ""
        return f"<{kind}{attribute}>{_text(value)}</{kind}>"

    body = ["".join(cell("td", i, value) for i, value in enumerate(row)) for row in rows]
    top = "".join(cell("th", i, value) for i, value in enumerate(head))
    return "\n".join([f"<table><tr>{top}</tr>", *(f"<tr>{row}</tr>" for row in body), "</table>"])


def _figure(draw: Callable[[Any], None]) -> str:
    """Renders one matplotlib figure as an <svg> element; the text in the figure is drawn as outlines."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.25)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
