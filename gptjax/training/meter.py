"""Computes the metrics of a training run, such as losses and throughput, and writes the metrics to metrics.jsonl."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError
from gptjax.optim import make_schedule
from gptjax.signals import Stopped
from gptjax.training import loggers
from gptjax.training.process import NON_FINITE
from gptjax.training.progress import duration, peak_flops
from gptjax.training.run import Run
from gptjax.types import Metrics

# The metrics that every training step returns, independently of the task.
_OWN = {"loss", "weight", "grad_norm", "skipped", "skipped_in_a_row"}


class Meter:
    """Reads the metrics of the training steps, and logs them every `train.log_every` steps.

    A compiled call is one call of the compiled program, which runs `run.k` training steps. The metrics of a compiled
    call are read only after the next call has been started, so that the device does not wait for the host.

    Args:
        run: the run whose metrics are read.
    """

    def __init__(self, run: Run):
        self.run = run
        steps, device = run.cfg.train.max_steps, jax.devices()[0]
        self.lr = (
            np.asarray(jax.jit(jax.vmap(make_schedule(run.cfg.optim, steps)))(np.arange(steps))) * run.cfg.optim.lr
        )
        self.peak = peak_flops(device.platform, device.device_kind)
        self.file, self.loggers = None, list[loggers.Logger]()
        if run.writes:
            self.file = loggers.JsonLines(run.dir.metrics)
            others = [loggers.LOGGERS[name](run.dir.path, run.cfg) for name in run.cfg.train.loggers]
            self.loggers = [self.file, *others]
        # The training time in seconds and the number of trained tokens since the last row of metrics.
        self.busy_s, self.busy_tokens = 0.0, 0
        # The time at which the current compiled call began on the device.
        self.mark = 0.0
        # The throughput in the last row of metrics, in tokens per second.
        self.rate = 0.0
        # The estimated durations of a full evaluation and of sampling in seconds, excluding compilation.
        self.eval_s = self.sample_s = 0.0
        self.pending: tuple[int, Metrics] | None = None
        self.compiled = False

    def start(self) -> None:
        """Records the time at which a compiled call is started.

        If the device is still busy with the previous compiled call, the method `start` records nothing, because the new
        call begins on the device only when the previous call ends. The method `_read` records the time at which a
        compiled call ends.
        """
        if self.pending is None:
            self.mark = time.monotonic()

    def put(self, end: int, metrics: Metrics) -> None:
        """Stores the metrics of the compiled call that was just started, and reads the metrics of the previous call.

        Args:
            end: the last step of the call that was just started.
            metrics: the metrics of the call that was just started, which the device may still be computing.
        """
        before, self.pending = self.pending, (end, metrics)
        if before:
            self._read(*before)

    def drain(self) -> None:
        """Waits until the last compiled call has finished, and reads the call's metrics."""
        before, self.pending = self.pending, None
        if before:
            self._read(*before)

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics to all loggers.

        Raises:
            UserError: a logger cannot write its file, for example because the disk is full.
        """
        try:
            for logger in self.loggers:
                logger.log(row)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.run.dir.path}: {error.strerror}; free disk space and run the same command again"
            ) from error

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def _read(self, end: int, metrics: Metrics) -> None:
        run, settings, counters = self.run, self.run.cfg.train, self.run.counters
        values = {name: np.atleast_1d(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        if self.compiled:
            self.busy_s += now - self.mark
            self.busy_tokens += run.k * run.tokens_per_step
        self.mark = now
        for i in range(run.k):
            step = end - run.k + 1 + i
            loss, weight = float(values["loss"][i]), float(values["weight"][i])
            if math.isfinite(loss):
                counters.loss_total += loss * weight
                counters.loss_weight += weight
            if values["skipped_in_a_row"][i] >= settings.max_nonfinite:
                stop_non_finite(run, step, int(values["skipped_in_a_row"][i]))
            if step % settings.log_every == 0 or step == settings.max_steps:
                self._log_step(step, {name: value[i] for name, value in values.items()})

    def _log_step(self, step: int, values: dict[str, Any]) -> None:
        run, counters = self.run, self.run.counters
        loss = counters.loss_total / counters.loss_weight if counters.loss_weight else None
        counters.loss_total = counters.loss_weight = 0.0
        self.rate = self.busy_tokens / self.busy_s if self.busy_s else self.rate
        self.busy_s, self.busy_tokens = 0.0, 0
        row: dict[str, Any] = {
            "step": step,
            "train/loss": loss,
            "lr": float(self.lr[step - 1]),
            "grad_norm": finite(values["grad_norm"]),
            "skipped": int(values["skipped"]),
            "tokens": step * run.tokens_per_step,
            "tokens_per_s": round(self.rate, 1) or None,
            "seconds": run.seconds(),
        }
        row |= {f"train/{name}": finite(values[name]) for name in sorted(values.keys() - _OWN)}
        if self.peak and self.rate:
            row["mfu"] = self.rate * run.task.flops_per_token / self.peak
        self.log(row)
        run.progress.status(step, run.cfg.train.max_steps, self._line(row))

    def _line(self, row: dict[str, Any]) -> str:
        run, step = self.run, row["step"]
        total, val_loss = run.cfg.train.max_steps, run.counters.val_loss
        evaluated = "" if run.counters.evaluated == step else f" (step {run.counters.evaluated:,})"
        fields = [
            f"step {step:,}/{total:,} {step / total:4.0%}",
            f"loss {row['train/loss']:.4f}" if row["train/loss"] is not None else "loss not finite",
            f"reward {run.rolled['reward']:.3f}" if "reward" in run.rolled else "",
            f"val {run.task.validation.text(val_loss).split()[-1]}{evaluated}" if math.isfinite(val_loss) else "",
            f"lr {row['lr']:.2e}",
            f"grad {row['grad_norm']:.2f}" if row["grad_norm"] is not None else "grad not finite",
            f"{self.rate:,.0f} tok/s" if self.rate else "",
            f"MFU {row['mfu']:.1%}" if "mfu" in row else "",
            f"{row['skipped']} skipped" if row["skipped"] else "",
            f"ETA {duration(self._eta(step))}" if self.rate and step < total else "",
        ]
        return "  ".join(field for field in fields if field)

    def _eta(self, step: int) -> float:
        """Returns the estimated time until the end of the run in seconds, including evaluations and sampling."""
        settings = self.run.cfg.train
        steps, now = settings.max_steps - step, step % settings.eval_every == 0 or step == settings.max_steps
        evals = math.ceil(steps / settings.eval_every) + now
        return steps * self.run.tokens_per_step / self.rate + evals * (self.eval_s + self.sample_s)


def stop_non_finite(run: Run, step: int, in_a_row: int) -> None:
    last = f"checkpoint of step {run.saved:,}" if run.saved else "no checkpoint yet"
    why = (
        f"stopped at step {step:,}: loss or gradient was not finite in {in_a_row} consecutive "
        f"step{'' if in_a_row == 1 else 's'} (train.max_nonfinite). These steps updated no parameters; kept: {last}.\n"
        f"  {run.task.describe_batch(step - 1)}\n"
        "  try a lower optim.lr, more optim.warmup_steps, or optim.clip_norm=1"
    )
    run.progress.say(why)
    raise Stopped(NON_FINITE, why)


def finite(value: float | np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None
