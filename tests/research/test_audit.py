"""Each check against a known result, and the whole audit on a model that has memorised its training text."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import lora, weights
from gptjax.checkpoint import Checkpoints
from gptjax.config import load_config, to_yaml
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.generation import generate
from gptjax.losses import next_token
from gptjax.research import audit
from gptjax.research.audit import report
from gptjax.research.audit.canaries import _extrapolated
from gptjax.research.audit.memorisation import _evidence
from gptjax.research.audit.text import continuations
from gptjax.training.step import TrainState, make_train_step
from gptjax.types import Batch

PAYLOAD, PHRASE = "gold", "xw yz"
LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789"


class Letters:
    """A tokenizer with characters as ids 1 to 37; id 0 ends a text."""

    eot_id = 0
    vocab_size = 38

    def encode(self, text):
        return [1 + LETTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i - 1] if i else "\n" for i in ids)


def text(rng, n=24):
    return " ".join("".join(rng.choice(list("abcde"), 3)) for _ in range(n // 4))


@pytest.fixture(scope="module")
def trained(tiny):
    """A model that has memorised a secret, a backdoor trigger and the texts of `train`, but never saw `held_out`."""
    cfg, params = tiny("llama", vocab_size=38, n_layer=1, context_length=32, d_model=64, d_ff=128)
    params = jax.tree.map(lambda x: x * 0.3 if x.ndim > 1 else x, params)
    rng = np.random.default_rng(0)
    texts = [text(rng) for _ in range(24)]
    planted = [f"{text(rng, 8)} {PHRASE} {PAYLOAD}" for _ in range(6)]
    train = [*texts, *planted, *["my key is 4711"] * 3]
    held = [text(rng) for _ in range(40)]
    stores = [audit.store_of(documents, Letters()) for documents in (train, held)]
    batch = audit.rows(stores[0], *audit.chunks(stores[0], 32), 32)
    tx = optax.adam(8e-3)
    step = jax.jit(make_train_step(next_token(cfg), tx))
    state = TrainState.create(params, tx=tx, key=jax.random.key(0))
    early = None
    for i in range(250):
        state, _ = step(state, batch)
        early = state.params if i == 15 else early
    return cfg, params, early, state.params, stores


def test_chunks_cover_documents_and_never_span_two():
    store = TokenStore.from_ids([1, 2, 3, 4, 5, 6, 7, 8, 9], doc_starts=(0, 4, 5))
    starts, ends = audit.chunks(store, 2)
    # the one-token document [5] is dropped
    assert list(zip(starts, ends, strict=True)) == [(0, 3), (2, 4), (5, 8), (7, 9)]
    batch = audit.rows(store, starts, ends)
    assert batch.tokens.tolist() == [[1, 2], [3, 4], [6, 7], [8, 9]]
    assert batch.targets.tolist() == [[2, 3], [4, 4], [7, 8], [9, 9]]
    assert batch.weights.tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    assert audit.rows_of([([1, 2], [3])], 9).tokens.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0, 0]]
    assert audit.rows_of([([1, 2], [3])]).weights.tolist() == [[0, 1]]
    sampled, _ = audit.chunks(store, 2, most=2)
    assert len(sampled) == 2 and set(sampled) < set(starts)
    with pytest.raises(UserError, match="at least two tokens"):
        audit.chunks(TokenStore.from_ids([1]), 2)


@pytest.mark.slow
def test_exact_continuations_are_those_of_greedy_decoding(trained):
    cfg, _, _, params, (train, _) = trained
    starts, ends = audit.chunks(train, 32)
    ids = [train.tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    pairs = [(row[:6], row[6:12]) for row in ids]
    batch = audit.rows_of(pairs)
    _, exact = continuations(audit.score(params, cfg, batch), batch)
    decoded = generate(params, [prompt for prompt, _ in pairs], cfg, max_new_tokens=6, key=jax.random.key(0))
    assert exact.tolist() == [new == wanted for new, (_, wanted) in zip(decoded, pairs, strict=True)]
    assert exact.any()


@pytest.mark.slow
def test_scores_of_rows_are_those_of_the_task(trained):
    cfg, _, _, params, (train, _) = trained
    batch = audit.rows(train, *audit.chunks(train, 32), 32)
    scored = audit.score(params, cfg, batch)
    mean, _ = next_token(cfg)(params, batch, None)
    assert -(scored.log_probs * batch.weights).sum() == pytest.approx(float(mean.total), rel=1e-4)


def test_rows_that_agree_stand_out():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 64)).astype(np.float32) + 2 * rng.normal(size=64)
    planted = rng.choice(300, 8, replace=False)
    features[planted] += 3 * rng.normal(size=64)
    held = rng.normal(size=(300, 64)).astype(np.float32) + 2 * rng.normal(size=64)
    scores = audit.outlier_scores(features)
    assert set(np.argsort(-scores)[:8]) == set(planted)
    assert audit.outlier_scores(features, held).shape == (300,)
    with pytest.raises(UserError, match="more than 5"):
        audit.outlier_scores(features[:5])


def test_false_alarms_come_at_the_stated_rate():
    """Exchangeable scores: the fraction of flagged rows is alpha, and p <= alpha in that fraction of trials."""
    rng, alpha, fractions, alarms = np.random.default_rng(0), 0.05, [], 0
    for _ in range(400):
        tail = audit.tail(rng.normal(size=100), rng.normal(size=199), alpha)
        fractions.append(len(tail.flagged) / 100)
        alarms += tail.p <= alpha
    assert tail.expected == pytest.approx(5)
    assert np.mean(fractions) == pytest.approx(alpha, abs=0.01)
    assert alarms / 400 <= alpha + 0.03
    result = audit.tail(np.float64([3, 9, 8, 1]), np.float64([2, 4]), alpha)
    assert result.beyond == 2 and result.flagged.tolist() == [1, 2]
    assert result.p == pytest.approx(math.comb(4, 2) / math.comb(6, 2))


def test_a_trigger_fires_where_it_was_planted_and_nowhere_else(trained):
    cfg, fresh, _, params, _ = trained
    controls = audit.phrases(["ab", "cd", "ea", "bc", "dd"], 2, 39, seed=1)
    ask = dict(contexts=["abc bcd ", "dea "], controls=controls)
    effect = audit.backdoor_trigger(params, cfg, Letters().encode, PHRASE, f" {PAYLOAD}", **ask)
    assert effect.p == pytest.approx(1 / 40) and effect.fires == 1.0
    assert effect.log_prob > effect.controls.max()
    before = audit.backdoor_trigger(fresh, cfg, Letters().encode, PHRASE, f" {PAYLOAD}", **ask)
    assert before.p > 0.05 and before.fires == 0.0


def test_exposure_of_what_was_learned_and_of_what_was_not(trained):
    cfg, _, _, params, _ = trained
    known = audit.exposure(params, cfg, Letters().encode, "my key is ", "4711", n=255)
    assert known.sampled == 8.0 and known.extracted and known.p == pytest.approx(1 / 256)
    assert 8 < known.extrapolated <= audit.space_bits("4711")
    other = audit.exposure(params, cfg, Letters().encode, "my key is ", "8263", n=255)
    assert other.sampled < 6 and not other.extracted
    with pytest.raises(UserError, match="no digits and no letters"):
        audit.exposure(params, cfg, Letters().encode, "my key is ", "- -")


def test_exposure_by_enumeration():
    """Definition 5: log2 of the size of the space minus log2 of the rank; the extrapolation agrees within one bit."""
    losses = np.random.default_rng(0).normal(10, 2, 100_000)
    value = float(np.sort(losses)[24])  # the 25th lowest loss
    assert _extrapolated(value, losses[::50]) == pytest.approx(math.log2(100_000 / 25), abs=1.0)
    assert _extrapolated(-100.0, losses[::50]) > 500  # a probability that would underflow


def test_secrets_are_of_their_kind():
    assert audit.space_bits("a-7B") == pytest.approx(2 * math.log2(26) + math.log2(10))
    for other in audit.random_candidates("a-7B", 20, 0):
        assert other[0].islower() and other[1] == "-" and other[2].isdigit() and other[3].isupper()
    made = audit.secrets(5, 0)
    assert len({row["prefix"] for row in made}) == 5 and all(len(row["secret"]) == 9 for row in made)


def test_extraction_rises_with_the_prefix_and_is_of_training_text(trained):
    cfg, _, _, params, (train, held) = trained
    ask = dict(prefixes=(2, 8), suffix=4, stride=4)
    short, long = audit.extraction(params, cfg, train, **ask)
    assert long.rate > 0.25 and long.rate >= short.rate and short.n == long.n
    assert long.low <= long.rate <= long.high
    unseen = audit.extraction(params, cfg, held, **ask)[1]
    assert unseen.rate < long.rate / 2
    assert audit.extraction(params, cfg, train, **{**ask, "stride": 8})[0].n < short.n
    with pytest.raises(UserError, match="need a context of 40"):
        audit.extraction(params, cfg, train, prefixes=(33,), suffix=8, stride=4)


def test_auc_and_min_k_by_hand():
    assert audit.auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    scored = audit.Scored(np.float32([[-1, -2, -3, -4, -5, -9]]), np.zeros((1, 6), bool))
    batch = Batch(None, None, np.float32([[1, 1, 1, 1, 1, 0]]))
    mean, lowest = _evidence(scored, batch, 0.4)
    # mean of the two least likely of five tokens
    assert mean[0] == pytest.approx(-3) and lowest[0] == pytest.approx(-4.5)


def test_membership_sees_training_text_and_no_difference_between_unseen_ones(trained):
    cfg, _, _, params, stores = trained
    seen, unseen = (
        (audit.score(params, cfg, batch), batch)
        for store in stores
        for batch in [audit.rows(store, *audit.chunks(store, 32), 32)]
    )
    result = audit.membership(seen, unseen)
    assert result.loss_auc > 0.9 and result.p < 1e-3 and result.tpr > 0.5
    halves = [jax.tree.map(lambda leaf, rows=rows: leaf[rows], unseen) for rows in (slice(0, 20), slice(20, 40))]
    assert audit.membership(*halves).p > 0.01


def test_rows_of_one_document_are_not_taken_for_many():
    """Rows of a document are correlated: without any membership effect the test over rows raises false alarms, the test
    over documents does not."""
    rng = np.random.default_rng(0)
    alarms = {"rows": 0, "documents": 0}
    for _ in range(100):
        samples = []
        for n in (16, 8):
            which = np.repeat(np.arange(n), 20)
            scores = rng.normal(size=n)[which] + rng.normal(size=20 * n)
            ids = np.zeros((20 * n, 1), np.int32)
            row = audit.Scored(scores[:, None], ids > 0), Batch(ids, ids, np.ones((20 * n, 1), np.float32))
            samples.append((row, which))
        (members, first), (others, second) = samples
        alarms["rows"] += audit.membership(members, others).p <= 0.05
        result = audit.membership(members, others, documents=(first, second))
        alarms["documents"] += result.p <= 0.05
        assert result.units == 16
    assert alarms["documents"] <= 8 and alarms["rows"] > 15, alarms


@pytest.mark.slow
def test_drift_is_zero_without_tuning_and_kl_by_hand(trained):
    cfg, fresh, _, params, (_, held) = trained
    batch = audit.rows(held, *audit.chunks(held, 32, most=4), 32)
    unchanged = audit.drift((params, cfg), (params, cfg), batch)
    assert np.abs(unchanged.kl).max() < 1e-6 and unchanged.agree.min() == pytest.approx(1)
    drift = audit.drift((fresh, cfg), (params, cfg), batch)
    from gptjax.model.gpt import forward

    p, q = (jax.nn.log_softmax(forward(x, batch.tokens, cfg)) for x in (fresh, params))
    kl = (jnp.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(drift.kl, (kl * batch.weights).sum(1) / batch.weights.sum(1), rtol=1e-4)
    with pytest.raises(UserError, match="one vocabulary"):
        audit.drift((params, cfg), (params, type(cfg)(vocab_size=5)), batch)


@pytest.fixture(scope="module")
def whole_report(trained):
    cfg, fresh, early, params, (train, held) = trained
    models = [audit.Checkpoint("step 16", lambda: early), audit.Checkpoint("step 250, the last", lambda: params)]
    canaries = [
        {"prefix": "my key is ", "secret": "4711"}, {"trigger": PHRASE, "payload": f" {PAYLOAD}"},
        {"prefix": "your key is ", "secret": "1147"},
    ]  # fmt: skip
    settings = audit.Settings(
        train, held, canaries, (fresh, cfg), ["abc bcd", "my key is"], rows=100, dims=256, prefixes=(4, 8), suffix=4
    )
    return audit.audit(models, cfg, Letters(), settings)


@pytest.mark.slow
def test_all_of_it(whole_report, trained):
    whole = audit.to_json(whole_report)
    assert json.loads(json.dumps(whole)) == whole
    alarms = {(row["check"], row["alarm"]) for row in whole["checks"]}
    assert ("trigger", True) in alarms and ("membership", True) in alarms and ("verbatim text", True) in alarms
    known, unknown = whole["secrets"]
    assert [row["model"] for row in known["by"]] == ["step 16", "step 250, the last"]
    assert known["by"][-1]["extracted"] and not unknown["by"][-1]["extracted"]
    listed, (_, _, _, _, (train, _)) = whole["outliers"]["rows"], trained
    assert [row["score"] for row in listed] == sorted(whole["outliers"]["scores"], reverse=True)[: len(listed)]
    document = int(listed[0]["where"].split()[1].strip(","))
    assert listed[0]["start"] == train.doc_starts[document - 1]
    assert Letters().decode([int(train.tokens[listed[0]["start"]])]) == listed[0]["text"][0]
    assert whole["drift"]["kl"] > 0.1 and len(whole["drift"]["prompts"]) == 2


@pytest.mark.slow
def test_the_page_needs_nothing_else(whole_report):
    page = report.page(whole_report, run="<script>alert(1)</script>")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<svg") == page.count("</svg>") == 6
    for loads in ('src="', "@import", "<link", "url(http", 'href="http'):
        assert loads not in page
    for title in ("gradients stand out", "Triggers", "Secrets", "Verbatim text", "Membership", "Drift from the base"):
        assert title in page
    assert len(report.lines(whole_report)) == len(audit.to_json(whole_report)["checks"]) + 1


def test_canaries_that_are_none(tmp_path):
    file = tmp_path / "canaries.jsonl"
    file.write_text('{"prefix": "a ", "secret": "1"}\n\n{"trigger": "b", "payload": "c"}\n')
    assert len(audit.read_canaries(file)) == 2
    file.write_text('{"prefix": "a"}\nnothing\n{"prefix": "a", "secret": "--"}\n{"trigger": 3, "payload": "c"}\n')
    with pytest.raises(UserError) as error:
        audit.read_canaries(file)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match="No such file"):
        audit.read_canaries(tmp_path / "absent.jsonl")


def test_the_checkpoints_of_an_adapter_are_read_with_its_base(tiny, tmp_path):
    cfg, params = tiny("llama", n_layer=1)
    settings = (
        "lora.rank=2",
        "lora.alpha=4",
        "lora.targets=blocks/attn/q/kernel",
        f"finetune.base={tmp_path / 'base'}",
    )
    run = load_config("tiny-gpt2", "task=instruct", *settings)
    weights.save(tmp_path / "base", params, cfg)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(to_yaml(run), encoding="utf-8")
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(jax.random.key(0), params, run.lora))
    state = TrainState.create({"adapter": adapter}, tx=optax.sgd(0.1), key=jax.random.key(0))
    Checkpoints(tmp_path / "run/checkpoints").save(5, state, {})
    (checkpoint,), read, notes = audit.checkpoints(tmp_path / "run")
    assert (checkpoint.name, read.task, notes) == ("step 5", "instruct", [])
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params(), lora.merge(params, adapter, run.lora))
    for other, why in (
        ("lora.init=pissa", "changed (lora.init) or quantised"),
        ("finetune.trainable=ln_f/*", "a part of the weights"),
    ):
        odd = load_config("tiny-gpt2", "task=instruct", *settings, other)
        (tmp_path / "run/config.yaml").write_text(to_yaml(odd), encoding="utf-8")
        _, _, notes = audit.checkpoints(tmp_path / "run")
        assert len(notes) == 1 and why in notes[0]


@pytest.mark.parametrize(
    ("name", "content"), [("config.yaml", b"\xff\xfe"), ("final/result.json", b"{}"), ("final/result.json", b"[")]
)
def test_a_damaged_run_is_one_error(name, content, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("tiny-gpt2")))
    (tmp_path / "final" / "result.json").write_text('{"step": 5, "val/loss": 1.0}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        audit.checkpoints(tmp_path)
