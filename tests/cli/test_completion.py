"""`gptjax completion`: the words it offers, and what bash makes of them."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from gptjax import config
from gptjax.__main__ import main
from gptjax.cli import ALL_VERBS
from gptjax.cli.completion import SCRIPTS, VARIABLE, choices, names, script
from gptjax.cli.completion import words as words_of
from gptjax.cli.manual import PAGES
from gptjax.cli.topics import TOPICS
from gptjax.config.schema import without_null
from gptjax.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = names()


def words(typed):
    return words_of(typed, NAMES)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pre", "pretrain presets"),
        ("finetune ", "classify instruct prefer reward reward_model distill"),
        ("finetune ins", "instruct"),
        ("export g", "gguf"),
        ("presets s", "show"),
        ("presets show tiny-l", "tiny-llama"),
        ("pretrain tiny-", "tiny-gpt2 tiny-llama tiny-modern tiny-shakespeare-250 tiny-shakespeare-modern"),
        ("pretrain opt", "optim."),
        ("pretrain tiny-gpt2 optim.w", "optim.warmup_steps= optim.weight_decay= optim.weight_decay_schedule="),
        ("pretrain tiny-gpt2 --optim.na", "--optim.name="),
        ("pretrain optim.name=", "optim.name=adamw optim.name=muon"),
        ("pretrain optim.name=m", "optim.name=muon"),
        ("pretrain model.bias=", "model.bias=true model.bias=false model.bias=null"),
        ("pretrain train.loggers=w", "train.loggers=wandb"),
        ("pretrain optim.lr=", ""),
        ("pretrain --", "--help --dry-run --print-config"),
        ("pretrain see", "seed="),
        ("pretrain lora.", ""),  # pretraining has no adapter
        ("finetune classify lora.d", "lora.dora= lora.dropout="),
        ("finetune classify book-spam", "book-spam-lora book-spam-random book-spam"),
        ("finetune prefer prefer.loss=s", "prefer.loss=simpo"),
        ("sample runs/x top", "top_k= top_p="),
        ("sample runs/x quantize=", "quantize=none quantize=int8 quantize=nf4"),
        ("chat runs/x sy", "system="),
        ("chat runs/x prompt", ""),  # a setting of sample, which chat does not read
        ("plan gpt2-124m --s", "--search"),
        ("plan gpt2-124m --on v5e-1", "v5e-1 v5e-16 v5e-128"),
        ("sweep instruct lora.r", "lora.rank="),
        ("sweep tiny-gpt2 at", "at_once="),
        ("tokenizer train uni", "unigram"),
        ("tokenizer train bpe tokenizer.v", "tokenizer.vocab_size="),
        ("data check near=", "near=true near=false"),
        ("export gguf runs/x x.gguf type=Q", "type=Q8_0"),
        ("import x y dtype=b", "dtype=bfloat16"),
        ("audit runs/x alp", "alpha="),
        ("compare a jud", "judge= judge_model="),
        ("help ru", "runs"),
        ("help data pre", "prepare"),
        ("completion ", "bash zsh fish"),
        ("nothing ", ""),
        ("--ver", "--version"),
    ],
)
def test_words(typed, offered):
    assert words(typed.split(" ")) == offered.split()


def test_the_first_word_is_a_verb_or_a_topic():
    assert words([""]) == words([]) == list(ALL_VERBS)
    assert words(["help", ""]) == list(dict.fromkeys([*TOPICS, *ALL_VERBS]))


def test_every_setting_and_choice_is_offered_where_it_is_accepted():
    for key, kind in config.schema().items():
        verb = ["pretrain", "tiny-gpt2"] if config.uses.reads("pretrain", key) else ["plan", "instruct"]
        assert f"{key}=" in words([*verb, key]), key
        kind = without_null(kind)
        expected = list(get_args(kind)) if get_origin(kind) is Literal else ["true", "false"] * (kind is bool)
        assert set(expected) <= set(choices(key)), key
        assert words([*verb, f"{key}="]) == [f"{key}={choice}" for choice in choices(key)]


def test_every_choice_that_is_offered_is_accepted():
    for key in config.schema():
        for choice in choices(key):
            try:
                config.load_config(None, f"{key}={choice}")
            except UserError as error:  # it needs other settings, and is of the right type
                assert f"{key}: expected" not in str(error)


def test_words_come_from_the_script_and_need_no_config(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, json.dumps([{"optim.new": ["x"]}, {"pretrain": ["optim.*"]}, {"mine": "pretrain"}]))
    for typed, offered in (("optim.", "optim.new="), ("optim.new=", "optim.new=x"), ("mi", "mine")):
        assert main(["completion", "--words", "pretrain", typed]) == 0
        assert capsys.readouterr().out.split() == [offered]
    code = "import sys; from gptjax.__main__ import main; main(sys.argv[1:]); sys.exit('gptjax.config' in sys.modules)"
    assert not subprocess.run(
        [sys.executable, "-c", code, "completion", "--words", "pretrain", "o"], cwd=ROOT
    ).returncode


def test_hidden_words_are_no_help_and_never_fail(capsys):
    for typed in (
        ["--words"],
        ["--words", "pretrain", "--help"],
        ["--words", "x", "y"],
        ["--words", "data", "check", "="],
    ):
        assert main(["completion", *typed]) == 0
        assert "Usage" not in capsys.readouterr().out


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "gptjax completion --words" in out and "VARIABLE" not in out and "NAMES" not in out
    assert json.dumps(NAMES, separators=(",", ":")) in out and "'" not in json.dumps(NAMES)
    assert f"gptjax completion {shell}" in " ".join(PAGES["completion"].notes)


@pytest.mark.parametrize(("args", "says"), [([], "for which shell"), (["bsah"], "did you mean bash?")])
def test_an_unknown_shell(args, says, capsys):
    assert main(["completion", *args]) == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- the shells themselves


@pytest.fixture
def shell_env(tmp_path):
    """An environment whose `gptjax` is this one, in a folder with a few files."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gptjax"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gptjax "$@"\n')
    program.chmod(0o755)
    (tmp_path / "my corpus.txt").write_text("text")
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb"}


def need(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")


def bash_offers(line, env):
    """COMPREPLY of the function in the script, with the cursor at the end of the line."""
    code = """eval "$(gptjax completion bash)"
COMP_LINE=$1 COMP_POINT=${#1}
_gptjax
printf '%s\\n' "${COMPREPLY[@]}" """
    done = subprocess.run(["bash", "-c", code, "bash", line], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gptjax pre", "pretrain presets"),
        ("gptjax data ", "prepare inspect check"),
        ("gptjax pretrain tiny-g", "tiny-gpt2"),
        ("gptjax pretrain tiny-gpt2 optim.w", "optim.warmup_steps= optim.weight_decay= optim.weight_decay_schedule="),
        ("gptjax pretrain optim.name=", "adamw muon"),  # bash replaces what follows the =
        ("gptjax pretrain optim.name=mu", "muon"),
        ('gptjax sample "my run" quantize=i', "int8"),
        ("gptjax finetune classify lora.scaling=alpha/s", r"alpha/sqrt\(r\)"),
        ("gptjax pretrain data.source=my", ""),  # bash completes files by itself
    ],
)
def test_bash(line, offered, shell_env):
    need("bash")
    assert bash_offers(line, shell_env) == offered.split()


@pytest.mark.slow
def test_the_tab_key_in_bash(shell_env, tmp_path):
    """A bash with a terminal, into which keys are typed."""
    need("bash")
    typed = {
        "gptjax pretr\t": "gptjax pretrain ",
        "gptjax pretrain tiny-gp\topti\tnam\tmu\t": "gptjax pretrain tiny-gpt2 optim.name=muon ",
        "gptjax pretrain data.source=my\t": "gptjax pretrain data.source=my\\ corpus.txt ",
        "gptjax pretrain mine\t": "gptjax pretrain mine.yaml ",
        "gptjax finetune cl\tlora.sc\talpha/s\t": "gptjax finetune classify lora.scaling=alpha/sqrt\\(r\\) ",
    }
    terminal, inside = pty.openpty()
    command = ["bash", "--norc", "--noprofile", "-i"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    bash = subprocess.Popen(command, **streams, cwd=tmp_path, env=shell_env, start_new_session=True)
    os.close(inside)

    def read(until, timeout_s=20.0):
        seen, end = "", time.monotonic() + timeout_s
        while not re.search(until, seen) and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 4096).decode()
        assert re.search(until, seen), seen
        return seen

    def send(keys):
        os.write(terminal, keys.encode())

    try:
        send("""PS1='ready> '; bind 'set bell-style none'; eval "$(gptjax completion bash)"; echo loa''ded\n""")
        read("loaded\r?\nready> ")
        for keys, line in typed.items():
            *words_typed, _ = keys.split("\t")
            for word in words_typed:
                send(f"{word}\t")
                time.sleep(0.6)
            send("\x01echo '\x05'\n")  # the line is printed instead of run
            assert f"\n{line}" in read(r"\nready> ").replace("\r", ""), keys
    finally:
        send("exit\n")
        bash.wait(timeout=20)
        os.close(terminal)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_is_valid(shell, tmp_path):
    """By the shell's own parser. Without the shell nothing is tested; both were tried by hand, with zsh 5.9 and fish
    3.6."""
    need(shell)
    (tmp_path / "script").write_text(script(shell))
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gptjax pretrain opt", ["optim."]),
        ("gptjax pretrain optim.name=", ["optim.name=adamw", "optim.name=muon"]),
        ("gptjax pretrain data.source=my", ["data.source=my corpus.txt"]),
        ("gptjax data ", ["check", "inspect", "prepare"]),
    ],
)
def test_fish(line, offered, shell_env, tmp_path):
    need("fish")
    code = "gptjax completion fish | source; complete -C $argv[1]"
    command = ["fish", "--no-config", "-c", code, line]
    done = subprocess.run(command, env=shell_env, cwd=tmp_path, capture_output=True, text=True)
    assert sorted(row.partition("\t")[0] for row in done.stdout.splitlines()) == offered, done.stderr
