"""`gptjax chat MODEL`: holds a conversation with a model in the terminal."""

from __future__ import annotations

import importlib
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from gptjax.cli import options
from gptjax.cli.manual import PAGES
from gptjax.cli.sample import configure
from gptjax.config import ModelConfig, SampleConfig
from gptjax.errors import UserError
from gptjax.signals import catch_signals

if TYPE_CHECKING:
    from gptjax.tokenizers import Tokenizer
    from gptjax.types import Params

HELP = "/system TEXT sets the system prompt, /new starts a new conversation, /quit exits"
EVERY = 4  # Number of tokens that are generated between two updates of the screen.
QUIET_S = 0.4  # Seconds without a new token after which a progress line such as `... compiling, 3 s` appears.
READS = PAGES["chat"].settings


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=1, example="temperature=0 or system=TEXT")
    if not parsed.words:
        raise UserError("which model? expected: gptjax chat MODEL [system=TEXT] [temperature=X ...]")
    system = [leaf.value for leaf in parsed.leaves if leaf.key == "system"]
    leaves = [leaf for leaf in parsed.leaves if leaf.key != "system"]
    options.refuse_others(leaves, ("system", *READS), "chat", "sample.")
    cfg, provenance = configure(parsed.words[0], leaves)
    if options.show_only(parsed, cfg, provenance, lambda cfg: ["dry run: the model was not read"], READS):
        return 0
    from gptjax.generation import for_decoding
    from gptjax.model.gpt import refuse_classifier
    from gptjax.ops.quant import quantize
    from gptjax.training.process import use_compile_cache
    from gptjax.weights import open_model

    use_compile_cache()
    model = open_model(parsed.words[0])
    refuse_classifier(model.cfg, parsed.words[0])
    tokenizer = model.tokenizer()
    if not tokenizer.chat_template:
        raise UserError(
            f"{model.location} has no chat template: it was not tuned for chat; use gptjax sample, or fine-tune it: "
            "gptjax finetune instruct, which stores the template with the model"
        )
    options.note(f"{model.location}: {model.kind}, {model.cfg.n_layer} layers, context {model.cfg.context_length:,}")
    params = for_decoding(quantize(model.params("float32", None), cfg.sample.quantize), model.cfg)
    talk(Chat(params, model.cfg, tokenizer, cfg.sample, system[-1] if system else None), sys.stdin.isatty())
    return 0


class Chat:
    """A conversation with a model: the messages so far, and the model and the sampling settings that generate the next
    answer."""

    def __init__(
        self, params: Params, cfg: ModelConfig, tokenizer: Tokenizer, settings: SampleConfig, system: str | None
    ) -> None:
        from gptjax.tokenizers.chat import answer_ends

        self.params, self.cfg, self.tokenizer, self.settings = params, cfg, tokenizer, settings
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.answered = 0
        self.stop = answer_ends(tokenizer)

    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> Iterator[str]:
        """Generates the answer to a question, yields the text of the answer in chunks while it is generated, and
        appends the question and the whole answer to the conversation."""
        import jax

        from gptjax.generation import cut, from_config, stop_strings, stream, text_chunks
        from gptjax.tokenizers.chat import encode_chat, plain_text

        settings = self.settings
        max_prompt = self.cfg.context_length - min(settings.max_new_tokens, self.cfg.context_length // 2)
        self.turns.append({"role": "user", "content": text})
        try:  # The oldest turns are dropped until the prompt leaves room for an answer in the context.
            while len(ids := encode_chat(self.tokenizer, self.messages())) > max_prompt and len(self.turns) > 1:
                del self.turns[:2]
                options.note("(the context is full: the oldest turn is forgotten)")
        except UserError:
            self.turns.pop()
            raise
        tokens: list[int] = []
        self.answered += 1

        def decode(ids: list[int]) -> str:
            return plain_text(self.tokenizer, ids)

        def new_tokens() -> Iterator[list[int]]:
            for new in stream(
                self.params, ids, self.cfg, max_new_tokens=settings.max_new_tokens, every=EVERY,
                key=jax.random.fold_in(jax.random.key(settings.seed), self.answered), sampler=from_config(settings),
                stop=self.stop, vocab_size=self.tokenizer.vocab_size, cache_dtype=settings.cache_dtype,
                until=stop_strings(self.tokenizer.decode, settings.stop) if settings.stop else None,
            ):  # fmt: skip
                tokens.extend(new)
                yield new

        yield from text_chunks(new_tokens(), decode, settings.stop)
        self.turns.append({"role": "assistant", "content": cut(decode(tokens), settings.stop)})
        self.count = len(tokens)


def talk(chat: Chat, terminal: bool, read: Callable[[str], str] = input) -> None:
    """Reads questions from the terminal or a pipe, and prints the answers while they are generated, until the input
    ends."""
    if terminal:
        with suppress(ImportError):
            importlib.import_module("readline")  # readline adds line editing and a history to `input`
        options.note(HELP)
    while True:
        try:
            text = read("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            with catch_signals() as signals:
                signals.forget()
            print()
            return
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/new":
            chat.turns.clear()
            options.note("(a new conversation)")
        elif command == "/system":
            chat.system = rest.strip() or None
            options.note(f"(system prompt: {chat.system})" if chat.system else "(no system prompt)")
        elif command.startswith("/"):
            options.note(HELP)
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    wrap = Wrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    started = first = time.monotonic()
    waiting = Waiting("reading" if chat.answered else "compiling")
    try:
        with waiting:
            for i, piece in enumerate(chat.ask(text)):
                first = time.monotonic() if not i else first
                waiting.end()
                print(wrap.feed(piece) if wrap else piece, end="", flush=True)
        print(wrap.rest() if wrap else "", flush=True)
    except UserError as error:
        options.note(f"error: {error}")
        return
    except KeyboardInterrupt:
        with catch_signals() as signals:
            signals.forget()
        print(wrap.rest() if wrap else "")
        options.note("(stopped)")
        if chat.turns and chat.turns[-1]["role"] == "user":
            chat.turns.pop()
        return
    wait_s, decode_s, n_decoded = first - started, time.monotonic() - first, chat.count - EVERY
    tokens = f"{chat.count} token{'' if chat.count == 1 else 's'}"
    # The printed tokens per second do not count the tokens of the first screen update, because the time before the
    # first update includes the compilation and the prefill of the prompt.
    if n_decoded <= 0 or decode_s <= 0:
        options.note(f"[{tokens} after {wait_s + decode_s:.1f} s]")
    else:
        options.note(f"[{tokens}, first after {wait_s:.1f} s, then {n_decoded / decode_s:.0f} tok/s]")


class Waiting:
    """Shows a progress line such as `... compiling, 3 s` on stderr until `end` is called. If stderr is not a terminal,
    no progress line is shown."""

    def __init__(self, label: str) -> None:
        self._label, self._done, self._shown = label, threading.Event(), False
        self._thread = threading.Thread(target=self._show, daemon=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Waiting:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Erases the progress line. If `end` is called twice, the second call does nothing."""
        if self._thread and not self._done.is_set():
            self._done.set()
            self._thread.join()
            if self._shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        started, wait_s = time.monotonic(), QUIET_S
        while not self._done.wait(wait_s):
            self._shown, wait_s = True, 1.0
            line = f"... {self._label}, {time.monotonic() - started:.0f} s"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)


class Wrap:
    """Breaks streamed text between words into lines of at most `width` columns."""

    def __init__(self, width: int) -> None:
        self._width, self._column = max(width, 20), 0
        self._blanks = self._word = ""

    def feed(self, piece: str) -> str:
        """Adds the next piece of the streamed text, and returns the text that can be printed now. The last word of each
        piece is held back, because the word may continue in the next piece."""
        out = ""
        for char in piece:
            if char == "\n":
                out += self._place() + "\n"
                self._column, self._blanks = 0, ""
            elif char.isspace():
                out += self._place()
                self._blanks += char
            else:
                self._word += char
                # Each wide character, such as a Chinese character, counts as a word, because scripts with wide
                # characters have no spaces between words.
                if columns(char) == 2 or columns(self._word) >= self._width:
                    out += self._place()
        return out

    def rest(self) -> str:
        return self._place()

    def _place(self) -> str:
        if not self._word:
            return ""
        text, self._word, blanks, self._blanks = self._word, "", self._blanks, ""
        if self._column and self._column + columns(blanks + text) > self._width:
            self._column = columns(text)
            return "\n" + text
        self._column += columns(blanks + text)
        return blanks + text


def columns(text: str) -> int:
    """Returns the number of terminal columns that the text occupies."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
