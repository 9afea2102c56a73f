# %% [markdown]
# # 13 Rewards: learning from right and wrong
#
# What you learn: a model that imitates its data is as wrong as its data. If a function can tell right answers from
# wrong ones, the model can learn from its own answers. You let a small model answer sums, compute advantages and the
# policy gradient by hand, train with GRPO, provoke a collapse, vote instead of training, and run the task.
#
# What it costs: CPU 4 minutes (2 cores under other load); v5e-1: not measured. It downloads nothing.

# %%
import itertools
import json
import os
import random
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gptjax
from gptjax import losses, show
from gptjax.data import conversations, rollouts
from gptjax.generation.choose import majority
from gptjax.generation.decode import complete
from gptjax.generation.sampling import chain, temperature
from gptjax.tokenizers import chat

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## A model that is right sometimes
#
# Sums of two digits, answered by somebody careless: 60 % of the answers are right, the others are wrong by one. A small
# model learns them by instruction tuning. It cannot become better than its data: it learns to be wrong by one as often.

# %%
work = Path(tempfile.mkdtemp())
sums = [(a, b) for a, b in itertools.product(range(1, 10), repeat=2)]
chance = random.Random(0)


def record(a, b, answer):
    return json.dumps({"prompt": f"{a}+{b}", "response": str(answer)}) + "\n"


careless = [(a, b, a + b + chance.choice([0, 0, 0, 1, -1])) for a, b in sums * 40]
chance.shuffle(careless)
(work / "careless.jsonl").write_text("".join(record(*row) for row in careless))
(work / "right.jsonl").write_text("".join(record(a, b, a + b) for a, b in sums))

model = gptjax.ModelConfig(arch="llama", n_layer=2, n_head=4, d_model=64, d_ff=192, context_length=64, vocab_size=257)
gptjax.save(work / "random", gptjax.init_params(key, model), model, gptjax.tokenizers.load("bytes"))
STEPS = 8 if SMOKE else 400
result = gptjax.finetune(
    gptjax.load_config(
        "instruct", f"finetune.base={work / 'random'}", f"instruct.source={work / 'careless.jsonl'}",
        "instruct.style=phi3", "instruct.context_length=64", "instruct.compare=false", "finetune.trainable=all",
        "train.epochs=null", f"train.max_steps={STEPS}", "train.batch_size=64", "optim.lr=3e-3", "optim.warmup_steps=4",
        "train.eval_every=200", "sample.batch_size=64", "sample.max_new_tokens=4", f"run_dir={work / 'imitates'}",
    ),
    log=lambda line: None,
)  # fmt: skip
params, cfg = gptjax.load(work / "imitates")
tokenizer = chat.styled(result.tokenizer, "phi3")

# %% [markdown]
# ## Rollouts
#
# A *rollout* is an answer that the model draws itself. `complete` returns its tokens with the log-probability that each
# had when it was drawn. The reward is 1 for the right sum.

# %%
talks = conversations.read(str(work / "right.jsonl"))
questions, _ = rollouts.questions(talks, tokenizer, longest=56)
stop = gptjax.weights.stop_ids(tokenizer)
GROUP, T = 16, 64


def roll(params, picked, key):
    """Answers to the picked questions, `GROUP` to each, and their rewards [questions, GROUP]."""
    answers = complete(
        params, [questions[i].ids for i in picked], cfg, max_new_tokens=4, key=key, sampler=chain(temperature(1.0)),
        stop=stop, n=GROUP, logprobs=0,
    )  # fmt: skip
    wanted = [questions[i].talk.messages[-1]["content"] for i in picked for _ in range(GROUP)]
    rewards = [tokenizer.decode(a.tokens) == w for a, w in zip(answers, wanted, strict=True)]
    made = []
    for i, answer in zip(np.repeat(picked, GROUP), answers, strict=True):
        end = [answer.end] if answer.end else []  # the end token is part of the answer
        tokens = [*answer.tokens, *(token for token, _ in end)]
        made.append(rollouts.Rollout(questions[i].ids, tokens, [*answer.logprobs, *(value for _, value in end)]))
    return made, np.array(rewards, np.float32).reshape(len(picked), GROUP)


first = [talk.messages[0]["content"] for talk in talks].index("7+8")
made, rewards = roll(params, [first], key)
texts = [tokenizer.decode([t for t in rollout.tokens if t not in stop]) for rollout in made]
print("7+8:", ", ".join(f"{text} {'right' if r else '-'}" for text, r in zip(texts, rewards[0], strict=True)))
_, all_rewards = roll(params, range(len(questions)), key)
print(f"{all_rewards.mean():.1%} of {all_rewards.size:,} answers are right; the data had {0.6:.0%}")

# %% [markdown]
# The log-probabilities of the sampler are those of the trainer: the same functions compute both, one with a KV cache
# token by token, the other for whole rows.

# %%
batch = rollouts.rollout_batch(made, np.zeros(len(made)), T)
difference = jnp.abs((losses.token_log_probs(params, batch, cfg) - batch.old) * batch.weights).max()
print(f"largest difference of {int(batch.weights.sum())} log-probabilities: {float(difference):.1e}")
assert difference < 1e-4

# %% [markdown]
# ## Advantages
#
# How good is an answer *compared with the others to the same question*? GRPO subtracts the mean of the group and
# divides by its standard deviation. If all answers are right, or all wrong, every advantage is 0: nothing to learn.

# %%
example = jnp.array([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
centred = example - example.mean(1, keepdims=True)
by_hand = centred / (example.std(1, ddof=1, keepdims=True) + 1e-4)
np.testing.assert_allclose(by_hand, losses.advantages(example, "grpo"), atol=1e-6)
print(np.round(by_hand, 2))

# %% [markdown]
# ## The policy gradient
#
# An answer with advantage $A$ changes the parameters along $A \, \nabla \log p$. The loss that has this gradient is
# $-A\,r$ with the ratio $r = p / p_{old}$, which is 1 for fresh rollouts. *Clipping* keeps $r$ in $[1-\epsilon,
# 1+\epsilon]$ where several steps are made on the same rollouts: an answer that has become likely enough pulls no more.

# %%
switches = losses.policy_switches("grpo", clip=0.2)
ratios = jnp.linspace(0.5, 1.6, 111)


def term(ratio, advantage):
    one = jnp.ones((1, 1))
    return losses.policy_terms(jnp.log(ratio) * one, 0 * one, None, one, advantage * one[0], switches)[0].value()


by_formula = -jnp.minimum(ratios * 1.0, jnp.clip(ratios, 0.8, 1.2) * 1.0)
np.testing.assert_allclose(jax.vmap(lambda r: term(r, 1.0))(ratios), by_formula, atol=1e-6)
show.curves(
    {f"A = {a:+d}": (ratios, jax.vmap(lambda r, a=a: term(r, float(a)))(ratios)) for a in (1, -1)},
    x="ratio p / p_old", y="loss",
)  # fmt: skip

# %% [markdown]
# ## GRPO
#
# Draw, reward, compare, step. Nothing else is needed; the optimizer and the training step are those of every other
# task.


# %%
def grpo(params, rate, steps, *, updates=1, clip=0.2, questions_per_step=8):
    """Trains on `updates` steps per rollouts. Returns the params and the mean reward of each rollouts."""
    loss = losses.policy(cfg, "grpo", clip=clip, clip_high=clip)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = gptjax.TrainState.create(params, tx=tx, key=key)
    step = jax.jit(gptjax.make_train_step(loss, tx))
    curve = []
    for i in range(steps):
        picked = rollouts.draw(len(questions), i, questions_per_step, seed=0)
        made, rewards = roll(state.params, picked, jax.random.fold_in(key, i))
        batch = rollouts.rollout_batch(made, np.asarray(losses.advantages(rewards, "grpo")).reshape(-1), T)
        for _ in range(updates):
            state, _ = step(state, batch)
        curve.append(float(rewards.mean()))
    return state.params, curve


RL_STEPS = 3 if SMOKE else 120
tuned, curve = grpo(params, 3e-4, RL_STEPS)
_, after = roll(tuned, range(len(questions)), key)
print(f"right answers: {all_rewards.mean():.1%} before, {after.mean():.1%} after {RL_STEPS} steps")
assert SMOKE or after.mean() > all_rewards.mean() + 0.05

# %% [markdown]
# No right answer was ever shown. The model had the right answer among its own, and the reward said which it was.
#
# ## Collapse
#
# A high learning rate, many steps on the same rollouts and no clipping: the model runs away from the answers that it
# was rewarded for. Its answers become all alike or random; then all rewards are equal, and it never comes back.

# %%
_, collapsed = grpo(params, 1e-2, RL_STEPS, updates=8, clip=1.0)
print(f"last ten rollouts: {np.mean(curve[-10:]):.2f} and {np.mean(collapsed[-10:]):.2f}")
smooth = np.ones(5) / 5
x = np.arange(RL_STEPS - 4) if not SMOKE else np.arange(RL_STEPS)
show.curves(
    {
        name: (x, np.convolve(values, smooth, "valid") if not SMOKE else values)
        for name, values in (("3e-4, clipped", curve), ("1e-2, 8 updates, no clip", collapsed))
    },
    x="rollouts", y="mean reward",
)  # fmt: skip

# %% [markdown]
# `gptjax finetune reward` warns of this in a line of its log, keeps the best model in `best/`, and has `reward.kl` to
# hold the model near its base.
#
# ## Voting instead
#
# If right answers are more frequent than each wrong one, the most frequent of several answers is right more often than
# one answer is (self-consistency). It costs time at every question, but no training.

# %%

votes = {}
for n in (1, 4, 16):
    right = []
    for i, talk in enumerate(talks):
        made, _ = roll(params, [i], jax.random.fold_in(key, i))
        texts = [tokenizer.decode([t for t in rollout.tokens if t not in stop]) for rollout in made[:n]]
        right.append(texts[majority(texts).choice] == talk.messages[-1]["content"])
        if SMOKE and i > 3:
            break
    votes[n] = np.mean(right)
print({f"{n} answers": f"{share:.1%}" for n, share in votes.items()})

# %% [markdown]
# ## The task
#
# The same in one command: data, reward functions in processes of their own, rollouts, evaluation, checkpoints.

# %%
result = gptjax.finetune(
    gptjax.load_config(
        "reward", f"finetune.base={work / 'imitates'}", f"reward.source={work / 'right.jsonl'}", "reward.style=phi3",
        "reward.functions=[exact]", "reward.group=16", "reward.max_new_tokens=4", "reward.context_length=64",
        "finetune.trainable=all", f"train.max_steps={RL_STEPS}", "train.batch_size=128", "train.accumulation=1",
        "optim.lr=3e-4", "train.eval_every=60", "train.checkpoint_every=60", f"run_dir={work / 'rewarded'}",
    ),
    log=lambda line: None,
)  # fmt: skip
scores = json.loads((work / "rewarded" / "test.json").read_text())
print(f"unseen sums, greedy answers: {scores['before']['exact']:.0%} right before, {scores['exact']:.0%} after")
for line in (work / "rewarded" / "rollouts.jsonl").read_text().splitlines()[:3]:
    row = json.loads(line)
    print({name: row[name] for name in ("step", "prompt", "answer", "reward", "advantage")})

# %% [markdown]
# A function of your own is one line in the config: `reward.functions=[path/to/mine.py:score,length:20]`.
#
# ## Exercises
#
# 1. Why is the standard deviation in GRPO's advantage a matter of dispute? Compare the advantages of `grpo` and
#    `dr_grpo` for a question with one right answer in 16, and one with eight.
# 2. A reward of 1 for every answer of one digit, besides that for right sums: what happens, and to which sums?
# 3. Train with `rloo` in the place of `grpo`, from the same parameters and keys. Does the curve differ?
# 4. How many rollouts are wasted because all answers to a question are right, early and late in training?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# Dividing by the standard deviation gives questions that are nearly always or nearly never answered rightly as much
# weight as undecided ones: the single right answer counts 3.75, one of eight 0.97. Dr. GRPO leaves it at 0.94 and 0.5.
#
# ```python
# rare, even = np.zeros((1, 16)), np.zeros((1, 16))
# rare[0, 0], even[0, :8] = 1, 1
# for kind in ("grpo", "dr_grpo"):
#     print(kind, [round(float(losses.advantages(rewards, kind)[0, 0]), 2) for rewards in (rare, even)])
# ```
#
# ```text
# grpo [3.75, 0.97]
# dr_grpo [0.94, 0.5]
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The model learns what is rewarded, not what was meant: for sums of 10 and more, a wrong answer of one digit earns as
# much as the right answer of two. Their accuracy falls while the mean reward rises. Add rewards only if no answer can
# trade one for the other.
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Up to a factor, RLOO's advantage is that of Dr. GRPO: the mean of the others in place of the mean of all multiplies it
# by $n/(n-1)$. Adam divides such factors out, so the curves are much alike.
#
# ```python
# a = losses.advantages(example, "rloo")
# print(np.allclose(a, 4 / 3 * losses.advantages(example, "dr_grpo")))
# ```
#
# ```text
# True
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# Count the groups without variance. Late in training nearly all of them are all right, which is why DAPO draws other
# questions in their place (`reward.loss=dapo`), and why `rollout/flat` is in the metrics.
#
# ```python
# for name, rewards in (("before", all_rewards), ("after", after)):
#     print(name, f"{(np.ptp(rewards, 1) == 0).mean():.0%} of the questions")
# ```
#
# </details>
