"""`gptjax classify`: texts from the command line, files and standard input; finished rows are kept after an error."""

import csv
import io
import json

import jax
import pytest

import gptjax
from gptjax import config
from gptjax.__main__ import main
from gptjax.tasks.classify import classify_texts, load_classifier

CFG = gptjax.ModelConfig(
    arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=16, context_length=128, vocab_size=257, n_classes=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of an untrained classifier."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    params = jax.tree.map(lambda leaf: 10 * leaf, gptjax.init_params(jax.random.key(0), CFG))
    about = {"labels": ["ham", "spam"], "pooling": "last", "max_length": 100, "prompt": "{text}"}
    files = {"labels.json": json.dumps(about)}
    gptjax.weights.save(folder / "final", params, CFG, gptjax.tokenizers.load("bytes"), files)
    cfg = config.load_config("classify", "classify.source=x.csv", "classify.text_field=body")
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    return str(folder)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEXTS = [f"text {i} {'long ' * (i % 7)}" for i in range(40)]


def test_several_calls_give_the_same_as_one(run):
    classify = load_classifier(run)
    separately = [row for i in range(0, 40, 7) for row in classify(TEXTS[i : i + 7])]
    for row, expected in zip(classify_texts(run, TEXTS), separately, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.first_cases(5)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("out", ["csv", "tsv", "jsonl"])
def test_a_file_keeps_its_columns(run, kind, out, here, capsys):
    rows = [{"id": str(i), "body": text, "sms": 'a "quoted", one'} for i, text in enumerate(TEXTS)]
    with open(f"in.{kind}", "w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            for row in rows:
                row["sms"] = row["sms"].replace('"', "") if kind == "tsv" else row["sms"]
                row["label"] = "x"
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    assert main(["classify", run, f"in.{kind}", f"out=new/out.{out}"]) == 0
    assert "40 texts in new/out" in capsys.readouterr().out
    text = (here / "new" / f"out.{out}").read_text()
    if out == "jsonl":
        written = list(map(json.loads, text.splitlines()))
    else:
        written = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if out == "tsv" else ","))
    label, probability = ("label", "probability") if kind == "jsonl" else ("predicted_label", "predicted_probability")
    for row, result, probabilities in zip(rows, written, classify_texts(run, TEXTS), strict=True):
        assert {key: result[key] for key in row} == row
        assert result[label] == max(probabilities, key=probabilities.get)
        assert float(result[probability]) == pytest.approx(max(probabilities.values()), abs=1e-5)


def test_text_files_pipes_and_literals(run, here, capsys, monkeypatch):
    (here / "a.txt").write_text("one\n\ntwo\r\n")
    (here / "word").mkdir()
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n"))
    assert main(["classify", run, "a.txt", "-", "four, a=b", "word", "text=a.txt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(")  ")[2] for line in lines] == ["one", "two", "three", "four, a=b", "word", "a.txt"]
    assert all(line.startswith(("ham ", "spam ")) for line in lines)


def test_the_column_is_asked_for_or_guessed(run, here, capsys):
    (here / "a.csv").write_text("message,other\nfirst,second\n")
    assert main(["classify", run, "a.csv"]) == 0
    assert main(["classify", run, "a.csv", "text_field=other"]) == 0
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()] == ["first", "second"]


def test_what_is_done_is_kept_when_a_later_row_fails(run, here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in TEXTS)))
    from gptjax.cli import classify
    from gptjax.errors import UserError

    real = classify.read

    def fails(kind, name, fields):
        for i, row in enumerate(real(kind, name, fields)):
            if i == 21:
                raise UserError("the disk is gone")
            yield row

    monkeypatch.setattr(classify, "read", fails)
    assert main(["classify", run, "-", "out=out.jsonl"]) == 2
    assert "the disk is gone" in capsys.readouterr().err
    assert len((here / "out.jsonl").read_text().splitlines()) == 21


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "expected: gptjax classify RUN"),
        (["RUN"], "expected: gptjax classify RUN"),
        (["absent", "x"], "absent"),
        (["RUN", "absent.csv"], "absent.csv: no such file; to classify this as a text, use text=absent.csv"),
        (["RUN", "a.csv", "out=a.csv"], "out=a.csv exists already"),
        (["RUN", "a.csv", "out=b.xlsx"], "expected a .csv, .tsv, .jsonl file"),
        (["RUN", "a.csv", "text_feild=x"], "did you mean text_field?"),
        (["RUN", "a.csv", "text_field=x"], "no column 'x'; there are ' Odd Name ', 'second'"),
        (["RUN", "a.csv"], "of ' Odd Name ', 'second': use text_field=COLUMN"),
        (["RUN", "gaps.jsonl"], "gaps.jsonl:2: no text in column 'text'"),
        (["RUN", "gaps.jsonl"], "gaps.jsonl:4: not valid JSON"),
        (["RUN", "odd.bin"], "to classify this as a text, use text=odd.bin"),
        (["RUN", "-", "-"], "read once only"),
        (["RUN", ""], "the text is empty"),
    ],
)
def test_mistakes_before_the_model_is_read(run, args, words, here, capsys, monkeypatch):
    (here / "a.csv").write_text(" Odd Name ,second\nx,y\n")
    (here / "gaps.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\nx\n')
    (here / "odd.bin").write_text("x")
    monkeypatch.setattr(gptjax.weights, "load", lambda *args: pytest.fail("the model is read first"))
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    assert main(["classify", *(run if arg == "RUN" else arg for arg in args)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before
