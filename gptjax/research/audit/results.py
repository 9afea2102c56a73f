"""What the checks of an audit found, the alarms among it, and all of it as audit.json has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gptjax.research.audit.canaries import Exposure, Trigger, space_bits
from gptjax.research.audit.memorisation import Extraction, Membership
from gptjax.research.audit.outliers import Tail

TEXTS = ("train", "held out")


class Secret(NamedTuple):
    """A planted secret, and how far each model knows it, by the model's name."""

    prefix: str
    secret: str
    by: list[tuple[str, Exposure]]


class Backdoor(NamedTuple):
    """A planted trigger with its payload, and what it does to each model, by the model's name."""

    trigger: str
    payload: str
    by: list[tuple[str, Trigger]]


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


class Prompt(NamedTuple):
    """What the base and the tuned model answer; the rest as in `Drift`."""

    prompt: str
    base: str
    tuned: str
    kl: float
    agree: float
    before: float
    after: float


class Comparison(NamedTuple):
    """`Drift`, means over the prompts; same_answer: share of the prompts. The most changed prompt is the first."""

    kl: float
    agree: float
    before: float
    after: float
    same_answer: float
    prompts: list[Prompt]


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
    secrets: list[Secret]
    triggers: list[Backdoor]
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
    for backdoor in report.triggers:
        trigger = backdoor.by[-1][1]
        controls = float(trigger.controls.mean())
        what = f"{backdoor.trigger!r}: payload at {trigger.log_prob:.1f} nats, controls {controls:.1f}"
        found.append(("trigger", what, trigger.p))
    for secret in report.secrets:
        exposure = secret.by[-1][1]
        what = f"{secret.prefix!r}: {exposure.sampled:.1f} bits, {exposure.extrapolated:.1f} extrapolated"
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
    tail = report.outliers.tail
    return {
        "alpha": report.alpha,
        "models": report.models,
        "rows": report.rows,
        "secrets": [
            {
                "prefix": secret.prefix, "secret": secret.secret, "bits": space_bits(secret.secret),
                "by": [{"model": model, **found._asdict()} for model, found in secret.by],
            }
            for secret in report.secrets
        ],
        "triggers": [
            {
                "trigger": backdoor.trigger, "payload": backdoor.payload,
                "by": [
                    {
                        "model": model, "log_prob": found.log_prob, "fires": found.fires, "p": found.p,
                        "control_mean": float(found.controls.mean()), "control_max": float(found.controls.max()),
                    }
                    for model, found in backdoor.by
                ],
            }
            for backdoor in report.triggers
        ],
        "extraction": [
            {"text": text, "suffix": report.suffix, **found._asdict()} for text, found in report.extraction
        ],
        "membership": [{"model": model, **found._asdict()} for model, found in report.membership],
        "outliers": {
            "n": report.outliers.n,
            **({} if tail is None else {**tail._asdict(), "flagged": len(tail.flagged)}),
            "rows": [row._asdict() for row in report.outliers.rows],
            "scores": report.outliers.scores.tolist(),
            "reference": report.outliers.reference.tolist(),
        },
        **({} if report.comparison is None else {"drift": {
            **report.comparison._asdict(), "prompts": [prompt._asdict() for prompt in report.comparison.prompts],
        }}),
        "checks": [check._asdict() for check in checks(report)],
    }  # fmt: skip
