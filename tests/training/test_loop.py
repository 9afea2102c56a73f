"""The training loop: complete, resumed, interrupted, refused and failed runs."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import checkpoint
from gptjax.checkpoint import Checkpoints
from gptjax.config import ModelConfig, load_config, to_yaml
from gptjax.errors import UserError
from gptjax.losses import next_token
from gptjax.tasks import pretrain
from gptjax.training import compile, evaluate, loggers, loop, meter, progress, resume, run
from gptjax.training.process import Stopped
from gptjax.training.run_dir import RunDir, read_metrics
from gptjax.training.task import Ready

CLOCK = ("seconds", "tokens_per_s")


def quiet(line: str) -> None:
    pass


def curve(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl without timings; floats as hex, to compare them bitwise."""
    return [
        {name: value.hex() if isinstance(value, float) else value for name, value in row.items() if name not in CLOCK}
        for row in read_metrics(run_dir)
    ]


def final_state(run_dir: Path) -> tuple:
    """Step and leaf fingerprints of the last checkpoint, and the hash of the final model's weights."""
    step = Checkpoints(run_dir / "checkpoints").steps()[-1]
    leaves = json.loads((run_dir / "checkpoints" / str(step) / "meta.json").read_text())["leaves"]
    weights = (run_dir / "final" / "model.safetensors").read_bytes()
    return step, leaves, hashlib.sha256(weights).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make):
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    lines: list[str] = []
    return gptjax.train(make(folder), log=lines.append), lines


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole[0].run_dir, tmp_path / "run"))


# ---------------------------------------------------------------- files and metrics of a run


def test_a_run_directory_holds_everything(whole):
    result, lines = whole
    names = set(os.listdir(result.run_dir))
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "log.txt", "samples.txt", "loss.png", "checkpoints", "best",
        "final",
    } <= names  # fmt: skip
    assert (result.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(os.listdir(result.run_dir / "final")) == {
        "model.safetensors", "model.json", "tokenizer.json", "config.yaml", "result.json"
    }  # fmt: skip
    assert (result.run_dir / "samples.txt").read_text().count("==== step") == 2
    assert sorted(os.listdir(result.run_dir / "checkpoints")) == ["30", "40"]
    assert gptjax.load_config(result.run_dir / "config.yaml") == gptjax.load_config(result.run_dir) == result.cfg
    log = (result.run_dir / "log.txt").read_text()
    assert all(line in log for line in lines if line.startswith(("model", "step", "done")))
    assert result.exit_code == 0 and result.step == 40


def test_metrics(whole):
    rows = read_metrics(whole[0].run_dir)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(5, 41, 5))
    val = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in val] == [0, 20, 40]
    assert abs(val[0]["val/loss"] - np.log(257)) < 0.1  # an untrained model predicts uniformly
    assert val[-1]["val/loss"] == whole[0].val_loss < val[0]["val/loss"] - 1
    assert val[-1]["val/perplexity"] == pytest.approx(np.exp(val[-1]["val/loss"]))
    row = rows[-2]
    assert {"step", "train/loss", "lr", "grad_norm", "skipped", "tokens", "tokens_per_s", "seconds"} <= set(row)
    assert row["tokens"] == row["step"] * 4 * 16


@pytest.mark.slow
def test_the_remaining_time_includes_evaluations_and_samples(make, tmp_path, monkeypatch):
    """With a simulated clock: a step takes 1 ms, an evaluation batch 10 s, sampling 100 s, and the first evaluation
    batch and the first sampling 1,000 s more for compilation.

    There are 11 evaluation batches, of which 2 are used before the first step, and 40 steps with evaluations at 10, 20,
    30 and 40.
    """
    now, evaluations, samples = [0.0], [], []
    for module in (compile, evaluate, meter, resume, run):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(pretrain, "EVAL_TOKENS", 256)
    monkeypatch.setattr(pretrain, "FIRST_EVAL_TOKENS", 512)

    def prepare(cfg, shown):
        cfg, task, _ = pretrain.prepare(cfg, shown)

        def batches(step, k, rows):
            now[0] += k / 1000
            return task.batches(step, k, rows)

        def eval_batches(first):
            evaluations.append(0)
            for batch in task.validation.batches(first):
                yield batch
                now[0] += 1010 if len(evaluations) == 1 and not evaluations[0] else 10
                evaluations[-1] += 1

        def sample(params):
            samples.append(0)
            now[0] += 1100 if len(samples) == 1 else 100
            return ["text"]

        validation = task.validation._replace(batches=eval_batches, sample=sample)
        return Ready(cfg, task._replace(batches=batches, validation=validation))

    lines = []
    loop.run_task(make(tmp_path / "run", "train.eval_every=10", "data.val_fraction=0.35"), prepare, lines.append)
    n = 11
    assert evaluations == [2, n, n, n, n]
    left = {int(m[1]): m[2] for line in lines if (m := re.match(r"step (\d+)/40 .*ETA ([\d:]+)", line))}
    # seconds of sampling: unknown until it has run once without compiling
    known = {10: 0, 15: 0, 20: 0, 25: 100, 30: 100, 35: 100}  # nothing is said after the last step
    want = {step: (4 - (step - 1) // 10) * (10 * n + s) for step, s in known.items()}
    assert left == {step: progress.duration(seconds) for step, seconds in want.items()}


def loss_by_forward(result) -> tuple[float, int]:
    """The validation loss of the result's params, as a mean over tokens by `forward` only, and the number of tokens."""
    tokens = gptjax.data.prepare(result.cfg).val.tokens.astype(np.int32)
    forward = jax.jit(lambda params, tokens: gptjax.forward(params, tokens, result.cfg.model))
    total = count = 0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        n = len(window) - 1
        logits = forward(result.params, np.pad(window[:-1], (0, 16 - n))[None])[0, :n]
        total -= float(jax.nn.log_softmax(logits)[np.arange(n), window[1:]].sum())
        count += n
    return total / count, count


def test_validation_loss_is_that_of_every_token_once(whole):
    result, _ = whole
    loss, count = loss_by_forward(result)
    assert result.val_loss == pytest.approx(loss, rel=1e-5)
    row = read_metrics(result.run_dir)[-1]
    assert row["val/tokens"] == count
    store = gptjax.data.prepare(result.cfg).val
    assert row["val/bits_per_byte"] == pytest.approx(result.val_loss / np.log(2) * len(store) / store.n_bytes)


def test_the_final_model_has_the_logits_of_the_run_and_can_be_moved(copy, whole, tmp_path):
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    copy.rename(moved)
    for path in (moved, moved / "final"):
        params, cfg = gptjax.load(path)
        tokens = jnp.arange(12).reshape(1, 12)
        expected = gptjax.forward(whole[0].params, tokens, whole[0].cfg.model)
        assert np.array_equal(gptjax.forward(params, tokens, cfg), expected)
    tokenizer = gptjax.tokenizers.load(moved)
    (new,) = gptjax.generate(params, [tokenizer.encode("ab")], cfg, max_new_tokens=5, key=jax.random.key(0))
    assert len(new) == 5


# ---------------------------------------------------------------- finished and refused runs


def test_a_finished_run_is_not_trained_again(copy, make, whole):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    lines: list[str] = []
    result = gptjax.train(make(copy), log=lines.append)
    assert "is finished: 40 steps" in lines[0] and result.val_loss == whole[0].val_loss
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    ["model.d_model=32", "optim.lr=1e-3", "train.max_steps=20", "seed=1", "train.batch_size=8", "data.stride=8"],
)
def test_another_config_is_refused_with_the_difference(copy, make, change):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    with pytest.raises(UserError) as error:
        gptjax.train(make(copy, change), log=quiet)
    text = str(error.value)
    assert change.partition("=")[0] + ":" in text and "another run_dir" in text and "nothing was overwritten" in text
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_a_run_whose_weight_decay_was_scheduled_is_not_extended(make, tmp_path):
    scheduled = "optim.weight_decay_schedule=linear"
    run = RunDir((cfg := make(tmp_path / "run", scheduled)).run_dir)
    run.path.mkdir()
    run.begin(cfg, {})
    with pytest.raises(UserError, match=r"weight_decay_schedule=linear: .* planned for 40 steps.*pretrain.base="):
        run.check(make(tmp_path / "run", scheduled, "train.max_steps=80"))
    assert cfg.optim.schedule == "constant" and not cfg.optim.open_ended
    assert make(tmp_path / "run", "optim.weight_decay_schedule=lr").optim.open_ended


@pytest.mark.slow
def test_a_finished_run_can_be_extended_if_the_learning_rate_is_constant(copy, make, tmp_path, whole):
    (copy / "test.json").write_text("{}")  # test results of a fine-tuning
    longer = gptjax.train(make(copy, "train.max_steps=60"), log=quiet)
    at_once = gptjax.train(make(tmp_path / "at once", "train.max_steps=60"), log=quiet)
    assert longer.step == at_once.step == 60 and longer.val_loss == pytest.approx(at_once.val_loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), longer.params, at_once.params)
    assert load_config(copy).train.max_steps == 60 and not (copy / "test.json").exists()
    assert [row["step"] for row in read_metrics(copy) if "val/loss" in row] == [0, 20, 40, 60]
    lines: list[str] = []
    assert gptjax.train(make(copy, "train.max_steps=60"), log=lines.append).step == 60
    assert "is finished: 60 steps" in lines[0] and "train.max_steps=N" in lines[2]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_whose_learning_rate_has_decayed_is_not_extended(make, tmp_path, schedule):
    cfg = make(tmp_path / "run", f"optim.schedule={schedule}")
    run = RunDir(cfg.run_dir)
    run.path.mkdir()
    run.begin(cfg, {})
    (run.checkpoints / "40").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"schedule={schedule}: .* planned for 40 steps.*pretrain.base="):
        run.check(make(tmp_path / "run", f"optim.schedule={schedule}", "train.max_steps=80"))
    (run.checkpoints / "40").rename(run.checkpoints / "30")  # before step 32, where wsd starts to decay
    if schedule == "wsd":
        run.check(make(tmp_path / "run", f"optim.schedule={schedule}", "train.max_steps=80"))


# ---------------------------------------------------------------- continued pretraining

CONTINUED = (
    "data.split=tail", "optim.lr=1e-3", "optim.schedule=constant", "train.batch_size=4", "train.max_steps=20",
    "train.eval_every=10", "train.checkpoint_every=10", "train.log_every=5", "sample.max_new_tokens=8",
)  # fmt: skip


@pytest.mark.slow
def test_continued_pretraining_on_other_text(whole, tmp_path):
    """It keeps the base's architecture and tokenizer, with windows of another length. The first loss is that of the
    base."""
    base, (other, window) = whole[0], (tmp_path / "other.txt", 8)
    other.write_text("the same letters in another order: hgfedcba " * 60)
    sources = (f"pretrain.base={base.run_dir}", f"data.source={other}", f"pretrain.context_length={window}")
    cfg = load_config(None, *CONTINUED, *sources, f"run_dir={tmp_path / 'run'}")
    result = gptjax.train(cfg, log=quiet)
    assert result.cfg.model == dataclasses.replace(base.cfg.model, dropout=0.0) and result.cfg.window == window
    assert result.tokenizer.fingerprint == base.tokenizer.fingerprint
    rows = [row for row in read_metrics(result.run_dir) if "val/loss" in row]
    store = gptjax.data.prepare(result.cfg, base.tokenizer).val
    batches = list(gptjax.data.eval_batches(store, context_length=window, batch_size=4))
    totals = [next_token(base.cfg.model)(base.params, batch, None)[0] for batch in batches]
    first = sum(float(mean.total) for mean in totals) / sum(float(mean.weight) for mean in totals)
    assert rows[0]["val/loss"] == pytest.approx(first, rel=1e-5) and rows[-1]["val/loss"] < first - 0.1
    params, model = gptjax.load(result.run_dir)
    assert model.context_length == 16 and gptjax.forward(params, jnp.zeros((1, 16), int), model).shape == (1, 16, 257)
    lines: list[str] = []
    reloaded = load_config(None, *CONTINUED, *sources, f"run_dir={tmp_path / 'run'}")
    assert gptjax.train(reloaded, log=lines.append).step == 20 and "is finished" in lines[0]
    assert gptjax.train(load_config(tmp_path / "run"), log=quiet).step == 20  # from the run's config.yaml
    with pytest.raises(UserError, match="must be at most model.context_length"):
        gptjax.train(load_config(None, *CONTINUED, *sources[:2], "pretrain.context_length=17", f"run_dir={tmp_path}/x"))


@pytest.mark.slow
def test_continued_pretraining_can_be_resumed(whole, tmp_path):
    sources = (f"pretrain.base={whole[0].run_dir}", f"data.source={whole[0].cfg.data.source[0]}")

    def run(name, *more):
        return gptjax.train(load_config(None, *CONTINUED, *sources, f"run_dir={tmp_path / name}", *more), log=quiet)

    once = run("once")
    run("twice", "train.max_steps=10")
    twice = run("twice")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once.params, twice.params)
    shutil.rmtree(tmp_path / "once" / "final")
    copied = tmp_path / "another"
    gptjax.save(copied, jax.tree.map(lambda a: a * 1.01, whole[0].params), whole[0].cfg.model, whole[0].tokenizer)
    with pytest.raises(UserError, match="another config"):
        run("once", f"pretrain.base={copied}")


def test_a_base_brings_its_model_and_tokenizer(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny-gpt2\ntrain:\n  max_steps: 5\n")
    cfg = load_config(file, "pretrain.base=x", "model.dropout=0.1", "model.dtype=bfloat16")
    assert cfg.model == ModelConfig(dropout=0.1, dtype="bfloat16") and cfg.tokenizer.name == "chars"
    with pytest.raises(UserError, match=r"brings its own model and tokenizer: leave out model.n_layer \(load_config\)"):
        load_config(file, "pretrain.base=x", "model.n_layer=3")
    file.write_text("pretrain:\n  base: x\nmodel:\n  arch: llama\n")
    with pytest.raises(UserError, match=r"leave out model.arch .*mine.yaml:4"):
        load_config(file)
    with pytest.raises(UserError, match=r"settings of gptjax pretrain, but task=classify"):
        load_config("classify", "pretrain.base=x")


def test_resume_never_refuses_an_existing_run(copy, make):
    with pytest.raises(UserError, match="train.resume=never: nothing was overwritten"):
        gptjax.train(make(copy, "train.resume=never"), log=quiet)


def test_settings_that_do_not_affect_training_may_change(copy, make):
    shutil.rmtree(copy / "final")
    change = ["train.log_every=10", "train.eval_every=40", "sample.max_new_tokens=4", "train.keep_checkpoints=3"]
    assert gptjax.train(make(copy, *change), log=quiet).step == 40


def relabel(copy: Path, *changes: tuple[str, str]) -> None:
    """Make the run unfinished, and change its stored config without training again."""
    shutil.rmtree(copy / "final")
    stored = (copy / "config.yaml").read_text()
    for old, new in changes:
        assert old in stored
        stored = stored.replace(old, new)
    (copy / "config.yaml").write_text(stored)


def test_other_data_under_the_same_name_are_refused(copy, make, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("a", "z"))
    relabel(copy, (str(text), str(other)))
    with pytest.raises(UserError, match="another training data and another validation data"):
        gptjax.train(make(copy, f"data.source={other}"), log=quiet)


def test_another_vocabulary_is_refused(copy, make):
    relabel(copy, ("name: bytes", "name: chars"))
    with pytest.raises(UserError, match=r"model.vocab_size: 257 -> \d+"):
        gptjax.train(make(copy, "tokenizer.name=chars", "sample.prompt=a"), log=quiet)
    with pytest.raises(UserError, match="another tokenizer"):
        gptjax.train(make(copy, "tokenizer.name=chars", "sample.prompt=a", "model.vocab_size=257"), log=quiet)


def test_a_run_without_an_intact_checkpoint_is_refused_and_unchanged(copy, make):
    shutil.rmtree(copy / "final")
    for step in ("30", "40"):
        (copy / "checkpoints" / step / "manifest.json").write_bytes(b"")
    metrics = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no checkpoint can be read"):
        gptjax.train(make(copy), log=quiet)
    assert (copy / "metrics.jsonl").read_bytes() == metrics
    assert sorted(os.listdir(copy / "checkpoints")) == ["30", "40"]


# ---------------------------------------------------------------- interrupted and resumed runs


def test_a_moved_run_can_be_resumed_from_its_config(copy, tmp_path, whole):
    shutil.rmtree(copy / "final")
    moved = copy.rename(tmp_path / "moved")
    cfg = gptjax.load_config(moved)
    assert Path(cfg.run_dir) == moved
    assert gptjax.train(cfg, log=quiet).run_dir == moved
    assert final_state(moved) == final_state(whole[0].run_dir)


def test_a_damaged_newest_checkpoint_is_skipped(copy, make, whole):
    path = copy / "checkpoints" / "40" / "meta.json"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    shutil.rmtree(copy / "final")
    lines: list[str] = []
    gptjax.train(make(copy), log=lines.append)
    assert any("checkpoints/40 is damaged: meta.json" in line for line in lines)
    assert any("resuming from step 30 of 40" in line for line in lines)
    assert curve(copy) == curve(whole[0].run_dir)
    assert final_state(copy) == final_state(whole[0].run_dir)


def change_meta(step: Path, change) -> None:
    """Apply `change` to a checkpoint's metadata, and update its manifest."""
    body = json.loads((step / "meta.json").read_text())
    change(body["meta"])
    checkpoint._write_json(step / "meta.json", body)
    checkpoint._write_json(step / "manifest.json", checkpoint._manifest(step))


@pytest.mark.slow
def test_a_checkpoint_with_the_number_of_another_step_is_skipped(copy, make, whole):
    """Step 30 is stored as 40, which would be the last step of the run."""
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / "40")
    shutil.copytree(copy / "checkpoints" / "30", copy / "checkpoints" / "40")
    lines: list[str] = []
    gptjax.train(make(copy), log=lines.append)
    assert any("checkpoints/40 is damaged" in line and "it is of step 30" in line for line in lines)
    assert final_state(copy) == final_state(whole[0].run_dir)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(copy, make):
    shutil.rmtree(copy / "final")
    change_meta(
        copy / "checkpoints" / "40", lambda meta: meta.update(config=meta["config"].replace("seed: 0", "seed: 1", 1))
    )
    before = sorted(os.listdir(copy / "checkpoints"))
    with pytest.raises(UserError, match=r"other settings.*\n  seed: 1 -> 0\n.*nothing was overwritten"):
        gptjax.train(make(copy), log=quiet)
    assert sorted(os.listdir(copy / "checkpoints")) == before


@pytest.mark.parametrize(
    "other",
    [
        {"identity": 5}, {"counters": {"odd": 1}}, {"counters": {"seconds": "x"}}, {"counters": {"samples_bytes": -1}},
        {"counters": {"evaluated": []}}, {"counters": {"val_loss": 10**400}}, {"environment": None}, {"config": 5},
        {"config": "optim: {lr: x}"},
    ],
)  # fmt: skip
def test_invalid_metadata_counts_as_damage(other, whole):
    meta = json.loads((whole[0].run_dir / "checkpoints" / "40" / "meta.json").read_text())["meta"]
    resume.meta_config(meta)
    with pytest.raises(checkpoint.Damaged, match="meta.json: "):
        resume.meta_config({**meta, **other})


def send(monkeypatch, at_step: int, number: int, key: str = "train/loss") -> None:
    """Send a signal to this process while the metrics of step `at_step` are logged."""
    log = loggers.JsonLines.log

    def log_and_kill(self, row):
        log(self, row)
        if row["step"] == at_step and key in row:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loggers.JsonLines, "log", log_and_kill)


@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    ("number", "code", "step", "key"),
    [
        (signal.SIGTERM, 143, 15, "train/loss"),
        (signal.SIGINT, 130, 20, "val/loss"),
        (signal.SIGTERM, 143, 0, "val/loss"),
    ],
)
def test_a_run_stopped_by_a_signal_resumes_bitwise_equal(make, tmp_path, monkeypatch, whole, number, code, step, key):
    cfg, before = make(tmp_path / "run"), signal.getsignal(number)
    with monkeypatch.context() as patch:
        send(patch, step, number, key)
        with pytest.raises(Stopped) as stopped:
            gptjax.train(cfg, log=quiet)
    assert stopped.value.code == code and signal.getsignal(number) is before
    saved = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert (saved[0] if saved else 0) in (step, step + 5)  # the call in flight is completed
    gptjax.train(cfg, log=quiet)
    assert curve(tmp_path / "run") == curve(whole[0].run_dir)
    assert final_state(tmp_path / "run") == final_state(whole[0].run_dir)
    assert (tmp_path / "run" / "samples.txt").read_bytes() == (whole[0].run_dir / "samples.txt").read_bytes()


def start(config: Path, **kwargs) -> subprocess.Popen:
    code = f"import gptjax; gptjax.train(gptjax.load_config({str(config)!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


@pytest.mark.slow
@pytest.mark.further_case  # as test_kills.py, without its moments
def test_runs_killed_at_random_times_end_bitwise_equal(make, tmp_path):
    more = ["train.max_steps=600", "train.eval_every=200", "train.checkpoint_every=40"]
    gptjax.train(make(tmp_path / "oracle", *more), log=quiet)
    cfg, run = make(tmp_path / "killed", *more), tmp_path / "killed"
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    draw, kills = random.Random(time.time_ns()), 0
    while kills < 5:
        process = start(tmp_path / "config.yaml")
        lines = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # until this process has trained, too
            if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes()) > len(lines):
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.25))
        assert process.poll() is None, process.stdout.read().decode()
        process.kill()
        process.communicate()
        kills += 1
    process = start(tmp_path / "config.yaml")
    out = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, out
    assert "WARNING" not in out
    assert curve(run) == curve(tmp_path / "oracle")
    assert final_state(run) == final_state(tmp_path / "oracle")
    assert (run / "samples.txt").read_bytes() == (tmp_path / "oracle" / "samples.txt").read_bytes()


def test_a_second_process_is_refused_and_sigterm_exits_with_143(make, tmp_path):
    run = tmp_path / "run"
    cfg = make(run, "train.max_steps=1000000", "train.checkpoint_every=1000000", "train.eval_every=1000000")
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    process = start(tmp_path / "config.yaml")
    try:
        while process.poll() is None and len(read_metrics(run)) < 3:
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"is in use: process {process.pid} "):
            gptjax.train(cfg, log=quiet)
        process.terminate()
        out = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 143 and "SIGTERM: saving at step" in out and "Traceback" not in out
    step, _ = Checkpoints(run / "checkpoints").newest()
    assert step >= read_metrics(run)[-1]["step"] > 0


# ---------------------------------------------------------------- out of memory, non-finite losses


def test_an_out_of_memory_error_lists_changes_that_fit(make, tmp_path, monkeypatch):
    def call(run, call, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr(loop, "first_call", call)
    cfg = make(tmp_path / "run", "train.batch_size=8")
    with pytest.raises(UserError) as raised:
        gptjax.train(cfg, log=quiet)
    text = str(raised.value)
    assert "8 rows of" in text and "Out of memory allocating 123 bytes.)" in text and "\nmore" not in text
    assert "train.accumulation=2: the same batch in micro-batches of 4 rows" in text and "train.batch_size=4" in text


def test_what_fits_lists_the_smallest_sufficient_changes():
    from gptjax.training.memory import activation_bytes, what_fits

    cfg = load_config("gpt2-124m", "model.vocab_size=50257", "train.batch_size=16", "train.accumulation=1")
    act = activation_bytes(cfg.model, 16, 1024)
    lines = what_fits(cfg, 1024, rows_per_device=16, lasting_bytes=2**30, limit=round((2**30 + act / 5) / 0.85))
    assert [line.split(":")[0] for line in lines] == [
        "train.accumulation=8", "train.batch_size=2", "model.remat=full"
    ]  # fmt: skip
    assert what_fits(cfg, 1024, rows_per_device=16, lasting_bytes=2**40, limit=2**30) == []
    full = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
    assert not any("remat" in line for line in what_fits(full, 1024, rows_per_device=16))


def poison(monkeypatch, steps: range) -> None:
    """Make the loss of these steps NaN: their batches have a token -1, which the patched loss looks for."""
    from gptjax.data import Loader
    from gptjax.training import step as module

    make_train_step, batches = module.make_train_step, Loader.batches

    def make_bad_step(loss, tx, **kwargs):
        def bad_loss(params, batch, key):
            mean, metrics = loss(params, batch, key)
            return mean._replace(total=jnp.where(jnp.any(batch.tokens < 0), jnp.nan, mean.total)), metrics

        return make_train_step(bad_loss, tx, **kwargs)

    def bad_batches(self, step, k, rows=slice(None)):
        batch = batches(self, step, k, rows)
        tokens = batch.tokens.copy()
        for i in range(k):
            tokens[i, 0, 0] = -1 if step + i in steps else tokens[i, 0, 0]
        return batch._replace(tokens=tokens)

    monkeypatch.setattr(compile, "make_train_step", make_bad_step)
    monkeypatch.setattr(Loader, "batches", bad_batches)


def test_non_finite_steps_are_skipped(make, tmp_path, monkeypatch):
    poison(monkeypatch, range(12, 14))
    result = gptjax.train(make(tmp_path / "run"), log=quiet)
    assert result.step == 40 and np.isfinite(result.val_loss)
    assert read_metrics(tmp_path / "run")[-2]["skipped"] == 2


def test_five_consecutive_non_finite_steps_stop_the_run_with_exit_code_3(make, tmp_path, monkeypatch):
    poison(monkeypatch, range(10, 40))
    lines: list[str] = []
    with pytest.raises(Stopped) as stopped:
        gptjax.train(make(tmp_path / "run", "train.checkpoint_every=5"), log=lines.append)
    assert stopped.value.code == 3 and "stopped at step 15" in lines[-1] and "5 consecutive steps" in lines[-1]
    kept = [json.loads((path / "meta.json").read_text()) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(kept) == 2  # the checkpoints of steps 5 and 10: no later one is saved
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["10", "5"]


# ---------------------------------------------------------------- further settings and errors


def test_steps_per_call(make, tmp_path):
    cfg = make(tmp_path)
    assert compile.steps_per_call(cfg, 1000) == 5
    assert compile.steps_per_call(cfg, 30_000_000) == 1
    assert compile.steps_per_call(cfg, 1000, start=8) == 1
    four = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps_per_call=4))
    with pytest.raises(UserError, match=r"must divide .*checkpoint_every \(10\).*log_every \(5\): use one of 1, 5"):
        compile.steps_per_call(four, 1000)


@pytest.mark.slow
def test_several_steps_per_call_give_the_same_loss(make, tmp_path, whole):
    result = gptjax.train(make(tmp_path / "run", "train.steps_per_call=1"), log=quiet)
    assert result.val_loss == pytest.approx(whole[0].val_loss, rel=1e-5)


def test_epochs_determine_max_steps(make, tmp_path, whole):
    cfg = make(tmp_path / "run")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, epochs=0.5))
    ready = gptjax.data.prepare(cfg)
    resolved = pretrain.prepare(cfg, progress.Progress(log=quiet)).cfg
    assert resolved.train.max_steps == round(0.5 * len(ready.train) / 64)
    assert resolved.model.vocab_size == 257


def test_a_full_disk_ends_the_run_with_one_error(make, tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    from gptjax import checkpoint

    monkeypatch.setattr(checkpoint, "_orbax_save", no_space)
    with pytest.raises(UserError, match="cannot write checkpoint .*10: No space left on device"):
        gptjax.train(make(tmp_path / "run"), log=quiet)


def test_an_invalid_prompt_and_a_missing_logger_are_refused_before_training(make, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="sample.prompt"):
        gptjax.train(make(tmp_path / "run", "tokenizer.name=chars", "sample.prompt=%"), log=quiet)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        gptjax.train(make(tmp_path / "other", "train.loggers=wandb"), log=quiet)
    with pytest.raises(UserError, match="train.steps_per_call"):
        gptjax.train(make(tmp_path / "third", "train.steps_per_call=7"), log=quiet)
    assert not {"run", "other", "third"} & set(os.listdir(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="a CPU has no separate host memory in older versions of jax")
def test_an_optimizer_state_in_host_memory(make, tmp_path, monkeypatch, whole):
    """The losses are the same as on the device, also after resuming from a checkpoint."""
    cfg = make(tmp_path / "run", "optim.offload=true")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send(patch, 15, signal.SIGTERM)
        gptjax.train(cfg, log=quiet)
    gptjax.train(cfg, log=quiet)
    ours, expected = (
        [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]
        for folder in (tmp_path / "run", whole[0].run_dir)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


# ---------------------------------------------------------------- averages of the weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["train.ema=0.9", pytest.param("train.average_last=0.5", marks=pytest.mark.further_case)]
)
def test_the_average_is_evaluated_saved_and_resumed_bitwise_equal(make, tmp_path, monkeypatch, whole, setting):
    result = gptjax.train(make(tmp_path / "run", setting), log=quiet)
    state = Checkpoints(tmp_path / "run" / "checkpoints").read(40)
    mean, saved = state["opt_state"]["mean"], gptjax.load(tmp_path / "run" / "final")[0]
    for params in (result.params, saved):
        jax.tree.map(np.testing.assert_array_equal, params, mean)
    assert result.val_loss == pytest.approx(loss_by_forward(result)[0], rel=1e-5)
    assert abs(result.val_loss - loss_by_forward(result._replace(params=state["params"]))[0]) > 1e-3
    # training itself is the same as without an average
    plain = Checkpoints(whole[0].run_dir / "checkpoints").read(40)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state["params"], plain)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send(patch, 25, signal.SIGTERM)
        gptjax.train(make(tmp_path / "again", setting), log=quiet)
    gptjax.train(make(tmp_path / "again", setting), log=quiet)
    assert curve(tmp_path / "again") == curve(tmp_path / "run")
    assert final_state(tmp_path / "again") == final_state(tmp_path / "run")


def test_a_run_is_not_resumed_with_another_average(copy, make):
    with pytest.raises(UserError, match=r"train.ema: 0.0 -> 0.9"):
        gptjax.train(make(copy, "train.ema=0.9"), log=quiet)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="a CPU has no separate host memory in older versions of jax")
def test_an_average_in_host_memory(make, tmp_path, monkeypatch):
    on_device = gptjax.train(make(tmp_path / "device", "train.ema=0.9"), log=quiet)
    cfg = make(tmp_path / "run", "train.ema=0.9", "optim.offload=true")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send(patch, 15, signal.SIGTERM)
        gptjax.train(cfg, log=quiet)
    assert gptjax.train(cfg, log=quiet).val_loss == pytest.approx(on_device.val_loss, rel=1e-5)


# ---------------------------------------------------------------- early stopping

UNSTABLE = ("optim.lr=0.3", "train.eval_every=5", "train.max_steps=60", "train.checkpoint_every=20")


def stop_of(losses: dict[int, float], patience: int) -> int:
    """The step at which a run with these validation losses stops early."""
    best, waited = np.inf, 0
    for step, loss in losses.items():
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            return step
    raise AssertionError("the run does not stop early")


@pytest.mark.slow
def test_patience_stops_a_run_early(make, tmp_path, monkeypatch):
    """The stop is where the validation losses of a run without patience say. The run is finished and not trained
    further, unless patience is raised. An interrupted run counts on."""
    whole, cfg = tmp_path / "whole", make(tmp_path / "run", *UNSTABLE, "train.patience=3")
    gptjax.train(make(whole, *UNSTABLE), log=quiet)
    losses = {row["step"]: row["val/loss"] for row in read_metrics(whole) if "val/loss" in row and row["step"]}
    stop, lines, calls = stop_of(losses, 3), list[str](), []
    assert 15 < stop < 50 and stop % 20  # no checkpoint is due there
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send(patch, stop - 5, signal.SIGTERM, "val/loss")
        gptjax.train(cfg, log=quiet)
    result = gptjax.train(cfg, log=lines.append, hooks=[(1000, lambda run: calls.append(run.step))])
    assert result.step == stop and result.exit_code == 0 and calls == [stop]
    early = f"stopped early at step {stop} of 60: no lower validation loss in 3 evaluations (train.patience)"
    assert lines.count(early) == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == stop
    assert curve(tmp_path / "run") == [row for row in curve(whole) if row["step"] <= stop]

    before = (tmp_path / "run" / "final" / "result.json").stat().st_mtime_ns
    for again in (cfg, make(tmp_path / "run", *UNSTABLE, "train.patience=2"), dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, max_steps=80)
    )):  # fmt: skip
        assert gptjax.train(again, log=lines.append).step == stop
        assert f"is finished: {stop} steps (train.patience is exhausted)" in lines[-3]
    assert (tmp_path / "run" / "final" / "result.json").stat().st_mtime_ns == before

    (tmp_path / "run" / "test.json").write_text("{}")
    assert gptjax.train(make(tmp_path / "run", *UNSTABLE), log=quiet).step == 60
    assert curve(tmp_path / "run") == curve(whole) and final_state(tmp_path / "run") == final_state(whole)
    assert not (tmp_path / "run" / "test.json").exists()


def test_patience_that_is_not_exhausted_changes_nothing(make, tmp_path, whole):
    result = gptjax.train(make(tmp_path / "run", "train.patience=3", "train.eval_every=5"), log=quiet)
    assert result.step == 40
    assert final_state(tmp_path / "run") == final_state(whole[0].run_dir)
