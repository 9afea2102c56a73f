# %% [markdown]
# # 05 Architecture: GPT-2 from its parts, its sizes, and the cache
#
# What you learn: what a block is made of and why it has shortcuts and norms; where the parameters of the four GPT-2
# sizes are; what the first loss must be; how text is written, and what the key-value cache saves.
#
# What it costs: CPU 2 to 4 minutes (2 cores); v5e-1: not measured.

# %%
import math
import os
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gptjax
from gptjax import show, tokenizers, tree
from gptjax.from_scratch import feed_forward
from gptjax.generation import chain, temperature, top_k
from gptjax.model.cache import init_cache
from gptjax.ops.activation import gelu
from gptjax.ops.loss import cross_entropy
from gptjax.ops.norm import layer_norm, rms_norm

jax.config.update("jax_default_matmul_precision", "highest")  # or a TPU rounds what it multiplies to bfloat16
SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a check that everything runs

# %% [markdown]
# ## Sizes
# A model is a frozen config and a tree of arrays. `abstract_params` gives the tree as shapes, in no memory, so the
# largest model can be counted on the smallest machine. The book's GPT-2 has a head of its own and no biases in q, k and
# v; GPT-2 as published uses the token table as its head ("tied").

# %%
book = gptjax.ModelConfig(vocab_size=50_257, qkv_bias=False, tie_embeddings=False)
shapes = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}
expected = {
    "124M": (163_009_536, 124_412_160, 621.83),
    "355M": (406_212_608, 354_749_440, 1549.58),
    "774M": (838_220_800, 773_891_840, 3197.56),
    "1558M": (1_637_792_000, 1_557_380_800, 6247.68),
}
sized = {}
print("         layers heads width      untied        tied   MiB in float32")
for name, (n_layer, n_head, d_model) in shapes.items():
    sized[name] = replace(book, n_layer=n_layer, n_head=n_head, n_kv_head=n_head, d_model=d_model, d_ff=4 * d_model)
    untied = tree.size(gptjax.abstract_params(sized[name]))
    tied = tree.size(gptjax.abstract_params(replace(sized[name], tie_embeddings=True)))
    mib = 4 * untied / 2**20
    print(f"{name:8} {n_layer:6} {n_head:5} {d_model:5} {untied:13,} {tied:13,} {mib:9.2f}")
    assert (untied, tied, round(mib, 2)) == expected[name]

# %% [markdown]
# Where they are. A block has $12 D^2$ in its matrices: four of $D \times D$ in attention, two of $D \times 4D$ in the
# feed-forward layer. In the small model half of all parameters are words, in the large one hardly any.

# %%
parts = {name: gptjax.abstract_params(cfg) for name, cfg in sized.items()}
share = {
    "token table": [tree.size(p["wte"]) for p in parts.values()],
    "places": [tree.size(p["wpe"]) for p in parts.values()],
    "attention": [tree.size(p["blocks"]["attn"]) for p in parts.values()],
    "feed-forward": [tree.size(p["blocks"]["mlp"]) for p in parts.values()],
    "head": [tree.size(p["lm_head"]) for p in parts.values()],
}
one_attention, one_feed_forward = share["attention"][0] // 12, share["feed-forward"][0] // 12
print(f"124M: one attention {one_attention:,}, one feed-forward layer {one_feed_forward:,}")
assert (one_attention, one_feed_forward) == (2_360_064, 4_722_432)
totals = np.array([tree.size(p) for p in parts.values()])
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
left = np.zeros(4)
for name, sizes in share.items():
    axis.barh(list(parts), sizes / totals, left=left, label=name)
    left += sizes / totals
axis.set(xlabel="share of the parameters")
axis.invert_yaxis()
axis.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.2))
plt.show()

# %% [markdown]
# ## The norm
# Each token's vector is brought to mean 0 and variance 1, then scaled and shifted by learned numbers. `eps` keeps the
# variance a little below 1: the book prints 0.9995 and 0.9997. RMS norm leaves the mean alone and saves a pass.

# %%
out = jnp.array([[0.2260, 0.3470, 0, 0.2216, 0, 0], [0.2133, 0.2394, 0, 0.5198, 0.3297, 0]])
normed = layer_norm(out)
print("mean", normed.mean(-1).round(4), " variance", normed.var(-1).round(4))
np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
np.testing.assert_allclose(normed.var(-1), [0.9995, 0.9997], atol=5e-5)
np.testing.assert_allclose((rms_norm(out) ** 2).mean(-1), 1, atol=5e-4)

# %% [markdown]
# ## The feed-forward layer
# Every token for itself: four times as wide, a bent line, back. GELU is ReLU with a round corner, so that slightly
# negative inputs keep a gradient.

# %%
line = jnp.linspace(-4, 4, 200)
bent = {"GELU": gelu(line), "ReLU": jax.nn.relu(line), "GELU's slope": jax.vmap(jax.grad(gelu))(line)}
tokens = jax.random.normal(jax.random.key(0), (2, 3, 768))  # [B, T, D]
w_up, w_down = jax.random.normal(jax.random.key(1), (768, 3072)), jax.random.normal(jax.random.key(2), (3072, 768))
y = feed_forward(tokens, w_up, w_down)
alone = feed_forward(tokens[:1, 1:2], w_up, w_down)
assert y.shape == (2, 3, 768)
np.testing.assert_allclose(y[:1, 1:2], alone, rtol=1e-3, atol=1e-2)  # no token hears of another
show.curves({name: (line, values) for name, values in bent.items()}, title="what bends the line")

# %% [markdown]
# ## Shortcuts
# A block adds to what comes in: `x = x + attention(norm(x))`, `x = x + feed_forward(norm(x))`. Without the `x +` the
# gradient must pass through every layer on its way back, and shrinks in each. How much of it arrives in front of each
# of twenty feed-forward layers? To read it off, a nudge of zero is added there: its gradient is what arrives.

# %%
depth, width = 20, 64
ups, downs = jax.random.normal(jax.random.key(0), (2, depth, width, 4 * width))
stack = {"up": ups * 0.7 / width**0.5, "down": downs.transpose(0, 2, 1) * 0.7 / (4 * width) ** 0.5}
start, direction = jax.random.normal(jax.random.key(1), (2, 8, width))


def through(nudges, shortcut):
    """All layers, then one number: a sum with random signs and sizes."""

    def layer(x, w_and_nudge):
        w, nudge = w_and_nudge
        x = x + nudge
        return shortcut * x + feed_forward(x, w["up"], w["down"]), None

    return (jax.lax.scan(layer, start, (stack, nudges))[0] * direction).sum()


arrives = {}
for name, shortcut in (("with shortcuts", 1.0), ("without", 0.0)):
    gradient = jax.grad(through)(jnp.zeros((depth, 8, width)), shortcut)
    arrives[name] = jnp.abs(gradient).mean((1, 2))
    print(f"{name:15} in front of layer 1: {arrives[name][0]:.1e}, of layer {depth}: {arrives[name][-1]:.1e}")
assert arrives["with shortcuts"][0] > 1e6 * arrives["without"][0]
layers = np.arange(1, depth + 1)
lines = {name: (layers, values) for name, values in arrives.items()}
show.curves(lines, x="layer", y="mean size of the gradient", log_y=True, marker="o")

# %% [markdown]
# ## All of it
# Ids in, logits out: for each place a number for each word of the vocabulary. The blocks are stacked: one leaf holds a
# matrix of all layers, and one `scan` runs them.

# %%
if SMOKE:
    cfg = gptjax.ModelConfig(vocab_size=50_257, n_layer=2, n_head=2, d_model=64, context_length=128)
else:
    cfg = replace(sized["124M"], tie_embeddings=True, qkv_bias=True)  # GPT-2 as published
params = gptjax.init_params(jax.random.key(123), cfg)
for path, leaf in tree.flatten(params).items():
    print(f"{path:28} {leaf.shape}")
gpt2 = tokenizers.load("gpt2")
batch = jnp.array([gpt2.encode("Every effort moves you"), gpt2.encode("Every day holds a")])
logits = gptjax.forward(params, batch, cfg)
print(batch.shape, "->", logits.shape, logits.dtype)
assert logits.shape == (2, 4, 50_257) and logits.dtype == jnp.float32

# %% [markdown]
# ## The first loss
# Before anything is learned the loss is known: guessing among $V$ words costs $\ln V$, and logits of variance $s^2$ add
# $s^2/2$. With PyTorch's initial weights and a head of its own the variance is 1/3, so the first loss is
# $\ln V + 1/6 = 10.99$; the book's run prints 10.9876 and 10.9811. A first loss far from this is a bug in the
# initialisation, and the cheapest test there is.

# %%
torch = replace(cfg, init="torch", tie_embeddings=False, qkv_bias=False)
T = 128 if SMOKE else 256
ids = jax.random.randint(jax.random.key(0), (4, T + 1), 0, 50_257)
first = {}
for name, one in (("init=torch, head of its own", torch), ("init=gpt2, tied head", cfg)):
    fresh = gptjax.init_params(jax.random.key(1), one)
    first[name] = float(cross_entropy(gptjax.forward(fresh, ids[:, :-1], one), ids[:, 1:]).value())
    print(f"{name:30} {first[name]:.3f}")
    del fresh
expected_loss = math.log(50_257) + 1 / 6
print(f"{'ln V + 1/6':30} {expected_loss:.3f}")
assert abs(expected_loss - 10.9916) < 5e-5
assert abs(first["init=torch, head of its own"] - expected_loss) < 0.05

# %% [markdown]
# ## It writes
# From random weights, and so nonsense: the likeliest word, put behind the text, read again. `generate` does it in one
# compiled loop; a sampler says how the word is picked.

# %%
prompt = gpt2.encode("Hello, I am")
assert prompt == [15496, 11, 314, 716]
key = jax.random.key(2)
(greedy,) = gptjax.generate(params, [prompt], cfg, max_new_tokens=6, key=key)
(drawn,) = gptjax.generate(params, [prompt], cfg, max_new_tokens=6, key=key, sampler=chain(temperature(0.8), top_k(50)))
print("likeliest:", gpt2.decode(prompt + greedy))
print("drawn:    ", gpt2.decode(prompt + drawn))
by_hand = list(prompt)
for _ in range(6):
    logits = gptjax.forward(params, jnp.array([by_hand]), cfg)
    by_hand.append(int(logits[0, -1].argmax()))
assert by_hand == prompt + greedy

# %% [markdown]
# Temperature and top-k on nine words, with the book's logits:

# %%
vocabulary = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
next_word = jnp.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
chances = {f"temperature {t:g}": jax.nn.softmax(temperature(t)(next_word))[0] for t in (1.0, 0.1, 5.0)}
chances["top 3"] = jax.nn.softmax(top_k(3)(next_word))[0]
print(f"pizza at temperature 5: {chances['temperature 5'][6]:.4f};  top 3: {chances['top 3'].round(4)}")
assert abs(chances["temperature 5"][6] - 0.0430) < 5e-5
np.testing.assert_allclose(chances["top 3"], [0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], atol=5e-5)
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for i, (name, p) in enumerate(chances.items()):
    axis.bar(np.arange(9) + 0.2 * i - 0.3, p, width=0.2, label=name)
axis.set_xticks(range(9), vocabulary)
axis.set(ylabel="probability")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The cache
# By hand above every word of the text is read again for each new one. But a word's keys and values never change, since
# it does not see what comes after it. So they are kept: `extend(params, tokens, cfg, cache)` reads only the new tokens.
# The logits are the same.

# %%
cache = init_cache(cfg, batch=1, length=16)
tokens = jnp.array([prompt + greedy])
whole = gptjax.forward(params, tokens, cfg)
read, cache = gptjax.extend(params, tokens[:, :4], cfg, cache)  # the prompt at once
pieces = [read]
for t in range(4, tokens.shape[1]):  # then one by one
    one, cache = gptjax.extend(params, tokens[:, t : t + 1], cfg, cache)
    pieces.append(one)
difference = float(jnp.abs(jnp.concatenate(pieces, 1) - whole).max())
print(f"{cache.length[0]} tokens in the cache, largest difference of a logit {difference:.1e}")
assert difference < 1e-3 and cache.length[0] == 10

# %% [markdown]
# What it saves, in words a second of this machine, and what it takes: $2 \cdot L \cdot K \cdot H$ numbers a token.
# GPT-2 124M's cache of 1,024 tokens in float32 has 72 MiB; with bfloat16 half, with int8 a little over a quarter.


# %%
def without_cache(params, tokens, n_prompt, n_new):
    """Greedy decoding that reads the whole row again for each word."""

    def one(i, tokens):
        logits = gptjax.forward(params, tokens, cfg)
        return tokens.at[:, n_prompt + i].set(logits[:, n_prompt + i - 1].argmax(-1))

    return jax.lax.fori_loop(0, n_new, one, tokens)


n_new = 16 if SMOKE else 64
slow = jax.jit(without_cache, static_argnums=(2, 3))
row = jnp.zeros((1, len(prompt) + n_new), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt))
ways = {
    "read all again": lambda: slow(params, row, len(prompt), n_new)[0, len(prompt) :].tolist(),
    "with the cache": lambda: gptjax.generate(params, [prompt], cfg, max_new_tokens=n_new, key=key)[0],
}
written, speed = {}, {}
for name, way in ways.items():
    way()  # compiles
    start = time.perf_counter()
    written[name] = way()
    speed[name] = n_new / (time.perf_counter() - start)
    print(f"{name}: {speed[name]:.1f} tokens/s")
assert written["read all again"] == written["with the cache"]
small = init_cache(sized["124M"], batch=1, length=1024)
mib = (small.k.nbytes + small.v.nbytes) / 2**20
print(f"cache of GPT-2 124M, 1,024 tokens: {mib:.0f} MiB")
assert mib == 2 * 12 * 12 * 64 * 1024 * 4 / 2**20 == 72

# %% [markdown]
# ## Other shapes of the same decoder
# GPT-2, Llama and a modern recipe differ in switches of one config. A switch left alone takes the value of `arch`, and
# each can be set by itself.

# %%
size = dict(vocab_size=1000, n_layer=2, n_head=4, d_model=64)
archs = {name: gptjax.ModelConfig(arch=name, **size) for name in ("gpt2", "llama", "modern")}
switches = ("position", "norm", "activation", "bias", "tie_embeddings", "qk_norm", "logit_softcap", "value_residual")
print(" " * 16 + "".join(f"{name:12}" for name in archs))
for switch in switches:
    print(f"{switch:16}" + "".join(f"{getattr(one, switch)!s:12}" for one in archs.values()))
for name, one in archs.items():
    weights = gptjax.init_params(jax.random.key(0), one)
    out = gptjax.forward(weights, jnp.arange(8)[None], one)
    print(f"{name}: {tree.size(weights):,} parameters")
    assert out.shape == (1, 8, 1000) and jnp.isfinite(out).all()

# %% [markdown]
# ## Exercises
# 1. Derive the parameter count of the 124M model from $L, D, V$ and the context, by hand, to the last one.
# 2. Replace `layer_norm` by `rms_norm` in a config (`norm="rmsnorm"`). How many parameters are fewer?
# 3. In the shortcuts cell put `rms_norm` in front of each feed-forward layer, with and without shortcuts. What does a
#    norm alone repair?
# 4. The tied head's first loss is not `ln V + 1/6`. Derive it: the final norm has variance 1, the table 0.02².
# 5. `init_cache(cfg, 1, dtype="int8")` rounds keys and values. How far do the logits move? When does the greedy text?
# 6. How does `speed` change with the length of the prompt, in both ways?
