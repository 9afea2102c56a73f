"""Evaluation every `train.eval_every` steps: validation loss, best model, samples, loss curve."""

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

PLOT_EVERY_S = 20.0


def evaluator(meter: Meter) -> Callable[[Run], None]:
    """The evaluation hook: computes the loss on the validation set (before the first step, on a part of it), saves the
    best model, writes samples and draws the loss curve."""
    loss, combine, _ = meter.run.rules
    eval_loss = jit_on(lambda params, batch, key: loss(combine(*params), batch, key), meter.run.mesh)
    requested: list[float] = []  # times at which each batch of the last evaluation was requested, and its end
    plotted_at = 0.0

    def polled(run: Run) -> Iterator[Any]:
        """The validation batches. `mean_over` requests a batch once it has the loss of the previous one."""
        requested.clear()
        for batch in run.task.validation.batches(run.step == 0):
            run.poll()
            requested.append(time.monotonic())
            yield place_batch(batch, run.mesh)
        requested.append(time.monotonic())

    def evaluate(run: Run) -> None:
        nonlocal plotted_at
        counters, validation = run.counters, run.task.validation
        if counters.evaluated == run.step:
            return
        compiles = not requested  # the first batch of the process includes compilation
        with run.progress.phase("evaluating"):
            mean, metrics = mean_over(eval_loss, run.both, polled(run))
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
        text = f"step {run.step:,}/{run.cfg.train.max_steps:,}: validation loss {loss:.4f}"
        for name, value in {**derived, **more}.items():
            text += f", {name} {value:.2f}" if name == "perplexity" else f", {value:.4f} {name.replace('_', ' ')}"
        run.progress.say(f"{text} ({ended - requested[0]:.1f} s)")
        counters.evaluated, counters.val_loss = run.step, loss
        if run.step == 0:
            return
        if loss < counters.best_loss:
            counters.best_loss, counters.best_step = loss, run.step
            write_model(run, run.dir.best)
        sampled_from = time.monotonic()
        meter.eval_s += sampled_from - ended
        if run.task.sample:
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
    """Write samples of the model to samples.txt. With several processes, one of them generates and writes them."""
    mesh = run.mesh if jax.process_count() == 1 else None
    both = distributed.on_host(run.both)
    if not run.writes:
        run.last_sample = ""
        return
    assert run.task.sample is not None
    texts = on_mesh(run.task.sample, mesh)(run.rules.combine(*both))
    run.last_sample = texts[0]
    run.dir.append("samples.txt", "".join(f"==== step {run.step} ====\n{text}\n\n" for text in texts))
    run.counters.samples_bytes = (run.dir.path / "samples.txt").stat().st_size


def plot(run: Run) -> None:
    if run.writes:
        from gptjax.training.plot import draw

        draw(run.dir.rows(), run.dir.path / "loss.png", f"{run.dir.path.name}: {run.n_params:,} parameters")


def write_model(run: Run, folder: Path) -> None:
    """Write the model with its config.yaml and result.json to `folder`."""
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
    files = {"config.yaml": config.to_yaml(run.cfg), "result.json": json.dumps(result, indent=1) + "\n"}
    with run.progress.phase(f"writing {folder.name}/"):
        trained, frozen = distributed.on_host(run.both)
        if run.writes:
            run.task.write(folder, trained, frozen, files)
