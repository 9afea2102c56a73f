# %% [markdown]
# # 02 Data sampling: from ids to batches
#
# What you learn: how windows of tokens become inputs and targets; which data is held out; why a batch here is a
# function of (seed, step) and what that gives; attention masks between documents; mixtures of sources; packing.
#
# What it costs: CPU 10 s, and half a minute if the plays have not been tokenized yet (2 cores); v5e-1: nothing here
# runs on the TPU, a CPU runtime does as well.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

import gptjax
from gptjax import assets, data, show, tokenizers
from gptjax.data import mixture, packing
from gptjax.data.loader import gather
from gptjax.errors import UserError

# %% [markdown]
# ## Windows
# A language model predicts the next token at every position, so the targets are the inputs shifted by one. With a
# stride of one window length no token is read twice. With stride 1 each token appears at every position, and the text
# is read `length` times, which encourages memorisation of small texts.

# %%
tok = tokenizers.load("gpt2")
try:
    ids = tok.encode(assets.fetch("the-verdict").read_text(encoding="utf-8"))
    assert len(ids) == 5145
except UserError:  # no network: the first ids of the story, as printed in the book
    ids = [
        40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138, 257, 7026, 15632, 438, 2016, 257, 922,
        5891, 1576, 438, 568, 340, 373, 645, 1049, 5975, 284, 502, 284, 3285, 326, 11, 287,
    ]  # fmt: skip
inputs, targets = data.windows(ids, 4, 1)
print(inputs[0], "->", targets[0])
for n in range(1, 5):
    print(f"{tok.decode(inputs[0][:n])!r:20} -> {tok.decode(targets[0][n - 1 : n])!r}")
assert inputs[0].tolist() == [40, 367, 2885, 1464] and targets[0].tolist() == [367, 2885, 1464, 1807]
assert inputs[1].tolist() == [367, 2885, 1464, 1807]

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %%
inputs, targets = data.windows(ids, 4, 4)
print(inputs[:8])
print(targets[:8])
assert inputs[:2].tolist() == [[40, 367, 2885, 1464], [1807, 3619, 402, 271]]
assert inputs[7].tolist() == [284, 3285, 326, 11] and targets[7].tolist() == [3285, 326, 11, 287]

# %% [markdown]
# How often each of 40 tokens is read at three strides (one row per window):


# %%
def coverage(stride, n=40, length=8):
    """[windows, n]: 1 where a window holds a token."""
    windows, _ = data.windows(np.arange(n), length, stride)
    grid = np.zeros((len(windows), n))
    grid[np.arange(len(windows))[:, None], windows] = 1
    return grid


grids = {f"stride {stride}: up to {coverage(stride).sum(0).max():.0f} x": coverage(stride) for stride in (8, 4, 1)}
assert coverage(8).sum(0).max() == 1 and coverage(1).sum(0).max() == 8
show.maps(grids, x="token", y="window", size=3.6)

# %% [markdown]
# ## Held-out data
# The loss on training data says little about generalisation. With enough documents, whole documents are held out: some
# of the 38 plays are the validation set, and the model sees no part of them. The book splits its one story at 90 % of
# the characters. `data.prepare` reads, splits, trains the tokenizer, encodes once, and caches the result under a hash
# of the content and the settings.

# %%
cfg = gptjax.load_config("shakespeare-char")
ready = data.prepare(cfg)
for line in data.describe(ready):
    print(line)
assert len(ready.train) > 8 * len(ready.val) and ready.train.tokens.dtype == np.uint16

# %% [markdown]
# The tokens are stored in a memory-mapped file, two bytes per token, so a corpus of any size opens at once; a batch
# reads only its own windows.

# %%
print(ready.train.tokens[:12])
print(f"{ready.train.tokens.nbytes:,} bytes, a view of a {type(ready.train.tokens.base).__name__}")
assert isinstance(ready.train.tokens.base, np.memmap)
show.tokens(ready.tokenizer, ready.train.tokens[:160])

# %% [markdown]
# ## A batch is a function of (seed, step)
# There is no iterator, so there is no iterator state to save. `loader.batch(step)` computes which windows belong to the
# step by a permutation that needs no table (a Feistel network). Resuming a run, using more hosts, or asking for the
# batch of step 31,337 alone all give the same tokens.

# %%
loader = data.Loader(ready.train, cfg.data, batch_size=16, context_length=64, seed=0, vocab_size=cfg.model.vocab_size)
batch = loader.batch(31_337)
same_loader = data.Loader(
    ready.train, cfg.data, batch_size=16, context_length=64, seed=0, vocab_size=cfg.model.vocab_size
)
print(batch.tokens.shape, batch.tokens.dtype, f"{loader.steps_per_epoch:,.1f} steps per epoch")
assert (batch.tokens == same_loader.batch(31_337).tokens).all()
assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()

# %% [markdown]
# The first tokens of the windows of two epochs, 16 per step. Each epoch reads every window once, in another order and
# at another offset, so that a token appears at other positions. `order=sequential` is shown for comparison.

# %%
small = data.TokenStore.from_ids(np.arange(6400) % 251)
shuffled = data.Loader(small, cfg.data, batch_size=16, context_length=64, seed=0, vocab_size=251)
in_order = data.Loader(
    small, replace(cfg.data, order="sequential"), batch_size=16, context_length=64, seed=0, vocab_size=251
)
n = shuffled.n_windows
samples = 2 * n - 2 * n % 16
steps = samples // 16
starts = shuffled.starts(0, steps)
first, second = (np.sort(starts[k * n : (k + 1) * n]) for k in (0, 1))
assert (np.diff(first) == 64).all() and len(first) == n  # each window once
assert (first[0] % 64) != (second[0] % 64)  # at another offset in the next epoch
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for axis, drawn, title in zip(axes, (in_order, shuffled), ("sequential", "shuffle"), strict=True):
    axis.scatter(np.repeat(np.arange(steps), 16), drawn.starts(0, steps), s=8)
    axis.axvline(n / 16, linestyle=":", color="gray")
    axis.set(title=title, xlabel="step (dotted: the second epoch begins)")
axes[0].set_ylabel("first token of the window")
plt.show()

# %% [markdown]
# ## Documents
# A window may hold the end of one document and the beginning of the next. `segment_ids` assign each token to a
# document: the attention mask keeps documents apart, and positions restart at 0. The token that ends a document is the
# last target of its segment; as an input it is the first token of the next segment, so the model learns how documents
# begin.

# %%
ids = np.array([7, 8, 9, 0, 3, 4, 5, 0, 6, 2, 0])  # 0 ends a document
store = data.TokenStore.from_ids(ids, doc_starts=(0, 4, 8))
row = gather(store, np.array([0]), 10, True)
for name, leaf in row._asdict().items():
    if leaf is not None:  # subtree_end is for rows that hold a token tree
        print(f"{name:12} {leaf[0]}")
assert row.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
assert row.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
assert row.weights[0].tolist() == [1] * 10
segments = row.segment_ids[0]
mask = (segments[:, None] == segments[None, :]) & np.tri(10, dtype=bool)
labels = [str(i) for i in row.tokens[0]]
show.maps({"attention mask": mask}, rows=labels, columns=labels, x="key", y="query", size=3.6)

# %% [markdown]
# ## Mixtures
# Several sources are sampled with probabilities $p_i \sim w_i^{\tau}$, where $w_i$ is the size of source $i$: a
# temperature $\tau$ below 1 samples small sources more often. The order is a deterministic interleaving: among the
# first `n` samples each source has its share to within one, and any sample can be located without enumerating those
# before it.

# %%
tokens = np.array([1_000_000, 100_000, 10_000])
temperatures = np.linspace(0, 1, 21)
p = np.stack([mixture.shares(tokens, temperature) for temperature in temperatures])
assert np.allclose(p[0], 1 / 3) and np.allclose(p[-1], tokens / tokens.sum())
source, number = mixture.assign(np.arange(10_000), mixture.shares(tokens, 0.5))
counts = np.bincount(source)
print("of 10,000 samples:", counts, "  expected:", (10_000 * mixture.shares(tokens, 0.5)).round(1))
assert np.abs(counts - 10_000 * mixture.shares(tokens, 0.5)).max() <= 2
lines = {f"{n:,} tokens": (temperatures, p[:, k]) for k, n in enumerate(tokens)}
show.curves(lines, x="temperature", y="share of the samples")

# %% [markdown]
# ## Packing
# Fine-tuning data are short texts of different lengths. One text per row wastes most of a batch on padding. Packing
# puts several texts into a row and separates them by `segment_ids`; first-fit-decreasing bin packing chooses the rows.

# %%
rng = np.random.default_rng(0)
lengths = np.clip(rng.lognormal(3.2, 0.7, 64).astype(int), 4, 128)
locations = packing.first_fit(lengths, 128)
rows = 1 + max(row for row, _ in locations)
padded = np.full((64, 128), np.nan)
packed = np.full((rows, 128), np.nan)
for i, ((row, column), length) in enumerate(zip(locations, lengths, strict=True)):
    padded[i, :length] = i
    packed[row, column : column + length] = i
shares = {name: np.isnan(a).mean() for name, a in (("padded", padded), ("packed", packed))}
print(f"padded: {len(padded)} rows, {shares['padded']:.0%} padding; packed: {rows} rows, {shares['packed']:.0%}")
assert shares["packed"] < 0.15 < shares["padded"] and np.isfinite(packed).sum() == lengths.sum()
titles = {f"{name}: {shares[name]:.0%} padding": a for name, a in (("padded", padded), ("packed", packed))}
show.maps(titles, x="position in the row", y="row", colours="viridis", size=4)

# %% [markdown]
# ## Exercises
# 1. How many windows of 256 tokens do 4,612 training tokens (The Verdict) give with stride 256? And with stride 1? Use
#    `gptjax.data.windows(np.arange(4612), 256, 256)`.
# 2. `data.mask_tokens=3` replaces three input tokens per row at random. Find the positions where
#    `loader.batch(0).tokens` differs with and without it. Do the targets change? Why does it reduce memorisation?
# 3. Resume the sequential loader above at step 3: which state do you have to save?
# 4. Pass `False` for the document mask (the last argument) to `gather`. Which fields remain, and what does the model
#    see?
# 5. Compare `first_fit` with packing the texts in their own order. How much more padding is there?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# With stride 256 there are 18 windows: $\lfloor (4612 - 1) / 256 \rfloor$, because a window needs one token more than
# its length for the last target. With stride 1 there are $4612 - 256 = 4356$.
#
# ```python
# for stride in (256, 1):
#     print(stride, len(data.windows(np.arange(4612), 256, stride)[0]))
# ```
#
# ```text
# 256 18
# 1 4356
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# Three inputs in every row of 64 change, one in each third of the row; the targets do not. The model must predict the
# next token although its context is sometimes wrong, so it cannot rely on one remembered sequence.
#
# ```python
# noisy = data.Loader(
#     ready.train, replace(cfg.data, mask_tokens=3), batch_size=16, context_length=64, seed=0,
#     vocab_size=ready.tokenizer.vocab_size,
# )
# plain, masked = loader.batch(0), noisy.batch(0)
# changed = plain.tokens != masked.tokens
# per_row = set(changed.sum(1).tolist())
# print(f"inputs changed per row: {per_row}; targets changed: {(plain.targets != masked.targets).any()}")
# ```
#
# ```text
# inputs changed per row: {3}; targets changed: False
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Only the step: a batch depends on the seed, the settings and the step.
#
# ```python
# resumed = data.Loader(
#     small, replace(cfg.data, order="sequential"), batch_size=16, context_length=64, seed=0, vocab_size=251
# )
# print((resumed.batch(3).tokens == in_order.batch(3).tokens).all())
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
# Tokens and targets remain. Without segments and positions the model attends across documents, and the positions run
# on.
#
# ```python
# row = gather(store, np.array([0]), 10, False)
# for name, leaf in row._asdict().items():
#     print(f"{name:12} {None if leaf is None else leaf[0]}")
# ```
#
# ```text
# tokens       [7 8 9 0 3 4 5 0 6 2]
# targets      [8 9 0 3 4 5 0 6 2 0]
# weights      None
# segment_ids  None
# positions    None
# subtree_end  None
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# In their own order the texts need three more rows.
#
# ```python
# def rows_in_order(lengths, row_length):
#     """Starts a new row where a text does not fit in the current one."""
#     n_rows = 1
#     used = 0
#     for length in lengths:
#         if used + length > row_length:
#             n_rows += 1
#             used = 0
#         used += length
#     return n_rows
#
#
# for name, n_rows in (("first-fit-decreasing", rows), ("in order", rows_in_order(lengths, 128))):
#     print(f"{name}: {n_rows} rows, {1 - lengths.sum() / (n_rows * 128):.0%} padding")
# ```
#
# ```text
# first-fit-decreasing: 16 rows, 3% padding
# in order: 19 rows, 19% padding
# ```
#
# </details>
