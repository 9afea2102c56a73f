"""The training loop: runs the compiled training steps, and calls hooks at fixed intervals of steps.

The modules in `gptjax.tasks` define the models, data and losses. A hook is a function that receives the `Run`. The
following hook of a user prints the standard deviation of each parameter array every 100 steps:

    def histogram(run): print(run.step, jax.tree.map(jnp.std, run.state.params))
    gptjax.train(cfg, hooks=[(100, histogram)])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import jax

from gptjax import config
from gptjax._moved import moved_name
from gptjax.config import Config
from gptjax.parallel import distributed, make_mesh
from gptjax.signals import INTERRUPTED, Signals, Stopped, Terminated, catch_signals, signal_name
from gptjax.training import evaluate, resume
from gptjax.training.compile import first_call, make_call, steps_per_call, too_large
from gptjax.training.meter import Meter
from gptjax.training.process import keep_buffers, use_compile_cache
from gptjax.training.progress import Progress, duration
from gptjax.training.rollouts import roll
from gptjax.training.run import Hook, Interrupted, Run, TrainResult
from gptjax.training.run_dir import RunDir
from gptjax.training.task import Ready, short_run

Prepare = Callable[[Config, Progress], Ready]


def run_task(
    written: Config,
    prepare: Prepare,
    log: Callable[[str], None] | None = None,
    missing: Callable[[Config], None] = lambda cfg: None,
    hooks: Sequence[Hook] = (),
) -> tuple[TrainResult, Any]:
    """Trains the task that the function `prepare` builds from the config.

    Args:
        written: the config as the user wrote it. `prepare` fills in the values that depend on the data.
        prepare: function that builds the task; called before the run directory is created, and not at all if the run is
            finished.
        log: function that is called with each line of output, or None to print the lines.
        missing: function that raises UserError if data, tokenizer or base model do not exist.
        hooks: pairs (every, fn): fn(run) is called every `every` steps and after the last step.

    Returns:
        (result of training, the task's held-out test data). The test data are None if the run had finished already.

    Raises:
        UserError: as in `tasks.train`.
        Stopped: a signal was received, or the loss or gradient was not finite in too many consecutive steps.
    """
    with catch_signals() as signals:
        try:
            result, when = _run(written, prepare, log, missing, hooks, signals), "after the last step"
        except (KeyboardInterrupt, Terminated):
            signals.code = signals.code or INTERRUPTED
            when = "before the first step: nothing to save"
        except Exception:
            if not signals.code or signals.polled:
                raise
            # If a signal interrupts an import, the import may raise ImportError instead of KeyboardInterrupt.
            when = "before the first step: nothing to save"
        if signals.code:
            message = f"{signal_name(signals.code)} {when}; run the same command again to resume"
            (log or print)(message)
            raise Stopped(signals.code, message)
        return result


def _run(
    written: Config,
    prepare: Prepare,
    log: Callable[[str], None] | None,
    missing: Callable[[Config], None],
    hooks: Sequence[Hook],
    signals: Signals,
) -> tuple[TrainResult, Any]:
    config.validate(written)
    distributed.start(written.distributed)
    signals.raise_if_any()
    say, writes = log or print, distributed.is_writer()
    log = log if writes else _nothing
    dir = RunDir(written.run_folder)
    with distributed.peers(say), ExitStack() as stack:
        distributed.agree_on_settings(written)
        with distributed.synchronise_errors():
            finished = resume.refuse(written, missing)
            result = resume.finished(dir, written, log or print) if finished else None
        distributed.agree_on({f"{dir.path} is finished": finished}, "the run directories")
        if result is not None:
            return result, None
        use_compile_cache()
        keep_buffers()
        with distributed.synchronise_errors(), Progress(log=log, alive=dir.touch if writes else _nothing) as progress:
            ready = prepare(written, progress)
            resolved, held_out = ready.cfg, ready.held_out
            if ready.task.rollouts:
                stack.enter_context(ready.task.rollouts.during)
            steps_per_call(resolved, 0, hooks=[every for every, _ in hooks])
        distributed.agree_on(resume.hashes(ready.task), "the data")
        signals.raise_if_any()
        rows = resolved.train.batch_size // resolved.train.accumulation
        mesh = make_mesh(resolved.mesh, rows=rows, even_one=resolved.optim.offload)
        with distributed.synchronise_errors():
            if writes:
                stack.enter_context(dir.locked())
            # The run directory is checked again, because `refuse` checked the directory without holding the directory's
            # lock.
            dir.check(resolved)
        to_log_file = Progress(lambda line: dir.append("log.txt", line), log, dir.touch)
        with to_log_file if writes else Progress(log=log) as progress:
            run = resume.begin(ready, dir, mesh, progress, signals)
            del ready  # The arrays in `ready` have been donated to jitted functions, and can no longer be used.
            signals.raise_if_any()
            if warning := short_run(resolved):
                progress.say(warning)
            signals.polled = True
            result = _train(run, hooks)
            signals.polled = False
            return result, held_out


def _nothing(*_: Any) -> None:
    pass


def _train(run: Run, hooks: Sequence[Hook]) -> TrainResult:
    settings, begin, say = run.cfg.train, run.step, run.progress.say
    run.k = steps_per_call(run.cfg, run.n_params, begin, [every for every, _ in hooks])
    meter, call = Meter(run), make_call(run)
    save = resume.checkpointer(meter)
    built_in = [(settings.eval_every, evaluate.evaluator(meter)), (settings.checkpoint_every, save)]
    user_hooks = [(n, lambda run, hook=hook: hook(run) if run.step > begin else None) for n, hook in hooks]
    try:
        with run.progress.phase("training"):
            _until_done(run, meter, call, [*built_in, *user_hooks])
    except Interrupted:
        code = run.signals.code
        say(f"{signal_name(code)}: saving at step {run.step:,} ...")
        meter.drain()
        if run.step > run.saved:
            save(run)
        message = f"stopped at step {run.step:,} of {settings.max_steps:,}; run the same command again to resume"
        say(message)
        raise Stopped(code, message) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large(run, error) from error
    finally:
        meter.close()
    if run.step < settings.max_steps:
        n = run.counters.since_best
        say(
            f"stopped early at step {run.step:,} of {settings.max_steps:,}: no lower validation loss in "
            f"{n} evaluation{'' if n == 1 else 's'} (train.patience)"
        )
    evaluate.plot(run)
    evaluate.write_model(run, run.dir.final)
    counters, shown = run.counters, run.task.validation.text
    say(
        f"done: {run.step:,} steps in {duration(run.seconds())}, validation {shown(counters.val_loss)} "
        f"(best {shown(counters.best_loss).split()[-1]} at step {counters.best_step:,})"
    )
    if run.last_sample:
        say(f"---- sample ----\n{run.last_sample}\n----------------")
    texts = " samples.txt" * bool(run.task.validation.sample) + " rollouts.jsonl" * bool(run.task.rollouts)
    say(f"in {run.dir.path}: final/ best/ loss.png metrics.jsonl{texts}")
    return TrainResult(run.dir.path, run.params(), run.cfg, run.task.tokenizer, run.step, counters.val_loss)


def _until_done(run: Run, meter: Meter, call: Callable, hooks: Sequence[Hook]) -> None:
    """Runs the remaining training steps, and calls the hooks.

    The metrics of a compiled call are read while the next compiled call runs. Before a hook is called, the metrics of
    all previous steps are read.
    """
    steps = run.cfg.train.max_steps
    while True:
        # The first of the `hooks` evaluates the model. After the evaluation, train.patience may end the run.
        for every, hook in hooks:
            if run.step % every == 0 or run.done:
                hook(run)
        if run.done:
            return
        run.poll()
        if run.task.rollouts:
            meter.drain()  # Rollouts are generated with the parameters after the last compiled call.
        meter.start()
        batch = roll(run, meter) if run.task.rollouts else run.batch(run.step, run.k)
        if meter.compiled:
            run.state, metrics = call(run.state, batch)
        else:
            metrics = first_call(run, call, batch)
        run.step += run.k
        meter.put(run.step, metrics)
        if not meter.compiled or run.step >= steps or any(run.step % every == 0 for every, _ in hooks):
            meter.drain()
        meter.compiled = True


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
