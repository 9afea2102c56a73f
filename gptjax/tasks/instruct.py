"""Instruction tuning: fine-tunes a language model on conversations, and evaluates its answers to held-out questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import losses, weights
from gptjax.config import Config, ModelConfig
from gptjax.data import loader, packing, synthetic
from gptjax.data.conversations import Conversation, encode, read, render_all, show_turns, tree_of, turns_of
from gptjax.data.split import Splits, split_records
from gptjax.errors import UserError
from gptjax.evaluation.generation_metrics import MAX_PROBLEMS, check_constraints, scores, win_rate
from gptjax.files import use_json, write_json, write_text
from gptjax.generation import for_decoding, generate
from gptjax.ops import device
from gptjax.tasks import tuning
from gptjax.tasks.tuning import refuse_missing
from gptjax.tokenizers import Tokenizer, chat
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.task import Loss, Ready, resolve
from gptjax.types import Batch, Params

RESPONSES, BEFORE, RESULTS = "responses.jsonl", "responses-before.jsonl", "test.json"
__all__ = ["answers", "conversations", "evaluate", "loss", "plan", "prepare", "refuse_missing"]
# The function `inspect` searches the first INSPECTED conversations for a conversation with branches, in which the chat
# template renders earlier turns differently after later turns.
INSPECTED = 200
TURNS = 8  # The maximum number of questions in a synthetic training conversation.
# With LoRA, the loss is computed in chunks of 256 tokens, so that only the logits of one chunk are in memory. Computing
# the loss in small chunks slows down training only if the LM head is trained, and with LoRA, the LM head is frozen.
CHUNK = 256


def evaluate(result: TrainResult, talks: Sequence[Conversation] | None, say: Callable[[str], None]) -> None:
    """Generates the model's answers to the held-out questions, and scores the answers.

    The model's answers are written to responses.jsonl, and their scores to test.json. If test.json exists already, no
    answers are generated, and a summary of the scores in test.json is printed.

    Args:
        talks: the test conversations. None: the test conversations are read again.
    """
    folder = Path(result.run_dir)
    if not (folder / RESULTS).exists():
        test = talks or conversations(result.cfg, []).test
        # The loaded params have dtype float32, and an adapter is merged into the params.
        params, _ = weights.load(folder / "final")
        with Progress(log=say) as progress:
            rows = _answer(folder / RESPONSES, params, result, test, progress, "the tuned model")
            test_scores = scores(rows)
            if result.cfg.instruct.compare:
                del params
                base_params = tuning.base_model(result.cfg).params("float32", None)
                before = _answer(folder / BEFORE, base_params, result, test, progress, "the base model")
                test_scores |= {"before": scores(before), "win_rate": win_rate(rows, before)}
        write_json(folder / RESULTS, test_scores)
    for line in use_json(folder / RESULTS, summary):
        say(line)
    say(f"        answers in {folder / RESPONSES}")


def _answer(
    file: Path, params: Params, result: TrainResult, talks: Sequence[Conversation], progress: Progress, name: str
) -> list[dict]:
    rows = answers(params, result.cfg, result.tokenizer, talks, progress, name)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def summary(results: dict[str, Any]) -> list[str]:
    def line(scores: dict[str, Any]) -> str:
        return (
            f"exact match {scores['exact']:.1%} ({scores['normalised']:.1%} ignoring case, whitespace and a final "
            f"full stop), token F1 {scores['token_f1']:.3f}, loss {scores['nats_per_token']:.4f} per response token"
        )

    lines = [f"test    {results['n']} held-out questions: {line(results)}"]
    if "before" in results:
        wins = results["win_rate"]["win_rate"]
        lines += [
            f"        base model: {line(results['before'])}",
            f"        expected answers with a higher probability than under the base model: {wins:.1%}",
        ]
    return lines


def conversations(cfg: Config, notes: list[str] | None = None) -> Splits[Conversation]:
    """Reads the conversations of the data source, and splits them into training, validation and test conversations.

    Args:
        notes: a list to which a line of text is appended that names the ignored keys of the records, if there are any.
            None: the line is printed to stderr.
    """
    splits = split_records(cfg.instruct, cfg.seed, read, skills, notes)
    if problems := [line for talk in splits.test for line in check_constraints(talk.constraints, talk.where)]:
        raise UserError.all(problems[:MAX_PROBLEMS])
    return splits


def skills(n: int, seed: int, held_out: bool = False) -> list[Conversation]:
    """Returns synthetic conversations, with n questions in total.

    A synthetic training conversation has up to `TURNS` questions, so that a system prompt in the chat template occurs
    once per conversation instead of once per question. A synthetic held-out conversation has one question.
    """
    return synthetic.skills(n, seed, held_out, turns=1 if held_out else TURNS)


def prepare(cfg: Config, progress: Progress) -> Ready:
    base = tuning.base_model(cfg)
    instruct = cfg.instruct
    model = base.cfg.computed_as(cfg.model)
    width, notes = tuning.longest_row(cfg, model), list[str]()
    with progress.phase("preparing the data"):
        tokenizer, style_lines = tuning.styled(base, instruct.style)
        splits = conversations(cfg, notes)
        encoded = [
            encode(
                talks,
                tokenizer,
                context_length=width,
                loss_on=instruct.loss_on,
                trees=token_trees(cfg, model),
                because=tuning.why_so_long(cfg, model),
            )
            for talks in (splits.train, splits.val)
        ]
        train, val = (getattr(packing, instruct.packing)(examples, width) for examples in encoded)
        [turns] = turns_of(splits.train[:1], tokenizer)
        example = show_turns(turns, tokenizer, token_trees(cfg, model))
    size = cfg.train.batch_size
    resolved = resolve(cfg, model, len(train.tokens), cfg.train.batch_size)
    trainable, fingerprint = tuning.load_base(resolved, base, {}, jax.random.key(cfg.seed), progress)

    counts = " + ".join(f"{len(talks):,}" for talks in splits)
    lines = [
        f"data    {instruct.source or 'synthetic skills'}: {counts} conversations to train, validate and test on",
        f"        {len(train.tokens):,} rows of {train.tokens.shape[1]} tokens, {(train.segment_ids > 0).mean():.0%} "
        f"full; {encoded[0].dropped + encoded[1].dropped} conversations that do not fit a row were dropped",
        *(f"        {note}" for note in notes),
        *style_lines,
        f"---- an example; tokens in the loss are green, or between « and » ----\n{example}\n----",
    ]
    task = tuning.make_task(
        resolved,
        trainable,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: packing.batch(train, step, batch_size=size, seed=cfg.seed),
        eval_batches=lambda: packing.eval_batches(val, size),
        width=train.tokens.shape[1],
        data=loader.fingerprint(*train, *val),
        lines=lines,
    )
    return Ready(resolved, task, splits.test)


def inspect(cfg: Config) -> list[str]:
    """Returns lines of text that show which tokens of one training conversation are in the loss.

    A conversation has branches if the chat template renders its earlier turns differently after later turns. The first
    conversation with branches is shown, or the first conversation if no conversation has branches.
    """
    base = tuning.base_model(cfg)
    tokenizer, style_lines = tuning.styled(base, cfg.instruct.style)
    talks = conversations(cfg).train[:INSPECTED]
    turns = turns_of(talks, tokenizer)
    trees = [tree_of(of_talk) for of_talk in turns]
    branched = [i for i, tree in enumerate(trees) if tree is not None]
    i = branched[0] if branched else 0
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer, weight in turns[i] if weight]
    tree = trees[i]
    size = f"{lengths[-1]} tokens"
    if tree is not None:
        size = f"{len(tree.tokens)} tokens as a tree, {sum(lengths)} as one row per answer"
    return [
        *style_lines,
        f"data    {talks[i].where}: {len(turns[i])} answers, {size}; of the first {len(turns):,} conversations, "
        f"{len(branched):,} have branches, because the template renders earlier turns differently later",
        f"---- tokens in the loss are green, or between « and » ----\n{show_turns(turns[i], tokenizer)}\n----",
    ]


def token_trees(cfg: Config, model: ModelConfig) -> bool:
    """Returns whether conversations are encoded as token trees, which hold common prefixes once (instruct.branches).

    Raises:
        UserError: instruct.branches=tree, but the model does not support token trees.
    """
    if cfg.instruct.branches == "tree" and model.smear:
        raise UserError(
            "instruct.branches=tree: a model with smear=true has no token trees; set instruct.branches=rows"
        )
    if cfg.instruct.branches is None:
        return device.platform() == "cpu" and not model.smear
    return cfg.instruct.branches == "tree"


def loss(cfg: Config) -> Loss:
    return losses.next_token(cfg.model, chunk=CHUNK if cfg.finetune.trainable == "lora" else None)


def batch_shapes(cfg: Config, rows: int, width: int) -> Batch:
    ids, counts = (jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (np.int32, np.float32))
    return Batch(ids, ids, counts, ids, ids)


def plan(cfg: Config) -> list[str]:
    """Returns the lines of text that --dry-run prints to summarise a training run."""
    notes: list[str] = []
    splits, base = conversations(cfg, notes), tuning.base_model(cfg)
    model = base.cfg.computed_as(cfg.model)
    width = tuning.longest_row(cfg, model)
    tokenizer, style_lines = tuning.styled(base, cfg.instruct.style)
    encoded = encode(
        splits.train, tokenizer, loss_on=cfg.instruct.loss_on, context_length=width, trees=token_trees(cfg, model),
        because=tuning.why_so_long(cfg, model),
    )  # fmt: skip
    n_rows = len(getattr(packing, cfg.instruct.packing)(encoded, width).tokens)
    counts = " + ".join(f"{len(talks):,}" for talks in splits)
    return [
        f"data               {counts} conversations to train, validate and test on; {encoded.dropped} do not fit a row",
        *(f"                   {note}" for note in notes),
        *(f"{line[:8]:19}{line[8:]}" for line in style_lines),
        tuning.plan(cfg, base, model),
        f"steps              {cfg.train.steps(n_rows, cfg.train.batch_size):,} of {cfg.train.batch_size} rows, "
        f"{n_rows:,} rows per epoch",
    ]


def answers(
    params: Params,
    cfg: Config,
    tokenizer: Tokenizer,
    talks: Sequence[Conversation],
    progress: Progress | None = None,
    name: str = "",
) -> list[dict[str, Any]]:
    """Generates greedy answers to the last question of each conversation, and computes -log p of the expected answers.

    Args:
        params: the model's params.
        talks: conversations that end with the expected answer.
        progress: object that prints heartbeat lines while answers are generated, or None for no such lines.
        name: name of the model in the heartbeat lines.

    Returns:
        A dict per conversation with the keys where (location in the source, such as rows.jsonl:3), prompt, expected,
        answer, nats (-log p of the expected answer and its end token) and tokens (the number of tokens of the expected
        answer and its end token). If the conversation has them, the dict also has the keys system, history (the
        messages before the question) and constraints.
    """
    tokenizer = chat.styled(tokenizer, getattr(cfg, cfg.task).style)
    decoding, rows = for_decoding(params, cfg.model), list[dict[str, Any]]()
    rendered = render_all(talks, tokenizer)
    log_probs = jax.jit(lambda params, batch: losses.token_log_probs(params, batch, cfg.model))
    size, longest = cfg.sample.batch_size, [0]

    def count(tokens: list[int]) -> bool:
        """Records the length of the longest answer in tokens.

        The function is passed to `generate` as a stop condition, and always returns False, so that it stops no answer.
        """
        longest[0] = max(longest[0], len(tokens))
        return False

    def phase() -> str:
        batch = f"the next {min(size, len(talks) - len(rows))} have {longest[0]} of {cfg.sample.max_new_tokens} tokens"
        return f"answering{', ' * bool(name)}{name}: {len(rows)} of {len(talks)} done, {batch}"

    for first in range(0, len(talks), size):
        batch_spans = rendered[first : first + size]
        prompts = [[i for span in spans[:-1] for i in span.ids] for spans in batch_spans]
        longest[0] = 0
        with progress.phase(phase) if progress else nullcontext():
            new = generate(
                decoding, prompts, cfg.model, max_new_tokens=cfg.sample.max_new_tokens, key=jax.random.key(0),
                stop=weights.stop_ids(tokenizer), until=count if progress else None,
                vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            batch = _scoring_batch(prompts, [spans[-1].ids for spans in batch_spans], size)
            nats = np.asarray(-(log_probs(params, batch) * batch.weights).sum(-1))
        for talk, ids, loss, spans in zip(talks[first:], new, nats, batch_spans, strict=False):
            score = {"nats": float(loss), "tokens": len(spans[-1].ids)}
            rows.append(row_of(talk, tokenizer.decode(ids)) | score)
    return rows


def _scoring_batch(prompts: list[list[int]], expected: list[list[int]], size: int) -> Batch:
    """Returns a batch of `size` rows, each of which holds a prompt and its expected answer.

    Rows are padded to a multiple of 64 tokens, so that XLA compiles programs for only a few shapes.
    """
    pairs = list(zip(prompts, expected, strict=True))
    pairs += pairs[:1] * (size - len(pairs))
    ids = [np.array(p + e, np.int32) for p, e in pairs]
    weights = [np.array([0] * len(p) + [1] * len(e), np.float32) for p, e in pairs]
    longest = max(len(row) - 1 for row in ids)
    return Batch(*packing.padded(packing.Encoded(ids, weights, 0), -(-longest // 64) * 64))


def row_of(talk: Conversation, answer: str) -> dict[str, Any]:
    """Returns a dict with the prompt, the expected answer and the model's answer to a conversation's last question.

    The dict has the keys of the dicts that the function `answers` returns, except nats and tokens.
    """
    *before, question, expected = talk.messages
    row = {"where": talk.where, "prompt": _message_text(question), "expected": expected["content"], "answer": answer}
    system = [message["content"] for message in before if message["role"] == "system"]
    history = [{"role": m["role"], "content": _message_text(m)} for m in before if m["role"] != "system"]
    optional = {"system": "".join(system), "history": history, "constraints": list(talk.constraints)}
    return row | {key: value for key, value in optional.items() if value}


def _message_text(message: dict[str, Any]) -> str:
    return "\n".join(filter(None, (message["content"], message.get("input"))))
