"""Checks a data set before training for duplicates, near duplicates, secrets, personal data and outliers.

    files  = [records_of("train.jsonl"), records_of("test.jsonl")]
    report = check(files)                      a dict with all findings and their locations

The text of a record consists of all string values in the record, without the keys. In a .txt file each paragraph is a
record.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.split import normalized
from gptjax.errors import UserError, did_you_mean_path
from gptjax.files import user_path
from gptjax.formats import tables

MAX_PROBLEMS = 20
EXCERPT = 60  # Number of characters of a text that are shown in the report.
PERMUTATIONS, WORDS = 128, 3  # Number of hash permutations per MinHash signature; number of words per shingle.
OUTLIER = 3.5  # Robust z-score above which a loss is an outlier (Iglewicz and Hoaglin 1993)


class Texts(NamedTuple):
    """The records of one file; each record is a tuple of its location and its text."""

    file: str
    records: list[tuple[str, str]]


def records_of(file: str, field: str | None = None) -> Texts:
    """Read the texts of a .txt, .tsv, .csv, .json, .jsonl or .parquet file. Empty records are skipped.

    Args:
        field: key under which each record has its text. None: the text consists of all strings in the record.

    Raises:
        UserError: the file does not exist, has invalid records (the message lists the first 20), or has no text.
    """
    records, problems = [], []
    for location, row in _rows(file):
        if isinstance(row, UserError):
            problems.append(f"{location}: {row}")
        elif field is not None and field not in row:
            problems.append(f"{location}: no field {field!r}; there are {tables.names(row)}")
        elif text := "\n".join(_strings(row if field is None else row[field])).strip():
            records.append((location, text))
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise UserError.all(problems)
    if not records:
        raise UserError(f"{file}: no text in it")
    return Texts(file, records)


def _rows(file: str) -> Iterator[tuple[str, tables.Record | UserError]]:
    path = user_path(file)
    if path.suffix.lower() == ".tsv":
        return tables.tsv(file)
    if path.suffix.lower() != ".txt":
        return tables.read(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file{did_you_mean_path(file)}")
    return _paragraphs(file, path)


def _paragraphs(file: str, path: Path) -> Iterator[tuple[str, tables.Record]]:
    start, paragraph = 1, ""
    for number, line in enumerate(tables.lines(path), 1):
        if line.strip():
            start = start if paragraph else number
            paragraph += line
        elif paragraph:
            yield f"{file}:{start}", {"text": paragraph}
            paragraph = ""
    if paragraph:
        yield f"{file}:{start}", {"text": paragraph}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


# --- duplicates


def exact(texts: Sequence[Texts]) -> list[list[str]]:
    """Returns groups of records whose texts differ at most in case and whitespace. A group of records is a list of the
    locations of the records."""
    groups: dict[str, list[str]] = {}
    for file in texts:
        for location, text in file.records:
            groups.setdefault(normalized(text), []).append(location)
    return [group for group in groups.values() if len(group) > 1]


def near(texts: Sequence[Texts], threshold: float = 0.8) -> list[tuple[str, str, float]]:
    """Returns the two locations and the similarity of each pair of similar records, with the most similar pair first.

    The similarity is the Jaccard index of the records' sets of 3-word shingles (runs of 3 words), and a pair is
    returned if this index is at least the threshold. MinHash (Broder 1997) finds candidate pairs, and may miss a few
    per cent of the similar pairs; the similarity of each candidate is then computed exactly. A pair of records with the
    same text is left out.

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
    distinct = {(file.file, normalized(text)): location for file in texts for location, text in reversed(file.records)}
    for (_, text), location in distinct.items():
        shingles, minhash = _shingles(text), MinHash(num_perm=PERMUTATIONS)
        minhash.update_batch([shingle.encode() for shingle in shingles])
        for other in index.query(minhash):
            other_shingles, other_text = seen[other]
            similarity = len(shingles & other_shingles) / len(shingles | other_shingles)
            if similarity >= threshold and other_text != text:
                pairs.append((other, location, similarity))
        seen[location] = shingles, text
        index.insert(location, minhash)
    return sorted(pairs, key=lambda pair: -pair[2])


def _shingles(text: str) -> frozenset[str]:
    words = text.split()
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


# --- sensitive data


def _luhn(text: str) -> bool:
    """Returns whether `text` can be a card number: 13 to 19 digits, not all equal, with a correct Luhn checksum."""
    digits = [int(c) for c in text if c.isdecimal()]
    doubled = [n * 2 - 9 * (n > 4) if i % 2 else n for i, n in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    """Returns whether the check digits of an IBAN are correct (ISO 7064, modulo 97)."""
    text = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def _public(address: str) -> bool:
    """Returns whether an IPv4 address is valid and neither private nor reserved nor multicast."""
    octets = [int(octet) for octet in address.split(".")]
    private = octets[0] in (0, 10, 127) or octets[0] >= 224 or octets[:2] in ([192, 168], [169, 254])
    return all(octet < 256 for octet in octets) and not private and not (octets[0] == 172 and 16 <= octets[1] < 32)


# Maps each kind of secret or personal data to a regular expression and a function that checks whether a match is valid;
# None means that every match is valid. Every repetition in a regular expression is bounded, so that the time to search
# a text is linear in the length of the text.
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
    """Finds possible secrets and personal data in the texts of records.

    Returns a tuple (kind, location, masked text) for each secret or piece of personal data. The kind of a secret or of
    personal data is a key of PATTERNS; in the masked text, asterisks replace the middle of the match. A version number
    of four components, such as 1.2.3.4, is reported as an IP address.
    """
    findings = []
    for location, text in (record for file in texts for record in file.records):
        for kind, (pattern, is_valid) in PATTERNS.items():
            for match in re.finditer(pattern, text):
                secret = match[0]
                if is_valid is None or is_valid(secret):
                    n = min(4, len(secret) // 4)
                    hidden = secret[:n] + "*" * min(8, len(secret) - 2 * n) + secret[len(secret) - n :]
                    findings.append((kind, location, hidden))
    return findings


# --- the report


def outliers(losses: np.ndarray) -> list[int]:
    """Returns the indices of the losses that are more than 3.5 robust standard deviations from the median, furthest
    first.

    The robust standard deviation is the median absolute deviation, divided by 0.6745.
    """
    deviation = np.nan_to_num(losses - np.nanmedian(losses))
    robust_std = np.median(np.abs(deviation)) / 0.6745
    score = deviation / robust_std if robust_std > 0 else np.zeros_like(deviation)
    return sorted(np.flatnonzero(np.abs(score) > OUTLIER).tolist(), key=lambda i: -abs(score[i]))


def manifest(texts: Sequence[Texts]) -> list[dict[str, Any]]:
    """Returns the size in bytes, the SHA-256 and the numbers of records and characters of each file.

    For an `hf:` data set only the numbers of records and characters are returned.
    """
    rows = []
    for file in texts:
        counts = {"records": len(file.records), "characters": sum(len(text) for _, text in file.records)}
        if file.file.startswith("hf:"):
            rows.append({"file": file.file, **counts})
            continue
        path = Path(file.file).expanduser()
        digest = hashlib.sha256()
        with path.open("rb") as data:
            while chunk := data.read(1 << 20):
                digest.update(chunk)
        rows.append({"file": file.file, "bytes": path.stat().st_size, "sha256": digest.hexdigest(), **counts})
    return rows


def check(texts: Sequence[Texts], *, threshold: float | None = 0.8, losses: np.ndarray | None = None) -> dict[str, Any]:
    """Run all quality checks, and return the findings as a dict that can be written as JSON.

    Args:
        threshold: smallest similarity at which two records are reported as near duplicates. None: near duplicates are
            not searched for.
        losses: loss of every record in nats per token, in the order of the records. None: do not search for outliers of
            the loss.
    """
    records = [record for file in texts for record in file.records]
    text_of = dict(records)
    file_of = {location: file.file for file in texts for location, _ in file.records}
    groups, pairs = exact(texts), [] if threshold is None else near(texts, threshold)

    def across(locations: Sequence[str]) -> bool:
        """Returns whether the records at `locations` are from more than one file."""
        return len({file_of[location] for location in locations}) > 1

    report: dict[str, Any] = {
        "files": manifest(texts),
        "exact": [{"where": group, "across": across(group), "text": text_of[group[0]][:EXCERPT]} for group in groups],
        "near": [{"where": [a, b], "across": across([a, b]), "similarity": similarity, "text": text_of[b][:EXCERPT]}
                 for a, b, similarity in pairs],
        "sensitive": [{"kind": kind, "where": location, "hidden": hidden}
                      for kind, location, hidden in sensitive(texts)],
    }  # fmt: skip
    if losses is not None:
        report["outliers"] = [
            {"where": records[i][0], "loss": float(losses[i]), "text": records[i][1][:EXCERPT]}
            for i in outliers(losses)
        ]
    return report
