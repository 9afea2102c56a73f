"""Runs the checks of an audit on the checkpoints of a training run."""

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
from gptjax.research.audit.canaries import backdoor_trigger, exposure, phrases
from gptjax.research.audit.comparison import drift
from gptjax.research.audit.memorisation import extraction, membership
from gptjax.research.audit.outliers import NEIGHBOURS, outlier_scores, tail
from gptjax.research.audit.results import TEXTS, Backdoor, Comparison, Outliers, Prompt, Report, Row, Secret
from gptjax.research.audit.text import chunks, rows, rows_of, score
from gptjax.research.influence import gradient_features, unit
from gptjax.tokenizers import Tokenizer
from gptjax.training.resume import result_of
from gptjax.training.run_dir import RunDir
from gptjax.types import Params

# CONTROLS is the number of random control phrases that each trigger is compared with. The trigger and every control
# phrase are appended to each of at most CONTEXTS held-out texts.
CONTROLS, CONTEXTS = 199, 4
EXCERPT = 80  # The audit report shows EXCERPT characters from each end of a row's text.


class Checkpoint(NamedTuple):
    """A model that a training run saved at one step.

    Attributes:
        name: name of the model in the report.
        params: function that reads the parameters from disk.
    """

    name: str
    params: Callable[[], Params]


def checkpoints(run_dir: str | Path) -> tuple[list[Checkpoint], Config | None, list[str]]:
    """Lists the saved models of a training run, in the order of their training steps.

    If `run_dir` contains a model but is not the directory of a training run, the returned list has one entry and the
    returned config is None.

    Returns:
        (checkpoints, the run's config, notes on checkpoints that were left out and why).
    """
    run = RunDir(run_dir)
    if not run.config.is_file():
        return [Checkpoint("model", lambda: weights.load(run_dir)[0])], None, []
    cfg = config.from_yaml(read_text(run.config, "config"), str(run.config))
    models, notes, last = [], [], None
    if (run.final / "result.json").is_file():
        last, _ = use_json(run.final / "result.json", result_of)
    saved = Checkpoints(run.checkpoints)
    why = ""  # The reason why checkpoints cannot be audited, or an empty string if checkpoints can be audited.
    if cfg.task != "pretrain" and cfg.finetune.trainable != "all":
        if cfg.finetune.trainable != "lora":
            why = f"finetune.trainable={cfg.finetune.trainable} saves only a part of the weights"
        elif cfg.lora.init != "lora" or cfg.finetune.quantize != "none":
            why = "its adapter belongs to a base that was changed (lora.init) or quantised"
    for step in saved.steps():
        if step == last:
            continue
        if why:
            notes.append(f"the checkpoint of step {step} was left out: {why}")
        else:
            models.append(Checkpoint(f"step {step:,}", partial(_merged_params, saved, step, cfg)))
    if last is not None:
        models.append(Checkpoint(f"step {last:,}, the last", lambda: weights.load(run.final)[0]))
    # A run without checkpoints has one model, in the folder final/ or best/ of the run. `weights.load` raises an error
    # if both folders, final/ and best/, are missing.
    if not models:
        models.append(Checkpoint("model", lambda: weights.load(run_dir)[0]))
    return models, cfg, notes


def _merged_params(saved: Checkpoints, step: int, cfg: Config) -> Params:
    """Reads the params of a checkpoint. An adapter in the checkpoint is merged into its base model."""
    params = saved.read(step).get("params")
    if not isinstance(params, dict):
        raise UserError(f"{saved.folder / str(step)} holds no parameters")
    if "adapter" not in params:
        return params
    base = weights.load(cfg.finetune.base)[0]
    return lora.merge(base, params["adapter"], cfg.lora)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an audit.

    Attributes:
        train: token store of the training text.
        held_out: token store of text from the same distribution that the model was not trained on.
        canaries: dicts with the keys "prefix" and "secret", or "trigger" and "payload", as in `read_canaries`.
        base: (params, cfg) of the base model, with which `drift` compares the last model.
        prompts: prompts on which `drift` compares the base model and the last model.
        rows: maximum number of rows, and of suffixes to extract, from each token store.
        of: pattern of the parameters whose gradients are compared by the outlier check.
        dims: size of the gradient sketches.
        prefixes, suffix, strides: arguments of `extraction`, in tokens, or None for values that fit the context length.
        alpha: false alarm rate per check.
        seed: seed of all random draws.
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
    models: Sequence[Checkpoint],
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs every check of an audit whose inputs are given in `settings`, and returns the report.

    `audit.report.page` renders the report as HTML, and `audit.results.to_json` converts the report to the contents of
    audit.json. Every audited model is read from disk only once. For the outlier check, the gradient features of all
    audited models are concatenated.

    Args:
        say: function that receives progress messages.

    Raises:
        UserError: the text is too short, or the prefixes, suffixes or canaries do not fit into the context.
    """
    length = min(cfg.context_length, 512)
    stores = dict(zip(TEXTS, (settings.train, settings.held_out), strict=True))
    spans = {name: chunks(store, length, most=settings.rows, seed=settings.seed) for name, store in stores.items()}
    batches = {name: rows(stores[name], *span, length) for name, span in spans.items()}
    n_rows = {name: len(batch.tokens) for name, batch in batches.items()}
    suffix = settings.suffix or min(50, max(1, length // 4))
    prefixes = settings.prefixes or [p for p in (4, 8, 16, 32, 64, 128, 256) if p + suffix <= length] or [1]
    features = gradient_features(losses.next_token(cfg), combine=tree.join, dims=settings.dims, seed=settings.seed)
    train, held = (np.searchsorted(store.doc_starts, spans[name][0], "right") for name, store in stores.items())
    contexts, words = _contexts(tokenizer, settings.held_out, spans["held out"])
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
        selected, frozen = tree.split(params, settings.of)
        for name, batch in batches.items():
            gradients[name].append(unit(features(selected, batch, frozen)))
        if settings.canaries:
            say(f"{model.name}: {len(settings.canaries)} canaries")
        for prefix, secret, exposures in secrets:
            exposures.append((model.name, exposure(params, cfg, tokenizer.encode, prefix, secret)))
        for phrase, payload, effects in triggers:
            controls = phrases(words, len(phrase.split()), CONTROLS, settings.seed)
            effect = backdoor_trigger(
                params, cfg, tokenizer.encode, phrase, payload, contexts=contexts, controls=controls
            )
            effects.append((model.name, effect))
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
    joined = {name: np.concatenate(blocks, 1) for name, blocks in gradients.items()}
    outliers = _outliers(joined["train"], joined["held out"], settings, spans["train"], tokenizer)
    comparison = None
    if settings.base is not None and settings.prompts:
        say(f"{len(settings.prompts)} prompts under the base")
        comparison = _compare(settings.base, (params, cfg), settings.prompts, tokenizer)
    return Report(
        settings.alpha, [model.name for model in models], n_rows, suffix, secrets, triggers, verbatim, members,
        outliers, comparison,
    )  # fmt: skip


def _contexts(
    tokenizer: Tokenizer, store: TokenStore, spans: tuple[np.ndarray, np.ndarray]
) -> tuple[list[str], list[str]]:
    """Returns contexts and words from held-out text, for the test of backdoor triggers.

    The contexts are the beginnings of up to `CONTEXTS` held-out chunks, each cut at a word boundary. The list of words
    contains the distinct words in the beginnings of all held-out chunks. The first and the last word of each chunk's
    beginning are left out of the list of words, because these words may be incomplete.
    """
    texts = [
        tokenizer.decode(store.tokens[start : min(end, start + 64)].tolist())
        for start, end in zip(*spans, strict=True)
    ]  # fmt: skip
    words = sorted({word for text in texts for word in text.split()[1:-1]})
    contexts = [text.rsplit(maxsplit=1)[0] + " " for text in texts if len(text.split()) > 1][:CONTEXTS]
    return contexts or [""], words or ["a"]


def _outliers(
    train: np.ndarray, held: np.ndarray, settings: Settings, spans: tuple[np.ndarray, np.ndarray], tokenizer: Tokenizer
) -> Outliers:
    if len(train) <= NEIGHBOURS:
        return Outliers(len(train), None, [], np.zeros(0), np.zeros(0))
    scores, reference = outlier_scores(train), outlier_scores(train, held)
    starts = np.append(settings.train.doc_starts, len(settings.train))
    top_rows = []
    for i in np.argsort(-scores, kind="stable")[: max(20, len(scores) // 50)]:
        start, end = int(spans[0][i]), int(spans[1][i])
        document = int(np.searchsorted(starts, start, "right"))
        location = f"document {document:,}, token {start - int(starts[document - 1]):,}"
        text = " ".join(tokenizer.decode(settings.train.tokens[start:end].tolist()).split())
        excerpt = text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} ... {text[-EXCERPT:]}"
        top_rows.append(Row(location, start, float(scores[i]), excerpt))
    return Outliers(len(train), tail(scores, reference, settings.alpha), top_rows, scores, reference)


def _compare(
    base: tuple[Params, ModelConfig], tuned: tuple[Params, ModelConfig], prompts: Sequence[str], tokenizer: Tokenizer
) -> Comparison:
    from gptjax.generation import generate

    ids = [tokenizer.encode(prompt)[: tuned[1].context_length + 1] for prompt in prompts]
    if short := [prompt for prompt, prompt_ids in zip(prompts, ids, strict=True) if len(prompt_ids) < 2]:
        raise UserError(f"prompts of fewer than two tokens: {', '.join(map(repr, short[:5]))}")
    changes = drift(base, tuned, rows_of([(prompt_ids[:1], prompt_ids[1:]) for prompt_ids in ids]))
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
        Prompt(prompt, a, b, *(float(value[i]) for value in changes))
        for i, (prompt, a, b) in enumerate(zip(prompts, *answers, strict=True))
    ]
    same_answer = sum(row.base == row.tuned for row in rows) / len(rows)
    means = {name: float(value.mean()) for name, value in changes._asdict().items()}
    return Comparison(**means, same_answer=same_answer, prompts=sorted(rows, key=lambda row: -row.kl))
