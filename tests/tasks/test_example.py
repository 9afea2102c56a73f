"""A user-defined task: logistic regression on random vectors ("pixels") with two classes.

The section "the task" is a complete task; the fixture `parity` registers it in `TASKS`.
"""

import sys
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import tasks, tokenizers
from gptjax.optim import make_optimizer
from gptjax.training.run_dir import read_metrics
from gptjax.training.task import Ready, StepFunctions, Task, Validation, identity
from gptjax.types import Mean
from gptjax.weights.native import replace_folder

# ---------------------------------------------------------------- the task

WIDTH, WEIGHTS = 8, np.random.default_rng(0).normal(size=8).astype(np.float32)


class Pixels(NamedTuple):
    tokens: np.ndarray  # [B, WIDTH] float32: the size of the leaf `tokens` is the number of tokens per step
    labels: np.ndarray  # [B] int32


def make_pixels(key, n):
    pixels = np.random.default_rng(key).normal(size=(n, WIDTH)).astype(np.float32)
    return Pixels(pixels, (pixels @ WEIGHTS > 0).astype(np.int32))


def loss(cfg):
    def cross_entropy(params, batch, key):
        logits = batch.tokens @ params["w"] + params["b"]
        nats = -jax.nn.log_sigmoid(jnp.where(batch.labels == 1, logits, -logits))
        correct = (logits > 0) == (batch.labels == 1)
        n = jnp.float32(len(batch.labels))
        return Mean(nats.sum(), n), {"accuracy": Mean(correct.sum(), n)}

    return cross_entropy


def write(folder, trained, frozen, files):
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    np.savez(partial / "weights.npz", **trained)
    for name, text in files.items():
        (partial / name).write_text(text)
    replace_folder(partial, folder)


def prepare(cfg, progress):
    def batches(step, k, rows):
        per_step = [make_pixels([cfg.seed, step + i], cfg.train.batch_size) for i in range(k)]
        return jax.tree.map(lambda *leaves: np.stack(leaves)[:, rows or slice(None)], *per_step)

    return Ready(cfg, Task(
        tokenizer=tokenizers.load("bytes"),
        batches=batches,
        describe_batch=lambda step: f"the pixels of step {step}",
        validation=Validation(lambda first: [make_pixels([cfg.seed, 10**6], 256)]),
        build=lambda cfg: StepFunctions(loss(cfg), identity, make_optimizer(cfg.optim, cfg.train.max_steps)),
        start=lambda key: {"w": 0.01 * jax.random.normal(key, (WIDTH,)), "b": jnp.float32(0)},
        frozen=None,
        flops_per_token=6.0,
        fingerprints={"data": (str(cfg.seed), "seed")},
        describe=lambda n: [f"model   logistic regression, {n} parameters"],
        write=write,
    ), held_out=make_pixels(1, 64))  # fmt: skip


def evaluate(result, held_out, say):
    _, metrics = loss(result.cfg)(result.params, held_out, None)
    say(f"test    accuracy {metrics['accuracy'].value():.2f}")


def refuse_missing(cfg):
    pass


# ---------------------------------------------------------------- the tests


@pytest.fixture
def parity(monkeypatch):
    module = ModuleType("parity_task")
    module.__dict__.update(prepare=prepare, evaluate=evaluate, refuse_missing=refuse_missing, loss=loss)
    monkeypatch.setitem(sys.modules, "parity_task", module)
    monkeypatch.setitem(tasks.TASKS, "pretrain", "parity_task")


def test_a_user_defined_task_is_trained_and_evaluated(parity, tmp_path):
    cfg = gptjax.load_config(
        "tiny-gpt2", f"run_dir={tmp_path / 'run'}", "train.max_steps=40", "train.eval_every=20", "optim.lr=0.1",
        "train.checkpoint_every=20", "train.batch_size=32", "optim.warmup_steps=0",
    )  # fmt: skip
    lines: list[str] = []
    hook_steps: list[int] = []
    result = gptjax.train(cfg, log=lines.append, hooks=[(20, lambda run: hook_steps.append(run.step))])
    assert hook_steps == [20, 40] and result.step == 40
    assert result.val_loss < 0.3 and any(line.startswith("test    accuracy 0.9") or "1.00" in line for line in lines)
    assert read_metrics(tmp_path / "run")[-1]["val/accuracy"] > 0.9
    assert np.load(tmp_path / "run/final/weights.npz")["w"].shape == (WIDTH,)


def test_a_task_has_at_most_12_fields():
    assert len(Task._fields) <= 12


@pytest.mark.parametrize(
    ("name", "new"), [("pretrain", "next_token"), ("classify", "classify"), ("prefer", "preference")]
)
def test_old_names_warn_and_work(name, new):
    module = tasks.find(name)
    with pytest.warns(DeprecationWarning, match=rf"gptjax.tasks.{name}.task is now gptjax.losses.{new}"):
        old = module.task
    cfg = gptjax.ModelConfig(n_layer=1, n_head=1, d_model=8, vocab_size=5, context_length=4, n_classes=2)
    task = old(cfg)
    assert callable(task.loss) and task.prepare(3) == 3
    assert jax.tree.structure(jax.eval_shape(task.init, jax.random.key(0))) == jax.tree.structure(
        gptjax.abstract_params(cfg)
    )
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
