"""Splits of documents and of labelled texts: sizes close to the fraction, and nothing in two splits at once."""

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.data import split
from gptjax.data.classification import Labelled
from gptjax.data.sources import Document, Documents, Source
from gptjax.data.split import hold_out, split_labelled
from gptjax.errors import UserError

# --- pretraining


def make(lengths, name="s"):
    """A source of files; `lengths` holds the document lengths of each file."""
    files = []
    for f, docs in enumerate(lengths):
        rows = [Document(f"{name}{f}:{i}", chr(97 + i % 26) * n, f"{name}{f}") for i, n in enumerate(docs)]
        files.append((f"{name}{f}", lambda rows=rows: iter(rows)))
    return Source(name, tuple(files), "")


def split_one(source, **cfg):
    """(train documents, validation documents, description of the split) of a single source."""
    train, val, how = split(Documents((source,)), DataConfig(**cfg))
    return list(train), list(val), how[0]


def test_auto_holds_out_documents_if_there_are_at_least_ten():
    assert split_one(make([[50]] * 9))[2]["split"] == "tail"
    assert split_one(make([[50]] * 10))[2]["split"] == "document"
    assert split_one(make([[50] * 10]))[2]["split"] == "document"


def test_whole_documents_are_held_out_up_to_the_fraction():
    lengths = [[int(n)] for n in np.random.default_rng(0).integers(50, 200, 38)]
    source = make(lengths)
    train, val, how = split_one(source, split="document")
    assert sorted(train + val) == sorted(source)
    assert how["held_out"] == [d.name for d in val] and how["documents"] == 38
    share = sum(len(d.text) for d in val) / sum(map(sum, lengths))
    assert abs(share - 0.1) < 0.02


def test_held_out_documents_do_not_depend_on_the_order():
    names = [f"n{i}" for i in range(40)]
    sizes = np.random.default_rng(1).integers(50, 200, 40)
    chosen = {names[i] for i in np.flatnonzero(hold_out(names, sizes, 0.2))}
    reversed_chosen = {names[::-1][i] for i in np.flatnonzero(hold_out(names[::-1], sizes[::-1], 0.2))}
    assert chosen == reversed_chosen


@pytest.mark.parametrize("sizes", [[1, 1], [100, 1], [1, 100], [1000, 10, 10], [5] * 30])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_at_least_one_document_in_each_split(sizes, fraction):
    chosen = hold_out([f"n{i}" for i in range(len(sizes))], np.array(sizes), fraction)
    assert 0 < chosen.sum() < len(sizes)


def test_whole_files_are_held_out():
    source = make([[10] * 5] * 6)
    train, val, how = split_one(source, split="file", val_fraction=0.3)
    assert {d.group for d in train}.isdisjoint(d.group for d in val)
    assert len({d.group for d in val}) == 2 and how["held_out"] == sorted({d.group for d in val})
    with pytest.raises(UserError, match=r"split=file needs at least 2 files in data.source=s, found 1.*tail"):
        split_one(make([[10, 10]]), split="file")


def test_tail_is_the_end_of_each_file_regardless_of_documents():
    source = make([[30, 50, 20], [7]])
    train, val, _ = split_one(source, split="tail", val_fraction=0.25)
    assert [len(d.text) for d in train] == [30, 45, 5]
    assert [len(d.text) for d in val] == [5, 20, 2]


def test_every_source_contributes_to_the_validation_text():
    documents = Documents((make([[100]], "a"), make([[10]] * 50, "b")))
    train, val, how = split(documents, DataConfig())
    assert [row["split"] for row in how] == ["tail", "document"]
    assert {d.group[0] for d in val} == {d.group[0] for d in train} == {"a", "b"}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_invalid_fraction(fraction):
    with pytest.raises(UserError, match="val_fraction"):
        split_one(make([[10]]), val_fraction=fraction)


# --- classification


def labelled(n=60, classes=3, repeats=2):
    texts = [f"text {i // repeats}" for i in range(n)]
    return Labelled(texts, np.arange(n, dtype=np.int32) % classes, tuple("abc"[:classes]))


@pytest.mark.parametrize("how", ["stratified", "grouped"])
def test_equal_texts_are_in_one_split(how):
    """Stratified with deduplication keeps one of them; grouped keeps all in the same split."""
    splits = split_labelled(labelled(), how=how, deduplicate=how == "stratified")
    assert splits.leaked == 0
    assert sum(len(subset.texts) for subset in splits[:3]) == (30 if how == "stratified" else 60)
    repeated = split_labelled(labelled(), how=how, deduplicate=how == "stratified")
    assert [subset.texts for subset in splits[:3]] == [subset.texts for subset in repeated[:3]]
    other = split_labelled(labelled(), how=how, seed=1, deduplicate=how == "stratified")
    assert splits.train.texts != other.train.texts


def test_stratified_keeps_class_proportions_and_leaks_are_counted():
    data = labelled(300, 3, repeats=1)
    splits = split_labelled(data, fractions=(0.7, 0.1, 0.2))
    assert [np.bincount(subset.labels).tolist() for subset in splits[:3]] == [[70] * 3, [10] * 3, [20] * 3]
    duplicated = data._replace(texts=["Same  text"] * 299 + ["same TEXT"])
    assert split_labelled(duplicated, deduplicate=False).leaked == 90


def test_the_books_split():
    """As in the book: the larger class is sampled down to the smaller one, then split into 70, 10 and 20 %."""
    texts = [f"t{i}" for i in range(5572)]
    labels = np.array([1] * 747 + [0] * 4825, np.int32)
    splits = split_labelled(Labelled(texts, labels, ("ham", "spam")), how="book")
    assert [len(subset.texts) for subset in splits[:3]] == [1045, 149, 300]
    assert sum(int(subset.labels.sum()) for subset in splits[:3]) == 747


def test_splits_that_would_be_empty():
    with pytest.raises(UserError, match="leave none to test on"):
        split_labelled(labelled(6, 3, repeats=1))
    no_y = Labelled(["a", "b", "c", "d"] * 9, np.zeros(36, np.int32), ("x", "y"))
    with pytest.raises(UserError, match="no text to train on is of class y"):
        split_labelled(no_y, deduplicate=False)
