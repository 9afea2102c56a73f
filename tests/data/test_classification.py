"""Labelled texts: reading, encoding, packing into rows, batches and baselines."""

import json

import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.data import classification
from gptjax.errors import UserError
from gptjax.formats import tables

TOK = tokenizers.load("bytes")


def put(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def labelled(n=60, classes=3, repeats=2):
    texts = [f"text {i // repeats}" for i in range(n)]
    return classification.Labelled(texts, np.arange(n, dtype=np.int32) % classes, tuple("abc"[:classes]))


def test_every_file_format_gives_the_same_data(tmp_path):
    rows = [("spam", 'NA "now"'), ("ham", "null"), ("ham", "naïve, yes")]
    csv = "label,text\n" + "".join(f'{a},"{b.replace(chr(34), chr(34) * 2)}"\n' for a, b in rows)
    records = [{"label": a, "text": b} for a, b in rows]
    files = {
        "a.csv": csv,
        "a.tsv": "".join(f"{a}\t{b}\n" for a, b in rows),
        "b.tsv": "Text\tLabel\n" + "".join(f"{b}\t{a}\n" for a, b in rows),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in records),
        "a.json": json.dumps(records),
    }
    for name, text in files.items():
        data = classification.read(put(tmp_path, name, text))
        assert data.texts == [b for _, b in rows], name
        assert (data.labels.tolist(), data.names) == ([1, 0, 0], ("ham", "spam"))
    reordered = classification.read(put(tmp_path, "a.csv", csv), labels=("spam", "ham"))
    assert reordered.labels.tolist() == [0, 1, 1]


def test_a_label_that_differs_in_every_row_is_questioned(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("said,ticket\n" + "".join(f"text {i},{i}\n" for i in range(12)), encoding="utf-8")
    with pytest.raises(UserError, match="'ticket' has a different value in each of its 12 rows: is it the label"):
        classification.read(str(path), text="said", label="ticket")


def test_another_separator_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("said;label\nx;y\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'said;label', one column: is the separator ';'\?"):
        classification.read(str(path))


def test_all_missing_columns_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\nx,y\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)classify.text_field=NAME.*classify.label_field=NAME"):
        classification.read(str(path))


def test_numeric_labels_are_sorted_by_value(tmp_path):
    rows = "".join(json.dumps({"review": "x" * i, "stars": i}) + "\n" for i in (10, 9, 2))
    assert classification.read(put(tmp_path, "a.jsonl", rows), label="stars").names == ("2", "9", "10")


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", "a,b\n1,2\n", {}, "usual name (text, sentence, content, ..) of the text; the columns are a, b: say"),
        ("a.csv", "text,body,label\nx,y,z\n", {}, "several columns could be the text"),
        ("a.csv", " Text (raw) ,b\n1,2\n", {}, "the columns are ' Text (raw) ', b: say classify.text_field=NAME"),
        ("a.csv", "text,label\nx,y\n", {"text": "txt"}, "no column 'txt'; there are text, label"),
        ("a.csv", "text,label\nx,y\nz,y\n", {}, "2 texts of 1 class (y); two are needed"),
        ("a.csv", "text,label\nx,b\ny,spma\n", {"labels": ("b", "spam")}, "unknown label 'spma': known are b, spam"),
        ("a.csv", "text,label\n ,ham\ny,\n", {}, "the text is empty"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": \n', {}, "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n', {}, "1.5 is not a label"),
        ("a.tsv", "a\tb\tc\n", {}, "expected a header or two columns"),
        ("a.tsv", "ham\tx\nspam\n", {}, "a.tsv:2: 1 columns, expected 2"),
        ("a.tsv", "", {}, "0 texts of 0 class"),
        ("a.txt", "x", {}, "file or hf:org/name"),
    ],
)  # fmt: skip
def test_invalid_files_and_options(tmp_path, name, text, options, message):
    with pytest.raises(UserError) as error:
        classification.read(put(tmp_path, name, text), **options)
    assert message in str(error.value)


def test_a_file_that_does_not_exist():
    with pytest.raises(UserError, match="absent.tsv: no such file"):
        classification.read("absent.tsv")


def test_balanced_classes():
    data = classification.Labelled([str(i) for i in range(20)], np.array([0] * 15 + [1] * 5, np.int32), ("a", "b"))
    balanced = classification.balanced(data, 0)
    assert np.bincount(balanced.labels).tolist() == [5, 5] and balanced.texts == sorted(balanced.texts, key=int)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_are_a_function_of_seed_and_step(packed):
    data = labelled(10, 2, repeats=1)
    examples = classification.encode(data, TOK, 6)
    assert [len(ids) for ids in examples.ids] == [6] * 10 and examples.cut == 0
    assert classification.encode(data, TOK, 5).cut == 10
    rows = classification.rows(examples, packed)
    epoch = [classification.batch(rows, step, batch_size=5, seed=0) for step in range(2)]
    seen = np.concatenate([b.tokens for b in epoch])
    assert sorted(map(tuple, seen.tolist())) == sorted(tuple(ids) for ids in examples.ids)
    repeated = classification.batch(rows, 1, batch_size=5, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(epoch[1], repeated, strict=True))
    assert not np.array_equal(classification.batch(rows, 1, batch_size=5, seed=1).tokens, repeated.tokens)
    batches = list(classification.eval_batches(rows, 4))
    assert [b.weights[:, 0].tolist() for b in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert np.array_equal(np.concatenate([b.labels[b.weights > 0] for b in batches]), data.labels)


def test_a_prompt_surrounds_the_text():
    data = classification.Labelled(["abcdef", "gh"], np.array([0, 1], np.int32), ("a", "b"))
    examples = classification.encode(data, TOK, 9, "<{text}> is:")
    assert [TOK.decode(ids) for ids in examples.ids] == ["<abc> is:", "<gh> is:"] and examples.cut == 1
    for prompt in ("no place", "{text} {text}", "{text} and far too much of it"):
        with pytest.raises(UserError, match="classify.prompt"):
            classification.encode(data, TOK, 9, prompt)


def test_rows_contain_every_text_once():
    lengths = [7, 2, 3, 1, 4, 2, 5]
    ids = [np.arange(10 * i, 10 * i + n, dtype=np.int32) for i, n in enumerate(lengths)]
    examples = classification.Examples(ids, np.array([0, 1, 0, 1, 1, 0, 1], np.int32), 0)
    for packed, shape in ((True, (4, 7)), (False, (7, 7))):
        rows = classification.rows(examples, packed)
        assert rows.tokens.shape == shape and sorted(rows.texts[rows.texts >= 0]) == list(range(7))
        for row, k in zip(*np.nonzero(rows.texts >= 0), strict=True):
            i = rows.texts[row, k]
            assert rows.tokens[row][rows.segment_ids[row] == k + 1].tolist() == ids[i].tolist()
            assert rows.labels[row, k] == examples.labels[i]
        assert (rows.segment_ids > 0).sum() == sum(lengths)


def test_baselines():
    data = classification.Labelled(
        ["good fun", "bad day", "good day", "bad fun"], np.array([0, 1, 0, 1], np.int32), ("a", "b")
    )
    assert classification.naive_bayes(data, data, TOK) == 1.0
    assert classification.majority(data, data.take([1, 3])) == 0.0


def test_several_columns_may_have_no_name(tmp_path):
    """As in Kaggle's spam.csv. Two columns with the same name are an error."""
    file = tmp_path / "spam.csv"
    file.write_text("v1,v2,,,\nham,hello there,,,\nspam,win now,,,\n")
    data = classification.read(str(file), text="v2", label="v1")
    assert data.texts == ["hello there", "win now"] and data.names == ("ham", "spam")
    assert next(tables.read(str(file)))[1] == {
        "v1": "ham", "v2": "hello there", "column 3": "", "column 4": "", "column 5": "",
    }  # fmt: skip
    file.write_text("v1,v1\nham,hello\n")
    with pytest.raises(UserError, match="'v1' appears twice"):
        classification.read(str(file), text="v2", label="v1")
