"""Every answer is trained after exactly the tokens that transformers' apply_chat_template gives as its prompt.

The templates here do what those of known models do: drop earlier reasoning (Qwen3), write the tools before the last
question (Mistral), begin the reasoning in the prompt (DeepSeek-R1), trim messages (Llama 3), group tool results.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.data import conversations
from gptjax.data.conversations import Conversation, encode, tree_of, turns_of
from gptjax.errors import UserError
from gptjax.tokenizers import chat

SAY = "{{ '<|im_start|>' + m.role + '\n' + %s + '<|im_end|>\n' }}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson) + '\n</tool_call>' }}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}{% for t in tools %}{{ (t | tojson) + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {
    # reasoning only after the last question; results of tools in one user turn
    "drops-reasoning": LAST_USER + TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ m.content }}" + CALLS
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}" + SAY % "m.content" + "{% endif %}{% endfor %}" + BEGIN,
    # the tools stand before the last question, and move with it
    "late-tools": LAST_USER + "{% for m in messages %}{% if m.role == 'user' and loop.index0 == ns.last %}" + TOOLS
    + "{% endif %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if m.reasoning_content %}{{ m.reasoning_content + '\n\n' }}{% endif %}{{ m.content }}" + CALLS
    + "{{ '<|im_end|>\n' }}{% else %}" + SAY % "m.content" + "{% endif %}{% endfor %}" + BEGIN,
    # the prompt begins the reasoning; finished answers have none
    "begins-reasoning": TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ m.content.split('</think>') | last | trim }}" + CALLS + "{{ '<|im_end|>\n' }}{% else %}" + SAY % "m.content"
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # trims every message, but keeps everything
    "trims": TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content | trim + '</think>' }}{% endif %}"
    "{{ m.content | trim }}" + CALLS + "{{ '<|im_end|>\n' }}{% else %}" + SAY % "m.content | trim"
    + "{% endif %}{% endfor %}" + BEGIN,
}  # fmt: skip
SCHEMAS = tuple(
    {"type": "function", "function": {"name": name, "description": f"Looks up {name}.", "parameters": {
        "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}
    for name in ("weather", "time_of_day")
)  # fmt: skip
WORDS = [
    "", "", "where", "is", "Paris?", "what", "time,", "please\n", "it's", "12:30", "in", "", "Où", "日本", "(", "7",
    "+", "5", ")", "=", "<b>", "&", "'x'", '"y"', "\n\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def chatty():
    extended = tokenizers.extend(tokenizers.load("bytes"), ["<|im_start|>", "<|im_end|>"])
    return extended.replace(eos_ids=(258,), pad_id=258)


def random_talk(rng, *, tools=True, reasoning=True, system=True, most=4):
    """A random conversation with tools and reasoning, as a `Conversation` and as the messages of transformers."""

    def words(n=6):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, n))).strip() or "yes"

    def answer(calls):
        message = {"role": "assistant", "content": "" if calls and rng.random() < 0.5 else words()}
        if calls:
            functions = [
                {"name": rng.choice(["weather", "time_of_day"]), "arguments": {"place": words(2)}}
                for _ in range(rng.randint(1, 2))
            ]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        if reasoning and rng.random() < 0.7:
            message["reasoning_content"] = words(9)
        return message

    messages = [{"role": "system", "content": words()}] if system and rng.random() < 0.5 else []
    used = tools and rng.random() < 0.6
    for _ in range(rng.randint(1, most)):
        messages.append({"role": "user", "content": words()})
        while used and rng.random() < 0.4:
            messages.append(answer(True))
            messages += [
                {"role": "tool", "name": c["function"]["name"], "content": words()} for c in messages[-1]["tool_calls"]
            ]
        messages.append(answer(False))
    return Conversation(tuple(messages), "here", (), SCHEMAS if used else ())


@pytest.mark.parametrize(
    "name", ["late-tools", *(pytest.param(n, marks=pytest.mark.slow) for n in TEMPLATES if n != "late-tools")]
)
def test_every_answer_is_trained_after_its_prompt(chatty, name):
    tok, rng = chatty.replace(chat_template=TEMPLATES[name]), random.Random(name)
    talks = [random_talk(rng) for _ in range(30)]
    turns = turns_of(talks, tok)
    assert sum(tree_of(of_talk) is not None for of_talk in turns) > 5 or name == "trims"
    for talk, of_talk in list(zip(talks, turns, strict=True))[:12]:
        answers = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant"]
        for i, (prompt, answer, weight) in zip(answers, of_talk, strict=True):
            messages, tools = [dict(m) for m in talk.messages[:i]], list(talk.tools) or None
            assert prompt == chat.encode_chat(tok, messages, tools=tools)
            assert answer[-1] == 258 and weight == 1
            text = tok.decode(answer)
            for call in talk.messages[i].get("tool_calls", ()):
                assert call["function"]["name"] in text
            assert talk.messages[i].get("reasoning_content", "").strip() in text
    as_trees, as_rows = (encode(talks, tok, context_length=4096, trees=trees) for trees in (True, False))
    learned = [sum(float(w[1:].sum()) for w in e.weights) + sum(float(t.weights.sum()) for t in e.trees)
               for e in (as_trees, as_rows)]  # fmt: skip
    assert learned[0] == learned[1] == sum(len(answer) for of_talk in turns for _, answer, _ in of_talk)
    if name != "trims":
        assert as_trees.trees and not as_rows.trees


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(chatty, name):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    tok, rng = chatty.replace(chat_template=TEMPLATES[name]), random.Random(name)
    talks = [random_talk(rng) for _ in range(100)]
    for talk, of_talk in zip(talks, turns_of(talks, tok), strict=True):
        answers = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant"]
        for i, turn in zip(answers, of_talk, strict=True):
            text, _ = render_jinja_template(
                conversations=[[dict(m) for m in talk.messages[:i]]], chat_template=TEMPLATES[name],
                tools=list(talk.tools) or None, add_generation_prompt=True, bos_token="", eos_token="<|im_end|>",
            )  # fmt: skip
            assert tok.encode(text[0], allowed_special="all") == turn.prompt


def test_an_answer_that_the_template_leaves_out_is_refused(chatty):
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    asked = {"role": "user", "content": "Hi"}
    plain = chatty.replace(chat_template=chat.BUILTIN["chatml"])
    for extra, message in (
        ({"tool_calls": calls}, "does not write the call of weather"),
        ({"reasoning_content": "hm"}, "does not write the reasoning"),
    ):
        talk = Conversation((asked, {"role": "assistant", "content": "Ho", **extra}), "here")
        with pytest.raises(UserError, match=message):
            turns_of([talk], plain)
    tool = ({"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "12"})
    talk = Conversation((asked, *tool, {"role": "assistant", "content": "Ho"}), "here")
    template = TEMPLATES["trims"].replace("{% else %}", "{% elif m.role != 'tool' %}")
    with pytest.raises(UserError, match="does not write the result of a tool"):
        turns_of([talk], plain.replace(chat_template=template))


# how answers end: (what follows an answer, eos tokens, ends of CALLING's answers)
ENDS = {
    "two tokens": ("<|end|><|return|>", ["<|return|>"], ["<|end|><|return|>"] * 3),
    "another token at the end": (
        "{{ '<|call|>' if m.tool_calls else '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}",
        ["<|return|>", "<|call|>"], ["<|call|>", "<|return|>", "<|return|>"],
    ),
    "the token of the next turn": ("", ["<|user|>", "<|tool|>"], ["<|tool|>", "<|user|>", "<|user|>"]),
}  # fmt: skip
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}]
CALL_TEXT = '\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
CALLING = (
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": "12"}, {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
)  # fmt: skip
QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
REASONED = ANSWER | {"reasoning_content": "hm"}


@pytest.fixture(scope="module")
def marked(chatty):
    names = ["user", "tool", "assistant", "end", "return", "call", "thought"]
    return tokenizers.extend(chatty, [f"<|{name}|>" for name in names])


def answers_of(messages, tok):
    """The text of each answer of a conversation, whose contexts are checked."""
    [turns] = turns_of([Conversation(tuple(messages), "here")], tok)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, turn in zip(answers, turns, strict=True):
        assert turn.prompt == chat.encode_chat(tok, [dict(message) for message in messages[:i]])
    return [tok.decode(turn.answer) for turn in turns]


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_with_the_token_that_ends_generation(marked, name):
    after, eos, ends = ENDS[name]
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}" + CALLS
        + "{% if m.role == 'assistant' %}" + after + "{% endif %}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )  # fmt: skip
    tok = marked.replace(chat_template=template, eos_ids=tuple(marked.special_tokens[token] for token in eos))
    assert answers_of(CALLING, tok) == [CALL_TEXT + ends[0], "two" + ends[1], "four" + ends[2]]
    styled = chat.styled(tok)
    assert styled.chat_template == template and styled.eos_ids == tok.eos_ids


def test_reasoning_has_the_key_that_the_template_reads(chatty):
    template = (
        "{% if enable_thinking or reasoning_effort %}{{ 'hard' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.thinking %}{{ '(' + m.thinking + ')' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + BEGIN
    )
    assert answers_of([QUESTION, REASONED], chatty.replace(chat_template=template)) == ["(hm)b<|im_end|>"]


@pytest.mark.parametrize(("opened", "closed"), [("<think>", "\n\n</think>\n\n"), ("<|channel>thought", "\n<channel|>")])
def test_an_empty_thought_in_the_prompt_is_context(chatty, opened, closed):
    """Templates write it if the model is not to reason, and leave it out of finished answers."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        "{{ '" + opened + "' + m.reasoning_content }}{% endif %}{{ m.content }}" + CALLS
        + "{{ '<|im_end|>\n' }}{% endfor %}" + BEGIN.replace("assistant\n", "assistant\n" + opened + closed)
    )  # fmt: skip
    tok = chatty.replace(chat_template=template)
    assert answers_of(CALLING, tok) == [CALL_TEXT + "<|im_end|>", "two<|im_end|>", "four<|im_end|>"]
    with pytest.raises(UserError, match="here: the chat template of .* does not render an answer after its prompt"):
        answers_of([QUESTION, REASONED], tok)


def test_an_answer_follows_the_end_of_its_prompt(marked):
    """Other text may precede that end, but a mark of an earlier turn is not it."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.reasoning_content %}"
        "{{ '<|thought|>' + m.reasoning_content }}{% endif %}{{ m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'BEGIN' }}{% endif %}"
    )
    tok = marked.replace(eos_ids=(marked.special_tokens["<|end|>"],))
    messages = [QUESTION, REASONED, QUESTION, ANSWER]
    reminded = tok.replace(chat_template=template.replace("BEGIN", "<|tool|>Be brief.<|assistant|>"))
    assert answers_of(messages, reminded) == ["<|thought|>hmb<|end|>", "b<|end|>"]
    thinking = tok.replace(chat_template=template.replace("BEGIN", "<|assistant|><|thought|>"))
    with pytest.raises(UserError, match="here: the chat template of .* does not render an answer after its prompt"):
        answers_of(messages, thinking)


def test_content_that_the_template_leaves_out_is_refused(chatty):
    tok = chatty.replace(
        chat_template=TEMPLATES["trims"].replace("m.content | trim }}", "m.content if not m.tool_calls }}")
    )
    assert len(answers_of(CALLING, tok)) == 3
    with pytest.raises(UserError, match="here: the chat template of .* does not write the answer"):
        answers_of([CALLING[0], CALLING[1] | {"content": "Let me look."}, *CALLING[2:]], tok)


def test_a_call_and_reasoning_that_the_content_quotes_are_not_taken_as_written(chatty):
    plain, full = (chatty.replace(chat_template=t) for t in (chat.BUILTIN["chatml"], TEMPLATES["trims"]))
    quoting = [CALLING[0], CALLING[1] | {"content": "I ask weather."}, *CALLING[2:]]
    for messages, what in ((quoting, "call of weather"), ([QUESTION, REASONED | {"content": "hm!"}], "reasoning")):
        with pytest.raises(UserError, match=f"here: the chat template of .* does not write the {what}"):
            answers_of(messages, plain)
        assert answers_of(messages, full)


def test_a_tree_that_does_not_fit_becomes_rows(chatty):
    tok, rng = chatty.replace(chat_template=TEMPLATES["drops-reasoning"]), random.Random(3)
    talks = [random_talk(rng, most=6) for _ in range(40)]
    whole = encode(talks, tok, context_length=1 << 20)
    longest = max(
        len(prompt) + len(answer) - 1 for turns in turns_of(talks, tok) for _, (prompt, answer, _) in enumerate(turns)
    )
    tight = encode(talks, tok, context_length=longest)
    assert tight.dropped == 0 and len(tight.trees) < len(whole.trees) and len(tight.rows) > len(whole.rows)


def test_weights_of_answers(chatty):
    tok = chatty.replace(chat_template=TEMPLATES["drops-reasoning"])
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "x", "weight": 0.5},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "reasoning_content": "y"},
    ]  # fmt: skip
    [tree] = encode([Conversation(tuple(messages), "")], tok, context_length=512).trees
    first, second = len("<think>\nx\n</think>\n\nb") + 1, len("<think>\ny\n</think>\n\nd") + 1
    assert tree.weights.sum() == 0.5 * first + second
    shown = conversations.show_tree(tree, tok)
    assert shown.count("-- positions") == 3 and "\x1b[32m<think>\x1b[0m" in shown
    everything = encode(
        [Conversation((messages[0], messages[1] | {"weight": 1}), "")], tok, context_length=512, loss_on="all"
    )
    assert np.all(everything.weights[0] == 1)
