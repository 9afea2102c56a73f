"""`gptjax plan`: its own arguments on the command line, and its error messages."""

import json

import pytest

from gptjax.__main__ import main
from gptjax.cli import plan as verb
from gptjax.errors import UserError


def test_its_own_words_are_told_from_settings():
    opts, rest = verb.options_of(
        ["gpt2-124m", "--on", "v5p-8", "train.batch_size=8", "--search", "out=a.json", "--png=b.png", "tokens=1e9"]
    )
    assert opts == verb.Options("v5p-8", True, False, 1e9, None, "a.json", "b.png")
    assert rest == ["gpt2-124m", "train.batch_size=8"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--on"], "--on needs a value"),
        (["tokens=many"], "expected a number above 0"),
        (["hours=-1"], "expected a number above 0"),
        (["--search", "--decode"], "leave one of the two out"),
        (["--on", "v9-8"], "no such TPU slice"),
        (["model.d_modle=3"], "d_model"),
    ],
)
def test_what_it_refuses(args, says, capsys):
    assert main(["plan", "tiny-gpt2", *args]) == 2
    assert says in capsys.readouterr().err


def test_words_of_a_tokenizer():
    from gptjax.config import load_config

    assert verb.with_shape(load_config("smollm2-135m", "model.vocab_size=0")).model.vocab_size == 49152
    assert verb.with_shape(load_config("gpt2-124m", "model.vocab_size=0")).model.vocab_size == 50257
    with pytest.raises(UserError, match="set model.vocab_size"):
        verb.with_shape(load_config("shakespeare-char"))


def test_a_plan_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    small = ["model.vocab_size=512", "model.dtype=bfloat16", "model.context_length=128", "train.batch_size=4"]
    code = main(["plan", "tiny-gpt2", *small, "--on", "v5e-1", f"out={out}", f"png={png}", "hours=1"])
    text = capsys.readouterr().out
    assert code == 0 and "HBM per chip" in text and "MFU" in text and "1 hours" in text
    assert json.loads(out.read_text())["fits"] and png.stat().st_size > 10_000
