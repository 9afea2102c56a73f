"""Fine-tuning with several seeds: vmapped in one program, the results equal those of sequential runs."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.tasks.seeds import is_vmapped
from gptjax.training.vmapped import stack

BASE = gptjax.ModelConfig(arch="llama", n_layer=2, n_head=2, d_model=32, d_ff=48, context_length=96, vocab_size=257)
KINDS = {
    "classify": ["classify.source={}/texts.tsv", "classify.pooling=mean"],
    "instruct": ["instruct.source={}/talks.json", "instruct.style=phi3", "instruct.context_length=96"],
    "prefer": ["prefer.source={}/pairs.jsonl", "prefer.style=phi3", "prefer.context_length=96"],
    "reward_model": [
        "reward_model.source={}/pairs.jsonl",
        "reward_model.style=phi3",
        "reward_model.context_length=96",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    params = gptjax.init_params(jax.random.key(0), BASE)
    gptjax.save(folder / "base", params, BASE, gptjax.tokenizers.load("bytes"))
    rng = np.random.default_rng(0)
    texts = [(up, "".join(rng.choice(list(up), rng.integers(2, 12)))) for up in ("ABC", "abc") for _ in range(40)]
    (folder / "texts.tsv").write_text("".join(f"{up}\t{text}\n" for up, text in texts))
    talks = [{"instruction": f"say {x}", "output": x * 2} for x in "abcdefgh"] * 5
    (folder / "talks.json").write_text(json.dumps(talks))
    pairs = [{"prompt": talk["instruction"], "chosen": talk["output"], "rejected": "no"} for talk in talks]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def run(folder, kind, name, vmapped, *more):
    settings = [text.format(folder) for text in KINDS[kind]]
    settings += ["sample.max_new_tokens=4"] if kind in ("instruct", "prefer") else []
    return main(
        [
            "finetune", kind, *settings, f"finetune.base={folder / 'base'}", f"run_dir={folder / name}", "seed=3",
            "finetune.seeds=2", f"finetune.together={vmapped}", "train.epochs=null", "train.max_steps=6",
            "train.eval_every=3", "train.checkpoint_every=3", "train.batch_size=4", "optim.lr=1e-2",
            "optim.warmup_steps=0", "optim.eps=1e-4", "lora.rank=4", *more,
        ]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("classify", []),
        ("classify", ["lora.miss=true"]),
        *(pytest.param(kind, [], marks=pytest.mark.further_case) for kind in ("instruct", "prefer", "reward_model")),
    ],
)
def test_vmapped_seeds_equal_sequential_seeds(folder, kind, more, capsys):
    name = "-".join([kind, *more])
    assert run(folder, kind, f"{name}-vmapped", "true", *more) == 0
    assert "2 adapters in one program" in capsys.readouterr().out
    assert run(folder, kind, f"{name}-sequential", "false", *more) == 0
    for seed in (3, 4):
        vmapped, sequential = (folder / f"{name}-{how}" / f"seed-{seed}" for how in ("vmapped", "sequential"))
        (a, _), (b, _) = gptjax.load(vmapped), gptjax.load(sequential)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
        assert f"seed: {seed}" in (vmapped / "final" / "config.yaml").read_text()
        expected, scores = (json.loads((path / "test.json").read_text()) for path in (sequential, vmapped))
        assert {k: v for k, v in scores.items() if isinstance(v, int | float)} == pytest.approx(
            {k: v for k, v in expected.items() if isinstance(v, int | float)}, abs=1e-4
        )
    table = json.loads((folder / f"{name}-vmapped" / "seeds.json").read_text())
    assert all(len(row["values"]) == 2 for row in table.values())


@pytest.mark.slow
def test_vmapped_seeds_are_resumed_bitwise_equal(folder, capsys):
    """Resumed from the checkpoint of step 3. Afterwards the run is finished and not repeated."""
    assert run(folder, "classify", "whole", "true") == 0
    shutil.copytree(folder / "whole", folder / "again")
    for name in ("final", "checkpoints/6", "seed-3", "seed-4"):
        shutil.rmtree(folder / "again" / name)
    assert run(folder, "classify", "again", "true") == 0
    assert "resuming from step 3" in capsys.readouterr().out
    for seed in ("seed-3", "seed-4"):
        name = f"{seed}/final/model.safetensors"
        assert (folder / "again" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert run(folder, "classify", "again", "true") == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_averages_of_vmapped_seeds_equal_those_of_sequential_seeds(folder):
    more = ("train.ema=0.7", "optim.cautious=true")
    assert run(folder, "classify", "ema-vmapped", "true", *more) == 0
    assert run(folder, "classify", "ema-sequential", "false", *more) == 0
    for seed in ("seed-3", "seed-4"):
        (a, _), (b, _) = (gptjax.load(folder / f"ema-{how}" / seed) for how in ("vmapped", "sequential"))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_early_stopping_needs_sequential_seeds(folder, capsys, monkeypatch):
    assert run(folder, "classify", "early", "true", "train.patience=1", "train.eval_every=1") == 2
    assert "use finetune.together=false" in capsys.readouterr().err
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    cfg = gptjax.load_config("classify", "finetune.seeds=2")
    assert is_vmapped(cfg)
    assert not is_vmapped(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, patience=1)))


def test_only_adapters_can_be_vmapped(folder, capsys):
    assert run(folder, "classify", "all", "true", "finetune.trainable=all") == 2
    assert "finetune.together=true needs finetune.trainable=lora" in capsys.readouterr().err


def test_stack_pads_with_zeros():
    a, b = np.ones((2, 3), np.int32), np.ones((1, 4), np.int32)
    np.testing.assert_array_equal(stack([[a], [b]])[0], [[[1, 1, 1, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
