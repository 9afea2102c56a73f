"""Generates the training batches of on-policy tasks, in which the model is trained on its own answers."""

from __future__ import annotations

import json
from typing import Any

import jax

from gptjax.parallel import on_mesh, place_batch
from gptjax.training.meter import Meter, finite
from gptjax.training.run import Run


def roll(run: Run, meter: Meter) -> Any:
    """Generates answers, and returns the batches of the next compiled call, which trains the model on the answers.

    The leaves of the batches for a call of k training steps have shape [k, B, ..], or [B, ..] if k is 1. The generated
    answers are appended to rollouts.jsonl. The metrics of the generated answers, if there are any, are appended to
    metrics.jsonl. The rows in rollouts.jsonl and metrics.jsonl have the number of the first step that trains the model
    on the answers.
    """
    assert run.task.rollouts is not None
    with run.progress.phase("generating answers"):
        make = on_mesh(run.task.rollouts.make, run.mesh)
        batches, metrics, rows, warnings = make(run.state.params, run.state.frozen, run.step, run.k)
    for line in warnings:
        run.progress.say(line)
    step = run.step + 1
    run.rolled = metrics
    if metrics:
        meter.log({"step": step, **{f"rollout/{name}": finite(value) for name, value in metrics.items()}})
    run.dir.append(
        run.dir.rollouts.name, "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
    )
    if run.k == 1:
        batches = jax.tree.map(lambda leaf: leaf[0], batches)
    return place_batch(batches, run.mesh)
