"""Chat templates: whether fine-tuning trains every answer after exactly the tokens that a model gets at inference.

    python tests/bench/templates.py [FOLDER] [--conversations 2000] [--seed 0] [--only qwen3] [--show 3]

FOLDER holds chat templates as .jinja files; without it the templates are SmolLM2's and those of the tests. Each
template gets a byte-level BPE tokenizer, trained here, in which the template's markers are single tokens. Random
conversations have system messages, several turns, tools, calls and their results, reasoning, loss weights, odd texts.

What has to be learned is computed by transformers alone, without gptjax: `apply_chat_template` of the messages before
an answer, with the generation prompt, gives its context; what the template adds for the answer is learned. `encode`
must give the same targets with the same weights after the same contexts, in one row or in one tree. A conversation that
the template refuses, or of which it leaves something out, must be refused with a line that names it. `refused` tells
why: the template raises an error, leaves a part out, or writes the answer after something else than the prompt.

Needs `pip install -e '.[parity]'`. Prints a Markdown table. `trees / rows`: tokens of trees relative to one row per
answer, over conversations of six turns. `loss`, `gradients`: largest difference between trees and rows relative to the
loss and to the largest gradient, float32, a model of 2 layers and one or two conversations.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf
import transformers

import gptjax
from gptjax import assets
from gptjax.data import conversations, packing, token_tree
from gptjax.errors import UserError
from gptjax.tokenizers import _render, chat
from gptjax.tokenizers.hf import from_hf
from gptjax.types import Batch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

EOS, BOS = "<|text-end|>", "<|text-begin|>"  # values of the variables eos_token and bos_token
# names of tokens in the texts of templates: special ones, and added ones that are not special
SPECIAL = re.compile(
    r"<\|[^<>|\s'\"{}]+\|?>|<[a-z_]+\|>|<[a-z]+:[a-z_:]+>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_\w+>"
    r"|</?s>|<SPECIAL_\d+>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>|\]~!?b?\[?\w*\]?|\[e~\["
)
ADDED = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")
# an empty thought at the end of a prompt tells the model not to reason
NOT_THINKING = re.compile(
    r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>|<\|START_THINKING\|><\|END_THINKING\|>)\s*$"
)
WORDS = [
    "where", "is", "Paris?", "what time,", "please\n", "it's", "12:30", "Où", "日本", "😀", "(7 + 5)", "<b>", "&amp;",
    "'x'", '"y"', "{}", "{{ x }}", "{% if %}", "a\tb", "\n\n", "\\n", "}", "[1]", "#", "é", "</div>", "e\u0301", "---",
]  # fmt: skip
LIMIT = 1 << 20
REFUSED = 200  # refused conversations that gptjax is asked about, per template


class Case(NamedTuple):
    """A template with its tokenizers, and what it can do."""

    name: str
    theirs: Any
    ours: Any
    ends: tuple[str, ...]  # the tokens after an answer and after calls; () if the template writes none
    marks: tuple[str, ...]  # special tokens
    writes: frozenset[str]


# --- conversations


def words(rng: random.Random, most: int = 6) -> str:
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))
    return text if text.strip() else "yes"


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 2 else 5)
    simple = (
        words(rng, 2),
        rng.randint(-5, 10**6),
        rng.random() < 0.5,
        None,
        "",
    )[kind % 5]
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 2))]
    return {f"k{i}": value(rng, depth + 1) for i in range(rng.randint(0, 2))} if kind == 6 else simple


def schema(rng: random.Random, name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"place": {"type": "string", "description": words(rng)}}}
    return {
        "type": "function",
        "function": {"name": name, "description": words(rng), "parameters": parameters | {"required": ["place"]}},
    }


def record(rng: random.Random, writes: frozenset[str], turns: int | None = None) -> dict[str, Any]:
    """Returns a random conversation of the parts that a template writes; one of 25 has any parts."""
    if rng.random() < 0.04 and turns is None:
        writes = frozenset({"system", "tools", "calls", "two calls", "reasoning", "content beside calls"})
    messages: list[dict[str, Any]] = []
    if "system" in writes and rng.random() < 0.5:
        messages.append({"role": "system", "content": words(rng)})
    names = ["weather", "time_of_day"]
    tools = [schema(rng, name) for name in names] if "tools" in writes and (turns or rng.random() < 0.4) else []
    for _ in range(turns or rng.randint(1, 4)):
        messages.append({"role": "user", "content": words(rng)})
        while tools and "calls" in writes and rng.random() < 0.4:
            calls = [
                {"type": "function", "id": f"call{rng.randint(10000, 99999)}", "function": {
                    "name": rng.choice(names), "arguments": {"place": words(rng, 2), **({"more": value(rng)} if
                    rng.random() < 0.4 else {})}}}
                for _ in range(2 if "two calls" in writes and rng.random() < 0.3 else 1)
            ]  # fmt: skip
            content = words(rng) if "content beside calls" in writes and rng.random() < 0.4 else ""
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [
                {
                    "role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"],
                    "content": rng.choice([words(rng), json.dumps({"x": value(rng)}), ""]),
                }
                for call in calls
            ]  # fmt: skip
        messages.append({"role": "assistant", "content": words(rng)})
    for message in messages:
        if message["role"] == "assistant":
            if "reasoning" in writes and (turns or rng.random() < 0.6):
                message["reasoning_content"] = words(rng, 9)
            if not turns and rng.random() < 0.2:
                message |= rng.choice([{"weight": 0}, {"weight": 0.5}, {"weight": 3}, {"train": False}])
    messages[-1].pop("train", None)
    messages[-1] |= {"weight": messages[-1].get("weight") or 1}
    return {"messages": messages} | ({"tools": tools} if tools else {})


# --- templates


def tokenizers_of(name: str, template: str, texts: list[str]) -> tuple[Any, Any, tuple[str, ...]]:
    """Returns the tokenizers of transformers and gptjax, and the tokens that end an answer and calls."""
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=hf.Tokenizer(hf.models.BPE()), bos_token=BOS, eos_token=EOS, chat_template=template
    )
    asked = [{"role": "user", "content": "QQQ"}]
    call = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"place": "AAA"}}}
    result = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "RRR"}
    finished = {"role": "assistant", "content": "ZZZ", **dict.fromkeys(REASONING, "YYY")}
    probes = [
        ([*asked, {"role": "assistant", "content": "ZZZ"}], "ZZZ", [{"role": "user", "content": "NNN"}]),
        ([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "AAA", [result]),
    ]
    everything = template
    for messages in (*(m for m, _, _ in probes), [*asked, finished], [{"role": "system", "content": "S"}, *asked]):
        everything += "".join(filter(None, (rendered(bare, messages, begin=begin) for begin in (False, True))))
    special = list(dict.fromkeys([BOS, EOS, *SPECIAL.findall(everything)]))
    ends = [end_after(bare, special, *probe) for probe in probes]
    ends = list(dict.fromkeys(filter(None, ends)))
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([everything, *texts], trainer)
    model.add_special_tokens([hf.AddedToken(token, special=True, normalized=False) for token in special])
    model.add_tokens([
        hf.AddedToken(token, special=False, normalized=False) for token in dict.fromkeys(ADDED.findall(everything))
    ])  # fmt: skip
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=BOS, eos_token=EOS, chat_template=template
    )
    ids = [model.token_to_id(token) for token in ([EOS] if "eos_token" in template else []) + ends]
    config = {"bos_token": BOS, "eos_token": model.id_to_token(ids[0]) if ids else EOS, "chat_template": template}
    ours = from_hf(model.to_str(), config, None, {"eos_token_id": ids} if ids else {})
    return theirs, ours, tuple(ends)


def end_after(tok: Any, special: list[str], messages: list[dict], text: str, following: list[dict]) -> str | None:
    """Returns the token that ends the last message, in which `text` is the last text.

    It is the last of the tokens that are written whether or not another message follows; else the one after a
    conversation that ends there, as <|return|>; else the one that begins the next message.
    """
    names = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    tools = [schema(random.Random(0), "weather")]
    last, more = (rendered(tok, m) or rendered(tok, m, tools) or "" for m in (messages, [*messages, *following]))
    last, more = (
        names.findall(part.partition(text)[2].partition(following[-1]["content"])[0]) for part in (last, more)
    )
    both = [a for n, (a, _) in enumerate(zip(last, more)) if last[: n + 1] == more[: n + 1]]  # noqa: B905
    ending = [token for token in both if re.search("(?i)end|eo[st]", token)] or both
    return next(iter([*ending[-1:], *last, *more]), None)


REASONING = ("reasoning_content", "reasoning", "thinking")


def rendered(tok: Any, messages: list[dict[str, Any]], tools: Any = None, begin: bool = False) -> str | None:
    """Returns the text that transformers renders, or None if the template refuses the messages."""
    try:
        return tok.apply_chat_template(messages, tools=tools, add_generation_prompt=begin, tokenize=False)
    except Exception:
        return None


def abilities(tok: Any) -> frozenset[str]:
    """Returns which parts of a conversation the template writes."""
    asked = {"role": "user", "content": "QQQ"}
    call = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"place": "AAA"}}}
    result = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "RRR"}
    answer = {"role": "assistant", "content": "ZZZ"}
    tools = [schema(random.Random(0), "weather")]
    two = [call, call | {"id": "call67890", "function": {"name": "other", "arguments": {"place": "BBB"}}}]

    def writes(messages: list[dict[str, Any]], *texts: str, tools: Any = None) -> bool:
        text = rendered(tok, messages, tools)
        return text is not None and all(part in text for part in texts)

    def calling(content: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [asked, answer | {"content": content, "tool_calls": calls}, *([result] * len(calls)), answer]

    found = {
        "system": writes([{"role": "system", "content": "SSS"}, asked], "SSS"),
        "tools": writes([asked], "weather", tools=tools),
        "calls": writes(calling("", [call]), "weather", "AAA", "RRR", "ZZZ", tools=tools)
        and writes(calling("", [call])[:2], "weather", "AAA", tools=tools),
        "two calls": writes(calling("", two), "other", "BBB", tools=tools),
        "content beside calls": writes(calling("CCC", [call]), "CCC", "AAA", tools=tools),
        "reasoning": writes([asked, answer | dict.fromkeys(REASONING, "YYY")], "YYY")
        and not (rendered(tok, [asked], begin=True) or "").rstrip().endswith(("</think>", "<channel|>", "_THINKING|>")),
    }
    return frozenset(name for name, has in found.items() if has)


# --- what has to be learned, by transformers


def thread(ids: list[int], start: int = 0) -> list[int]:
    """Returns for each token a hash of the tokens up to and including it."""
    hashes = []
    for i in ids:
        start = hash((start, i))
        hashes.append(start)
    return hashes


def expected(case: Case, talk: dict[str, Any], check: bool = False) -> list[tuple[list[int], list[int], float]] | str:
    """Returns the context and the ids of each answer with its weight, or why the conversation has to be refused."""
    tools = talk.get("tools")
    if tools and "tools" not in case.writes:
        return "leaves out: tools"
    messages = []
    for message in talk["messages"]:
        kept = {key: part for key, part in message.items() if key not in ("weight", "train", "reasoning_content")}
        if "reasoning_content" in message:
            kept |= dict.fromkeys(REASONING, message["reasoning_content"])
        if not case.ends and message["role"] == "assistant" and not message.get("tool_calls"):
            kept["content"] += EOS
        messages.append(kept)
    answers = []
    for i, message in enumerate(talk["messages"]):
        if message["role"] != "assistant":
            continue
        prompt, full = rendered(case.theirs, messages[:i], tools, True), rendered(case.theirs, messages[: i + 1], tools)
        if prompt is None or full is None:
            return "raises"
        answer = added(case, message, prompt, full)
        if answer is None:
            return "writes the answer elsewhere"
        lost = left_out(message, answer) or left_out_result(talk["messages"][i - 1], prompt)
        if not lost and message.get("reasoning_content", "\0").strip() in message["content"]:  # written by itself, too?
            other = messages[i] | dict.fromkeys(REASONING, "other")
            lost = "reasoning" if rendered(case.theirs, [*messages[:i], other], tools) == full else None
        if lost:
            return f"leaves out: {lost}"
        weight = 0.0 if message.get("train") is False else float(message.get("weight", 1))
        context = case.theirs(prompt, add_special_tokens=False)["input_ids"]
        if check:
            options = {"tools": tools, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
            assert context == case.theirs.apply_chat_template(messages[:i], **options)
        answers.append((context, case.theirs(answer, add_special_tokens=False)["input_ids"], weight))
    return answers


def added(case: Case, message: dict[str, Any], prompt: str, full: str) -> str | None:
    """Returns what a template writes for an answer after its prompt, up to its end token.

    Returns None if it writes the answer after something else than the end of the prompt.
    """
    opened = prompt.rstrip().removesuffix("<think>")
    silent = re.sub(NOT_THINKING, "", prompt)
    if full.startswith(prompt):
        text = full[len(prompt) :]
    elif silent != prompt and full.startswith(silent) and "reasoning_content" not in message:
        text = full[len(silent) :]  # the prompt has an empty thought, a finished answer has none
    elif prompt.rstrip() != opened and full.startswith(opened):
        # the prompt begins the reasoning, and the template writes none for a finished answer
        rest = full[len(opened) :]
        between = "" if rest.startswith("</think>") else "\n</think>\n\n"
        text = message.get("reasoning_content", "").strip("\n") + between + rest
    else:
        # Earlier messages are written differently before an answer: the answer follows the longest end of the prompt
        # that the finished text has, too.
        n = next(n for n in range(len(prompt), -1, -1) if prompt[len(prompt) - n :] in full)
        first = full.rfind(prompt[len(prompt) - n :])
        if full[: first + n] == prompt[: first + n] or not any(
            token in full[first : first + n] for token in case.marks
        ):
            return None
        text = full[first + n :]
    ends = case.ends or (EOS,)
    found = [(text.find(end), end) for end in ends if end in text]
    if found:
        place, end = min(found)
        return text[:place] + end
    return text + (ends[-1] if message.get("tool_calls") else ends[0])


def left_out(message: dict[str, Any], answer: str) -> str | None:
    if message["content"].strip() not in answer:
        return "content"
    if message.get("reasoning_content", "").strip() not in answer:
        return "reasoning"
    return next(("calls" for c in message.get("tool_calls", ()) if c["function"]["name"] not in answer), None)


def left_out_result(message: dict[str, Any], prompt: str) -> str | None:
    text = message["content"].strip()
    return "result" if text not in prompt and json.dumps(text, ensure_ascii=False)[1:-1] not in prompt else None


def targets(answers: list[tuple[list[int], list[int], float]]) -> dict[tuple[int, int], float]:
    """Returns the weight of each target after each context, which is given as a hash."""
    learned: Counter[tuple[int, int]] = Counter()
    for context, answer, weight in answers:
        if weight:
            hashes = thread([*context, *answer])
            for j, i in enumerate(answer, len(context)):
                learned[hashes[j - 1], i] += weight
    return dict(learned)


# --- what gptjax trains


def targets_of_row(row: tuple[np.ndarray, np.ndarray]) -> dict[tuple[int, int], float]:
    ids, weights = row
    hashes = thread(ids.tolist())
    return {(hashes[j - 1], int(ids[j])): float(weights[j]) for j in range(1, len(ids)) if weights[j]}


def targets_of_tree(tree: token_tree.TokenTree) -> dict[tuple[int, int], float]:
    learned: Counter[tuple[int, int]] = Counter()
    hashes: list[int] = []
    path: list[int] = []
    for node, (token, target, weight) in enumerate(
        zip(tree.tokens.tolist(), tree.targets.tolist(), tree.weights.tolist(), strict=True)
    ):
        while path and tree.subtree_end[path[-1]] <= node:
            path.pop()
        assert tree.positions[node] == len(path)
        hashes += thread([token], hashes[path[-1]] if path else 0)
        path.append(node)
        if weight:
            learned[hashes[node], target] += weight
    return dict(learned)


def is_row(answers: list[tuple[list[int], list[int], float]]) -> bool:
    if sum(bool(weight) for _, _, weight in answers) == 1:
        return True
    before: list[int] = []
    for context, answer, _ in answers:
        if context[: len(before)] != before:
            return False
        before = context + answer
    return True


def same(a: dict[Any, float], b: dict[Any, float]) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[key], b[key], rel_tol=1e-6) for key in a)


def read(folder: Path, records: list[dict[str, Any]]) -> list[conversations.Conversation]:
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in records))
    return conversations.read(str(path))


def refusal(case: Case, talks: list[conversations.Conversation]) -> str:
    try:
        conversations.turns_of(talks, case.ours)
    except UserError as error:
        return str(error)
    return ""


def wrong(case: Case, talks: list[conversations.Conversation], wanted: list[Any], show: int) -> int:
    """Returns how many conversations are not trained as wanted, and shows the first ones."""
    try:
        encoded = conversations.encode(talks, case.ours, context_length=LIMIT)
    except UserError as error:
        if len(talks) > 1:
            half = len(talks) // 2
            bad = wrong(case, talks[:half], wanted[:half], show)
            return bad + wrong(case, talks[half:], wanted[half:], show - bad)
        if show > 0:
            print(f"  {case.name}: {str(error)[:600]}")
        return 1
    rows, trees = iter(zip(encoded.rows, encoded.weights, strict=True)), iter(encoded.trees)
    bad = []
    for i, answers in enumerate(wanted):
        example = next(rows if is_row(answers) else trees, None)
        ours = {} if example is None else (targets_of_row if is_row(answers) else targets_of_tree)(example)
        if not same(ours, targets(answers)):
            bad.append(i)
    for i in bad[: max(show, 0)]:
        [turns] = conversations.turns_of([talks[i]], case.ours)
        for turn, (context, answer, _) in zip(turns, wanted[i], strict=True):
            if turn.prompt != context or turn.answer != answer:
                texts = [case.theirs.decode(ids)[-300:] for ids in (turn.prompt, context, turn.answer, answer)]
                print(f"  {case.name} {talks[i].where}\n    " + "\n    ".join(map(repr, texts)))
                break
        else:
            print(f"  {case.name} {talks[i].where}: turns are as wanted, their row or tree is not")
    return len(bad) + sum(1 for _ in rows) + sum(1 for _ in trees)


# --- trees and rows


def compared(case: Case, talks: list[conversations.Conversation]) -> tuple[float, float, float] | None:
    """Returns tokens of trees relative to rows, and the differences of loss and gradients; None without trees."""
    as_trees, as_rows = (
        conversations.encode(talks, case.ours, context_length=LIMIT, trees=trees) for trees in (True, False)
    )
    if not as_trees.trees:
        return None

    def tokens(encoded: Any) -> int:
        return sum(len(ids) - 1 for ids in encoded.rows) + sum(len(tree.tokens) for tree in encoded.trees)

    n = 2 if max(map(len, as_rows.rows)) < 1500 else 1  # conversations; long ones take long
    few = [conversations.encode(talks[:n], case.ours, context_length=LIMIT, trees=trees) for trees in (True, False)]
    batches = [Batch(*packing.padded(encoded)) for encoded in few]
    length = max(batch.tokens.shape[1] for batch in batches)
    cfg = gptjax.ModelConfig(
        arch="llama", vocab_size=case.ours.vocab_size, n_layer=2, n_head=2, d_model=16, d_ff=32, context_length=length
    )
    params = gptjax.init_params(jax.random.key(0), cfg)
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), params)

    @jax.jit
    def loss(params: Any, batch: Batch) -> jax.Array:
        return gptjax.losses.next_token(cfg)(params, batch, None)[0].value()

    (ours, theirs), (a, b) = (
        [loss(params, batch) for batch in batches], [jax.jit(jax.grad(loss))(params, batch) for batch in batches]
    )  # fmt: skip
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    gap = max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return tokens(as_trees) / tokens(as_rows), abs(float(ours) / float(theirs) - 1), gap / scale


def render_here(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Renders as `_render.py` does, but in this process: refused conversations would start thousands of others."""
    try:
        return {"text": _render.render(request["template"], request["context"], request["max_chars"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def measure(name: str, template: str, args: argparse.Namespace, folder: Path) -> str:
    texts = [json.dumps(record(random.Random(i), frozenset({"system"})), ensure_ascii=False) for i in range(100)]
    theirs, ours, ends = tokenizers_of(name, template, texts)
    case = Case(name, theirs, ours, ends, tuple(ours.special_tokens), abilities(theirs))
    rng = random.Random(f"{args.seed} {name}")
    records = [record(rng, case.writes) for _ in range(args.conversations)]
    talks, wanted = read(folder, records), [expected(case, talk, i < 50) for i, talk in enumerate(records)]
    good = [i for i, answers in enumerate(wanted) if not isinstance(answers, str)]
    refused = [i for i, answers in enumerate(wanted) if isinstance(answers, str)]
    bad = wrong(case, [talks[i] for i in good], [wanted[i] for i in good], args.show) if good else 0
    accepted = 0
    for first in range(0, min(len(refused), REFUSED), conversations.MAX_PROBLEMS):
        chunk = refused[first : first + conversations.MAX_PROBLEMS]
        lines = refusal(case, [talks[i] for i in chunk]).split("\n")
        for line in lines[: args.show if first == 0 else 0]:
            i = next((i for i in chunk if line.startswith(f"{talks[i].where}: ")), None)
            print(f"  {name} refused ({wanted[i] if i is not None else None}): {line[:500]}")
        missing = [i for i in chunk if sum(line.startswith(f"{talks[i].where}: ") for line in lines) != 1]
        # Problems that are found before rendering hide those found later: ask again about what is not named.
        missing = [i for i in missing if not refusal(case, [talks[i]]).startswith(f"{talks[i].where}: ")]
        accepted += len(missing)
        for i in missing[: args.show]:
            print(f"  {name} {talks[i].where}: accepted, but it {wanted[i]}")
            print(
                "   ", *(repr(case.theirs.decode(turn.answer)) for turn in conversations.turns_of([talks[i]], ours)[0])
            )
    trees = None
    for parts in () if args.quick or bad else (case.writes - {"tools"}, case.writes):
        six = [record(random.Random(f"six {i}"), parts, turns=6) for i in range(20)]
        six = [talk for talk in six if not isinstance(expected(case, talk), str)]
        trees = trees or (compared(case, read(folder, six)) if six else None)
    reasons = Counter(str(wanted[i]) for i in refused)
    why = ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "0"
    equal = f"{100 * (1 - bad / len(good)):.2f}" if good else "-"
    ratios = ("-", "-", "-") if trees is None else (f"{trees[0]:.2f}", f"{trees[1]:.0e}", f"{trees[2]:.0e}")
    cells = [name, " ".join(ends) or "(none)", str(len(records)), why, str(accepted), equal, *ratios]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="templates whose names contain this text")
    parser.add_argument("--show", type=int, default=1, help="differences shown per template")
    parser.add_argument("--quick", action="store_true", help="without the comparison of trees and rows")
    args = parser.parse_args()
    if args.folder:
        templates = {path.stem: path.read_text(encoding="utf-8") for path in sorted(args.folder.glob("*.jinja"))}
    else:
        from test_templates import TEMPLATES

        smollm = gptjax.tokenizers.load(assets.fetch("smollm2-135m-instruct"))
        templates = {"smollm2": smollm.chat_template, **TEMPLATES}
    chat._in_child = render_here
    print("| template | ends | conversations | refused | accepted | equal % | trees / rows | loss | gradients |")
    print("|" + "---|" * 9)
    with tempfile.TemporaryDirectory() as folder:
        for name, template in templates.items():
            if args.only in name:
                began = time.monotonic()
                try:
                    line = measure(name, template, args, Path(folder))
                except Exception as error:
                    line = f"| {name} | FAILED {type(error).__name__}: {str(error)[:300]}"
                print(line, f"{time.monotonic() - began:.0f} s", file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
