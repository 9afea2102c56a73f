"""All checks, on every model that a run has left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gptjax import config, lora, losses, tree, weights
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ModelConfig
from gptjax.config.leaves import read_text
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.files import use_json
from gptjax.research.audit.canaries import exposure, phrases, trigger
from gptjax.research.audit.comparison import drift
from gptjax.research.audit.memorisation import extraction, membership
from gptjax.research.audit.outliers import NEIGHBOURS, outlier_scores, tail
from gptjax.research.audit.results import TEXTS, Backdoor, Comparison, Outliers, Prompt, Report, Row, Secret
from gptjax.research.audit.text import pieces, rows, rows_of, score
from gptjax.research.influence import gradient_features, unit
from gptjax.tokenizers import Tokenizer
from gptjax.training.resume import result_of
from gptjax.training.run_dir import RunDir
from gptjax.types import Params

CONTROLS, CONTEXTS = 199, 4  # phrases beside a trigger; text before it
EXCERPT = 80


class Snapshot(NamedTuple):
    """A model of a run at one step, read when it is asked for."""

    name: str
    params: Callable[[], Params]


def snapshots(run_dir: str | Path) -> tuple[list[Snapshot], Config | None, list[str]]:
    """Every model that a run has left, in the order of steps; the run's config; and what could not be taken, and why.

    A model that is no run has one snapshot.
    """
    run = RunDir(run_dir)
    if not run.config.is_file():
        return [Snapshot("model", lambda: weights.load(run_dir)[0])], None, []
    cfg = config.from_yaml(read_text(run.config, "config"), str(run.config))
    found, notes, last = [], [], None
    if (run.final / "result.json").is_file():
        last, _ = use_json(run.final / "result.json", result_of)
    kept = Checkpoints(run.checkpoints)
    why = ""  # no checkpoint can be read
    if cfg.task != "pretrain" and cfg.finetune.trainable != "all":
        if cfg.finetune.trainable != "lora":
            why = f"finetune.trainable={cfg.finetune.trainable} keeps a part of the weights only"
        elif cfg.lora.init != "lora" or cfg.finetune.quantize != "none":
            why = "its adapter is for a base that was split or quantised"
    for step in kept.steps():
        if step == last:
            continue
        if why:
            notes.append(f"the checkpoint of step {step} was left out: {why}")
        else:
            found.append(Snapshot(f"step {step:,}", partial(_whole, kept, step, cfg)))
    if last is not None:
        found.append(Snapshot(f"step {last:,}, the last", lambda: weights.load(run.final)[0]))
    if not found:  # final/ or best/ of a run, or what only they can say
        found.append(Snapshot("model", lambda: weights.load(run_dir)[0]))
    return found, cfg, notes


def _whole(kept: Checkpoints, step: int, cfg: Config) -> Params:
    """The trained params of a checkpoint; those of an adapter with its base."""
    params = kept.read(step).get("params")
    if not isinstance(params, dict):
        raise UserError(f"{kept.folder / str(step)} holds no parameters")
    if "adapter" not in params:
        return params
    base = weights.load(cfg.finetune.base)[0]
    return lora.merge(base, params["adapter"], cfg.lora)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of `audit`.

    train, held_out   stores of tokens: what was trained on, and text of the same kind that was not
    canaries          {"prefix", "secret"} or {"trigger", "payload"} each: `read_canaries`
    base, prompts     (params, cfg) and rows of text, for drift
    rows              at most so many of each store
    of                pattern of the parameters whose gradients are compared
    prefixes, suffix, strides   tokens, of extraction; None: as the context allows
    alpha             rate of false alarms, a check
    """

    train: TokenStore
    held_out: TokenStore
    canaries: Sequence[dict[str, str]] = ()
    base: tuple[Params, ModelConfig] | None = None
    prompts: Sequence[str] = ()
    rows: int = 500
    of: str = "blocks/*"
    dims: int = 1024
    prefixes: Sequence[int] | None = None
    suffix: int | None = None
    strides: Sequence[int] | None = None
    alpha: float = 0.01
    seed: int = 0


def audit(
    models: Sequence[Snapshot],
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Every check that the settings allow; `report.page` makes a page of it, `to_json` what audit.json holds.

    Each model is read once. Outliers are sought in the gradients of all of them, side by side.
    """

    length = min(cfg.context_length, 512)
    stores = dict(zip(TEXTS, (settings.train, settings.held_out), strict=True))
    places = {name: pieces(store, length, most=settings.rows, seed=settings.seed) for name, store in stores.items()}
    batches = {name: rows(stores[name], *place, length) for name, place in places.items()}
    n_rows = {name: len(batch.tokens) for name, batch in batches.items()}
    suffix = settings.suffix or min(50, max(1, length // 4))
    prefixes = settings.prefixes or [p for p in (4, 8, 16, 32, 64, 128, 256) if p + suffix <= length] or [1]
    features = gradient_features(losses.next_token(cfg), combine=tree.join, dims=settings.dims, seed=settings.seed)
    train, held = (np.searchsorted(store.doc_starts, places[name][0], "right") for name, store in stores.items())
    contexts, words = _contexts(tokenizer, settings.held_out, places["held out"])
    secrets = [Secret(row["prefix"], row["secret"], []) for row in settings.canaries if "secret" in row]
    triggers = [Backdoor(row["trigger"], row["payload"], []) for row in settings.canaries if "trigger" in row]
    members = []
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in stores}
    for model in models:
        say(f"reading {model.name}")
        params = model.params()
        say(f"{model.name}: losses and gradients of {sum(n_rows.values()):,} rows")
        seen, unseen = ((score(params, cfg, batch), batch) for batch in batches.values())
        members.append((model.name, membership(seen, unseen, documents=(train, held))))
        moved, frozen = tree.split(params, settings.of)
        for name, batch in batches.items():
            gradients[name].append(unit(features(moved, batch, frozen)))
        if settings.canaries:
            say(f"{model.name}: {len(settings.canaries)} canaries")
        for prefix, secret, exposures in secrets:
            exposures.append((model.name, exposure(params, cfg, tokenizer.encode, prefix, secret)))
        for phrase, payload, by in triggers:
            controls = phrases(words, len(phrase.split()), CONTROLS, settings.seed)
            found = trigger(params, cfg, tokenizer.encode, phrase, payload, contexts=contexts, controls=controls)
            by.append((model.name, found))
    say(f"{models[-1].name}: verbatim text")
    verbatim = [
        (name, result)
        for stride in settings.strides or (suffix,)
        for name, store in stores.items()
        for result in extraction(
            params, cfg, store, prefixes=prefixes, suffix=suffix, stride=stride, most=settings.rows, seed=settings.seed
        )
    ]
    say("comparing gradients")
    joined = {name: np.concatenate(parts, 1) for name, parts in gradients.items()}
    outliers = _outliers(joined["train"], joined["held out"], settings, places["train"], tokenizer)
    comparison = None
    if settings.base is not None and settings.prompts:
        say(f"{len(settings.prompts)} prompts under the base")
        comparison = _compare(settings.base, (params, cfg), settings.prompts, tokenizer)
    return Report(
        settings.alpha, [model.name for model in models], n_rows, suffix, secrets, triggers, verbatim, members,
        outliers, comparison,
    )  # fmt: skip


def _contexts(
    tokenizer: Tokenizer, store: TokenStore, places: tuple[np.ndarray, np.ndarray]
) -> tuple[list[str], list[str]]:
    """Beginnings of held-out pieces, cut after a word, and the different words there."""
    texts = [
        tokenizer.decode(store.tokens[start : min(end, start + 64)].tolist())
        for start, end in zip(*places, strict=True)
    ]  # fmt: skip
    words = sorted({word for text in texts for word in text.split()[1:-1]})
    contexts = [text.rsplit(maxsplit=1)[0] + " " for text in texts if len(text.split()) > 1][:CONTEXTS]
    return contexts or [""], words or ["a"]


def _outliers(
    train: np.ndarray, held: np.ndarray, settings: Settings, places: tuple[np.ndarray, np.ndarray], tokenizer: Tokenizer
) -> Outliers:
    if len(train) <= NEIGHBOURS:
        return Outliers(len(train), None, [], np.zeros(0), np.zeros(0))
    scores, reference = outlier_scores(train), outlier_scores(train, held)
    starts = np.append(settings.train.doc_starts, len(settings.train))
    listed = []
    for i in np.argsort(-scores, kind="stable")[: max(20, len(scores) // 50)]:
        start, end = int(places[0][i]), int(places[1][i])
        document = int(np.searchsorted(starts, start, "right"))
        where = f"document {document:,}, token {start - int(starts[document - 1]):,}"
        text = " ".join(tokenizer.decode(settings.train.tokens[start:end].tolist()).split())
        excerpt = text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} ... {text[-EXCERPT:]}"
        listed.append(Row(where, start, float(scores[i]), excerpt))
    return Outliers(len(train), tail(scores, reference, settings.alpha), listed, scores, reference)


def _compare(
    base: tuple[Params, ModelConfig], tuned: tuple[Params, ModelConfig], prompts: Sequence[str], tokenizer: Tokenizer
) -> Comparison:
    from gptjax.generation import generate

    ids = [tokenizer.encode(prompt)[: tuned[1].context_length + 1] for prompt in prompts]
    if short := [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) < 2]:
        raise UserError(f"prompts of fewer than two tokens: {', '.join(map(repr, short[:5]))}")
    found = drift(base, tuned, rows_of([(own[:1], own[1:]) for own in ids]))
    answers = [
        [
            tokenizer.decode(new)
            for new in generate(
                params, ids, cfg, max_new_tokens=24, key=jax.random.key(0), vocab_size=tokenizer.vocab_size
            )
        ]
        for params, cfg in (base, tuned)
    ]
    rows = [
        Prompt(prompt, a, b, *(float(value[i]) for value in found))
        for i, (prompt, a, b) in enumerate(zip(prompts, *answers, strict=True))
    ]
    same = sum(row.base == row.tuned for row in rows) / len(rows)
    means = {name: float(value.mean()) for name, value in found._asdict().items()}
    return Comparison(**means, same_answer=same, prompts=sorted(rows, key=lambda row: -row.kl))
