"""Common mistakes in fine-tuning data: a clear message with the file and line, exit code 2, no run directory."""

import json

import jax
import pytest

import gptjax
from gptjax.__main__ import main

BASE = gptjax.ModelConfig(arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=16, context_length=256, vocab_size=257)
TALK = {"instruction": "say a", "output": "aa"}


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


FILES = {
    "good.jsonl": "".join(
        lines({"text": f"{text} {i}", "label": label}) for i in range(9) for text, label in (("NA", "a"), ("null", "b"))
    ),
    "columns.csv": "body,sort\nhello,a\n",
    "other.csv": "first,second\nhello,a\n",
    "labels.tsv": "ham\tone\nspam\ttwo\nspma\tthree\n",
    "one.tsv": "ham\tone\nham\ttwo\nham\tthree\n",
    "empty.tsv": "ham\tone\nspam\t\n",
    "broken.jsonl": lines(TALK, '{"instruction": "say b", "output": "bb"', TALK),
    "response.jsonl": lines(TALK, {"instruction": "say b", "output": "  "}),
    "format.jsonl": lines(TALK, {"question": "say b", "answer": "bb"}),
    "talks.jsonl": lines(*[TALK] * 20),
    "pairs.jsonl": lines({"prompt": "a", "chosen": "b", "rejected": "b"}),
}
MISTAKES = {
    "no column like it": ("classify", ["classify.source=other.csv"], "first, second: say classify.text_field"),
    "missing column": (
        "classify", ["classify.source=columns.csv", "classify.text_field=txt", "classify.label_field=sort"],
        "no column 'txt'; there are body, sort",
    ),
    "unknown label": (
        "classify", ["classify.source=labels.tsv", "classify.labels=[ham,spam]"],
        "labels.tsv:3: unknown label 'spma': known are ham, spam",
    ),
    "one class": ("classify", ["classify.source=one.tsv"], "3 texts of 1 class (ham); two are needed"),
    "empty text": ("classify", ["classify.source=empty.tsv"], "empty.tsv:2: the text is empty"),
    "no source": ("classify", [], "classify.source is missing"),
    "a prompt without a place": ("classify", ["classify.source=good.jsonl", "classify.prompt=spam?"], "{text} once"),
    "broken line": ("instruct", ["instruct.source=broken.jsonl"], "broken.jsonl:2: not valid JSON"),
    "empty response": ("instruct", ["instruct.source=response.jsonl"], "jsonl:2: output: the response is empty"),
    "unknown format": ("instruct", ["instruct.source=format.jsonl"], "jsonl:2: the keys question, answer are no"),
    "no template": ("instruct", ["instruct.source=talks.jsonl", "instruct.style=chat"], "has no chat template"),
    "the same answer": ("prefer", ["prefer.source=pairs.jsonl"], "pairs.jsonl:1: chosen and rejected are the same"),
    "no teacher": ("distill", [], "distill.teacher is missing: name the model to learn from"),
    "a reward model of the same answer": (
        "reward_model", ["reward_model.source=pairs.jsonl"], "pairs.jsonl:1: chosen and rejected are the same",
    ),
    "no such base": ("instruct", ["finetune.base=runs/absent"], "runs/absent"),
    "no such target": ("instruct", ["lora.targets=blocks/*/kernle"], "'blocks/*/kernle' matches no weight; there are"),
    "no such layers": ("instruct", ["lora.targets=blocks/[0-9]/*/kernel"], "has the range 0-9: expected first-last"),
    "miss and dora": ("instruct", ["lora.miss=true", "lora.dora=true"], "lora.miss=true trains one matrix"),
    "miss and olora": ("instruct", ["lora.miss=true", "lora.init=olora"], "got false, olora and 1"),
    "miss and alpha": ("instruct", ["lora.miss=true", "lora.alpha=4"], "lora.alpha would have no effect: lora.miss="),
    "no such part": ("instruct", ["finetune.trainable=blocks/7/*"], "finetune.trainable"),
    "another task's preset": ("classify", ["instruct"], "instruct is for task=instruct: gptjax finetune instruct"),
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    gptjax.save(folder / "base", gptjax.init_params(jax.random.key(0), BASE), BASE, gptjax.tokenizers.load("bytes"))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_clear_message(here, name, monkeypatch, capsys):
    monkeypatch.chdir(here)
    task, settings, says = MISTAKES[name]
    before = sorted(path.name for path in here.iterdir())
    base = [] if any("finetune.base" in setting for setting in settings) else ["finetune.base=base"]
    preset, rest = (settings[:1], settings[1:]) if settings and "=" not in settings[0] else ([], settings)
    assert main(["finetune", task, *preset, "run_dir=run", *base, *rest]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert sorted(path.name for path in here.iterdir()) == before


def test_na_and_null_are_texts(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    assert (
        main(["finetune", "classify", "classify.source=good.jsonl", "finetune.base=base", "run_dir=r", "--dry-run"])
        == 0
    )
    assert "classes a, b" in capsys.readouterr().out
    assert gptjax.data.classification.read("good.jsonl").texts[:2] == ["NA 0", "null 0"]
