"""Functions that encode prompts, decode generated tokens, and stop generation at stop strings.

For example, `stop_strings` can end each completion at its first empty line:

    prompts = [prompt_ids(tokenizer, "Once upon a time")]
    until = stop_strings(tokenizer.decode, ["\\n\\n"])
    completions = complete(params, prompts, cfg, until=until, ..)
    texts = [cut(tokenizer.decode(c.tokens), ["\\n\\n"]) for c in completions]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gptjax._moved import moved_name
from gptjax.errors import UserError
from gptjax.tokenizers import Tokenizer, begin_id

Until = Callable[[list[int]], bool]
_INCOMPLETE = "\ufffd"  # An incomplete UTF-8 sequence is decoded to this Unicode replacement character.


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encodes a prompt, preceded by the beginning-of-text token if `tokenizer.add_bos` is set.

    An empty prompt is encoded as the beginning-of-text token alone (see `tokenizers.begin_id`). If the prompt contains
    the name of a special token, such as <|endoftext|>, the name is encoded as that token.

    Raises:
        UserError: the vocabulary cannot encode the text, or the prompt is empty and the tokenizer has no
            beginning-of-text token.
    """
    ids = tokenizer.encode(prompt, allowed_special="all")
    begin = begin_id(tokenizer)
    if begin is not None and (tokenizer.add_bos or not ids):
        ids = [begin, *ids]
    if not ids:
        raise UserError(f"the prompt is empty and {tokenizer.name} has no start token: give at least one character")
    return ids


def stop_strings(decode: Callable[[list[int]], str], strings: Sequence[str]) -> Until:
    """Returns a function for the argument `until` of `generate`, which ends a row once the generated text contains one
    of `strings`."""

    def until(tokens: list[int]) -> bool:
        text = decode(tokens)
        return len(cut(text, strings)) < len(text)

    return until


def cut(text: str, strings: Sequence[str]) -> str:
    """Returns the text before the first occurrence of any of the strings, or the whole text if the text contains none
    of the strings.

    Empty strings are ignored.
    """
    return text[: min((i for string in strings if string and (i := text.find(string)) >= 0), default=len(text))]


def text_chunks(
    tokens: Iterable[list[int]], decode: Callable[[list[int]], str], strings: Sequence[str] = ()
) -> Iterator[str]:
    """Decodes a stream of tokens, and yields chunks of text that can be printed immediately, up to the first stop
    string.

    An incomplete UTF-8 character is held back until the next tokens complete it. Text that may be the beginning of a
    stop string is held back until the next tokens show whether the stop string continues. When a stop string is found,
    decoding stops; if `tokens` is a generator, such as the result of `stream`, the generator is closed.
    """
    ids: list[int] = []
    shown = text = ""
    for new in tokens:
        ids += new
        text = decode(ids)
        if text.endswith(_INCOMPLETE):
            continue
        if len(cut(text, strings)) < len(text):
            getattr(tokens, "close", lambda: None)()
            break
        partial = (n for string in strings for n in range(1, len(string)) if text.endswith(string[:n]))
        ready = text[: len(text) - max(partial, default=0)]  # the text without a possible beginning of a stop string
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if rest := cut(text, strings)[len(shown) :]:
        yield rest


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
