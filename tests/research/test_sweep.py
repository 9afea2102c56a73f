"""A run in a sweep equals the same run alone; settings that cannot be swept are refused."""

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax import tree
from gptjax.errors import UserError
from gptjax.research import sweep
from gptjax.research.sweep import with_hyperparameters
from gptjax.tasks import classify, pretrain
from gptjax.training.progress import Progress
from gptjax.training.step import TrainState, evaluate, make_train_step

STEPS = 4
SMALL = (
    "data.source=a.txt", "data.split=tail", "data.cache_dir=cache", "model.n_layer=1", "model.n_head=2",
    "model.d_model=16", "model.context_length=16", "train.batch_size=4", f"train.max_steps={STEPS}",
    "optim.lr=1e-2", "train.max_nonfinite=2",
    "optim.eps=1e-4",  # with a smaller eps Adam turns rounding errors of the gradient into full steps
)  # fmt: skip
# every hyperparameter that can be an array, in one program
RUNS = (
    ("seed=1", "optim.warmup_steps=0", "optim.weight_decay=0", "model.dropout=0", "optim.clip_norm=0.1"),
    ("seed=2", "optim.lr=3e-3", "optim.warmup_steps=2", "optim.min_lr_ratio=0.1", "model.dropout=0.3"),
    ("seed=1", "optim.warmup_steps=3", "optim.initial_lr_ratio=0.5", "optim.weight_decay=0.5"),
    ("seed=1", "optim.lr=1e38", "model.dropout=0"),
)
GROUPS = ("optim.embed_lr=2e-3", "optim.head_lr=1e-3", "optim.vector_lr=5e-3")
load = partial(gptjax.load_config, "tiny-gpt2", *SMALL)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("sweep")
        patch.chdir(folder)
        patch.setenv("GPTJAX_CACHE", str(folder / "cache"))
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdef"), rng.integers(2, 6))) for _ in range(40)]
        (folder / "a.txt").write_text(" ".join(rng.choice(words, 600)))
        base = gptjax.ModelConfig(
            arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=24, context_length=32, vocab_size=257
        )
        params = gptjax.init_params(jax.random.key(0), base)
        gptjax.save(folder / "base", params, base, gptjax.tokenizers.load("bytes"))
        texts = [(up, "".join(rng.choice(list(up), rng.integers(2, 9)))) for up in ("ABC", "abc") for _ in range(30)]
        (folder / "texts.tsv").write_text("".join(f"{up}\t{text}\n" for up, text in texts))
        yield folder


def alone(cfg, prepare):
    """(losses, final state, validation) of one run, with the task and step of the training loop."""
    with Progress(log=lambda line: None) as progress:
        cfg, task, _ = prepare(cfg, progress)
    init_key, key = jax.random.split(jax.random.key(cfg.seed))
    (own_loss, combine, tx), (init, start) = task.build(cfg), task.initial()
    state = TrainState.create(init(init_key, start), tx=tx, key=key, frozen=task.frozen)
    step = jax.jit(make_train_step(own_loss, tx, combine=combine))
    losses = []
    for i in range(cfg.train.max_steps):
        state, metrics = step(state, jax.tree.map(lambda leaf: leaf[0], task.batches(i, 1, None)))
        losses.append(float(metrics["loss"]))
    loss = jax.jit(lambda params, batch, key: own_loss(combine(params, task.frozen), batch, key))
    return losses, state, evaluate(loss, state.params, task.validation.batches(False))


def assert_as_alone(result, i, cfg, prepare):
    losses, state, (mean, metrics) = alone(cfg, prepare)
    np.testing.assert_allclose(result.losses[i], losses, rtol=1e-5)
    params_by_path = tree.flatten(result.state(i).params)
    for path, leaf in tree.flatten(state.params).items():
        here = params_by_path[path]
        if here.shape != leaf.shape:  # an adapter of a smaller rank is zero-padded
            small = tuple(map(slice, leaf.shape))
            assert np.abs(here).sum() == pytest.approx(np.abs(here[small]).sum(), rel=1e-6)
            here = here[small]
        np.testing.assert_allclose(here, leaf, atol=1e-5, err_msg=path)
    assert result.rows[i]["val/loss"] == pytest.approx(mean.value(), rel=1e-5)
    for name, value in metrics.items():
        assert result.rows[i][f"val/{name}"] == pytest.approx(value.value(), abs=1e-5)


@pytest.fixture(scope="module")
def swept():
    configs = [load(*GROUPS, *overrides) for overrides in RUNS]
    assert sweep.programs(configs) == [(0, 1, 2, 3)]
    return sweep.sweep(configs, at_once=3)


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("i", range(3))
def test_every_run_is_the_run_by_itself(swept, i):
    assert_as_alone(swept, i, load(*GROUPS, *RUNS[i]), pretrain.prepare)


@pytest.mark.slow
def test_it_is_what_train_does(swept):
    """Compares a run with `gptjax.train`, including its validation loss."""
    result = gptjax.train(load(*GROUPS, *RUNS[1], "run_dir=alone"), log=lambda line: None)
    assert swept.rows[1]["val/loss"] == pytest.approx(result.val_loss, rel=1e-5)
    for path, leaf in tree.flatten(result.params).items():
        np.testing.assert_allclose(tree.flatten(swept.state(1).params)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_two_devices_share_the_runs(swept):
    """A chunk of two runs, one per device, without communication."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    settings = json.dumps([[*SMALL, *GROUPS, *overrides] for overrides in RUNS])
    script = Path(__file__).with_name("two.py")
    run = subprocess.run([sys.executable, script, settings], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    there = json.loads(run.stdout.splitlines()[-1])
    assert there["devices"] == 2
    np.testing.assert_allclose(there["losses"], swept.losses, rtol=1e-5)


@pytest.mark.slow
def test_an_average_of_the_weights_is_evaluated(folder):
    """As by `gptjax.train`, with the switches of the optimizer, for two learning rates in one program."""
    switches = (
        "train.ema=0.7", "optim.name=muon", "optim.normuon=0.9", "optim.cautious=true", "optim.cautious_decay=true",
        "optim.weight_decay_schedule=lr",
    )  # fmt: skip
    configs = [load(*switches, f"optim.lr={lr}") for lr in (1e-2, 3e-3)]
    result = sweep.sweep(configs)
    assert len(result.programs) == 1
    for row, cfg, lr in zip(result.rows, configs, (1e-2, 3e-3), strict=True):
        alone = gptjax.train(with_hyperparameters(cfg, {"run_dir": f"ema-{lr}"}), log=lambda line: None)
        assert row["val/loss"] == pytest.approx(alone.val_loss, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_explodes_is_said_to(swept):
    """The other runs of the program are unaffected."""
    row = swept.rows[3]
    assert row["skipped"] == STEPS - 1 and row["stopped"] and row["val/loss"] is None and row["train/loss"] is None
    assert [row["skipped"] for row in swept.rows[:3]] == [0, 0, 0]


@pytest.mark.slow
def test_memory_decides_how_many_at_a_time(swept, monkeypatch):
    assert swept.programs[0]["at_once"] == 2 and swept.programs[0]["runs"] == 4  # four runs in chunks of at most three
    assert sweep.chunks([5, 6, 7, 8, 9], 2) == [(5, 6), (7, 8), (9, 9)]
    assert sweep.chunks([5, 6, 7, 8, 9], 9) == [(5, 6, 7, 8, 9)]
    small, large = load(), load("train.batch_size=8")
    assert sweep.bytes_per_run(small, 1000, 16) >= 20 * 1000
    assert sweep.bytes_per_run(large, 1000, 16) > 1.5 * sweep.bytes_per_run(small, 1000, 16)
    assert sweep.free_bytes() > 0


ADAPTERS = (
    ("seed=1", "lora.rank=2", "lora.alpha=4", "lora.dropout=0"),
    ("seed=2", "lora.rank=4", "lora.alpha=4", "lora.dropout=0.2", "optim.lr=3e-3"),
)


@pytest.mark.slow
def test_adapters_of_several_ranks(folder):
    """Each adapter has the scale and initialisation of its own rank, and the validation split of its own seed."""
    tuned = partial(
        gptjax.load_config, "classify", "classify.source=texts.tsv", "classify.packing=padded", "finetune.base=base",
        "train.epochs=null", f"train.max_steps={STEPS}", "train.batch_size=4", "optim.warmup_steps=0", "optim.eps=1e-4",
        "optim.lr=1e-2", "lora.targets=blocks/attn/*/kernel",
    )  # fmt: skip
    configs = [tuned(*overrides) for overrides in ADAPTERS]
    assert sweep.programs(configs) == [(0, 1)]
    assert sweep.programs([tuned("lora.miss=true", f"lora.rank={r}") for r in (2, 4, 4)]) == [(0,), (1, 2)]
    result = sweep.sweep(configs)
    assert result.states[0][1].frozen is None
    for i, overrides in enumerate(ADAPTERS):
        assert_as_alone(result, i, tuned(*overrides), classify.prepare)
    assert "val/accuracy" in result.rows[0]


# ---------------------------------------------------------------- which runs


def test_a_grid_is_every_combination():
    configs = sweep.grid(
        "tiny-gpt2", "optim.lr=[1e-3, 3e-3]", "model.n_layer=(1,2)", "seed=range(3)", "train.max_steps=7"
    )
    assert len(configs) == 12 and {cfg.train.max_steps for cfg in configs} == {7}
    assert [cfg.seed for cfg in configs[:4]] == [0, 1, 2, 0] and configs[-1].optim.lr == 3e-3
    assert sweep.axes_of(configs) == ("seed", "model.n_layer", "optim.lr")
    assert [len(runs) for runs in sweep.programs(configs)] == [6, 6]  # one program per model shape


def test_what_is_left_out_is_another_program_than_what_is_small():
    kinds = ["optim.clip_norm=0", "optim.clip_norm=1", "optim.clip_norm=2", "optim.embed_lr=1", "optim.schedule=linear"]
    assert sweep.programs([load(kind) for kind in kinds]) == [(0,), (1, 2), (3,), (4,)]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("sample.n=[1,2]", "sample.n cannot be swept: it sets when or where"),
        ("mesh.fsdp=[1,2]", "mesh.fsdp cannot be swept"),
        ("run_dir=[a,b]", "run_dir cannot be swept"),
        ("finetune.seeds=[1,2]", r"use seed=range\(8\) to repeat a run"),
        ("task=[pretrain,classify]", "losses of different tasks"),
        ("data.source=[[a],[b]]", "its value is itself a list"),
        ("seed=range(a)", r"expected range\(stop\)"),
        ("seed=range(0)", "no values"),
        ("seed=[1,1]", "a value is given twice"),
        ("optim.lr=[1e-3,3e-3", "a list that is not closed"),
        ("optim.lr=[1e-3,fast]", "optim.lr: expected float, got 'fast'"),
        ("optim.lr=[-1,1]", "must be above 0"),
        ("optim.learning_rate=[1,2]", "optim.lr"),
    ],
)
def test_mistakes(setting, says):
    with pytest.raises(UserError, match=says):
        sweep.grid("tiny-gpt2", setting)


def test_configs_that_do_not_go_together():
    for others, says in (
        ([], "without runs"),
        ([load("mesh.fsdp=2")], "distributes whole runs"),
        ([load(), gptjax.load_config("classify")], "losses of different tasks"),
        ([gptjax.load_config("classify", "finetune.seeds=3")], r"seed=range\(3\)"),
        ([gptjax.load_config("classify", "finetune.trainable=all", f"lora.rank={r}") for r in (1, 2)], "no adapter"),
    ):
        with pytest.raises(UserError, match=says):
            sweep.sweep(others)
    with pytest.raises(UserError, match="at_once=0"):
        sweep.sweep([load()], at_once=0)


def test_a_list_of_a_list_setting_is_its_value():
    (cfg,) = sweep.grid("tiny-gpt2", "data.source=[python-docs,a.txt]")
    assert cfg.data.source == ("python-docs", "a.txt")


# ---------------------------------------------------------------- what it says


def row(lr, seed, loss, stopped=False):
    return {"run": 0, "optim.lr": lr, "seed": seed, "train/loss": loss, "val/loss": loss, "stopped": stopped}


def test_the_table_has_means_and_intervals():
    """1, 2, 3 have mean 2 and standard deviation 1: with t(0.975, 2) = 4.302653, +- 4.302653 / sqrt(3)."""
    rows = [row(0.1, s, x) for s, x in enumerate((1.0, 2.0, 3.0))] + [row(0.2, 0, 1.5), row(0.3, 0, None, True)]
    lines = sweep.table(rows, ("optim.lr", "seed"))
    assert [line["optim.lr"] for line in lines] == [0.2, 0.1, 0.3]
    assert lines[1]["n"] == 3 and lines[1]["val/loss"] == pytest.approx(2)
    assert lines[1]["val/loss/high"] == pytest.approx(2 + 4.302653 / 3**0.5, rel=1e-6)
    assert lines[0]["val/loss/low"] is None and lines[2]["val/loss"] is None
    text = list(sweep.lines(lines, ("optim.lr", "seed")))
    assert "2.0000 +- 2.4841" in text[2] and "1 stopped" in text[3]


@pytest.mark.slow
def test_files(swept, tmp_path):
    sweep.write(swept, tmp_path)
    with open(tmp_path / "sweep.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val/loss"]) for row in rows[:3]] == [row["val/loss"] for row in swept.rows[:3]]
    whole = json.loads((tmp_path / "sweep.json").read_text())
    assert whole["rows"] == swept.rows and whole["programs"][0]["runs"] == 4
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["seed=range(1000000000000)"], "more than 10,000 values"),
        (["seed=range(1000)", "optim.lr=[1e-3,2e-3]", "optim.weight_decay=[0,1,2,3,4,5]"], "12,000 runs"),
    ],
)
def test_a_sweep_of_too_many_runs_is_refused_at_once(settings, words):
    with pytest.raises(UserError, match=words):
        sweep.grid("tiny-gpt2", *settings)


def test_a_sweep_that_is_killed_while_it_writes_is_no_sweep(tmp_path, monkeypatch):
    """sweep.json is written last and atomically, so an interrupted sweep can be started again."""
    replace = os.replace

    def die(source, target):
        if str(target).endswith("sweep.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(sweep.results, "draw", lambda *args: None)
    monkeypatch.setattr(os, "replace", die)
    cfg = gptjax.load_config("tiny-gpt2")
    row = {"run": 0, "train/loss": 1.0, "stopped": False}
    with pytest.raises(KeyboardInterrupt):
        sweep.write(sweep.Sweep([cfg], (), [row], [], [], []), tmp_path)
    assert (tmp_path / "sweep.csv").exists() and not (tmp_path / "sweep.json").exists()
