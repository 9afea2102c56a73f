"""Reads and writes the on-disk token cache, which holds the token ids of each split as a memory-mapped array.

    tokens/KEY/  train.bin  train.starts.npy  val.bin  val.starts.npy  tokenizer.json  manifest.json

A single rename moves a finished cache folder into place, so that a reader sees either the complete folder or no folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptjax import tokenizers
from gptjax.errors import UserError
from gptjax.files import json_sha256, sha256, sync, umask, write_text
from gptjax.tokenizers import Tokenizer

VERSION = 2
# Seconds after which an unfinished cache folder is deleted, because the process that wrote the cache folder must have
# died.
STALE_S = 24 * 3600
# Matches the names that `build` gives to unfinished cache folders. A folder whose name does not match PARTIAL may be
# the user's, and is never deleted.
PARTIAL = re.compile(r"\.partial-([0-9a-f]{12}|damaged)-\w{8}")
FILES = {f"{split}.{end}" for split in ("train", "val") for end in ("bin", "starts.npy")}
FILES |= {"tokenizer.json", "manifest.json", "manifest.json.partial"}


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The token ids of one split of the data, with all data sources concatenated.

    Attributes:
        tokens         [N] uint16 or uint32, memory-mapped if loaded from disk
        doc_starts     [n_docs] int64, index of each document's first token; doc_starts[0] == 0
        source_starts  [n_sources + 1] int64, source k is tokens[source_starts[k] : source_starts[k + 1]]
        n_bytes        number of UTF-8 bytes of the text, from which bits per byte are computed
        fingerprint    hash that identifies the tokens and the boundaries of documents and sources
        begin_id       id of the begin token, which precedes the text of a document: BOS, or the end-of-text token as
                       in GPT-2 (see `tokenizers.begin_id`). If the previous document ends with this token, that
                       occurrence is also the begin token of the document; otherwise the begin token is the document's
                       first token. None: there is no begin token
    """

    tokens: np.ndarray
    doc_starts: np.ndarray
    source_starts: np.ndarray
    n_bytes: int
    fingerprint: str
    begin_id: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_sources(self) -> int:
        return len(self.source_starts) - 1

    def begins_before(self, documents: np.ndarray) -> np.ndarray:
        """Returns whether the begin token of each document is the last token of the previous document.

        The array `documents` holds document indices, int64; the returned array of bool has the shape of `documents`.
        """
        if self.begin_id is None:
            return np.zeros(documents.shape, bool)
        first = self.doc_starts[documents]
        before = self.tokens[np.maximum(first, 1) - 1]
        return (first > 0) & (before == self.begin_id) & (self.tokens[first] != self.begin_id)

    @property
    def n_targets(self) -> int:
        """Returns the number of tokens that count for bits per byte: all tokens, except a begin token that is the first
        token of a document."""
        return len(self) - int(
            (self.tokens[self.doc_starts] == self.begin_id).sum() if self.begin_id is not None else 0
        )

    @staticmethod
    def from_ids(
        ids: Sequence[int] | np.ndarray,
        doc_starts: Sequence[int] | np.ndarray = (0,),
        source_starts: Sequence[int] | np.ndarray | None = None,
        n_bytes: int = 0,
        begin_id: int | None = None,
    ) -> TokenStore:
        """Makes a `TokenStore` from arrays in memory, for notebooks and tests.

        If `begin_id` is None, there are at least two documents, and all documents end with the same token, this last
        token is also used as the begin token, like the end-of-text token of GPT-2.
        """
        ids = np.asarray(ids)
        tokens = ids.astype(dtype_for(int(ids.max(initial=0)) + 1))
        starts = np.asarray(doc_starts, np.int64)
        sources = np.asarray([0, len(ids)] if source_starts is None else source_starts, np.int64)
        digest = hashlib.sha256(tokens.tobytes() + starts.tobytes() + sources.tobytes()).hexdigest()
        if begin_id is None and len(starts) > 1:
            last = tokens[np.append(starts[1:], len(tokens)) - 1]
            begin_id = int(last[0]) if (last == last[0]).all() else None
        return TokenStore(tokens, starts, sources, n_bytes, digest, begin_id)


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns the dtype in which token ids are stored: uint16 if all ids below `vocab_size` fit in uint16, else
    uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write(
    folder: Path,
    split: str,
    sources: Iterable[Iterable[tuple[str, bool, bool]]],
    tokenizer: Tokenizer,
    progress: Callable[[int], None],
) -> dict:
    """Encode texts, and write the token ids to `split`.bin and each document's start index to `split`.starts.npy.

    A text whose `ends` is true is followed by the end-of-text id, if the tokenizer has one. A text whose `begins` is
    true is preceded by the id of the begin token, unless the previous document ended with the same id, which then
    serves as both the end and the begin token. If a text contains the name of a special token, such as <|endoftext|>,
    the name is encoded as plain text, so that it does not end the document. Empty documents are skipped.

    Args:
        sources: for each source, an iterable of its documents, each a tuple (text, begins, ends) as in `Subset.source`.
        progress: function that is called with the number of UTF-8 bytes of each document, once it is encoded.

    Returns:
        A dict, the manifest's entry for this split.
    """
    dtype, digest = dtype_for(tokenizer.vocab_size), hashlib.sha256()
    starts, source_starts, shared = array("q"), [0], False
    begin_id, end_id = tokenizers.begin_id(tokenizer), tokenizer.eot_id
    n_tokens = n_bytes = n_characters = 0
    with open(folder / f"{split}.bin", "wb") as out:
        for texts in sources:
            for text, begins, ends in texts:
                if not text:
                    continue
                ids = tokenizer.encode_array(text, disallowed_special=()).astype(dtype, copy=False)
                if not len(ids):
                    continue
                before = [begin_id] if begins and not shared and begin_id is not None else []
                after = [end_id] if ends and end_id is not None else []
                shared = after == [begin_id]
                ids = np.concatenate([before, ids, after], dtype=dtype, casting="unsafe")
                data = ids.tobytes()
                out.write(data)
                digest.update(data)
                starts.append(n_tokens)
                size = len(text.encode("utf-8"))
                n_tokens, n_bytes, n_characters = n_tokens + len(ids), n_bytes + size, n_characters + len(text)
                progress(size)
            source_starts.append(n_tokens)
    np.save(folder / f"{split}.starts.npy", np.frombuffer(starts, np.int64))
    sync(folder / f"{split}.bin")
    sync(folder / f"{split}.starts.npy")
    return {
        "documents": len(starts),
        "tokens": n_tokens,
        "bytes": n_bytes,
        "characters": n_characters,
        "dtype": dtype.name,
        "source_starts": source_starts,
        "sha256": {"tokens": digest.hexdigest(), "starts": sha256(folder / f"{split}.starts.npy")},
    }


def open_split(folder: Path, split: str, manifest: dict, tokenizer: Tokenizer) -> TokenStore:
    entry = manifest[split]
    path, dtype = folder / f"{split}.bin", np.dtype(entry["dtype"])
    # The function np.asarray makes a plain array that shares the memory map, because indexing an np.memmap takes
    # several microseconds per call.
    tokens = np.asarray(np.memmap(path, dtype, "r")) if entry["tokens"] else np.zeros(0, dtype)
    return TokenStore(
        tokens,
        np.load(folder / f"{split}.starts.npy"),
        np.asarray(entry["source_starts"], np.int64),
        entry["bytes"],
        json_sha256(entry),
        tokenizers.begin_id(tokenizer),
    )


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json atomically. The key `manifest_sha256` of manifest.json holds the SHA-256 of all other
    entries, which include `version`."""
    body = dict(manifest, version=VERSION)
    body["manifest_sha256"] = _manifest_hash(body)
    write_text(folder / "manifest.json", json.dumps(body, indent=1, sort_keys=True))


def verify(folder: Path) -> tuple[dict | None, str]:
    """Returns (manifest, "") if the version and all hashes in the manifest are correct, else (None, error message)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["manifest_sha256"] != _manifest_hash(manifest):
            return None, "manifest.json was changed"
        if manifest["version"] != VERSION:
            return None, f"manifest version {manifest['version']}, this release writes {VERSION}"
        files = {f"{s}.bin": manifest[s]["sha256"]["tokens"] for s in ("train", "val")}
        files |= {f"{s}.starts.npy": manifest[s]["sha256"]["starts"] for s in ("train", "val")}
        files["tokenizer.json"] = manifest["tokenizer"]["fingerprint"]
        for name, digest in files.items():
            if sha256(folder / name) != digest:
                return None, f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""


def build(root: Path, key: str, make: Callable[[Path], dict], log: Callable[[str], None]) -> tuple[Path, dict]:
    """Returns the cache folder root/KEY, after verifying its files, and its manifest.

    A cache folder that is missing is built, and a cache folder that is damaged is built again. Several processes may
    build the same cache folder at once: each process fills a temporary folder, and the first rename wins.

    Args:
        make: function that writes all files into the folder it is given, and returns the manifest.

    Raises:
        UserError: the folder cannot be written (no space, no permission), or a damaged folder contains files that
            gptjax did not write.
    """
    folder = root / key
    if folder.exists():
        manifest, problem = verify(folder)
        if manifest:
            return folder, manifest
        _refuse_foreign(folder, problem)
        log(f"cached tokens in {folder} are damaged ({problem}): building them again")
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{key[:12]}-", dir=root))
    except OSError as error:
        raise _cannot_write(root, error) from error
    try:
        write_manifest(partial, make(partial))
        manifest, problem = verify(partial)
        if not manifest:
            raise UserError(f"the tokens just written to {root} cannot be read back ({problem}): check the disk")
        os.chmod(partial, 0o777 & ~umask())  # mkdtemp makes the folder private, but several users may share the cache
        return _publish(partial, folder, manifest)
    except OSError as error:
        raise _cannot_write(root, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path, manifest: dict) -> tuple[Path, dict]:
    for _ in range(3):
        try:
            os.rename(partial, folder)
            return folder, manifest
        except OSError:
            if not folder.exists():
                raise
        # The cache folder exists already, and is either complete, because another process was faster, or damaged.
        existing, _ = verify(folder)
        if existing:
            return folder, existing
        trash = Path(tempfile.mkdtemp(prefix=".partial-damaged-", dir=folder.parent))
        # FileNotFoundError is raised if another process has moved the cache folder.
        with contextlib.suppress(FileNotFoundError):
            # Renaming a folder is atomic, and a process that has opened files of the renamed folder can still read the
            # files.
            os.rename(folder, trash / "tokens")
        shutil.rmtree(trash, ignore_errors=True)
    raise UserError(f"{folder} cannot be replaced: delete it and start again")


def _refuse_foreign(folder: Path, problem: str) -> None:
    """Raise UserError if a cache folder that is about to be replaced contains files that `build` did not write."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")] if folder.is_dir() else [folder.name]
    if foreign := sorted({*names} - FILES):
        listed = ", ".join(foreign[:3]) + (", .." if len(foreign) > 3 else "")
        raise UserError(
            f"cached tokens in {folder} are damaged ({problem}), and it holds files that gptjax did not write "
            f"({listed}): nothing was overwritten; move them elsewhere, or choose another data.cache_dir=FOLDER"
        )


def _remove_stale(root: Path) -> None:
    for path in root.glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):
            if PARTIAL.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def _cannot_write(root: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write tokens to {root}: {error.strerror or error}\n"
        "  free some space or choose another folder with data.cache_dir=FOLDER"
    )


def _manifest_hash(manifest: dict) -> str:
    return json_sha256({key: value for key, value in manifest.items() if key != "manifest_sha256"})
