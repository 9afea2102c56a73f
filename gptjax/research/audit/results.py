"""Defines the data classes for the results of an audit, computes the alarms, and converts the results to JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gptjax.research.audit.canaries import Exposure, Trigger, space_bits
from gptjax.research.audit.memorisation import Extraction, Membership
from gptjax.research.audit.outliers import Tail

TEXTS = ("train", "held out")


class Secret(NamedTuple):
    """A planted secret and its exposure in each audited model.

    Attributes:
        prefix: text that precedes the secret in the training text.
        secret: the secret.
        by: pairs (model name, exposure of the secret in the model).
    """

    prefix: str
    secret: str
    by: list[tuple[str, Exposure]]


class Backdoor(NamedTuple):
    """A planted backdoor trigger, its payload, and its effect on each audited model.

    Attributes:
        trigger: phrase that is meant to elicit the payload.
        payload: text that the trigger is meant to elicit.
        by: pairs (model name, effect of the trigger on the model).
    """

    trigger: str
    payload: str
    by: list[tuple[str, Trigger]]


class Row(NamedTuple):
    """A training row with its outlier score.

    Attributes:
        where: location of the row in the training text, written out for the report.
        start: index of the row's first token in the token store.
        score: outlier score of the row.
        text: the row's text. A long text is shortened to its beginning and its end.
    """

    where: str
    start: int
    score: float
    text: str


class Outliers(NamedTuple):
    """Outlier scores of n training rows and of the reference rows.

    Attributes:
        n: number of training rows.
        tail: result of `outliers.tail`, or None if there are too few training rows.
        rows: training rows with the highest scores, highest first.
        scores: outlier scores of the training rows, [n].
        reference: outlier scores of the reference rows, [m].
    """

    n: int
    tail: Tail | None
    rows: list[Row]
    scores: np.ndarray
    reference: np.ndarray


class Prompt(NamedTuple):
    """The answers of the base model and of the fine-tuned model to one prompt.

    Attributes:
        prompt: the prompt.
        base: answer of the base model.
        tuned: answer of the fine-tuned model.
        kl, agree, before, after: differences between the predictions on the prompt, defined as in `Drift`.
    """

    prompt: str
    base: str
    tuned: str
    kl: float
    agree: float
    before: float
    after: float


class Comparison(NamedTuple):
    """Comparison of a base model and a fine-tuned model on a set of prompts.

    Attributes:
        kl, agree, before, after: differences between the predictions, defined as in `Drift`, averaged over the prompts.
        same_answer: fraction of prompts to which both models give the same answer.
        prompts: the prompts with both models' answers, largest KL divergence first.
    """

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
    """The results of all checks of an audit.

    If an audit covers several models, its alarms are computed from the results of the last model only.

    Attributes:
        alpha: largest p-value at which a check raises an alarm.
        models: names of the audited models.
        rows: dict from the name of each text in TEXTS to the number of its rows that were audited.
        suffix: length of the suffixes to extract, in tokens.
        secrets, triggers: planted canaries, and the results of their checks.
        extraction: pairs (name of a text in TEXTS, result of the function `extraction`).
        membership: pairs (model name, result of the function `membership`).
        outliers: outlier scores of the training rows.
        comparison: comparison with the base model, or None if no base model was given.
    """

    alpha: float
    models: list[str]
    rows: dict[str, int]
    suffix: int
    secrets: list[Secret]
    triggers: list[Backdoor]
    extraction: list[tuple[str, Extraction]]
    membership: list[tuple[str, Membership]]
    outliers: Outliers
    comparison: Comparison | None


# ---------------------------------------------------------------- alarms


def checks(report: Report) -> list[Check]:
    """Lists all checks of an audit, each with a description of its result, its p-value, and whether it is an alarm."""
    results: list[tuple[str, str, float]] = []
    if (tail := report.outliers.tail) is not None:
        what = (
            f"{len(tail.flagged)} of {report.outliers.n} training rows above the threshold, "
            f"{tail.expected:.1f} expected; {tail.beyond} above all held-out rows"
        )
        results.append(("gradient outliers", what, tail.p))
    for backdoor in report.triggers:
        effect = backdoor.by[-1][1]
        controls = float(effect.controls.mean())
        what = f"{backdoor.trigger!r}: payload log-probability {effect.log_prob:.1f} nats, controls {controls:.1f}"
        results.append(("trigger", what, effect.p))
    for secret in report.secrets:
        exposure = secret.by[-1][1]
        what = f"{secret.prefix!r}: {exposure.sampled:.1f} bits, {exposure.extrapolated:.1f} extrapolated"
        results.append(("secret", what, exposure.p))
    longest = max(result.prefix for _, result in report.extraction)
    for stride in dict.fromkeys(result.stride for _, result in report.extraction):
        by_text = {text: r for text, r in report.extraction if (r.stride, r.prefix) == (stride, longest)}
        seen, unseen = (by_text[text] for text in TEXTS)
        if seen.n and unseen.n:
            what = f"prefix {longest}: {seen.rate:.1%} of training text, {unseen.rate:.1%} of held-out text"
            results.append(("verbatim text", what, _fisher(seen, unseen)))
    last = report.membership[-1][1]
    units = "" if last.units == report.rows["train"] else f" over {last.units} documents"
    what = f"AUC {last.loss_auc:.3f} by loss, {last.min_k_auc:.3f} by min-k%, 0.5 +- {last.sd:.3f} by chance{units}"
    results.append(("membership", what, last.p))
    return [Check(name, what, p, p <= report.alpha) for name, what, p in results]


def _fisher(seen: Extraction, unseen: Extraction) -> float:
    """Returns the p-value of a one-sided Fisher's exact test.

    Fisher's exact test checks whether training text is extracted more often than held-out text.
    """
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
                "by": [{"model": model, **exposure._asdict()} for model, exposure in secret.by],
            }
            for secret in report.secrets
        ],
        "triggers": [
            {
                "trigger": backdoor.trigger, "payload": backdoor.payload,
                "by": [
                    {
                        "model": model, "log_prob": effect.log_prob, "fires": effect.fires, "p": effect.p,
                        "control_mean": float(effect.controls.mean()), "control_max": float(effect.controls.max()),
                    }
                    for model, effect in backdoor.by
                ],
            }
            for backdoor in report.triggers
        ],
        "extraction": [
            {"text": text, "suffix": report.suffix, **result._asdict()} for text, result in report.extraction
        ],
        "membership": [{"model": model, **result._asdict()} for model, result in report.membership],
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
