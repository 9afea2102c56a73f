"""Knowledge distillation: a student learns the next-token probabilities of a larger model, the teacher.

By default, the forward pass of the teacher runs in every training step. If distill.top_k is set, the teacher runs once
before training, and the log-probabilities of its most probable tokens are written to a file in the cache, from which
training reads them:

    teachers/KEY.npy     one record per token in the loss: ids [K] int32, log_probs [K + 1] float32

In the file name KEY.npy, KEY is a hash of the teacher's weights, the data and the settings on which the
log-probabilities depend.

If distill.on_policy is set, some batches consist of answers that the student has just generated from the prompts of the
conversations (GKD, arXiv:2306.13649). A random number that depends on the seed and the step determines whether the
batch of a step consists of the student's answers or of conversations from the data. Every batch has one conversation
per row. If all prompts leave room for an answer, the student answers, in an on-policy step, the prompts of the same
conversations on which the step would train without distill.on_policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import assets, losses, tree, weights
from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.data import conversations, loader, packing, rollouts, sources
from gptjax.data.conversations import Conversation
from gptjax.data.packing import Encoded, Rows
from gptjax.data.rollouts import Question
from gptjax.data.split import Splits, split_records
from gptjax.errors import UserError, complaints
from gptjax.files import json_sha256, replacing, use_json, write_json
from gptjax.generation.decode import bucket
from gptjax.losses.distill import TeacherBatch, teacher_log_probs
from gptjax.model.gpt import abstract_params, for_decoding, refuse_classifier
from gptjax.tasks import on_policy, tuning
from gptjax.tasks.instruct import skills
from gptjax.tasks.trainable import Trainable
from gptjax.tokenizers import Tokenizer, begin_id
from gptjax.training.flops import flops_per_token
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.step import evaluate as mean_over
from gptjax.training.task import Loss, Ready, Rollouts, RolloutSource, resolve
from gptjax.types import Batch, Params

__all__ = ["evaluate", "loss", "plan", "prepare", "refuse_missing", "student"]
RESULTS = "test.json"
VERSION = 1  # The version of the file format in which the teacher's log-probabilities are cached.
# Two tokenizers are compared by encoding a text that consists of the texts of at most PROBE token ids.
PROBE = 4000
BECAUSE = " (distill.context_length, or less if the context of student or teacher is shorter)"


class Data(NamedTuple):
    """The student, the teacher and the data of a distillation run. `Data` holds no tensors of the two models.

    Attributes:
        base: base model of the student.
        teacher: the teacher.
        model: model config of the student.
        teacher_cfg: model config of the teacher.
        vocab_size: number of logits that both models have.
        tokenizer: tokenizer of the teacher, with the chat template of distill.style.
        rows: the rows to train, validate and test on.
        questions: the prompts that the student answers if distill.on_policy is set.
        lines: lines of text that describe the data.
    """

    base: weights.Model
    teacher: weights.Model
    model: ModelConfig
    teacher_cfg: ModelConfig
    vocab_size: int
    tokenizer: Tokenizer
    rows: list[Rows]
    questions: list[Question]
    lines: list[str]


def refuse_missing(cfg: Config) -> None:
    """Checks that the student, the teacher and the data exist, without reading the data or downloading anything.

    Raises:
        UserError: a model or the data file is missing, a model is a classifier, or the data are plain text although
            distill.on_policy is set; the message lists all problems.
    """
    problems, name = complaints(tuning.refuse_missing, cfg), cfg.distill.teacher or ""
    if cfg.distill.on_policy and _is_text(cfg.distill.source):
        problems.append(
            f"distill.on_policy={cfg.distill.on_policy:g} needs conversations, whose prompts the student answers, but "
            f"distill.source={cfg.distill.source} is plain text: give conversations, or set distill.on_policy=0"
        )
    if not name.startswith("hf:") and name not in assets.ASSETS:
        problems += [problem if not name else f"distill.teacher: {problem}" for problem in complaints(_teacher, cfg)]
    if problems:
        raise UserError.all(problems)


def _teacher(cfg: Config) -> weights.Model:
    """Opens the teacher model without reading its tensors.

    Raises:
        UserError: distill.teacher is not set, or the teacher does not exist or is a classifier.
    """
    if not cfg.distill.teacher:
        raise UserError(
            "distill.teacher is missing: name the model to learn from, such as distill.teacher=runs/instruct; the "
            "student is finetune.base"
        )
    teacher = weights.open_model(cfg.distill.teacher)
    refuse_classifier(teacher.cfg, cfg.distill.teacher, "gptjax.losses.distill_classes distils a classifier")
    return teacher


def teacher_config(cfg: Config) -> ModelConfig:
    """Returns the teacher's model config, with the dtype and the other compute settings of the student's config."""
    return _teacher(cfg).cfg.computed_as(cfg.model)


def _refuse_other_tokenizer(cfg: Config, student: Tokenizer, teacher: Tokenizer) -> None:
    """Checks that the tokenizers of the student and the teacher have the same ids for the same text.

    For every token id, the texts of the id in the two tokenizers are compared. A text that consists of the texts of at
    most `PROBE` token ids is encoded with both tokenizers, and the resulting ids are compared. The names and the chat
    templates of the tokenizers may differ.

    Raises:
        UserError: the tokenizers differ.
    """
    if student == teacher:
        return
    names = f"the tokenizers of the student {cfg.finetune.base} and of the teacher {cfg.distill.teacher}"
    advice = (
        "; distillation needs the same ids for both: choose models of one family, or make a student with "
        f"gptjax pretrain tokenizer.name={cfg.distill.teacher}"
    )
    if student.vocab_size != teacher.vocab_size:
        raise UserError(f"{names} differ: {student.vocab_size:,} and {teacher.vocab_size:,} ids{advice}")
    texts, others = ([t.decode([i]) for i in range(t.vocab_size)] for t in (student, teacher))
    for i, (text, other) in enumerate(zip(texts, others, strict=True)):
        if text != other:
            raise UserError(f"{names} differ: id {i} is {text!r:.40} and {other!r:.40}{advice}")
    probe = "".join(text for text in texts[:: -(-len(texts) // PROBE)] if "\ufffd" not in text)
    if student.encode(probe, disallowed_special=()) != teacher.encode(probe, disallowed_special=()):
        raise UserError(f"{names} differ: they split text differently{advice}")


# ---------------------------------------------------------------- data


def _data(cfg: Config) -> Data:
    settings, notes = cfg.distill, list[str]()
    base, teacher = tuning.base_model(cfg), _teacher(cfg)
    model, teacher_cfg = (opened.cfg.computed_as(cfg.model) for opened in (base, teacher))
    _refuse_other_tokenizer(cfg, base.tokenizer(), teacher.tokenizer())
    vocab_size = min(model.vocab_size, teacher_cfg.vocab_size)
    if settings.top_k and settings.top_k > vocab_size:
        raise UserError(f"distill.top_k ({settings.top_k}) must be at most {vocab_size}, the size of the vocabulary")
    tokenizer, style_lines = tuning.styled(teacher, settings.style)
    width = min(settings.context_length, model.context_length, teacher_cfg.context_length)
    questions, unanswered = list[Question](), 0
    if _is_text(settings.source):
        examples = _texts(cfg, tokenizer, width)
    else:
        talks = split_records(settings, cfg.seed, conversations.read, skills, notes)
        examples = _encoded(cfg, talks, tokenizer, width)
        if settings.on_policy:
            questions, unanswered = on_policy.questions(cfg, talks.train, tokenizer, width, BECAUSE)
    layout, length = ("padded", None) if settings.on_policy else (settings.packing, width)
    rows = [getattr(packing, layout)(subset, length) for subset in examples]
    counts = " + ".join(f"{len(subset.rows):,}" for subset in examples)
    train = rows[0]
    n, width = train.tokens.shape
    dropped = sum(subset.dropped for subset in examples)
    lines = [
        f"data    {settings.source or 'synthetic skills'}: {counts} examples to train, validate and test on",
        f"        {n:,} rows of {width} tokens, {(train.segment_ids > 0).mean():.0%} full"
        + (f"; {dropped} conversations that do not fit a row were dropped" if dropped else ""),
        *(f"        {note}" for note in notes),
        *style_lines,
    ]
    if settings.on_policy:
        lines.append(
            f"answers {settings.on_policy:.0%} of the batches: the student's to {len(questions):,} prompts, up to "
            f"{settings.max_new_tokens} tokens" + (f"; {unanswered} prompts leave no room" if unanswered else "")
        )
    return Data(base, teacher, model, teacher_cfg, vocab_size, tokenizer, rows, questions, lines)


def _is_text(source: str | None) -> bool:
    """Returns whether the data source is plain text instead of conversations."""
    path = Path(source or "").expanduser()
    return bool(source) and (path.suffix.lower() in (".txt", ".md") or path.is_dir())


def _texts(cfg: Config, tokenizer: Tokenizer, width: int) -> list[Encoded]:
    """Reads documents of plain text, and splits them into examples of at most width + 1 token ids.

    The loss is computed on all targets of an example. The first token of an example is the last token of the preceding
    example, so that every token of a document except the first token is a target.
    """
    ends = [tokenizer.eot_id] if tokenizer.eot_id is not None else []
    begins = [first] if (first := begin_id(tokenizer)) is not None else []

    def read(source: str, notes: list[str] | None) -> list[np.ndarray]:
        pieces: list[np.ndarray] = []
        for document in sources.documents(DataConfig(source=(source,))):
            ids = np.array([*begins, *tokenizer.encode(document.text, disallowed_special=()), *ends], np.int32)
            pieces += [ids[start : start + width + 1] for start in range(0, len(ids) - 1, width)]
        return pieces

    def encoded(pieces: list[np.ndarray]) -> Encoded:
        return Encoded(pieces, [np.ones(len(ids), np.float32) for ids in pieces], 0)

    return [encoded(subset) for subset in split_records(cfg.distill, cfg.seed, read, lambda *_, **__: [])]


def _encoded(cfg: Config, talks: Splits[Conversation], tokenizer: Tokenizer, width: int) -> list[Encoded]:
    """Encodes conversations as training examples, each a plain token sequence instead of a token tree.

    If the chat template renders earlier turns of a conversation differently after later turns, the conversation is
    encoded as one example per answer.
    """
    return [
        conversations.encode(
            subset, tokenizer, context_length=width, loss_on=cfg.distill.loss_on, trees=False, because=BECAUSE
        )
        for subset in talks
    ]


# ---------------------------------------------------------------- the task


def prepare(cfg: Config, progress: Progress) -> Ready:
    with progress.phase("preparing the data"):
        data = _data(cfg)
    (train, val, test), size, settings = data.rows, cfg.train.batch_size, cfg.distill
    resolved = resolve(cfg, data.model, len(train.tokens), size)
    trainable, fingerprint = tuning.load_base(resolved, data.base, {}, jax.random.key(cfg.seed), progress)
    with progress.phase("loading the teacher"):
        teacher = data.teacher.params(data.teacher_cfg.dtype, None)
    teacher_hash, data_hash = weights.fingerprint(teacher), loader.fingerprint(*train, *val)
    flops = 0.0
    if settings.top_k is None:
        trainable = with_teacher(trainable, teacher)
        width = train.tokens.shape[1]
        flops = flops_per_token(data.teacher_cfg, abstract_params(data.teacher_cfg), width=width) / 3  # forward only
        lines = [f"teacher {settings.teacher}, in every step"]

        def batch(step: int) -> Batch | TeacherBatch:
            return packing.batch(train, step, batch_size=size, seed=cfg.seed)

        def eval_batches() -> Iterator[Batch | TeacherBatch]:
            return packing.eval_batches(val, size)
    else:
        records, path = _cached(resolved, data, teacher, [teacher_hash, data_hash], progress)
        places = np.split(_places(train, val), [len(train.tokens)])
        lines = [f"teacher {settings.teacher}: top {settings.top_k} of {len(records):,} tokens, in {path}"]

        def batch(step: int) -> Batch | TeacherBatch:
            index = loader.epoch_rows(step, size, len(train.tokens), cfg.seed)
            plain = packing.batch(train, step, batch_size=size, seed=cfg.seed)
            return _with_records(plain, records[places[0][index]])

        def eval_batches() -> Iterator[Batch | TeacherBatch]:
            for i, plain in enumerate(packing.eval_batches(val, size)):
                index = np.minimum(np.arange(i * size, (i + 1) * size), len(val.tokens) - 1)  # Padding has weight 0.
                yield _with_records(plain, records[places[1][index]])

    source = None
    if settings.on_policy:
        source = RolloutSource(_roller(resolved, data.tokenizer, train, data.questions, trainable.combine))
    task = tuning.make_task(
        resolved,
        trainable,
        fingerprint=fingerprint,
        tokenizer=data.tokenizer,
        loss=lambda cfg: _loss(cfg, data.teacher_cfg),
        batch=batch,
        eval_batches=eval_batches,
        width=train.tokens.shape[1],
        data=data_hash,
        lines=[*data.lines, *lines],
        describe_batch=lambda step: f"see the rows of step {step + 1} in rollouts.jsonl" if is_own(cfg, step) else None,
        rollouts=source,
    )
    fingerprints = task.fingerprints | {"teacher": (teacher_hash, f"distill.teacher={settings.teacher}")}
    return Ready(resolved, task._replace(fingerprints=fingerprints, flops_per_token=task.flops_per_token + flops), test)


def is_own(cfg: Config, step: int) -> bool:
    """Returns whether the batch of a training step consists of the student's answers.

    The function `is_own` returns True with probability distill.on_policy, and depends only on the seed and the step.
    """
    return np.random.default_rng((cfg.seed, step)).random() < cfg.distill.on_policy


def _roller(
    cfg: Config, tokenizer: Tokenizer, train: Rows, questions: Sequence[Question], combine: Callable[..., Params]
) -> Callable[[Params, Params, int, int], Rollouts]:
    """Returns the function that makes the batch of a training step, for use as `RolloutSource.make`."""
    settings, model, size = cfg.distill, cfg.model, cfg.train.batch_size
    longest = max(len(question.ids) for question in questions) + settings.max_new_tokens

    def given(step: int) -> Rollouts:
        """Returns the batch of a step from the data, without the columns that are padding in all rows of the batch."""
        batch = packing.batch(train, step, batch_size=size, seed=cfg.seed)
        length = bucket(int((batch.segment_ids > 0).sum(1).max()))
        return Rollouts(jax.tree.map(lambda leaf: leaf[None, :, :length], batch), {}, [])

    def roll(trained: Params, frozen: Params, step: int, k: int) -> Rollouts:
        assert k == 1  # With on-policy distillation, `Config.steps_per_rollout` is 1.
        if not is_own(cfg, step):
            return given(step)
        began = time.monotonic()
        asked = [questions[i] for i in rollouts.draw(len(questions), step, size, cfg.seed)]
        answers = on_policy.sample_answers(
            for_decoding(student(combine(trained, frozen)), model), asked, model, tokenizer,
            max_new_tokens=settings.max_new_tokens, at=settings.sampling_temperature,
            key=jax.random.fold_in(jax.random.key(cfg.seed), step),
        )  # fmt: skip
        made = [on_policy.rollout(question, answer) for question, answer in zip(asked, answers, strict=True)]
        batch = on_policy.to_batch(made, np.zeros(size), longest)
        rows = [
            on_policy.row(question, tokenizer.decode(answer.tokens), answer)
            for question, answer in zip(asked, answers, strict=True)
        ]
        metrics = on_policy.measures(answers) | {"seconds": time.monotonic() - began}
        return Rollouts(jax.tree.map(lambda leaf: leaf[None], batch), metrics, rows)

    return roll


def with_teacher(trainable: Trainable, teacher: Params) -> Trainable:
    """Adds the teacher's params to the `Trainable` of the student.

    The loss reads the teacher's params at params["teacher"]. The teacher's params are frozen, and are not saved.
    """
    # A closure over `trainable` would keep the initial weights in memory after training has replaced these weights.
    combine, merge, export = trainable.combine, trainable.merge, trainable.export

    def with_params(trained: Params, frozen: Params, **options: Any) -> Params:
        return combine(trained, frozen["student"], **options) | {"teacher": frozen["teacher"]}

    return Trainable(
        trainable.params,
        {"student": trainable.frozen, "teacher": teacher},
        with_params,
        lambda trained, frozen: merge(trained, frozen["student"]),
        lambda folder, trained, frozen: export(folder, trained, frozen["student"]),
    )


def student(params: Params) -> Params:
    """Returns the student's params, which are the params that the loss reads without the teacher's params."""
    return {name: node for name, node in params.items() if name != "teacher"}


def loss(cfg: Config) -> Loss:
    return _loss(cfg, teacher_config(cfg))


def _loss(cfg: Config, teacher_cfg: ModelConfig) -> Loss:
    settings = cfg.distill
    return losses.distill(
        cfg.model, teacher_cfg, kind=settings.divergence, beta=settings.beta, temperature=settings.temperature,
        alpha=settings.alpha,
    )  # fmt: skip


def batch_shapes(cfg: Config, rows: int, width: int) -> Batch | TeacherBatch:
    ids, counts = (jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (np.int32, np.float32))
    if (k := cfg.distill.top_k) is None:
        return Batch(ids, ids, counts, ids)
    of_k = jax.ShapeDtypeStruct((rows, width, k), np.int32), jax.ShapeDtypeStruct((rows, width, k + 1), np.float32)
    return TeacherBatch(ids, ids, counts, ids, *of_k)


def plan(cfg: Config) -> list[str]:
    """Returns the lines of text that --dry-run prints to summarise a training run."""
    data, size = _data(cfg), cfg.train.batch_size
    n = len(data.rows[0].tokens)
    return [
        *(f"{line[:8]:19}{line[8:]}" for line in data.lines),
        tuning.plan(cfg, data.base, data.model),
        f"teacher            {data.teacher.location}: {tree.size(abstract_params(data.teacher_cfg)):,} parameters",
        f"steps              {cfg.train.steps(n, size):,} of {size} rows, {n:,} rows per epoch",
    ]


# ---------------------------------------------------------------- teacher log-probabilities


def _places(*subsets: Rows) -> np.ndarray:
    """Returns the index of each token's record in the cache file, [n, T].

    The records of the cache file are in the order of the tokens in the loss. A token that is not in the loss has no
    record in the cache file, so the index returned for the token is arbitrary.
    """
    in_loss = np.concatenate([rows.weights for rows in subsets]) != 0
    return np.maximum(np.cumsum(in_loss).reshape(in_loss.shape) - 1, 0)


def _with_records(batch: Batch, records: np.ndarray) -> TeacherBatch:
    tokens = batch.tokens, batch.targets, batch.weights, batch.segment_ids
    return TeacherBatch(*tokens, records["ids"], records["log_probs"])


def _cached(cfg: Config, data: Data, teacher: Params, hashes: list[str], progress: Progress) -> tuple[np.ndarray, Path]:
    """Returns the teacher's log-probabilities for the training and validation tokens, and the path of the cache file.

    The log-probabilities are a memory map of the cache file, with one record per token in the loss. If the cache file
    does not exist or is damaged, the log-probabilities are computed and written to the cache file.

    Args:
        hashes: hashes of the teacher's weights and of the data.
    """
    k, subsets, teacher_cfg = cfg.distill.top_k or 0, data.rows[:2], data.teacher_cfg
    options = {"top_k": k, "temperature": cfg.distill.temperature, "vocab_size": data.vocab_size}
    key = json_sha256([VERSION, *hashes, options, teacher_cfg.dtype, teacher_cfg.precision])
    path = assets.cache_dir() / "teachers" / f"{key}.npy"
    n_outcomes = k if k == data.vocab_size else k + 1
    kind = np.dtype([("ids", "<i4", (k,)), ("log_probs", "<f4", (n_outcomes,))])
    n = sum(int((rows.weights != 0).sum()) for rows in subsets)
    if (records := _opened(path, kind, n)) is not None:
        return records, path
    run = jax.jit(lambda params, batch: teacher_log_probs(params, batch, teacher_cfg, **options))
    done = [0]
    path.parent.mkdir(parents=True, exist_ok=True)
    said = progress.phase(lambda: f"computing the teacher's probabilities: {done[0]:,} of {n:,} tokens")
    with said, replacing(path, shared=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in subsets:
            for batch in packing.eval_batches(rows, cfg.train.batch_size):
                in_loss = batch.weights != 0
                new = np.empty(in_loss.sum(), kind)
                new["ids"], new["log_probs"] = (np.asarray(out)[in_loss] for out in run(teacher, batch))
                file.write(new.tobytes())
                done[0] += len(new)
    return np.load(path, mmap_mode="r"), path


def _opened(path: Path, kind: np.dtype, n: int) -> np.ndarray | None:
    try:
        records = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return records if records.dtype == kind and records.shape == (n,) else None


# ---------------------------------------------------------------- the test data


def evaluate(result: TrainResult, test: Rows | None, say: Callable[[str], None]) -> None:
    """Evaluates the student on the held-out tokens, and writes the scores to test.json.

    The scores of distillation are the student's loss, the teacher's loss, the divergence between the predictions of
    both models, and the fraction of tokens for which both models have the same most probable token. The divergence is
    computed from the teacher's probabilities of all tokens, even if distill.top_k is set. If test.json exists already,
    the scores are not computed again, and a summary of the scores in test.json is printed.

    Args:
        test: the test rows. None: the test rows are read again.
    """
    file = Path(result.run_dir) / RESULTS
    if not file.exists():
        write_json(file, _scores(result, test or _data(result.cfg).rows[2]))
    say(use_json(file, summary))


def _scores(result: TrainResult, test: Rows) -> dict[str, Any]:
    cfg, teacher_cfg = result.cfg, teacher_config(result.cfg)
    params, _ = weights.load(Path(result.run_dir) / "final")  # An adapter is merged into the loaded weights.
    teacher = _teacher(cfg).params(teacher_cfg.dtype, None)

    def mean_of(loss: Loss, params: Params) -> Any:
        return mean_over(jax.jit(loss), params, packing.eval_batches(test, cfg.train.batch_size))

    _, metrics = mean_of(_loss(cfg, teacher_cfg), params | {"teacher": teacher})
    own, _ = mean_of(losses.next_token(teacher_cfg), teacher)
    means = {name: mean.value() for name, mean in metrics.items()}
    return {
        "tokens": int((test.weights != 0).sum()), "loss": means["cross_entropy"], "teacher_loss": own.value(),
        "divergence": means["divergence"], "agreement": means["agreement"],
    }  # fmt: skip


def summary(scores: dict[str, Any]) -> str:
    return (
        f"test    {scores['tokens']} held-out tokens: loss {scores['loss']:.4f}, that of the teacher "
        f"{scores['teacher_loss']:.4f}; divergence {scores['divergence']:.4f}, the same most probable token in "
        f"{scores['agreement']:.1%}"
    )
