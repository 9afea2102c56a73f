"""`gptjax chat MODEL`: a conversation on the terminal, with history."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.cli import options
from gptjax.cli.sample import configure
from gptjax.types import UserError

HELP = "/system TEXT sets the system prompt, /new forgets the conversation, /quit ends it"
EVERY = 4  # tokens between two looks at the screen


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=1)
    if not parsed.words:
        raise UserError("which model? expected: gptjax chat MODEL [system=TEXT] [temperature=X ...]")
    system = [leaf.value for leaf in parsed.leaves if leaf.key == "system"]
    cfg, _ = configure(parsed.words[0], [leaf for leaf in parsed.leaves if leaf.key != "system"])
    from gptjax.generation import for_decoding
    from gptjax.ops.quant import quantize
    from gptjax.training.process import use_compile_cache
    from gptjax.weights import open_model

    use_compile_cache()
    model = open_model(parsed.words[0])
    tokenizer = model.tokenizer()
    if not tokenizer.chat_template:
        raise UserError(f"{model.where} has no chat template: it was not tuned for conversations; use gptjax sample")
    options.note(f"{model.where}: {model.kind}, {model.cfg.n_layer} layers, context {model.cfg.context_length:,}")
    params = for_decoding(quantize(model.params("float32", None), cfg.sample.quantize), model.cfg)
    talk(Chat(params, model.cfg, tokenizer, cfg.sample, system[-1] if system else None), sys.stdin.isatty())
    return 0


class Chat:
    """The conversation so far, and how the next answer is made."""

    def __init__(self, params: Any, cfg: Any, tokenizer: Any, settings: Any, system: str | None) -> None:
        self.params, self.cfg, self.tokenizer, self.settings = params, cfg, tokenizer, settings
        self.system, self.turns = system, []
        self.answered = 0

    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces, as it is made; afterwards it belongs to the conversation."""
        import jax

        from gptjax.generation import cut, from_config, pieces, stop_strings, stream
        from gptjax.weights import stop_ids

        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except UserError:
            self.turns.pop()
            raise
        tokens: list[int] = []
        self.answered += 1
        settings, decode = self.settings, self.tokenizer.decode

        def new_tokens() -> Iterator[list[int]]:
            for new in stream(
                self.params, ids, self.cfg, max_new_tokens=settings.max_new_tokens, every=EVERY,
                key=jax.random.fold_in(jax.random.key(settings.seed), self.answered), sampler=from_config(settings),
                stop=stop_ids(self.tokenizer), vocab_size=self.tokenizer.vocab_size, cache_dtype=settings.cache_dtype,
                until=stop_strings(decode, settings.stop) if settings.stop else None,
            ):  # fmt: skip
                tokens.extend(new)
                yield new

        yield from pieces(new_tokens(), decode, settings.stop)
        self.turns.append({"role": "assistant", "content": cut(decode(tokens), settings.stop)})
        self.count = len(tokens)

    def _prompt(self) -> list[int]:
        """The conversation as ids; the oldest turns go where it would not leave room for an answer."""
        from gptjax.tokenizers.chat import encode_chat

        room = self.cfg.context_length - min(self.settings.max_new_tokens, self.cfg.context_length // 2)
        while True:
            ids = encode_chat(self.tokenizer, self.messages())
            if len(ids) <= room or len(self.turns) == 1:
                return ids
            del self.turns[:2]
            options.note("(the context is full: the oldest turn is forgotten)")


def talk(chat: Chat, terminal: bool, read: Callable[[str], str] = input) -> None:
    """Questions from the terminal or a pipe, answers as they come, until the input ends."""
    if terminal:
        options.note(HELP)
    while True:
        try:
            text = read("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/new":
            chat.turns.clear()
        elif command == "/system":
            chat.system = rest or None
        elif command.startswith("/"):
            options.note(HELP)
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    started = first = time.monotonic()
    try:
        for at, piece in enumerate(chat.ask(text)):
            first = time.monotonic() if not at else first
            print(piece, end="", flush=True)
    except UserError as error:
        options.note(f"error: {error}")
        return
    except KeyboardInterrupt:
        print()
        options.note("(stopped)")
        if chat.turns and chat.turns[-1]["role"] == "user":
            chat.turns.pop()
        return
    print(flush=True)
    seconds = max(time.monotonic() - first, 1e-9)
    rate = max(chat.count - EVERY, 0) / seconds
    options.note(f"[{chat.count} tokens, first after {first - started:.1f} s, then {rate:.0f} tok/s]")
