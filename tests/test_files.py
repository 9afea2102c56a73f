"""Files are written atomically, and the hash functions whose results are stored on disk do not change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import weights
from gptjax.errors import UserError, did_you_mean_path
from gptjax.files import json_sha256, replacing, sha256, sync, write_json, write_text


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_what_is_cut_off_changes_nothing_and_leaves_nothing(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), replacing(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "half a character: \ud800")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_it_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync"))
    monkeypatch.setattr(
        os, "replace", lambda source, target, real=os.replace: (done.append("rename"), real(source, target))
    )
    write_json(tmp_path / "a", {"b": "é"})
    assert done == ["fsync", "rename"] and (tmp_path / "a").read_bytes() == '{\n "b": "é"\n}\n'.encode()


def test_several_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with replacing(path, shared=True) as first, replacing(path) as second:
        first.write(b"1" * 9)
        second.write(b"2" * 5)
    assert path.read_bytes() == b"1" * 9 and os.listdir(tmp_path) == ["a"]


def test_a_run_that_was_killed_while_it_wrote_a_file_can_start_again(tmp_path):
    """The run directory contains a partial file, which `refuse_foreign` accepts."""
    from gptjax.training.run_dir import refuse_foreign

    code = (
        "import os, pathlib\nfrom gptjax.files import replacing\nwith replacing(pathlib.Path('loss.png')): os._exit(9)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    refuse_foreign(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
def test_the_umask_says_who_may_read(tmp_path):
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_hashes_on_disk_stay_valid(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    value = {"b": [1, 2.5, None], "a": "é"}  # hashed as '{"a": "\\u00e9", "b": [1, 2.5, null]}'
    assert json_sha256(value) == "fc10ba9755cfc69ce6c336075dcaa7bec5e27a5e3b43810a5952cd761f259a45"
    assert json_sha256(dict(reversed(value.items()))) == json_sha256(value)


def test_a_folder_is_synced_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    (tmp_path / "a").write_text("")
    for path in (tmp_path, tmp_path / "a"):
        sync(path)
    assert len(synced) == 2


def test_a_missing_path_names_the_nearest_one_beside_it(tmp_path):
    (tmp_path / "default").mkdir()
    assert did_you_mean_path(tmp_path / "defualt") == f"; did you mean {tmp_path / 'default'}?"
    assert did_you_mean_path(tmp_path / "x") == did_you_mean_path(tmp_path / "absent" / "default") == ""
    with pytest.raises(UserError, match="did you mean .*default"):
        weights.open_model(str(tmp_path / "defualt"))
