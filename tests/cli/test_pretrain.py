"""`gptjax pretrain` up to the first step: the printed config and the dry run."""

import pytest

from gptjax import config
from gptjax.__main__ import main


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    return "data.source=a.txt"


def test_print_config_is_the_config_with_its_origins(capsys):
    assert main(["pretrain", "tiny-llama", "--optim.lr", "1e-2", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert config.from_yaml(out) == config.load_config("tiny-llama", "optim.lr=1e-2")
    assert "# command line" in out and "# arch=llama" in out and "tiny-llama.yaml:" in out


def test_dry_run_says_what_it_would_do_and_does_nothing(text, tmp_path, capsys):
    assert main(["pretrain", "tiny-gpt2", text, "tokenizer.name=chars", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("parameters", "tokens per step    256 (8 windows of 32)", "epochs", "memory (estimate)", "no step"):
        assert words in out
    assert not (tmp_path / "runs").exists()


def test_dry_run_downloads_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # away from the runs of the checkout
    assert main(["pretrain", "gpt2-124m", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would be downloaded" in out and "124,439,808" in out
    assert main(["pretrain", "shakespeare-char", "--dry-run"]) == 0
    assert "gptjax data prepare" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("switch", ["--dryrun", "--print_conf"])
def test_a_switch_with_a_typo(switch, capsys):
    assert main(["pretrain", "tiny-gpt2", switch]) == 2
    assert "did you mean --" in capsys.readouterr().err


def test_a_stray_word(capsys):
    assert main(["pretrain", "tiny-gpt2", "optim.lr=1", "twice"]) == 2
    assert "'twice': expected KEY=VALUE" in capsys.readouterr().err
