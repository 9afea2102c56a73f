# %% [markdown]
# # 02 Data sampling: from ids to batches
#
# What you learn: how windows make inputs and targets; what is held out; why a batch here is a function of (seed, step)
# and what that is worth; documents that do not see each other; mixtures of sources; packing.
#
# What it costs: CPU 10 s, and half a minute where the plays have not been encoded yet (2 cores); v5e-1: nothing of it
# runs on the TPU, a CPU runtime is as good.

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
# A language model learns to say the next token at every place, so the targets are the inputs, one place later. With a
# stride of one window after another nothing is read twice; with stride 1 every place is seen in every position, and the
# same text is read `length` times, which on small texts is an invitation to learn it by heart.

# %%
tok = tokenizers.load("gpt2")
try:
    ids = tok.encode(assets.fetch("the-verdict").read_text(encoding="utf-8"))
    assert len(ids) == 5145
except UserError:  # no network: the first ids of that story, which the book prints
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

# %%
inputs, targets = data.windows(ids, 4, 4)
print(inputs[:8])
print(targets[:8])
assert inputs[:2].tolist() == [[40, 367, 2885, 1464], [1807, 3619, 402, 271]]
assert inputs[7].tolist() == [284, 3285, 326, 11] and targets[7].tolist() == [3285, 326, 11, 287]

# %% [markdown]
# How often each of 40 tokens is read under three strides (rows are windows):


# %%
def coverage(stride, n=40, length=8):
    places, _ = data.windows(np.arange(n), length, stride)
    grid = np.zeros((len(places), n))
    grid[np.arange(len(places))[:, None], places] = 1
    return grid


grids = {f"stride {s}: up to {coverage(s).sum(0).max():.0f} x": coverage(s) for s in (8, 4, 1)}
assert coverage(8).sum(0).max() == 1 and coverage(1).sum(0).max() == 8
show.maps(grids, x="token", y="window", size=3.6)

# %% [markdown]
# ## What is held out
# The loss on text that was trained on says little. Here whole documents are held out where there are enough of them:
# of 38 plays some are for validation, and nothing of them is seen. The book cuts its one story at 90 % of the
# characters. `data.prepare` reads, splits, learns the tokenizer, encodes once, and keeps the result in a cache that is
# named by the content of all that.

# %%
cfg = gptjax.load_config("shakespeare-char")
ready = data.prepare(cfg)
for line in data.describe(ready):
    print(line)
assert len(ready.train) > 8 * len(ready.val) and ready.train.tokens.dtype == np.uint16

# %% [markdown]
# The tokens lie in a memory-mapped file, two bytes each, so that a corpus of any size opens at once; a batch reads only
# its windows.

# %%
print(
    ready.train.tokens[:12], f"{ready.train.tokens.nbytes:,} bytes, a view of a", type(ready.train.tokens.base).__name__
)
assert isinstance(ready.train.tokens.base, np.memmap)
show.tokens(ready.tokenizer, ready.train.tokens[:160])

# %% [markdown]
# ## A batch is a function of (seed, step)
# There is no iterator, and so no state to lose: `loader.batch(step)` computes which windows belong to the step by a
# permutation that needs no table (a Feistel network). Stopping and going on, more hosts, or looking at the batch
# of step 31,337 alone all give the same tokens.

# %%
loader = data.Loader(ready.train, cfg.data, batch_size=16, context_length=64, seed=0, vocab_size=cfg.model.vocab_size)
batch = loader.batch(31_337)
again = data.Loader(
    ready.train, cfg.data, batch_size=16, context_length=64, seed=0, vocab_size=cfg.model.vocab_size
).batch(31_337)
print(batch.tokens.shape, batch.tokens.dtype, f"{loader.steps_per_epoch:,.1f} steps an epoch")
assert (batch.tokens == again.tokens).all()
assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()

# %% [markdown]
# Where the windows of two epochs start, 16 a step: every window once an epoch, in another order, and cut at another
# offset so that the same token stands at other positions. `order=sequential` is the line for comparison.

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
for axis, one, title in zip(axes, (in_order, shuffled), ("sequential", "shuffle"), strict=True):
    axis.scatter(np.repeat(np.arange(steps), 16), one.starts(0, steps), s=8)
    axis.axvline(n / 16, linestyle=":", color="gray")
    axis.set(title=title, xlabel="step (dotted: the second epoch begins)")
axes[0].set_ylabel("first token of the window")
plt.show()

# %% [markdown]
# ## Documents
# A window may hold the end of one document and the beginning of another. `segment_ids` say which token belongs to
# which, and everything follows from them: no token sees another document, and positions begin again. The token that
# ends a document is the last target there, and as an input the first of the next: a model learns how documents begin.

# %%
ids = np.array([7, 8, 9, 0, 3, 4, 5, 0, 6, 2, 0])  # 0 ends a document
store = data.TokenStore.from_ids(ids, doc_starts=(0, 4, 8))
row = gather(store, np.array([0]), 10, True)
for name, leaf in row._asdict().items():
    print(f"{name:12} {leaf[0]}")
assert row.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
assert row.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
assert row.weights[0].tolist() == [1] * 10
s = row.segment_ids[0]
sees = (s[:, None] == s[None, :]) & np.tri(10, dtype=bool)
labels = [str(i) for i in row.tokens[0]]
show.maps({"who sees whom": sees}, rows=labels, columns=labels, x="key", y="query", size=3.6)

# %% [markdown]
# ## Mixtures
# Several sources are drawn with probabilities $p_i \sim w_i^{\tau}$: a temperature below 1 draws small sources more
# often than their size says. The order is a fixed interleaving: of the first `n` samples each source has its share,
# give or take one, and any sample is found without walking through those before it.

# %%
tokens = np.array([1_000_000, 100_000, 10_000])
taus = np.linspace(0, 1, 21)
p = np.stack([mixture.shares(tokens, tau) for tau in taus])
assert np.allclose(p[0], 1 / 3) and np.allclose(p[-1], tokens / tokens.sum())
source, number = mixture.assign(np.arange(10_000), mixture.shares(tokens, 0.5))
counts = np.bincount(source)
print("of 10,000 samples:", counts, "  asked for:", (10_000 * mixture.shares(tokens, 0.5)).round(1))
assert np.abs(counts - 10_000 * mixture.shares(tokens, 0.5)).max() <= 2
named = {f"{n:,} tokens": (taus, p[:, k]) for k, n in enumerate(tokens)}
show.curves(named, x="temperature", y="share of the samples")

# %% [markdown]
# ## Packing
# Fine-tuning data are short texts of different lengths. One to a row wastes most of a batch on padding; packed they
# share rows, and the same `segment_ids` keep them apart. The places are found by first-fit-decreasing.

# %%
rng = np.random.default_rng(0)
lengths = np.clip(rng.lognormal(3.2, 0.7, 64).astype(int), 4, 128)
places = packing.first_fit(lengths, 128)
rows = 1 + max(r for r, _ in places)
padded, packed = np.full((64, 128), np.nan), np.full((rows, 128), np.nan)
for i, ((r, c), n) in enumerate(zip(places, lengths, strict=True)):
    padded[i, :n] = i
    packed[r, c : c + n] = i
shares = {name: np.isnan(a).mean() for name, a in (("padded", padded), ("packed", packed))}
print(f"padded: {len(padded)} rows, {shares['padded']:.0%} padding; packed: {rows} rows, {shares['packed']:.0%}")
assert shares["packed"] < 0.15 < shares["padded"] and np.isfinite(packed).sum() == lengths.sum()
titles = {f"{name}: {shares[name]:.0%} padding": a for name, a in (("padded", padded), ("packed", packed))}
show.maps(titles, x="place in the row", y="row", colours="viridis", size=4)

# %% [markdown]
# ## Exercises
# 1. With windows of 256 and stride 256, how many does The Verdict give (4,612 training tokens)? And with stride 1?
#    `gptjax.data.windows(np.arange(4612), 256, 256)`.
# 2. `data.mask_tokens=3` replaces some input tokens at random. Find the places where `loader.batch(0).tokens` differs
#    with and without. Are the targets changed? Why does that work against learning by heart?
# 3. Make the sequential loader above resume at step 3: what do you have to remember?
# 4. Put `document_mask=False` into `gather`. Which fields are left, and what does the model then read across?
# 5. Compare `first_fit` with taking the texts in their own order. How much more padding is there?
