"""Reads conversations for supervised fine-tuning, and encodes them with a chat template as token ids and loss weights.

    talks   = read("instruction-data.json")
    spans   = render(talks[0], tok)      [Span(ids of the prompt, 0), Span(ids of the answer and its end, 1)]
    encoded = encode(talks, tok, context_length=256)
    rows    = packing.packed(encoded, 256)

The loss mask depends on the position of a token in the conversation, not on the token id: the token that ends an answer
is a target, but the same token id in the padding or in a user turn is not a target.

In training, every answer follows exactly the token ids that the model would get as the prompt for this answer. A chat
template may render a turn differently once later turns follow; for example, Qwen3's template drops the reasoning of
earlier answers. A conversation in which later turns change how an earlier turn is rendered is encoded as a token tree
(`data.token_tree`), or as one row per answer.
"""

from __future__ import annotations

import bisect
import json
import os.path
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax._moved import moved_name
from gptjax.data import token_tree
from gptjax.data.packing import Encoded
from gptjax.data.token_tree import TokenTree
from gptjax.errors import UserError, complaints
from gptjax.formats import tables
from gptjax.tokenizers import chat
from gptjax.tokenizers.base import Tokenizer, found_in, stop_ids, whole_tokens

# Maps the role names of ShareGPT data to the role names of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
THINK, END_THINK = "<think>", "</think>"  # Tags around the reasoning of an answer.
# Matches the empty reasoning that ends the prompts of Qwen, Gemma 4 and Command R7B if the model is told not to reason.
EMPTY_THOUGHT = re.compile(
    r"(<think>|<\|channel>thought|<\|START_THINKING\|>)\s*(</think>|<channel\|>|<\|END_THINKING\|>)\s*\Z"
)
MAX_PROBLEMS = 20
MAX_WEIGHT = 1000.0  # Largest loss weight that an answer may have.
# Number of texts rendered per subprocess: starting a subprocess takes 0.1 s, and rendering a text takes less than 1 ms.
RENDER_BATCH = 2048
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        messages     messages {"role": .., "content": ..}, with the roles [system,] user, assistant, user, assistant, ..
                     in this order; tool messages may stand between an answer that calls tools and the next answer. If
                     an Alpaca record has a non-empty "input", its user message has the key "input", too. An answer may
                     have "tool_calls" [{"type": "function", "function": {"name": .., "arguments": {..}}}, ..],
                     "reasoning_content" (text), and "weight" (its loss weight; 1 if it is missing).
        where        location of the conversation in its source, such as rows.jsonl:3
        constraints  verifiable constraints on the answer, see `evaluation.generation_metrics`
        tools        JSON schemas of functions, for chat templates that support tools
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    constraints: tuple[Any, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


class Span(NamedTuple):
    """Consecutive token ids of a conversation that have the same loss weight as targets. The field `learn` of a `Span`
    holds the loss weight of its token ids; a loss weight of 0 excludes the token ids from the loss."""

    ids: list[int]
    learn: float


class Turn(NamedTuple):
    """An answer of a conversation and the prompt for this answer, both as text or both as token ids."""

    prompt: Any
    answer: Any  # Text or token ids of the answer, with its end token.
    weight: float  # Loss weight of the answer.


class Unused(NamedTuple):
    """The number of records that contain an ignored key, and the locations of the first and the last of these
    records."""

    first: str  # Location of the first record with the ignored key.
    records: int  # Number of records with the ignored key.
    last: str  # Location of the last record with the ignored key.


# --- records


def read(source: str, notes: list[str] | None = None) -> list[Conversation]:
    """Reads the conversations of a .json (array), .jsonl, .parquet or .csv file, or of hf:org/name[:config][@split].

    Each record has one of the formats in `FORMATS`. Optional keys of a record are system (or system_prompt or
    system_message), tools, constraints, and history, which is [[question, answer], ..]. Optional keys of an answer are
    tool_calls, reasoning_content (or reasoning or thinking), weight (its loss weight), and train (or training or loss;
    true or false), which includes the answer in the loss or excludes the answer from the loss. If the prompt is a list
    of messages, the answers in the prompt are excluded from the loss. Keys of a record that are in METADATA or have an
    empty value are ignored. A key of a record that is in UNUSABLE raises an error, because the key would change the
    prompt or the loss in an unsupported way.

    Args:
        notes: list to which a line of text is appended if keys that are not in METADATA were ignored; the line names
            these keys. None: the line is printed to stderr.

    Raises:
        UserError: the file does not exist, or records are invalid: they cannot be parsed, have no known format or have
            no response. The message lists the first 20 problems.
    """
    return [talk for (talk,) in read_as(source, FORMATS, notes)]


def read_as(
    source: str, formats: Formats, notes: list[str] | None = None, rows: tables.Records | None = None
) -> list[tuple[Conversation, ...]]:
    """Returns the conversations of each record: two conversations if the records are preference pairs, otherwise one
    conversation.

    Args:
        rows: the locations and records of the source. None: the records are read from the source.

    Raises the same errors as `read`.
    """
    records: list[tuple[Conversation, ...]] = []
    problems: list[str] = []
    unused: dict[str, Unused] = {}
    unknown = False
    try:
        for location, record in rows or tables.read(source):
            fits = [] if isinstance(record, UserError) else [f for f in formats if all(key in record for key in f)]
            fits = [keys for keys in fits if not any(set(keys) < set(others) for others in fits)]
            if isinstance(record, UserError):
                problems.append(f"{location}: {record}")
            elif len(fits) != 1:
                unknown = True
                fault = "several formats at once" if fits else "no known format"
                why = "".join(f"; {key}: {UNUSABLE[key]}" for key in record if key in UNUSABLE)
                problems.append(f"{location}: the keys {_keys(record)} are {fault}{why}")
            else:
                talks = _conversations(record, fits[0], formats[fits[0]][1], location, unused)
                if isinstance(talks, tuple):
                    records.append(talks)
                else:
                    problems += [f"{location}: {line}" for line in talks]
            if len(problems) >= MAX_PROBLEMS:
                problems[MAX_PROBLEMS:] = ["... there may be more"]
                break
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if problems:
        known = ["known formats, one per record:", *(f"  {shape}" for shape, _ in formats.values())]
        raise UserError.all(problems + known * unknown)
    if not records:
        raise UserError(f"{source}: no records")
    _report_unused(unused, len(records), notes)
    return records


def _report_unused(unused: dict[str, Unused], n: int, notes: list[str] | None) -> None:
    """Reports the ignored keys of n records in a line of text, which is appended to `notes` or, if `notes` is None,
    printed to stderr."""
    if not unused:
        return
    shown = [f"{key} ({use.records:,} of {n:,}, first {use.first})" for key, use in list(unused.items())[:10]]
    line = f"keys that are not read: {', '.join(shown)}" + ", .." * (len(unused) > 10)
    if notes is None:
        print(line, file=sys.stderr)
    else:
        notes.append(line)


def _keys(record: dict) -> str:
    return (tables.names(list(record)[:10]) or "(none)") + ", .." * (len(record) > 10)


# For each turn of a conversation: its location in the record, and its message before validation.
Turns = list[tuple[str, dict[str, Any]]]
Parsed = Turns | str  # Turns of one conversation, or an error message.
Parse = Callable[[tables.Record], Parsed | tuple[Parsed, ...]]
# Maps the keys that a record of a format must have to an example of such a record and the parser of the format.
Formats = dict[tuple[str, ...], tuple[str, Parse]]

# The keys in METADATA are ignored without a message, because metadata is part of neither the prompt nor the answer.
_METADATA = """
id idx index uid uuid guid conversation_id conv_id dialogue_id prompt_id question_id message_id parent_id source dataset
origin subset split category categories topic subject domain task task_type task_name type tags tag keywords language
lang license url title created created_at updated_at timestamp date time author model generator version meta metadata
info hash md5 tokens num_tokens n_tokens token_count length difficulty quality score scores rating ratings score_chosen
score_rejected chosen_score rejected_score chosen_rating rejected_rating chosen_model rejected_model
"""
METADATA = frozenset(_METADATA.split())

_MEDIA = "pictures and sound are not supported"
_TOOLS = "supported in a message only, as tool_calls"
_PROMPT = "would be left out of the prompt: put it in the instruction, input or system"
_THOUGHT = "would be left out of the answer: put it in the message of the answer, as reasoning_content"
UNUSABLE: dict[str, str] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("tool_calls", "tool_call_id", "tool_call", "function_call", "functions", "function"), _TOOLS),
    **dict.fromkeys(("context", "query", "documents", "prefix", "suffix"), _PROMPT),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "refusal"), _THOUGHT),
    **dict.fromkeys(
        ("label", "kto_tag"),
        "good and bad answers are learned from pairs: prompt, chosen, rejected (finetune prefer)",
    ),
    **dict.fromkeys(
        ("weight", "train", "training", "loss", "sample_weight", "loss_weight", "loss_mask", "mask", "masked"),
        "the loss mask is set per message: weight 0 in a message excludes its answer",
    ),
    **dict.fromkeys(
        ("train_detail", "training_detail"),
        "an answer is in the loss as a whole, or excluded by train false",
    ),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs"),
        "all records use the same chat template: instruct.style, prefer.style",
    ),
}
SYSTEM = ("system", "system_prompt", "system_message")


def _conversations(
    record: dict, keys: tuple[str, ...], parse: Parse, location: str, unused: dict[str, Unused]
) -> tuple[Conversation, ...] | list[str]:
    """Returns the conversations of a record, or a list of error messages if the record is invalid.

    Adds the ignored keys of the record to the counts in `unused`.
    """
    parsed = parse(record)
    parsed = parsed if isinstance(parsed, tuple) else (parsed,)
    known = {*keys, *SYSTEM, "history", "tools", "constraints"} | ({"input"} if keys[0] == "instruction" else set())
    problems, tools = _unused_keys(record, known, location, unused), _tools(record.get("tools"))
    if isinstance(tools, str):
        problems.append(tools)
        tools = []
    constraints = record.get("constraints")
    constraints = tuple(constraints) if isinstance(constraints, list) else ()
    talks = []
    for variant in parsed:
        turns = (
            variant
            if isinstance(variant, str)
            else _with_context(variant, record, keys[0] in ("instruction", "prompt"))
        )
        if isinstance(turns, str):
            problems.append(turns)
            continue
        invalid = _check_turns(turns) or _check_loss_flags(turns)
        for place, message in turns:
            keys = TURN_KEYS + TOOL_KEYS if message["role"] == "tool" else TURN_KEYS
            lines = _unused_keys(message, keys, location, unused, "messages[].")
            invalid += [f"{place}: {line}" for line in lines]
        problems += invalid
        if not invalid:
            talks.append(Conversation(_messages(turns), location, constraints, tuple(tools)))
    return list(dict.fromkeys(problems)) if problems else tuple(talks)


def _unused_keys(
    record: dict, known: Collection[str], location: str, unused: dict[str, Unused], prefix: str = ""
) -> list[str]:
    """Returns error messages about the keys of a record or message that are in UNUSABLE.

    Adds the ignored keys that are not in METADATA to the counts in `unused`. Keys in `known` are skipped, because the
    caller reads these keys.
    """
    problems = []
    for key, value in record.items():
        if key in known or value in (None, "", [], {}):
            continue
        if key in UNUSABLE and (key != "label" or value in (0, 1)):
            problems.append(f"{key}: {UNUSABLE[key]}")
        elif key not in METADATA:
            name = prefix + tables.quoted(key)
            use = unused.get(name, Unused(location, 0, ""))
            unused[name] = Unused(use.first, use.records + (use.last != location), location)
    return problems


def _tools(value: Any) -> list[dict[str, Any]] | str:
    """Returns the JSON schemas in `value` (a list or JSON text), or an error message if `value` is invalid."""
    if value in (None, "", [], {}):
        return []
    if isinstance(value, str):
        value = tables.loads(value)
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return value
    reason = str(value) if isinstance(value, UserError) else f"found {tables.kind_of(value)}"
    return f"tools: expected a list of JSON schemas of functions, {reason}"


def _with_context(turns: Turns, record: dict, single_turn: bool) -> Parsed:
    """Returns the turns of a conversation, preceded by the system message and the history of the record if there are
    any.

    Returns an error message if the system message or the history of the record is invalid.
    """
    start: Turns = []
    if history := record.get("history"):
        if not single_turn:
            return "history: not supported beside a whole conversation, only beside a question and its answer"
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
            return f"{given[0]}: the conversation has a system message of its own: expected one"
        start.insert(0, (given[0], {"role": "system", "content": text}))
    return start + turns


# OpenAI's fine-tuning API, axolotl and ms-swift use the keys in LOSS_FLAGS to include an answer in the loss or to
# exclude it.
LOSS_FLAGS = ("weight", "train", "training", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which an answer may have its reasoning
TURN_KEYS = ("role", "content", "input", "tool_calls", *REASONING, *LOSS_FLAGS)
TOOL_KEYS = ("name", "tool_call_id")  # Keys that a tool message may have in addition to TURN_KEYS.


def _check_loss_flags(turns: Turns) -> list[str]:
    """Returns error messages about invalid values of the keys in LOSS_FLAGS.

    Returns one error message if the keys in LOSS_FLAGS have only valid values, but exclude every answer of the
    conversation from the loss.
    """
    problems = []
    for place, message in turns:
        for key, value in _loss_flags(message).items():
            if key == "weight" and not _is_weight(value):
                problems.append(f"{place}: weight: expected a number from 0 to {MAX_WEIGHT:g}, found {value!r:.40}")
            elif key != "weight" and not isinstance(value, bool):
                problems.append(f"{place}: {key}: expected true or false, found {value!r:.40}")
            elif message["role"] != "assistant" and value:
                problems.append(
                    f"{place}: {key}: only answers can be in the loss, and the role here is {message['role']}"
                )
    if problems or any(_weight(message) for _, message in turns if message["role"] == "assistant"):
        return problems
    return ["all its answers are excluded from the loss"]


def _loss_flags(message: dict[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in LOSS_FLAGS if message.get(key) is not None}


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= MAX_WEIGHT  # False for NaN


def _weight(message: dict[str, Any]) -> float:
    """Returns the loss weight of an answer: 0 if a flag such as `train` is false, otherwise the key `weight`, by
    default 1."""
    flags = _loss_flags(message)
    return float(flags.pop("weight", 1)) if all(flags.values()) else 0.0


def _messages(turns: Turns) -> tuple[dict[str, Any], ...]:
    """Returns the messages up to and including the last answer that is in the loss.

    Messages after the last answer in the loss are left out, because these messages do not change the loss.
    """
    last = max(i for i, (_, m) in enumerate(turns) if m["role"] == "assistant" and _weight(m))
    messages = []
    for _, message in turns[: last + 1]:
        kept: dict[str, Any] = {key: message[key] for key in ("role", "content", "input") if key in message}
        if message["role"] == "tool":
            kept |= {key: message[key] for key in TOOL_KEYS if message.get(key)}
        if message["role"] == "assistant":
            if message.get("tool_calls"):
                kept |= {"content": kept["content"] or "", "tool_calls": _calls(message["tool_calls"])}
            if reasoning := _reasoning(message):
                kept["reasoning_content"] = reasoning
            if (weight := _weight(message)) != 1:
                kept["weight"] = weight
        messages.append(kept)
    return tuple(messages)


def _reasoning(message: dict[str, Any]) -> Any:
    return next((message[key] for key in REASONING if message.get(key) not in (None, "")), None)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Returns the tool calls of an answer in the form that chat templates expect, with the arguments as a dict.

    A tool call of the data is {"type": "function", "function": {"name": .., "arguments": ..}}, or {"name": ..,
    "arguments": ..}, with an optional "id". The arguments of a tool call may be JSON text, as in OpenAI's API.

    Raises:
        UserError: the calls have another form.
    """
    calls = tables.loads(value) if isinstance(value, str) else value
    expected = 'tool_calls: expected a list such as [{"function": {"name": .., "arguments": {..}}}]'
    if not isinstance(calls, list):
        raise UserError(f"{expected}, found {tables.kind_of(calls)}")
    out = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise UserError(f"{expected}, found {tables.kind_of(call)} without a name")
        arguments = function.get("arguments", {})
        arguments = tables.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise UserError(f"tool_calls: the arguments of {name} must be an object, or the JSON text of one")
        called = {"type": "function", "function": {"name": name, "arguments": arguments}}
        out.append(called | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return out


def _pair(question: str, answer: str, extra: str = "") -> Callable[[tables.Record], Parsed]:
    """Returns a parser for records that have a question and its answer, both strings or both lists of messages."""

    def parse(record: tables.Record) -> Parsed:
        if not extra and (isinstance(record[question], list) or isinstance(record[answer], list)):
            prompt, response = turns(question)(record), turns(answer)(record)
            if isinstance(prompt, str) or isinstance(response, str):
                return prompt if isinstance(prompt, str) else response
            # Exclude the answers within a prompt from the loss by setting the weight of these answers to 0.
            prompt = [(place, m | {"weight": 0} if m["role"] == "assistant" else m) for place, m in prompt]
            return [*prompt, *response]
        user = {"role": "user", "content": record[question]}
        if extra and record.get(extra) not in ("", None):
            user["input"] = record[extra]
        return [(question, user), (answer, {"role": "assistant", "content": record[answer]})]

    return parse


def turns(key: str) -> Callable[[tables.Record], Parsed]:
    """Returns a parser for records that have a list of messages under `key`.

    A message in the list is a dict {"role": .., "content": ..} or {"from": .., "value": ..}.
    """

    def parse(record: tables.Record) -> Parsed:
        messages = record[key]
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
            return f'{key}: expected a list such as [{{"role": .., "content": ..}}], found {tables.kind_of(messages)}'
        parsed: Turns = []
        for i, turn in enumerate(messages):
            role, content = _one_of(turn, ("role", "from")), _one_of(turn, ("content", "value"))
            if role is None or (content is None and not turn.get("tool_calls")):
                return f"{key}[{i}]: expected role and content (or from and value), found {_keys(turn)}"
            rest = {name: value for name, value in turn.items() if name not in (role, content)}
            named = ROLES.get(turn[role], turn[role]) if isinstance(turn[role], str) else turn[role]
            text = turn[content] if content is not None else ""
            parsed.append((f"{key}[{i}]", {"role": named, "content": text} | rest))
        return parsed

    return parse


def _one_of(turn: dict, names: tuple[str, str]) -> str | None:
    """Returns the key that a message has, out of the two synonymous keys in `names`.

    If the message has both keys in `names`, returns the key whose value is not null. Returns None if the message has
    neither of the keys in `names`, or both with values that are not null.
    """
    present = [name for name in names if name in turn]
    if len(present) == 2:
        present = [name for name in present if turn[name] is not None] or present[:1]
    return present[0] if len(present) == 1 else None


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


def _check_turns(turns: Turns) -> list[str]:
    problems = []
    for place, message in turns:
        role = message["role"]
        if role not in chat.ROLES:
            problems.append(f"{place}: expected {', '.join(chat.ROLES)}, found {role!r:.40}")
        calls = role == "assistant" and message.get("tool_calls") not in (None, "", [])
        for key in ("content", "input"):
            if key not in message or (message[key] in (None, "") and (calls or role == "tool")):
                continue
            if problem := _text_problem(message[key]):
                problems.append(f"{place}: {'the response' if role == 'assistant' else key} {problem}")
        if role != "assistant":
            problems += [f"{place}: {key}: only an answer can have it" for key in _answer_keys(message)]
            continue
        if calls:
            problems += [f"{place}: {problem}" for problem in complaints(_calls, message["tool_calls"])]
        reasoning = _reasoning(message)
        if reasoning is not None and (problem := _text_problem(reasoning)):
            problems.append(f"{place}: the reasoning {problem}")
    roles = [message["role"] for _, message in turns]
    if not problems and not _in_order([message for _, message in turns]):
        shown = ", ".join(roles[:8]) + ", .." * (len(roles) > 8) or "no turn"
        expected = "turns of user, assistant, .. up to a last response"
        if "tool" in roles:
            expected += ", and tool messages only after an answer with tool_calls"
        problems.append(f"expected {expected}, found {shown}")
    return problems


def _answer_keys(message: dict[str, Any]) -> list[str]:
    return [key for key in ("tool_calls", *REASONING) if message.get(key) not in (None, "", [])]


def _in_order(messages: list[dict[str, Any]]) -> bool:
    """Returns whether the roles of the messages are [system,] user, assistant, user, .., assistant, in this order.

    An answer with tool_calls must be followed by one or more tool messages and then by another answer.
    """
    expected: tuple[str, ...] = ("user",)
    for message in messages[1:] if messages and messages[0]["role"] == "system" else messages:
        if message["role"] not in expected:
            return False
        calls = bool(message.get("tool_calls"))
        after = {"user": ("assistant",), "assistant": ("tool",) if calls else ("user",), "tool": ("tool", "assistant")}
        expected = after[message["role"]]
    return bool(messages) and messages[-1]["role"] == "assistant"


def _text_problem(text: Any) -> str | None:
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


def render(conversation: Conversation, tokenizer: Tokenizer, style: chat.Style | None = None) -> list[Span]:
    """Returns the token ids of a conversation as spans, each of which has one loss weight.

    The last span of a conversation is the last answer with its end token. The token ids before the last answer are
    exactly the prompt that the model gets when it generates the last answer. If the chat template renders earlier turns
    as the model generated them, each earlier answer is a separate span. If the chat template renders earlier turns
    differently than the model generated them, the spans are only the last prompt and the last answer, whereas `encode`
    encodes all answers.

    Args:
        style: the chat style, see `chat.styled`.

    Raises:
        UserError: one of the following is true.
            - `chat.styled` raises an error for the tokenizer or the style.
            - A message contains the text of a special token, which could end a turn.
            - The template fails, or leaves out an answer, its reasoning, its tool calls, the tools or their results.
    """
    return render_all([conversation], tokenizer, style)[0]


def render_all(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, style: chat.Style | None = None
) -> list[list[Span]]:
    """Renders several conversations like `render`, but faster, because one subprocess renders many conversations."""
    return [_row(turns) for turns in turns_of(conversations, tokenizer, style)]


def turns_of(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, style: chat.Style | None = None
) -> list[list[Turn]]:
    """Returns a `Turn` of token ids for each answer of each conversation. Raises the same errors as `render`.

    The prompt of an answer is the text that the chat template renders for the messages before the answer, encoded as a
    whole.
    """
    tokenizer = chat.styled(tokenizer, style)
    template, end = tokenizer.chat_template, chat.end_of_answer(tokenizer)
    # `chat.styled` raises an error for a tokenizer without a chat template or without an end token.
    assert template is not None and end is not None
    _refuse(problem for talk in conversations if (problem := _unfit(talk, tokenizer, template, end)))
    return [_encode_turns(turns, tokenizer) for turns in _chat(conversations, tokenizer, end)]


def _refuse(problems: Iterable[str]) -> None:
    if problems := list(problems):
        omitted = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError.all(problems[:MAX_PROBLEMS] + omitted)


def _unfit(talk: Conversation, tokenizer: Tokenizer, template: str, end: str) -> str | None:
    text = "\0".join(chat.strings([talk.messages, talk.tools]))
    if tokens := found_in(text, {*tokenizer.special_tokens, end}):
        return f"{talk.where}: a message contains the special token {', '.join(sorted(tokens))}: take it out"
    if talk.tools and not re.search(r"\btools\b", template):
        return f"{talk.where}: tools: the chat template of {tokenizer.name} does not write them: take them out"
    return None


def _encode_turns(turns: list[Turn], tokenizer: Tokenizer) -> list[Turn]:
    """Encodes the prompt of each turn as a whole, as for generation, and the answer as the continuation of the prompt.

    At the beginning of the input and after some special tokens, SentencePiece encodes a text differently than in the
    middle of the input. The token ids of an answer are found by encoding the prompt and the answer together and
    removing the token ids of the prompt from the front. If the encoding of prompt and answer together does not begin
    with the token ids of the prompt, the answer is encoded separately.

        <s>[INST] Hi [/INST] | Hello</s>     two spans, separated by "|": Hello is encoded as "▁Hello" together with
                                             the first span, but as "▁ ▁Hello" on its own
    """
    # Tokenizers of other kinds than "hf" encode a text independently of the text around it.
    in_context = getattr(tokenizer, "kind", "") == "hf"

    def encode(text: str) -> list[int]:
        # All special tokens in `text` come from the chat template, because `_unfit` rejects messages that contain
        # special tokens.
        return tokenizer.encode(text, allowed_special="all")

    encoded = []
    for prompt, answer, weight in turns:
        prompt_ids = encode(prompt)
        n = len(prompt_ids)
        whole = encode(prompt + answer) if in_context else []
        answer_ids = whole[n:] if in_context and whole[:n] == prompt_ids else encode(answer)
        encoded.append(Turn(prompt_ids, answer_ids, weight))
    return encoded


def _spans(turns: list[Turn]) -> list[Span]:
    """Returns the spans of a conversation, or [] if the prompt of a turn does not begin with the prompt and the answer
    of the previous turn."""
    spans: list[Span] = []
    before: list[int] = []
    for prompt, answer, weight in turns:
        if prompt[: len(before)] != before:
            return []
        spans += [Span(prompt[len(before) :], 0.0), Span(answer, weight)]
        before = prompt + answer
    return spans


def _row(turns: list[Turn]) -> list[Span]:
    """Returns the spans of a conversation, or only the spans of the last turn if a prompt does not begin with the
    previous turn."""
    return _spans(turns) or [Span(turns[-1].prompt, 0.0), Span(turns[-1].answer, turns[-1].weight)]


# --- the template


class _Job(NamedTuple):
    where: str
    messages: list[dict[str, Any]]
    begin: bool  # True if the generation prompt, after which an answer begins, is appended to the rendered messages.
    tools: list[dict[str, Any]] | None = None


def _chat(conversations: Sequence[Conversation], tokenizer: Tokenizer, end: str) -> list[list[Turn]]:
    """Returns the turns of each conversation as text.

    The text of an answer is the text that the chat template appends to the prompt, up to and including the end token.

        prompt       <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
        with answer  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
        answer                                                              Hello!<|im_end|>
    """
    jobs = []
    template = tokenizer.chat_template or ""
    # The pattern matches message.thinking, message["thinking"] and "thinking" in message, but not the variable
    # enable_thinking.
    used = (key for key in REASONING if re.search(rf"[.'\"]{key}\b", template))
    reasoning_key = next(used, REASONING[0])
    for talk in conversations:
        messages = [_template_message(m, tokenizer, reasoning_key) for m in talk.messages]
        tools = list(talk.tools) or None
        for i in _answers(talk):
            jobs += [_Job(talk.where, messages[:i], True, tools), _Job(talk.where, messages[: i + 1], False, tools)]
    texts = iter(_render_all(tokenizer, jobs))
    stops = stop_ids(tokenizer)
    ends = [end, *(name for name, i in whole_tokens(tokenizer).items() if i in stops)]
    turns: list[list[Turn]] = []
    problems: list[str] = []
    for talk in conversations:
        of_talk = []
        for i in _answers(talk):
            message, prompt, full = talk.messages[i], next(texts), next(texts)
            try:
                question = talk.messages[i - 1]
                _refuse_lost(question, prompt, tokenizer.name)
                answer = _answer_text(message, question["content"].strip(), prompt, full, ends, tokenizer)
                of_talk.append(Turn(prompt, answer, message.get("weight", 1.0)))
            except UserError as error:
                problems.append(f"{talk.where}: {error}")
        turns.append(of_talk)
    _refuse(problems)
    return turns


def _template_message(message: dict[str, Any], tokenizer: Tokenizer, reasoning_key: str) -> dict[str, Any]:
    """Returns a message in the form that the chat template reads, with the reasoning under the key that the template
    uses."""
    kept = {key: value for key, value in message.items() if key not in ("input", "weight", REASONING[0])}
    if REASONING[0] in message:
        kept[reasoning_key] = message[REASONING[0]]
    return kept | {"content": chat.with_input(tokenizer, message)}


def _answers(talk: Conversation) -> list[int]:
    return [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]


def _refuse_lost(message: dict[str, Any], prompt: str, name: str) -> None:
    """Raises UserError if the last message is the result of a tool and the chat template left this result out of the
    prompt."""
    text = message["content"].strip()
    if message["role"] == "tool" and not _written(text, prompt):
        raise UserError(
            f"the chat template of {name} does not write the result of a tool: choose another style or data"
        )


def _written(part: str, text: str) -> bool:
    """Returns whether `text` contains `part`, either unchanged or as a JSON string, if whitespace is ignored."""
    forms = (part, json.dumps(part.strip(), ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in _squeezed(text) for form in forms)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _answer_text(
    message: dict[str, Any], question: str, prompt: str, full: str, ends: Sequence[str], tokenizer: Tokenizer
) -> str:
    """Returns the text of an answer, up to and including the token that ends the answer.

    Args:
        question: the text of the message before the answer.
        prompt: the rendered messages before the answer, up to where the answer begins.
        full: the rendered messages up to and including the answer.
        ends: the tokens that can end an answer; the first one is added if the template writes none.
    """
    name, reasoning = tokenizer.name, message.get("reasoning_content")
    before, empty = prompt.rstrip().removesuffix(THINK), EMPTY_THOUGHT.search(prompt)
    if full.startswith(prompt):
        text = full[len(prompt) :]
    elif empty and full.startswith(prompt[: empty.start()]) and not full.startswith(empty[1], empty.start()):
        # The generation prompt ends with empty reasoning, which the chat template leaves out of finished answers.
        text = full[empty.start() :]
    elif full.startswith(before) and prompt.rstrip() != before:
        # The prompt of DeepSeek-R1 ends with the tag that begins the reasoning, and the chat template leaves the
        # reasoning out of finished answers.
        thought = reasoning or message["content"].rpartition(END_THINK)[0].removeprefix(THINK)
        rest = full[len(before) :]
        between = "" if rest.startswith(END_THINK) else f"\n{END_THINK}\n\n"
        text = thought.strip("\n") + between + rest
    elif since := _common_end(prompt, full, {question, *tokenizer.special_tokens}):
        # The chat template writes text around a question only while the question is the last message, as Mistral's
        # template writes the tools.
        text = full[full.rfind(since) + len(since) :]
    else:
        n = len(os.path.commonprefix([prompt, full]))  # noqa: RUF071
        raise UserError(
            f"the chat template of {name} does not render an answer after its prompt: after {prompt[:n][-60:]!r} comes "
            f"{prompt[n : n + 60]!r} in the prompt and {full[n : n + 60]!r} in the finished turn; choose style chatml, "
            "alpaca or phi3"
        )
    found = [(text.find(end), end) for end in ends if end in text]
    if not found:
        end = (chat.end_of_call(tokenizer) if message.get("tool_calls") else None) or ends[0]
    body, end = (text[: min(found)[0]], min(found)[1]) if found else (text, end)
    # The names of called tools and the reasoning must be written outside the content, even if the content quotes them.
    # Before the search for the names of called tools, the first occurrence of the content is removed; before the search
    # for the reasoning, the last occurrence.
    text, content = _squeezed(body), _squeezed(message["content"]) or None
    after, before = "".join(text.split(content, 1)), "".join(text.rsplit(content, 1))
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    missing = [name for name in names if not _written(name, after)]
    lost = [part for part in re.split(f"{THINK}|{END_THINK}", message["content"]) if not _written(part, body)]
    if missing or lost or not body.strip():
        what = f"the call of {missing[0]} (tool_calls)" if missing else "the answer"
        raise UserError(f"the chat template of {tokenizer.name} does not write {what}: choose another style or data")
    if reasoning and not _written(reasoning, before):
        raise UserError(
            f"the chat template of {tokenizer.name} does not write the reasoning of an answer (reasoning_content): put "
            "it in the content, or remove it"
        )
    return body + end


def _common_end(prompt: str, full: str, marks: Collection[str]) -> str:
    """Returns the longest suffix of `prompt` whose last occurrence in `full` ends after the common prefix of both
    texts.

    Returns "" if the suffix of `prompt` that was found contains none of the texts in `marks`, because a suffix of a few
    characters may occur anywhere.
    """
    lengths = range(len(prompt) + 1)
    n = bisect.bisect_left(lengths, True, key=lambda n: prompt[len(prompt) - n :] not in full) - 1
    since = prompt[len(prompt) - n :]
    parted = len(os.path.commonprefix([prompt, full]))  # noqa: RUF071
    return since if n and full.rfind(since) + n > parted and found_in(since, set(marks) - {""}) else ""


def _render_all(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """Renders the messages of each job with `chat.apply`, many jobs per subprocess, and returns the texts.

    A job is a list of messages to render. Each answer of a conversation needs two jobs: the messages before the answer,
    and the messages up to and including the answer. If rendering a batch of jobs fails, the batch is halved repeatedly,
    to find the jobs that cause the error.
    """
    problems: dict[str, None] = {}
    # Built-in templates are trusted: `chat.apply` renders them without a subprocess, so that batching saves no time.
    builtin = chat.is_builtin(tokenizer.chat_template or "")

    def render_or_bisect(jobs: list[_Job]) -> list[str]:
        if len(problems) >= MAX_PROBLEMS:
            return []
        try:
            if builtin or len(jobs) == 1:
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
        return render_or_bisect(jobs[:middle]) + render_or_bisect(jobs[middle:])

    batches = (jobs[first : first + RENDER_BATCH] for first in range(0, len(jobs), RENDER_BATCH))
    texts = [text for batch in batches for text in render_or_bisect(batch)]
    _refuse(problems)
    return texts


def _limits(jobs: list[_Job]) -> dict[str, Any]:
    """Returns limits on the rendering time in seconds and on the number of characters of the output.

    The limit on the rendering time grows with the number of jobs. The limit on the number of output characters grows
    with the number of jobs and with the length of their messages and tools.
    """
    n_chars = sum(len(text) + 64 for job in jobs for text in chat.strings([job.messages, job.tools]))
    return {"timeout_s": 1 + 0.002 * len(jobs), "max_chars": (1 << 16) + 4096 * len(jobs) + 4 * n_chars}


def _render_together(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """Renders all jobs in one call, with an outer template that loops over the jobs and contains the tokenizer's
    template.

    The jobs are passed to the outer template in the variable `tools`, because `chat.apply` passes no other variable
    that can hold a list of jobs. The outer template writes the text of each job as a line of JSON.
    """
    wrapper = (
        "{% for job_ in tools %}"
        "{% set messages, add_generation_prompt, tools = job_.messages, job_.begin, job_.tools %}"
        "{% set text %}\n" + (tokenizer.chat_template or "").removesuffix("\n") + "{{ '' }}{% endset %}"
        "{{ text | tojson }}{{ '\\n' }}{% endfor %}"
    )
    text = chat.apply(tokenizer, jobs[0].messages, wrapper, tools=[job._asdict() for job in jobs], **_limits(jobs))
    texts = [tables.loads(line) for line in text.split("\n")[:-1]]
    if len(texts) != len(jobs) or not all(isinstance(line, str) for line in texts):
        raise UserError("the template breaks out of the template around it")
    return texts


# --- ids


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    style: chat.Style | None = None,
    context_length: int,
    loss_on: Literal["response", "all"] = "response",
    trees: bool = True,
    because: str = "",
) -> Encoded:
    """Encodes each conversation as one training example. Conversations longer than the context are dropped and counted.

    An example of n token ids has n - 1 inputs, and the target of each input is the next token id. The last token id of
    an example, which ends the last answer, is only a target and never an input. An example of n token ids fits in the
    context if it has at most context_length inputs: n <= context_length + 1.

        ids      10 11 12 20 21  1     prompt 10 11 12, answer 20 21, end token 1; fits a context of 5 tokens
        weights   0  0  0  1  1  1     with loss_on="all": 1 everywhere

    If the chat template renders a turn differently once later turns follow, no single sequence of token ids has every
    answer directly after its prompt. A conversation in which later turns change how an earlier turn is rendered is
    encoded as a token tree or, if the token tree does not fit in the context, as one example per answer.

    Args:
        style: the chat style, see `chat.styled`.
        loss_on: "response" computes the loss on the answers and their end tokens, "all" on every token.
        trees: whether to encode such conversations as token trees. False: one example per answer, for attention
            kernels that do not support trees.
        because: text that the error message adds to "no conversation fits a context of .. tokens": the setting that the
            context length comes from, such as " (instruct.context_length)".

    Raises:
        UserError: a conversation cannot be rendered, for a reason that `render` lists (the message names up to 20 such
            conversations); an answer is excluded from the loss although loss_on is "all"; or no conversation fits in
            the context.
    """
    if loss_on not in ("response", "all"):
        raise UserError(f"loss_on: expected response or all, got {loss_on!r}")
    if loss_on == "all":
        _refuse(
            f"{talk.where}: loss_on=all learns every token, but an answer there has a loss weight of its own: "
            "remove its weight or train, or set loss_on=response"
            for talk in conversations
            if any(message.get("weight", 1) != 1 for message in talk.messages)
        )
    rows: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    merged, dropped, shortest = [], 0, None
    for turns in turns_of(conversations, tokenizer, style):
        sequences = _sequences(turns, loss_on)
        longest = max(len(ids) for ids, _ in sequences) - 1
        shortest = min(longest, shortest or longest)
        if longest > context_length:
            dropped += 1
            continue
        if len(sequences) > 1 and trees:
            tree = token_tree.merge(sequences)
            if len(tree.tokens) <= context_length:
                merged.append(tree._replace(weights=np.minimum(tree.weights, 1)) if loss_on == "all" else tree)
                continue
        rows += [ids for ids, _ in sequences]
        weights += [weight for _, weight in sequences]
    if not rows and not merged:
        needs = f"the shortest needs {shortest}" if conversations else "there is none"
        raise UserError(f"no conversation fits a context of {context_length} tokens{because}: {needs}")
    return Encoded(rows, weights, dropped, merged)


def _sequences(turns: list[Turn], loss_on: str = "response") -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the token ids and loss weights of a conversation as one pair of arrays, or as one pair of arrays per
    answer in the loss if no single sequence of token ids has every answer directly after its prompt."""
    whole = _spans(turns)
    by_answer = [[Span(prompt, 0.0), Span(answer, weight)] for prompt, answer, weight in turns if weight]
    return [
        (
            np.array([i for span in spans for i in span.ids], np.int32),
            np.array([1.0 if loss_on == "all" else span.learn for span in spans for _ in span.ids], np.float32),
        )
        for spans in ([whole] if whole else by_answer)
    ]


def tree_of(turns: list[Turn]) -> TokenTree | None:
    """Returns the token tree of a conversation, or None if one sequence of token ids holds all answers that are in the
    loss."""
    sequences = _sequences(turns)
    return token_tree.merge(sequences) if len(sequences) > 1 else None


def show_turns(turns: list[Turn], tokenizer: Tokenizer, trees: bool = True) -> str:
    """Formats a conversation for a terminal: with `show_tree` if `trees` is True and the conversation is encoded as a
    token tree, else with `show`."""
    tree = tree_of(turns) if trees else None
    return show(_row(turns), tokenizer) if tree is None else show_tree(tree, tokenizer)


def show(spans: Sequence[Span], tokenizer: Tokenizer) -> str:
    """Formats one example for a terminal as text in which the spans that are in the loss are green.

    Control characters are escaped.
    """
    return "".join(_coloured(tokenizer.decode(span.ids), bool(span.learn)) for span in spans)


def show_tree(tree: TokenTree, tokenizer: Tokenizer) -> str:
    """Formats a token tree for a terminal as text with one paragraph per run of tokens without a branch.

    The line before each paragraph states the positions of the tokens in the paragraph. The indentation of a paragraph
    is the number of branches of the token tree before the paragraph. The tokens that are in the loss are green.
    """
    children = token_tree.children(tree)
    lines: list[str] = []
    stack = [(root, 0, False) for root in reversed(children[-1])]
    while stack:
        node, depth, learn = stack.pop()
        first, runs = node, [(learn, [int(tree.tokens[node])])]
        while True:
            learn, following = bool(tree.weights[node]), children.get(node, [])
            if len(following) != 1 or (learn and tree.tokens[following[0]] != tree.targets[node]):
                break
            node = following[0]
            runs.append((learn, [int(tree.tokens[node])]))
        if learn and all(tree.tokens[child] != tree.targets[node] for child in following):
            runs.append((True, [int(tree.targets[node])]))  # the end token of an answer is a target, but never an input
        grouped = [(learn, [i for _, ids in run for i in ids]) for learn, run in groupby(runs, lambda item: item[0])]
        text = "".join(_coloured(tokenizer.decode(ids), learn) for learn, ids in grouped)
        header = f"-- positions {tree.positions[first]} to {tree.positions[node]}"
        lines += [f"{'  | ' * depth}{line}" for line in [header, *text.split("\n")]]
        after = [(child, depth + 1, learn and tree.tokens[child] == tree.targets[node]) for child in following]
        stack += reversed(after)
    return "\n".join(lines)


def _coloured(text: str, learn: bool) -> str:
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    # Each line of a green text gets its own colour code, so that lines can be indented.
    return "\n".join(f"{COLOUR}{line}{PLAIN}" if learn and line else line for line in plain.split("\n"))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
