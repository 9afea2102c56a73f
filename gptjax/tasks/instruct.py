"""Fine-tuning a language model to follow instructions: conversations, rows, run, and answers to what was held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import losses, weights
from gptjax.config import Config
from gptjax.data import loader, packing, synthetic
from gptjax.data.conversations import Conversation, encode, read, render, render_all, show
from gptjax.data.split import Splits, split_records
from gptjax.errors import UserError
from gptjax.evaluation.generation_metrics import MAX_PROBLEMS, check_constraints, scores, win_rate
from gptjax.files import use_json, write_json, write_text
from gptjax.generation import for_decoding, generate
from gptjax.tasks import tuning
from gptjax.tasks.tuning import refuse_missing
from gptjax.tokenizers import Tokenizer, chat
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.task import Loss, Ready, resolve
from gptjax.types import Batch, Params

RESPONSES, BEFORE, RESULTS = "responses.jsonl", "responses-before.jsonl", "test.json"
__all__ = ["answers", "conversations", "evaluate", "loss", "plan", "prepare", "refuse_missing"]
TURNS = 8  # of a synthetic conversation to train on, at most
CHUNK = 256  # tokens whose logits are alive at once, where the head is not trained


def evaluate(result: TrainResult, talks: Sequence[Conversation] | None, say: Callable[[str], None]) -> None:
    """Answer what was held out: responses.jsonl, and the share of exact answers, test.json.

    Args:
        talks: that were held out; None: read again.
    """
    folder = Path(result.run_dir)
    if not (folder / RESULTS).exists():
        test = talks or conversations(result.cfg, []).test
        params, _ = weights.load(folder / "final")  # of plain arrays
        with Progress(log=say) as progress:
            rows = _answer(folder / RESPONSES, params, result, test, progress, "the tuned model")
            found = scores(rows)
            if result.cfg.instruct.compare:
                del params
                base_params = tuning.base_model(result.cfg).params("float32", None)
                before = _answer(folder / BEFORE, base_params, result, test, progress, "the base")
                found |= {"before": scores(before), "win_rate": win_rate(rows, before)}
        write_json(folder / RESULTS, found)
    for line in use_json(folder / RESULTS, summary):
        say(line)
    say(f"        answers in {folder / RESPONSES}")


def _answer(
    file: Path, params: Params, result: TrainResult, talks: Sequence[Conversation], progress: Progress, who: str
) -> list[dict]:
    rows = answers(params, result.cfg, result.tokenizer, talks, progress, who)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def summary(found: dict[str, Any]) -> list[str]:
    def line(scores: dict[str, Any]) -> str:
        return (
            f"{scores['exact']:.1%} exact, {scores['normalised']:.1%} but for case and blanks, token F1 "
            f"{scores['token_f1']:.3f}, loss {scores['nats_per_token']:.4f} a response token"
        )

    lines = [f"test    {found['n']} held out: {line(found)}"]
    if "before" in found:
        wins = found["win_rate"]["win_rate"]
        lines += [
            f"        before: {line(found['before'])}",
            f"        likelier than before: {wins:.1%} of the answers",
        ]
    return lines


def conversations(cfg: Config, notes: list[str] | None = None) -> Splits[Conversation]:
    """To train, validate and test on. notes: as of `conversations.read`."""
    parts = split_records(cfg.instruct, cfg.seed, read, _skills, notes)
    if problems := [line for talk in parts.test for line in check_constraints(talk.constraints, talk.where)]:
        raise UserError.all(problems[:MAX_PROBLEMS])
    return parts


def _skills(n: int, seed: int, held_out: bool = False) -> list[Conversation]:
    """In training several questions a conversation: what a chat template says before the first is read once."""
    return synthetic.skills(n, seed, held_out, turns=1 if held_out else TURNS)


def prepare(cfg: Config, progress: Progress) -> Ready:
    found = tuning.base_model(cfg)
    instruct = cfg.instruct
    model = found.cfg.computed_as(cfg.model)
    width, notes = tuning.longest_row(cfg, model), list[str]()
    with progress.phase("preparing the data"):
        tokenizer, about_style = tuning.styled(found, instruct.style)
        talks = conversations(cfg, notes)
        encoded = [
            encode(
                part,
                tokenizer,
                context_length=width,
                loss_on=instruct.loss_on,
                because=tuning.why_so_long(cfg, model),
            )
            for part in (talks.train, talks.val)
        ]
        train, val = (getattr(packing, instruct.packing)(part, width) for part in encoded)
        example = show(render(talks.train[0], tokenizer), tokenizer)
    size = cfg.train.batch_size
    resolved = resolve(cfg, model, len(train.tokens), cfg.train.batch_size)
    parts, fingerprint = tuning.load_base(resolved, found, {}, jax.random.key(cfg.seed), progress)

    counts = " + ".join(f"{len(part):,}" for part in talks)
    lines = [
        f"data    {instruct.source or 'synthetic skills'}: {counts} conversations to train, validate and test on",
        f"        {len(train.tokens):,} rows of {train.tokens.shape[1]} tokens, {(train.segment_ids > 0).mean():.0%} "
        f"full; {encoded[0].dropped + encoded[1].dropped} conversations do not fit and are left out",
        *(f"        {note}" for note in notes),
        *about_style,
        f"---- an example; what is learned is green, or between « and » ----\n{example}\n----",
    ]
    task = tuning.make_task(
        resolved,
        parts,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: packing.batch(train, step, batch_size=size, seed=cfg.seed),
        eval_batches=lambda: packing.eval_batches(val, size),
        width=train.tokens.shape[1],
        data=loader.fingerprint(*train, *val),
        lines=lines,
    )
    return Ready(resolved, task, talks.test)


def loss(cfg: Config) -> Loss:
    return losses.next_token(cfg.model, chunk=CHUNK if cfg.finetune.trainable == "lora" else None)


def batch_shapes(cfg: Config, rows: int, width: int) -> Batch:
    ids, counts = (jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (np.int32, np.float32))
    return Batch(ids, ids, counts, ids, ids)


def plan(cfg: Config) -> list[str]:
    """What a run would do, for --dry-run."""
    notes: list[str] = []
    talks, found = conversations(cfg, notes), tuning.base_model(cfg)
    model = found.cfg.computed_as(cfg.model)
    width = tuning.longest_row(cfg, model)
    tokenizer, about_style = tuning.styled(found, cfg.instruct.style)
    encoded = encode(
        talks.train, tokenizer, loss_on=cfg.instruct.loss_on, context_length=width,
        because=tuning.why_so_long(cfg, model),
    )  # fmt: skip
    n_rows = len(getattr(packing, cfg.instruct.packing)(encoded, width).tokens)
    counts = " + ".join(f"{len(part):,}" for part in talks)
    return [
        f"data               {counts} conversations to train, validate and test on; {encoded.dropped} do not fit",
        *(f"                   {note}" for note in notes),
        *(f"{line[:8]:19}{line[8:]}" for line in about_style),
        tuning.plan(cfg, found, model),
        f"steps              {cfg.train.steps(n_rows, cfg.train.batch_size):,} of {cfg.train.batch_size} rows, "
        f"{n_rows:,} rows an epoch",
    ]


def answers(
    params: Params,
    cfg: Config,
    tokenizer: Tokenizer,
    talks: Sequence[Conversation],
    progress: Progress | None = None,
    who: str = "",
) -> list[dict[str, Any]]:
    """The model's greedy answer to each conversation's last question, beside the one expected and its loss.

    Args:
        who: whose answers they are, for the sign of life.

    Returns:
        One a conversation: where, prompt, expected, answer; nats, -log p of the expected answer with its end, and
        tokens, their number; where the record has them, system, history (the messages before the question) and
        constraints.
    """
    tokenizer = chat.styled(tokenizer, cfg.instruct.style)
    decoding, rows = for_decoding(params, cfg.model), list[dict[str, Any]]()
    rendered = render_all(talks, tokenizer)
    log_probs = jax.jit(lambda params, batch: losses.token_log_probs(params, batch, cfg.model))
    size, longest = cfg.sample.batch_size, [0]

    def count(tokens: list[int]) -> bool:
        """As `until`, which the loop asks about the tokens of each row from time to time: they are only counted."""
        longest[0] = max(longest[0], len(tokens))
        return False

    def doing() -> str:
        batch = f"the next {min(size, len(talks) - len(rows))} have {longest[0]} of {cfg.sample.max_new_tokens} tokens"
        return f"answering{', ' * bool(who)}{who}: {len(rows)} of {len(talks)} done, {batch}"

    for first in range(0, len(talks), size):
        some = rendered[first : first + size]
        prompts = [[i for piece in talk[:-1] for i in piece.ids] for talk in some]
        longest[0] = 0
        with progress.phase(doing) if progress else nullcontext():
            new = generate(
                decoding, prompts, cfg.model, max_new_tokens=cfg.sample.max_new_tokens, key=jax.random.key(0),
                stop=weights.stop_ids(tokenizer), until=count if progress else None,
                vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            batch = _to_score(prompts, [talk[-1].ids for talk in some], size)
            nats = np.asarray(-(log_probs(params, batch) * batch.weights).sum(-1))
        for talk, ids, loss, learned in zip(talks[first:], new, nats, some, strict=False):
            score = {"nats": float(loss), "tokens": len(learned[-1].ids)}
            rows.append(_row(talk, tokenizer.decode(ids)) | score)
    return rows


def _to_score(prompts: list[list[int]], expected: list[list[int]], size: int) -> Batch:
    """`size` rows, one an answer; of few lengths, so that few programs are compiled."""
    both = list(zip(prompts, expected, strict=True))
    both += both[:1] * (size - len(both))
    ids = [np.array(p + e, np.int32) for p, e in both]
    weights = [np.array([0] * len(p) + [1] * len(e), np.float32) for p, e in both]
    longest = max(len(row) - 1 for row in ids)
    return Batch(*packing.padded(packing.Encoded(ids, weights, 0), -(-longest // 64) * 64))


def _row(talk: Conversation, answer: str) -> dict[str, Any]:
    *before, question, expected = talk.messages
    row = {"where": talk.where, "prompt": _said(question), "expected": expected["content"], "answer": answer}
    system = [message["content"] for message in before if message["role"] == "system"]
    history = [{"role": m["role"], "content": _said(m)} for m in before if m["role"] != "system"]
    more = {"system": "".join(system), "history": history, "constraints": list(talk.constraints)}
    return row | {key: value for key, value in more.items() if value}


def _said(message: dict[str, Any]) -> str:
    return "\n".join(filter(None, (message["content"], message.get("input"))))
