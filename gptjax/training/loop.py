"""The training loop: data in, checkpoints and a model out, and everything that can happen in between."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import config
from gptjax.config import Config, ModelConfig, TokenizerConfig
from gptjax.errors import UserError, complaints
from gptjax.files import number, use_json
from gptjax.signals import INTERRUPTED, Signals, Stopped, Terminated, catch_signals, signal_name
from gptjax.tokenizers import begin_id
from gptjax.training import loggers, run_dir
from gptjax.training.job import Job, Rules, just_trained
from gptjax.training.process import NON_FINITE, keep_buffers, use_compile_cache
from gptjax.training.progress import Progress, duration, peak_flops
from gptjax.training.run_dir import BITWISE, RunDir, environment, longer
from gptjax.types import Params

SMALL_MODEL = 20_000_000  # parameters; below it several steps go into one compiled call
MOST_STEPS_PER_CALL = 10
BASE_WINDOW = 1024  # tokens of a window in continued pretraining, where the model's context allows
EVAL_TOKENS = 4096  # at least so many a batch of the evaluation
FIRST_EVAL_TOKENS = 16_384  # about so many before the first step: no text is better known than another yet
PLOT_EVERY_S = 20.0


class TrainResult(NamedTuple):
    run_dir: Path
    params: Params
    cfg: Config
    tokenizer: Any
    step: int
    val_loss: float
    exit_code: int = 0


def train(cfg: Config, *, log: Callable[[str], None] | None = None) -> TrainResult:
    """Pretrain as `cfg` says, or go on where the run directory stands (train.resume=auto).

    A run that is finished already is not trained again: its result is returned. Resumed is bitwise the same as
    uninterrupted, on the same versions and devices.

    Args:
        log: gets each line that would be printed.

    Raises:
        UserError: bad config or data, a run directory of another run, no checkpoint that can be read, a full disk.
        Stopped: (a SystemExit) Ctrl-C or SIGTERM, after saving; or `max_nonfinite` steps without a finite loss.
    """

    return run_job(cfg, prepare, log, refuse_missing)


def prepare(cfg: Config, progress: Progress) -> tuple[Config, Job]:
    """The job of a pretraining, and the config with what only the data could tell."""
    from gptjax import data

    cfg, base = from_base(cfg)
    with progress.phase("preparing the data"):
        ready = data.prepare(cfg, base and base.tokenizer(), log=progress.say)
    cfg = _resolve(cfg, ready)
    return cfg, _pretraining(cfg, ready, base)


def refuse_missing(cfg: Config) -> None:
    """A cheap look before the text is read; nothing is fetched.

    Raises:
        UserError: sources, a tokenizer and a base that are not there, or a model with classes, all at once.
    """
    from gptjax import assets, data

    problems, base = complaints(data.refuse_missing, cfg), cfg.pretrain.base
    if cfg.model.n_classes:
        problems.append(f"model.n_classes={cfg.model.n_classes}: expected 0; gptjax finetune classify adds the classes")
    if base is not None and not base.startswith("hf:") and base not in assets.ASSETS:
        problems += [f"pretrain.base: {problem}" for problem in complaints(from_base, cfg)]
    if problems:
        raise UserError.all(problems)


def from_base(cfg: Config) -> tuple[Config, Any]:
    """The config with the model, tokenizer and window of `pretrain.base`, and that model before any tensor is read;
    (cfg, None) without a base.

    Raises:
        UserError: no such model, a classifier, or a window longer than its context.
    """
    if cfg.pretrain.base is None:
        return cfg, None
    from gptjax import weights
    from gptjax.model.gpt import refuse_classifier

    base = weights.open_model(cfg.pretrain.base)
    refuse_classifier(base.cfg, cfg.pretrain.base, "name the model that it was made from")
    model = dataclasses.replace(base.cfg, **{name: getattr(cfg.model, name) for name in config.COMPUTED})
    window = cfg.pretrain.context_length or min(model.context_length, BASE_WINDOW)
    cfg = dataclasses.replace(
        cfg, model=model, tokenizer=TokenizerConfig(name=cfg.pretrain.base),
        pretrain=dataclasses.replace(cfg.pretrain, context_length=window),
    )  # fmt: skip
    config.validate(cfg)
    return cfg, base


def run_job(
    cfg: Config,
    prepare: Callable[[Config, Progress], tuple[Config, Job]],
    log: Callable[[str], None] | None = None,
    missing: Callable[[Config], None] = lambda cfg: None,
) -> TrainResult:
    """`train` for any job: `prepare` is called if there is something left to do, and refuses whatever can be wrong
    before the run directory is made. It gives the config with what only the data could tell. `missing`: as in
    `refuse`."""
    with catch_signals() as signals:
        try:
            result, where = _run(cfg, prepare, log, missing, signals), "after the last step"
        except (KeyboardInterrupt, Terminated):
            signals.code = signals.code or INTERRUPTED
            where = "before the first step: nothing to save"
        except Exception:
            if not signals.code or signals.polled:
                raise
            where = "before the first step: nothing to save"  # an import that is interrupted can be an ImportError
        if signals.code:
            why = f"{signal_name(signals.code)} {where}; the same command goes on from there"
            (log or print)(why)
            raise Stopped(signals.code, why)
        return result


def _run(
    cfg: Config,
    prepare: Callable[[Config, Progress], tuple[Config, Job]],
    log: Callable[[str], None] | None,
    missing: Callable[[Config], None],
    signals: Signals,
) -> TrainResult:
    from gptjax.parallel import distributed, make_mesh

    config.validate(cfg)
    distributed.start(cfg.distributed)
    signals.raise_if_any()
    say, writes = log or print, distributed.is_writer()
    log = log if writes else _nothing
    run = RunDir(cfg.run_dir or "runs/default")
    with distributed.peers(say), ExitStack() as stack:
        distributed.agree_on_settings(cfg)
        with distributed.together():
            refuse(cfg, missing)
            done = _finished(run, cfg, log or print)
        distributed.agree_on({f"{run.path} is finished": done is not None}, "the run directories")
        if done is not None:
            return done
        use_compile_cache()
        keep_buffers()
        with distributed.together(), Progress(log=log, alive=run.touch if writes else _nothing) as progress:
            cfg, job = prepare(cfg, progress)
            steps_per_call(cfg, 0)
        distributed.agree_on(job.identity, "the data")
        signals.raise_if_any()
        rows = cfg.train.batch_size // cfg.train.accumulation
        mesh = make_mesh(cfg.mesh, rows=rows, even_one=cfg.optim.offload)
        with distributed.together():
            if writes:
                stack.enter_context(run.locked())
            run.check(cfg)
        own = Progress(lambda line: run.append("log.txt", line), log, run.touch) if writes else Progress(log=log)
        with own as progress:
            trainer = _Trainer(cfg, run, job, mesh, progress, signals)
            signals.raise_if_any()
            signals.polled = True
            result = trainer.train()
            signals.polled = False
            return result


def refuse(cfg: Config, missing: Callable[[Config], None]) -> bool:
    """What can be refused before any data is read: it costs a second, and nothing is written.

    Args:
        missing: raises UserError for data, tokenizer or base that are not there.
    Returns:
        Whether the run is finished already, which needs nothing of these.
    Raises:
        UserError: all that it finds, at once.
    """
    import jax

    from gptjax.parallel import make_mesh

    run = RunDir(cfg.run_dir or "runs/default")
    taken = complaints(run.check, cfg)
    if not taken and _result(run, cfg) is not None:
        return True
    settings, alone = cfg.train, cfg.distributed.coordinator is None or jax.distributed.is_initialized()
    rows = settings.batch_size // settings.accumulation
    problems = [*complaints(missing, cfg), *complaints(loggers.check, settings.loggers)]
    if alone:
        problems += complaints(lambda: make_mesh(cfg.mesh, rows=rows, even_one=cfg.optim.offload))
    if settings.epochs is None:
        problems += complaints(steps_per_call, cfg, 0)
    if problems := [*problems, *(taken or complaints(run.refuse_busy))]:
        raise UserError.all(problems)
    return False


def _nothing(*_: Any) -> None:
    pass


def _resolve(cfg: Config, ready: Any) -> Config:
    """vocab_size from the tokenizer, max_steps from epochs."""
    model, settings = cfg.model, cfg.train
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=ready.tokenizer.vocab_size)
    steps = settings.steps(len(ready.train), settings.batch_size * cfg.window)
    settings = dataclasses.replace(settings, max_steps=steps)
    cfg = dataclasses.replace(cfg, model=model, train=settings)
    config.validate(cfg)
    return cfg


def _finished(run: RunDir, cfg: Config, say: Callable[[str], None]) -> TrainResult | None:
    """The result of a run that ended; None if there is something left to do."""
    if (result := _result(run, cfg)) is None:
        return None
    from gptjax import tokenizers, weights

    step, loss = result
    cfg = stored = run.stored()
    params, _ = weights.load(run.final)
    say(f"{run.path} is finished: {step:,} steps, validation loss {loss:.4f}. Nothing to do.")
    say(f"  for another run choose another run_dir=FOLDER; to let it write: gptjax sample {run.path}")
    if stored.optim.schedule == "constant":
        say("  to make it longer: train.max_steps=N")
    else:
        say(f"  to train it further: gptjax pretrain pretrain.base={run.path}")
    return TrainResult(run.path, params, cfg, tokenizers.load(run.final), step, loss)


def result_of(result: dict[str, Any]) -> tuple[int, float]:
    """(step, validation loss) of a result.json. Raises TypeError, ValueError or LookupError where it is damaged."""
    step, loss = number(result["step"]), float(number(result["val/loss"]))
    if type(step) is not int or step < 0:
        raise ValueError(f"expected a whole number at step, got {step}")
    return step, loss


def _result(run: RunDir, cfg: Config) -> tuple[int, float] | None:
    """What final/ says of the run, where it has all the steps that `cfg` asks for: (step, validation loss)."""
    file = run.final / "result.json"
    if not file.exists():
        return None
    step, loss = use_json(file, result_of)
    stored = run.stored()
    return None if longer(stored, cfg) or step < stored.train.max_steps else (step, loss)


def steps_per_call(cfg: Config, n_params: int, start: int = 0) -> int:
    """How many steps go into one compiled call; evaluations, checkpoints and the end fall between calls.

    None in the config: the largest number up to 10 that divides them all, 1 for models above 20 M parameters.

    Raises:
        UserError: the given number does not divide them.
    """
    settings = cfg.train
    names = ("eval_every", "checkpoint_every", "log_every")
    every = {name: getattr(settings, name) for name in names if getattr(settings, name) < settings.max_steps}
    every["max_steps"] = settings.max_steps
    if settings.steps_per_call is not None:
        k = settings.steps_per_call
        bad = [f"train.{name} ({n})" for name, n in every.items() if n % k]
        if bad:
            common = math.gcd(*every.values())
            fits = ", ".join(str(n) for n in range(1, min(common, 100) + 1) if common % n == 0)
            raise UserError(f"train.steps_per_call ({k}) must divide {', '.join(bad)}: use one of {fits}")
        return k
    if n_params > SMALL_MODEL:
        return 1
    common = math.gcd(start, *every.values())
    return max(k for k in range(1, MOST_STEPS_PER_CALL + 1) if common % k == 0)


class _Interrupt(Exception):
    """A signal has come, at a place where it can be acted on."""


@dataclasses.dataclass
class _Counters:
    """What the loop itself carries from step to step; goes into every checkpoint."""

    evaluated: int = -1  # step of the last evaluation
    val_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = -1
    loss_total: float = 0.0  # since the last line of metrics
    loss_weight: float = 0.0
    samples_bytes: int = 0  # length of samples.txt
    seconds: float = 0.0  # wall time of the run so far


def _meta_config(meta: dict[str, Any]) -> Config:
    """The settings of the run that wrote a checkpoint, after a look at all that this file put into its meta.

    Raises:
        Damaged: a part is missing, or of another type.
    """
    from gptjax.checkpoint import Damaged

    for key, kind in (("identity", dict), ("counters", dict), ("environment", dict), ("config", str)):
        if not isinstance(meta.get(key), kind):
            raise Damaged(f"meta.json: expected {'text' if kind is str else 'an object'} at meta/{key}")
    try:
        _counters(meta["counters"])
        return config.from_yaml(meta["config"], "its settings")
    except (TypeError, ValueError, OverflowError) as error:  # a UserError is a ValueError
        raise Damaged(f"meta.json: {error}") from error


def _counters(values: dict[str, Any]) -> _Counters:
    """What `_jsonable` made of them. Raises ValueError, TypeError or OverflowError where it did not."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(_Counters)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown counters {', '.join(unknown)}")
    read = {name: _number(value) for name, value in values.items()}
    for name, value in read.items():
        if type(value) not in (int, fields[name]) or float(value) == -math.inf:
            raise ValueError(f"counter {name}: expected a number, got {value!r}")
    counters = _Counters(**read)
    if counters.samples_bytes < 0:
        raise ValueError(f"counter samples_bytes: expected at least 0, got {counters.samples_bytes}")
    return counters


class _Trainer:
    def __init__(self, cfg: Config, run: RunDir, job: Job, mesh: Any, progress: Progress, signals: Signals):
        import jax
        import numpy as np

        from gptjax import parallel, tree
        from gptjax.checkpoint import Checkpoints
        from gptjax.optim import make_schedule
        from gptjax.parallel import distributed
        from gptjax.training.step import TrainState, make_multi_step, make_train_step
        from gptjax.weights.native import recover_folder

        self.cfg, self.run, self.job, self.mesh, self.progress, self.signals = cfg, run, job, mesh, progress, signals
        self.checkpoints = Checkpoints(run.checkpoints, cfg.train.keep_checkpoints, progress.say)
        self.environment = environment()

        def fresh(start: Any) -> TrainState:
            init_key, key = jax.random.split(jax.random.key(cfg.seed))
            return TrainState.create(job.init(init_key, start), tx=job.optimizer, key=key)

        abstract = parallel.abstract_on(fresh, mesh, job.start, offload=cfg.optim.offload)
        self.n_params = tree.size(abstract.params)
        self._summary()
        self.counters = _Counters()
        self.step = self.saved = 0
        found = self.checkpoints.restore(abstract, self._accept)
        self.writes = distributed.is_writer()
        if self.writes:
            run.begin(cfg, self.environment)
            recover_folder(run.best)
        if found:
            self._go_on(found, abstract)
        else:
            with progress.phase("compiling the initialisation"):
                self.state = parallel.init_on(fresh, mesh, job.start, donate=(0,), offload=cfg.optim.offload)
            if self.writes:
                run.cut_metrics(-1, progress.say)
                (run.path / "samples.txt").unlink(missing_ok=True)
        self.state = self.state.replace(frozen=parallel.place_params(job.frozen, mesh))
        self.job = job = job._replace(start=None, frozen=None)  # the steps give the memory to their results
        self.k = steps_per_call(cfg, self.n_params, self.step)
        one = make_train_step(job.loss, job.optimizer, combine=job.combine, accumulation=cfg.train.accumulation)
        self.call = parallel.jit_step(one if self.k == 1 else make_multi_step(one), mesh, self.state)
        self.eval_loss = parallel.jit_on(lambda params, batch, key: job.loss(job.combine(*params), batch, key), mesh)
        schedule = make_schedule(cfg.optim, cfg.train.max_steps)
        self.lr = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(cfg.train.max_steps))) * cfg.optim.lr
        device = jax.devices()[0]
        self.peak = peak_flops(device.platform, device.device_kind)
        self.metrics = loggers.JsonLines(run.metrics) if self.writes else None
        others = cfg.train.loggers if self.writes else ()
        self.loggers = [self.metrics] * self.writes + [loggers.LOGGERS[name](run.path, cfg) for name in others]
        self.started = time.monotonic() - self.counters.seconds
        self.pending: tuple[int, Any] | None = None
        self.compiled = False
        self.busy_s, self.busy_tokens, self.mark = 0.0, 0, 0.0  # since the last line of metrics; last reading
        self.rate = 0.0  # tokens a second, of the last line
        self.eval_s = self.sample_s = 0.0  # what a whole evaluation takes, as far as it is known; compiling left out
        self.asked: list[float] = []  # when each batch of the last evaluation was asked for, and when it ended
        self.plotted = 0.0

    # ------------------------------------------------------------ the loop

    def train(self) -> TrainResult:
        import jax

        try:
            with self.progress.phase("training"):
                self._until_done()
        except _Interrupt:
            self._leave()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise self._too_large(error) from error
        finally:
            for logger in self.loggers:
                logger.close()
        return self._finish()

    def _until_done(self) -> None:
        settings = self.cfg.train
        while True:
            if self._due(settings.eval_every) and self.counters.evaluated != self.step:
                self._evaluate()
            if self._due(settings.checkpoint_every) and self.saved != self.step:
                self._save()
            if self.step >= settings.max_steps:
                return
            self._poll()
            self._advance()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step >= self.cfg.train.max_steps

    def _poll(self) -> None:
        from gptjax.parallel import distributed

        if code := distributed.agree(self.signals.code):
            self.signals.code = code
            raise _Interrupt

    def _advance(self) -> None:
        """Start one call, and read the results of the one before while it runs."""
        if self.pending is None:
            self.mark = time.monotonic()
        batch = self._batch(self.step, self.k)
        if not self.compiled:
            metrics = self._compile(batch)
        else:
            self.state, metrics = self.call(self.state, batch)
        self.step += self.k
        before, self.pending = self.pending, (self.step, metrics)
        if before:
            self._read(*before)
        if not self.compiled or self._due(self.cfg.train.eval_every) or self._due(self.cfg.train.checkpoint_every):
            self._drain()
        self.compiled = True

    def _batch(self, step: int, k: int) -> Any:
        """Of k steps in a call with a leading side of them; of several processes each reads its own rows."""
        import jax

        from gptjax.parallel import distributed, place_batch

        if self.job.part is None or jax.process_count() == 1:
            return self._placed(self.job.batch(step)) if k == 1 else self._placed(self.job.batches(step, k), lead=1)
        of = self.cfg.train.batch_size
        rows = distributed.rows_here(self.mesh, of)
        part = self.job.part(step, k, rows)
        if k == 1:
            part = jax.tree.map(lambda leaf: leaf[0], part)
        return place_batch(part, self.mesh, lead=int(k > 1), rows=rows, of=of)

    def _placed(self, batch: Any, lead: int = 0) -> Any:
        from gptjax.parallel import place_batch

        return place_batch(batch, self.mesh, lead=lead + self.job.lead)

    def _drain(self) -> None:
        before, self.pending = self.pending, None
        if before:
            self._read(*before)

    @property
    def _both(self) -> tuple[Any, Any]:
        """What is trained, and what is not."""
        return self.state.params, self.state.frozen

    def _compile(self, batch: Any) -> Any:
        """The first call, in a thread: a signal must not wait for XLA."""
        import jax

        start, result = time.monotonic(), []
        self.progress.say("compiling the training step ...")

        def first() -> None:
            try:
                result.append(jax.block_until_ready(self.call(self.state, batch)))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=first, daemon=True, name="gptjax-compile")
        with self.progress.phase("compiling the training step"):
            thread.start()
            while thread.is_alive():
                thread.join(0.1)
                if self.signals.code and thread.is_alive():
                    self._leave_while_compiling()
        if isinstance(result[0], BaseException):
            raise result[0]
        self.state, metrics = result[0]
        self.progress.say(f"compiled, first {_count(self.k, 'step')} done in {time.monotonic() - start:.1f} s")
        return metrics

    def _too_large(self, error: Exception) -> UserError:
        """A step did not fit into the device's memory: what would."""
        import jax

        from gptjax import tree
        from gptjax.training.memory import GIB, what_fits

        settings, device = self.cfg.train, jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        rows = settings.batch_size // settings.accumulation
        width = self.job.tokens_per_step // settings.batch_size
        cut = dict(self.mesh.shape) if self.mesh is not None else {}
        weights = sum(leaf.nbytes for leaf in tree.flatten(self.state.params).values())
        lasting = sum(leaf.nbytes for leaf in jax.tree.leaves((self.state.opt_state, self.state.frozen)))
        lines = what_fits(
            self.cfg, width, rows_a_device=max(1, rows // (cut.get("data", 1) * cut.get("fsdp", 1))),
            lasting_bytes=(3 * weights + lasting) // cut.get("fsdp", 1), limit=limit,
        )  # fmt: skip
        size = f" of {limit / GIB:.1f} GiB" if limit else ""
        kept = f"the checkpoint of step {self.saved:,} is kept" if self.saved else "nothing was trained yet"
        return UserError(
            f"out of memory: {_count(rows, 'row')} of {width} tokens at a time did not fit into the "
            f"{device.device_kind}{size} ({str(error).splitlines()[0]})\n"
            f"  {kept}; by estimate one of these fits, in another run_dir:\n"
            + "\n".join(f"    {line}" for line in lines or ["a smaller model, or more devices (mesh.fsdp)"])
        )

    # ------------------------------------------------------------ metrics

    def _read(self, end: int, metrics: Any) -> None:
        """Fetch the metrics of a call that ended at step `end`, log what is due."""
        import jax
        import numpy as np

        values = {name: np.atleast_1d(value) for name, value in jax.device_get(metrics).items()}
        settings, counters, now = self.cfg.train, self.counters, time.monotonic()
        if self.compiled:
            self.busy_s += now - self.mark
            self.busy_tokens += self.k * self.job.tokens_per_step
        self.mark = now
        for i in range(self.k):
            step = end - self.k + 1 + i
            loss, weight = float(values["loss"][i]), float(values["weight"][i])
            if math.isfinite(loss):
                counters.loss_total += loss * weight
                counters.loss_weight += weight
            if values["skipped_in_a_row"][i] >= settings.max_nonfinite:
                self._stop_non_finite(step, int(values["skipped_in_a_row"][i]))
            if step % settings.log_every == 0 or step == settings.max_steps:
                self._log_step(step, {name: value[i] for name, value in values.items()})

    def _log_step(self, step: int, values: dict[str, Any]) -> None:
        counters = self.counters
        loss = counters.loss_total / counters.loss_weight if counters.loss_weight else None
        counters.loss_total = counters.loss_weight = 0.0
        self.rate = self.busy_tokens / self.busy_s if self.busy_s else self.rate
        self.busy_s, self.busy_tokens = 0.0, 0
        row: dict[str, Any] = {
            "step": step,
            "train/loss": loss,
            "lr": float(self.lr[step - 1]),
            "grad_norm": _finite(values["grad_norm"]),
            "skipped": int(values["skipped"]),
            "tokens": step * self.job.tokens_per_step,
            "tokens_per_s": round(self.rate, 1) or None,
            "seconds": self._seconds(),
        }
        if self.peak and self.rate:
            row["mfu"] = self.rate * self.job.flops_per_token / self.peak
        self._log(row)
        self.progress.status(step, self.cfg.train.max_steps, self._line(row))

    def _log(self, row: dict[str, Any]) -> None:
        try:
            for logger in self.loggers:
                logger.log(row)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.run.path}: {error.strerror}; free some space and start again"
            ) from error

    def _line(self, row: dict[str, Any]) -> str:
        step, total = row["step"], self.cfg.train.max_steps
        parts = [
            f"step {step:,}/{total:,} {step / total:4.0%}",
            f"loss {row['train/loss']:.4f}" if row["train/loss"] is not None else "loss not finite",
            f"val {self.counters.val_loss:.4f}" if math.isfinite(self.counters.val_loss) else "",
            f"lr {row['lr']:.2e}",
            f"grad {row['grad_norm']:.2f}" if row["grad_norm"] is not None else "grad not finite",
            f"{self.rate:,.0f} tok/s" if self.rate else "",
            f"MFU {row['mfu']:.1%}" if "mfu" in row else "",
            f"{row['skipped']} skipped" if row["skipped"] else "",
            f"ETA {duration(self._eta(step))}" if self.rate else "",
        ]
        return "  ".join(part for part in parts if part)

    def _eta(self, step: int) -> float:
        settings = self.cfg.train
        steps, now = settings.max_steps - step, step % settings.eval_every == 0 or step == settings.max_steps
        evals = math.ceil(steps / settings.eval_every) + now
        return steps * self.job.tokens_per_step / self.rate + evals * (self.eval_s + self.sample_s)

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    # ------------------------------------------------------------ evaluation

    def _evaluate(self) -> None:
        """Loss on the whole validation set (before the first step: on a part), the best model, a sample, the plot."""
        from gptjax.training.step import evaluate

        compiles = not self.asked  # in the first evaluation of the process, the first batch
        with self.progress.phase("evaluating"):
            batches = self._polled(self.job.eval_batches(self.step == 0))
            mean, metrics = evaluate(self.eval_loss, self._both, batches)
        ended, times = self.asked[-1], self.asked[compiles:]
        loss, counters = float(mean.value()), self.counters
        more = {name: value.value() for name, value in metrics.items()}
        share = self.job.first_eval_share if self.step == 0 else 1.0
        a_batch_s = (ended - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        self.eval_s = a_batch_s * (len(self.asked) - 1) / share
        row = {
            "step": self.step,
            "val/loss": _finite(loss),
            **{f"val/{name}": _finite(value) for name, value in self.job.more_of_loss(loss).items()},
            "val/tokens": mean.weight,
            **{f"val/{name}": _finite(value) for name, value in more.items()},
        }
        if n := self.cfg.train.eval_train_batches:
            train_batches = (self._batch(step, 1) for step in range(n))
            row["train/eval_loss"] = _finite(evaluate(self.eval_loss, self._both, train_batches)[0].value())
        row["seconds"] = self._seconds()
        self._log(row)
        where = f"step {self.step:,}/{self.cfg.train.max_steps:,}"
        text = f"{where}: validation loss {loss:.4f}"
        for name, value in {**self.job.more_of_loss(loss), **more}.items():
            text += f", {name} {value:.2f}" if name == "perplexity" else f", {value:.4f} {name.replace('_', ' ')}"
        self.progress.say(f"{text} ({ended - self.asked[0]:.1f} s)")
        counters.evaluated, counters.val_loss = self.step, loss
        if self.step == 0:
            return
        if loss < counters.best_loss:
            counters.best_loss, counters.best_step = loss, self.step
            self._write_model(self.run.best)
        sampled_from = time.monotonic()
        self.eval_s += sampled_from - ended
        if self.job.sample:
            compiles = not hasattr(self, "last_sample")
            with self.progress.phase("sampling"):
                self._sample()
            self.sample_s = 0.0 if compiles else time.monotonic() - sampled_from
        self._plot()

    def _polled(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, which `evaluate` asks for when it has the loss of the one before: `self.asked` says when."""
        self.asked = []
        for batch in batches:
            self._poll()
            self.asked.append(time.monotonic())
            yield self._placed(batch)
        self.asked.append(time.monotonic())

    def _sample(self) -> None:
        import jax

        from gptjax.parallel import on_mesh
        from gptjax.parallel.distributed import on_host

        mesh = self.mesh if jax.process_count() == 1 else None  # of several processes one writes, by itself
        both = on_host(self._both)
        if not self.writes:
            return
        texts = on_mesh(self.job.sample, mesh)(self.job.combine(*both))
        self.last_sample = texts[0]
        self.run.append("samples.txt", "".join(f"==== step {self.step} ====\n{text}\n\n" for text in texts))
        self.counters.samples_bytes = (self.run.path / "samples.txt").stat().st_size

    def _plot(self, last: bool = False) -> None:
        if self.writes and (last or time.monotonic() - self.plotted >= PLOT_EVERY_S):
            from gptjax.training.plot import draw

            self.plotted = time.monotonic()
            draw(self.run.rows(), self.run.path / "loss.png", f"{self.run.path.name}: {self.n_params:,} parameters")

    # ------------------------------------------------------------ saving, resuming, leaving

    def _save(self) -> None:
        with self.progress.phase("saving a checkpoint"):
            self._drain()
            if self.writes:
                self.metrics.sync()
            self.counters.seconds = self._seconds()
            meta = {
                "identity": self.job.identity,
                "counters": {name: _jsonable(value) for name, value in dataclasses.asdict(self.counters).items()},
                "environment": self.environment,
                "config": config.to_yaml(self.cfg),
            }
            self.checkpoints.save(self.step, self.state.replace(frozen=None), meta)
        self.saved = self.step

    def _accept(self, meta: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data, another vocabulary or other settings."""
        stored, here = _meta_config(meta), self.job.identity
        bad = [name for name, value in here.items() if meta["identity"].get(name) != value]
        if bad:
            raise UserError(
                f"{self.run.path} was trained with another {' and another '.join(bad)}: what is behind "
                f"{self.job.source} has changed\n"
                "  nothing was overwritten. Bring the old files back, or choose another run_dir=FOLDER"
            )
        if changed := run_dir.changes(stored, self.cfg):
            raise UserError.all(
                [
                    f"{self.run.checkpoints}: the newest checkpoint is of a run with other settings (there -> here):",
                    *(f"  {line}" for line in changed),
                    "  nothing was overwritten. Move that checkpoint back to its own run, or choose another "
                    "run_dir=FOLDER",
                ]
            )

    def _go_on(self, found: Any, abstract: Any) -> None:
        import jax

        from gptjax.parallel import place

        self.step = self.saved = found.step
        self.state = found.state
        if self.mesh is not None:
            self.state = place(found.state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        self.counters = _counters(found.meta["counters"])
        samples = self.run.path / "samples.txt"
        if self.writes:
            self.run.cut_metrics(self.step, self.progress.say)
        if self.writes and samples.exists() and samples.stat().st_size > self.counters.samples_bytes:
            os.truncate(samples, self.counters.samples_bytes)
        self.progress.say(f"going on from step {self.step:,} of {self.cfg.train.max_steps:,}")
        before = found.meta["environment"]
        changed = [name for name in BITWISE if before.get(name) != self.environment[name]]
        if changed:
            self.progress.say(
                f"WARNING: {', '.join(changed)} changed since the checkpoint (environment.json): the run goes on, but "
                "not bitwise as if it had never stopped"
            )

    def _leave(self) -> None:
        """A signal: save, then end with its code."""
        code = self.signals.code
        self.progress.say(f"{signal_name(code)}: saving at step {self.step:,} ...")
        self._drain()
        if self.step > self.saved:
            self._save()
        why = f"stopped at step {self.step:,} of {self.cfg.train.max_steps:,}; the same command goes on from there"
        self.progress.say(why)
        raise Stopped(code, why)

    def _leave_while_compiling(self) -> None:
        """XLA cannot be interrupted, and no step has been taken that is not on disk already."""
        code = self.signals.code
        self.progress.say(f"{signal_name(code)} while compiling: nothing to save, {self.saved:,} steps are on disk")
        if "ipykernel" in sys.modules:
            raise Stopped(code, "stopped while compiling")
        sys.stdout.flush()
        os._exit(code)

    def _stop_non_finite(self, step: int, in_a_row: int) -> None:
        last = f"checkpoint of step {self.saved:,}" if self.saved else "no checkpoint yet"
        why = (
            f"stopped at step {step:,}: loss or gradient was not finite {_count(in_a_row, 'time')} in a row "
            f"(train.max_nonfinite). Those steps changed nothing; kept: {last}.\n"
            f"  {self.job.where(step - 1)}\n"
            "  try a lower optim.lr, more optim.warmup_steps, or optim.clip_norm=1"
        )
        self.progress.say(why)
        raise Stopped(NON_FINITE, why)

    def _result(self) -> dict[str, Any]:
        counters = self.counters
        return {
            "step": self.step,
            "val/loss": counters.val_loss,
            **{f"val/{name}": _finite(value) for name, value in self.job.more_of_loss(counters.val_loss).items()},
            "parameters": self.n_params,
            "tokens": self.step * self.job.tokens_per_step,
            "best/step": counters.best_step,
            "best/loss": counters.best_loss if counters.best_step >= 0 else None,
        }

    def _write_model(self, folder: Path) -> None:
        from gptjax.parallel.distributed import on_host

        files = {"config.yaml": config.to_yaml(self.cfg), "result.json": json.dumps(self._result(), indent=1) + "\n"}
        with self.progress.phase(f"writing {folder.name}/"):
            both = on_host(self._both)
            if self.writes:
                self.job.write(folder, *both, files)

    def _finish(self) -> TrainResult:
        from gptjax.parallel.distributed import on_host

        self._plot(last=True)
        self._write_model(self.run.final)
        counters = self.counters
        self.progress.say(
            f"done: {self.step:,} steps in {duration(self._seconds())}, validation loss {counters.val_loss:.4f} "
            f"(best {counters.best_loss:.4f} at step {counters.best_step:,})"
        )
        if getattr(self, "last_sample", ""):
            self.progress.say(f"---- sample ----\n{self.last_sample}\n----------------")
        samples = " samples.txt" if self.job.sample else ""
        self.progress.say(f"in {self.run.path}: final/ best/ loss.png metrics.jsonl{samples}")
        params = self.job.combine(*on_host(self._both))
        return TrainResult(self.run.path, params, self.cfg, self.job.tokenizer, self.step, counters.val_loss)

    def _summary(self) -> None:
        cfg, say = self.cfg, self.progress.say
        say(f"run     {self.run.path}, seed {cfg.seed}, {self.environment['device']}")
        if self.mesh is not None:
            say("mesh    " + " x ".join(f"{name} {n}" for name, n in self.mesh.shape.items()) + " devices")
        for line in self.job.describe(self.n_params):
            say(line)


# ---------------------------------------------------------------- pretraining


def _pretraining(cfg: Config, ready: Any, base: Any) -> Job:
    """The job of `train`: whatever can be wrong is said here."""
    from gptjax import data, weights
    from gptjax.data.loader import ORDER_OF_WINDOWS
    from gptjax.model.gpt import abstract_params
    from gptjax.optim import make_optimizer
    from gptjax.tasks import pretrain

    model, settings, val = cfg.model, cfg.train, ready.val
    prompt = _prompt(cfg, ready.tokenizer)
    loader = data.Loader(
        ready.train, cfg.data, batch_size=settings.batch_size, context_length=cfg.window,
        seed=cfg.seed, vocab_size=ready.tokenizer.vocab_size,
    )  # fmt: skip
    task = pretrain.task(model)

    def rules(cfg: Config) -> Rules:
        return pretrain.task(cfg.model).loss, just_trained, make_optimizer(cfg.optim, cfg.train.max_steps)

    loss, combine, optimizer = rules(cfg)
    start = base and base.params("float32", None)
    tokens_per_step = settings.batch_size * cfg.window

    rows = max(settings.batch_size // settings.accumulation, EVAL_TOKENS // cfg.window)
    n_batches = -(-(len(val) - 1) // (rows * cfg.window))
    first_batches = min(n_batches, max(2, FIRST_EVAL_TOKENS // (rows * cfg.window)))  # one compiles, another is timed

    def eval_batches(first: bool) -> Iterator[Any]:
        sizes = dict(context_length=cfg.window, batch_size=rows)
        batches = data.eval_batches(val, **sizes, document_mask=cfg.data.document_mask)
        return itertools.islice(batches, first_batches if first else None)

    def where(step: int) -> str:
        starts = ", ".join(map(str, loader.starts(step)[:4]))
        return f"windows of that batch start at tokens {starts} ... of the training text"

    def more_of_loss(loss: float) -> dict[str, float]:
        bits = {"bits_per_byte": loss / math.log(2) * val.n_targets / val.n_bytes} if val.n_bytes else {}
        return {"perplexity": _exp(loss), **bits}

    def write(folder: Path, params: Params, frozen: None, files: dict[str, str]) -> None:
        weights.save(folder, params, model, ready.tokenizer, files, twin=folder.with_name("best"))

    def describe(n_params: int) -> list[str]:
        tokens = settings.max_steps * tokens_per_step
        return [
            f"data    {', '.join(cfg.data.source)}: {len(ready.train):,} tokens to train on, "
            f"{len(val):,} held out; tokenizer {ready.tokenizer.name}, {ready.tokenizer.vocab_size:,} ids",
            f"model   {model.arch}, {model.n_layer} layers, {model.n_head} heads, d_model {model.d_model}, "
            f"context {model.context_length}: {n_params:,} parameters, {model.dtype}",
            *([f"base    {cfg.pretrain.base}, windows of {cfg.window} tokens"] if base else []),
            f"train   {cfg.optim.name}, lr {cfg.optim.lr:g}, {settings.max_steps:,} steps of {tokens_per_step:,} "
            f"tokens = {tokens:,} tokens, {tokens / max(len(ready.train), 1):.2f} epochs",
        ]

    return Job(
        tokenizer=ready.tokenizer,
        batch=loader.batch,
        batches=loader.batches,
        part=loader.batches,
        where=where,
        eval_batches=eval_batches,
        first_eval_share=first_batches / n_batches,
        loss=loss,
        combine=combine,
        optimizer=optimizer,
        rules=rules,
        init=(lambda key, start: start) if base else (lambda key, start: task.init(key)),
        start=start,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token(model, abstract_params(model), width=cfg.window),
        identity={
            "tokenizer": ready.tokenizer.fingerprint,
            "order of windows": ORDER_OF_WINDOWS,
            "training data": ready.train.fingerprint,
            "validation data": val.fingerprint,
            **({"base": weights.fingerprint(start)} if base else {}),
        },
        source=f"data.source={','.join(cfg.data.source)} or tokenizer.name={cfg.tokenizer.name}",
        describe=describe,
        write=write,
        more_of_loss=more_of_loss,
        sample=sampling(cfg, ready.tokenizer, [prompt] * cfg.sample.n),
    )


def sampling(cfg: Config, tokenizer: Any, prompts: list[list[int]]) -> Callable[[Params], list[str]]:
    """params -> the texts of the prompts with what the model adds, as `cfg.sample` says."""
    import jax

    from gptjax.generation import from_config, generate

    settings = cfg.sample

    def sample(params: Params) -> list[str]:
        new = generate(
            params, prompts, cfg.model, max_new_tokens=settings.max_new_tokens, key=jax.random.key(settings.seed),
            sampler=from_config(settings), stop=() if tokenizer.eot_id is None else (tokenizer.eot_id,),
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        texts = zip(prompts, new, strict=True)
        return [tokenizer.decode(prompt + ids) for prompt, ids in texts]

    return sample


def _prompt(cfg: Config, tokenizer: Any) -> list[int]:
    """The ids of sample.prompt, looked at before anything is trained."""
    try:
        ids = tokenizer.encode(cfg.sample.prompt, allowed_special="all")
    except UserError as error:
        raise UserError(f"sample.prompt: {error}") from error
    if not ids and (begin := begin_id(tokenizer)) is not None:
        ids = [begin]
    if not ids:
        raise UserError(f"sample.prompt is empty and {tokenizer.name} has no start token: give at least one character")
    return list(ids)


def flops_per_token(cfg: ModelConfig, params: Params, *, width: int | None = None, frozen: float = 0.0) -> float:
    """6 a weight that is multiplied, and 12 L N H T for attention (N heads of size H). arXiv:2204.02311, appendix B.

    Args:
        width: T, tokens of a row; None: the context. frozen: share of the weights that have no gradient: 4 each.
    """
    from gptjax import tree

    idle = ("wte", "wpe", "lm_head") if cfg.n_classes else ("wte", "wpe")
    n = sum(math.prod(leaf.shape) for name, leaf in tree.flatten(params).items() if not name.startswith(idle))
    if cfg.tie_embeddings and not cfg.n_classes:
        n += cfg.vocab_size * cfg.d_model
    return (6.0 - 2.0 * frozen) * n + 12.0 * cfg.n_layer * cfg.n_head * cfg.head_dim * (width or cfg.context_length)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
