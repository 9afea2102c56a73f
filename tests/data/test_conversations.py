"""Instruction data: record formats, prompt styles and chat templates, token ids and the loss mask."""

from __future__ import annotations

import csv
import json
import subprocess

import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.data import conversations
from gptjax.data.conversations import Conversation, encode, read, render, show
from gptjax.errors import UserError
from gptjax.formats import tables
from gptjax.tokenizers import chat

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = 257, 258


@pytest.fixture(scope="module")
def tok():
    """Every byte is a token; 256 is end-of-text."""
    return tokenizers.load("bytes")


@pytest.fixture(scope="module")
def chatty(tok):
    extended = tokenizers.extend(tok, ["<|im_start|>", "<|im_end|>"])
    return extended.replace(eos_ids=(END,), pad_id=END, chat_template=SMOLLM2)


def talk(*turns, where="here"):
    """A conversation of alternating user and assistant texts. A system message is given first, as a 1-tuple."""
    system = [{"role": "system", "content": turns[0][0]}] if isinstance(turns[0], tuple) else []
    rest = turns[len(system) :]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(rest)]
    return Conversation((*system, *messages), where)


ONE = talk("Where is Paris?", "In France.")
TWO = talk(("Be brief.",), "Où ?", "Là.", "And now?", "Here.")


def text(spans, tok, learn=None):
    return "".join(tok.decode(span.ids) for span in spans if learn in (None, span.learn))


# --- records


def rows_of(conversation):
    user, answer = conversation.messages
    prompt, response = user["content"], answer["content"]
    return {
        "alpaca": {"instruction": prompt, "input": "", "output": response, "id": "7"},
        "prompt-completion": {"prompt": prompt, "completion": response},
        "prompt-response": {"prompt": prompt, "response": response},
        "sharegpt": {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": response}]},
        "messages": {"messages": [{"role": m["role"], "content": m["content"]} for m in conversation.messages]},
    }


FLAT = ("alpaca", "prompt-completion", "prompt-response")
CONVERSATIONS = [talk("NA", "null"), talk(' "a",\nb ', "日本 é\n1")]


def put(folder, kind, rows):
    path = folder / f"rows{kind}"
    if kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif kind == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


KINDS_OF = [(shape, kind) for shape in rows_of(ONE) for kind in tables.KINDS if kind != ".csv" or shape in FLAT]


@pytest.mark.parametrize(("shape", "kind"), KINDS_OF)  # a CSV cell cannot hold a list
def test_every_format_in_every_kind_of_file(tmp_path, kind, shape):
    talks = read(put(tmp_path, kind, [rows_of(c)[shape] for c in CONVERSATIONS]))
    assert [c.messages for c in talks] == [c.messages for c in CONVERSATIONS]
    assert all("rows" in c.where for c in talks) and talks[0].where != talks[1].where


def test_the_input_of_an_alpaca_record_is_a_separate_key(tmp_path):
    rows = [{"instruction": "Spell it.", "input": "freind", "output": "friend"}, {"instruction": "Hi", "output": "Ho"}]
    first, second = read(put(tmp_path, ".json", rows))
    assert first.messages[0] == {"role": "user", "content": "Spell it.", "input": "freind"}
    assert second.messages == talk("Hi", "Ho").messages


def test_several_turns(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in TWO.messages]
    assert read(put(tmp_path, ".parquet", [{"conversations": turns}]))[0].messages == TWO.messages


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def read_one(tmp_path, record, notes=None):
    [conversation] = read(put(tmp_path, ".jsonl", [record]), notes)
    return conversation


QUESTION, ANSWER = [message("user", "a")], [message("assistant", "b")]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": QUESTION, "completion": ANSWER}, [*QUESTION, *ANSWER]),
        ({"prompt": QUESTION, "response": ANSWER}, [*QUESTION, *ANSWER]),
        ({"conversations": [*QUESTION, *ANSWER]}, [*QUESTION, *ANSWER]),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [*QUESTION, *ANSWER]),
        ({"messages": [*QUESTION, *ANSWER], "system": "S"}, [message("system", "S"), *QUESTION, *ANSWER]),
        ({"prompt": "a", "completion": "b", "system_prompt": "S"}, [message("system", "S"), *QUESTION, *ANSWER]),
        (
            {"instruction": "c", "input": "", "output": "d", "system": "S", "history": [["a", "b"]]},
            [message("system", "S"), *QUESTION, *ANSWER, message("user", "c"), message("assistant", "d")],
        ),
        (
            {
                "messages": [
                    *QUESTION,
                    message("assistant", "BAD", weight=0),
                    *QUESTION,
                    message("assistant", "b", weight=1),
                ]
            },
            [*QUESTION, message("assistant", "BAD", weight=0.0), *QUESTION, *ANSWER],
        ),
        (
            {
                "messages": [
                    *QUESTION,
                    message("assistant", "BAD", loss=False),
                    *QUESTION,
                    message("assistant", "b", loss=True),
                ]
            },
            [*QUESTION, message("assistant", "BAD", weight=0.0), *QUESTION, *ANSWER],
        ),
        (
            {
                "messages": [
                    message("user", "a", train=False),
                    *ANSWER,
                    *QUESTION,
                    message("assistant", "BAD", train=False),
                ]
            },
            [*QUESTION, *ANSWER],
        ),
        (
            {"prompt": [*QUESTION, *ANSWER, *QUESTION], "completion": ANSWER},
            [*QUESTION, message("assistant", "b", weight=0.0), *QUESTION, *ANSWER],
        ),
    ],
)
def test_system_message_history_and_weights_are_part_of_the_conversation(tmp_path, record, messages):
    assert list(read_one(tmp_path, record).messages) == messages


def test_an_answer_of_weight_0_is_in_the_context_but_not_in_the_loss(tmp_path, chatty):
    talk = read_one(tmp_path, {"messages": [*QUESTION, message("assistant", "BAD", weight=0), *QUESTION, *ANSWER]})
    assert text(render(talk, chatty), chatty, True) == "b<|im_end|>" and "BAD" in text(render(talk, chatty), chatty)
    with pytest.raises(UserError, match=r"rows.jsonl:1: loss_on=all learns every token"):
        encode([talk], chatty, context_length=999, loss_on="all")


def test_tools_need_a_template_that_writes_them(tmp_path, chatty):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = chatty.replace(chat_template="{{ tools | tojson if tools }}" + chat.BUILTIN["chatml"])
    for given in (tools, json.dumps(tools)):
        talk = read_one(tmp_path, {"messages": [*QUESTION, *ANSWER], "tools": given})
        assert list(talk.tools) == tools
        for talks in ([talk], [talk, ONE]):
            spans, *_ = conversations.render_all(talks, with_tools)
            assert text(spans, with_tools).startswith(json.dumps(tools) + "<|im_start|>user")
        with pytest.raises(UserError, match=r"rows.jsonl:1: tools: the chat template .* does not write them"):
            render(talk, chatty)


def test_keys_that_are_not_read_are_reported_once(tmp_path, capsys):
    row = {
        "messages": [message("user", "a", name="Ann"), *ANSWER],
        "id": 3,
        "source": "web",
        "text": "a b",
        "empty": None,
    }
    path = put(tmp_path, ".jsonl", [row, {"messages": [*QUESTION, *ANSWER]}, row | {" odd ": 1}])
    notes = []
    read(path, notes)
    assert notes == [
        f"keys that are not read: text (2 of 3, first {path}:1), messages[].name (2 of 3, first {path}:1), "
        f"' odd ' (1 of 3, first {path}:5)"
    ]
    read(path)
    assert notes[0] in capsys.readouterr().err


def test_hub(monkeypatch):
    import datasets

    def load_dataset(name, config=None, *, split):
        assert (name, config, split) == ("org/name", "small", "test")
        return datasets.Dataset.from_list([rows_of(c)["messages"] for c in CONVERSATIONS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [c.messages for c in read("hf:org/name:small@test")] == [c.messages for c in CONVERSATIONS]
    with pytest.raises(UserError, match=r"hf:org/x: AssertionError.*\n.*check the name"):
        read("hf:org/x")


GOOD = '{"prompt": "a", "response": "b"}\n'
BAD = {
    "broken line": (".jsonl", GOOD + '{"prompt": "a', r"rows\.jsonl:2: not valid JSON"),
    "array": (".jsonl", GOOD + "[1]", r":2: expected a JSON object, found an array"),
    "same key twice": (".jsonl", '{"a": 1, "a": 2}', "duplicate key 'a'"),
    "NaN": (".jsonl", '{"a": NaN}', "NaN is not JSON"),
    "deep": (".jsonl", "[" * 200_000, "nested too deeply"),
    "not UTF-8": (".jsonl", b'{"prompt": "\xff"}', "invalid UTF-8 at byte 12"),
    "unknown keys": (
        ".jsonl",
        '{"question": "a", "answer": "b"}',
        r"keys question, answer are no known(.|\n)*\"from\"",
    ),
    "no keys": (".jsonl", "{}", r"keys \(none\) are no known"),
    "two formats": (".jsonl", '{"prompt": "a", "response": "b", "messages": []}', "several formats at once"),
    "no response": (".jsonl", '{"prompt": "a", "response": " \\n"}', ":1: response: the response is empty"),
    "null": (".jsonl", '{"prompt": "a", "response": null}', "the response must be text, found null"),
    "no instruction": (".jsonl", '{"instruction": "", "output": "b"}', "instruction: content is empty"),
    "number": (".jsonl", '{"instruction": "a", "input": 3, "output": "b"}', "input must be text, found a number"),
    "surrogate": (".jsonl", '{"prompt": "a", "response": "\\ud800"}', "lone surrogate at character 0"),
    "turns": (".jsonl", '{"messages": "hi"}', "messages: expected a list such as .*found a string"),
    "no turns": (".jsonl", '{"messages": []}', "found no turn"),
    "role": (".jsonl", '{"messages": [{"role": "bot", "content": "x"}]}', r"messages\[0\]: expected system, .*'bot'"),
    "tool": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}',
        "only after an answer with tool_calls, found user, tool",
    ),
    "no role": (".jsonl", '{"conversations": [{"value": "x"}]}', r"\[0\]: expected role and content .*found value"),
    "last": (".jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "a last response, found user"),
    "not an array": (".json", '{"prompt": "a"}', r"rows\.json: expected an array of records, found an object"),
    "not JSON": (".json", GOOD + GOOD, r"rows\.json: not valid JSON.*line 2.*\.jsonl"),
    "not objects": (".json", "[1]", "record 1: expected an object, found a number"),
    "empty": (".json", "[]", "no records"),
    "short row": (".csv", "prompt,response\na\n", r"rows\.csv:2: 1 columns, and the header has 2"),
    "open quote": (".csv", 'prompt,response\na,"b\n', r"rows\.csv:2: .*never closed"),
    "column twice": (".csv", "prompt,prompt\n", "column 'prompt' appears twice"),
    "header only": (".csv", "prompt,response\n", "no records"),
    "parquet": (".parquet", "PAR1", "not a readable parquet file"),
    "unpaired": (
        ".jsonl",
        '{"prompt": "a", "answer": "b", "kto_tag": true}',
        "are no known format; kto_tag: .* from pairs",
    ),
    "label": (".jsonl", '{"prompt": "a", "completion": "b", "label": false}', ":1: label: .* from pairs"),
    "picture": (".jsonl", GOOD[:-2] + ', "images": ["x.png"]}', ":1: images: pictures and sound"),
    "part of the question": (".jsonl", GOOD[:-2] + ', "context": "x"}', ":1: context: would be left out"),
    "call": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [{}]}]}',
        r"messages\[1\]: tool_calls: expected a list such as",
    ),
    "weight": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": -1}]}',
        r"messages\[1\]: weight: expected a number from 0 to 1000, found -1",
    ),
    "user's weight": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": "x", "train": true}, {"role": "assistant", "content": "y"}]}',
        r"messages\[0\]: train: only answers can be in the loss, and the role here is user",
    ),
    "nothing to learn": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}',
        "all its answers are excluded from the loss",
    ),
    "one list": (".jsonl", '{"prompt": [], "completion": "b"}', "completion: expected a list .*found a string"),
    "history": (".jsonl", GOOD[:-2] + ', "history": [["a"]]}', r"history: expected a list of pairs"),
    "history of turns": (
        ".jsonl",
        '{"messages": [], "history": [["a", "b"]]}',
        "history: not supported beside a whole",
    ),
    "two systems": (
        ".jsonl",
        '{"messages": [{"role": "system", "content": "x"}], "system": "y"}',
        "system: the conversation has a system message of its own",
    ),
    "tools": (".jsonl", GOOD[:-2] + ', "tools": "[1]"}', "tools: expected a list of JSON schemas"),
    "text": (".txt", "x", r"a \.json, \.jsonl, \.parquet, \.csv file or hf:"),
}


@pytest.mark.parametrize(("kind", "content", "error"), BAD.values(), ids=BAD)
def test_invalid_files(tmp_path, kind, content, error):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=error):
        read(str(path))


def test_up_to_twenty_errors_are_reported_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": \n' + GOOD + '{"x": 1}\n{"prompt": "a", "response": ""}\n')
    with pytest.raises(UserError) as caught:
        read(str(path))
    assert [line.split("rows.jsonl")[1][:3] for line in str(caught.value).split("\n")[:3]] == [":1:", ":3:", ":4:"]
    path.write_text('{"prompt": "a", "response": ""}\n' * 50)
    with pytest.raises(UserError) as caught:
        read(str(path))
    assert str(caught.value).count("is empty") == 20 and "may be more" in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read(str(tmp_path / "nothing.json"))


# --- prompt styles


def test_alpaca_equals_the_prompt_of_the_book(tok):
    messages = ({"role": "user", "content": "Spell it.", "input": "freind"}, {"role": "assistant", "content": "friend"})
    prompt, answer = render(Conversation(messages, ""), tok)
    assert tok.decode(prompt.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSpell it.\n\n### Input:\nfreind\n\n### Response:\n"
    )
    assert not prompt.learn and answer == ([*b"friend", tok.eot_id], True)
    assert "Input" not in text(render(ONE, tok, "alpaca"), tok)


def test_alpaca_equals_the_built_in_template_of_that_name(tok):
    messages = [{"role": "user", "content": "Where is Paris?"}]
    assert render(ONE, tok)[0].ids == chat.encode_chat(tok, messages, "alpaca")


def test_alpaca_gives_the_tokens_of_the_book(gpt2):
    """Prompt and answer encoded separately have the same ids as the whole text."""
    spans = render(ONE, gpt2)
    whole = text(spans, gpt2)
    assert [i for span in spans for i in span.ids] == gpt2.encode(whole, allowed_special="all")
    assert whole.endswith("### Response:\nIn France.<|endoftext|>")


def test_phi3(tok):
    """If the vocabulary lacks <|end|>, it is encoded as plain text, and end-of-text ends an answer."""
    prompt = "<|user|>\nWhere is Paris?<|end|>\n<|assistant|>\n"
    assert text(render(ONE, tok, "phi3"), tok) == prompt + "In France.<|endoftext|>"
    assert text(render(TWO, tok, "phi3"), tok) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nOù ?<|end|>\n<|assistant|>\nLà.<|endoftext|><|end|>\n"
        "<|user|>\nAnd now?<|end|>\n<|assistant|>\nHere.<|endoftext|>"
    )
    phi3 = tokenizers.extend(tok, ["<|user|>", "<|assistant|>", "<|end|>"])
    assert text(render(TWO, phi3, "phi3"), phi3, True) == "Là.<|end|>Here.<|end|>"
    with_template = phi3.replace(chat_template=chat.BUILTIN["phi3"], eos_ids=(phi3.eot_id,))
    assert render(TWO, with_template) == render(TWO, phi3, "phi3")


@pytest.fixture(scope="module")
def sentencepiece():
    """A SentencePiece tokenizer as Llama 2's, which adds a space before every text."""
    from gptjax.tokenizers.gguf import from_metadata

    letters = "abcdefghijklmnopqrstuvwxyz<>|_[]/#:\n"
    pieces = ["▁l", "lo", "▁lo", "low", "▁low", "▁", *letters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {"model": "llama", "tokens": tokens, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    metadata["token_type"] = np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32)
    metadata["scores"] = np.array([0] * 259 + [-i for i in range(len(pieces))], np.float32)
    return from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("style", chat.STYLES)
def test_ids_equal_those_of_the_whole_text_with_sentencepiece(sentencepiece, style):
    styled = chat.styled(sentencepiece.replace(chat_template=LLAMA2), style)
    conversation, ids = talk("low", "low", "lo", "low"), []
    for i, span in enumerate(render(conversation, styled)):
        if span.learn:
            assert ids == chat.encode_chat(styled, [dict(m) for m in conversation.messages[:i]])
        ids += span.ids
    assert ids[-1] in styled.eos_ids


@pytest.mark.parametrize("style", chat.STYLES)
def test_a_tokenizer_saved_with_a_style_formats_prompts_as_in_training(chatty, style):
    """The template of the saved tokenizer is enough, also for a message with an input."""
    styled = chat.styled(chatty, style)
    question = {"role": "user", "content": "Spell it.", "input": "freind"}
    for conversation in (ONE, TWO, Conversation((question, {"role": "assistant", "content": "friend"}), "")):
        assert render(conversation, styled) == render(conversation, chatty, style)
    spans, messages = render(TWO, styled), [dict(m) for m in TWO.messages]
    assert spans[0].ids == chat.encode_chat(styled, messages[:2])
    assert [i for span in spans[:3] for i in span.ids] == chat.encode_chat(styled, messages[:4])
    assert spans[1].ids[-1] in styled.eos_ids


def test_role_markers_that_are_special_tokens_get_their_ids(tok):
    phi3 = tokenizers.extend(tok, ["<|user|>", "<|assistant|>", "<|end|>"])
    assert render(ONE, phi3, "phi3")[0].ids == [257, *b"\nWhere is Paris?", 259, *b"\n", 258, *b"\n"]


def test_a_prompt_begins_with_bos_if_the_tokenizer_adds_it(tok):
    tok = tokenizers.extend(tok, ["<s>"])
    with_bos = tok.replace(bos_id=257, add_bos=True)
    for style in ("alpaca", "phi3", "chatml"):
        plain, prefixed = render(ONE, tok, style), render(ONE, with_bos, style)
        assert prefixed[0].ids == [257, *plain[0].ids] and prefixed[1:] == plain[1:]


def test_the_model_s_own_template_is_the_default(chatty):
    prompt, answer = render(ONE, chatty)
    assert prompt == (chat.encode_chat(chatty, [dict(m) for m in ONE.messages[:1]]), False)
    assert answer == ([*b"In France.", END], True)


@pytest.mark.parametrize("style", chat.STYLES)
def test_every_answer_and_its_end_token_are_in_the_loss(chatty, style):
    spans = render(TWO, chatty, style)
    end = "<|im_end|>" if style in ("chat", "chatml") else "<|endoftext|>"
    assert [span.learn for span in spans] == [False, True, False, True]
    assert text(spans, chatty, True) == f"Là.{end}Here.{end}"


@pytest.mark.parametrize("template", [SMOLLM2, chat.BUILTIN["chatml"], chat.BUILTIN["llama3"]])
def test_the_ids_before_an_answer_equal_its_generation_prompt(chatty, template):
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tok = tokenizers.extend(chatty, names).replace(chat_template=template)
    messages, ids = [dict(m) for m in TWO.messages], []
    for i, span in enumerate(render(TWO, tok)):
        if span.learn:
            assert ids == chat.encode_chat(tok, messages[: i + 1])
        ids += span.ids
    assert tok.decode(ids) == chat.apply(tok, messages, add_generation_prompt=False).rstrip()


def test_the_end_token_is_learned_even_if_the_template_omits_it_after_the_last_answer(chatty):
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '<|im_end|>' if not loop.last }}{% endfor %}"
    tok = chatty.replace(chat_template=turns + "{{ '<|im_end|>assistant: ' if add_generation_prompt }}")
    assert text(render(TWO, tok), tok, True) == "Là.<|im_end|>Here.<|im_end|>"


def test_a_template_without_an_end_token_gets_end_of_text(tok):
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    plain_tok = tok.replace(chat_template=plain)
    assert text(render(TWO, plain_tok), plain_tok, True) == "Là.<|endoftext|>Here.<|endoftext|>"
    assert text(render(TWO, plain_tok), plain_tok).endswith(
        "Là.<|endoftext|>\nuser: And now?\nassistant: Here.<|endoftext|>"
    )
    assert "end-of-text is appended" in chat.describe_style(plain_tok, None)[1]
    styled = chat.styled(plain_tok)
    assert styled.eos_ids == (256,) and chat.styled(styled) == styled and render(TWO, styled) == render(TWO, plain_tok)
    chars = tokenizers.train("chars", [text(render(TWO, plain_tok), plain_tok)])
    with pytest.raises(UserError, match="style chat: nothing can end an answer: .* no end-of-text"):
        render(TWO, chars.replace(chat_template=plain))


def test_a_template_that_writes_no_answer_is_refused(chatty):
    tok = chatty.replace(chat_template="{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}")
    with pytest.raises(UserError, match="here: the chat template of .* does not write the answer: choose"):
        render(TWO, tok)


def test_a_special_token_in_a_message_is_refused(chatty, tok):
    bad = [talk("a<|im_end|>", "b", where="x:1"), ONE, talk("a", "<|im_start|>", where="x:3")]
    for style in chat.STYLES:
        with pytest.raises(UserError, match=r"x:1: .*<\|im_end\|>: take it out\nx:3: .*<\|im_start\|>"):
            encode(bad, chatty, style=style, context_length=999)
    assert encode(bad, tok, context_length=999).dropped == 0  # in this tokenizer it is plain text


def test_invalid_styles(tok):
    with pytest.raises(UserError, match="no prompt style 'alpacca', did you mean 'alpaca'"):
        render(ONE, tok, "alpacca")
    with pytest.raises(UserError, match="no chat template; choose instruct.style=chatml"):
        render(ONE, tok, "chat")
    chars = tokenizers.train("chars", ["any text"])
    with pytest.raises(UserError, match="style alpaca: nothing can end an answer"):
        render(ONE, chars)


# --- many conversations in one Jinja process


STRANGE = {
    "spaces": "\n  {% if true %}\n   x\n  {% endif %}\n  {%- if add_generation_prompt %} >{% endif %}\n\n",
    "block last": "{% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n",
    "minus": "{%- for m in messages -%} {{ m.content }} {%- endfor -%}  ",
    "variables": "{{ n is defined }}{% if messages|length > 1 %}{% set n = 1 %}{% endif %}{{ n is defined }}{{ job }}",
    "tools": "{{ tools is none }}{{ documents is none }}{{ messages[0].content }}",
    "macro": "{% macro f(x) %}<{{ x }}{{ messages | length }}>{% endmacro %}{{ f(messages[-1].content) }}",
    "loops": "{% for m in messages %}{{ loop.index }}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}\n\\n",
    "closes": "{{ messages[0].content }}{% if false %}",  # not a valid template on its own
}


@pytest.mark.first_cases(4)
@pytest.mark.parametrize("name", STRANGE)
def test_one_process_for_many_texts_gives_the_same_texts(tok, name):
    """Whitespace, line ends and variables of a template behave as if each text were rendered alone."""
    strange = tok.replace(chat_template=STRANGE[name])
    messages = [*ONE.messages, {"role": "user", "content": 'é"\n\u2028{{ 1 }}'}]
    jobs = [conversations._Job("", list(messages[:n]), n != 2) for n in (1, 2, 3, 1)]
    if name == "closes":
        with pytest.raises(UserError, match="TemplateSyntaxError"):
            conversations._render_all(strange, jobs)
        return
    single = [chat.apply(strange, job.messages, add_generation_prompt=job.begin) for job in jobs]
    assert conversations._render_together(strange, jobs) == conversations._render_all(strange, jobs) == single


def test_a_template_cannot_close_the_blocks_around_it(tok):
    forged = "{% endset %}{% endfor %}{{ '\"x\"\\n' }}{% for job in tools %}{% set text %}"
    jobs = [conversations._Job("here", list(ONE.messages), False)] * 2
    with pytest.raises(UserError, match="here: chat template: TemplateSyntaxError"):
        conversations._render_all(tok.replace(chat_template=forged), jobs)


def test_conversations_that_the_template_rejects_are_named(tok):
    template = "{{ raise_exception('no') if 'bad' in messages[0].content }}{{ messages|map(attribute='content')|join }}"
    talks = [talk("bad" if i in (3, 11) else "good", "x", where=f"rows:{i}") for i in range(20)]
    with pytest.raises(UserError) as caught:
        encode(talks, tok.replace(chat_template=template), context_length=99)
    assert [line.split(": chat")[0] for line in str(caught.value).split("\n")] == ["rows:3", "rows:11"]


def test_a_long_conversation_is_dropped(chatty):
    long = talk(*["é\x00😀\n" * 3000, "b"] * 10)
    assert encode([ONE, long], chatty, context_length=200).dropped == 1
    assert sum(len(span.ids) for span in render(long, chatty)) > 200_000


def test_a_thousand_conversations_need_one_process(chatty, monkeypatch):
    chat.styled(chatty)  # finds the end token of the template once, and caches it
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(1) or popen(*args, **kwargs))
    assert len(encode([ONE] * 1000, chatty, context_length=200).rows) == 1000
    assert len(started) == 1


# --- ids


def test_encode_drops_conversations_that_do_not_fit(tok):
    long = talk("a" * 50, "b" * 50)
    n = sum(len(span.ids) for span in render(ONE, tok))
    encoded = encode([ONE, long, ONE], tok, context_length=n - 1)
    assert encoded.dropped == 1 and [len(row) for row in encoded.rows] == [n, n]
    assert encoded.rows[0].dtype == np.int32 and encoded.weights[0].dtype == np.float32
    with pytest.raises(
        UserError, match=rf"no conversation fits a context of {n - 2} tokens: the shortest needs {n - 1}"
    ):
        encode([long, ONE], tok, context_length=n - 2)
    with pytest.raises(UserError, match="there is none"):
        encode([], tok, context_length=9)


@pytest.mark.parametrize("style", chat.STYLES)
def test_the_end_token_is_in_the_loss_even_if_it_is_the_padding_token(chatty, style):
    tok = chatty.replace(pad_id=END if style in ("chat", "chatml") else chatty.eot_id)
    for row, weight in zip(*encode([ONE, TWO], tok, style=style, context_length=999)[:2], strict=True):
        assert row[-1] == tok.pad_id and weight[-1] == 1
    # the user's turns end with the same token, which is not in the loss
    assert style not in ("chat", "chatml") or weight[row == END].tolist() == [0, 0, 1, 0, 1]


def test_loss_on_the_answers_or_on_all_tokens(chatty):
    row, weight = (leaf[0] for leaf in encode([TWO], chatty, context_length=999)[:2])
    assert chatty.decode(row[weight == 1]) == "Là.<|im_end|>Here.<|im_end|>" and set(weight) == {0, 1}
    on_all = encode([TWO], chatty, context_length=999, loss_on="all")
    assert on_all.weights[0].all() and np.array_equal(on_all.rows[0], row)
    with pytest.raises(UserError, match="loss_on: expected response or all, got 'answer'"):
        encode([TWO], chatty, context_length=999, loss_on="answer")


def test_show(chatty):
    assert show(render(ONE, chatty, "phi3"), chatty) == (
        "<|user|>\nWhere is Paris?<|end|>\n<|assistant|>\n\x1b[32mIn France.<|endoftext|>\x1b[0m"
    )
    shown = show(render(talk("\x1b[2J日本", "a\r\x00"), chatty, "phi3"), chatty)
    assert "\\x1b[2J日本" in shown and "a\\r\\x00<|" in shown and shown.count("\x1b") == 2
