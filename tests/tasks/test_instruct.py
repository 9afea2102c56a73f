"""`gptjax finetune instruct` with a tiny base model, from the conversations to the generated answers."""

import contextlib
import dataclasses
import io
import json

import jax
import pytest

import gptjax
from gptjax import config
from gptjax.__main__ import main
from gptjax.tasks import instruct
from gptjax.tokenizers import chat
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
    assert "tokens in the loss are green" in out and "«" in out and "\x1b" not in out
    scores = json.loads((folder / "full" / "test.json").read_text())
    assert scores["n"] == 9 and scores["exact"] >= 0.8
    rows = [json.loads(line) for line in (folder / "full" / "responses.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"where", "prompt", "expected", "answer", "nats", "tokens"}
    assert rows[0]["prompt"].startswith("say ") and rows[0]["tokens"] == 3
    before = [json.loads(line) for line in (folder / "full" / "responses-before.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in before] == [row["prompt"] for row in rows]
    assert scores["before"]["exact"] < 0.5 and scores["win_rate"]["win_rate"] == 1
    assert scores["nats_per_token"] < 0.2 * scores["before"]["nats_per_token"]
    losses = [row["val/loss"] for row in read_metrics(folder / "full") if "val/loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    assert run(folder, "full") == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    "settings",
    [
        ["finetune.trainable=lora", "lora.rank=4", "finetune.quantize=int8"],
        ["instruct.packing=padded", "instruct.loss_on=all", "finetune.trainable=blocks/1/*"],
    ],
    ids=["qlora", "padded"],
)
def test_other_settings(folder, settings, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "train.max_steps=2", *settings) == 0
    assert "held-out" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "adapter").exists() == ("lora" in settings[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["instruct.source=absent.json"], "absent.json: no such file"),
        (["instruct.context_length=8"], "fit"),
        (["instruct.style=chat"], "has no chat template"),
        (["instruct.val_fraction=0.5", "instruct.test_fraction=0.5"], "leave no data to train on"),
        (["instruct.test_fraction=0.001"], "too few for a test and a validation split"),
    ],
)
def test_mistakes(folder, settings, words, tmp_path, capsys):
    assert run(folder, tmp_path / "run", *settings) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "--dry-run") == 0
    assert "81 + 6 + 9 conversations" in capsys.readouterr().out


def test_synthetic_questions_to_validate_and_test_on_are_not_in_the_training_data():
    cfg = config.load_config(None, "task=instruct", "instruct.examples=200")
    splits = instruct.conversations(cfg)
    assert sum(map(_questions, splits.train)) == 200 and max(map(_questions, splits.train)) > 1
    assert [len(talks) for talks in splits[1:]] == [10, 20] and max(map(_questions, splits.test)) == 1
    trained = {message["content"] for talk in splits.train for message in talk.messages[::2]}
    assert not trained & {talk.messages[0]["content"] for talk in (*splits.val, *splits.test)}


def _questions(talk):
    return len(talk.messages) // 2


CHATML = chat.BUILTIN["chatml"]
SHORT = [
    "finetune.trainable=all", "train.epochs=null", "train.max_steps=1", "train.eval_every=1",
    "train.checkpoint_every=1", "train.batch_size=2", "optim.warmup_steps=0", "optim.lr=1e-3",
    "sample.max_new_tokens=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two models: one without a chat template, one whose template ends an answer with a token not in its eos_ids."""
    folder = tmp_path_factory.mktemp("bases")
    plain = gptjax.tokenizers.load("bytes")
    chatty = gptjax.tokenizers.extend(plain, ["<|im_start|>", "<|im_end|>"])
    chatty = chatty.replace(chat_template="{{ '' }}" + CHATML, eos_ids=(256,))
    for name, tokenizer in (("plain", plain), ("chatty", chatty)):
        cfg = gptjax.ModelConfig(
            arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=16, context_length=384, vocab_size=tokenizer.vocab_size
        )
        gptjax.save(folder / name, gptjax.init_params(jax.random.key(0), cfg), cfg, tokenizer)
    rows = [{"prompt": f"say {x}", "completion": x, "chosen": x, "rejected": "no", "other": 1} for x in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    ("base", "style", "end", "eos"),
    [("plain", "alpaca", "<|endoftext|>", [256]), ("chatty", None, "<|im_end|>", [258, 256])],
)
def test_tuned_and_exported_models_stop_at_the_end_of_an_answer(
    bases, base, style, end, eos, tmp_path, capsys, monkeypatch
):
    rows = bases / "rows.jsonl"
    lengths = ["context_length=384", "val_fraction=0.2", "test_fraction=0.2", f"source={rows}"]
    then_prefer = [("prefer", tmp_path / "instruct")] if base == "plain" else []
    for task, task_base in (("instruct", bases / base), *then_prefer):
        given = [f"instruct.style={style}"] if style and task == "instruct" else []
        settings = (
            [f"{task}.{setting}" for setting in lengths] + given + ["instruct.compare=false"] * (task == "instruct")
        )
        run_dir = tmp_path / task
        assert main(["finetune", task, f"finetune.base={task_base}", f"run_dir={run_dir}", *SHORT, *settings]) == 0
        out = capsys.readouterr().out
        assert f"an answer ends with {end}" in out and "other (8 of 8, first" in out
        for saved in ("final", "best"):
            tokenizer = gptjax.tokenizers.load(run_dir / saved)
            assert chat.end_of_answer(tokenizer) == end and list(tokenizer.eos_ids) == eos
        monkeypatch.setattr("sys.stdin", io.StringIO("say a\nsay b\n"))
        assert main(["chat", str(run_dir), "max_new_tokens=2"]) == 0
        assert capsys.readouterr().err.count("[2 tokens after") == 2
        params, cfg = gptjax.load(run_dir)
        gptjax.weights.export_hf(run_dir / "hf", params, cfg, tokenizer)
        hf_eos = json.loads((run_dir / "hf" / "generation_config.json").read_text())["eos_token_id"]
        assert hf_eos == (eos if len(eos) > 1 else eos[0])
        assert json.loads((run_dir / "hf" / "tokenizer_config.json").read_text())["eos_token"] == end
        path = gptjax.weights.export_gguf(run_dir / "m.gguf", params, cfg, tokenizer)
        assert list(gptjax.tokenizers.load(path).eos_ids) == eos


@pytest.mark.slow
def test_the_evaluation_stops_at_the_token_that_ended_answers_in_training(bases):
    """If the template has no such token, it is end-of-text, not the last token of the answer."""
    params, model = gptjax.load(bases / "plain")
    template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{{ 'a' if add_generation_prompt }}"
    tokenizer = gptjax.tokenizers.load(bases / "plain").replace(chat_template=template)
    stops = []

    def generate(params, prompts, cfg, *, stop, **more):
        stops.append(stop)
        return [[*b"no"]] * len(prompts)

    cfg = dataclasses.replace(config.load_config(None, "task=instruct"), model=model)
    talk = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"},
        {"role": "user", "content": "now?"}, {"role": "assistant", "content": "x"},
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruct, "generate", generate)
        [row] = instruct.answers(params, cfg, tokenizer, [instruct.Conversation(tuple(talk), "here")])
    assert stops == [[256]] and row["tokens"] == 2
    assert row["system"] == "s" and row["history"] == talk[1:3] and row["prompt"] == "now?"


@pytest.mark.slow
def test_heartbeat_lines_name_the_model_and_the_number_of_answers(bases):
    params, model = gptjax.load(bases / "plain")
    talks = [
        instruct.Conversation(({"role": "user", "content": c}, {"role": "assistant", "content": c}), c) for c in "abc"
    ]
    lines = []

    class Progress:
        @contextlib.contextmanager
        def phase(self, description):
            lines.append(description())
            yield
            lines.append(description())

    cfg = config.load_config(None, "task=instruct", "sample.batch_size=2", "sample.max_new_tokens=9")
    cfg = dataclasses.replace(cfg, model=model)
    instruct.answers(params, cfg, gptjax.tokenizers.load("bytes"), talks, Progress(), "the base")
    assert lines[0] == "answering, the base: 0 of 3 done, the next 2 have 0 of 9 tokens"
    assert lines[1] == "answering, the base: 0 of 3 done, the next 2 have 9 of 9 tokens"
    assert lines[2] == "answering, the base: 2 of 3 done, the next 1 have 0 of 9 tokens"
