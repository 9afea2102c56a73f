"""Defines pre-tokenizers: regular expressions that split a text into words, which are then split into tokens.

    "We have 2024 reasons"   gpt2    We |  have |  2024 |  reasons
                             smollm  We |  have |   | 2 | 0 | 2 | 4 |  reasons
                             llama3  We |  have |   | 202 | 4 |  reasons

The module `bpe.py` runs the regular expressions of the pre-tokenizers in tiktoken, `hf.py` reads and writes the regular
expressions in a tokenizer.json, and `gguf.py` maps llama.cpp's names of pre-tokenizers (`tokenizer.ggml.pre`) to keys
of SCHEMES.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """A pre-tokenizer, which splits a text into words with a regular expression.

    Attributes:
        pattern: the regular expression for tiktoken, with possessive quantifiers where these do not change the result.
        split: the equivalent regular expression of the Split step in a Hugging Face tokenizer.json, spelled exactly as
            in the files of published models, because `hf.py` recognises a pre-tokenizer by comparing this string with
            the string in the file. None: the tokenizer.json has no Split step.
        cut: function (last, after) that returns True if a long run of whitespace may be split before its last
            character. `last` is the last character of the run, and `after` is the character that follows the run.
    """

    pattern: str
    split: str | None
    cut: Callable[[str, str], bool]


def _cl100k_like(digits: str, possessive: str) -> Scheme:
    """Return a pre-tokenizer that is similar to the pre-tokenizer of GPT-4's encoding cl100k_base.

    A word of letters may begin with one character that is neither a letter nor a digit nor a line end, such as a space.
    Line ends belong to the same word as the punctuation or whitespace before them.

    Args:
        digits: the part of the regular expression `split` that matches digits.
        possessive: the part of the regular expression `pattern` that matches digits.
    """
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    return Scheme(
        contractions + r"|[^\r\n\p{L}\p{N}]?+\p{L}++|" + possessive + r"| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s*[\r\n]|\s++$|\s+(?!\S)|\s",
        contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        lambda last, after: last not in "\r\n",
    )


SCHEMES: dict[str, Scheme] = {
    # In the pre-tokenizer gpt2, a word is the end of a contraction such as 'll, or whitespace, or a run of letters, of
    # digits or of other characters with the space before the run.
    "gpt2": Scheme(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        lambda last, after: True,
    ),
    # The pre-tokenizer smollm differs from gpt2 in that every digit is a separate word, and the whitespace before a
    # digit is one word.
    "smollm": Scheme(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s",
        None,
        lambda last, after: not unicodedata.category(after).startswith("N"),
    ),
    "llama3": _cl100k_like(r"\p{N}{1,3}", r"\p{N}{1,3}+"),
    "qwen2": _cl100k_like(r"\p{N}", r"\p{N}"),
}

# A word of the WordPiece and Unigram tokenizers is a run of up to 64 characters of one class (letters, digits,
# underscores, whitespace or other characters); the space before a run of non-whitespace characters is part of the word.
# The character `#` is always a separate word, because `##` at the beginning of a piece means that the piece does not
# begin a word.
SUBWORDS = re.compile(r"#| ?[^\W\d_]{1,64}| ?\d{1,64}| ?[^\s\w#]{1,64}| ?_{1,64}|\s{1,64}(?!\S)|\s")
