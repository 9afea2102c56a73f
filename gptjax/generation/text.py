"""From a prompt to ids, and from new tokens to text: where a stop string ends it, and what can be shown already.

prompts = [prompt_ids(tokenizer, "Once upon a time")]
until = stop_strings(tokenizer.decode, ["\\n\\n"])
done = complete(params, prompts, cfg, until=until, ..)
texts = [cut(tokenizer.decode(c.tokens), ["\\n\\n"]) for c in done]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from gptjax.errors import UserError
from gptjax.tokenizers import Tokenizer, begin_id

Until = Callable[[list[int]], bool]
_HALF = "\ufffd"  # what half a character decodes to


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, begun as the model's texts begin: with the beginning-of-text token, where the tokenizer asks
    for it. An empty prompt becomes `tokenizers.begin_id`. Special tokens may be spelled out.

    Raises:
        UserError: text that the vocabulary cannot hold; an empty prompt, where texts begin with no token.
    """
    ids = tokenizer.encode(prompt, allowed_special="all")
    begin = begin_id(tokenizer)
    if begin is not None and (tokenizer.add_bos or not ids):
        ids = [begin, *ids]
    if not ids:
        raise UserError(f"the prompt is empty and {tokenizer.name} has no start token: give at least one character")
    return ids


def stop_strings(decode: Callable[[list[int]], str], strings: Sequence[str]) -> Until:
    """Whether the text of a row's new tokens holds one of the strings."""

    def until(tokens: list[int]) -> bool:
        text = decode(tokens)
        return len(cut(text, strings)) < len(text)

    return until


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings in it; all of it where there is none. Empty strings do not count."""
    return text[: min((at for string in strings if string and (at := text.find(string)) >= 0), default=len(text))]


def pieces(
    tokens: Iterable[list[int]], decode: Callable[[list[int]], str], strings: Sequence[str] = ()
) -> Iterator[str]:
    """The text of tokens that come a few at a time, in pieces that can be shown at once; it ends before a stop string.

    Half a character waits for its other half, and the beginning of what may become a stop string for what follows.
    At a stop string the tokens are closed, if they are a generator such as `stream`.
    """
    read: list[int] = []
    shown = text = ""
    for new in tokens:
        read += new
        text = decode(read)
        if text.endswith(_HALF):
            continue
        end = cut(text, strings)
        if len(end) < len(text):
            getattr(tokens, "close", lambda: None)()
            break
        begun = (n for string in strings for n in range(1, len(string)) if text.endswith(string[:n]))
        ready = text[: len(text) - max(begun, default=0)]  # the end of it may be the beginning of a stop string
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if rest := cut(text, strings)[len(shown) :]:
        yield rest
