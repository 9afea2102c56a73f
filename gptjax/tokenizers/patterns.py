"""Pre-tokenizers: the regular expressions that cut a text into words, which are then cut into tokens.

    "We have 2024 reasons"   gpt2    We |  have |  2024 |  reasons
                             smollm  We |  have |   | 2 | 0 | 2 | 4 |  reasons
                             llama3  We |  have |   | 202 | 4 |  reasons

`bpe.py` runs them in tiktoken; `hf.py` finds them in a tokenizer.json and writes them there; `gguf.py` maps the names
that llama.cpp has for them (`tokenizer.ggml.pre`) to these.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """One way to cut text into words.

    pattern: the regular expression for tiktoken, possessive where that changes nothing.
    split: the same words by the regular expression of a Split step in Hugging Face's tokenizer.json, letter by letter
        as models have it; None: other steps cut there.
    cut: may a long run of blanks be cut before its last one? Asked with that blank and the character after it.
    """

    pattern: str
    split: str | None
    cut: Callable[[str, str], bool]


def _cl100k_like(digits: str, possessive: str) -> Scheme:
    """Any one character goes with the letters after it, line ends with the marks or blanks before them."""
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    return Scheme(
        contractions + r"|[^\r\n\p{L}\p{N}]?+\p{L}++|" + possessive + r"| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s*[\r\n]|\s++$|\s+(?!\S)|\s",
        contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        lambda last, after: last not in "\r\n",
    )


SCHEMES: dict[str, Scheme] = {
    "gpt2": Scheme(  # contractions, letters, digits, the rest (each with the space before it), white space
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        lambda last, after: True,
    ),
    "smollm": Scheme(  # each digit stands alone; blanks before one stay together
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s",
        None,
        lambda last, after: not unicodedata.category(after).startswith("N"),
    ),
    "llama3": _cl100k_like(r"\p{N}{1,3}", r"\p{N}{1,3}+"),
    "qwen2": _cl100k_like(r"\p{N}", r"\p{N}"),
}

# Of our WordPiece and Unigram: letters, digits, the rest (each with the blank before it), white space. `#` stands
# alone: no word starts with `##`.
SUBWORDS = re.compile(r"#| ?[^\W\d_]{1,64}| ?\d{1,64}| ?[^\s\w#]{1,64}| ?_{1,64}|\s{1,64}(?!\S)|\s")
