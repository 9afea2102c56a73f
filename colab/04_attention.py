# %% [markdown]
# # 04 Attention: from a weighted mean to the heads of a real model
#
# What you learn: attention without parameters, with parameters, with a causal mask, and with many heads, each step in a
# line or two and equal to the package's function; why scores are divided by $\sqrt{H}$; what the heads of a real model
# attend to.
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

jax.config.update("jax_default_matmul_precision", "highest")  # by default a TPU multiplies in bfloat16

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## A mean, weighted by similarity
# Six words, each with a made-up vector of three values (those of the book, so that results can be compared). The score
# of two words is the inner product of their vectors. Softmax turns the scores of a word into weights that sum to 1, and
# the weighted mean of all vectors is the word's *context vector*.

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
show.maps({"attention weights": weights}, rows=words, columns=words, x="key", y="query", size=4)

# %% [markdown]
# ## Query, key, value
# So far there is nothing to learn, and each word attends most to words like itself. Three matrices change this: the
# *query* of a word states what it looks for, the *key* what it can be found by, the *value* what it contributes. Each
# is a product of `x` with one matrix.

# %%
D, H = 3, 2
w_q, w_k, w_v = jax.random.uniform(jax.random.key(123), (3, D, H))
q, k, v = x @ w_q, x @ w_k, x @ w_v  # [T, H] each
trained = jax.nn.softmax(q @ k.T / H**0.5, axis=-1)
context = trained @ v  # [T, H]
print(context.shape, "weights sum to", trained.sum(-1).round(4))
assert context.shape == (6, 2) and jnp.allclose(trained.sum(-1), 1)

# %% [markdown]
# The scores are divided by $\sqrt{H}$: the inner product of two random vectors of length $H$ has standard deviation
# $\sqrt{H}$, and large scores make softmax put all weight on one word, where its gradient vanishes. The largest of 64
# attention weights, with and without the division:


# %%
def largest(H, scale):
    """Mean of the largest attention weight among 64 random keys, over 200 queries."""
    keys, queries = jax.random.normal(jax.random.key(H), (2, 200, H))
    return jax.nn.softmax(queries @ keys[:64].T * scale, axis=-1).max(-1).mean()


widths = [2, 4, 8, 16, 32, 64, 128, 256, 512]
divided = [largest(H, H**-0.5) for H in widths]
undivided = [largest(H, 1.0) for H in widths]
print(f"at 512: divided {divided[-1]:.2f}, undivided {undivided[-1]:.2f}")
assert divided[-1] < 0.3 < 0.9 < undivided[-1]
show.curves(
    {"divided by sqrt(H)": (widths, divided), "undivided": (widths, undivided)}, x="head dimension H",
    y="largest of 64 attention weights", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## The causal mask
# A model that predicts the next word must not see it. The causal mask sets the scores of later words to minus infinity
# before the softmax. Masking after the softmax and renormalising gives the same weights.

# %%
mask = causal_mask(6, 6)
print(mask.astype(int))
scores = x @ x.T / D**0.5
before = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
after = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)
after = after / after.sum(-1, keepdims=True)
np.testing.assert_allclose(before, after, atol=1e-6)


def self_attention(x, **options):
    """[T, H] -> [T, H]: the package's attention [B, T, N, H] for one row and one head; x is query, key and value."""
    x = x[None, :, None]
    return attention(x, x, x, **options)[0, :, 0]


ours = self_attention(x)
np.testing.assert_allclose(ours, before @ x, atol=1e-6)
show.maps({"without mask": jax.nn.softmax(scores, axis=-1), "causal": before}, rows=words, columns=words, size=4)

# %% [markdown]
# The Jacobian confirms it: how much does output `t` change with input `s`? Above the diagonal the derivative is exactly
# zero.

# %%
jacobian = jax.jacobian(self_attention)(x)  # [T, D, S, D]
dependence = jnp.abs(jacobian).sum((1, 3))
assert (dependence[~mask] == 0).all() and (dependence[mask] > 0).all()
show.maps({"dependence of output t on input s": dependence}, rows=words, columns=words, x="s", y="t", size=4)

# %% [markdown]
# ## Dropout
# In training, dropout sets random attention weights to zero and scales up the rest, so that no word relies on a single
# other word. It needs a key; without a key there is no dropout, so there is no separate evaluation mode.

# %%
options = dict(dropout=0.5, dropout_key=jax.random.key(0))
dropped = self_attention(x, **options)
assert (self_attention(x, **options) == dropped).all()  # the same key drops the same weights
keys = jax.random.split(jax.random.key(1), 4000)
mean = jax.vmap(lambda key: self_attention(x, dropout=0.5, dropout_key=key))(keys).mean(0)
print("largest difference between the mean over 4,000 keys and no dropout:", float(jnp.abs(mean - ours).max()))
assert jnp.allclose(mean, ours, atol=0.05)

# %% [markdown]
# ## Multi-head attention
# One softmax can focus on one thing. So the `D` channels are split into `N` heads of `H` channels, each with its own
# attention weights, and an output projection mixes the heads. A loop over the heads gives the same result as one
# batched product:

# %%
T, D, N = 6, 8, 4
H = D // N
kernels = jax.random.normal(jax.random.key(0), (4, D, D)) / D**0.5
w_q, w_k, w_v, w_o = kernels
z = jax.random.normal(jax.random.key(1), (1, T, D))  # [B, T, D]
head_outputs = []
for n in range(N):
    channels = slice(n * H, (n + 1) * H)
    q, k, v = (z[0] @ w[:, channels] for w in (w_q, w_k, w_v))  # [T, H]
    scores = jnp.where(mask, q @ k.T / H**0.5, -jnp.inf)
    head_outputs.append(jax.nn.softmax(scores, axis=-1) @ v)
by_loop = jnp.concatenate(head_outputs, axis=-1) @ w_o
batched = multi_head_attention(z, w_q, w_k, w_v, w_o, N)
np.testing.assert_allclose(batched[0], by_loop, atol=1e-5)
print("four heads, in a loop and batched:", batched.shape)

# %% [markdown]
# The batched product treats the head as one more axis of `matmul` or `einsum`. The book demonstrates it with these
# values:

# %%
a = jnp.array([[0.2745, 0.6584, 0.2775, 0.8573], [0.8993, 0.0390, 0.9268, 0.7388], [0.7179, 0.7058, 0.9156, 0.4340]])
heads = jnp.stack([a, a * 2])  # [N, T, H]
products = jnp.einsum("NTH,NSH->NTS", heads, heads)
print(products[0].round(4))
np.testing.assert_allclose(products[0, 0], [1.3208, 1.1631, 1.2879], atol=1.5e-4)
np.testing.assert_allclose(products[1], 4 * products[0], rtol=1e-5)

# %% [markdown]
# ## Grouped-query attention and sliding windows
# These variants change which heads share keys and which positions are visible, not the formula. In grouped-query
# attention (GQA) several query heads share one key-value head, which shrinks the KV cache. A sliding window restricts
# each query to the last few positions. Both equal explicit repetition and masking:

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
pictures = {"causal": causal_mask(12, 12), "window of 4": in_window, "two documents": two_documents}
show.maps(pictures, x="key", y="query", size=3.4)

# %% [markdown]
# ## What the heads of a real model attend to
# The first layer of SmolLM2-135M, built from the functions above: embedding, norm, three projections, rotation by
# position (RoPE, notebook 03), scores, mask, softmax. It has nine query heads and three key-value heads.

# %%
params, cfg = gptjax.load("smollm2-135m-instruct")
smol = tokenizers.load("smollm2-135m-instruct")
text = "The cat sat on the mat because the cat was tired, and the mat was soft."
ids = smol.encode(text)
pieces = [smol.decode([i]) for i in ids]
layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])  # the first of the stacked layers [L, ..]
N, K, H, T = cfg.n_head, cfg.n_kv_head, cfg.head_dim, len(ids)

embedded = params["wte"]["embedding"][jnp.array(ids)]
normed = rms_norm(embedded, layer["ln_1"]["scale"], cfg.norm_eps)[None]  # [1, T, D]
table = rope_table(jnp.arange(T), rope_frequencies(H, cfg.rope_base))
q = (normed @ layer["attn"]["q"]["kernel"]).reshape(1, T, N, H)
k = (normed @ layer["attn"]["k"]["kernel"]).reshape(1, T, K, H)
v = (normed @ layer["attn"]["v"]["kernel"]).reshape(1, T, K, H)
q, k = rope(q, table), rope(k, table)
grouped = q.reshape(1, T, K, N // K, H)
scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k) / H**0.5
weights = jax.nn.softmax(jnp.where(causal_mask(T, T), scores, -jnp.inf), axis=-1)
by_weights = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(1, T, N, H)
np.testing.assert_allclose(by_weights, attention(q, k, v), atol=1e-4)
maps = weights.reshape(N, T, T)
show.maps({f"layer 0, head {n}": maps[n] for n in range(N)}, rows=pieces, columns=pieces, per_row=3, size=4)

# %% [markdown]
# The mean distance each head looks back, and the share of its weight on the word itself, the word before it, and the
# first word. Heads 2 and 5 attend most to the word itself, head 3 to the word before, and head 8 to the first word,
# which many models use as an attention sink when nothing else is relevant.

# %%
back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
distance = (maps * back).sum(-1).mean(-1)  # [N]
itself = np.array([maps[n].diagonal().mean() for n in range(N)])
before = np.array([maps[n].diagonal(-1).mean() for n in range(N)])
first = np.array(maps[:, :, 0].mean(-1))
for n in range(N):
    shares = f"{itself[n]:.0%} itself, {before[n]:.0%} the word before, {first[n]:.0%} the first word"
    print(f"head {n}: {distance[n]:.1f} words back; {shares}")
assert first.argmax() == 8 and itself.argmax() in (2, 5) and before.argmax() == 3

# %% [markdown]
# ## Memory
# The scores have `T * T` elements per head, so doubling the text quadruples the memory, if the scores are stored. The
# kernels that `attention` uses on a TPU (splash attention) and a GPU (cuDNN) never store them: they process the keys in
# blocks and update the softmax as they go. Size of the scores of GPT-2's 12 heads, one row, float32:

# %%
lengths = np.array([256, 512, 1024, 2048, 4096, 8192])
mib = 12 * lengths**2 * 4 / 2**20
print(dict(zip(lengths.tolist(), mib.tolist(), strict=True)))
assert mib[2] == 48 and mib[5] == 64 * mib[2]
show.curves({"scores, one layer": (lengths, mib)}, x="tokens", y="MiB", log_x=True, log_y=True, marker="o")

# %% [markdown]
# ## Exercises
# 1. Replace softmax by dividing each row of scores by its sum, without `exp`. What breaks?
# 2. Train `w_q` and `w_k` by gradient descent so that every word attends to the one before it. What do you need besides
#    `x`?
# 3. With dropout the weights of a word sum to 1 only on average. Show it: what are the sums for one key?
# 4. Draw the attention maps of layer 15. `gptjax.research.taps` has a function for it.
# 5. With `window=4` and 3 layers, how far back can the last output depend on the input? Check by the Jacobian.

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# Scores may be negative, so weights may be negative or larger than 1, and a sum near 0 makes them huge. The six vectors
# above are all positive and hide it; random ones do not.
#
# ```python
# signed = jax.random.normal(jax.random.key(5), (6, 3))
# scores = signed @ signed.T
# divided_by_sum = scores / scores.sum(-1, keepdims=True)
# print(f"smallest {divided_by_sum.min():.2f}, largest {divided_by_sum.max():.2f}")
# ```
#
# ```text
# smallest -10.17, largest 7.85
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# Positions: `x` does not encode the order. Matrices can fit these six vectors to a degree, but only with positions
# (here one-hot, beside each row) does the rule become exact.
#
# ```python
# import optax
#
# placed = jnp.concatenate([x, jnp.eye(6)], axis=1)  # [T, 3 + 6]
# before_it = jnp.maximum(jnp.arange(6) - 1, 0)  # the first word looks at itself
#
#
# def previous_loss(kernels, rows):
#     w_q, w_k = kernels
#     scores = (rows @ w_q) @ (rows @ w_k).T
#     return optax.softmax_cross_entropy_with_integer_labels(jnp.where(mask, scores, -1e30), before_it).mean()
#
#
# def train(rows):
#     kernels = jax.random.normal(jax.random.key(0), (2, rows.shape[1], 8)) * 0.1
#     optimizer = optax.adam(0.05)
#     state = optimizer.init(kernels)
#     gradient_fn = jax.jit(jax.grad(previous_loss))
#     for _ in range(200):
#         gradient = gradient_fn(kernels, rows)
#         updates, state = optimizer.update(gradient, state)
#         kernels = optax.apply_updates(kernels, updates)
#     return float(previous_loss(kernels, rows))
#
#
# print(f"x alone: {train(x):.2f} nats, with positions: {train(placed):.4f}")
# ```
#
# ```text
# x alone: 0.38 nats, with positions: 0.0000
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# With values of 1 the output is the sum of the weights. Each kept weight is doubled, so one key gives sums above and
# below 1, and many keys give 1 on average.
#
# ```python
# ones = jnp.ones((1, 6, 1, 3))
# query = x[None, :, None]
# sums = attention(query, query, ones, dropout=0.5, dropout_key=jax.random.key(0))[0, :, 0, 0]
# many_sums = jax.vmap(lambda key: attention(query, query, ones, dropout=0.5, dropout_key=key)[0, :, 0, 0])(keys)
# print("one key   ", np.asarray(sums).round(2))
# print("4,000 keys", np.asarray(many_sums.mean(0)).round(2))
# ```
#
# ```text
# one key    [0.   1.15 0.54 1.   0.85 1.14]
# 4,000 keys [1.   0.98 1.   1.   1.   1.  ]
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# `gptjax.research.taps.attention_maps` computes the maps of all layers, [L, B, N, T, S].
#
# ```python
# from gptjax.research import taps
#
# all_maps = taps.attention_maps(params, jnp.array([ids]), cfg)
# print(all_maps.shape, "layer 0 as above:", bool(jnp.allclose(all_maps[0, 0], maps, atol=1e-4)))
# fifteenth = {f"layer 15, head {n}": all_maps[15, 0, n] for n in range(cfg.n_head)}
# show.maps(fifteenth, rows=pieces, columns=pieces, per_row=3, size=4)
# ```
#
# ```text
# (30, 1, 9, 18, 18) layer 0 as above: True
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# Each layer reaches 3 words further back (a window of 4 includes the word itself), so three layers reach 9.
#
# ```python
# def three_layers(x):
#     for _ in range(3):
#         x = x + self_attention(x, window=4)
#     return x
#
#
# long = jax.random.normal(jax.random.key(0), (16, 3))
# depends = jnp.abs(jax.jacobian(three_layers)(long)).sum((1, 3))[-1] > 0
# print("the last word, 15, depends on words", jnp.flatnonzero(depends).tolist())
# ```
#
# ```text
# the last word, 15, depends on words [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
# ```
#
# </details>
