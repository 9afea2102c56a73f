"""Reward tuning (GRPO and similar losses): trains a model to give answers with higher rewards.

In reward tuning, the model generates answers to questions in each step, and reward functions score the answers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import losses, weights
from gptjax.config import Config, ModelConfig
from gptjax.data import loader, rollouts
from gptjax.data.conversations import Conversation, read
from gptjax.data.rollouts import Question
from gptjax.data.split import Splits, split_records
from gptjax.data.synthetic import skills
from gptjax.errors import UserError
from gptjax.evaluation import rewards
from gptjax.evaluation.generation_metrics import scores
from gptjax.evaluation.intervals import t_interval
from gptjax.evaluation.workers import Scorer, Scores
from gptjax.files import use_json, write_json, write_text
from gptjax.generation.decode import Completion, bucket, generate
from gptjax.losses.policy import Kind
from gptjax.model.gpt import for_decoding
from gptjax.ops import device
from gptjax.tasks import instruct, on_policy, tuning
from gptjax.tokenizers import Tokenizer
from gptjax.training.progress import Progress
from gptjax.training.run import TrainResult
from gptjax.training.run_dir import read_metrics
from gptjax.training.task import Loss, Ready, Rollouts, RolloutSource, resolve
from gptjax.types import Mean, Metrics, Params, RolloutBatch

RESPONSES, BEFORE, RESULTS = instruct.RESPONSES, instruct.BEFORE, instruct.RESULTS
__all__ = ["batch_shapes", "evaluate", "loss", "plan", "prepare", "refuse_missing"]
# To detect a collapse of training, the mean rewards of SMOOTHED successive rollouts are averaged.
SMOOTHED = 5


# --- the data


def refuse_missing(cfg: Config) -> None:
    """Checks that the base model, the data and the reward functions exist, without downloading anything.

    Raises:
        UserError: the base model, the data or a reward function is missing.
    """
    tuning.refuse_missing(cfg)
    rewards.parse(cfg.reward.functions)


def conversations(cfg: Config, notes: list[str] | None = None) -> Splits[Conversation]:
    """Reads the conversations of the data source, and splits them into training, validation and test conversations.

    Args:
        notes: a list to which a line of text is appended that names the ignored keys of the records, as in
            `instruct.conversations`.
    """
    splits = split_records(cfg.reward, cfg.seed, read, skills, notes)
    examples = ((talk.where, instruct.row_of(talk, "")) for talks in splits for talk in talks)
    rewards.check_rows(cfg.reward.functions, examples)
    return splits


def _questions(
    cfg: Config, model: ModelConfig, talks: Sequence[Conversation], tokenizer: Tokenizer
) -> tuple[list[Question], int]:
    """Selects the questions that leave room for an answer in a row of the batch.

    Returns:
        (the selected questions, number of questions that were dropped because they are too long).
    """
    width, because = tuning.longest_row(cfg, model), tuning.why_so_long(cfg, model)
    return on_policy.questions(cfg, talks, tokenizer, width, because)


def row_length(cfg: Config, kept: Sequence[Question], trees: bool) -> int:
    """Returns the maximum number of tokens per row, for the longest prompt and the longest possible answers."""
    answers = cfg.reward.group if trees else 1
    return max(len(question.ids) for question in kept) + answers * cfg.reward.max_new_tokens


def token_trees(cfg: Config, model: ModelConfig, kept: Sequence[Question]) -> bool:
    """Returns whether all answers to a question are one token tree, which holds the prompt once (reward.branches).

    Raises:
        UserError: reward.branches=tree, but the rows would be too long, or other settings do not allow token trees.
    """
    rows, length = cfg.train.batch_size // cfg.reward.group, row_length(cfg, kept, trees=True)
    problems = []
    if model.smear:
        problems.append("a model with smear=true has no token trees")
    if length > model.context_length:
        problems.append(f"a row would have up to {length:,} tokens, and the model reads {model.context_length:,}")
    if rows % cfg.train.accumulation:
        problems.append(f"train.accumulation ({cfg.train.accumulation}) must divide the {rows} questions of a step")
    if cfg.reward.branches == "tree" and problems:
        raise UserError(f"reward.branches=tree: {'; '.join(problems)}; set reward.branches=rows")
    if cfg.reward.branches is None:
        return not problems and device.platform() == "cpu" and jax.device_count() == 1
    return cfg.reward.branches == "tree"


# --- rewards


def scorer(cfg: Config) -> Scorer:
    """Returns a `Scorer` that computes the reward functions of a config in worker processes.

    The worker processes end when this process ends.
    """
    return Scorer(cfg.reward.functions, _shares(cfg), time_limit_s=cfg.reward.time_limit)


def _shares(cfg: Config) -> tuple[float, ...]:
    return cfg.reward.weights or (1.0,) * len(cfg.reward.functions)


def score(scoring: Scorer, talks: Sequence[Conversation], answers: Sequence[str]) -> Scores:
    """Computes the rewards of answers, with one answer to the last question of each conversation.

    Raises:
        UserError: a reward function failed for every answer.
    """
    examples = [instruct.row_of(talk, answer) for talk, answer in zip(talks, answers, strict=True)]
    results = scoring.score([example["prompt"] for example in examples], answers, examples)
    if np.isnan(results.total).all():
        results.check()
        raise UserError(f"reward.functions: one of them failed for each answer; the first: {results.failures[0].text}")
    return results


class Group(NamedTuple):
    """The n answers to one question, with their rewards.

    Attributes:
        question: the question.
        completions: the answers as completions.
        texts: the answers as texts.
        rewards: rewards of the answers, [n]. NaN if a reward function failed.
        parts: dict from the name of each reward function to its values, [n].
    """

    question: Question
    completions: list[Completion]
    texts: list[str]
    rewards: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def varies(self) -> bool:
        known = self.rewards[~np.isnan(self.rewards)]
        return known.size > 0 and bool(np.ptp(known) > 0)


def group_advantages(groups: Sequence[Group], kind: Kind) -> np.ndarray:
    """Returns the advantages of the n answers in each of G groups, [G, n].

    An answer whose reward function failed has advantage 0. A missing reward is replaced by the mean reward of the
    answer's group, which changes the standard deviation of the group's rewards but not their mean.
    """
    values = np.stack([group.rewards for group in groups])
    failed = np.isnan(values)
    means = np.nan_to_num(np.where(failed, 0, values).sum(1) / np.maximum((~failed).sum(1), 1))
    filled = np.where(failed, means[:, None], values)
    return np.where(failed, 0, np.asarray(losses.advantages(jnp.asarray(filled), kind)))


# --- the task


def prepare(cfg: Config, progress: Progress) -> Ready:
    base = tuning.base_model(cfg)
    reward, notes = cfg.reward, list[str]()
    model = base.cfg.computed_as(cfg.model)
    with progress.phase("preparing the data"):
        tokenizer, style_lines = tuning.styled(base, reward.style)
        splits = conversations(cfg, notes)
        (train, dropped), (val, dropped_val) = (
            _questions(cfg, model, talks, tokenizer) for talks in (splits.train, splits.val)
        )
    size, per_step = cfg.train.batch_size, cfg.train.batch_size // reward.group
    resolved = resolve(cfg, model, len(train) * reward.updates, per_step)
    trainable, fingerprint = tuning.load_base(resolved, base, {}, jax.random.key(cfg.seed), progress)
    start = jax.tree.map(jnp.copy, trainable.params) if reward.kl else None
    trees, scoring = token_trees(cfg, model, train), scorer(cfg)
    width = row_length(cfg, train, trees)

    counts = " + ".join(f"{len(talks):,}" for talks in splits)
    lines = [
        f"data    {reward.source or 'synthetic skills'}: {counts} questions to train, validate and test on",
        f"        rows of up to {width} tokens, prompt and {'all answers' if trees else 'answer'}; "
        f"{dropped + dropped_val} questions that do not fit were dropped",
        *(f"        {note}" for note in notes),
        *style_lines,
        f"reward  {' + '.join(_weighted(cfg))}, {reward.loss}: {per_step} questions per step, {reward.group} answers "
        f"to each, {reward.updates} {'step' if reward.updates == 1 else 'steps'} on the same answers",
    ]
    shapes = batch_shapes(cfg, per_step if trees else size, width)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    task = tuning.make_task(
        resolved,
        trainable,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        loss=loss,
        batch=lambda step: empty,
        width=width,
        data=loader.fingerprint(*(np.array(q.ids) for q in (*train, *val))),
        lines=lines,
        describe_batch=lambda step: f"see the rows of step {step + 1} in rollouts.jsonl",
        score=_validation(resolved, tokenizer, val, scoring),
        rollouts=RolloutSource(_roller(resolved, tokenizer, train, trees, scoring, trainable.combine, start), scoring),
    )
    return Ready(resolved, task, splits.test)


def _weighted(cfg: Config) -> list[str]:
    pairs = zip(cfg.reward.functions, _shares(cfg), strict=True)
    return [name if share == 1 else f"{share:g} * {name}" for name, share in pairs]


def loss(cfg: Config) -> Loss:
    reward = cfg.reward
    return losses.policy(
        cfg.model, reward.loss, clip=reward.clip, clip_high=reward.clip_high, kl=reward.kl,
        temperature=reward.temperature, max_new_tokens=reward.max_new_tokens,
    )  # fmt: skip


def batch_shapes(cfg: Config, rows: int, width: int) -> RolloutBatch:
    ids, floats = (jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (np.int32, np.float32))
    advantages = jax.ShapeDtypeStruct((rows,), np.float32)
    return RolloutBatch(ids, ids, floats, ids, ids, floats, floats if cfg.reward.kl else None, advantages)


def _roller(
    cfg: Config,
    tokenizer: Tokenizer,
    train: list[Question],
    trees: bool,
    scoring: Scorer,
    combine: Callable[[Params, Params], Params],
    start: Params | None,
) -> Callable[[Params, Params, int, int], Rollouts]:
    """Returns a function that generates and scores answers, for use as `RolloutSource.make`.

    Args:
        train: the questions to train on.
        trees: whether the answers to a question are one token tree.
        start: the trained params before the first step, which are the reference model of the KL penalty. None: there is
            no KL penalty.
    """
    reward, model = cfg.reward, cfg.model
    n, extra = cfg.train.batch_size // reward.group, reward.resample
    if extra is None:
        extra = 2 if reward.loss == "dapo" else 0
    changes = [f"an optim.lr below {cfg.optim.lr:g}", f"a reward.kl above {reward.kl:g}"]
    if reward.updates > 1:
        changes += [f"fewer than {reward.updates} reward.updates", "a smaller reward.clip"]
    watch = Watch(f"try {' or '.join(changes)}; best/ has the best model so far")
    longest = row_length(cfg, train, trees)

    @jax.jit
    def reference_log_probs(params: Params, batch: RolloutBatch) -> jax.Array:
        log_probs = losses.token_log_probs(params, batch, model, temperature=reward.temperature)
        return losses.of_answers(log_probs, batch).reshape(batch.old.shape)

    def to_batch(groups: Sequence[Group], advantages: np.ndarray) -> RolloutBatch:
        """Returns a batch of the answers to several questions, padded to a common length.

        The common length of the answers is rounded up, so that XLA compiles programs for only a few lengths.
        """
        made = [[on_policy.rollout(group.question, answer) for answer in group.completions] for group in groups]
        if trees:
            merged = [rollouts.group_tree(group) for group in made]
            length = min(bucket(max(len(tree.tokens) for tree, _ in merged)), longest)
            return rollouts.tree_batch(made, merged, advantages, length, reward.max_new_tokens)
        return on_policy.to_batch([rollout for group in made for rollout in group], advantages.reshape(-1), longest)

    def answered(params: Params, number: int, key: jax.Array) -> list[Group]:
        """Draws questions, generates the model's answers, and scores the answers.

        The drawn questions depend on `number` and on the config's seed.
        """
        questions = [train[i] for i in rollouts.draw(len(train), number, n, cfg.seed)]
        completions = on_policy.sample_answers(
            params, questions, model, tokenizer, max_new_tokens=reward.max_new_tokens, at=reward.temperature, key=key,
            n=reward.group,
        )  # fmt: skip
        texts = [tokenizer.decode(completion.tokens) for completion in completions]
        talks = [question.talk for question in questions for _ in range(reward.group)]
        results = score(scoring, talks, texts)
        cuts = [slice(i * reward.group, (i + 1) * reward.group) for i in range(n)]
        return [
            Group(q, completions[cut], texts[cut], results.total[cut], {k: v[cut] for k, v in results.parts.items()})
            for q, cut in zip(questions, cuts, strict=True)
        ]

    def roll(trained: Params, frozen: Params, step: int, k: int) -> Rollouts:
        nonlocal start
        if start is not None:  # On a mesh, the reference model is sharded like the trained params.
            start = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, trained))
        began = time.monotonic()
        params, key = combine(trained, frozen), jax.random.fold_in(jax.random.key(cfg.seed), step)
        decoding, drawn, kept = for_decoding(params, model), list[Group](), list[Group]()
        for attempt in range(extra + 1):
            number = step // reward.updates * (extra + 1) + attempt
            drawn += answered(decoding, number, jax.random.fold_in(key, attempt))
            kept = [group for group in drawn if group.varies][:n]
            if len(kept) == n:
                break
        generated_s = time.monotonic() - began
        flat = [group for group in drawn if not group.varies]
        kept += flat[: n - len(kept)]
        advantages = group_advantages(kept, reward.loss)
        batch = to_batch(kept, advantages)
        if start is not None:
            batch = batch._replace(reference=np.asarray(reference_log_probs(combine(start, frozen), batch)))
        metrics = measures(drawn) | {"seconds": generated_s}
        if not watch.seen:
            watch.resume(read_metrics(cfg.run_folder))
        warnings = watch(step + 1, metrics)
        used = {id(group): advantages[i] for i, group in enumerate(kept)}
        rows = [row for group in drawn for row in _rows(group, used.get(id(group)))]
        return Rollouts(jax.tree.map(lambda leaf: np.stack([leaf] * k), batch), metrics, rows, warnings)

    return roll


def measures(groups: Sequence[Group]) -> dict[str, float]:
    """Computes metrics of the answers to several questions, with one group of answers per question.

    Returns:
        A dict with the metrics of `on_policy.measures` and the following metrics:
            reward: weighted sum of the reward functions, averaged over answers.
            reward_NAME: value of the reward function NAME, averaged over answers, if there are several functions.
            reward_std: standard deviation of the rewards within a group, averaged over groups.
            flat: fraction of groups whose answers all have the same reward, so that their advantages are 0.
            failed: number of answers for which a reward function failed.
    """
    answers = [completion for group in groups for completion in group.completions]
    total = np.concatenate([group.rewards for group in groups])
    parts = {name: np.concatenate([group.parts[name] for group in groups]) for name in groups[0].parts}
    spread = [np.nanstd(group.rewards) for group in groups if not np.isnan(group.rewards).all()]
    return {
        "reward": _mean(total),
        **({f"reward_{name}": _mean(values) for name, values in parts.items()} if len(parts) > 1 else {}),
        "reward_std": _mean(np.array(spread)),
        "flat": sum(not group.varies for group in groups) / len(groups),
        "failed": int(np.isnan(total).sum()),
    } | on_policy.measures(answers)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _rows(group: Group, advantages: np.ndarray | None) -> list[dict[str, Any]]:
    """Returns the rows of the file rollouts.jsonl for a group of answers to one question.

    The advantage of an answer is null in rollouts.jsonl if the model is not trained on the answers to its question.
    """

    def number(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    def scores_of(i: int) -> dict[str, float | None]:
        parts = {name: number(values[i]) for name, values in group.parts.items()} if len(group.parts) > 1 else {}
        advantage = None if advantages is None else float(advantages[i])
        return {"reward": number(group.rewards[i]), **parts, "advantage": advantage}

    return [
        on_policy.row(group.question, text, completion, scores_of(i))
        for i, (text, completion) in enumerate(zip(group.texts, group.completions, strict=True))
    ]


class Watch:
    """Detects a collapse of training from the metrics of the rollouts.

    A `Watch` is called with the metrics of each rollout step, in order, and returns new warnings.

    Args:
        advice: text that says which settings to change. Each warning ends with this text.
    """

    def __init__(self, advice: str):
        self.advice, self.said = advice, dict[str, str]()
        # The list `seen` contains the metrics of all rollouts so far.
        self.seen: list[dict[str, float]] = []
        # The pair `best` contains the highest smoothed reward and the training step with this reward.
        self.best = (-math.inf, 0)

    def __call__(self, step: int, metrics: dict[str, float]) -> list[str]:
        before = len(self.said)
        self.seen.append(metrics)
        if size := min(SMOOTHED, len(self.seen) // 2):
            self._compare(step, size)
        if metrics["flat"] == 1 and not self.said:
            self.said["flat"] = (
                f"step {step:,}: all answers to a question have the same reward, for every question of this step (mean "
                f"{metrics['reward']:.3f}): nothing can be learned from them. If this goes on, give easier or harder "
                "questions, a finer reward, or more answers (reward.group)"
            )
        return list(self.said.values())[before:]

    def _compare(self, step: int, size: int) -> None:
        """Compares the mean metrics of the last `size` rollouts with the mean metrics of the first `size` rollouts.

        The mean reward of the last `size` rollouts is compared with the highest mean reward so far. A collapse adds a
        warning.
        """
        (before, recent), (entropy_before, entropy), (length_before, length), (ended_before, ended) = (
            (_mean(values[:size]), _mean(values[-size:]))
            for values in (self._series(name) for name in ("reward", "entropy", "length", "finished"))
        )
        best, at = self.best
        # The standard error of a mean reward is estimated from the differences between successive rollouts' rewards,
        # because the differences hardly have a trend.
        noise = float(np.nanstd(np.diff(self._series("reward")))) / 2**0.5 * (2 / size) ** 0.5
        fell = best - recent > max(0.5 * abs(best), 4 * noise, 1e-9)
        if fell:
            self._collapse("reward", step, f"the mean reward fell to {recent:.3f}, from {best:.3f} at step {at:,} "
                           f"(means over {SMOOTHED} rollouts)")  # fmt: skip
        if entropy < 0.02 * entropy_before and (best - recent > 0.1 * abs(best) or recent <= before + 2 * noise):
            self._collapse("entropy", step, f"the entropy of the answers fell to {entropy:.4f} from "
                           f"{entropy_before:.4f} nats per token, so that answers hardly differ (mean reward "
                           f"{recent:.3f}, first {before:.3f})")  # fmt: skip
        if entropy > max(2 * entropy_before, entropy_before + 1):
            self._collapse("noise", step, f"the entropy of the answers rose to {entropy:.2f} from {entropy_before:.2f} "
                           "nats per token: the model writes at random")  # fmt: skip
        if ended < 0.5 * ended_before and length > 1.2 * length_before and recent <= before + 2 * noise:
            self._collapse("length", step, f"answers have grown to {length:.1f} tokens from {length_before:.1f}, and "
                           f"only {ended:.0%} of them end, at first {ended_before:.0%}")  # fmt: skip
        if size == SMOOTHED and recent > best:
            self.best = recent, step

    def resume(self, rows: Sequence[dict[str, Any]]) -> None:
        """Restores the rollout metrics from before an interruption of the run, without repeating earlier warnings.

        Args:
            rows: rows of the run's file metrics.jsonl.
        """
        for row in rows:
            if "rollout/reward" in row:
                values = {key: math.nan if value is None else value for key, value in row.items()}
                self(row["step"], {key.removeprefix("rollout/"): value for key, value in values.items()})

    def _series(self, name: str) -> np.ndarray:
        return np.array([metrics[name] for metrics in self.seen])

    def _collapse(self, kind: str, step: int, text: str) -> None:
        self.said.setdefault(kind, f"WARNING: collapse at step {step:,}: {text}; {self.advice}")


# --- evaluation


def _validation(
    cfg: Config, tokenizer: Tokenizer, val: Sequence[Question], scoring: Scorer
) -> Callable[[Params], tuple[Mean, Metrics]]:
    """Returns a function that rewards greedy answers to the validation questions, for use as `Validation.score`."""
    stop, size = weights.stop_ids(tokenizer), cfg.train.batch_size

    def evaluate(params: Params) -> tuple[Mean, Metrics]:
        decoding, new = for_decoding(params, cfg.model), list[list[int]]()
        for first in range(0, len(val), size):
            new += generate(
                decoding, [question.ids for question in val[first : first + size]], cfg.model,
                max_new_tokens=cfg.reward.max_new_tokens, key=jax.random.key(0), stop=stop,
                vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
        results = score(scoring, [question.talk for question in val], [tokenizer.decode(ids) for ids in new])
        total = results.total[~np.isnan(results.total)]
        parts = {f"reward_{name}": _mean(values) for name, values in results.parts.items()}
        lengths = Mean(float(sum(map(len, new))), float(len(new)))
        more = {name: Mean(value, 1.0) for name, value in parts.items()} if len(parts) > 1 else {}
        return Mean(-float(total.sum()), float(total.size)), {**more, "length": lengths}

    return evaluate


def evaluate(result: TrainResult, talks: Sequence[Conversation] | None, say: Callable[[str], None]) -> None:
    """Generates greedy answers to the test questions, and computes the rewards of the answers.

    The model's answers are written to responses.jsonl, and the mean rewards to test.json. If test.json exists already,
    no answers are generated, and a summary of the scores in test.json is printed.

    Args:
        talks: the test conversations. None: the test conversations are read again.
    """
    folder, cfg = Path(result.run_dir), result.cfg
    if not (folder / RESULTS).exists():
        test = talks or conversations(cfg, []).test
        with Progress(log=say) as progress, scorer(cfg) as scoring:
            params, _ = weights.load(folder / "final")
            test_scores = _answer(folder / RESPONSES, params, result, test, scoring, progress, "the tuned model")
            if cfg.reward.compare:
                del params
                params = tuning.base_model(cfg).params("float32", None)
                before = _answer(folder / BEFORE, params, result, test, scoring, progress, "the base model")
                test_scores |= {"before": before}
        write_json(folder / RESULTS, test_scores)
    for line in use_json(folder / RESULTS, summary):
        say(line)
    say(f"        answers in {folder / RESPONSES}")


def _answer(
    file: Path, params: Params, result: TrainResult, talks: Sequence[Conversation], scoring: Scorer,
    progress: Progress, name: str,
) -> dict[str, Any]:  # fmt: skip
    """Generates a model's answers, computes their rewards, and writes the answers with their rewards to a file.

    Returns:
        Metrics of the answers, such as the mean reward.
    """
    cfg = result.cfg
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, max_new_tokens=cfg.reward.max_new_tokens))
    rows = instruct.answers(params, cfg, result.tokenizer, talks, progress, name)
    results = score(scoring, talks, [row["answer"] for row in rows])
    rewarded = [
        row | {"reward": None if math.isnan(value) else float(value)}
        for row, value in zip(rows, results.total, strict=True)
    ]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rewarded))
    mean, low, high = t_interval([float(value) for value in results.total if not math.isnan(value)])
    parts = {f"reward_{name}": _mean(values) for name, values in results.parts.items() if len(results.parts) > 1}
    failed = int(np.isnan(results.total).sum())
    return {"reward": mean, "reward_interval": [low, high], **parts, "failed": failed} | scores(rows)


def summary(results: dict[str, Any]) -> list[str]:
    def line(scores: dict[str, Any]) -> str:
        low, high = scores["reward_interval"]
        interval = "" if low is None else f" (95 % interval {low:.3f} to {high:.3f})"
        return f"mean reward {scores['reward']:.3f}{interval}, exact match {scores['exact']:.1%}"

    lines = [f"test    {results['n']} held-out questions: {line(results)}"]
    if results["failed"]:
        lines.append(f"        a reward function failed for {results['failed']} answers")
    return lines + ([f"        base model: {line(results['before'])}"] if "before" in results else [])


def plan(cfg: Config) -> list[str]:
    """Returns the lines of text that --dry-run prints to summarise a training run."""
    notes: list[str] = []
    splits, base = conversations(cfg, notes), tuning.base_model(cfg)
    model = base.cfg.computed_as(cfg.model)
    tokenizer, style_lines = tuning.styled(base, cfg.reward.style)
    train, dropped = _questions(cfg, model, splits.train, tokenizer)
    counts = " + ".join(f"{len(talks):,}" for talks in splits)
    per_step = cfg.train.batch_size // cfg.reward.group
    return [
        f"data               {counts} questions to train, validate and test on; {dropped} do not fit a row",
        *(f"                   {note}" for note in notes),
        *(f"{line[:8]:19}{line[8:]}" for line in style_lines),
        tuning.plan(cfg, base, model),
        f"reward             {' + '.join(_weighted(cfg))}",
        f"steps              {cfg.train.steps(len(train) * cfg.reward.updates, per_step):,} of {per_step} questions, "
        f"{cfg.reward.group} answers to each; loss {cfg.reward.loss}",
    ]
