"""What is wrong with a data set before it is trained on: repetitions, near ones, secrets and personal data.

    files  = [records_of("train.jsonl"), records_of("test.jsonl")]
    report = check(files)                      counts, and where each finding stands

A record's text is what it holds of text, its keys aside; a paragraph of a .txt file is a record.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.split import normalized
from gptjax.errors import UserError
from gptjax.files import user_path
from gptjax.formats import tables

MAX_PROBLEMS, EXCERPT, PERMUTATIONS, WORDS = 20, 60, 128, 3
OUTLIER = 3.5  # robust z-score (Iglewicz and Hoaglin 1993)


class Texts(NamedTuple):
    """A file, and its records as (where, text)."""

    file: str
    found: list[tuple[str, str]]


def records_of(file: str, field: str | None = None) -> Texts:
    """Of a .txt, .tsv, .csv, .json, .jsonl or .parquet file; `field`: of this key alone.

    Raises:
        UserError: no such file, broken records (the first 20), none at all.
    """
    found, problems = [], []
    for where, row in _rows(file):
        if isinstance(row, UserError):
            problems.append(f"{where}: {row}")
        elif field is not None and field not in row:
            problems.append(f"{where}: no field {field!r}; there are {tables.names(row)}")
        elif text := "\n".join(_strings(row if field is None else row[field])).strip():
            found.append((where, text))
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise UserError.all(problems)
    if not found:
        raise UserError(f"{file}: no text in it")
    return Texts(file, found)


def _rows(file: str) -> Iterator[tuple[str, tables.Record | UserError]]:
    path = user_path(file)
    if path.suffix.lower() == ".tsv":
        return tables.tsv(file)
    if path.suffix.lower() != ".txt":
        return tables.read(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    return _paragraphs(file, path)


def _paragraphs(file: str, path: Path) -> Iterator[tuple[str, tables.Record]]:
    start, held = 1, ""
    for number, line in enumerate(tables.lines(path), 1):
        if line.strip():
            start = start if held else number
            held += line
        elif held:
            yield f"{file}:{start}", {"text": held}
            held = ""
    if held:
        yield f"{file}:{start}", {"text": held}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


# --- repetitions


def exact(texts: Sequence[Texts]) -> list[list[str]]:
    """Groups of records with the same text but for case and blanks, as their places."""
    groups: dict[str, list[str]] = {}
    for file in texts:
        for where, text in file.found:
            groups.setdefault(normalized(text), []).append(where)
    return [group for group in groups.values() if len(group) > 1]


def near(texts: Sequence[Texts], threshold: float = 0.8) -> list[tuple[str, str, float]]:
    """(place, place, Jaccard similarity of their runs of three words) of pairs at or above the threshold, which are not
    the same text. Candidates by MinHash (Broder 1997), of which a few per cent can be missed; each is then verified.

    Raises:
        UserError: the datasketch library is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise UserError(
            "near duplicates need datasketch: pip install -e '.[check]' in the checkout, or near=false"
        ) from error
    index, pairs = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS), []
    seen: dict[str, tuple[frozenset[str], str]] = {}
    distinct = {(file.file, normalized(text)): where for file in texts for where, text in reversed(file.found)}
    for (_, text), where in distinct.items():
        shingles, own = _shingles(text), MinHash(num_perm=PERMUTATIONS)
        own.update_batch([shingle.encode() for shingle in shingles])
        for key in index.query(own):
            other, other_text = seen[key]
            similarity = len(shingles & other) / len(shingles | other)
            if similarity >= threshold and other_text != text:
                pairs.append((key, where, similarity))
        seen[where] = shingles, text
        index.insert(where, own)
    return sorted(pairs, key=lambda pair: -pair[2])


def _shingles(text: str) -> frozenset[str]:
    words = text.split()
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


# --- what should not be there


def _luhn(digits: str) -> bool:
    numbers = [int(c) for c in digits if c.isdecimal()]
    doubled = [n * 2 - 9 * (n > 4) if i % 2 else n for i, n in enumerate(reversed(numbers))]
    return 13 <= len(numbers) <= 19 and len(set(numbers)) > 1 and sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    text = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def _public(address: str) -> bool:
    parts = [int(part) for part in address.split(".")]
    private = parts[0] in (0, 10, 127) or parts[0] >= 224 or parts[:2] in ([192, 168], [169, 254])
    return all(part < 256 for part in parts) and not private and not (parts[0] == 172 and 16 <= parts[1] < 32)


# name -> (pattern, what else must hold); every repetition is bounded, so that the time is linear in the text
PATTERNS: dict[str, tuple[str, Callable[[str], bool] | None]] = {
    "AWS key": (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", None),
    "GitHub token": (r"\bgh[pousr]_[A-Za-z0-9]{36,80}\b|\bgithub_pat_\w{40,100}\b", None),
    "OpenAI or Anthropic key": (r"\bsk-[A-Za-z0-9_-]{20,200}", None),
    "Slack token": (r"\bxox[abprs]-[A-Za-z0-9-]{10,100}", None),
    "Google key": (r"\bAIza[0-9A-Za-z_-]{35}\b", None),
    "private key": (r"-----BEGIN (?:[A-Z]{1,12} ){0,2}PRIVATE KEY-----", None),
    "JSON web token": (r"\beyJ[\w-]{8,2000}\.eyJ[\w-]{8,2000}\.[\w-]{8,1000}", None),
    "e-mail address": (r"\b[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}\b", None),
    "IBAN": (r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b", _iban),
    "card number": (r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])", _luhn),
    "US social security number": (r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])", None),
    "phone number": (r"(?<![\w+])\+\d{1,3}[ -]?(?:\(\d{1,4}\)[ -]?)?\d(?:[ -]?\d){6,11}(?!\d)", None),
    "public IP address": (r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])", _public),
}


def sensitive(texts: Sequence[Texts]) -> list[tuple[str, str, str]]:
    """(kind, place, what was found with its middle hidden). A version of four numbers looks like an address."""
    found = []
    for where, text in (one for file in texts for one in file.found):
        for kind, (pattern, holds) in PATTERNS.items():
            for match in re.finditer(pattern, text):
                secret = match[0]
                if holds is None or holds(secret):
                    n = min(4, len(secret) // 4)
                    hidden = secret[:n] + "*" * min(8, len(secret) - 2 * n) + secret[len(secret) - n :]
                    found.append((kind, where, hidden))
    return found


# --- all of it


def outliers(losses: np.ndarray) -> list[int]:
    """Rows whose loss lies more than 3.5 robust standard deviations from the median, the furthest first."""
    off = np.nan_to_num(losses - np.nanmedian(losses))
    spread = np.median(np.abs(off)) / 0.6745
    score = off / spread if spread > 0 else np.zeros_like(off)
    return sorted(np.flatnonzero(np.abs(score) > OUTLIER).tolist(), key=lambda i: -abs(score[i]))


def manifest(texts: Sequence[Texts]) -> list[dict[str, Any]]:
    """Where the data come from: of each file its bytes, SHA-256, records and characters."""
    rows = []
    for file in texts:
        path = Path(file.file).expanduser()
        digest = hashlib.sha256()
        with path.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
        size = {"records": len(file.found), "characters": sum(len(text) for _, text in file.found)}
        rows.append({"file": file.file, "bytes": path.stat().st_size, "sha256": digest.hexdigest(), **size})
    return rows


def check(texts: Sequence[Texts], *, threshold: float | None = 0.8, losses: np.ndarray | None = None) -> dict[str, Any]:
    """Everything found, as JSON has it.

    Args:
        threshold: of `near`; None: not looked for. losses: nats a token of every record, in order.
    """
    places = [one for file in texts for one in file.found]
    text_of = dict(places)
    file_of = {where: file.file for file in texts for where, _ in file.found}
    groups, pairs = exact(texts), [] if threshold is None else near(texts, threshold)

    def across(some: Sequence[str]) -> bool:
        return len({file_of[where] for where in some}) > 1

    report: dict[str, Any] = {
        "files": manifest(texts),
        "exact": [{"where": group, "across": across(group), "text": text_of[group[0]][:EXCERPT]} for group in groups],
        "near": [{"where": [a, b], "across": across([a, b]), "similarity": s, "text": text_of[b][:EXCERPT]}
                 for a, b, s in pairs],
        "sensitive": [{"kind": kind, "where": where, "hidden": hidden} for kind, where, hidden in sensitive(texts)],
    }  # fmt: skip
    if losses is not None:
        report["outliers"] = [
            {"where": places[i][0], "loss": float(losses[i]), "text": places[i][1][:EXCERPT]} for i in outliers(losses)
        ]
    return report
