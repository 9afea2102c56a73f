"""From text to token stores on disk: their content, reuse from the cache, damaged caches and invalid input."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest

from gptjax import data, tokenizers
from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig, to_yaml
from gptjax.errors import UserError

TEXT = "It was the best of times, it was the worst of times.\n" * 20


def config(tmp_path, *sources, tokenizer="chars", context_length=8, vocab_size=0, trained_size=300, **cfg):
    return Config(
        tokenizer=TokenizerConfig(name=tokenizer, vocab_size=trained_size),
        data=DataConfig(source=tuple(map(str, sources)), cache_dir=str(tmp_path / "cache"), **cfg),
        model=ModelConfig(context_length=context_length, vocab_size=vocab_size),
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(12):
        (path / f"{i:02}.txt").write_text(f"Document {i}: " + "abcdefgh"[i % 8] * (20 + i) + "é")
    return path


def stores(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "tokens").iterdir())


# --- content of the token stores


def test_decoded_tokens_equal_the_text(tmp_path, text):
    ready = data.prepare(config(tmp_path, text))
    cut = int(0.9 * len(TEXT))
    assert ready.tokenizer.decode(ready.train.tokens) == TEXT[:cut]
    assert ready.tokenizer.decode(ready.val.tokens) == TEXT[cut:]
    assert ready.train.tokens.dtype == np.uint16 and not ready.train.tokens.flags.writeable
    assert ready.train.doc_starts.tolist() == [0]
    assert (ready.train.n_bytes, ready.val.n_bytes) == (cut, len(TEXT) - cut)


def test_documents_are_separated_by_end_of_text(tmp_path, folder):
    ready = data.prepare(config(tmp_path, folder, tokenizer="bpe"))
    eot = ready.tokenizer.eot_id
    for store in (ready.train, ready.val):
        ends = np.flatnonzero(store.tokens == eot)
        assert ends[0] == store.doc_starts[0] == 0 and ends[-1] == len(store) - 1
        assert (ends[1:-1] + 1 == store.doc_starts[1:]).all()
    names = ready.manifest["split"][0]["held_out"]
    held_out = [(folder / name).read_text() for name in names]
    bounds = [1, *ready.val.doc_starts[1:], len(ready.val)]
    decoded = [ready.tokenizer.decode(ready.val.tokens[a : b - 1]) for a, b in pairwise(bounds)]
    assert decoded == held_out
    assert ready.manifest["train"]["documents"] + ready.manifest["val"]["documents"] == 12
    assert ready.val.n_bytes == sum(len(t.encode()) for t in held_out)


def test_every_token_is_a_target_and_an_empty_prompt_begins_a_document(tmp_path, folder):
    ready = data.prepare(config(tmp_path, folder, tokenizer="bpe"))
    begin = tokenizers.begin_id(ready.tokenizer)
    batches = list(data.eval_batches(ready.val, context_length=8, batch_size=4))
    assert sum(b.weights.sum() for b in batches) == len(ready.val) - 1 == ready.val.n_targets
    begins = [(b.tokens == begin) & (b.weights > 0) for b in batches]
    assert sum(int(mask.sum()) for mask in begins) == len(ready.val.doc_starts)
    first_tokens = {int(t) for b, mask in zip(batches, begins, strict=True) for t in b.targets[mask]}
    assert first_tokens == {int(ready.val.tokens[1])}  # every document starts with "Document"


def test_a_held_out_tail_has_no_begin_token_and_the_text_before_it_no_end_token(tmp_path, folder):
    ready = data.prepare(config(tmp_path, folder, tokenizer="bpe", split="tail"))
    eot, train, val = ready.tokenizer.eot_id, ready.train, ready.val
    assert (train.tokens[train.doc_starts] == eot).all() and (train.tokens == eot).sum() == 12
    assert (val.tokens[val.doc_starts] != eot).all() and (val.tokens == eot).sum() == 12


def test_documents_begin_with_bos_if_the_tokenizer_adds_it(tmp_path, folder):
    tokenizer = tokenizers.extend(tokenizers.load("bytes"), ["<s>"])
    tokenizer = tokenizer.replace(bos_id=tokenizer.special_tokens["<s>"], add_bos=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    ready = data.prepare(config(tmp_path, folder, tokenizer=str(tmp_path / "tokenizer.json")))
    train, (begin, end) = ready.train, (tokenizer.bos_id, tokenizer.eot_id)
    assert (train.tokens[train.doc_starts] == begin).all() and (train.tokens == begin).sum() == len(train.doc_starts)
    batch = data.loader.gather(train, train.doc_starts[1:3] - 2, 4, True)
    assert batch.tokens[:, 1].tolist() == [end] * 2 and batch.weights.tolist() == [[1, 0, 1, 1]] * 2


def test_a_single_document_has_no_end_token(tmp_path, text):
    ready = data.prepare(config(tmp_path, text, tokenizer="bpe"))
    assert ready.tokenizer.eot_id not in ready.train.tokens
    assert ready.tokenizer.eot_id not in ready.val.tokens


def test_a_trained_vocabulary_does_not_use_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 100 + "zqzq " * 50)
    ready = data.prepare(config(tmp_path, tmp_path / "a.txt", tokenizer="bpe", val_fraction=0.2))
    assert len(ready.tokenizer.encode("zqzq")) == 4
    assert len(ready.tokenizer.encode("aaaa")) == 1


def test_a_special_token_in_the_text_is_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two " * 40)
    ready = data.prepare(config(tmp_path, tmp_path / "a.txt", tokenizer="bpe"))
    assert ready.tokenizer.eot_id not in ready.train.tokens
    assert ready.tokenizer.decode(ready.train.tokens).startswith("one<|endoftext|>two")


def test_val_source(tmp_path, text, folder):
    ready = data.prepare(config(tmp_path, text, val_source=(str(folder),), max_documents=3))
    assert ready.tokenizer.decode(ready.train.tokens) == TEXT
    assert len(ready.val.doc_starts) == 3
    assert ready.tokenizer.decode(ready.val.tokens[:12]) == "Document 0: "


def test_several_sources_are_mixed(tmp_path, text, folder):
    cfg = config(tmp_path, text, folder, weights=(1.0, 3.0))
    ready = data.prepare(cfg)
    assert ready.train.n_sources == ready.val.n_sources == 2
    load = data.Loader(ready.train, cfg.data, batch_size=4, context_length=8, seed=0, vocab_size=99)
    starts = load.starts(0, 100)
    assert (starts >= ready.train.source_starts[1]).sum() == 300


def test_progress_and_description(tmp_path, folder):
    seen, lines = [], []
    ready = data.prepare(config(tmp_path, folder), progress=lambda *x: seen.append(x), log=lines.append)
    assert len(seen) == 12 and seen[-1][0] == seen[-1][1] and lines
    shown = "\n".join(data.describe(ready))
    for word in (
        "chars",
        "12 files",
        "documents held out:",
        "train",
        "val",
        "bytes per token",
        "uint16",
        "Document 0: ",
    ):
        assert word in shown
    assert json.dumps(ready.manifest)


def test_evaluation_covers_the_validation_text(tmp_path, text):
    ready = data.prepare(config(tmp_path, text))
    weight = sum(b.weights.sum() for b in data.eval_batches(ready.val, context_length=8, batch_size=4))
    assert weight == len(ready.val) - 1


# --- reuse


def test_the_second_run_reads_from_the_cache(tmp_path, text, monkeypatch):
    first = data.prepare(config(tmp_path, text))
    monkeypatch.setattr(tokenizers, "build", lambda *a: pytest.fail("built again"))
    second = data.prepare(config(tmp_path, text))
    assert first.manifest == second.manifest and first.train.fingerprint == second.train.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    moved = tmp_path / "elsewhere" / "text.txt"
    moved.parent.mkdir()
    text.rename(moved)  # the key does not depend on the folder
    assert data.prepare(config(tmp_path, moved)).manifest["key"] == first.manifest["key"]


def test_the_key_depends_on_settings_and_text(tmp_path, text):
    keys = [data.prepare(config(tmp_path, text)).manifest["key"]]
    keys.append(data.prepare(config(tmp_path, text, tokenizer="bytes")).manifest["key"])
    keys.append(data.prepare(config(tmp_path, text, tokenizer="bpe")).manifest["key"])
    keys.append(data.prepare(config(tmp_path, text, tokenizer="bpe", trained_size=290)).manifest["key"])
    keys.append(data.prepare(config(tmp_path, text, val_fraction=0.2)).manifest["key"])
    text.write_text(TEXT + "!")
    changed = data.prepare(config(tmp_path, text))
    keys.append(changed.manifest["key"])
    assert len(set(keys)) == 6 and stores(tmp_path) == sorted(keys)
    assert changed.tokenizer.decode(changed.val.tokens).endswith("!")


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.starts.npy", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_cache_is_detected_and_rebuilt(tmp_path, text, name, damage):
    cfg = config(tmp_path, text)
    good = data.prepare(cfg)
    tokens = np.array(good.train.tokens)  # a copy, because the damage would be visible through the memory map
    path = tmp_path / "cache" / "tokens" / good.manifest["key"] / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    lines = []
    rebuilt = data.prepare(cfg, log=lines.append)
    assert "damaged" in lines[0]
    assert rebuilt.manifest == good.manifest and stores(tmp_path) == [good.manifest["key"]]
    assert np.array_equal(rebuilt.train.tokens, tokens)


def test_partial_folders_of_killed_processes_are_removed_after_a_day(tmp_path, text):
    root = tmp_path / "cache" / "tokens"
    old = [root / name for name in (".partial-0123456789ab-a_b2c3d4", ".partial-damaged-abcdefgh", ".partial-download")]
    recent = root / ".partial-0123456789ab-abcdefgh"
    for folder in (*old, recent):
        folder.mkdir(parents=True)
    for folder in old:
        os.utime(folder, (time.time() - 2 * 24 * 3600,) * 2)
    ready = data.prepare(config(tmp_path, text))
    assert stores(tmp_path) == [
        recent.name,
        ".partial-download",
        ready.manifest["key"],
    ]  # .partial-download is not ours


def test_files_of_the_user_in_the_cache_are_kept(tmp_path, text):
    """Files next to the token folders stay. A damaged token folder that contains one is not deleted: it is an error."""
    cfg, notes = config(tmp_path, text), tmp_path / "cache" / "tokens" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    folder = notes.parent / data.prepare(cfg).manifest["key"]
    user_file = folder / "sub" / "mine.txt"
    user_file.parent.mkdir()
    user_file.write_text("mine")
    data.prepare(cfg)
    (folder / "train.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"train\.bin does not match.* did not write \(sub, sub/mine\.txt\).*cache_dir"):
        data.prepare(cfg)
    assert user_file.read_text() == notes.read_text() == "mine" and (folder / "train.bin").read_bytes() == b"x"
    shutil.rmtree(user_file.parent)
    data.prepare(cfg)
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(UserError, match="nothing was overwritten"):
        data.prepare(cfg)
    assert folder.read_text() == "a file"


def test_several_processes_at_once(tmp_path, folder):
    cfg = tmp_path / "cfg.yaml"
    cfg.write_text(to_yaml(config(tmp_path, folder)))
    code = "import sys; from gptjax import data, load_config as load; "
    code += "print(data.prepare(load(sys.argv[1])).train.fingerprint)"
    command = [sys.executable, "-c", code, str(cfg)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    prints = {worker.communicate(timeout=120)[0].splitlines()[-1] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(prints) == 1 and len(stores(tmp_path)) == 1


# --- mistakes


def test_a_text_that_is_too_short(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("only ten c")
    with pytest.raises(UserError, match="9 training tokens found, at least 65 needed"):
        data.prepare(config(tmp_path, path, context_length=64))
    path.write_text("")
    with pytest.raises(UserError, match=r"a\.txt.*no text.*at least 65"):
        data.prepare(config(tmp_path, path, context_length=64))
    path.write_text(" \n")
    with pytest.raises(UserError, match="at least 65 needed"):
        data.prepare(config(tmp_path, path, context_length=64))


def test_a_vocabulary_larger_than_the_model(tmp_path, text):
    with pytest.raises(UserError, match=r"257 ids and model\.vocab_size=100"):
        data.prepare(config(tmp_path, text, tokenizer="bytes", vocab_size=100))


def test_a_cache_that_cannot_be_written(tmp_path, text):
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"cannot write tokens to .*\n.*data\.cache_dir=FOLDER"):
        data.prepare(config(tmp_path, text))


def test_a_full_disk_leaves_no_partial_folder(tmp_path, text, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        data.prepare(config(tmp_path, text))
    assert stores(tmp_path) == []
