"""Policy-gradient losses: against TRL's trainers on their own rollouts, numpy, and in their invariances."""

import functools
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import load, tree
from gptjax.errors import UserError
from gptjax.losses import RolloutBatch, advantages, policy, policy_switches, policy_terms, token_log_probs
from gptjax.losses.policy import KINDS
from gptjax.model.gpt import forward

LIMIT = 7  # max_new_tokens
PROMPTS, ANSWERS = (3, 1, 5, 2), (4, 2, 7, 1)  # lengths in tokens


def settings(kind, **others):
    return dict(max_new_tokens=LIMIT if kind == "dr_grpo" else None, **others)


def batch(width=12, filler=0, unused=0.0, reference=True):
    """Four rollouts with ragged prompts and answers.

    `filler` stands for the tokens and targets, and `unused` for the log-probabilities, that must not matter.
    """
    rng = np.random.default_rng(0)
    tokens, targets = np.full((2, 4, width), filler, np.int32)
    weights, segment_ids = np.zeros((4, width), np.float32), np.zeros((4, width), np.int32)
    old, before = np.full((2, 4, width), unused, np.float32)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids, span = rng.integers(0, 17, prompt + answer), slice(prompt - 1, prompt + answer - 1)
        tokens[i, : len(ids) - 1], segment_ids[i, : len(ids) - 1] = ids[:-1], 1
        targets[i, span], weights[i, span] = ids[prompt:], 1
        old[i, span], before[i, span] = -3 + 0.5 * rng.normal(size=(2, answer))
    gain = np.array([0.9, -1.2, 0.5, -0.3], np.float32)
    return RolloutBatch(tokens, targets, weights, segment_ids, None, old, before if reference else None, gain)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


def by_formula(kind, new, old, reference, mask, gain, clip, clip_high, kl):
    """The loss in float64, answer by answer, by the formulas of the papers."""
    policy_terms, penalties, lengths = [], [], []
    for row, present in enumerate(mask > 0):
        a, b, c = (x[row][present].astype(np.float64) for x in (new, old, reference))
        ratio = np.exp(a - b)
        if kind in ("gspo", "rloo"):
            ratio = np.array([np.prod(ratio) ** (1 / len(a) if kind == "gspo" else 1)])
        policy_terms.append(-np.minimum(ratio * gain[row], np.clip(ratio, 1 - clip, 1 + clip_high) * gain[row]))
        penalties.append(kl * ratio * (np.exp(c) / np.exp(a) - np.log(np.exp(c) / np.exp(a)) - 1))
        lengths.append(len(a))
    if kind in ("grpo", "reinforce_pp", "gspo"):
        return np.mean([term.mean() + penalty.mean() for term, penalty in zip(policy_terms, penalties, strict=True)])
    total = sum(term.sum() + penalty.sum() for term, penalty in zip(policy_terms, penalties, strict=True))
    return total / {"dr_grpo": len(mask) * LIMIT, "dapo": sum(lengths), "rloo": len(mask)}[kind]


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_their_formulas(model, kind):
    cfg, params = model
    data = batch()
    logits = np.asarray(forward(params, data.tokens, cfg, segment_ids=data.segment_ids), np.float64) / 0.7
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    new = np.take_along_axis(log_softmax, data.targets[..., None], -1)[..., 0]
    data = data._replace(old=new + 0.2 * data.old + 0.6)  # ratios on both sides of the clipping range
    want = by_formula(kind, new, data.old, data.reference, data.weights, data.advantages, 0.1, 0.3, 0.05)
    loss = policy(cfg, kind, **settings(kind, clip=0.1, clip_high=0.3, kl=0.05, temperature=0.7))
    mean, metrics = jax.jit(loss)(params, data, None)
    np.testing.assert_allclose(mean.value(), want, rtol=2e-5)

    mask = data.weights > 0
    difference, entropy = (new - data.old)[mask], -(np.exp(log_softmax) * log_softmax).sum(-1)
    np.testing.assert_allclose(metrics["kl"].value(), (np.exp(difference) - difference - 1).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"].value(), entropy[mask].mean(), rtol=1e-5)
    assert metrics["length"].value() == np.mean(ANSWERS) and metrics["length"].weight == 4
    if kind == "grpo":
        low, high = difference < np.log(0.9), difference > np.log(1.3)
        positive = np.broadcast_to(data.advantages[:, None] > 0, mask.shape)[mask]
        assert 0 < metrics["clipped"].value() == np.float32(np.where(positive, high, low).mean())
        np.testing.assert_allclose(metrics["ratio"].value(), np.exp(difference).mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_padding_do_not_matter(model, kind):
    """Neither the width of the rows nor the targets and log-probabilities outside answers change loss or gradient."""
    cfg, params = model
    loss = policy(cfg, kind, **settings(kind, clip=0.2, kl=0.1))
    gradient = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, None)[0].value()))
    expected, got = gradient(params, batch()), gradient(params, batch(16, filler=9, unused=np.nan))
    np.testing.assert_allclose(expected[0], got[0], rtol=1e-5)
    for path, leaf in tree.flatten(expected[1]).items():
        np.testing.assert_allclose(tree.flatten(got[1])[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up(model, kind):
    """Loss, gradient and metrics are those of the whole batch, though the parts differ in tokens; a row without an
    answer counts for nothing."""
    cfg, params = model
    whole = batch()
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), whole)
    loss = policy(cfg, kind, **settings(kind, clip=0.2, kl=0.1))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params, batch):
        mean, metrics = loss(params, batch, None)
        return mean.total, (mean, metrics)

    want = run(params, whole)
    parts = [run(params, jax.tree.map(lambda x, i=i: x[i : i + 1], empty)) for i in range(5)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), total, want)


@pytest.mark.parametrize("kind", KINDS)
def test_without_advantages_there_is_no_gradient(model, kind):
    data = batch()
    new, none = np.asarray(data.old + 0.3), np.zeros(4, np.float32)

    def total(new, gain, kl):
        s = policy_switches(kind, **settings(kind, kl=kl))
        return policy_terms(new, data.old, data.reference, data.weights, gain, s)[0].total

    gradient = jax.grad(total)
    assert not np.any(gradient(new, none, 0.0))
    assert np.all((gradient(new, none, 0.1) != 0) == (data.weights > 0))
    assert not np.any(np.asarray(gradient(new, data.advantages, 0.0))[data.weights == 0])


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_sampler_the_gradient_is_that_of_reinforce(kind):
    """With ratios of 1 each token's gradient is minus its answer's advantage, times the share of the token."""
    data = batch()
    s = policy_switches(kind, **settings(kind))
    mean, gradient = jax.value_and_grad(
        lambda new: policy_terms(new, data.old, None, data.weights, data.advantages, s)[0].total
    )(jnp.asarray(data.old))
    share = 1 if kind in ("dr_grpo", "dapo", "rloo") else 1 / np.array(ANSWERS)[:, None]
    np.testing.assert_allclose(gradient, -data.advantages[:, None] * data.weights * share, rtol=1e-6)
    assert np.isfinite(mean)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_ratios_have_a_finite_gradient(kind):
    data = batch()
    s = policy_switches(kind, **settings(kind, kl=0.1))
    far = jnp.asarray(data.old) + jnp.array([[300.0], [100.0], [-300.0], [-100.0]])

    def total(new):
        mean, metrics = policy_terms(new, data.old, data.reference, data.weights, np.ones(4, np.float32), s)
        return mean.total, metrics

    gradient, metrics = jax.grad(total, has_aux=True)(far)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, metrics)))


def test_log_probs_at_a_temperature(model):
    cfg, params = model
    data = batch()
    logits = forward(params, data.tokens, cfg, segment_ids=data.segment_ids)
    for temperature in (1.0, 0.6):
        want = jax.nn.log_softmax(logits / temperature)[np.arange(4)[:, None], np.arange(12), data.targets]
        got = token_log_probs(params, data, cfg, temperature=temperature)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --- advantages

REWARDS = np.array([[1, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [0, 2, -1, 0.5]], np.float32)


def test_advantages_are_their_formulas():
    r = REWARDS.astype(np.float64)
    centred = r - r.mean(1, keepdims=True)
    others = np.array([[row[j] - np.delete(row, j).mean() for j in range(4)] for row in r])
    want = dict.fromkeys(("grpo", "dapo", "gspo"), centred / (r.std(1, ddof=1, keepdims=True) + 1e-4))
    want |= {"dr_grpo": centred, "rloo": others, "reinforce_pp": (r - r.mean()) / (r.std(ddof=1) + 1e-4)}
    assert set(want) == set(KINDS)
    for kind, expected in want.items():
        got = advantages(REWARDS, kind)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_have_advantages_of_exactly_0(kind):
    assert not np.any(advantages(np.full((3, 7), 0.1, np.float32), kind))


def test_a_batch_of_single_answers():
    got = np.asarray(advantages(np.array([[1.0], [0.0], [0.5]], np.float32), "reinforce_pp"))
    np.testing.assert_allclose(got, [[0.9998], [-0.9998], [0]], atol=1e-5)


# --- settings


def test_default_clipping_ranges():
    ranges = {kind: policy_switches(kind, **settings(kind))[4:6] for kind in KINDS}
    assert ranges.pop("dapo") == (0.2, 0.28) and ranges.pop("gspo") == (3e-4, 4e-4)
    assert set(ranges.values()) == {(0.2, 0.2)}
    assert policy_switches("grpo", clip=0.1)[4:6] == policy_switches("gspo", clip=0.1)[4:6] == (0.1, 0.1)
    assert policy_switches("dapo", clip=0.1)[4:6] == (0.1, 0.28)
    assert policy_switches("dapo", clip_high=0.1)[4:6] == (0.2, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cfg: policy(cfg, "grop"), "kind: expected one of grpo, .* got 'grop'; did you mean grpo?"),
        (lambda cfg: policy(cfg, "dr_grpo"), "kind=dr_grpo .* pass max_new_tokens"),
        (lambda cfg: policy(cfg, clip=0.0, kl=-1.0), "clip: expected .* got 0.0\n(.*\n)?kl: expected .* got -1.0"),
        (lambda cfg: policy(cfg, temperature=0.0), "temperature: expected a number above 0, got 0.0"),
        (lambda cfg: policy(cfg, max_new_tokens=0), "max_new_tokens: expected 1 or more, got 0"),
        (lambda cfg: advantages(np.ones(4)), r"rewards: expected \[prompts, answers per prompt\], got shape \[4\]"),
        (lambda cfg: advantages(np.ones((4, 1)), "rloo"), "needs 2 or more answers per prompt, got 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model[0])


def test_a_penalty_needs_the_reference_model(model):
    cfg, params = model
    with pytest.raises(UserError, match=r"kl \(0.1\) needs .* reference=None"):
        policy(cfg, kl=0.1)(params, batch(reference=False), None)
    assert "kl_reference" not in policy(cfg)(params, batch(reference=False), None)[1]


# --- TRL

EVEN = dict(loss_type="grpo", scale_rewards="group", importance_sampling_level="token")
TRL = {  # case: our kind and settings, TRL's trainer and its settings
    "grpo": ("grpo", {}, "GRPO", EVEN),
    "grpo with a penalty": ("grpo", dict(kl=0.1), "GRPO", EVEN | dict(beta=0.1)),
    "grpo as in the paper": ("grpo", dict(kl=0.1), "GRPO", EVEN | dict(beta=0.1, use_bias_correction_kl=False)),
    "grpo with epsilon_high": ("grpo", dict(clip=0.1, clip_high=0.4), "GRPO",
                               EVEN | dict(epsilon=0.1, epsilon_high=0.4)),
    "dr_grpo": ("dr_grpo", dict(kl=0.2), "GRPO", EVEN | dict(loss_type="dr_grpo", scale_rewards="none", beta=0.2)),
    "dapo": ("dapo", dict(kl=0.05), "GRPO", EVEN | dict(loss_type="dapo", epsilon_high=0.28, beta=0.05)),
    "bnpo": ("dapo", dict(clip_high=0.2), "GRPO", EVEN | dict(loss_type="bnpo")),
    "gspo": ("gspo", dict(kl=0.1), "GRPO",
             EVEN | dict(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0.1)),
    "gspo with wide clipping": ("gspo", dict(clip=0.05), "GRPO",
                                EVEN | dict(importance_sampling_level="sequence", epsilon=0.05)),
    "rloo": ("rloo", {}, "RLOO", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL, and the folder of a tiny Llama with a tokenizer whose tokens are numbers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    trl = pytest.importorskip("trl", reason="extra 'parity' is not installed")
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for leaf in llama.parameters():
            leaf.add_(0.3 * torch.randn_like(leaf))
    llama.save_pretrained(folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 17)}}, unk_token="<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    return SimpleNamespace(trl=trl, torch=torch, folder=folder, tokenizer=tokenizer)


def rollouts_of(env, name, options, folder):
    """A trainer's rollouts, then its loss and gradients after the weights were changed a little.

    Returns the trainer, its inputs, the log-probability of each token, their gradient, and the loss.
    """
    from datasets import Dataset

    torch = env.torch
    args = getattr(env.trl, f"{name}Config")(
        output_dir=str(folder / "trl"), report_to=[], use_cpu=True, bf16=False, seed=0, temperature=0.7,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=LIMIT, steps_per_generation=1,
        num_iterations=2, model_init_kwargs=dict(dtype="float32"), disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = getattr(env.trl, f"{name}Trainer")(
        model=str(env.folder),
        args=args,
        processing_class=env.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["3"]}),
        reward_funcs=lambda completions, **_: [float(len(set(text.split())) % 3) for text in completions],
    )
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in ["3 4 5", "6"] for _ in range(4)])
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf in trainer.model.parameters():
            leaf.add_(0.02 * torch.randn_like(leaf))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    original, seen = trainer._get_per_token_logps_and_entropies, []

    def watched(*args, **kwargs):
        results = original(*args, **kwargs)
        results[0].retain_grad()
        seen.append(results[0])
        return results

    trainer._get_per_token_logps_and_entropies = watched
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return trainer, inputs, seen[0].detach().numpy(), seen[0].grad.numpy(), float(loss)


def our_rollouts(inputs):
    """TRL's rollouts as a `RolloutBatch`: prompts are padded in front there, and rows only at the end here."""
    arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    width = arrays["prompt_ids"].shape[1] + arrays["completion_ids"].shape[1]
    log_probs = {"old": arrays.get("old_per_token_logps"), "reference": arrays.get("ref_per_token_logps")}
    if "old_logps" in arrays:  # RLOO: those of whole answers
        log_probs["old"] = (arrays["old_logps"] / arrays["completion_mask"].sum(1))[:, None] * arrays["completion_mask"]
    rows = {name: np.zeros((8, width), np.int32) for name in ("tokens", "targets", "segment_ids")}
    rows |= {name: np.zeros((8, width), np.float32) for name in ("weights", *log_probs)}
    where = []
    for i in range(8):
        prompt, answer = (arrays[f"{x}_ids"][i][arrays[f"{x}_mask"][i] > 0] for x in ("prompt", "completion"))
        ids, span = np.concatenate([prompt, answer]), slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        for name, values in (("tokens", ids[:-1]), ("targets", ids[1:]), ("segment_ids", 1)):
            rows[name][i, : len(ids) - 1] = values
        rows["weights"][i, span] = 1
        for name, values in log_probs.items():
            if values is not None:
                rows[name][i, span] = values[i, : len(answer)]
        where.append((np.full(len(answer), i), np.arange(span.start, span.stop)))
    where = tuple(np.concatenate(x) for x in zip(*where, strict=True))
    if log_probs["reference"] is None:
        rows["reference"] = None
    return RolloutBatch(**rows, positions=None, advantages=arrays["advantages"]), where, arrays["completion_mask"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TRL)
def test_trl_computes_the_same(trl, case, tmp_path):
    """Advantages, loss, metrics and the gradient of every log-probability, on TRL's own rollouts."""
    kind, ours, name, theirs = TRL[case]
    trainer, inputs, log_probs, their_gradient, their_loss = rollouts_of(trl, name, theirs, tmp_path)
    data, where, mask = our_rollouts(inputs)
    rewards = np.array(next(iter(trainer._logs["rewards"].values())), np.float32).reshape(2, 4)
    assert np.ptp(rewards) > 0
    np.testing.assert_allclose(advantages(rewards, kind).reshape(-1), data.advantages, rtol=1e-5, atol=1e-6)

    new = np.zeros_like(data.old)
    new[where] = log_probs[mask]
    s = policy_switches(kind, **settings(kind, **ours))._replace(kl_ratio=theirs.get("use_bias_correction_kl", True))

    def value(new):
        mean, metrics = policy_terms(new, data.old, data.reference, data.weights, data.advantages, s)
        return mean.value(), metrics

    (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(jnp.asarray(new))
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[where], their_gradient[mask], rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(gradient)[data.weights == 0])
    reported = trainer._metrics["train"]
    if s.kl:
        np.testing.assert_allclose(metrics["kl_reference"].value(), reported["kl"][-1], rtol=1e-4)
    if s.ratio == "token":
        np.testing.assert_allclose(metrics["clipped"].value(), reported["clip_ratio/region_mean"][-1], rtol=1e-5)
    assert 0 < metrics["clipped"].value() < 1

    if case != "grpo with a penalty":
        return
    trainer.model.save_pretrained(tmp_path / "changed")
    params, cfg = load(tmp_path / "changed")
    whole = policy(cfg, kind, **settings(kind, **ours), temperature=0.7)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        mean, metrics = whole(params, data, None)
        return mean.value(), metrics

    (loss, metrics), gradient = run(params)
    np.testing.assert_allclose(loss, their_loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["entropy"].value(), reported["entropy"][-1], rtol=1e-4)
    want = trainer.model.get_output_embeddings().weight.grad.numpy().T
    np.testing.assert_allclose(gradient["lm_head"]["kernel"], want, rtol=1e-3, atol=1e-5)
