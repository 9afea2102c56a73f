"""`gptjax finetune reward` with a tiny base model: bandits whose optimum is known, resume, mistakes, collapse."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import losses
from gptjax.__main__ import main
from gptjax.data.conversations import Conversation
from gptjax.data.rollouts import Question, Rollout, draw, group_tree, rollout_batch, tree_batch
from gptjax.generation.decode import Completion, complete
from gptjax.generation.sampling import chain, temperature
from gptjax.tasks import on_policy, reward
from gptjax.training.run_dir import read_metrics

BASE = gptjax.ModelConfig(arch="llama", n_layer=2, n_head=4, d_model=64, d_ff=96, context_length=128, vocab_size=257)
BANDIT = '''
def ascii(prompt, answer, example):
    """The share of ASCII characters."""
    return sum(letter < "\\x80" for letter in answer) / max(len(answer), 1)

def near_x(prompt, answer, example):
    """1 for the letter x, and less the farther its code is from that of x."""
    return max(0.0, 1 - abs(ord(answer or "\\x00") - ord("x")) / 64)

def raises(prompt, answer, example):
    raise ValueError("no such answer")

def nan(prompt, answer, example):
    return float("nan")

def text(prompt, answer, example):
    return "0.5"

def hangs(prompt, answer, example):
    while True:
        pass

def sometimes(prompt, answer, example):
    if len(answer.encode()) % 2:
        raise ValueError("odd")
    return ascii(prompt, answer, example)

def various(prompt, answer, example):
    """The number of different characters."""
    return len(set(answer)) / 8

def constant(prompt, answer, example):
    return 0.25
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    params = gptjax.init_params(jax.random.key(0), BASE)
    gptjax.save(folder / "base", params, BASE, gptjax.tokenizers.load("bytes"))
    rows = [{"prompt": f"say {x}", "response": "x"} for x in "abcdefgh"] * 5
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(BANDIT)
    return folder


def run(folder, name, *more, function="ascii"):
    return main(
        [
            "finetune", "reward", "reward.style=phi3", f"reward.source={folder / 'rows.jsonl'}",
            f"finetune.base={folder / 'base'}", f"run_dir={folder / name}", "optim.warmup_steps=0",
            "train.max_steps=4", "train.eval_every=2", "train.checkpoint_every=2", "train.batch_size=16",
            "train.accumulation=1", "optim.lr=1e-2", "reward.max_new_tokens=4", "reward.group=8",
            "reward.val_fraction=0.05", "reward.test_fraction=0.1", "reward.context_length=64",
            f"reward.functions=[{folder / 'mine.py'}:{function}]", *more,
        ]
    )  # fmt: skip


def rollout_rows(folder, name):
    return [json.loads(line) for line in (folder / name / "rollouts.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"])
def test_a_bandit_with_a_known_optimum_is_solved(folder, capsys, loss):
    """One byte per answer: the best policy always writes x."""
    assert run(folder, loss, f"reward.loss={loss}", "train.max_steps=60", "train.eval_every=60", "train.batch_size=64",
               "train.checkpoint_every=60", "reward.max_new_tokens=1", "optim.lr=3e-3", "finetune.trainable=all",
               function="near_x") == 0  # fmt: skip
    rewards = [row["rollout/reward"] for row in read_metrics(folder / loss) if "rollout/reward" in row]
    assert np.mean(rewards[:3]) < 0.3 and np.mean(rewards[-5:]) > 0.9
    scores = json.loads((folder / loss / "test.json").read_text())
    assert scores["reward"] > 0.9 and scores["before"]["reward"] < 0.5


def test_a_run_says_what_it_does_and_keeps_its_rollouts(folder, capsys):
    assert run(folder, "short", "reward.kl=0.1", "reward.updates=2") == 0
    out = capsys.readouterr().out
    assert "2 questions per step, 8 answers to each, 2 steps on the same answers" in out
    assert "validation reward" in out and "rollouts.jsonl" in out and "reward " in out
    rows = rollout_rows(folder, "short")
    assert [row["step"] for row in rows] == [1] * 16 + [3] * 16
    assert {"where", "prompt", "expected", "answer", "reward", "advantage", "tokens", "finish"} <= rows[0].keys()
    metrics = read_metrics(folder / "short")
    rolled = [row for row in metrics if "rollout/reward" in row]
    assert [row["step"] for row in rolled] == [1, 3]
    assert rolled[0]["rollout/reward"] == pytest.approx(np.mean([row["reward"] for row in rows[:16]]))
    steps = [row for row in metrics if "train/loss" in row]
    assert {"train/kl", "train/kl_reference", "train/entropy", "train/clipped", "train/length"} <= steps[0].keys()
    assert steps[0]["train/kl_reference"] == pytest.approx(0, abs=1e-6)  # the adapter begins as the base model
    assert steps[1]["train/kl_reference"] > 1e-5
    assert steps[0]["train/kl"] == pytest.approx(0, abs=1e-6) and steps[1]["train/kl"] > 1e-6
    assert any("val/loss" in row and row["val/loss"] <= 0 for row in metrics)
    answers = [json.loads(line) for line in (folder / "short" / "responses.jsonl").read_text().splitlines()]
    assert all("reward" in row for row in answers)
    assert run(folder, "short", "reward.kl=0.1", "reward.updates=2") == 0
    assert "is finished" in capsys.readouterr().out


FULL = ["finetune.trainable=all", "reward.kl=0.05", "reward.updates=2"]


@pytest.mark.slow
@pytest.mark.further_case  # test_kills.py resumes such a run at many moments
@pytest.mark.parametrize("more", [["reward.branches=rows"], pytest.param(FULL, marks=pytest.mark.slow)])
def test_an_interrupted_run_makes_the_same_rollouts(folder, monkeypatch, more):
    name = f"whole-{len(more)}"
    assert run(folder, name, *more) == 0
    shutil.copytree(folder / name, folder / f"{name}-resumed")
    copied = folder / f"{name}-resumed"
    for part in ("final", "best"):
        shutil.rmtree(copied / part)
    (copied / "test.json").unlink()
    shutil.rmtree(sorted((copied / "checkpoints").iterdir())[-1])
    assert run(folder, f"{name}-resumed", *more) == 0
    assert rollout_rows(folder, name) == rollout_rows(folder, f"{name}-resumed")
    whole, resumed = (gptjax.load(folder / run_dir / "final")[0] for run_dir in (name, f"{name}-resumed"))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)

    def untimed(run_dir):
        rows = read_metrics(folder / run_dir)
        return [{key: value for key, value in row.items() if not key.endswith(("seconds", "per_s"))} for row in rows]

    assert untimed(name) == untimed(f"{name}-resumed")


@pytest.mark.parametrize(
    "function, text",
    [
        ("raises", "raised ValueError: no such answer"),
        ("hangs", "longer than 1 s"),
        ("nan", "nan"),
        ("text", "returned '0.5', expected a finite number"),
    ],
)
def test_a_function_that_always_fails_stops_the_run_with_one_error(folder, capsys, function, text):
    assert run(folder, f"fails-{function}", "reward.time_limit=1", function=function) == 2
    error = capsys.readouterr().err
    assert text in error and f"mine.py:{function}" in error and "Traceback" not in error


@pytest.mark.slow
def test_answers_for_which_a_function_fails_are_counted_and_left_out(folder, capsys):
    assert run(folder, "sometimes", "train.max_steps=2", function="sometimes") == 0
    rows = rollout_rows(folder, "sometimes")
    failed = [row for row in rows if row["reward"] is None]
    assert failed and all(row["advantage"] == 0 for row in failed if row["advantage"] is not None)
    metrics = [row for row in read_metrics(folder / "sometimes") if "rollout/failed" in row]
    assert sum(row["rollout/failed"] for row in metrics) == len(failed)


@pytest.mark.slow
def test_no_variance_in_any_group_is_said_and_changes_no_weight(folder, capsys):
    assert run(folder, "flat", function="constant") == 0
    assert "nothing can be learned" in capsys.readouterr().out
    final, base = gptjax.load(folder / "flat" / "final")[0], gptjax.load(folder / "base")[0]
    jax.tree.map(np.testing.assert_array_equal, final, base)
    assert all(row["rollout/flat"] == 1 for row in read_metrics(folder / "flat") if "rollout/flat" in row)


@pytest.mark.slow
def test_dynamic_sampling_draws_further_questions(folder):
    assert run(folder, "dapo", "reward.loss=dapo", "train.max_steps=2") == 0
    rows = rollout_rows(folder, "dapo")
    first = [row for row in rows if row["step"] == 1]
    assert len(first) in (16, 32, 48)
    used = [row for row in first if row["advantage"] is not None]
    assert len(used) == 16


def test_mistakes(folder, capsys):
    def refused(text, *more, function="ascii"):
        assert run(folder, "none", *more, function=function) == 2
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error and not (folder / "none").exists(), error

    refused("reward.group (8) must divide train.batch_size (12)", "train.batch_size=12")
    refused("nowhere", function="nowhere")
    refused("exakt", "reward.functions=[exakt]")
    refused("reward.weights has 1 values for 2", "reward.functions=[exact,number]", "reward.weights=[1]")
    refused("reward.weights are all 0", "reward.weights=[0]")
    refused("such as train.batch_size=32", "reward.group=32")
    refused("reward.group (0) must be at least 2", "reward.group=0")
    refused("reward.functions is empty", "reward.functions=[]")
    refused("no question fits", "reward.context_length=8", "reward.max_new_tokens=6")
    refused("must be below reward.context_length", "reward.context_length=8", "reward.max_new_tokens=8")
    refused("reward.updates (3) must divide", "reward.updates=3", "train.max_steps=4")
    refused("train.steps_per_call", "train.steps_per_call=2")
    refused("one after the other", "finetune.seeds=2", "finetune.together=true")
    refused("the model reads 128", "reward.branches=tree", "reward.max_new_tokens=16")
    refused("must divide the 2 questions", "reward.branches=tree", "train.accumulation=4")
    assert run(folder, "none", "--dry-run") == 0
    assert "34 + 2 + 4 questions" in capsys.readouterr().out and not (folder / "none").exists()


def test_the_answers_to_a_conversation_have_its_system_message_and_history():
    """Otherwise a reward model that learns from rollouts.jsonl would see another prompt."""
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "abcde", strict=True)]
    talk = Conversation(tuple(messages), "here")
    group = reward.Group(Question([1], talk), [Completion([2], [0.0], [], "stop")], ["f"], np.ones(1), {})
    (row,) = reward._rows(group, None)
    assert (row["system"], row["history"], row["prompt"]) == ("a", messages[1:3], "d")
    assert (row["expected"], row["answer"], row["reward"]) == ("e", "f", 1.0)


def test_the_log_probabilities_of_the_sampler_are_those_of_the_trainer():
    """With an adapter, prompts of different lengths, a temperature, and answers that end early."""
    cfg = dataclasses.replace(BASE, n_kv_head=2, context_length=64)
    params = gptjax.init_params(jax.random.key(0), cfg)
    settings = gptjax.LoraConfig(rank=4)
    adapter = gptjax.lora.init(jax.random.key(1), params, settings)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), adapter)
    adapted = gptjax.lora.attach(params, adapter, settings)
    prompts = [list(range(1, 3 + 5 * i)) for i in range(4)]
    answers = complete(
        adapted, prompts, cfg, max_new_tokens=24, key=jax.random.key(3), sampler=chain(temperature(0.7)), n=8,
        stop=[5, 6, 7, 8], logprobs=0, logprobs_temperature=0.7,
    )  # fmt: skip
    assert {answer.finish for answer in answers} == {"stop", "length"}
    made = [
        on_policy.rollout(Question(prompts[i // 8], Conversation("", ())), answer) for i, answer in enumerate(answers)
    ]
    batch = rollout_batch(made, np.zeros(len(made)), 48)
    log_probs = losses.token_log_probs(adapted, batch, cfg, temperature=0.7)
    assert batch.weights.sum() == sum(len(answer.tokens) + (answer.end is not None) for answer in answers)
    assert jnp.abs((log_probs - batch.old) * batch.weights).max() < 1e-5


def test_rollout_batch():
    batch = rollout_batch([Rollout([1, 2, 3], [4, 5, 9], [-0.1, -0.2, -0.3]), Rollout([1], [9], [-1.0])], np.ones(2), 6)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 5, 9, 0], [9, 0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(batch.old[0], [0, 0, -0.1, -0.2, -0.3, 0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo"])
def test_a_tree_has_the_loss_and_the_gradients_of_a_row_per_answer(kind):
    """Answers of different lengths, two of them equal, one the beginning of another, one without an end token."""
    params = gptjax.init_params(jax.random.key(0), BASE)
    answers = [[5, 6, 9], [5, 6, 9], [5, 9], [7, 8, 6, 5], [9]]
    rng = np.random.default_rng(0)
    groups = [
        [Rollout(prompt, answer, rng.normal(-5, 0.1, len(answer)).tolist()) for answer in answers]
        for prompt in ([1, 2, 3], [4, 3, 2, 1, 1, 2])
    ]
    advantages = rng.normal(size=(2, 5))
    rows = rollout_batch([rollout for group in groups for rollout in group], advantages.reshape(-1), 12)
    trees = tree_batch(groups, [group_tree(group) for group in groups], advantages, 24, 4)
    assert (trees.segment_ids > 0).sum() < 0.7 * (rows.segment_ids > 0).sum()
    np.testing.assert_array_equal(
        np.take_along_axis(trees.targets, trees.index.reshape(2, -1), 1).reshape(10, 4) * trees.weights.reshape(10, 4),
        [[*answer, *[0] * (4 - len(answer))] for group in groups for _, answer, _ in group],
    )
    loss = losses.policy(BASE, kind, kl=0.1)

    def total(params, batch):
        reference = batch.old - 0.1
        mean, metrics = loss(params, batch._replace(reference=reference), None)
        return mean.total / mean.weight, metrics

    (a, metrics_a), gradient_a = jax.value_and_grad(total, has_aux=True)(params, rows)
    (b, metrics_b), gradient_b = jax.value_and_grad(total, has_aux=True)(params, trees)
    assert float(a) == pytest.approx(float(b), abs=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradient_a, gradient_b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), metrics_a, metrics_b)


def test_every_question_is_drawn_once_per_epoch():
    drawn = np.concatenate([draw(10, step, 5, seed=3) for step in range(4)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10].tolist() != drawn[10:].tolist()


def group(values):
    answers = [Completion([1, 2], [-0.5, -0.5], [], "length") for _ in values]
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
    question = Question([1], Conversation("", messages))
    return reward.Group(question, answers, ["a"] * len(values), np.array(values), {"exact": np.array(values)})


def test_an_answer_without_reward_has_no_advantage():
    advantages = reward.group_advantages([group([1, 0, math.nan, 0.5]), group([math.nan] * 4)], "dr_grpo")
    np.testing.assert_allclose(advantages, [[0.5, -0.5, 0, 0], [0] * 4], atol=1e-6)
    assert reward.measures([group([1, 0, math.nan, 0.5]), group([math.nan] * 4)])["failed"] == 5


QUIET = {"flat": 0.0, "entropy": 1.0, "length": 6.0, "finished": 0.9}


def test_a_collapse_is_named_once():
    lines = []
    watch = reward.Watch("try something")
    rows = [QUIET | {"reward": 0.3 + 0.01 * step + 0.05 * (-1) ** step} for step in range(30)]
    for step, metrics in enumerate(rows):
        lines += watch(step, metrics)
    assert not lines
    for step in range(30, 45):
        lines += watch(step, QUIET | {"reward": 0.02})
    assert len(lines) == 1 and "WARNING: collapse at step 3" in lines[0] and "mean reward fell" in lines[0]
    assert lines[0].endswith("; try something")
    for step in range(45, 60):
        lines += watch(step, QUIET | {"entropy": 5.0, "reward": 0.02})
    assert len(lines) == 2 and "at random" in lines[1]
    resumed = reward.Watch("try something")
    logged = [{f"rollout/{key}": value for key, value in metrics.items()} for metrics in rows]
    resumed.resume([row | {"step": step} for step, row in enumerate(logged)])
    for step in range(30, 45):
        lines += resumed(step, QUIET | {"reward": 0.02})
    assert lines[2:] == lines[:1]  # as in the uninterrupted run


@pytest.mark.parametrize(
    "after, words",
    [
        ({"entropy": 0.01}, "the entropy of the answers fell to 0.0100 from 1.0000 nats per token"),
        ({"entropy": 2.5}, "the entropy of the answers rose to 2.50 from 1.00 nats per token"),
        ({"length": 24.0, "finished": 0.1}, "answers have grown to 24.0 tokens from 6.0, and only 10% of them end"),
        ({"reward": 0.9, "entropy": 0.01}, None),  # it has learned to answer
        ({"reward": 0.9, "length": 24.0, "finished": 0.1}, None),
    ],
)
def test_a_collapse_of_few_rollouts_is_named(after, words):
    lines = []
    watch = reward.Watch("")
    for step, metrics in enumerate([QUIET, QUIET, *[QUIET | after] * 2]):
        lines += watch(step, {"reward": 0.2, **metrics})
    assert [words in line for line in lines] == [True] * bool(words), lines


@pytest.mark.slow
def test_a_model_that_collapses_is_noticed(folder, capsys):
    """A far too high learning rate, hardly a clip, many steps on the same answers: it repeats one character."""
    assert run(folder, "collapse", "optim.lr=3", "reward.updates=8", "reward.clip=1", "reward.clip_high=100",
               "finetune.trainable=all", "train.max_steps=32", "train.eval_every=32", "train.checkpoint_every=32",
               "reward.max_new_tokens=8", function="various") == 0  # fmt: skip
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "WARNING" in line)
    assert "collapse at step 9: the entropy of the answers fell to 0.0000 from 5.5" in line
    assert "try an optim.lr below 3 or a reward.kl above 0 or fewer than 8 reward.updates" in line
    assert line in (folder / "collapse" / "log.txt").read_text()
    texts = {row["answer"] for row in rollout_rows(folder, "collapse") if row["step"] > 1}
    assert all(len(set(text)) == 1 for text in texts)
