"""Renders conversations with chat templates, which write a conversation in the text format that a chat model expects.

    messages = [{"role": "user", "content": "Where is Paris?"}]
    apply(tok, messages)         "<|im_start|>user\\nWhere is Paris?<|im_end|>\\n<|im_start|>assistant\\n"
    encode_chat(tok, messages)   the token ids of that text; special tokens are encoded as their ids

A chat template is a Jinja program that comes with the model and is therefore not trusted: `_render.py` renders the
template in a separate process with limits on time and memory. Starting a process and rendering a template in the
process take about 0.1 s. The templates in BUILTIN are trusted and rendered in the calling process. Messages are not
trusted: `encode_chat` raises an error for a message that contains a special token, because the special token could end
the user's turn and begin another turn (prompt injection).

    end_of_answer(tok)           the token that the template writes after every answer, such as "<|im_end|>"
    with_end(tok)                a copy of the tokenizer whose template ends every answer with one of its eos_ids
    answer_ends(tok)             the ids of the tokens that end an answer
    styled(tok, "alpaca")        a copy of the tokenizer with the template of a prompt style, for fine-tuning
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from gptjax.config.schema import ChatStyle as Style
from gptjax.errors import UserError, did_you_mean
from gptjax.processes import Child
from gptjax.tokenizers import _render
from gptjax.tokenizers.base import Tokenizer, all_of, first_of, found_in, stop_ids, whole_tokens

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 256 << 10
START_TIMEOUT_S = 20.0  # time limit in seconds for the start of the rendering process

Message = dict[str, Any]
STYLES: tuple[Style, ...] = get_args(Style)

BUILTIN: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
        "{{ 'Below is an instruction that describes a task. '"
        " + 'Write a response that appropriately completes the request.' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ '\\n\\n### Response:\\n' + message['content'] }}{{ eos_token }}"
        "{% elif message['role'] != 'system' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}

BEGIN = "{{ bos_token }}"  # The Jinja code BEGIN is prepended to a built-in template if add_bos is true.

# The Jinja code END appends eos_token to every answer except tool calls. END is prepended to a template that writes no
# token after an answer.
END = (
    "{% set with_ends = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and not message['tool_calls'] %}"
    "{% set with_ends.messages = with_ends.messages"
    " + [dict(message, content=message['content'] + eos_token)] %}"
    "{% else %}{% set with_ends.messages = with_ends.messages + [message] %}{% endif %}"
    "{% endfor %}"
    "{% set messages = with_ends.messages %}\n"
)
# The constants _QUESTION, _ANSWER and _NEXT are the contents of the messages of a test conversation. In the rendered
# test conversation, the text after `_ANSWER` shows which token a template writes after an answer.
_QUESTION, _ANSWER, _NEXT = "first-question", "first-reply", "second-question"
_PARAMETERS = {"type": "object", "properties": {"word": {"type": "string", "description": "word"}}}
_FUNCTION = {"name": "look_up", "description": "Looks up a word.", "parameters": _PARAMETERS}
_TOOL = {"type": "function", "function": _FUNCTION}


def apply(tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None, **options: Any) -> str:
    """Render a conversation as text with a chat template.

    Args:
        template: a key of BUILTIN, or a Jinja template. None: the tokenizer's own chat template.
        options: arguments that are passed on to `render`: add_generation_prompt, tools, timeout_s, max_chars.
    """
    template = tokenizer.chat_template if template is None else BUILTIN.get(template, template)
    if template is None:
        raise UserError(
            f"{tokenizer.name} has no chat template: choose one of {', '.join(BUILTIN)}, the one it is trained with"
        )
    bos, eos = _roles(tokenizer)
    return render(template, messages, bos_token=bos, eos_token=eos, **options)


def _roles(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the values of the template variables bos_token and eos_token: the texts of the tokens, or "" for a token
    that the tokenizer does not have."""
    names: dict[int | None, str] = {i: name for name, i in whole_tokens(tokenizer).items()}
    eos = next(iter(stop_ids(tokenizer)), None)
    return names.get(tokenizer.bos_id, ""), names.get(eos, "")


def is_builtin(template: str) -> bool:
    """Return whether the template is a built-in template, which is trusted and rendered in the calling process."""
    return template.removeprefix(END).removeprefix(BEGIN) in BUILTIN.values()


# --- ends of answers


def end_of_answer(tokenizer: Tokenizer) -> str | None:
    """Return the token that the tokenizer's chat template writes after every answer, or None if no token follows an
    answer.

    If several tokens follow an answer, the first of these tokens that ends generation (`stop_ids`) is returned, or the
    first token if none of these tokens ends generation. If a template writes a different token or no token after the
    last answer of a conversation, or ends an answer with the token that begins the next turn, the token that ends
    generation is returned.

        ..<|im_start|>assistant\\nHello!<|im_end|>\\n                       "<|im_end|>"
        ..<|assistant|>\\nHello!<|end|>\\n<|endoftext|>                     "<|end|>"; <|endoftext|> ends the whole text
        ..<|assistant|>\\nHello!<|user|>                                  "<|user|>" if it is one of eos_ids
        ..ASSISTANT: Hello!                                              None
    """
    if tokenizer.chat_template is None:
        return None
    bos, eos = _roles(tokenizer)
    if tokenizer.chat_template.startswith(END):
        return eos or None
    return _end_of_answer(tokenizer.chat_template, frozenset(whole_tokens(tokenizer)), _stops(tokenizer), bos, eos)


def end_of_call(tokenizer: Tokenizer) -> str | None:
    """Return the token that a template writes between a tool call and the result of the tool, if this token ends
    generation (`stop_ids`), otherwise None."""
    bos, eos = _roles(tokenizer)
    return _end_of_call(tokenizer.chat_template or "", _stops(tokenizer), bos, eos)


def _stops(tokenizer: Tokenizer) -> frozenset[str]:
    ids = stop_ids(tokenizer)
    return frozenset(name for name, i in whole_tokens(tokenizer).items() if i in ids)


@functools.lru_cache(maxsize=16)
def _end_of_call(template: str, stops: frozenset[str], bos_token: str, eos_token: str) -> str | None:
    call = {"type": "function", "id": "look_up01", "function": {"name": "look_up", "arguments": {"word": _ANSWER}}}
    messages: list[Message] = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "tool_call_id": "look_up01", "content": _NEXT},
    ]
    try:
        text = render(template, messages, bos_token=bos_token, eos_token=eos_token, tools=[_TOOL])
    except UserError:
        return None
    return first_of(text.partition(_ANSWER)[2].partition(_NEXT)[0], stops)


@functools.lru_cache(maxsize=16)
def _end_of_answer(
    template: str, tokens: frozenset[str], stops: frozenset[str], bos_token: str, eos_token: str
) -> str | None:
    question, answer, next_question = (
        {"role": role, "content": text} for role, text in (("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT))
    )

    def write(messages: list[Message], begin: bool, tools: list[dict[str, Any]]) -> str:
        return render(
            template, messages, add_generation_prompt=begin, bos_token=bos_token, eos_token=eos_token,
            tools=tools or None,
        )  # fmt: skip

    def all_after(text: str) -> list[str]:
        return all_of(text.partition(_ANSWER)[2].partition(_NEXT)[0], tokens)

    # Some templates require a system message, and some templates require tools.
    for system, tools in (([], []), ([{"role": "system", "content": "system"}], []), ([], [_TOOL])):
        try:
            last = all_after(write([*system, question, answer], False, tools))
        except UserError:
            continue
        try:
            text = write([*system, question, answer, next_question], True, tools)
        except UserError:  # a single-turn template
            return next(iter(last), None)
        earlier, before = all_after(text), text.partition(_QUESTION)[0]
        if both := os.path.commonprefix([last, earlier]):  # noqa: RUF071
            return next((token for token in both if token in stops), both[0])
        # In this case the chat template writes no token after the last answer, or a different token than after earlier
        # answers. A token that the chat template writes both after an answer and directly before a question marks the
        # beginning of a turn, unless the token ends generation.
        if not earlier:
            return None
        if end := next((token for token in (*last, earlier[0]) if token in stops), None):
            return end
        return earlier[0] if not last and not before.rstrip().endswith(earlier[0]) else None
    return None


def with_end(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of the tokenizer whose chat template ends every answer with a token of eos_ids.

    If the template does not use the variable eos_token, the token that ends answers becomes the first of eos_ids. If
    the template uses eos_token, the first of eos_ids stays the same, because the first of eos_ids is the value of
    eos_token; the token that ends answers is appended to eos_ids, unless eos_ids already contains the token. If the
    template writes no token after answers, the Jinja code END is put before the template; END appends eos_token (the
    first of `stop_ids`) to every answer except tool calls.

    Raises:
        UserError: the template writes no token after answers, and the tokenizer has neither eos_ids nor an eot_id.
    """
    end, template = end_of_answer(tokenizer), tokenizer.chat_template
    assert template is not None
    if end is None:
        _, end = _roles(tokenizer)
        if not end:
            raise UserError(
                f"nothing can end an answer: the chat template writes no token after it, and the {tokenizer.name} "
                "tokenizer has no end-of-text; take a model with tokenizer.name=bytes, bpe or gpt2"
            )
        template = END + template
        tokenizer = tokenizer.replace(chat_template=template)
    i, ids = whole_tokens(tokenizer)[end], tokenizer.eos_ids
    if re.search(r"\beos_token\b", template) and ids:
        return tokenizer if i in ids else tokenizer.replace(eos_ids=(*ids, i))
    return tokenizer.replace(eos_ids=(i, *(other for other in ids if other != i)))


def answer_ends(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens that end an answer: the ids that `stop_ids` returns, and the id of the token that
    the chat template writes after an answer."""
    end = end_of_answer(tokenizer)
    return list(dict.fromkeys([*stop_ids(tokenizer), *([whole_tokens(tokenizer)[end]] if end else [])]))


def plain_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of an answer without special tokens, so that `encode_chat` accepts the text as a message."""
    special = set(tokenizer.special_tokens.values())
    text = tokenizer.decode([i for i in ids if i not in special])
    # Also remove the names of special tokens from the text, because several ordinary tokens together can spell the name
    # of a special token.
    while names := found_in(text, tokenizer.special_tokens):
        for name in names:
            text = text.replace(name, "")
    return text


# --- prompt styles


def default_style(tokenizer: Tokenizer) -> Style:
    return "chat" if tokenizer.chat_template is not None else "alpaca"


def styled(tokenizer: Tokenizer, style: Style | None = None) -> Tokenizer:
    """Return a copy of the tokenizer with the chat template of a prompt style. The chat template of the returned
    tokenizer ends every answer with a token of eos_ids of the returned tokenizer.

    A fine-tuned model is saved with the returned tokenizer, so that `gptjax chat` and exported models use the chat
    template and the stop tokens of the training.

    Args:
        style: chat    the tokenizer's own template
               chatml  "<|im_start|>user", "<|im_end|>", ..
               alpaca  preamble (or the system message), "### Instruction:", "### Input:", "### Response:"
               phi3    "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"
               None    `chat` if the tokenizer has a chat template, otherwise `alpaca`
            Markers that are not in the vocabulary are encoded as ordinary text. Every answer ends with the token that
            the template writes after it (<|im_end|>, <|end|>, ..). If the template writes no such token, the answer
            ends with the tokenizer's eot_id or, in the style `chat`, with the first of its eos_ids, if it has any.

    Raises:
        UserError: the style is unknown, the style is chat but the tokenizer has no chat template, or no token can end
            an answer.

    Source: the style alpaca is from chapter 7.2 of "Build a Large Language Model (From Scratch)"; the style phi3 is the
    template of microsoft/Phi-3-mini-4k-instruct (exercise 7.1 of the book omits <|end|>).
    """
    style = style or default_style(tokenizer)
    if style not in STYLES:
        hint = did_you_mean(style, STYLES, ", did you mean {!r}?")
        raise UserError(f"no prompt style {style!r}{hint} (known: {', '.join(STYLES)})")
    if style != "chat":
        begin = BEGIN if tokenizer.add_bos and tokenizer.bos_id is not None else ""
        ends = [i for i in (tokenizer.eot_id, *tokenizer.eos_ids) if i is not None]
        tokenizer = tokenizer.replace(chat_template=begin + BUILTIN[style], eos_ids=tuple(dict.fromkeys(ends)))
    elif tokenizer.chat_template is None:
        raise UserError(
            f"style chat: {tokenizer.name} has no chat template; choose instruct.style=chatml (prefer.style=chatml), "
            "alpaca or phi3"
        )
    try:
        return with_end(tokenizer)
    except UserError as error:
        raise UserError(f"style {style}: {error}") from None


def describe_style(tokenizer: Tokenizer, style: Style | None) -> list[str]:
    """Return log lines that name the prompt style and the token that ends an answer. The argument `tokenizer` is the
    tokenizer of the base model, to which `styled` has not been applied."""
    named: str | None = "the model's own chat template" if style in (None, "chat") else style
    if style is None and tokenizer.chat_template is None:
        named = "alpaca, as the model has no chat template"
    made = styled(tokenizer, style)
    lines = [f"style   {named}; an answer ends with {end_of_answer(made)}"]
    if (made.chat_template or "").startswith(END):
        lines.append("        (end-of-text is appended there, learned and kept: the template itself writes no token)")
    return lines


def with_input(tokenizer: Tokenizer, message: Message) -> str:
    """Return the content of a message. If the message has the key "input", as in an Alpaca record, the value of "input"
    is appended.

        {"content": "Add", "input": "1, 2"}    alpaca "Add\\n\\n### Input:\\n1, 2", other templates "Add\\n1, 2"
    """
    between = "\n\n### Input:\n" if (tokenizer.chat_template or "").endswith(BUILTIN["alpaca"]) else "\n"
    return between.join(message[key] for key in ("content", "input") if key in message)


# --- text and ids


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    *,
    allow_special_in_content: bool = False,
    **options: Any,
) -> list[int]:
    """Return the token ids of the conversation that `apply` renders as text; special tokens are encoded as their ids.

    Args:
        allow_special_in_content: whether messages and tools may contain special tokens. They are encoded as their ids,
            so a special token in a message may end the turn.

    Raises:
        UserError: a message or a tool contains a special token, and allow_special_in_content is false.
    """
    text = apply(tokenizer, messages, template, **options)
    if not allow_special_in_content:
        values = {f"messages[{i}]": message for i, message in enumerate(messages)} | {"tools": options.get("tools")}
        problems = [
            f"{location} contains the special token {', '.join(sorted(names))}: remove it, "
            "or pass allow_special_in_content=True to encode it as its id"
            for location, value in values.items()
            if (names := found_in("\0".join(strings(value)), tokenizer.special_tokens))
        ]
        if problems:
            raise UserError.all(problems)
    return tokenizer.encode(text, allowed_special="all")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
    timeout_s: float = 1.0,
    max_chars: int = 64 * 1024,
) -> str:
    """Render a conversation with a chat template, like apply_chat_template of transformers.

    Args:
        add_generation_prompt: whether the text ends with the header of the assistant's next turn.
        tools: JSON schemas of functions, for templates that support tools.
        timeout_s: limit on the wall-clock time of the rendering, in seconds.
        max_chars: limit on the number of characters of the rendered text.

    Raises:
        UserError: the messages are invalid, or the template is invalid, raises an error, or exceeds a limit.
    """
    _check(template, messages, tools)
    context: dict[str, Any] = {"messages": list(messages), "tools": tools, "documents": None}
    context |= {"add_generation_prompt": add_generation_prompt}
    # An empty bos_token or eos_token is left undefined in the template, as in transformers.
    context |= {"bos_token": bos_token} if bos_token else {}
    context |= {"eos_token": eos_token} if eos_token else {}
    if is_builtin(template):
        try:
            return _render.render(template, context, max_chars)
        except ValueError as error:
            raise UserError(f"chat template: {error}") from None
    answer = _in_child(
        {"template": template, "context": context, "max_chars": max_chars, "timeout_s": timeout_s}, timeout_s
    )
    if "error" in answer:
        raise UserError(f"chat template: {answer['error']}")
    return answer["text"]


def _check(template: Any, messages: Any, tools: Any) -> None:
    problems = []
    if not isinstance(template, str):
        problems.append(f"chat template: expected a text, got {type(template).__name__}")
    elif len(template) > MAX_TEMPLATE_CHARS:
        problems.append(f"chat template: {len(template):,} characters, more than {MAX_TEMPLATE_CHARS:,}")
    elif "{" not in template:
        hint = did_you_mean(template, BUILTIN, ", did you mean {!r}?")
        problems.append(f"chat template: {template!r:.60} is none, and none of {', '.join(BUILTIN)}{hint}")
    if not isinstance(messages, list | tuple) or not messages:
        problems.append('messages: expected a list such as [{"role": "user", "content": "Hello"}]')
        messages = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            problems.append(f"messages[{i}]: expected an object with role and content, got {type(message).__name__}")
            continue
        if message.get("role") not in list(ROLES):
            problems.append(f"messages[{i}].role: expected {', '.join(ROLES)}, got {message.get('role')!r:.60}")
        if not isinstance(message.get("content"), str):
            problems.append(f"messages[{i}].content: expected a text, got {type(message.get('content')).__name__}")
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, dict) for tool in tools)):
        problems.append("tools: expected a list of JSON schemas")
    if not problems:
        try:
            json.dumps([messages, tools], ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(f"messages and tools must be plain JSON values: {error}")
    if problems:
        raise UserError.all(problems)


def strings(value: Any) -> Iterator[str]:
    """Yield all strings inside a JSON value, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings(item)


def _in_child(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run `_render.py` in a child process and return the answer of the process: {"text": ..} or {"error": ..}."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    command = [sys.executable, "-I", "-S", _render.__file__, *dict.fromkeys(folders)]
    env = {name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ}
    with Child(command, env) as child:
        try:
            child.ask(request, START_TIMEOUT_S)
        except (TimeoutError, EOFError, ValueError):
            raise UserError(
                "chat template: the process that renders it did not start; is jinja2 installed whole?"
            ) from None
        max_bytes = 12 * request["max_chars"] + 1000  # A character takes up to 12 bytes in JSON.
        try:
            return child.ask(None, timeout_s, max_bytes)
        except TimeoutError:
            return {"error": f"it takes longer than {timeout_s:g} s"}
        except (EOFError, ValueError):
            return {"error": "it used more memory or time than it may"}
