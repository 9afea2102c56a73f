"""Conversations for supervised fine-tuning: reading, chat templates, token ids and the loss mask.

    talks   = read("instruction-data.json")
    spans   = render(talks[0], tok)      [Span(ids of the prompt, False), Span(ids of the answer and its end, True)]
    encoded = encode(talks, tok, context_length=256)
    rows    = packing.packed(encoded, 256)

The loss mask depends on the position of a token in the conversation, not on its id: the token that ends an answer is a
target, but the same token id in the padding or in a user turn is not.
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

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # the role for each role name of ShareGPT
MAX_PROBLEMS = 20
# number of texts rendered per subprocess: starting a subprocess takes 0.1 s, rendering a text less than 1 ms
RENDER_BATCH = 2048
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"


class Conversation(NamedTuple):
    """One conversation.

    messages     messages {"role": .., "content": ..}, with the roles [system,] user, assistant, user, assistant, ..
                 in this order. If an Alpaca record has a non-empty "input", its user message has the key "input",
                 too. An answer whose key "learn" is False is excluded from the loss.
    where        location of the conversation in its source, such as rows.jsonl:3
    constraints  verifiable constraints on the answer, see `evaluation.generation_metrics`
    tools        JSON schemas of functions, for chat templates that support tools
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    constraints: tuple[Any, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


class Span(NamedTuple):
    """Consecutive token ids of a conversation. `learn` is True if the ids are targets of the loss."""

    ids: list[int]
    learn: bool


class Unused(NamedTuple):
    """For one ignored key, the number of records that have it, and the locations of the first and last of them."""

    first: str  # location of the first record with the key
    records: int  # number of records with the key
    last: str  # location of the last record with the key


# --- records


def read(source: str, notes: list[str] | None = None) -> list[Conversation]:
    """Reads the conversations of a .json (array), .jsonl, .parquet or .csv file, or of hf:org/name[:config][@split].

    Each record has one of the formats in `FORMATS`. Optional keys of a record are system (or system_prompt or
    system_message), tools, constraints, and history, which is [[question, answer], ..]. An optional key of a message
    says whether an answer is in the loss: weight (1 or 0), or train, training or loss (true or false). If the prompt
    is a list of messages, the answers in the prompt are excluded from the loss. Keys in METADATA and keys with empty
    values are ignored. Keys in UNUSABLE raise an error, because they would change the prompt or the loss in an
    unsupported way.

    Args:
        notes: list to which a line of text is appended if keys that are not in METADATA were ignored; the line names
            these keys. None: the line is printed to stderr.

    Raises:
        UserError: the file does not exist, or records are invalid: they cannot be parsed, have no known format or have
            no response. The message lists the first 20 problems.
    """
    return [talk for (talk,) in read_as(source, FORMATS, notes)]


def read_as(source: str, formats: Formats, notes: list[str] | None = None) -> list[tuple[Conversation, ...]]:
    """Returns the conversations of each record: two if the records are preference pairs, otherwise one.

    Raises the same errors as `read`.
    """
    records: list[tuple[Conversation, ...]] = []
    problems: list[str] = []
    unused: dict[str, Unused] = {}
    unknown = False
    try:
        for location, record in tables.read(source):
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
    """Reports the ignored keys of n records in one line of text, which is appended to `notes` or printed to stderr."""
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


Turns = list[tuple[str, dict[str, Any]]]  # for each turn, its location in the record and the unvalidated message
Parsed = Turns | str  # the turns of one conversation, or an error message
Parse = Callable[[tables.Record], Parsed | tuple[Parsed, ...]]
# maps the keys that a record of a format must have to an example of such a record, and the parser of the format
Formats = dict[tuple[str, ...], tuple[str, Parse]]

# Keys that are ignored silently, because metadata is part of neither the prompt nor the answer.
_METADATA = """
id idx index uid uuid guid conversation_id conv_id dialogue_id prompt_id question_id message_id parent_id source dataset
origin subset split category categories topic subject domain task task_type task_name type tags tag keywords language
lang license url title created created_at updated_at timestamp date time author model generator version meta metadata
info hash md5 tokens num_tokens n_tokens token_count length difficulty quality score scores rating ratings score_chosen
score_rejected chosen_score rejected_score chosen_rating rejected_rating chosen_model rejected_model
"""
METADATA = frozenset(_METADATA.split())

_MEDIA = "pictures and sound are not supported"
_TOOLS = "calls of tools are not supported (a list of tool schemas is: tools)"
_PROMPT = "would be left out of the prompt: put it in the instruction, input or system"
_THOUGHT = "would be left out of the answer: put it in the content, as the chat template writes it, or remove it"
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
            lines = _unused_keys(message, TURN_KEYS, location, unused, "messages[].")
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
    caller reads them.
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
    """Returns the record's system message and history, if it has them, followed by the turns.

    If the system message or history is invalid, returns an error message instead.
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


# keys by which OpenAI's fine-tuning API, axolotl and ms-swift set whether an answer is in the loss
LOSS_FLAGS = ("weight", "train", "training", "loss")
TURN_KEYS = ("role", "content", "input", *LOSS_FLAGS)


def _check_loss_flags(turns: Turns) -> list[str]:
    """Returns error messages about invalid values of the keys in LOSS_FLAGS.

    If all values are valid, but exclude all answers from the loss, returns an error message that says so.
    """
    problems = []
    for place, message in turns:
        for key, value in _loss_flags(message).items():
            if key == "weight" and (isinstance(value, bool) or value not in (0, 1)):
                problems.append(f"{place}: weight: expected 0 or 1, found {value!r:.40}")
            elif key != "weight" and not isinstance(value, bool):
                problems.append(f"{place}: {key}: expected true or false, found {value!r:.40}")
            elif message["role"] != "assistant" and value:
                problems.append(
                    f"{place}: {key}: only answers can be in the loss, and the role here is {message['role']}"
                )
    learned = [_learn(message) for _, message in turns if message["role"] == "assistant"]
    return problems or ([] if any(learned) else ["all its answers are excluded from the loss"])


def _loss_flags(message: dict[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in LOSS_FLAGS if message.get(key) is not None}


def _learn(message: dict[str, Any]) -> bool:
    return all(_loss_flags(message).values())


def _messages(turns: Turns) -> tuple[dict[str, Any], ...]:
    """Returns the messages up to and including the last answer that is in the loss.

    Later messages are left out, because they do not change the loss.
    """
    last = max(i for i, (_, m) in enumerate(turns) if m["role"] == "assistant" and _learn(m))
    messages = []
    for _, message in turns[: last + 1]:
        skipped = message["role"] == "assistant" and not _learn(message)
        kept = {key: message[key] for key in ("role", "content", "input") if key in message}
        messages.append(kept | ({"learn": False} if skipped else {}))
    return tuple(messages)


def _pair(question: str, answer: str, extra: str = "") -> Callable[[tables.Record], Parsed]:
    """Returns a parser for records that have a question and its answer, both strings or both lists of messages."""

    def parse(record: tables.Record) -> Parsed:
        if not extra and (isinstance(record[question], list) or isinstance(record[answer], list)):
            prompt, response = turns(question)(record), turns(answer)(record)
            if isinstance(prompt, str) or isinstance(response, str):
                return prompt if isinstance(prompt, str) else response
            # exclude the answers within a prompt from the loss by setting their weight to 0
            prompt = [(place, m | {"weight": 0} if m["role"] == "assistant" else m) for place, m in prompt]
            return [*prompt, *response]
        user = {"role": "user", "content": record[question]}
        if extra and record.get(extra) not in ("", None):
            user["input"] = record[extra]
        return [(question, user), (answer, {"role": "assistant", "content": record[answer]})]

    return parse


def turns(key: str) -> Callable[[tables.Record], Parsed]:
    """Returns a parser for records that have a list of messages under `key`.

    A message is {"role": .., "content": ..} or {"from": .., "value": ..}.
    """

    def parse(record: tables.Record) -> Parsed:
        messages = record[key]
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
            return f'{key}: expected a list such as [{{"role": .., "content": ..}}], found {tables.kind_of(messages)}'
        parsed: Turns = []
        for i, turn in enumerate(messages):
            role, content = _one_of(turn, ("role", "from")), _one_of(turn, ("content", "value"))
            if role is None or content is None:
                return f"{key}[{i}]: expected role and content (or from and value), found {_keys(turn)}"
            rest = {name: value for name, value in turn.items() if name not in (role, content)}
            named = ROLES.get(turn[role], turn[role]) if isinstance(turn[role], str) else turn[role]
            parsed.append((f"{key}[{i}]", {"role": named, "content": turn[content]} | rest))
        return parsed

    return parse


def _one_of(turn: dict, names: tuple[str, str]) -> str | None:
    """Returns which of two synonymous keys a message has.

    If the message has both keys, returns the one whose value is not null. Returns None if the message has neither key,
    or both keys with values that are not null.
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
        if message["role"] not in ("system", "user", "assistant"):
            problems.append(f"{place}: expected system, user or assistant, found {message['role']!r:.40}")
        for key in ("content", "input"):
            if key in message and (problem := _text_problem(message[key])):
                problems.append(f"{place}: {'the response' if message['role'] == 'assistant' else key} {problem}")
    roles = [message["role"] for _, message in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not problems and (not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2)):
        shown = ", ".join(roles[:8]) + ", .." * (len(roles) > 8) or "no turn"
        problems.append(f"expected turns of user, assistant, .. up to a last response, found {shown}")
    return problems


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
    """Returns the token ids of a conversation as spans, each of which is either in the loss or excluded from it.

    The last span is the last answer with its end token. The ids before an answer are exactly the prompt that the model
    gets when it generates this answer.

    Args:
        style: the chat style, see `chat.styled`.

    Raises:
        UserError: one of the following is true.
            - `chat.styled` raises an error for the tokenizer or the style.
            - A message contains the text of a special token, which could end a turn.
            - The chat template writes a turn differently if other turns follow it.
            - The conversation has tools, but the chat template does not support tools.
    """
    return render_all([conversation], tokenizer, style)[0]


def render_all(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, style: chat.Style | None = None
) -> list[list[Span]]:
    """Renders several conversations as `render` does, but faster, because one subprocess renders many of them."""
    tokenizer = chat.styled(tokenizer, style)
    template, end = tokenizer.chat_template, chat.end_of_answer(tokenizer)
    assert template is not None and end is not None  # `chat.styled` refuses tokenizers without a template or end token
    _refuse(problem for talk in conversations if (problem := _unfit(talk, tokenizer, template, end)))
    return [_encode_spans(spans, tokenizer) for spans in _chat(conversations, tokenizer, end)]


def _refuse(problems: Iterable[str]) -> None:
    if problems := list(problems):
        omitted = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError.all(problems[:MAX_PROBLEMS] + omitted)


def _unfit(talk: Conversation, tokenizer: Tokenizer, template: str, end: str) -> str | None:
    text = "\0".join(message["content"] + "\0" + message.get("input", "") for message in talk.messages)
    text = "\0".join([text, *chat.strings(talk.tools)])
    if tokens := found_in(text, {*tokenizer.special_tokens, end}):
        return f"{talk.where}: a message contains the special token {', '.join(sorted(tokens))}: take it out"
    if talk.tools and not re.search(r"\btools\b", template):
        return f"{talk.where}: tools: the chat template of {tokenizer.name} does not write them: take them out"
    return None


def _encode_spans(texts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[Span]:
    """Encodes the texts that a conversation consists of, in order, as one span of token ids per text.

    SentencePiece encodes a text differently at the beginning of its input, or after some special tokens, than in the
    middle. The ids of a span are therefore found by encoding all text up to the end of the span and removing the ids of
    the earlier spans from the front. If the encoding does not begin with the ids of the earlier spans, the text of the
    span is encoded on its own instead.

        <s>[INST] Hi [/INST] | Hello</s>     two spans, separated by "|": Hello is encoded as "▁Hello" together with
                                             the first span, but as "▁ ▁Hello" on its own
    """
    spans: list[Span] = []
    prefix, ids = "", list[int]()
    in_context = getattr(tokenizer, "kind", "") == "hf"  # other tokenizers encode a text regardless of its context

    def encode(text: str) -> list[int]:
        # all special tokens come from the template, because `_unfit` refuses messages that contain special tokens
        return tokenizer.encode(text, allowed_special="all")

    for text, learn in texts:
        prefix += text
        whole = encode(prefix) if in_context else []
        new = whole[len(ids) :] if in_context and whole[: len(ids)] == ids else encode(text)
        ids += new
        spans.append(Span(new, learn))
    return spans


# --- the template


class _Job(NamedTuple):
    where: str
    messages: list[dict[str, str]]
    begin: bool  # whether to add the generation prompt, after which the answer begins
    tools: list[dict[str, Any]] | None = None


def _chat(conversations: Sequence[Conversation], tokenizer: Tokenizer, end: str) -> list[list[tuple[str, bool]]]:
    """Returns, for each conversation, the text of each span and whether the span is in the loss.

    An answer is the text that the template adds to the prompt, up to and including the end token.

    prompt       <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    with answer  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    answer                                                              Hello!<|im_end|>
    """
    jobs = []
    for talk in conversations:
        messages = [{"role": m["role"], "content": chat.with_input(tokenizer, m)} for m in talk.messages]
        tools = list(talk.tools) or None
        for i in _answers(talk):
            jobs += [_Job(talk.where, messages[:i], True, tools), _Job(talk.where, messages[: i + 1], False, tools)]
    texts = iter(_render_all(tokenizer, jobs))
    spans: list[list[tuple[str, bool]]] = []
    problems: list[str] = []
    for talk in conversations:
        turns = [(next(texts), next(texts), talk.messages[i].get("learn", True)) for i in _answers(talk)]
        try:
            spans.append(_spans(turns, tokenizer, end))
        except UserError as error:
            problems.append(f"{talk.where}: {error}")
    _refuse(problems)
    return spans


def _answers(talk: Conversation) -> list[int]:
    return [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]


def _spans(turns: list[tuple[str, str, bool]], tokenizer: Tokenizer, end: str) -> list[tuple[str, bool]]:
    """Splits the text of a conversation into spans: a prompt, its answer, the next prompt, and so on.

    Args:
        turns: for each answer, the rendered text before the answer, the rendered text that includes the answer, and
            whether the answer is in the loss.

    Returns:
        For each span, its text and whether it is in the loss.
    """
    spans: list[tuple[str, bool]] = []
    before = ""
    for prompt, full, learn in turns:
        if not prompt.startswith(before) or not full.startswith(prompt) or full == prompt:
            shorter, longer = (prompt, full) if prompt.startswith(before) else (before, prompt)
            raise UserError(
                f"the chat template of {tokenizer.name} renders earlier turns differently when more follow, so the "
                f"tokens of an answer are not fixed: {longer[-60:]!r} does not begin with {shorter[-60:]!r}; choose "
                "style alpaca or phi3, or other data (one turn each, without thinking)"
            )
        answer, _, _ = full[len(prompt) :].partition(end)  # some templates omit `end` after the last answer
        spans += [(prompt[len(before) :], False), (answer + end, learn)]
        # generation stops after `end`, so text that the template writes after `end` belongs to the next prompt
        before = prompt + answer + end
    return spans


def _render_all(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """Returns the text of each job: its messages, rendered with `chat.apply`, many jobs per subprocess.

    A job is a list of messages to render. Each answer of a conversation needs two jobs: the messages before the answer,
    and the messages up to and including the answer. If rendering a batch of jobs fails, the batch is halved repeatedly,
    to find the jobs that cause the error.
    """
    problems: dict[str, None] = {}
    # built-in templates are trusted, so `chat.apply` renders them without a subprocess, and batching saves no time
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

    Both limits grow with the number of jobs. The limit on the characters also grows with the length of the messages
    and tools of the jobs.
    """
    n_chars = sum(len(message["content"]) for job in jobs for message in job.messages)
    n_chars += sum(len(text) + 64 for job in jobs for text in chat.strings(job.tools))
    return {"timeout_s": 1 + 0.002 * len(jobs), "max_chars": (1 << 16) + 4096 * len(jobs) + 4 * n_chars}


def _render_together(tokenizer: Tokenizer, jobs: list[_Job]) -> list[str]:
    """Renders all jobs at once, with one template that loops over the jobs and contains the tokenizer's own template.

    The jobs are passed to this template in the variable `tools`, because `chat.apply` passes no other variable that can
    hold a list of jobs. The template writes the text of each job as a line of JSON.
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
    because: str = "",
) -> Encoded:
    """Encodes each conversation as one training example. Conversations longer than the context are dropped and counted.

    An example of n ids has n - 1 inputs, each with the next id as its target. The last id, the end of the answer, is
    only a target, never an input. An example therefore fits in the context if n <= context_length + 1.

        ids      10 11 12 20 21  1     prompt 10 11 12, answer 20 21, end token 1; fits a context of 5 tokens
        weights   0  0  0  1  1  1     with loss_on="all": 1 everywhere

    Args:
        style: the chat style, see `chat.styled`.
        loss_on: "response" computes the loss on the answers and their end tokens, "all" on every token.
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
            f"{talk.where}: loss_on=all learns every token, but an answer there is excluded from the loss: "
            "remove its weight or train, or set loss_on=response"
            for talk in conversations
            if not all(message.get("learn", True) for message in talk.messages)
        )
    rows, weights, shortest = [], [], None
    for spans in render_all(conversations, tokenizer, style):
        ids = [i for span in spans for i in span.ids]
        shortest = min(len(ids) - 1, shortest or len(ids))
        if len(ids) > context_length + 1:
            continue
        learn = [span.learn or loss_on == "all" for span in spans for _ in span.ids]
        rows.append(np.array(ids, np.int32))
        weights.append(np.array(learn, np.float32))
    if not rows:
        needs = f"the shortest needs {shortest}" if conversations else "there is none"
        raise UserError(f"no conversation fits a context of {context_length} tokens{because}: {needs}")
    return Encoded(rows, weights, len(conversations) - len(rows))


def show(spans: Sequence[Span], tokenizer: Tokenizer) -> str:
    """Returns the text of one example for a terminal, in which the spans that are in the loss are green.

    Control characters are escaped.
    """
    text = ""
    for span in spans:
        plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in tokenizer.decode(span.ids))
        text += f"{COLOUR}{plain}{PLAIN}" if span.learn else plain
    return text


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
