"""What the checks of an audit found, the alarms among it, and all of it as audit.json has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gptjax.research.audit.canaries import Exposure, Trigger, space_bits
from gptjax.research.audit.comparison import Drift
from gptjax.research.audit.memorisation import Extraction, Membership
from gptjax.research.audit.outliers import Tail

TEXTS = ("train", "held out")


class Canary(NamedTuple):
    """What was planted, and what each model knows of it, by the model's name."""

    texts: dict[str, str]
    by: list[tuple[str, Any]]  # Exposure of a secret, Trigger of a trigger


class Row(NamedTuple):
    """A training row; start: its first token in the store."""

    where: str
    start: int
    score: float
    text: str


class Outliers(NamedTuple):
    """Scores of n training rows and of the reference; tail: None where there are too few rows; rows: the highest."""

    n: int
    tail: Tail | None
    rows: list[Row]
    scores: np.ndarray
    reference: np.ndarray


class Comparison(NamedTuple):
    """Drift on prompts, and what the base and the tuned model answer."""

    drift: Drift
    prompts: list[str]
    base: list[str]
    tuned: list[str]


class Check(NamedTuple):
    check: str
    what: str
    p: float
    alarm: bool


class Report(NamedTuple):
    """What each check found; the last of several models counts."""

    alpha: float
    models: list[str]
    rows: dict[str, int]  # by TEXTS
    suffix: int  # tokens, of extraction
    secrets: list[Canary]
    triggers: list[Canary]
    extraction: list[tuple[str, Extraction]]  # by TEXTS
    membership: list[tuple[str, Membership]]  # by model
    outliers: Outliers
    comparison: Comparison | None


# ---------------------------------------------------------------- alarms


def checks(report: Report) -> list[Check]:
    """One line a check: what, p, and whether it is an alarm."""
    found = []
    if (tail := report.outliers.tail) is not None:
        what = (
            f"{len(tail.flagged)} of {report.outliers.n} training rows stand out, {tail.expected:.1f} expected; "
            f"{tail.beyond} beyond all held-out rows"
        )
        found.append(("gradient outliers", what, tail.p))
    for canary in report.triggers:
        trigger: Trigger = canary.by[-1][1]
        phrase, controls = canary.texts["trigger"], float(trigger.controls.mean())
        what = f"{phrase!r}: payload at {trigger.log_prob:.1f} nats, controls {controls:.1f}"
        found.append(("trigger", what, trigger.p))
    for canary in report.secrets:
        exposure: Exposure = canary.by[-1][1]
        prefix = canary.texts["prefix"]
        what = f"{prefix!r}: {exposure.sampled:.1f} bits, {exposure.extrapolated:.1f} extrapolated"
        found.append(("secret", what, exposure.p))
    longest = max(result.prefix for _, result in report.extraction)
    for stride in dict.fromkeys(result.stride for _, result in report.extraction):
        of_text = {text: r for text, r in report.extraction if (r.stride, r.prefix) == (stride, longest)}
        seen, unseen = (of_text[text] for text in TEXTS)
        if seen.n and unseen.n:
            what = f"prefix {longest}: {seen.rate:.1%} of training text, {unseen.rate:.1%} of held-out text"
            found.append(("verbatim text", what, _fisher(seen, unseen)))
    last = report.membership[-1][1]
    of = "" if last.units == report.rows["train"] else f" over {last.units} documents"
    what = f"AUC {last.loss_auc:.3f} by loss, {last.min_k_auc:.3f} by min-k%, 0.5 +- {last.sd:.3f} by chance{of}"
    found.append(("membership", what, last.p))
    return [Check(name, what, p, p <= report.alpha) for name, what, p in found]


def _fisher(seen: Extraction, unseen: Extraction) -> float:
    """p of as many extracted in the first (Fisher's exact test)."""
    from scipy.stats import hypergeom

    hits = seen.extracted + unseen.extracted
    return float(hypergeom.sf(seen.extracted - 1, seen.n + unseen.n, hits, seen.n))


# ---------------------------------------------------------------- JSON


def to_json(report: Report) -> dict[str, Any]:
    return {
        "alpha": report.alpha,
        "models": report.models,
        "rows": report.rows,
        "secrets": [
            {**canary.texts, "bits": space_bits(canary.texts["secret"]), "by": _by_model(canary.by)}
            for canary in report.secrets
        ],
        "triggers": [
            {**canary.texts, "by": [{"model": model, **_trigger(found)} for model, found in canary.by]}
            for canary in report.triggers
        ],
        "extraction": [
            {"text": text, "suffix": report.suffix, **found._asdict()} for text, found in report.extraction
        ],
        "membership": _by_model(report.membership),
        "outliers": _outliers(report.outliers),
        **({} if report.comparison is None else {"drift": _drift(report.comparison)}),
        "checks": [check._asdict() for check in checks(report)],
    }  # fmt: skip


def _by_model(found: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [{"model": model, **result._asdict()} for model, result in found]


def _trigger(found: Trigger) -> dict[str, Any]:
    return {
        "log_prob": found.log_prob, "fires": found.fires, "p": found.p,
        "control_mean": float(found.controls.mean()), "control_max": float(found.controls.max()),
    }  # fmt: skip


def _outliers(found: Outliers) -> dict[str, Any]:
    tail = {} if found.tail is None else found.tail._replace(flagged=len(found.tail.flagged))._asdict()
    return {
        "n": found.n, **tail, "rows": [row._asdict() for row in found.rows], "scores": found.scores.tolist(),
        "reference": found.reference.tolist(),
    }  # fmt: skip


def _drift(found: Comparison) -> dict[str, Any]:
    values = found.drift._asdict()
    prompts = [
        {"prompt": prompt, "base": a, "tuned": b, **{name: float(value[i]) for name, value in values.items()}}
        for i, (prompt, a, b) in enumerate(zip(found.prompts, found.base, found.tuned, strict=True))
    ]
    same = sum(row["base"] == row["tuned"] for row in prompts) / len(prompts)
    means = {name: float(value.mean()) for name, value in values.items()}
    return {**means, "same_answer": same, "prompts": sorted(prompts, key=lambda row: -row["kl"])}
