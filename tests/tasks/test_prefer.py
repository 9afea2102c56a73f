"""`gptjax finetune prefer` with a tiny base model, from the pairs to the tuned model."""

import json
import math

import pytest

from gptjax.__main__ import main
from gptjax.config import load_config
from gptjax.data import preferences
from gptjax.tasks import prefer
from gptjax.training.run_dir import read_metrics


def run(folder, name, *more):
    return main(
        [
            "finetune", "prefer", "prefer.style=phi3", f"prefer.source={folder / 'pairs.jsonl'}",
            f"finetune.base={folder / 'base'}", f"run_dir={folder / name}", "optim.warmup_steps=0",
            "train.epochs=null", "train.max_steps=20", "train.eval_every=10", "train.checkpoint_every=10",
            "train.batch_size=4", "optim.lr=3e-3", "prefer.context_length=128", "lora.rank=4",
            "prefer.val_fraction=0.05", "prefer.test_fraction=0.1", *more,
        ]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", pytest.param("simpo", marks=pytest.mark.slow)])
def test_the_tuned_model_prefers_the_chosen_answers(folder, capsys, loss):
    assert run(folder, loss, f"prefer.loss={loss}") == 0
    out = capsys.readouterr().out
    first, *_, last = [row for row in read_metrics(folder / loss) if "val/loss" in row]
    if loss == "dpo":
        assert math.isclose(first["val/loss"], math.log(2), abs_tol=1e-5)
        assert math.isclose(first["val/margin"], 0, abs_tol=1e-5)
    assert last["val/loss"] < first["val/loss"] and last["val/margin"] > first["val/margin"]
    scores = json.loads((folder / loss / "test.json").read_text())
    assert scores["pairs"] == 4 and scores["accuracy"] == 1 and "held-out pairs" in out
    (folder / loss / "test.json").rename(folder / "before.json")  # as if killed before it was written
    assert run(folder, loss, f"prefer.loss={loss}") == 0
    assert "is finished" in capsys.readouterr().out
    repeated = json.loads((folder / loss / "test.json").read_text())
    assert repeated == pytest.approx(json.loads((folder / "before.json").read_text()), abs=1e-4)


def test_dry_run_and_mistakes(folder, capsys):
    assert run(folder, "none", "--dry-run") == 0
    assert "34 + 2 + 4 pairs" in capsys.readouterr().out and not (folder / "none").exists()
    assert run(folder, "none", "prefer.loss=dop") == 2
    assert "dpo" in capsys.readouterr().err
    assert run(folder, "none", "prefer.beta=0") == 2
    assert "prefer.beta" in capsys.readouterr().err


def test_the_synthetic_pairs_of_the_two_tasks():
    """DPO learns from answers to other questions, a reward model from wrong answers to the same question."""
    for task, made in (("prefer", preferences.of_skills), ("reward_model", preferences.of_mistakes)):
        assert prefer.pairs(load_config(task, f"{task}.examples=300", "seed=3"), []).train == made(300, 3)
