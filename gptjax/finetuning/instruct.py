"""Fine-tuning a language model to follow instructions: conversations, rows, run, and answers to what was held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import tree, weights
from gptjax.config import Config
from gptjax.data import instructions, packing, skills
from gptjax.data.instructions import Conversation
from gptjax.finetuning import base
from gptjax.generation import for_decoding, generate
from gptjax.model.gpt import abstract_params
from gptjax.tasks import pretrain
from gptjax.training.job import Job
from gptjax.training.loop import TrainResult, flops_per_token, run_job
from gptjax.types import Batch, UserError

RESPONSES, RESULTS = "responses.jsonl", "test.json"
CHUNK = 256  # tokens whose logits are alive at once, where the head is not trained


class Talks(NamedTuple):
    train: list[Conversation]
    val: list[Conversation]
    test: list[Conversation]


def run(cfg: Config, log: Callable[[str], None] | None = None) -> TrainResult:
    """Train, then answer what was held out: responses.jsonl, and the share of exact answers."""
    result = run_job(cfg, _prepare, log)
    say, folder = log or print, Path(result.run_dir)
    if not (folder / RESULTS).exists():
        params, _ = weights.load(folder / "final")  # of plain arrays
        rows = answers(params, result.cfg, result.tokenizer, conversations(result.cfg).test)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / RESPONSES).write_text(text, encoding="utf-8")
        (folder / RESULTS).write_text(json.dumps(scores(rows), indent=1) + "\n", encoding="utf-8")
    found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    say(f"test    {found['n']} held out: {found['exact']:.1%} exact, {found['normalised']:.1%} but for case and blanks")
    say(f"        answers in {folder / RESPONSES}")
    return result


def conversations(cfg: Config) -> Talks:
    """Of a file in its order: what is trained on, then test, then validation, as the book cuts it. Of the synthetic
    skills: test and validation ask about words and numbers that training never shows."""
    settings = cfg.instruct
    if settings.source is None:
        n = settings.examples
        held = [max(1, round(n * share)) for share in (settings.val_fraction, settings.test_fraction)]
        unseen = skills.skills(sum(held), cfg.seed, held_out=True)
        return Talks(skills.skills(n, cfg.seed), unseen[: held[0]], unseen[held[0] :])
    talks = instructions.read(settings.source)
    n = len(talks)
    test = int(n * settings.test_fraction)
    train = int(n * (1 - settings.test_fraction - settings.val_fraction) + 1e-9)
    parts = Talks(talks[:train], talks[train + test :], talks[train : train + test])
    if not all(parts):
        raise UserError(f"{settings.source}: {n} conversations are too few for a part to test and one to validate on")
    return parts


def _prepare(cfg: Config, progress: Any) -> tuple[Config, Job]:
    found = base.base_model(cfg)
    tokenizer, settings, instruct = found.tokenizer(), cfg.train, cfg.instruct
    model = base.model_config(cfg, found.cfg)
    width = min(instruct.context_length, model.context_length)
    with progress.phase("preparing the data"):
        talks = conversations(cfg)
        encoded = [
            instructions.encode(part, tokenizer, style=instruct.style, context_length=width, loss_on=instruct.loss_on)
            for part in (talks.train, talks.val)
        ]
        train, val = (getattr(packing, instruct.packing)(part, width) for part in encoded)
        example = instructions.show(instructions.render(talks.train[0], tokenizer, instruct.style), tokenizer)
    if settings.epochs is not None:
        steps = max(1, round(settings.epochs * len(train.tokens) / settings.batch_size))
        settings = dataclasses.replace(settings, max_steps=steps)
    cfg = dataclasses.replace(cfg, model=model, train=settings)
    with progress.phase("loading the base"):
        params = found.params("float32", None)
    parts = base.parts(cfg, params, {}, model, jax.random.key(cfg.seed))
    plain, export = parts.plain, parts.export  # not `parts`, which would keep the weights that training replaces
    n_params, fingerprint, flops = tree.size(params), weights.fingerprint(params), flops_per_token(model, params)
    loss = pretrain.task(model, chunk=CHUNK if cfg.finetune.trainable == "lora" else None).loss

    def batch(step: int) -> Batch:
        return packing.batch(train, step, batch_size=settings.batch_size, seed=cfg.seed)

    def batches(step: int, k: int) -> Batch:
        some = [batch(step + i) for i in range(k)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *some)

    def describe(n_trained: int) -> list[str]:
        counts = " + ".join(f"{len(part):,}" for part in talks)
        full = (train.segment_ids > 0).mean()
        return [
            f"data    {instruct.source or 'synthetic skills'}: {counts} conversations to train, validate and test on",
            f"        {len(train.tokens):,} rows of {train.tokens.shape[1]} tokens, {full:.0%} full; "
            f"{encoded[0].dropped + encoded[1].dropped} conversations do not fit and are left out",
            *base.describe(cfg, n_params, n_trained),
            f"train   {cfg.optim.name}, lr {cfg.optim.lr:g}, {settings.max_steps:,} steps of "
            f"{settings.batch_size} rows",
            f"---- an example; what is learned is green ----\n{example}\n----",
        ]

    def write(folder: Path, trained: Any, frozen: Any, files: dict[str, str]) -> None:
        weights.save(folder, plain(trained, frozen), model, tokenizer, files)
        export(folder / "adapter", trained, frozen)

    return cfg, Job(
        tokenizer=tokenizer,
        batch=batch,
        batches=batches,
        where=lambda step: f"the batch begins with {tokenizer.decode(batch(step).tokens[0, :20].tolist())!r}",
        eval_batches=lambda first: packing.eval_batches(val, settings.batch_size),
        loss=base.loss_with_dropout(cfg, loss),
        init=lambda key, start: start,
        start=parts.trained,
        frozen=parts.frozen,
        combine=parts.combine,
        optimizer=base.optimizer(cfg),
        tokens_per_step=settings.batch_size * train.tokens.shape[1],
        flops_per_token=flops,
        identity={"base": fingerprint, "data": _hash(train, val)},
        describe=describe,
        write=write,
    )


def plan(cfg: Config) -> list[str]:
    """What a run would do, for --dry-run."""
    talks, found = conversations(cfg), base.base_model(cfg)
    model = base.model_config(cfg, found.cfg)
    encoded = instructions.encode(
        talks.train, found.tokenizer(), style=cfg.instruct.style, loss_on=cfg.instruct.loss_on,
        context_length=min(cfg.instruct.context_length, model.context_length),
    )  # fmt: skip
    n_rows = len(getattr(packing, cfg.instruct.packing)(encoded, cfg.instruct.context_length).tokens)
    settings = cfg.train
    steps = settings.max_steps if settings.epochs is None else round(settings.epochs * n_rows / settings.batch_size)
    shapes = abstract_params(model)
    n, n_trained = tree.size(shapes), tree.size(base.abstract_trained(cfg, shapes, {}, model))
    counts = " + ".join(f"{len(part):,}" for part in talks)
    return [
        f"data               {counts} conversations to train, validate and test on; {encoded.dropped} do not fit",
        f"base               {found.where}: {n:,} parameters, {n_trained:,} trained ({n_trained / n:.2%})",
        f"steps              {max(1, steps):,} of {settings.batch_size} rows, {n_rows:,} rows an epoch",
    ]


def _hash(*parts: packing.Rows) -> str:
    digest = hashlib.sha256()
    for leaf in (leaf for part in parts for leaf in part):
        digest.update(f"{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def answers(params: Any, cfg: Config, tokenizer: Any, talks: Sequence[Conversation]) -> list[dict[str, Any]]:
    """The model's greedy answer to each conversation's last question, beside the one expected."""
    params, rows = for_decoding(params, cfg.model), []
    for first in range(0, len(talks), cfg.sample.batch_size):
        some = talks[first : first + cfg.sample.batch_size]
        pieces = [instructions.render(talk, tokenizer, cfg.instruct.style) for talk in some]
        prompts = [[i for piece in talk[:-1] for i in piece.ids] for talk in pieces]
        new = generate(
            params, prompts, cfg.model, max_new_tokens=cfg.sample.max_new_tokens, key=jax.random.key(0),
            stop=sorted({talk[-1].ids[-1] for talk in pieces}),
        )  # fmt: skip
        for talk, ids in zip(some, new, strict=True):
            question, expected = talk.messages[-2], talk.messages[-1]["content"]
            asked = "\n".join(filter(None, (question["content"], question.get("input"))))
            rows.append({"where": talk.where, "prompt": asked, "expected": expected, "answer": tokenizer.decode(ids)})
    return rows


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"n", "exact", "normalised"}: shares of answers that are the expected ones, but for blanks around them; and but
    for case, blanks and a full stop at the end."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(".")

    exact = [row["answer"].strip() == row["expected"].strip() for row in rows]
    normalised = [plain(row["answer"]) == plain(row["expected"]) for row in rows]
    return {"n": len(rows), "exact": float(np.mean(exact)), "normalised": float(np.mean(normalised))}
