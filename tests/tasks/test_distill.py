"""`gptjax finetune distill` with a tiny teacher and a tinier student, from the conversations to the tuned student."""

import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax import tokenizers
from gptjax.__main__ import main
from gptjax.errors import UserError
from gptjax.tasks import find
from gptjax.training.run_dir import read_metrics

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


def run(folder, name, *more):
    return main(
        [
            "finetune", "distill", f"distill.source={folder / 'talks.jsonl'}", "distill.style=phi3",
            f"distill.teacher={folder / 'teacher'}", f"finetune.base={folder / 'student'}", "optim.warmup_steps=0",
            f"run_dir={folder / name}", "train.epochs=null", "train.max_steps=20", "train.eval_every=10",
            "train.checkpoint_every=10", "train.batch_size=2", "optim.lr=1e-2", "distill.context_length=96",
            *more,
        ]
    )  # fmt: skip


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


@pytest.mark.parametrize(
    "more",
    [
        (),
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
    for setting, message in mistakes.items():
        assert run(folder, "none", setting) == 2
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
