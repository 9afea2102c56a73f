"""`gptjax chat` with an untrained model: history, commands, stop strings, and dropping of the oldest turns."""

import dataclasses
import io
import os
import select
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.cli.chat import Chat, Wrap, columns, talk

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


def talk_with(chat, *lines):
    lines = iter(lines)

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    talk(chat, False, read)


def test_answers_belong_to_the_conversation(chat, capsys):
    talk_with(chat, "hi", "", "you")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert capsys.readouterr().out == "".join(turn["content"] + "\n" for turn in chat.turns[1::2])


def test_commands(chat, capsys):
    talk_with(chat, "hi", "/new", "/system Be brief", "/what", "you", "/quit", "never")
    assert chat.messages()[:2] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "you"}]
    assert "/system TEXT" in capsys.readouterr().err


def test_a_stop_string_is_neither_shown_nor_remembered(chat, capsys):
    talk_with(chat, "hi")
    answer = chat.turns[1]["content"]
    stopping = Chat(chat.params, CFG, chat.tokenizer, dataclasses.replace(chat.settings, stop=(answer[3:5],)), None)
    capsys.readouterr()
    talk_with(stopping, "hi")
    assert stopping.turns[1]["content"] == answer[: answer.index(answer[3:5])]
    assert capsys.readouterr().out == stopping.turns[1]["content"] + "\n"


def test_the_oldest_turns_go_when_the_context_is_full(chat, capsys):
    talk_with(chat, "x" * 30, "y" * 30)
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


def test_commands_are_acknowledged_in_a_line(chat, capsys):
    talk_with(chat, "/system Be brief", "/system", "/new")
    assert capsys.readouterr().err.splitlines() == [
        "(system prompt: Be brief)",
        "(no system prompt)",
        "(a new conversation)",
    ]


def test_no_rate_is_printed_for_one_token(chat, capsys):
    short = Chat(chat.params, CFG, chat.tokenizer, dataclasses.replace(chat.settings, max_new_tokens=1), None)
    talk_with(short, "hi")
    error = capsys.readouterr().err
    assert "[1 token after " in error and "tok/s" not in error and "\x1b" not in error


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_break_between_words(size):
    text = "The quick brown fox, jumps\n\n    over the lazy dog. " + "x" * 25 + " 日本語" * 6
    wrap = Wrap(20)
    shown = "".join(wrap.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrap.rest()
    lines = shown.split("\n")
    assert lines[:4] == ["The quick brown fox,", "jumps", "", "    over the lazy"]
    assert max(map(columns, lines)) <= 25 and "".join(shown.split()) == "".join(text.split())


@pytest.mark.slow
def test_on_a_terminal_a_line_can_be_edited_and_comes_again(tokenizer, params, tmp_path):
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    gptjax.save(tmp_path / "m", params, CFG, tokenizer)
    up, left = b"\x1b[A", b"\x1b[D"
    typed = [b"ac" + left + b"b\r", up + b"\r", b"/system Be brief\r", b"/quit\r"]
    main_fd, child_fd = pty.openpty()
    command = [sys.executable, "-m", "gptjax", "chat", str(tmp_path / "m"), "max_new_tokens=8", "temperature=2"]
    env = dict(os.environ, PYTHONPATH=str(Path(gptjax.__file__).parents[1]), TERM="xterm", COLUMNS="40")
    process = subprocess.Popen(command, stdin=child_fd, stdout=child_fd, stderr=child_fd, env=env)
    os.close(child_fd)
    seen = b""
    try:
        for prompts, line in enumerate(typed, 1):
            while seen.count(b"> ") < prompts:  # readline echoes the line after each prompt; no answer contains "> "
                assert select.select([main_fd], [], [], 60)[0], seen
                seen += os.read(main_fd, 4096)
            os.write(main_fd, line)
        while select.select([main_fd], [], [], 60)[0]:
            try:
                seen += os.read(main_fd, 4096)
            except OSError:  # on Linux, reading fails once the child has closed its end
                break
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main_fd)
    text = seen.decode(errors="replace")
    assert "^[[A" not in text and "^[[D" not in text
    assert "> abc" in text, text  # the up arrow recalled the edited first line
    assert "... compiling, " in text and "(system prompt: Be brief)" in text


@pytest.mark.slow
def test_an_answer_stops_where_the_template_ends_it_and_is_stored_without_special_tokens(params, tokenizer, capsys):
    """The end-of-turn token of the chat template is a stop token even if the tokenizer does not list it as one."""
    settings = gptjax.SampleConfig(max_new_tokens=30, temperature=5.0, seed=3)
    made = tokenizer.replace(eos_ids=(256,))
    chatting = Chat(params, CFG, made, settings, None)
    assert chatting.stop == [256, 258]
    talk_with(chatting, *["hi"] * 6)
    assert not any("<|" in turn["content"] for turn in chatting.turns)
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_rows_beyond_the_tokenizer_are_not_drawn(tokenizer):
    wide = dataclasses.replace(CFG, vocab_size=4096)
    params = jax.tree.map(lambda a: 20 * a, gptjax.init_params(jax.random.key(0), wide))
    settings = gptjax.SampleConfig(max_new_tokens=20, temperature=2.0)
    chat = Chat(params, wide, tokenizer, settings, None)
    "".join(chat.ask("hello"))
    assert chat.count > 0
