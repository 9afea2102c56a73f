"""Evaluates the model during training, every `train.eval_every` steps.

An evaluation computes the validation loss, saves the best model, generates text samples and plots the losses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gptjax import config
from gptjax.parallel import distributed, jit_on, on_mesh, place_batch
from gptjax.training.meter import Meter, finite
from gptjax.training.run import Run
from gptjax.training.step import evaluate as mean_over
from gptjax.types import Mean, Metrics

PLOT_EVERY_S = 20.0


def evaluator(meter: Meter) -> Callable[[Run], None]:
    """Returns the hook that evaluates the model.

    The evaluation hook computes the loss on the validation set, saves the best model, writes text samples and plots the
    loss curve. Before the first training step, the evaluation hook only computes the validation loss. In pretraining,
    the validation loss before the first training step is computed on the first batches of the validation set.
    """
    loss, combine, _ = meter.run.rules
    eval_loss = jit_on(lambda params, batch, key: loss(combine(*params), batch, key), meter.run.mesh)
    # The list `requested` contains the times at which the batches of the last evaluation were requested. The last entry
    # of `requested` is the time at which the last evaluation ended.
    requested: list[float] = []
    plotted_at = 0.0

    def polled(run: Run) -> Iterator[Any]:
        """Yields the validation batches, and records the time at which each batch is requested.

        The function `mean_over` waits for the loss of a batch before it requests the next batch, so the difference
        between the times of two successive requests is the duration of the evaluation of one batch.
        """
        requested.clear()
        for batch in run.task.validation.batches(run.step == 0):
            run.poll()
            requested.append(time.monotonic())
            yield place_batch(batch, run.mesh)
        requested.append(time.monotonic())

    def scored(run: Run) -> tuple[Mean, Metrics]:
        """Scores the answers that the model generates to the validation questions; all answers count as one batch."""
        assert run.task.validation.score is not None
        requested[:] = [time.monotonic()]
        mean, metrics = on_mesh(run.task.validation.score, run.mesh)(combine(*run.both))
        requested.append(time.monotonic())
        return mean, metrics

    def evaluate(run: Run) -> None:
        nonlocal plotted_at
        counters, validation = run.counters, run.task.validation
        if counters.evaluated == run.step:
            return
        compiles = not requested  # The time of the first validation batch in this process includes compilation.
        with run.progress.phase("evaluating"):
            mean, metrics = scored(run) if validation.score else mean_over(eval_loss, run.both, polled(run))
        ended, times = requested[-1], requested[compiles:]
        batch_s = (ended - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        meter.eval_s = batch_s * (len(requested) - 1) / (validation.first_share if run.step == 0 else 1.0)
        loss = float(mean.value())
        derived, more = validation.derived_metrics(loss), {name: value.value() for name, value in metrics.items()}
        row = {"step": run.step, "val/loss": finite(loss), **_named(derived), "val/tokens": mean.weight, **_named(more)}
        if n := run.cfg.train.eval_train_batches:
            train_loss = mean_over(eval_loss, run.both, (run.batch(step) for step in range(n)))[0].value()
            row["train/eval_loss"] = finite(train_loss)
        meter.log(row | {"seconds": run.seconds()})
        text = f"step {run.step:,}/{run.cfg.train.max_steps:,}: validation {validation.text(loss)}"
        for name, value in {**derived, **more}.items():
            text += f", {name} {value:.2f}" if name == "perplexity" else f", {value:.4f} {name.replace('_', ' ')}"
        run.progress.say(f"{text} ({ended - requested[0]:.1f} s)")
        counters.evaluated, counters.val_loss = run.step, loss
        if run.step == 0:
            return
        if loss < counters.best_loss:
            counters.best_loss, counters.best_step, counters.since_best = loss, run.step, 0
            write_model(run, run.dir.best)
        else:
            counters.since_best += 1
        sampled_from = time.monotonic()
        meter.eval_s += sampled_from - ended
        if validation.sample:
            compiles = run.last_sample is None
            with run.progress.phase("sampling"):
                sample(run)
            meter.sample_s = 0.0 if compiles else time.monotonic() - sampled_from
        if time.monotonic() - plotted_at >= PLOT_EVERY_S:
            plotted_at = time.monotonic()
            plot(run)

    return evaluate


def _named(values: dict[str, Any]) -> dict[str, float | None]:
    return {f"val/{name}": finite(value) for name, value in values.items()}


def sample(run: Run) -> None:
    """Generates texts with the model, and appends the texts to samples.txt.

    If several processes train the model, only one process writes samples.txt.
    """
    mesh = run.mesh if jax.process_count() == 1 else None
    both = distributed.on_host(run.both)
    if not run.writes:
        run.last_sample = ""
        return
    assert run.task.validation.sample is not None
    texts = on_mesh(run.task.validation.sample, mesh)(run.rules.combine(*both))
    run.last_sample = texts[0]
    run.dir.append("samples.txt", "".join(f"==== step {run.step} ====\n{text}\n\n" for text in texts))
    run.counters.samples_bytes = (run.dir.path / "samples.txt").stat().st_size


def plot(run: Run) -> None:
    if run.writes:
        from gptjax.training.plot import draw

        draw(run.dir.rows(), run.dir.path / "loss.png", f"{run.dir.path.name}: {run.n_params:,} parameters")


def write_model(run: Run, folder: Path) -> None:
    """Writes the model with its config.yaml and result.json to a folder."""
    counters = run.counters
    result = {
        "step": run.step,
        "val/loss": counters.val_loss,
        **_named(run.task.validation.derived_metrics(counters.val_loss)),
        "parameters": run.n_params,
        "tokens": run.step * run.tokens_per_step,
        "best/step": counters.best_step,
        "best/loss": counters.best_loss if counters.best_step >= 0 else None,
    }
    if run.cfg.train.patience:
        result["best/evaluations_since"] = counters.since_best
    files = {"config.yaml": config.to_yaml(run.cfg), "result.json": json.dumps(result, indent=1) + "\n"}
    with run.progress.phase(f"writing {folder.name}/"):
        trained, frozen = distributed.on_host(run.both)
        if run.writes:
            run.task.write(folder, trained, frozen, files)
