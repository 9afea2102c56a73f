import pytest

from gptjax.__main__ import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    return tmp_path


def test_prepare_says_what_there_is(here, capsys):
    assert main(["data", "prepare", "tiny-gpt2", "data.source=a.txt"]) == 0
    out = capsys.readouterr().out
    assert "bytes" in out and "train" in out and "val" in out


def test_inspect_shows_the_first_window(here, capsys):
    assert main(["data", "inspect", "tiny-gpt2", "data.source=a.txt", "model.context_length=8"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "->" in line][-8:]
    inputs, targets = zip(*(tuple(int(pair.split()[0]) for pair in row.split("->")) for row in rows), strict=True)
    assert inputs[1:] == targets[:-1]


def test_mistakes(here, capsys):
    assert main(["data", "preprare"]) == 2
    assert "did you mean prepare?" in capsys.readouterr().err
    assert main(["data", "prepare", "tiny-gpt2", "data.source=absent.txt"]) == 2
    assert "absent.txt" in capsys.readouterr().err
