"""`gptjax finetune distill` with a tiny teacher and a tinier student, from the conversations to the tuned student."""

import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax import losses, tokenizers
from gptjax.__main__ import main
from gptjax.errors import UserError
from gptjax.model.gpt import for_decoding
from gptjax.tasks import distill, find, on_policy
from gptjax.training.progress import Progress
from gptjax.training.run_dir import read_metrics
from gptjax.types import Batch, RolloutBatch

SIZES = dict(arch="llama", n_head=4, context_length=96, vocab_size=257)
TEACHER = gptjax.ModelConfig(**SIZES, n_layer=2, d_model=64, d_ff=96)
STUDENT = gptjax.ModelConfig(**SIZES | {"vocab_size": 264}, n_layer=1, d_model=32, d_ff=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with random weights: the teacher's large logits are what the student can learn."""
    folder = tmp_path_factory.mktemp("distill")
    bytes_ = tokenizers.load("bytes")
    params = gptjax.init_params(jax.random.key(0), TEACHER)
    params["lm_head"]["kernel"] *= 20
    gptjax.save(folder / "teacher", params, TEACHER, bytes_)
    gptjax.save(folder / "student", gptjax.init_params(jax.random.key(1), STUDENT), STUDENT, bytes_)
    labels = gptjax.ModelConfig(**SIZES, n_layer=1, d_model=32, n_classes=2)
    gptjax.save(folder / "classifier", gptjax.init_params(jax.random.key(0), labels), labels, bytes_)
    chars = gptjax.ModelConfig(**SIZES | {"vocab_size": 30}, n_layer=1, d_model=32)
    letters = tokenizers.train("chars", ["abcdefghijklmnopqrstuvwxyz "])
    gptjax.save(folder / "chars", gptjax.init_params(jax.random.key(0), chars), chars, letters)
    talks = [{"prompt": f"say {x}", "completion": x * 9} for x in "abcdefgh"] * 5
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    return folder


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(folder / "cache"))
    return folder / "cache" / "teachers"


OWN = ("distill.on_policy=0.5", "distill.max_new_tokens=10")


def settings(folder, name, *more):
    return [
        f"distill.source={folder / 'talks.jsonl'}", "distill.style=phi3",
        f"distill.teacher={folder / 'teacher'}", f"finetune.base={folder / 'student'}", "optim.warmup_steps=0",
        f"run_dir={folder / name}", "train.epochs=null", "train.max_steps=20", "train.eval_every=10",
        "train.checkpoint_every=10", "train.batch_size=2", "optim.lr=1e-2", "distill.context_length=96",
        *more,
    ]  # fmt: skip


def run(folder, name, *more):
    return main(["finetune", "distill", *settings(folder, name, *more)])


def weights_of(run):
    return (run / "final" / "model.safetensors").read_bytes()


def test_the_student_learns_from_its_teacher(folder, capsys):
    assert run(folder, "all", "distill.alpha=0.1") == 0
    out = capsys.readouterr().out
    assert "34 + 2 + 4 examples" in out and "in every step" in out and "held-out tokens" in out
    first, *_, last = [row for row in read_metrics(folder / "all") if "val/loss" in row]
    assert last["val/divergence"] < 0.8 * first["val/divergence"]
    assert last["val/loss"] == pytest.approx(0.1 * last["val/cross_entropy"] + 0.9 * last["val/divergence"], rel=1e-4)
    scores = json.loads((folder / "all" / "test.json").read_text())
    assert scores["tokens"] > 30 and 0 < scores["agreement"] <= 1 and scores["loss"] < scores["teacher_loss"]
    params, cfg = gptjax.load(folder / "all")
    assert set(params) == set(gptjax.abstract_params(cfg)) and cfg.n_layer == 1  # without the teacher
    (folder / "all" / "test.json").rename(folder / "before.json")  # as if killed before it was written
    assert run(folder, "all", "distill.alpha=0.1") == 0
    assert json.loads((folder / "all" / "test.json").read_text()) == json.loads((folder / "before.json").read_text())


@pytest.mark.slow
def test_the_cached_probabilities_give_the_same_student(folder, cache, capsys):
    """With k = vocabulary size; the second run reads the file of the first."""
    assert run(folder, "every-step") == 0
    assert run(folder, "once", "distill.top_k=257") == 0
    assert "top 257 of" in capsys.readouterr().out
    [file] = cache.glob("*.npy")
    time = file.stat().st_mtime_ns
    a, b = (gptjax.load(folder / name)[0] for name in ("every-step", "once"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), a, b)
    rows = (read_metrics(folder / name) for name in ("every-step", "once"))
    np.testing.assert_allclose(*([row["val/loss"] for row in run if "val/loss" in row] for run in rows), rtol=1e-4)
    assert run(folder, "again", "distill.top_k=257") == 0
    assert file.stat().st_mtime_ns == time and weights_of(folder / "again") == weights_of(folder / "once")
    file.write_bytes(file.read_bytes()[:-8])  # damaged: it is computed again
    assert run(folder, "damaged", "distill.top_k=257") == 0
    assert weights_of(folder / "damaged") == weights_of(folder / "once")
    assert run(folder, "warmer", "distill.top_k=8", "distill.temperature=2", "distill.divergence=reverse") == 0
    assert len(list(cache.glob("*.npy"))) == 2


@pytest.mark.slow
@pytest.mark.further_case  # test_kills.py resumes such a run at many moments
@pytest.mark.parametrize(
    "more",
    [
        (),
        OWN,
        pytest.param(("distill.top_k=5", "distill.divergence=js"), marks=pytest.mark.slow),
        pytest.param(("finetune.trainable=lora",), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bitwise_equal(folder, more, capsys):
    name = "-".join(["whole", *(text.partition("=")[2] for text in more)])
    assert run(folder, name, *more) == 0
    again = f"{name}-again"
    shutil.copytree(folder / name, folder / again)
    for part in ("final", "checkpoints/20", "test.json"):
        path = folder / again / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(folder, again, *more) == 0
    assert "resuming from step 10" in capsys.readouterr().out
    assert weights_of(folder / again) == weights_of(folder / name)
    answers = [folder / run_dir / "rollouts.jsonl" for run_dir in (name, again)]
    assert [file.exists() for file in answers] == [more == OWN] * 2
    if more == OWN:
        assert answers[0].read_text() == answers[1].read_text()
        cfg = gptjax.load_config(folder / name / "config.yaml")
        own = [step + 1 for step in range(20) if distill.is_own(cfg, step)]
        assert [json.loads(line)["step"] for line in answers[0].read_text().splitlines()] == np.repeat(own, 2).tolist()
        rolled = [row for row in read_metrics(folder / name) if "rollout/length" in row]
        assert [row["step"] for row in rolled] == own and {"rollout/finished", "rollout/entropy"} <= rolled[0].keys()


@pytest.mark.slow
def test_some_batches_are_answers_that_the_student_has_just_given(folder):
    cfg = gptjax.load_config("distill", *settings(folder, "none", *OWN))
    with Progress(log=lambda line: None) as progress:
        resolved, task, _ = distill.prepare(cfg, progress)
    make, own = task.rollouts.make, [distill.is_own(cfg, step) for step in range(20)]
    assert 5 < sum(own) < 15
    step = own.index(True)
    made = make(task.start, task.frozen, step, 1)
    batch = jax.tree.map(lambda leaf: leaf[0], made.batches)
    assert isinstance(batch, RolloutBatch) and len(made.rows) == len(batch.tokens) == 2
    params = distill.student(task.build(resolved).combine(task.start, task.frozen))
    log_probs = losses.token_log_probs(params, batch, resolved.model)
    assert np.abs((log_probs - batch.old) * batch.weights).max() < 1e-4 and (batch.old * batch.weights).sum() < -10
    for i, row in enumerate(made.rows):
        ids = batch.targets[i][batch.weights[i] == 1].tolist()
        assert row["tokens"] == len(ids) <= 10
        assert task.tokenizer.decode(ids[:-1] if row["finish"] == "stop" else ids) == row["answer"]
        prompt = task.tokenizer.decode(batch.tokens[i][: int(np.argmax(batch.weights[i])) + 1].tolist())
        assert row["prompt"] in prompt and prompt.endswith("<|assistant|>\n")
    again, later = make(task.start, task.frozen, step, 1), make(task.start, task.frozen, step + 1, 1)
    jax.tree.map(np.testing.assert_array_equal, again.batches, made.batches)
    assert again.rows == made.rows
    changed = make(jax.tree.map(lambda leaf: 2 * leaf, task.start), task.frozen, step, 1)
    assert [row["prompt"] for row in changed.rows] == [row["prompt"] for row in made.rows]
    assert changed.rows != made.rows != later.rows

    step = own.index(False)
    given, whole = make(task.start, task.frozen, step, 1), task.batches(step, 1, None)
    assert isinstance(given.batches, Batch) and given.rows == [] and given.metrics == {}
    length = given.batches.tokens.shape[2]
    np.testing.assert_array_equal(given.batches.targets, whole.targets[..., :length])
    assert given.batches.weights.any() and not whole.segment_ids[..., length:].any()


def own_divergence(folder, name, cfg):
    """The divergence from the teacher on answers that a student gives to the training prompts."""
    (params, model), (teacher, teacher_cfg) = gptjax.load(folder / name), gptjax.load(folder / "teacher")
    data = distill._data(cfg)
    answers = on_policy.sample_answers(
        for_decoding(params, model), data.questions, model, data.tokenizer, max_new_tokens=10, at=1.0,
        key=jax.random.key(5),
    )  # fmt: skip
    made = [on_policy.rollout(question, answer) for question, answer in zip(data.questions, answers, strict=True)]
    batch = on_policy.to_batch(made, np.zeros(len(made)), 96)
    _, metrics = losses.distill(model, teacher_cfg)(params | {"teacher": teacher}, batch, None)
    return float(metrics["divergence"].value())


@pytest.mark.slow
def test_own_answers_bring_the_student_nearer_to_the_teacher_on_its_own_answers(folder):
    """The given answers are unlike those of the teacher, whose weights are random."""
    own = ("distill.on_policy=1", "distill.max_new_tokens=10")
    more = ("distill.alpha=0", "train.max_steps=40", "train.eval_every=40", "train.checkpoint_every=40",
            "train.batch_size=8")  # fmt: skip
    assert run(folder, "on-policy", *own, *more) == run(folder, "given", "distill.packing=padded", *more) == 0
    cfg = gptjax.load_config(folder / "on-policy" / "config.yaml")
    before, given, after = (own_divergence(folder, name, cfg) for name in ("student", "given", "on-policy"))
    assert after < 0.9 * before and after < 0.9 * given


@pytest.mark.slow
def test_plain_text_and_selected_parameters(folder, capsys):
    settings = (f"distill.source={folder / 'text.txt'}", "finetune.trainable=blocks/0/mlp/* | ln_f/*")
    assert run(folder, "text", *settings, "distill.context_length=32", "train.max_steps=2") == 0
    assert "45 + 4 + 5 examples" in capsys.readouterr().out
    before, after = (gptjax.load(folder / name)[0] for name in ("student", "text"))
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert changed["ln_f"]["scale"] and changed["blocks"]["mlp"]["up"]["kernel"] and not changed["wte"]["embedding"]


@pytest.mark.slow
def test_several_seeds_in_one_program_share_the_teacher(folder, capsys):
    settings = ("finetune.trainable=lora", "finetune.seeds=2", "train.max_steps=4", "optim.eps=1e-4")
    for together in ("true", "false"):
        assert run(folder, together, *settings, f"finetune.together={together}") == 0
    assert "2 adapters in one program" in capsys.readouterr().out
    for seed in ("seed-0", "seed-1"):
        (a, _), (b, _) = (gptjax.load(folder / name / seed) for name in ("true", "false"))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a, b)


@pytest.mark.slow
def test_the_result_in_python_is_the_student(folder):
    cfg = gptjax.load_config(
        "distill", f"distill.teacher={folder / 'teacher'}", f"finetune.base={folder / 'student'}", "distill.style=phi3",
        f"distill.source={folder / 'talks.jsonl'}", f"run_dir={folder / 'python'}", "train.epochs=null",
        "train.max_steps=1", "optim.warmup_steps=0",
    )  # fmt: skip
    result = gptjax.train(cfg, log=lambda line: None)
    gptjax.save(folder / "saved", result.params, result.cfg.model, result.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, gptjax.load(folder / "saved")[0], gptjax.load(folder / "python")[0])


def test_dry_run_and_mistakes(folder, capsys):
    assert run(folder, "none", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "34 + 2 + 4 examples" in out and "teacher   " in out and not (folder / "none").exists()
    mistakes = {
        "distill.teacher=null": "distill.teacher is missing",
        f"distill.teacher={folder / 'techer'}": "did you mean",
        f"distill.teacher={folder / 'classifier'}": "is a classifier of 2 classes",
        f"distill.teacher={folder / 'chars'}": "make a student with gptjax pretrain tokenizer.name",
        "distill.top_k=258": "must be at most 257",
        "distill.beta=0.1": "would have no effect: distill.divergence=forward",
        "distill.divergence=kl": "forward, reverse or js",
        "distill.alpha=2": "distill.alpha (2",
        "distill.context_length=4": "no conversation fits a context of 4 tokens (distill.context_length",
    }
    own_mistakes = {
        "distill.on_policy=1.5": "distill.on_policy (1.5) must be",
        "distill.top_k=8": "needs the teacher in every step",
        f"distill.source={folder / 'text.txt'}": "is plain text",
        "distill.max_new_tokens=96": "must be below distill.context_length (96)",
        "distill.max_new_tokens=90": "no question fits: each has more than 6 tokens",
        "distill.packing=packed": "distill.packing would have no effect",
        "train.steps_per_call=2": "runs one step per call",
        "distributed.coordinator=auto": "runs in one process",
        "finetune.trainable=lora finetune.seeds=2 finetune.together=true": "trains several seeds one after the other",
    }
    cases = [([text], message) for text, message in mistakes.items()]
    cases += [([*OWN, *text.split()], message) for text, message in own_mistakes.items()]
    for words, message in cases:
        assert run(folder, "none", *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1, error


def test_tokenizers_are_compared_by_their_ids(folder):
    """Not by their names or chat templates."""
    compare, cfg = find("distill")._refuse_other_tokenizer, gptjax.load_config("distill")
    text = "abc abcd bcd " * 9
    small = tokenizers.train("bpe", [text], 262)
    compare(cfg, small, small.replace(chat_template="{{ messages }}"))
    other = tokenizers.train("bpe", ["cdcdcdab" * 9], 262)
    with pytest.raises(UserError, match="id 25. is"):
        compare(cfg, small, other)
    with pytest.raises(UserError, match="differ: 262 and 257 ids"):
        compare(cfg, small, tokenizers.load("bytes"))
