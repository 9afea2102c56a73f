"""`gptjax finetune reward_model` with a tiny base model, from the pairs to the rewards of the trained model."""

import json
import math
import os
import shutil

import numpy as np
import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.data import preferences
from gptjax.data.conversations import render
from gptjax.generation import reward_scores
from gptjax.training.run_dir import read_metrics

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"


def run(folder, name, *more):
    return main(
        [
            "finetune", "reward_model", "reward_model.style=phi3", f"reward_model.source={folder / 'pairs.jsonl'}",
            f"finetune.base={folder / 'base'}", f"run_dir={folder / name}", "optim.warmup_steps=0",
            "train.epochs=null", "train.max_steps=20", "train.eval_every=10", "train.checkpoint_every=10",
            "train.batch_size=4", "optim.lr=1e-2", "reward_model.context_length=128", "lora.rank=4",
            "reward_model.val_fraction=0.05", "reward_model.test_fraction=0.1", *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder):
    assert run(folder, "whole") == 0
    return folder / "whole"


def test_the_chosen_answers_have_the_larger_reward(folder, whole):
    first, *_, last = [row for row in read_metrics(whole) if "val/loss" in row]
    assert math.isclose(first["val/loss"], math.log(2), abs_tol=0.1)  # the head begins with small weights
    assert last["val/loss"] < 0.1 and last["val/margin"] > 1 and last["val/accuracy"] == 1
    scores = json.loads((whole / "test.json").read_text())
    assert scores["pairs"] == 4 and scores["accuracy"] == 1 and scores["margin"] > 1
    assert scores["accuracy_interval"] == pytest.approx([0.51, 1.0], abs=0.01)

    params, cfg = gptjax.load(whole)
    tokenizer = gptjax.tokenizers.load(whole)
    assert (cfg.n_classes, cfg.cls_bias) == (1, False)
    pairs = preferences.read(str(folder / "pairs.jsonl"))[34:38]  # the test pairs
    rewards = [reward_scores(params, cfg, tokenizer, talks) for talks in zip(*pairs, strict=True)]
    assert np.mean(rewards[0] - rewards[1]) == pytest.approx(scores["margin"], rel=1e-4)


def test_it_is_evaluated_again_if_the_scores_are_missing(folder, whole, capsys):
    before = json.loads((whole / "test.json").read_text())
    (whole / "test.json").unlink()  # as if killed before it was written
    assert run(folder, "whole") == 0
    out = capsys.readouterr().out
    assert "is finished" in out and "95 % interval 51.0%-100.0%" in out
    scores = json.loads((whole / "test.json").read_text())
    assert scores.keys() == before.keys() and scores["margin"] == pytest.approx(before["margin"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.further_case  # test_kills.py resumes such a run at many moments
def test_a_resumed_run_is_bitwise_equal(folder, whole, capsys):
    shutil.copytree(whole, folder / "again")
    for name in ("final", "checkpoints/20"):
        shutil.rmtree(folder / "again" / name)
    assert run(folder, "again") == 0
    assert "resuming from step 10" in capsys.readouterr().out
    name = "final/model.safetensors"
    assert (folder / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_the_end_token_is_an_input():
    """Without it, an answer and its first words would have the same reward."""
    tokenizer = gptjax.tokenizers.load("bytes")
    pairs = preferences.of_skills(60, 0)[:5]
    settings = dict(style="phi3", context_length=2000)
    with_end = preferences.encode(pairs, tokenizer, end_as_input=True, **settings)
    without = preferences.encode(pairs, tokenizer, **settings)
    rows = preferences.rows(with_end, packed=False)
    for i, pair in enumerate(pairs):
        for rejected, talk in enumerate(pair):
            ids = [i for span in render(talk, tokenizer, "phi3") for i in span.ids]
            assert ids[-1] == tokenizer.eot_id
            np.testing.assert_array_equal(rows.tokens[i][rows.segment_ids[i] == 1 + rejected], ids)
            np.testing.assert_array_equal(without.pairs[i][rejected][0], ids)
    longest = max(sum(len(ids) - 1 for ids, _ in pair) for pair in with_end.pairs)
    assert rows.tokens.shape[1] == longest
    assert preferences.encode(pairs, tokenizer, style="phi3", context_length=longest - 1, end_as_input=True).dropped


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_rewards(folder, whole, capsys):
    """Of the exported model, in one padded batch; the token that ends an answer is not taken for padding."""
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    assert main(["export", "hf", str(whole), str(folder / "hf")]) == 0
    assert "AutoModelForSequenceClassification" in capsys.readouterr().out
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "hf", attn_implementation="eager")
    params, cfg = gptjax.load(whole)
    tokenizer = gptjax.tokenizers.load(whole)
    talks = [pair[i % 2] for i, pair in enumerate(preferences.of_skills(60, 0)[:4])]
    rows = [[i for span in render(talk, tokenizer) for i in span.ids] for talk in talks]
    rows = [row[-cfg.context_length :] for row in rows]
    pad, width = model.config.pad_token_id, max(map(len, rows))
    assert model.config.num_labels == 1 and pad is not None and pad != tokenizer.eot_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        want = model.eval()(ids, attention_mask=mask).logits[:, 0].numpy()
    got = reward_scores(params, cfg, tokenizer, talks)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.ptp(got) > 1e-2
    back, back_cfg = gptjax.load(folder / "hf")
    np.testing.assert_allclose(reward_scores(back, back_cfg, tokenizer, talks), got, atol=1e-5)


@pytest.mark.slow
def test_scored_answers_as_of_a_run_with_rewards(folder, capsys):
    """Half of the questions have right and wrong answers, one in four only wrong ones, and one in four only right ones,
    which make no pair."""
    answers = {
        "a": (("aa", 1), ("ab", 0), ("ab", 0), ("b", 0)),
        "b": (("no", 0),),
        "c": (("cc", 1),),
        "d": (("dd", 1), ("", 0), ("<|endoftext|>", 0), ("d", 0)),
    }
    rows = [
        {"step": i, "where": "x", "prompt": f"say {letter}" + "!" * i, "expected": letter * 2, "answer": answer,
         "reward": reward, "advantage": 0.5, "tokens": 3, "finish": "stop"}
        for i in range(10) for letter, scored in answers.items() for answer, reward in scored
    ]  # fmt: skip
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, "scored", f"reward_model.source={folder / 'rollouts.jsonl'}") == 0
    assert "34 + 2 + 4 pairs" in capsys.readouterr().out
    assert json.loads((folder / "scored" / "test.json").read_text())["accuracy"] == 1


def test_dry_run_and_mistakes(folder, whole, capsys):
    assert run(folder, "none", "--dry-run") == 0
    assert "34 + 2 + 4 pairs" in capsys.readouterr().out and not (folder / "none").exists()
    for setting, words in (
        ("reward_model.center=-1", "reward_model.center"),
        ("reward_model.source=absent.jsonl", "reward_model.source=absent.jsonl: no such file"),
        ("reward_model.context_length=20", "no pair fits a context of 20 tokens (reward_model.context_length)"),
        ("sample.n=2", "which writes no text"),
        ("prefer.loss=ipo", "only of gptjax finetune prefer"),
        (f"finetune.base={whole}", "is a reward model, which does not write: name the model that it was made from"),
    ):
        assert run(folder, "none", setting) == 2
        assert words in capsys.readouterr().err, setting
    assert main(["classify", str(whole), "a text"]) == 2
    assert f"pick=reward reward_model={whole}" in capsys.readouterr().err
