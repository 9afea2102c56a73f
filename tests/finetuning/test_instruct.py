"""`gptjax finetune instruct` from conversations to answers, on a tiny base."""

import json

import jax
import pytest

import gptjax
from gptjax import config
from gptjax.__main__ import main
from gptjax.finetuning import instruct
from gptjax.training.run_dir import read_metrics

BASE = gptjax.ModelConfig(arch="llama", n_layer=2, n_head=4, d_model=64, d_ff=96, context_length=96, vocab_size=257)
STYLE = "instruct.style=phi3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct")
    params = gptjax.init_params(jax.random.key(0), BASE)
    gptjax.save(folder / "base", params, BASE, gptjax.tokenizers.load("bytes"))
    rows = [{"instruction": f"say {x}", "input": "", "output": x * 2} for x in "abcdefgh"] * 12
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def run(folder, name, *more):
    return main(
        [
            "finetune", "instruct", STYLE, f"instruct.source={folder / 'data.json'}",
            f"finetune.base={folder / 'base'}", f"run_dir={folder / name}", "optim.warmup_steps=0",
            "train.epochs=null", "train.max_steps=200", "train.eval_every=100",
            "train.checkpoint_every=100", "train.batch_size=4", "optim.lr=5e-3", "instruct.context_length=96",
            "finetune.trainable=all", "sample.max_new_tokens=6", "instruct.val_fraction=0.05",
            "instruct.test_fraction=0.1", *more,
        ]
    )  # fmt: skip


def test_it_learns_answers_and_writes_them(folder, capsys):
    assert run(folder, "full") == 0
    out = capsys.readouterr().out
    assert "what is learned is green" in out and "«" in out and "\x1b" not in out
    found = json.loads((folder / "full" / "test.json").read_text())
    assert found["n"] == 9 and found["exact"] >= 0.8
    rows = [json.loads(line) for line in (folder / "full" / "responses.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"where", "prompt", "expected", "answer", "nats", "tokens"}
    assert rows[0]["prompt"].startswith("say ") and rows[0]["tokens"] == 3
    before = [json.loads(line) for line in (folder / "full" / "responses-before.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in before] == [row["prompt"] for row in rows]
    assert found["before"]["exact"] < 0.5 and found["win_rate"]["win_rate"] == 1
    assert found["nats_per_token"] < 0.2 * found["before"]["nats_per_token"]
    losses = [row["val/loss"] for row in read_metrics(folder / "full") if "val/loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    assert run(folder, "full") == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        ["finetune.trainable=lora", "lora.rank=4", "finetune.quantize=int8"],
        ["instruct.packing=padded", "instruct.loss_on=all", "finetune.trainable=blocks/1/*"],
    ],
    ids=["qlora", "padded"],
)
def test_other_ways(folder, settings, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "train.max_steps=2", *settings) == 0
    assert "held out" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "adapter").exists() == ("lora" in settings[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["instruct.source=absent.json"], "absent.json: no such file"),
        (["instruct.context_length=8"], "fit"),
        (["instruct.style=chat"], "has no chat template"),
        (["instruct.val_fraction=0.5", "instruct.test_fraction=0.5"], "leave nothing to train on"),
        (["instruct.test_fraction=0.001"], "too few for a part to test"),
    ],
)
def test_mistakes(folder, settings, words, tmp_path, capsys):
    assert run(folder, tmp_path / "run", *settings) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "--dry-run") == 0
    assert "81 + 6 + 9 conversations" in capsys.readouterr().out


def test_the_skills_hold_out_what_they_ask_about():
    cfg = config.load_config(None, "task=instruct", "instruct.examples=200")
    talks = instruct.conversations(cfg)
    assert sum(map(_questions, talks.train)) == 200 and max(map(_questions, talks.train)) > 1
    assert [len(part) for part in talks[1:]] == [10, 20] and max(map(_questions, talks.test)) == 1
    shown = {message["content"] for talk in talks.train for message in talk.messages[::2]}
    assert not shown & {talk.messages[0]["content"] for talk in (*talks.val, *talks.test)}


def _questions(talk):
    return len(talk.messages) // 2
