import pytest

from gptjax.__main__ import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    return tmp_path


def test_train_then_encode_then_inspect(here, capsys):
    assert main(["tokenizer", "train", "bpe", "source=a.txt", "vocab_size=280", "out=b.json"]) == 0
    assert "bpe, " in capsys.readouterr().out
    assert main(["tokenizer", "encode", "b.json", "to be=or --not"]) == 0
    assert all(word.isdigit() for word in capsys.readouterr().out.split())
    assert main(["tokenizer", "inspect", "b.json", "to be"]) == 0
    assert "bytes per token" in capsys.readouterr().out


def test_encode_reads_standard_input(monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    assert main(["tokenizer", "encode", "bytes"]) == 0
    assert capsys.readouterr().out == "97 98\n"


def test_nothing_is_overwritten(here, capsys):
    (here / "b.json").write_text("mine")
    assert main(["tokenizer", "train", "chars", "source=a.txt", "out=b.json"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (here / "b.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tran"], "did you mean train?"),
        (["train"], "which kind?"),
        (["train", "bpee", "source=a.txt"], "did you mean bpe?"),
        (["train", "chars", "source=absent.txt"], "absent.txt"),
        (["encode"], "expected: gptjax tokenizer encode"),
        (["inspect", "absent.json"], "absent.json"),
    ],
)
def test_mistakes(here, args, words, capsys):
    assert main(["tokenizer", *args]) == 2
    assert words in capsys.readouterr().err
