"""Sources of text: what is read from each kind of file, what is an error, and datasets on the hub."""

import json

import pytest

from gptjax.config import DataConfig, load_config
from gptjax.data import documents, split
from gptjax.data.sources import Document
from gptjax.errors import UserError
from gptjax.formats import tables


def read(*names, **cfg):
    return list(documents(DataConfig(source=tuple(map(str, names)), **cfg)))


def texts(*names, **cfg):
    return [document.text for document in read(*names, **cfg)]


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- valid sources


def test_text_file(tmp_path):
    path = put(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8three")
    assert read(path) == [Document("a.txt", "one\ntwo\u2028three", "a.txt")]


def test_folder_is_recursive_sorted_and_named_relatively(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", ".hidden/x.txt", "a/skip.py", "rows.csv"):
        put(tmp_path, name, name)
    assert [d.name for d in read(tmp_path)] == ["a/b/c.txt", "a/z.md", "b.txt"]
    opened = documents(DataConfig(source=(str(tmp_path),)))
    assert list(opened) == list(opened)  # can be iterated several times
    assert texts(tmp_path, max_documents=2) == ["a/b/c.txt", "a/z.md"]


def test_folder_of_rows(tmp_path):
    put(tmp_path, "part-1.jsonl", '{"text": "one"}\n')
    put(tmp_path, "part-0.jsonl", '{"text": "zero"}\n')
    assert [(d.name, d.group) for d in read(tmp_path)] == [
        ("part-0.jsonl:1", "part-0.jsonl"),
        ("part-1.jsonl:1", "part-1.jsonl"),
    ]


def test_jsonl(tmp_path):
    path = put(tmp_path, "a.jsonl", '{"body": "o\\u00e9\\nx", "n": 1}\n\n{"body": "two\u2028"}')
    assert read(path, text_field="body") == [
        Document("a.jsonl:1", "oé\nx", "a.jsonl"),
        Document("a.jsonl:3", "two\u2028", "a.jsonl"),
    ]


def test_csv_values_are_not_interpreted(tmp_path):
    path = put(tmp_path, "a.csv", 'label,text\nham,NA\nspam,"a ""b"",\nc"\nham,null\n1, 007 \n')
    assert texts(path) == ["NA", 'a "b",\nc', "null", " 007 "]
    assert [d.name for d in read(path)] == ["a.csv:2", "a.csv:3", "a.csv:5", "a.csv:6"]
    assert texts(put(tmp_path, "long.csv", "text\n" + "x" * 200_000 + "\n")) == ["x" * 200_000]


def test_line_ends_of_classic_mac_os(tmp_path):
    """A carriage return ends a line if the file has no line feed; otherwise it is an ordinary character."""
    assert texts(put(tmp_path, "a.txt", b"one\rtwo\r")) == ["one\ntwo\n"]
    assert texts(put(tmp_path, "b.txt", b"10%\r20%\n")) == ["10%\r20%\n"]
    assert texts(put(tmp_path, "a.csv", b"text,x\rhello,1\ryou,2\r")) == ["hello", "you"]
    assert texts(put(tmp_path, "a.jsonl", b'{"text": "a"}\r{"text": "b"}')) == ["a", "b"]
    assert texts(put(tmp_path, "b.jsonl", '{"text": "a\u2028b"}\n'.encode())) == ["a\u2028b"]


def test_a_file_whose_name_looks_like_a_list_is_a_file(tmp_path, monkeypatch):
    put(tmp_path, "[x].txt", b"hello")
    monkeypatch.chdir(tmp_path)
    cfg = load_config(None, "data.source=[x].txt")
    assert cfg.data.source == ("[x].txt",) and [d.text for d in documents(cfg.data)] == ["hello"]
    assert load_config(None, "data.source=[x.txt, y.txt]").data.source == ("x.txt", "y.txt")


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "NA", ""], "n": [1, 2, 3]}), path)
    assert texts(path) == ["one", "NA", ""]
    assert texts(path, max_documents=1) == ["one"]
    with pytest.raises(UserError, match="no field 'body'; fields: text, n"):
        texts(path, text_field="body")
    with pytest.raises(UserError, match="column 'n' must be text, found int64"):
        texts(path, text_field="n")
    pq.write_table(pa.table({"text": ["one", None]}), path)
    with pytest.raises(UserError, match="row 2: column 'text' is null"):
        texts(path)
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="not a readable parquet file"):
        texts(path)


def test_asset_by_name(tmp_path, monkeypatch):
    from gptjax import assets

    put(tmp_path, "plays/hamlet.txt", "To be")
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / "plays")
    assert read("shakespeare") == [Document("hamlet.txt", "To be", "hamlet.txt")]


# --- invalid sources

BAD_FILES = {
    "latin1": ("a.txt", b"caf\xe9 au lait", r"a\.txt: invalid UTF-8 at byte 3 \(0xe9.*iconv"),
    "latin1 after a mark": ("a.txt", b"\xef\xbb\xbfa\xff", "invalid UTF-8 at byte 4"),
    "utf-16 by its mark": (
        "a.txt",
        "中文".encode("utf-16"),
        r"UTF-16 by its byte order mark FF FE: .* iconv -f utf-16 -t",
    ),
    "utf-16, the other way": ("a.csv", b"\xfe\xff" + "中文".encode("utf-16-be"), "UTF-16 by its byte order mark FE FF"),
    "utf-32": ("a.jsonl", "中文".encode("utf-32"), "UTF-32 by its byte order mark FF FE 00 00"),
    "utf-16": ("a.txt", "hello".encode("utf-16-le"), "NUL byte at byte 1.*UTF-16"),
    "broken line": ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2:\d+: not a complete JSON object"),
    "cut short": ("a.jsonl", '{"text": "a"}\n{"text": "b', r"a\.jsonl:2"),
    "array": ("a.jsonl", '["a"]\n', r"a\.jsonl:1: each line must be a JSON object, found an array"),
    "missing key": ("a.jsonl", '{"body": "a", "id": 3}', "no field 'text'; fields: body, id.*data.text_field"),
    "number": ("a.jsonl", '{"text": 3}', "field 'text' must be text, found a number"),
    "null": ("a.jsonl", '{"text": null}', "found null"),
    "same key twice": ("a.jsonl", '{"text": "a", "text": "b"}', "duplicate key 'text'"),
    "NaN": ("a.jsonl", '{"text": "a", "n": NaN}', "NaN is not JSON"),
    "deep": ("a.jsonl", '{"text": ' + "[" * 200_000, "a.jsonl:1: nested too deeply"),
    "surrogate": ("a.jsonl", '{"text": "a\\ud800"}', "lone surrogate at character 1"),
    "invalid bytes in a row": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "invalid UTF-8 at byte 24"),
    "blanks in columns": ("a.csv", " text ,a\nx,y\n", "no field 'text'; fields: ' text ', a"),
    "no column": ("a.csv", "label,body\nham,x\n", r"a\.csv:1: no field 'text'; fields: label, body"),
    "column twice": ("a.csv", "text,text\na,b\n", r"a\.csv:1: column 'text' appears twice"),
    "short row": ("a.csv", "label,text\nham,x\nspam\n", r"a\.csv:3:2: 1 columns, and the header has 2"),
    "long row": ("a.csv", "label,text\nham,x,y\n", r"a\.csv:2:3: 3 columns"),
    "open quote": ("a.csv", 'text\nfine\n"never closed\nmore\n', r"a\.csv:3: .*never closed"),
    "no header": ("a.csv", "", "empty; a header line"),
    "unknown kind": ("a.dat", "x", r"cannot read .*a\.dat.*known kinds are \.txt"),
    "json": ("a.json", "{}", r"one JSON object per line must be named \.jsonl"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, name, content, message):
    path = put(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_all_missing_sources_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "nothing.txt", "shakespear")
    assert "nothing.txt: no such file" in str(error.value)
    assert "; did you mean shakespeare?" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.txt, .* file in"):
        read(tmp_path / "empty")


def test_all_bad_files_of_a_folder_at_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        put(tmp_path, name, b"\xff" if name != "b.txt" else b"fine")
    with pytest.raises(UserError) as error:
        split(documents(DataConfig(source=(str(tmp_path),))), DataConfig())
    assert "a.txt" in str(error.value) and "c.txt" in str(error.value) and "b.txt" not in str(error.value)


def test_fingerprint_follows_names_and_content(tmp_path):
    def fingerprint():
        return documents(DataConfig(source=(str(tmp_path),))).sources[0].fingerprint

    put(tmp_path, "a.txt", "one")
    first = fingerprint()
    assert first == fingerprint()
    put(tmp_path, "a.txt", "two")
    second = fingerprint()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, fingerprint()}) == 3


# --- the hub


@pytest.fixture
def hub(monkeypatch):
    """Replaces `datasets.load_dataset` by a function that returns three rows. Returns the list of its calls."""
    import datasets

    calls = []

    def load_dataset(name, config=None, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "org/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/missing' doesn't exist on the Hub")
        if name == "org/offline":
            raise ConnectionError("Couldn't reach the Hugging Face Hub")
        rows = datasets.Dataset.from_dict({"text": ["one", "NA", "three"], "id": [1, 2, 3]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub(hub):
    assert read("hf:org/name") == [
        Document(f"org/name:{i}", t, "org/name") for i, t in enumerate(["one", "NA", "three"], 1)
    ]
    assert texts("hf:org/name:small@validation", max_documents=2) == ["one", "NA"]
    assert hub == [("org/name", None, "train", False), ("org/name", "small", "validation", False)]


def test_hub_streaming_stores_the_rows(hub, tmp_path):
    cfg = {"streaming": True, "max_documents": 2, "cache_dir": str(tmp_path)}
    assert texts("hf:org/name", **cfg) == texts("hf:org/name", **cfg) == ["one", "NA"]
    assert hub == [("org/name", None, "train", True)]  # only one download: the second read comes from the cache
    assert [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()] == [
        {"text": "one"},
        {"text": "NA"},
    ]


def test_hub_mistakes(hub, tmp_path):
    with pytest.raises(UserError, match="no field 'body'; fields: text, id"):
        texts("hf:org/name", text_field="body")
    with pytest.raises(UserError, match="field 'id' must be text, found a number"):
        texts("hf:org/name", text_field="id")
    with pytest.raises(UserError, match=r"hf:org/missing: DatasetNotFoundError.*doesn't exist"):
        texts("hf:org/missing")
    with pytest.raises(UserError, match=r"hf:org/offline: ConnectionError.*\n.*data.source=FILE"):
        texts("hf:org/offline", streaming=True, cache_dir=str(tmp_path))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_several_columns_may_have_no_name(tmp_path):
    file = tmp_path / "spam.csv"
    file.write_text("v1,text,,\nham,hello,,\n")
    assert [d.text for d in documents(DataConfig(source=(str(file),)))] == ["hello"]
    file.write_text("text,text,,\nham,hello,,\n")
    with pytest.raises(UserError, match="appears twice"):
        list(documents(DataConfig(source=(str(file),))))


def test_a_run_directory_is_not_text(tmp_path):
    run = tmp_path / "runs" / "a"
    (run / "final").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "log.txt", "samples.txt", "final/model.json", "final/notes.txt"):
        (run / name).write_text("output of a run")
    for folder in (run, run / "final"):
        with pytest.raises(UserError, match="is a run or model of gptjax, not text"):
            documents(DataConfig(source=(str(folder),)))
    with pytest.raises(UserError, match="no .txt"):
        documents(DataConfig(source=(str(tmp_path),)))
    (tmp_path / "mine.txt").write_text("mine")
    (source,) = documents(DataConfig(source=(str(tmp_path),))).sources
    assert [document.text for document in source] == ["mine"]


def test_symbolic_links_in_a_folder_are_followed(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("two")
    (tmp_path / "one.txt").write_text("one")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").symlink_to(tmp_path / "one.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / ".hidden").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    for source in (folder, tmp_path / "link"):
        assert [(d.name, d.text) for d in read(source)] == [("a.txt", "one"), ("linked/deep/b.txt", "two")]
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"gone.txt is a link that leads nowhere"):
        texts(folder)
    (folder / "gone.txt").unlink()
    (tmp_path / "elsewhere" / "round").symlink_to(folder, target_is_directory=True)
    with pytest.raises(UserError, match=r"round is a link that leads back"):
        texts(folder)


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string", "dictionary of large"])
def test_text_columns_of_every_arrow_type(kind, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"string_view": pa.string_view(), "large_string": pa.large_string()}
    types |= {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    types |= {"dictionary of large": pa.dictionary(pa.int16(), pa.large_string())}
    table = pa.table({"text": pa.array(["ab", "cd", "ab"], types[kind])})
    pq.write_table(table, tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet") == ["ab", "cd", "ab"]
    assert [row for _, row in tables.read(str(tmp_path / "x.parquet"))] == [{"text": t} for t in ("ab", "cd", "ab")]
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="must be text, found int64"):
        texts(tmp_path / "y.parquet")
