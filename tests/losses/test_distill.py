"""Distillation losses against TRL's formula in float64, and log-probabilities of the teacher's most probable tokens."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.data.classification import LabelledBatch
from gptjax.data.conversations import Conversation
from gptjax.data.rollouts import Question
from gptjax.generation import complete
from gptjax.generation.sampling import chain, temperature
from gptjax.losses import class_logits, distill, distill_classes, next_token
from gptjax.losses.distill import TeacherBatch, coarse_log_probs, divergence, teacher_log_probs
from gptjax.ops.loss import Head, map_logits
from gptjax.tasks import on_policy
from gptjax.types import Batch

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(5, 11)).astype(np.float32) * 4 for _ in range(2))
KINDS = {"forward": 0.0, "reverse": 1.0, "js": 0.3}


def trl(student, teacher, beta, temperature):
    """`generalized_jsd_loss` of TRL's GKDTrainer in float64, before the reduction over tokens.

    As in torch, kl_div(p, q, log_target=True) is exp(q) (q - p).
    """

    def log_softmax(x):
        x = np.asarray(x, np.float64) / temperature
        return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)

    def kl_div(p, q):
        return np.exp(q) * (q - p)

    p, q = log_softmax(student), log_softmax(teacher)
    if beta == 0:
        out = kl_div(p, q)
    elif beta == 1:
        out = kl_div(q, p)
    else:
        mixture = np.log(np.exp(p + np.log(1 - beta)) + np.exp(q + np.log(beta)))
        out = beta * kl_div(mixture, q) + (1 - beta) * kl_div(mixture, p)
    return out.sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_that_of_trl(kind, temperature):
    log_probs = (jax.nn.log_softmax(x / temperature) for x in (STUDENT, TEACHER))
    mine = divergence(*log_probs, kind, KINDS[kind])
    np.testing.assert_allclose(mine, trl(STUDENT, TEACHER, KINDS[kind], temperature), atol=1e-5)


def test_large_logits_have_finite_gradients():
    def total(student, kind):
        return divergence(*(jax.nn.log_softmax(x) for x in (student, -student)), kind).sum()

    for kind in KINDS:
        assert np.isfinite(jax.grad(total)(jnp.array([[1e4, 0.0, -1e4]]), kind)).all()


def test_all_other_tokens_are_one_outcome():
    ids = jax.lax.top_k(TEACHER, 4)[1]
    p = np.exp(np.asarray(coarse_log_probs(STUDENT, ids)))
    whole = np.asarray(jax.nn.softmax(STUDENT))
    np.testing.assert_allclose(p[:, :4], np.take_along_axis(whole, np.asarray(ids), 1), rtol=1e-5)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    bounds = [
        divergence(*(coarse_log_probs(x, jax.lax.top_k(TEACHER, k)[1]) for x in (STUDENT, TEACHER)))
        for k in (1, 4, 10, 11)
    ]
    exact = divergence(*(jax.nn.log_softmax(x) for x in (STUDENT, TEACHER)))
    assert all((low <= high + 1e-5).all() for low, high in zip(bounds, [*bounds[1:], exact], strict=True))
    np.testing.assert_allclose(bounds[2], exact, atol=1e-5)  # one token is left over
    np.testing.assert_allclose(bounds[3], exact, atol=1e-5)


def test_a_certain_student_keeps_the_probability_of_other_tokens():
    log_probs = coarse_log_probs(jnp.array([[40.0, 0.0, 0.0]]), jnp.array([[0]]))
    np.testing.assert_allclose(log_probs, [[0.0, np.log(2) - 40]], atol=1e-5)


@pytest.fixture(scope="module")
def models(tiny):
    """A student, and a teacher of another architecture whose embedding has more rows."""
    return tiny("llama"), tiny("gpt2", seed=1, vocab_size=20, n_layer=1)


@pytest.fixture(scope="module")
def batch():
    tokens, targets = RNG.integers(0, 17, (2, 3, 8)).astype(np.int32)
    weights = np.array([[0, 0, 1, 1, 0, 1, 1, 0.5]] * 3, np.float32)
    return Batch(tokens, targets, weights, np.array([[1, 1, 1, 1, 2, 2, 2, 0]] * 3, np.int32))


OPTIONS = dict(kind="js", beta=0.3, temperature=2.0, alpha=0.25)


def test_the_loss_is_that_of_the_logits(models, batch):
    (cfg, student), (teacher_cfg, teacher) = models
    mean, metrics = distill(cfg, teacher_cfg, **OPTIONS)(student | {"teacher": teacher}, batch, None)
    logits = gptjax.forward(student, batch.tokens, cfg, segment_ids=batch.segment_ids)
    others = gptjax.forward(teacher, batch.tokens, teacher_cfg, segment_ids=batch.segment_ids)[..., :17]
    soft = (trl(logits, others, 0.3, 2.0) * batch.weights).sum()
    hard = next_token(cfg)(student, batch, None)[0]
    np.testing.assert_allclose(metrics["divergence"].total, soft, rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], hard, rtol=1e-5)
    np.testing.assert_allclose(mean.total, 0.25 * hard.total + 0.75 * 4 * soft, rtol=1e-5)
    same = (np.asarray(logits).argmax(-1) == np.asarray(others).argmax(-1)) * batch.weights
    assert float(metrics["agreement"].total) == same.sum() and float(mean.weight) == batch.weights.sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_cached_log_probs_of_the_whole_vocabulary_give_the_same_loss_and_gradient(models, batch, kind):
    (cfg, student), (teacher_cfg, teacher) = models
    loss = distill(cfg, teacher_cfg, **{**OPTIONS, "kind": kind})

    def gradient(batch, more):
        return jax.value_and_grad(lambda params: loss(params | more, batch, None)[0].total)(student)

    ids, log_probs = teacher_log_probs(teacher, batch, teacher_cfg, top_k=17, vocab_size=17, temperature=2.0)
    assert log_probs.shape == (3, 8, 17)
    cached = TeacherBatch(*batch[:4], ids, log_probs)
    for mine, other in zip(*map(jax.tree.leaves, (gradient(cached, {}), gradient(batch, {"teacher": teacher})))):  # noqa: B905
        np.testing.assert_allclose(mine, other, atol=1e-4)
    few = teacher_log_probs(teacher, batch, teacher_cfg, top_k=3, vocab_size=17, temperature=2.0)
    assert [x.shape[-1] for x in few] == [3, 4]
    _, metrics = loss(student, TeacherBatch(*batch[:4], *few), None)
    exact = loss(student | {"teacher": teacher}, batch, None)[1]
    assert float(metrics["divergence"].total) <= float(exact["divergence"].total)
    assert metrics["agreement"] == exact["agreement"] and metrics["cross_entropy"] == exact["cross_entropy"]


def test_the_teacher_has_no_gradient(models, batch):
    (cfg, student), (teacher_cfg, teacher) = models
    loss = distill(cfg, teacher_cfg)
    grads = jax.grad(lambda params: loss(params, batch, None)[0].total)(student | {"teacher": teacher})
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["teacher"]))
    assert grads["wte"]["embedding"].any()


def test_a_student_that_equals_its_teacher_has_no_divergence(models, batch):
    cfg, params = models[0]
    _, metrics = distill(cfg, cfg)(params | {"teacher": params}, batch, None)
    assert abs(float(metrics["divergence"].value())) < 1e-6 and metrics["agreement"].value() == 1


@pytest.fixture(scope="module")
def own(models):
    """Answers that the student gives, some of them with an end token, and the logits of both models."""
    (cfg, student), _ = models
    prompts = [[1, 2, 3], [4, 5], [6], [6, 7, 8, 9]]
    answers = complete(
        student, prompts, cfg, max_new_tokens=6, key=jax.random.key(0), sampler=chain(temperature(1.0)),
        stop=[0, 1, 2], logprobs=0,
    )  # fmt: skip
    assert {answer.finish for answer in answers} == {"stop", "length"}
    made = [
        on_policy.rollout(Question(ids, Conversation("", ())), answer)
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    batch = on_policy.to_batch(made, np.zeros(4), 16)
    logits, others = (
        np.asarray(gptjax.forward(params, batch.tokens, cfg, segment_ids=batch.segment_ids))[..., :17]
        for cfg, params in models
    )
    return batch, logits, others


def own_loss(models, batch, kind):
    (cfg, student), (teacher_cfg, teacher) = models
    options = OPTIONS | {"kind": kind, "beta": KINDS[kind]}
    return distill(cfg, teacher_cfg, **options)(student | {"teacher": teacher}, batch, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_own_answers_is_the_divergence_alone(models, own, kind):
    batch, logits, others = own
    mean = own_loss(models, batch, kind)
    soft = (trl(logits, others, KINDS[kind], 2.0) * batch.weights).sum()
    np.testing.assert_allclose(mean, (4 * soft, batch.weights.sum()), rtol=1e-5)


@pytest.mark.slow
def test_the_loss_of_own_answers_is_that_of_gkd_trainer(models, own):
    """TRL masks prompts and padding with the label -100, and does not multiply by temperature^2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gkd = pytest.importorskip("trl.experimental.gkd", reason="extra 'parity' is not installed")
    import torch

    batch, *logits = own
    labels = torch.tensor(np.where(batch.weights == 1, batch.targets, -100))
    for kind, beta in KINDS.items():
        theirs = gkd.GKDTrainer.generalized_jsd_loss(*map(torch.tensor, logits), labels, beta, temperature=2.0)
        np.testing.assert_allclose(own_loss(models, batch, kind).value(), 4 * float(theirs), rtol=1e-5)


def test_chunks_give_the_same_values():
    hidden, kernel = RNG.normal(size=(2, 7, 4)).astype(np.float32), RNG.normal(size=(4, 9)).astype(np.float32)
    scale = RNG.normal(size=(2, 7)).astype(np.float32)
    fn = lambda a, b, scale: {"first": scale * a[:, 0], "both": a[:, :3] + b[:, :3]}  # noqa: E731
    heads = [Head(hidden, kernel), Head(2 * hidden, kernel, 5.0)]
    whole, chunked = (map_logits(fn, heads, (scale,), chunk=chunk) for chunk in (None, 5))
    assert chunked["both"].shape == (2, 7, 3)
    for name, value in whole.items():
        np.testing.assert_allclose(chunked[name], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole["first"], scale * (hidden @ kernel)[..., 0], atol=1e-5)


@pytest.mark.slow
def test_classifiers(tiny, models):
    """Packed texts, and a teacher that pools differently."""
    (cfg, student), (teacher_cfg, teacher) = (tiny("llama", n_classes=3), tiny("gpt2", seed=1, n_classes=3))
    texts = LabelledBatch(
        RNG.integers(0, 17, (2, 8)).astype(np.int32), np.array([[1, 1, 1, 2, 2, 2, 2, 0]] * 2, np.int32),
        np.array([[0, 2], [1, 0]], np.int32), np.array([[1, 1], [1, 0]], np.float32),
    )  # fmt: skip
    loss = distill_classes(cfg, teacher_cfg, "last", "mean", **OPTIONS)
    mean, metrics = loss(student | {"teacher": teacher}, texts, None)
    logits = np.asarray(class_logits(student, *texts[:2], cfg, "last", n=2))
    others = np.asarray(class_logits(teacher, *texts[:2], teacher_cfg, "mean", n=2))
    soft = (trl(logits, others, 0.3, 2.0) * texts.weights).sum()
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), texts.labels[..., None], -1)[..., 0]
    hard = -(picked * texts.weights).sum()
    np.testing.assert_allclose(mean, (0.25 * hard + 0.75 * 4 * soft, 3), rtol=1e-5)
    assert float(metrics["accuracy"].total) == ((logits.argmax(-1) == texts.labels) * texts.weights).sum()
