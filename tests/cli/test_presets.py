import pytest

from gptjax import config
from gptjax.__main__ import main
from gptjax.config.uses import TUNINGS


def test_ls_names_all(capsys):
    assert main(["presets", "ls"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(" ")] == list(config.presets())
    headings = [line for line in out.splitlines() if not line.startswith(" ")]
    assert len(headings) == 1 + len(TUNINGS) and "gptjax finetune classify PRESET" in headings


def test_a_copy_says_how_to_run_it(tmp_path, capsys):
    assert main(["presets", "cp", "book-spam", str(tmp_path / "mine.yaml")]) == 0
    assert f"gptjax finetune classify {tmp_path / 'mine.yaml'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(config.presets()))
def test_a_copy_is_the_same_run_elsewhere(name, tmp_path, capsys):
    assert main(["presets", "cp", name, str(tmp_path / f"{name}.yaml")]) == 0
    assert config.load_config(tmp_path / f"{name}.yaml") == config.load_config(name)


def test_nothing_is_overwritten(tmp_path, capsys):
    assert main(["presets", "cp", "tiny-gpt2", str(tmp_path)]) == 0
    (tmp_path / "tiny-gpt2.yaml").write_text("mine")
    assert main(["presets", "cp", "tiny-gpt2", str(tmp_path)]) == 2
    assert (tmp_path / "tiny-gpt2.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [(["lss"], "did you mean ls?"), (["show", "tiny-gpt3"], "did you mean tiny-gpt2?"), (["cp", "x"], "expected:")],
)
def test_mistakes(args, words, capsys):
    assert main(["presets", *args]) == 2
    assert words in capsys.readouterr().err
