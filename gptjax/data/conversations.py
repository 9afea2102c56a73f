"""Conversations from files, and the token ids that a model learns of them.

    talks   = read("instruction-data.json")
    pieces  = render(talks[0], tok)      [Piece(ids of the prompt, False), Piece(ids of the answer and its end, True)]
    encoded = encode(talks, tok, context_length=256)
    rows    = packing.packed(encoded, 256)

What is learned is known by its place in the conversation, never by token ids: the token that ends an answer is learned
although padding, or the user's turn, may hold the same id.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax._moved import moved_name
from gptjax.data.packing import Encoded
from gptjax.errors import UserError
from gptjax.formats import tables
from gptjax.tokenizers import chat
from gptjax.tokenizers.base import Tokenizer, found_in

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # what ShareGPT calls them
MAX_PROBLEMS = 20
TOGETHER = 2048  # texts that one process renders: it takes 0.1 s to start, a text less than a millisecond
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"


class Conversation(NamedTuple):
    """[system,] user, assistant, user, assistant, ..: {"role": .., "content": ..}, from `where` in a source.

    An Alpaca record's input, where it has one, is the user's "input" beside the "content". An answer with "learn" False
    is read and not learned. A record's "constraints" say what can be checked of an answer; tools are JSON schemas of
    functions, for a chat template that writes them.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    constraints: tuple[Any, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


class Piece(NamedTuple):
    ids: list[int]
    learn: bool


class Unused(NamedTuple):
    """A key that is not read: the first and the last record that has it, and how many have."""

    first: str
    records: int
    last: str


# --- records


def read(source: str, notes: list[str] | None = None) -> list[Conversation]:
    """The conversations of a .json (array), .jsonl, .parquet or .csv file, or of hf:org/name[:config][@split].

    Each record is one of `FORMATS`. Beside it are read: system (system_prompt, system_message), tools, constraints, and
    history, [[question, answer], ..]; in a message weight 0 or 1, or train (training, loss) false or true: whether an
    answer is learned. Of a prompt that is a list of messages no answer is learned. Keys of METADATA, and empty ones,
    are not read. Those of UNUSABLE change what is asked or learned in a way that cannot be followed here: they are
    refused.

    Args:
        notes: gets a line about all other keys, which are not read either; None: it goes to stderr.

    Raises:
        UserError: no such file; records that are broken, of no known format or without a response: the first 20.
    """
    return [talk for (talk,) in read_as(source, FORMATS, notes)]


def read_as(source: str, formats: Formats, notes: list[str] | None = None) -> list[tuple[Conversation, ...]]:
    """The conversations of each record, as many as its format reads there. Errors as of `read`."""
    found: list[tuple[Conversation, ...]] = []
    problems: list[str] = []
    unused: dict[str, Unused] = {}
    unknown = False
    try:
        for where, record in tables.read(source):
            fits = [] if isinstance(record, UserError) else [f for f in formats if all(key in record for key in f)]
            fits = [keys for keys in fits if not any(set(keys) < set(others) for others in fits)]
            if isinstance(record, UserError):
                problems.append(f"{where}: {record}")
            elif len(fits) != 1:
                unknown = True
                what = "several formats at once" if fits else "no known format"
                why = "".join(f"; {key}: {UNUSABLE[key]}" for key in record if key in UNUSABLE)
                problems.append(f"{where}: the keys {_keys(record)} are {what}{why}")
            else:
                talks = _conversations(record, fits[0], formats[fits[0]][1], where, unused)
                if isinstance(talks, tuple):
                    found.append(talks)
                else:
                    problems += [f"{where}: {line}" for line in talks]
            if len(problems) >= MAX_PROBLEMS:
                problems[MAX_PROBLEMS:] = ["... there may be more"]
                break
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if problems:
        known = ["known formats, one in each record:", *(f"  {shape}" for shape, _ in formats.values())]
        raise UserError.all(problems + known * unknown)
    if not found:
        raise UserError(f"{source}: no records")
    _tell(unused, len(found), notes)
    return found


def _tell(unused: dict[str, Unused], n: int, notes: list[str] | None) -> None:
    """One line about the keys that were not read, of n records."""
    if not unused:
        return
    shown = [f"{key} ({some.records:,} of {n:,}, first {some.first})" for key, some in list(unused.items())[:10]]
    line = f"keys that are not read: {', '.join(shown)}" + ", .." * (len(unused) > 10)
    if notes is None:
        print(line, file=sys.stderr)
    else:
        notes.append(line)


def _keys(record: dict) -> str:
    return (tables.names(list(record)[:10]) or "(none)") + ", .." * (len(record) > 10)


Turns = list[tuple[str, dict[str, Any]]]  # where in its record a message stands, and the message, not yet checked
Parsed = Turns | str  # the messages of one conversation, or what is wrong with them
Parse = Callable[[tables.Record], Parsed | tuple[Parsed, ...]]
Formats = dict[tuple[str, ...], tuple[str, Parse]]  # keys -> how it looks, its reader

# Keys that say where a record comes from, not what is asked or answered: they are not read, without a word.
_METADATA = """
id idx index uid uuid guid conversation_id conv_id dialogue_id prompt_id question_id message_id parent_id source dataset
origin subset split category categories topic subject domain task task_type task_name type tags tag keywords language
lang license url title created created_at updated_at timestamp date time author model generator version meta metadata
info hash md5 tokens num_tokens n_tokens token_count length difficulty quality score scores rating ratings score_chosen
score_rejected chosen_score rejected_score chosen_rating rejected_rating chosen_model rejected_model
"""
METADATA = frozenset(_METADATA.split())

_MEDIA = "pictures and sound cannot be read"
_TOOLS = "calls of tools cannot be learned (a list of tools can be given: tools)"
_ASKED = "would be left out of what is asked: put it in the instruction, input or system"
_THOUGHT = (
    "would be left out of what is answered: put it in the content, as the chat template writes it, or take it out"
)
UNUSABLE: dict[str, str] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("tool_calls", "tool_call_id", "tool_call", "function_call", "functions", "function"), _TOOLS),
    **dict.fromkeys(("context", "query", "documents", "prefix", "suffix"), _ASKED),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "refusal"), _THOUGHT),
    **dict.fromkeys(
        ("label", "kto_tag"), "good and bad answers are learned from pairs: prompt, chosen, rejected (finetune prefer)"
    ),
    **dict.fromkeys(
        ("weight", "train", "training", "loss", "sample_weight", "loss_weight", "loss_mask", "mask", "masked"),
        "what is learned is said in a message: its answer is left out by weight 0",
    ),
    **dict.fromkeys(
        ("train_detail", "training_detail"),
        "an answer is learned whole, or left out by train false",
    ),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs"), "one chat template is used for all: instruct.style, prefer.style"
    ),
}
SYSTEM = ("system", "system_prompt", "system_message")


def _conversations(
    record: dict, keys: tuple[str, ...], parse: Parse, where: str, unused: dict[str, Unused]
) -> tuple[Conversation, ...] | list[str]:
    """The conversations of a record of a format, or what is wrong with it. `unused` gets the keys that are not read."""
    sides = parse(record)
    sides = sides if isinstance(sides, tuple) else (sides,)
    known = {*keys, *SYSTEM, "history", "tools", "constraints"} | ({"input"} if keys[0] == "instruction" else set())
    problems, tools = _unread(record, known, where, unused), _tools(record.get("tools"))
    if isinstance(tools, str):
        problems.append(tools)
        tools = []
    more = record.get("constraints")
    more = tuple(more) if isinstance(more, list) else ()
    talks = []
    for side in sides:
        turns = side if isinstance(side, str) else _with_start(side, record, keys[0] in ("instruction", "prompt"))
        if isinstance(turns, str):
            problems.append(turns)
            continue
        wrong = _wrong(turns) or _wrong_marks(turns)
        for at, message in turns:
            wrong += [f"{at}: {line}" for line in _unread(message, TURN_KEYS, where, unused, "messages[].")]
        problems += wrong
        if not wrong:
            talks.append(Conversation(_messages(turns), where, more, tuple(tools)))
    return list(dict.fromkeys(problems)) if problems else tuple(talks)


def _unread(record: dict, read: Collection[str], where: str, unused: dict[str, Unused], prefix: str = "") -> list[str]:
    """The keys beside `read` that must not be left out; the others that are left out go to `unused`."""
    problems = []
    for key, value in record.items():
        if key in read or value in (None, "", [], {}):
            continue
        if key in UNUSABLE and (key != "label" or value in (0, 1)):
            problems.append(f"{key}: {UNUSABLE[key]}")
        elif key not in METADATA:
            name = prefix + tables.quoted(key)
            before = unused.get(name, Unused(where, 0, ""))
            unused[name] = Unused(before.first, before.records + (before.last != where), where)
    return problems


def _tools(value: Any) -> list[dict[str, Any]] | str:
    """JSON schemas of functions, which may come as JSON text; or what is wrong with them."""
    if value in (None, "", [], {}):
        return []
    if isinstance(value, str):
        value = tables.loads(value)
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return value
    what = str(value) if isinstance(value, UserError) else f"found {tables.kind_of(value)}"
    return f"tools: expected a list of JSON schemas of functions, {what}"


def _with_start(turns: Turns, record: dict, plain: bool) -> Parsed:
    """The turns after what stands beside them: a system message and earlier questions with their answers."""
    start: Turns = []
    if history := record.get("history"):
        if not plain:
            return "history: it stands beside whole conversations: expected it beside a question and its answer"
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            return "history: expected a list of pairs [question, answer]"
        for i, pair in enumerate(history):
            roles = zip(("user", "assistant"), pair, strict=True)
            start += [(f"history[{i}]", {"role": role, "content": text}) for role, text in roles]
    given = [key for key in SYSTEM if record.get(key)]
    if len(given) > 1:
        return f"{' and '.join(given)}: expected one of them"
    if given:
        text = record[given[0]]
        if turns and turns[0][1]["role"] == "system":
            if turns[0][1]["content"] == text:
                return start + turns
            return f"{given[0]}: a system message stands inside the conversation too: expected one"
        start.insert(0, (given[0], {"role": "system", "content": text}))
    return start + turns


MARKS = ("weight", "train", "training", "loss")  # of OpenAI, axolotl, ms-swift
TURN_KEYS = ("role", "content", "input", *MARKS)


def _wrong_marks(turns: Turns) -> list[str]:
    """What is wrong with the weight or train of messages, which say whether an answer is learned."""
    problems = []
    for at, message in turns:
        for key, value in _marks(message).items():
            if key == "weight" and (isinstance(value, bool) or value not in (0, 1)):
                problems.append(f"{at}: weight: expected 0 or 1, found {value!r:.40}")
            elif key != "weight" and not isinstance(value, bool):
                problems.append(f"{at}: {key}: expected true or false, found {value!r:.40}")
            elif message["role"] != "assistant" and value:
                problems.append(f"{at}: {key}: only answers can be learned, and this is of role {message['role']}")
    learned = [_learn(message) for _, message in turns if message["role"] == "assistant"]
    return problems or ([] if any(learned) else ["no answer of it is to be learned"])


def _marks(message: dict[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in MARKS if message.get(key) is not None}


def _learn(message: dict[str, Any]) -> bool:
    return all(_marks(message).values())


def _messages(turns: Turns) -> tuple[dict[str, Any], ...]:
    """As a conversation has them, up to the last answer that is learned: what follows it has no effect."""
    last = max(i for i, (_, m) in enumerate(turns) if m["role"] == "assistant" and _learn(m))
    made = []
    for _, message in turns[: last + 1]:
        skipped = message["role"] == "assistant" and not _learn(message)
        kept = {key: message[key] for key in ("role", "content", "input") if key in message}
        made.append(kept | ({"learn": False} if skipped else {}))
    return tuple(made)


def _pair(question: str, answer: str, extra: str = "") -> Callable[[tables.Record], Parsed]:
    """A question and its answer: two texts, or two lists of messages."""

    def parse(record: tables.Record) -> Parsed:
        if not extra and (isinstance(record[question], list) or isinstance(record[answer], list)):
            asked, answered = turns(question)(record), turns(answer)(record)
            if isinstance(asked, str) or isinstance(answered, str):
                return asked if isinstance(asked, str) else answered
            # no answer of a prompt is learned
            given = [(at, m | {"weight": 0} if m["role"] == "assistant" else m) for at, m in asked]
            return [*given, *answered]
        user = {"role": "user", "content": record[question]}
        if extra and record.get(extra) not in ("", None):
            user["input"] = record[extra]
        return [(question, user), (answer, {"role": "assistant", "content": record[answer]})]

    return parse


def turns(key: str) -> Callable[[tables.Record], Parsed]:
    """The messages of a list: {"role": .., "content": ..}, or {"from": .., "value": ..}."""

    def parse(record: tables.Record) -> Parsed:
        found = record[key]
        if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
            return f'{key}: expected a list such as [{{"role": .., "content": ..}}], found {tables.kind_of(found)}'
        made: Turns = []
        for i, turn in enumerate(found):
            role, content = _one_of(turn, ("role", "from")), _one_of(turn, ("content", "value"))
            if role is None or content is None:
                return f"{key}[{i}]: expected role and content (or from and value), found {_keys(turn)}"
            rest = {name: value for name, value in turn.items() if name not in (role, content)}
            named = ROLES.get(turn[role], turn[role]) if isinstance(turn[role], str) else turn[role]
            made.append((f"{key}[{i}]", {"role": named, "content": turn[content]} | rest))
        return made

    return parse


def _one_of(turn: dict, names: tuple[str, str]) -> str | None:
    """The one of the two keys that is there; where both are, the one that is not null."""
    there = [name for name in names if name in turn]
    if len(there) == 2:
        there = [name for name in there if turn[name] is not None] or there[:1]
    return there[0] if len(there) == 1 else None


FORMATS: Formats = {
    ("instruction", "output"): (
        '{"instruction": .., "input": .. (optional), "output": ..}',
        _pair("instruction", "output", "input"),
    ),
    ("conversations",): (
        '{"conversations": [{"from": "human", "value": ..}, {"from": "gpt", "value": ..}]}',
        turns("conversations"),
    ),
    ("messages",): (
        '{"messages": [{"role": "user", "content": ..}, {"role": "assistant", "content": ..}]}',
        turns("messages"),
    ),
    ("prompt", "completion"): (
        '{"prompt": .., "completion": ..}, both texts or both lists of messages',
        _pair("prompt", "completion"),
    ),
    ("prompt", "response"): ('{"prompt": .., "response": ..}', _pair("prompt", "response")),
}


def _wrong(turns: Turns) -> list[str]:
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
        return f"must be text, found {tables.kind_of(text)}"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at character {error.start}"
    return None


# --- text


def render(conversation: Conversation, tokenizer: Tokenizer, style: chat.Style | None = None) -> list[Piece]:
    """The ids of a conversation, in pieces that are learned or not. The last is the last answer with its end.

    The ids before an answer are just what the model is given when it is asked for that answer.

    Args:
        style: as for `chat.styled`.

    Raises:
        UserError: as for `chat.styled`; a special token inside a message, which could end a turn; a template whose text
            of some turns is not how its text of more turns begins, or that knows of no tools where there are some.
    """
    return render_all([conversation], tokenizer, style)[0]


def render_all(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, style: chat.Style | None = None
) -> list[list[Piece]]:
    """`render` of each, many templates in one process."""
    tokenizer = chat.styled(tokenizer, style)
    template, end = tokenizer.chat_template, chat.end_of_answer(tokenizer)
    assert template is not None and end is not None  # `styled` refuses a tokenizer without them
    _refuse(problem for talk in conversations if (problem := _unfit(talk, tokenizer, template, end)))
    return [_pieces(parts, tokenizer) for parts in _chat(conversations, tokenizer, end)]


def _refuse(problems: Iterable[str]) -> None:
    if problems := list(problems):
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError.all(problems[:MAX_PROBLEMS] + more)


def _unfit(talk: Conversation, tokenizer: Tokenizer, template: str, end: str) -> str | None:
    text = "\0".join(message["content"] + "\0" + message.get("input", "") for message in talk.messages)
    text = "\0".join([text, *chat.strings(talk.tools)])
    if found := found_in(text, {*tokenizer.special_tokens, end}):
        return f"{talk.where}: a message contains the special token {', '.join(sorted(found))}: take it out"
    if talk.tools and not re.search(r"\btools\b", template):
        return f"{talk.where}: tools: the chat template of {tokenizer.name} does not write them: take them out"
    return None


def _pieces(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[Piece]:
    """The ids of each part after those before it. SentencePiece writes the beginning of a text, and what follows some
    special tokens, in another way than the same text in the middle: such a part is cut from a longer text, where that
    leaves the ids before it as they are.

        <s>[INST] Hi [/INST] | Hello</s>     Hello is "▁Hello" in the whole text, "▁ ▁Hello" if " Hello" came alone
    """
    pieces: list[Piece] = []
    text, ids = "", list[int]()
    in_context = getattr(tokenizer, "kind", "") == "hf"  # to all others it is the same

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, allowed_special="all")  # the messages hold none: see _unfit

    for part, learn in parts:
        text += part
        whole = encode(text) if in_context else []
        new = whole[len(ids) :] if in_context and whole[: len(ids)] == ids else encode(part)
        ids += new
        pieces.append(Piece(new, learn))
    return pieces


# --- the template


class _Job(NamedTuple):
    where: str
    messages: list[dict[str, str]]
    begin: bool  # the text ends where the assistant begins to speak
    tools: list[dict[str, Any]] | None = None


def _chat(conversations: Sequence[Conversation], tokenizer: Tokenizer, end: str) -> list[list[tuple[str, bool]]]:
    """Each answer is what the template adds between the text that asks for it and the text that holds it, as far as
    its end.

    asks   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    holds  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    learn                                                         Hello!<|im_end|>
    """
    jobs = []
    for talk in conversations:
        messages = [{"role": m["role"], "content": chat.with_input(tokenizer, m)} for m in talk.messages]
        tools = list(talk.tools) or None
        for i in _answers(talk):
            jobs += [_Job(talk.where, messages[:i], True, tools), _Job(talk.where, messages[: i + 1], False, tools)]
    texts = iter(_render_all(tokenizer, jobs))
    found: list[list[tuple[str, bool]]] = []
    problems: list[str] = []
    for talk in conversations:
        turns = [(next(texts), next(texts), talk.messages[i].get("learn", True)) for i in _answers(talk)]
        try:
            found.append(_spans(turns, tokenizer, end))
        except UserError as error:
            problems.append(f"{talk.where}: {error}")
    _refuse(problems)
    return found


def _answers(talk: Conversation) -> list[int]:
    return [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]


def _spans(turns: list[tuple[str, str, bool]], tokenizer: Tokenizer, end: str) -> list[tuple[str, bool]]:
    """(text, learn) in turn of what asks and what is answered, from (asks, holds, learn) of each answer."""
    parts: list[tuple[str, bool]] = []
    before = ""
    for asks, holds, learn in turns:
        if not asks.startswith(before) or not holds.startswith(asks) or holds == asks:
            shorter, longer = (asks, holds) if asks.startswith(before) else (before, asks)
            raise UserError(
                f"the chat template of {tokenizer.name} writes earlier turns anew when more follow, so an answer has "
                f"no place of its own: {shorter[-60:]!r} is not how {longer[-60:]!r} goes on; choose style alpaca or "
                "phi3, or other data (one turn each, without thinking)"
            )
        answer, _, _ = holds[len(asks) :].partition(end)  # some templates leave the end of the last answer out
        parts += [(asks[len(before) :], False), (answer + end, learn)]
        before = asks + answer + end  # the model has stopped there: what follows belongs to the next turn
    return parts


def _render_all(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """`chat.apply` of each job, many in one process; of halves where that fails, down to the jobs that are wrong."""
    problems: dict[str, None] = {}
    alone = chat.is_builtin(tokenizer.chat_template or "")  # needs no process

    def halves(jobs: list[_Job]) -> list[str]:
        if len(problems) >= MAX_PROBLEMS:
            return []
        try:
            if alone or len(jobs) == 1:
                return [
                    chat.apply(
                        tokenizer, job.messages, add_generation_prompt=job.begin, tools=job.tools, **_limits([job])
                    )
                    for job in jobs
                ]
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
    said += sum(len(text) + 64 for job in jobs for text in chat.strings(job.tools))
    return {"timeout_s": 1 + 0.002 * len(jobs), "max_chars": (1 << 16) + 4096 * len(jobs) + 4 * said}


def _render_together(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """By a template around the tokenizer's own, which goes through the jobs (they come as `tools`): JSON lines."""
    around = (
        "{% for job_ in tools %}"
        "{% set messages, add_generation_prompt, tools = job_.messages, job_.begin, job_.tools %}"
        "{% set text %}\n" + (tokenizer.chat_template or "").removesuffix("\n") + "{{ '' }}{% endset %}"
        "{{ text | tojson }}{{ '\\n' }}{% endfor %}"
    )
    text = chat.apply(tokenizer, jobs[0].messages, around, tools=[job._asdict() for job in jobs], **_limits(jobs))
    texts = [tables.loads(line) for line in text.split("\n")[:-1]]
    if len(texts) != len(jobs) or not all(isinstance(line, str) for line in texts):
        raise UserError("the template closes what is around it")
    return texts


# --- ids


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    style: chat.Style | None = None,
    context_length: int,
    loss_on: Literal["response", "all"] = "response",
    because: str = "",
) -> Encoded:
    """Every conversation as one example, without those that are too long.

    An example of n ids has n - 1 inputs, each with the next id as its target, so its last id (the end of the answer)
    is only a target: it fits where n <= context_length + 1. Longer ones are dropped whole and counted.

        ids      10 11 12 20 21  1     prompt 10 11 12, answer 20 21, end 1; fits a context of 5
        weights   0  0  0  1  1  1     loss_on="all": 1 everywhere

    Args:
        style: as for `chat.styled`.
        loss_on: the answers with their ends, or every token.
        because: where the context_length comes from, for the error where nothing fits.

    Raises:
        UserError: as for `render`, for up to 20 conversations; no example fits.
    """
    if loss_on not in ("response", "all"):
        raise UserError(f"loss_on: expected response or all, got {loss_on!r}")
    if loss_on == "all":
        _refuse(
            f"{talk.where}: loss_on=all learns every token, and an answer there is not to be learned: "
            "take its weight or train out, or say loss_on=response"
            for talk in conversations
            if not all(message.get("learn", True) for message in talk.messages)
        )
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
        raise UserError(f"no conversation fits a context of {context_length} tokens{because}: {needs}")
    return Encoded(rows, weights, len(conversations) - len(rows))


def show(pieces: Sequence[Piece], tokenizer: Tokenizer) -> str:
    """The text of one example for a terminal, what is learned in green. Control characters are spelled out."""
    text = ""
    for piece in pieces:
        plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in tokenizer.decode(piece.ids))
        text += f"{COLOUR}{plain}{PLAIN}" if piece.learn else plain
    return text


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
