"""Conversations from files, and the token ids that a model learns of them.

    talks   = read("instruction-data.json")
    pieces  = render(talks[0], tok)      [Piece(ids of the prompt, False), Piece(ids of the answer and its end, True)]
    encoded = encode(talks, tok, context_length=256)
    rows    = packing.packed(encoded, 256)

What is learned is known by its place in the conversation, never by token ids: the token that ends an answer is learned
although padding, or the user's turn, may hold the same id.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.data import records, sources
from gptjax.tokenizers import chat
from gptjax.tokenizers.base import Tokenizer, found_in
from gptjax.types import UserError

STYLES = ("chat", "alpaca", "phi3")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # what ShareGPT calls them
MAX_PROBLEMS = 20
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TOGETHER = 2048  # texts that one process renders: it takes 0.1 s to start, a text less than a millisecond
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"

Style = Literal["chat", "alpaca", "phi3"]


class Conversation(NamedTuple):
    """[system,] user, assistant, user, assistant, ..: {"role": .., "content": ..}, from `where` in a source.

    An Alpaca record's input, where it has one, is the user's "input" beside the "content". A record's "constraints" say
    what can be checked of an answer.
    """

    messages: tuple[dict[str, str], ...]
    where: str
    constraints: tuple[Any, ...] = ()


class Piece(NamedTuple):
    ids: list[int]
    learn: bool


class Encoded(NamedTuple):
    """Examples as ids [n] int32, and how much each counts as a target [n] float32 (the first id never is one)."""

    rows: list[np.ndarray]
    weights: list[np.ndarray]
    dropped: int  # examples that did not fit


# --- records


def read(source: str) -> list[Conversation]:
    """The conversations of a .json (array), .jsonl, .parquet or .csv file, or of hf:org/name[:config][@split].

    Each record is one of `FORMATS`, whatever other keys it has.

    Raises:
        UserError: no such file; records that are broken, of no known format or without a response: the first 20.
    """
    return [talk for (talk,) in read_as(source, FORMATS)]


def read_as(source: str, formats: Formats) -> list[tuple[Conversation, ...]]:
    """The conversations of each record, as many as its format reads there. Errors as of `read`."""
    found: list[tuple[Conversation, ...]] = []
    problems: list[str] = []
    unknown = False
    try:
        for where, record in records.read(source):
            fits = [] if isinstance(record, UserError) else [f for f in formats if all(key in record for key in f)]
            fits = [keys for keys in fits if not any(set(keys) < set(others) for others in fits)]
            if isinstance(record, UserError):
                problems.append(f"{where}: {record}")
            elif len(fits) != 1:
                unknown = True
                what = "several formats at once" if fits else "no known format"
                problems.append(f"{where}: the keys {_keys(record)} are {what}")
            else:
                read = formats[fits[0]][1](record)
                sides = read if isinstance(read, tuple) else (read,)
                if wrong := dict.fromkeys(line for side in sides for line in _wrong(side)):
                    problems += [f"{where}: {line}" for line in wrong]
                else:
                    more = record.get("constraints")
                    more = tuple(more) if isinstance(more, list) else ()
                    found.append(tuple(Conversation(tuple(m for _, m in side), where, more) for side in sides))
            if len(problems) >= MAX_PROBLEMS:
                problems.append("... there may be more")
                break
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if problems:
        known = ["known formats, one in each record:", *(f"  {shape}" for shape, _ in formats.values())]
        raise UserError.all(problems + known * unknown)
    if not found:
        raise UserError(f"{source}: no records")
    return found


def _keys(record: dict) -> str:
    shown = [str(key) for key in list(record)[:10]]
    return (", ".join(shown) or "(none)") + ", .." * (len(record) > 10)


Turns = list[tuple[str, dict[str, Any]]]  # where in its record a message stands, and the message, not yet checked


Formats = dict[tuple[str, ...], tuple[str, Callable[[dict], Any]]]  # keys -> how it looks, its reader


def _pair(question: str, answer: str, extra: str = "") -> Callable[[dict], Turns]:
    def parse(record: dict) -> Turns:
        user = {"role": "user", "content": record[question]}
        if extra and record.get(extra) not in ("", None):
            user["input"] = record[extra]
        return [(question, user), (answer, {"role": "assistant", "content": record[answer]})]

    return parse


def turns(key: str, role: str, content: str) -> Callable[[dict], Turns | str]:
    def parse(record: dict) -> Turns | str:
        found = record[key]
        if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
            return f'{key}: expected a list such as [{{"{role}": .., "{content}": ..}}], found {sources.kind_of(found)}'
        return [
            (f"{key}[{i}]", {"role": _role(turn.get(role)), "content": turn.get(content)})
            for i, turn in enumerate(found)
        ]

    return parse


def _role(name: Any) -> Any:
    return ROLES.get(name, name) if isinstance(name, str) else name


FORMATS: Formats = {
    ("instruction", "output"): (
        '{"instruction": .., "input": .. (optional), "output": ..}',
        _pair("instruction", "output", "input"),
    ),
    ("conversations",): (
        '{"conversations": [{"from": "human", "value": ..}, {"from": "gpt", "value": ..}]}',
        turns("conversations", "from", "value"),
    ),
    ("messages",): (
        '{"messages": [{"role": "user", "content": ..}, {"role": "assistant", "content": ..}]}',
        turns("messages", "role", "content"),
    ),
    ("prompt", "completion"): ('{"prompt": .., "completion": ..}', _pair("prompt", "completion")),
    ("prompt", "response"): ('{"prompt": .., "response": ..}', _pair("prompt", "response")),
}


def _wrong(turns: Turns | str) -> list[str]:
    if isinstance(turns, str):
        return [turns]
    problems = []
    for where, message in turns:
        if message["role"] not in ("system", "user", "assistant"):
            problems.append(f"{where}: expected system, user or assistant, found {message['role']!r:.40}")
        for key in ("content", "input"):
            if key in message and (problem := _wrong_text(message[key])):
                problems.append(f"{where}: {'the response' if message['role'] == 'assistant' else key} {problem}")
    roles = [message["role"] for _, message in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not problems and (not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2)):
        shown = ", ".join(roles[:8]) + ", .." * (len(roles) > 8) or "no turn"
        problems.append(f"expected turns of user, assistant, .. up to a last response, found {shown}")
    return problems


def _wrong_text(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"must be text, found {sources.kind_of(text)}"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at character {error.start}"
    return None


# --- text


def default_style(tokenizer: Tokenizer) -> Style:
    return "chat" if tokenizer.chat_template is not None else "alpaca"


def render(conversation: Conversation, tokenizer: Tokenizer, style: Style | None = None) -> list[Piece]:
    """The ids of a conversation, in pieces that are learned or not. The last is the last answer with its end.

    The ids before a learned piece are just what the model is given when it is asked for that answer.

    Args:
        style: chat    the tokenizer's own template
               alpaca  preamble (or the system message), "### Instruction:", "### Input:", "### Response:"
               phi3    "<|user|>", "<|assistant|>"
               None    chat where the tokenizer has a template, else alpaca
            In alpaca and phi3 the tokenizer's end-of-text follows every answer.

    Raises:
        UserError: a special token inside a message, which could end a turn; no chat template, or one whose text of
            some turns is not the beginning of its text of more turns; no end-of-text.
    Source: alpaca is chapter 7.2 of "Build a Large Language Model (From Scratch)", phi3 its exercise 7.1.
    """
    return render_all([conversation], tokenizer, style)[0]


def render_all(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, style: Style | None = None
) -> list[list[Piece]]:
    """`render` of each, many templates in one process."""
    style = style or default_style(tokenizer)
    if style not in STYLES:
        near = difflib.get_close_matches(style, STYLES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"no prompt style {style!r}{hint} (known: {', '.join(STYLES)})")
    _refuse(problem for talk in conversations if (problem := _special(talk, tokenizer)))
    if style == "chat":
        if tokenizer.chat_template is None:
            raise UserError(f"style chat: {tokenizer.name} has no chat template; choose alpaca or phi3")
        return [[_piece(*part, tokenizer) for part in parts] for parts in _chat(conversations, tokenizer)]
    if tokenizer.eot_id is None:
        raise UserError(
            f"style {style} ends an answer with end-of-text, and the {tokenizer.name} tokenizer has none: "
            "give it a chat template, or use another tokenizer"
        )
    parts = {"alpaca": _alpaca, "phi3": _phi3}[style]
    return [_with_ends([_piece(*part, tokenizer) for part in parts(talk)], tokenizer) for talk in conversations]


def _refuse(problems: Iterable[str]) -> None:
    if problems := list(problems):
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError.all(problems[:MAX_PROBLEMS] + more)


def _special(talk: Conversation, tokenizer: Tokenizer) -> str | None:
    text = "\0".join(message["content"] + "\0" + message.get("input", "") for message in talk.messages)
    if found := found_in(text, tokenizer.special_tokens):
        return f"{talk.where}: a message contains the special token {', '.join(sorted(found))}: take it out"
    return None


def _piece(text: str, learn: bool, tokenizer: Tokenizer) -> Piece:
    return Piece(tokenizer.encode(text, allowed_special="all"), learn)  # the messages hold none: see _special


def _with_ends(pieces: list[Piece], tokenizer: Tokenizer) -> list[Piece]:
    """As `gptjax sample` begins a text, and with the end of every answer."""
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    pieces = [Piece([*ids, tokenizer.eot_id], True) if learn else Piece(ids, False) for ids, learn in pieces]
    return [Piece(begin + pieces[0].ids, False), *pieces[1:]]


def _alpaca(talk: Conversation) -> list[tuple[str, bool]]:
    parts, before = [], PREAMBLE
    for message in talk.messages:
        if message["role"] == "system":
            before = message["content"]
        elif message["role"] == "user":
            given = f"\n\n### Input:\n{message['input']}" if "input" in message else ""
            before += f"\n\n### Instruction:\n{message['content']}{given}\n\n### Response:\n"
        else:
            parts += [(before, False), (message["content"], True)]
            before = ""
    return parts


def _phi3(talk: Conversation) -> list[tuple[str, bool]]:
    parts, before = [], ""
    for message in talk.messages:
        if message["role"] == "assistant":
            parts += [(before + "<|assistant|>\n", False), (message["content"], True)]
            before = "\n"
        else:
            before += f"<|{message['role']}|>\n{_content(message)}\n"
    return parts


def _content(message: dict[str, str]) -> str:
    return "\n".join(message[key] for key in ("content", "input") if key in message)


# --- the model's own template


class _Job(NamedTuple):
    where: str
    messages: list[dict[str, str]]
    begin: bool  # the text ends where the assistant begins to speak


def _chat(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> list[list[tuple[str, bool]]]:
    """Each answer is what the template adds between the text that asks for it and the text that holds it.

    asks   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    holds  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    learn                                                         Hello!<|im_end|>
    """
    jobs = []
    for talk in conversations:
        messages = [{"role": message["role"], "content": _content(message)} for message in talk.messages]
        for i in _answers(talk):
            jobs += [_Job(talk.where, messages[:i], True), _Job(talk.where, messages[: i + 1], False)]
    texts = iter(_render_all(tokenizer, jobs))
    found: list[list[tuple[str, bool]]] = []
    problems: list[str] = []
    for talk in conversations:
        turns = [(next(texts), next(texts)) for _ in _answers(talk)]
        try:
            found.append(_spans(turns, tokenizer))
        except UserError as error:
            problems.append(f"{talk.where}: {error}")
    _refuse(problems)
    return found


def _answers(talk: Conversation) -> list[int]:
    return [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]


def _spans(turns: list[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    before, at = "", 0
    for asks, holds in turns:
        if not asks.startswith(before) or not holds.startswith(asks) or holds == asks:
            shorter, longer = (asks, holds) if asks.startswith(before) else (before, asks)
            raise UserError(
                f"the chat template of {tokenizer.name} writes earlier turns anew when more follow, so an answer has "
                f"no place of its own: {shorter[-60:]!r} is not how {longer[-60:]!r} goes on; choose style alpaca or "
                "phi3, or other data (one turn each, without thinking)"
            )
        answer = holds[len(asks) :]
        if answer.rstrip().endswith(tuple(tokenizer.special_tokens)):
            answer = answer.rstrip()  # the model has stopped there: what follows belongs to the next turn
        parts += [(asks[at:], False), (answer, True)]
        before, at = holds, len(asks) + len(answer)
    return parts


def _render_all(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """`chat.apply` of each job, many in one process; of halves where that fails, down to the jobs that are wrong."""
    problems: dict[str, None] = {}

    def halves(jobs: list[_Job]) -> list[str]:
        if len(problems) >= MAX_PROBLEMS:
            return []
        try:
            if len(jobs) == 1:
                job = jobs[0]
                return [chat.apply(tokenizer, job.messages, add_generation_prompt=job.begin, **_limits(jobs))]
            return _render_together(tokenizer, jobs)
        except UserError as error:
            if len(jobs) == 1:
                problems[f"{jobs[0].where}: {error}"] = None
                return []
        middle = len(jobs) // 2
        return halves(jobs[:middle]) + halves(jobs[middle:])

    texts = [text for first in range(0, len(jobs), TOGETHER) for text in halves(jobs[first : first + TOGETHER])]
    _refuse(problems)
    return texts


def _limits(jobs: list[_Job]) -> dict[str, Any]:
    """Of time and length: a template adds a little to each message, however long a conversation is."""
    said = sum(len(message["content"]) for job in jobs for message in job.messages)
    return {"timeout_s": 1 + 0.002 * len(jobs), "max_chars": (1 << 16) + 4096 * len(jobs) + 4 * said}


def _render_together(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """By a template around the tokenizer's own, which goes through the jobs (they come as `tools`): JSON lines."""
    around = (
        "{% for job_ in tools %}{% set messages, add_generation_prompt, tools = job_.messages, job_.begin, none %}"
        "{% set text %}\n" + tokenizer.chat_template.removesuffix("\n") + "{{ '' }}{% endset %}"
        "{{ text | tojson }}{{ '\\n' }}{% endfor %}"
    )
    text = chat.apply(tokenizer, jobs[0].messages, around, tools=[job._asdict() for job in jobs], **_limits(jobs))
    texts = [records.loads(line) for line in text.split("\n")[:-1]]
    if len(texts) != len(jobs) or not all(isinstance(line, str) for line in texts):
        raise UserError("the template closes what is around it")
    return texts


# --- ids


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    style: Style | None = None,
    context_length: int,
    loss_on: Literal["response", "all"] = "response",
) -> Encoded:
    """Every conversation as one example, without those that are too long.

    An example of n ids has n - 1 inputs, each with the next id as its target, so its last id (the end of the answer)
    is only a target: it fits where n <= context_length + 1. Longer ones are dropped whole and counted.

        ids      10 11 12 20 21  1     prompt 10 11 12, answer 20 21, end 1; fits a context of 5
        weights   0  0  0  1  1  1     loss_on="all": 1 everywhere

    Args:
        style: as for `render`.
        loss_on: the answers with their ends, or every token.

    Raises:
        UserError: as for `render`, for up to 20 conversations; no example fits.
    """
    if loss_on not in ("response", "all"):
        raise UserError(f"loss_on: expected response or all, got {loss_on!r}")
    rows, weights, shortest = [], [], None
    for pieces in render_all(conversations, tokenizer, style):
        ids = [i for piece in pieces for i in piece.ids]
        shortest = min(len(ids) - 1, shortest or len(ids))
        if len(ids) > context_length + 1:
            continue
        learn = [piece.learn or loss_on == "all" for piece in pieces for _ in piece.ids]
        rows.append(np.array(ids, np.int32))
        weights.append(np.array(learn, np.float32))
    if not rows:
        needs = f"the shortest needs {shortest}" if conversations else "there is none"
        raise UserError(f"no conversation fits a context of {context_length} tokens: {needs}")
    return Encoded(rows, weights, len(conversations) - len(rows))


def show(pieces: Sequence[Piece], tokenizer: Tokenizer) -> str:
    """The text of one example for a terminal, what is learned in green. Control characters are spelled out."""
    text = ""
    for piece in pieces:
        plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in tokenizer.decode(piece.ids))
        text += f"{COLOUR}{plain}{PLAIN}" if piece.learn else plain
    return text
