"""`gptjax chat` on a model that was never trained: history, commands, stop strings, and what it forgets."""

import dataclasses
import io

import jax
import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.cli.chat import Chat, talk

CFG = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=8, context_length=64, vocab_size=259)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = gptjax.tokenizers.extend(gptjax.tokenizers.load("bytes"), ["<|im_start|>", "<|im_end|>"])
    return made.replace(eos_ids=(258,), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 20 * a, gptjax.init_params(jax.random.key(0), CFG))


@pytest.fixture
def chat(tokenizer, params):
    settings = gptjax.SampleConfig(max_new_tokens=8, temperature=2.0)
    return Chat(params, CFG, tokenizer, settings, None)


def said(chat, *lines):
    lines = iter(lines)

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    talk(chat, False, read)


def test_answers_belong_to_the_conversation(chat, capsys):
    said(chat, "hi", "", "you")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert capsys.readouterr().out == "".join(turn["content"] + "\n" for turn in chat.turns[1::2])


def test_commands(chat, capsys):
    said(chat, "hi", "/new", "/system Be brief", "/what", "you", "/quit", "never")
    assert chat.messages()[:2] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "you"}]
    assert "/system TEXT" in capsys.readouterr().err


def test_a_stop_string_is_neither_shown_nor_remembered(chat, capsys):
    said(chat, "hi")
    answer = chat.turns[1]["content"]
    again = Chat(chat.params, CFG, chat.tokenizer, dataclasses.replace(chat.settings, stop=(answer[3:5],)), None)
    capsys.readouterr()
    said(again, "hi")
    assert again.turns[1]["content"] == answer[: answer.index(answer[3:5])]
    assert capsys.readouterr().out == again.turns[1]["content"] + "\n"


def test_the_oldest_turns_go_when_the_context_is_full(chat, capsys):
    said(chat, "x" * 30, "y" * 30)
    assert chat.turns[0]["content"] == "y" * 30
    assert "the oldest turn is forgotten" in capsys.readouterr().err


def test_the_verb(tokenizer, params, tmp_path, capsys, monkeypatch):
    gptjax.save(tmp_path / "m", params, CFG, tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", str(tmp_path / "m"), "max_new_tokens=4", "system=Be brief", "quantize=int8"]) == 0
    assert "4 tokens" in capsys.readouterr().err
    gptjax.save(tmp_path / "n", params, CFG, gptjax.tokenizers.load("bytes"))
    assert main(["chat", str(tmp_path / "n")]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_rows_beyond_the_tokenizer_are_not_drawn(tokenizer):
    wide = dataclasses.replace(CFG, vocab_size=4096)
    params = jax.tree.map(lambda a: 20 * a, gptjax.init_params(jax.random.key(0), wide))
    settings = gptjax.SampleConfig(max_new_tokens=20, temperature=2.0)
    chat = Chat(params, wide, tokenizer, settings, None)
    "".join(chat.ask("hello"))
    assert chat.count > 0
