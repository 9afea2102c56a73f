# %% [markdown]
# # 04 Attention: from a weighted mean to the heads of a real model
#
# What you learn: attention without weights, with weights, with a mask, with many heads, each step a line or two and
# equal to the package's function; why the scores are divided by a root; what a real model's heads look at.
#
# What it costs: CPU half a minute to a minute (2 cores), and a model of 98 MB from the package registry, once; v5e-1:
# not measured.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import gptjax
from gptjax import show, tokenizers
from gptjax.from_scratch import causal_mask, multi_head_attention, simple_attention
from gptjax.ops.attention import attention
from gptjax.ops.norm import rms_norm
from gptjax.ops.position import rope, rope_frequencies, rope_table

jax.config.update("jax_default_matmul_precision", "highest")  # or a TPU rounds what it multiplies to bfloat16

# %% [markdown]
# ## A mean, weighted by likeness
# Six words, each a made-up vector of three numbers (those of the book, so that the figures can be compared). The score
# of two words is the product of their vectors; softmax turns a word's scores into weights that sum to 1; the word
# becomes the mean of all words under its weights: its *context vector*.

# %%
words = ["Your", "journey", "starts", "with", "one", "step"]
x = jnp.array(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
)  # [T, D]
scores = x @ x.T  # [T, T]
weights = jax.nn.softmax(scores, axis=-1)
context = weights @ x  # [T, D]
print("scores of 'journey' ", scores[1].round(4))
print("its weights         ", weights[1].round(4), " sum", weights[1].sum())
print("its context vector  ", context[1].round(4))
np.testing.assert_allclose(scores[1], [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865], atol=5e-5)
np.testing.assert_allclose(weights[1], [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581], atol=5e-5)
np.testing.assert_allclose(context[1], [0.4419, 0.6515, 0.5683], atol=5e-5)
np.testing.assert_allclose(simple_attention(x), context, atol=1e-6)
show.maps({"weights": weights}, rows=words, columns=words, x="looked at", y="looking", size=4)

# %% [markdown]
# ## Query, key, value
# So far nothing can be learned, and a word looks most at what is like itself. Three matrices change that: as a *query*
# a word says what it looks for, as a *key* what it has to offer, as a *value* what it gives. Each is a product with
# `x`.

# %%
D, H = 3, 2
w_q, w_k, w_v = jax.random.uniform(jax.random.key(123), (3, D, H))
q, k, v = x @ w_q, x @ w_k, x @ w_v  # [T, H] each
trained = jax.nn.softmax(q @ k.T / H**0.5, axis=-1)
context = trained @ v  # [T, H]
print(context.shape, "weights sum to", trained.sum(-1).round(4))
assert context.shape == (6, 2) and jnp.allclose(trained.sum(-1), 1)

# %% [markdown]
# The scores are divided by $\sqrt{H}$: a product of two random vectors of length $H$ has standard deviation $\sqrt{H}$,
# and large scores make softmax give everything to one word, where its gradient vanishes. The share of the first of 64
# words:


# %%
def largest(H, scale):
    """Mean of the largest attention weight among 64 random keys, over 200 queries."""
    keys, queries = jax.random.normal(jax.random.key(H), (2, 200, H))
    return jax.nn.softmax(queries @ keys[:64].T * scale, axis=-1).max(-1).mean()


widths = [2, 4, 8, 16, 32, 64, 128, 256, 512]
divided = [largest(H, H**-0.5) for H in widths]
plain = [largest(H, 1.0) for H in widths]
print(f"at 512: divided {divided[-1]:.2f}, as it is {plain[-1]:.2f}")
assert divided[-1] < 0.3 < 0.9 < plain[-1]
show.curves(
    {"divided by sqrt(H)": (widths, divided), "as it is": (widths, plain)}, x="numbers of a head, H",
    y="largest weight of 64", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## No word sees what comes after it
# A model that predicts the next word must not look at it. The mask takes the later words out: before the softmax, with
# a score of minus infinity. The same weights come out if one masks after the softmax and divides by what is left.

# %%
mask = causal_mask(6, 6)
print(mask.astype(int))
scores = x @ x.T / D**0.5
before = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
after = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)
after = after / after.sum(-1, keepdims=True)
np.testing.assert_allclose(before, after, atol=1e-6)
ours = attention(*[x[None, :, None]] * 3)[0, :, 0]  # [B, T, N, H] with one row and one head
np.testing.assert_allclose(ours, before @ x, atol=1e-6)
show.maps({"without mask": jax.nn.softmax(scores, axis=-1), "causal": before}, rows=words, columns=words, size=4)

# %% [markdown]
# Is it true? The derivative says so: how much does what word `t` gets change with word `s`? Above the diagonal it is
# exactly zero.

# %%
jacobian = jax.jacobian(lambda x: attention(*[x[None, :, None]] * 3)[0, :, 0])(x)  # [T, D, S, D]
moved = jnp.abs(jacobian).sum((1, 3))
assert (moved[~mask] == 0).all() and (moved[mask] > 0).all()
show.maps({"how much output t depends on input s": moved}, rows=words, columns=words, x="s", y="t", size=4)

# %% [markdown]
# ## Dropout
# In training some weights are set to zero at random and the others grow, so that no word relies on one other alone. It
# needs a key; without one there is none, and nothing has to be "switched to evaluation".

# %%
options = dict(dropout=0.5, dropout_key=jax.random.key(0))
dropped = attention(*[x[None, :, None]] * 3, **options)[0, :, 0]
assert (attention(*[x[None, :, None]] * 3, **options)[0, :, 0] == dropped).all()  # the same key, the same numbers
keys = jax.random.split(jax.random.key(1), 4000)
mean = jax.vmap(lambda key: attention(*[x[None, :, None]] * 3, dropout=0.5, dropout_key=key)[0, :, 0])(keys).mean(0)
print("largest difference between the mean over 4,000 keys and no dropout:", float(jnp.abs(mean - ours).max()))
assert jnp.allclose(mean, ours, atol=0.05)

# %% [markdown]
# ## Many heads
# One softmax can look at one thing. So `D` is cut into `N` heads of `H` numbers, each with its own weights, and a last
# matrix mixes what they found. A loop over heads and the products of all heads at once are the same:

# %%
T, D, N = 6, 8, 4
H = D // N
kernels = jax.random.normal(jax.random.key(0), (4, D, D)) / D**0.5
w_q, w_k, w_v, w_o = kernels
z = jax.random.normal(jax.random.key(1), (1, T, D))  # [B, T, D]
one_by_one = []
for n in range(N):
    part = slice(n * H, (n + 1) * H)
    q, k, v = (z[0] @ w[:, part] for w in (w_q, w_k, w_v))  # [T, H]
    one_by_one.append(jax.nn.softmax(jnp.where(mask, q @ k.T / H**0.5, -jnp.inf), axis=-1) @ v)
by_loop = jnp.concatenate(one_by_one, axis=-1) @ w_o
at_once = multi_head_attention(z, w_q, w_k, w_v, w_o, N)
np.testing.assert_allclose(at_once[0], by_loop, atol=1e-5)
print("four heads, one after the other and at once:", at_once.shape)

# %% [markdown]
# How the products of all heads are made at once: the head is one more axis that `matmul` and `einsum` carry along. The
# book shows it with these numbers:

# %%
a = jnp.array([[0.2745, 0.6584, 0.2775, 0.8573], [0.8993, 0.0390, 0.9268, 0.7388], [0.7179, 0.7058, 0.9156, 0.4340]])
heads = jnp.stack([a, a * 2])  # [N, T, H]
products = jnp.einsum("NTH,NSH->NTS", heads, heads)
print(products[0].round(4))
np.testing.assert_allclose(products[0, 0], [1.3208, 1.1631, 1.2879], atol=1.5e-4)
np.testing.assert_allclose(products[1], 4 * products[0], rtol=1e-5)

# %% [markdown]
# ## Fewer keys, shorter views
# Variants change who shares what and who sees whom, not the formula. With grouped heads (GQA) several query heads read
# one key head, so the cache is smaller; a window shows each word the last few only. Equal to repeating and to masking:

# %%
key = jax.random.key(2)
q = jax.random.normal(key, (1, 12, 4, 8))  # 4 query heads
k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, 1, 12, 2, 8))  # 2 key heads
np.testing.assert_allclose(attention(q, k, v), attention(q, k.repeat(2, 2), v.repeat(2, 2)), atol=1e-5)

i = jnp.arange(12)
in_window = causal_mask(12, 12) & (i[:, None] - i[None] < 4)
scores = jnp.einsum("BTNH,BSNH->BNTS", q, k.repeat(2, 2)) / 8**0.5
by_mask = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(in_window, scores, -jnp.inf)), v.repeat(2, 2))
np.testing.assert_allclose(attention(q, k, v, window=4), by_mask, atol=1e-5)
two_documents = causal_mask(12, 12) & ((i[:, None] < 5) == (i[None] < 5))
pictures = {"causal": causal_mask(12, 12), "a window of 4": in_window, "two documents": two_documents}
show.maps(pictures, x="key", y="query", size=3.4)

# %% [markdown]
# ## What a real model's heads look at
# The first layer of SmolLM2-135M, made of the functions above: embed, norm, three products, turn by place (rope,
# notebook 03), scores, mask, softmax. Nine heads, three key heads.

# %%
params, cfg = gptjax.load("smollm2-135m-instruct")
smol = tokenizers.load("smollm2-135m-instruct")
text = "The cat sat on the mat because the cat was tired, and the mat was soft."
ids = smol.encode(text)
pieces = [smol.decode([i]) for i in ids]
layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])  # of the stack [L, ..]
N, K, H, T = cfg.n_head, cfg.n_kv_head, cfg.head_dim, len(ids)

embedded = params["wte"]["embedding"][jnp.array(ids)]
normed = rms_norm(embedded, layer["ln_1"]["scale"], cfg.norm_eps)[None]  # [1, T, D]
table = rope_table(jnp.arange(T), rope_frequencies(H, cfg.rope_base))
q, k, v = ((normed @ layer["attn"][name]["kernel"]).reshape(1, T, -1, H) for name in "qkv")  # [1, T, N or K, H]
q, k = rope(q, table), rope(k, table)
grouped = q.reshape(1, T, K, N // K, H)
scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k) / H**0.5
weights = jax.nn.softmax(jnp.where(causal_mask(T, T), scores, -jnp.inf), axis=-1)
by_weights = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(1, T, N, H)
np.testing.assert_allclose(by_weights, attention(q, k, v), atol=1e-4)
maps = weights.reshape(N, T, T)
show.maps({f"layer 0, head {n}": maps[n] for n in range(N)}, rows=pieces, columns=pieces, per_row=3, size=4)

# %% [markdown]
# How far back each head looks on average, and the share of its weight that goes to the word itself, the word before it,
# and the first word of the text: heads 2 and 5 keep most for the word itself, head 3 for the one before, head 8 looks
# at the first word, which many models use as a place to look at when there is nothing to see.

# %%
back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
far = (maps * back).sum(-1).mean(-1)
itself, before, first = (
    np.array([maps[n][:, 0].mean() if k is None else maps[n].diagonal(k).mean() for n in range(N)])
    for k in (0, -1, None)
)
for n in range(N):
    print(f"head {n}: {far[n]:.1f} words back; {itself[n]:.0%} itself, {before[n]:.0%} before, {first[n]:.0%} first")
assert first.argmax() == 8 and itself.argmax() in (2, 5) and before.argmax() == 3

# %% [markdown]
# ## What it costs
# Scores are `T * T` for every head, so twice the text costs four times the memory, where they are kept. The kernels
# that `attention` takes on a TPU (splash) and a GPU (cuDNN) never keep them: they go through the keys in blocks and
# carry the softmax along. Bytes of the scores of GPT-2's 12 heads, one row, float32:

# %%
lengths = np.array([256, 512, 1024, 2048, 4096, 8192])
mib = 12 * lengths**2 * 4 / 2**20
print(dict(zip(lengths.tolist(), mib.tolist(), strict=True)))
assert mib[2] == 48 and mib[5] == 64 * mib[2]
show.curves({"scores, one layer": (lengths, mib)}, x="tokens", y="MiB", log_x=True, log_y=True, marker="o")

# %% [markdown]
# ## Exercises
# 1. Replace softmax by dividing each row by its sum (after `exp` is left out: scores may be negative). What breaks?
# 2. Give `w_q` and `w_k` to gradient descent so that every word looks at the one before it. What do you need beside
#    `x`?
# 3. In the dropout cell, weights of a word sum to 1 only on average. Show it: what does word 1 get with one key?
# 4. Draw the maps of layer 15. You need the hidden state in front of it: notebook 12 reads it with `taps`; or apply
#    `gptjax.backbone` to a model with the first 15 layers only and undo nothing but the last norm.
# 5. With `window=4` and 3 layers, how far back can the last word's output depend on the first? Check with `jacobian`.
