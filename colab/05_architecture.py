# %% [markdown]
# # 05 Architecture: GPT-2 from its parts, its sizes, and the KV cache
#
# What you learn: what a transformer block consists of and why it has residual connections and norms; where the
# parameters of the four GPT-2 sizes are; what the first loss must be; how text is generated, and what the KV cache
# saves.
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

jax.config.update("jax_default_matmul_precision", "highest")  # by default a TPU multiplies in bfloat16
SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## Sizes
# A model is a frozen config and a pytree of arrays. `abstract_params` returns the tree with shapes and dtypes only, so
# the largest model can be counted without allocating it. The book's GPT-2 has an untied head and no biases in q, k and
# v; the published GPT-2 uses the token embedding as its head (tied).

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
# The matrices of a block have $12 D^2$ parameters: four of $D \times D$ in attention, two of $D \times 4D$ in the
# feed-forward layer. In the small model half of all parameters are token embeddings and head, in the large one few are.

# %%
models = {name: gptjax.abstract_params(cfg) for name, cfg in sized.items()}
counts = {
    "token embedding": [tree.size(model["wte"]) for model in models.values()],
    "positions": [tree.size(model["wpe"]) for model in models.values()],
    "attention": [tree.size(model["blocks"]["attn"]) for model in models.values()],
    "feed-forward": [tree.size(model["blocks"]["mlp"]) for model in models.values()],
    "head": [tree.size(model["lm_head"]) for model in models.values()],
}
attention_size, feed_forward_size = counts["attention"][0] // 12, counts["feed-forward"][0] // 12
print(f"124M: attention {attention_size:,}, feed-forward layer {feed_forward_size:,} per block")
assert (attention_size, feed_forward_size) == (2_360_064, 4_722_432)
totals = np.array([tree.size(model) for model in models.values()])
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
left = np.zeros(4)
for name, sizes in counts.items():
    axis.barh(list(models), sizes / totals, left=left, label=name)
    left += sizes / totals
axis.set(xlabel="share of the parameters")
axis.invert_yaxis()
axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Layer norm
# Layer norm gives each token's vector mean 0 and variance 1, then applies a learned scale and shift per channel. `eps`
# keeps the variance slightly below 1: the book prints 0.9995 and 0.9997. RMS norm does not subtract the mean, which
# saves a pass.

# %%
out = jnp.array([[0.2260, 0.3470, 0, 0.2216, 0, 0], [0.2133, 0.2394, 0, 0.5198, 0.3297, 0]])
normed = layer_norm(out)
print("mean", normed.mean(-1).round(4), " variance", normed.var(-1).round(4))
np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
np.testing.assert_allclose(normed.var(-1), [0.9995, 0.9997], atol=5e-5)
np.testing.assert_allclose((rms_norm(out) ** 2).mean(-1), 1, atol=5e-4)

# %% [markdown]
# ## The feed-forward layer
# It acts on each token separately: a projection to four times the width, a nonlinearity, a projection back. GELU is a
# smooth ReLU, so slightly negative inputs still get a gradient.

# %%
line = jnp.linspace(-4, 4, 200)
activations = {"GELU": gelu(line), "ReLU": jax.nn.relu(line), "GELU's slope": jax.vmap(jax.grad(gelu))(line)}
tokens = jax.random.normal(jax.random.key(0), (2, 3, 768))  # [B, T, D]
w_up = jax.random.normal(jax.random.key(1), (768, 3072))
w_down = jax.random.normal(jax.random.key(2), (3072, 768))
y = feed_forward(tokens, w_up, w_down)
alone = feed_forward(tokens[:1, 1:2], w_up, w_down)
assert y.shape == (2, 3, 768)
np.testing.assert_allclose(y[:1, 1:2], alone, rtol=1e-3, atol=1e-2)  # independent of the other tokens
show.curves({name: (line, values) for name, values in activations.items()}, title="Activation functions")

# %% [markdown]
# ## Residual connections
# A block adds to its input: `x = x + attention(norm(x))`, `x = x + feed_forward(norm(x))`. Without the `x +` the
# gradient passes through every layer on its way back and shrinks in each. To measure how much of it reaches the input
# of each of twenty feed-forward layers, we add a zero perturbation there: the gradient with respect to the perturbation
# is the gradient that arrives.

# %%
depth, width = 20, 64
ups, downs = jax.random.normal(jax.random.key(0), (2, depth, width, 4 * width))
stack = {"up": ups * 0.7 / width**0.5, "down": downs.transpose(0, 2, 1) * 0.7 / (4 * width) ** 0.5}
start, direction = jax.random.normal(jax.random.key(1), (2, 8, width))


def output(perturbations, residual):
    """All layers, then a scalar: the product with a random vector. residual: 1.0 with, 0.0 without the connection."""

    def layer(x, weights_and_perturbation):
        weights, perturbation = weights_and_perturbation
        x = x + perturbation
        return residual * x + feed_forward(x, weights["up"], weights["down"]), None

    last, _ = jax.lax.scan(layer, start, (stack, perturbations))
    return (last * direction).sum()


sizes = {}
for name, residual in (("with residuals", 1.0), ("without", 0.0)):
    gradient = jax.grad(output)(jnp.zeros((depth, 8, width)), residual)
    sizes[name] = jnp.abs(gradient).mean((1, 2))
    print(f"{name:15} at the input of layer 1: {sizes[name][0]:.1e}, of layer {depth}: {sizes[name][-1]:.1e}")
assert sizes["with residuals"][0] > 1e6 * sizes["without"][0]
layers = np.arange(1, depth + 1)
lines = {name: (layers, values) for name, values in sizes.items()}
show.curves(lines, x="layer", y="mean absolute gradient", log_y=True, marker="o")

# %% [markdown]
# ## The whole model
# Ids in, logits out: at each position one logit per token of the vocabulary. The blocks are stacked: one leaf holds the
# matrices of all layers, and one `scan` runs over them.

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
# Before training the loss is known: a uniform guess among $V$ tokens costs $\ln V$, and logits with variance $s^2$ add
# $s^2/2$. With PyTorch's default initialisation and an untied head the variance is 1/3, so the first loss is
# $\ln V + 1/6 = 10.99$; the book's run prints 10.9876 and 10.9811. A first loss far from this value indicates a wrong
# initialisation, and this is the cheapest test of it.

# %%
torch = replace(cfg, init="torch", tie_embeddings=False, qkv_bias=False)
T = 128 if SMOKE else 256
ids = jax.random.randint(jax.random.key(0), (4, T + 1), 0, 50_257)
first = {}
for name, model_cfg in (("init=torch, untied head", torch), ("init=gpt2, tied head", cfg)):
    fresh = gptjax.init_params(jax.random.key(1), model_cfg)
    logits = gptjax.forward(fresh, ids[:, :-1], model_cfg)
    first[name] = float(cross_entropy(logits, ids[:, 1:]).value())
    print(f"{name:30} {first[name]:.3f}")
    del fresh, logits
expected_loss = math.log(50_257) + 1 / 6
print(f"{'ln V + 1/6':30} {expected_loss:.3f}")
assert abs(expected_loss - 10.9916) < 5e-5
assert abs(first["init=torch, untied head"] - expected_loss) < 0.05

# %% [markdown]
# ## Generation
# The weights are random, so the text is nonsense. Greedy decoding appends the most likely token and repeats. `generate`
# runs this as one compiled loop; a sampler chooses the token from the logits.

# %%
prompt = gpt2.encode("Hello, I am")
assert prompt == [15496, 11, 314, 716]
key = jax.random.key(2)
(greedy,) = gptjax.generate(params, [prompt], cfg, max_new_tokens=6, key=key)
sampler = chain(temperature(0.8), top_k(50))
(sampled,) = gptjax.generate(params, [prompt], cfg, max_new_tokens=6, key=key, sampler=sampler)
print("greedy: ", gpt2.decode(prompt + greedy))
print("sampled:", gpt2.decode(prompt + sampled))
by_hand = list(prompt)
for _ in range(6):
    logits = gptjax.forward(params, jnp.array([by_hand]), cfg)
    by_hand.append(int(logits[0, -1].argmax()))
assert by_hand == prompt + greedy

# %% [markdown]
# Temperature and top-k on nine tokens, with the book's logits:

# %%
vocabulary = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
next_word = jnp.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
chances = {f"temperature {t:g}": jax.nn.softmax(temperature(t)(next_word))[0] for t in (1.0, 0.1, 5.0)}
chances["top 3"] = jax.nn.softmax(top_k(3)(next_word))[0]
print(f"pizza at temperature 5: {chances['temperature 5'][6]:.4f};  top 3: {chances['top 3'].round(4)}")
assert abs(chances["temperature 5"][6] - 0.0430) < 5e-5
np.testing.assert_allclose(chances["top 3"], [0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], atol=5e-5)
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for i, (name, probabilities) in enumerate(chances.items()):
    axis.bar(np.arange(9) + 0.2 * i - 0.3, probabilities, width=0.2, label=name)
axis.set_xticks(range(9), vocabulary)
axis.set(ylabel="probability")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The KV cache
# The loop above reads the whole text again for each new token. But the keys and values of a token never change, since
# it attends only to earlier tokens. So they are cached: `extend(params, tokens, cfg, cache)` reads only the new tokens
# and gives the same logits.

# %%
cache = init_cache(cfg, batch=1, length=16)
tokens = jnp.array([prompt + greedy])
whole = gptjax.forward(params, tokens, cfg)
logits, cache = gptjax.extend(params, tokens[:, :4], cfg, cache)  # prefill: the prompt at once
outputs = [logits]
for t in range(4, tokens.shape[1]):  # decode: token by token
    logits, cache = gptjax.extend(params, tokens[:, t : t + 1], cfg, cache)
    outputs.append(logits)
difference = float(jnp.abs(jnp.concatenate(outputs, axis=1) - whole).max())
print(f"{cache.length[0]} tokens in the cache, largest difference of a logit {difference:.1e}")
assert difference < 1e-3 and cache.length[0] == 10

# %% [markdown]
# The decoding speed on this machine, and the size of the cache: $2 \cdot L \cdot K \cdot H$ elements per token. For
# GPT-2 124M and 1,024 tokens it takes 72 MiB in float32, half of that in bfloat16, and a little over a quarter in int8.


# %%
def without_cache(params, tokens, n_prompt, n_new):
    """Greedy decoding that reads the whole row again for each token."""

    def append_token(i, tokens):
        logits = gptjax.forward(params, tokens, cfg)
        return tokens.at[:, n_prompt + i].set(logits[:, n_prompt + i - 1].argmax(-1))

    return jax.lax.fori_loop(0, n_new, append_token, tokens)


n_new = 16 if SMOKE else 64
slow = jax.jit(without_cache, static_argnums=(2, 3))
row = jnp.zeros((1, len(prompt) + n_new), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt))
decoders = {
    "without cache": lambda: slow(params, row, len(prompt), n_new)[0, len(prompt) :].tolist(),
    "with the cache": lambda: gptjax.generate(params, [prompt], cfg, max_new_tokens=n_new, key=key)[0],
}
generated, speed = {}, {}
for name, decode in decoders.items():
    decode()  # compiles
    begin = time.perf_counter()
    generated[name] = decode()
    speed[name] = n_new / (time.perf_counter() - begin)
    print(f"{name}: {speed[name]:.1f} tokens/s")
assert generated["without cache"] == generated["with the cache"]
small = init_cache(sized["124M"], batch=1, length=1024)
mib = (small.k.nbytes + small.v.nbytes) / 2**20
print(f"cache of GPT-2 124M, 1,024 tokens: {mib:.0f} MiB")
assert mib == 2 * 12 * 12 * 64 * 1024 * 4 / 2**20 == 72

# %% [markdown]
# ## Other architectures
# GPT-2, Llama and a modern recipe differ in the switches of one config. A switch that is not set takes the value of
# `arch`; each can be set on its own.

# %%
size = dict(vocab_size=1000, n_layer=2, n_head=4, d_model=64)
archs = {name: gptjax.ModelConfig(arch=name, **size) for name in ("gpt2", "llama", "modern")}
switches = ("position", "norm", "activation", "bias", "tie_embeddings", "qk_norm", "logit_softcap", "value_residual")
print(" " * 16 + "".join(f"{name:12}" for name in archs))
for switch in switches:
    print(f"{switch:16}" + "".join(f"{getattr(arch_cfg, switch)!s:12}" for arch_cfg in archs.values()))
for name, arch_cfg in archs.items():
    weights = gptjax.init_params(jax.random.key(0), arch_cfg)
    out = gptjax.forward(weights, jnp.arange(8)[None], arch_cfg)
    print(f"{name}: {tree.size(weights):,} parameters")
    assert out.shape == (1, 8, 1000) and jnp.isfinite(out).all()

# %% [markdown]
# ## Exercises
# 1. Derive the parameter count of the untied 124M model from $L, D, V$ and the context length by hand, exactly.
# 2. Replace `layer_norm` by `rms_norm` in a config (`norm="rmsnorm"`). How many parameters fewer does it have?
# 3. In the cell about residual connections put `rms_norm` in front of each feed-forward layer, with and without
#    residuals. What does a norm alone repair?
# 4. The tied head's first loss is not `ln V + 1/6`. Derive it: the final norm has variance 1, the embedding $0.02^2$.
# 5. `init_cache(cfg, 1, dtype="int8")` quantises keys and values. How much do the logits change? Does the greedy text?
# 6. How does the decoding speed depend on the length of the prompt, with and without the cache?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# Per block: $12 D^2$ in the matrices, $4D + D$ biases of the feed-forward layer, $D$ of the output projection, $4D$ in
# the two norms. The untied model without biases in q, k and v:
#
# ```python
# L, D, V, T = 12, 768, 50_257, 1024
# block = 12 * D**2 + 5 * D + D + 4 * D
# total = V * D + T * D + L * block + 2 * D + D * V
# print(f"{total:,}")
# assert total == 163_009_536
# ```
#
# ```text
# 163,009,536
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# RMS norm has no shift: one vector of $D$ values fewer in each of $2L + 1$ norms.
#
# ```python
# fewer = tree.size(gptjax.abstract_params(book)) - tree.size(gptjax.abstract_params(replace(book, norm="rmsnorm")))
# print(f"{fewer:,}")
# assert fewer == 25 * 768
# ```
#
# ```text
# 19,200
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# The norm keeps the input of every layer at one scale, so the gradient without residuals no longer vanishes in twenty
# layers. It still shrinks; with residuals it does not.
#
# ```python
# def normed_output(perturbations, residual):
#     def layer(x, weights_and_perturbation):
#         weights, perturbation = weights_and_perturbation
#         x = x + perturbation
#         return residual * x + feed_forward(rms_norm(x), weights["up"], weights["down"]), None
#
#     last, _ = jax.lax.scan(layer, start, (stack, perturbations))
#     return (last * direction).sum()
#
#
# for name, residual in (("with residuals", 1.0), ("without", 0.0)):
#     gradient = jax.grad(normed_output)(jnp.zeros((depth, 8, width)), residual)
#     size = jnp.abs(gradient).mean((1, 2))
#     print(f"{name:15} at the input of layer 1: {size[0]:.1e}, of layer {depth}: {size[-1]:.1e}")
# ```
#
# ```text
# with residuals  at the input of layer 1: 1.3e+00, of layer 20: 8.1e-01
# without         at the input of layer 1: 3.3e-01, of layer 20: 7.5e-01
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# A logit is a sum of $D$ products of a value with variance 1 and one with variance $0.02^2$, so its variance is
# $768 \cdot 0.0004 = 0.307$.
#
# ```python
# print(f"{math.log(50_257) + 768 * 0.02**2 / 2:.3f} expected, {first['init=gpt2, tied head']:.3f} measured")
# ```
#
# ```text
# 10.979 expected, 10.954 measured
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# The logits move by little compared with their spread, and the greedy text stays the same. It changes where the two
# likeliest tokens are closer than the rounding error.
#
# ```python
# def cached_logits(dtype):
#     cache = init_cache(cfg, batch=1, length=16, dtype=dtype)
#     outputs = []
#     for t in range(tokens.shape[1]):
#         output, cache = gptjax.extend(params, tokens[:, t : t + 1], cfg, cache)
#         outputs.append(output)
#     return jnp.concatenate(outputs, axis=1)
#
#
# tokens = jnp.array([prompt + greedy])
# exact, rounded = cached_logits("float32"), cached_logits("int8")
# print(f"largest difference {jnp.abs(exact - rounded).max():.3f}, spread of the logits {exact.std():.3f}")
# print("the same greedy text:", bool((exact.argmax(-1) == rounded.argmax(-1)).all()))
# ```
#
# ```text
# largest difference 0.013, spread of the logits 0.554
# the same greedy text: True
# ```
#
# </details>

# %% [markdown]
# **Exercise 6**
#
# <details><summary>Solution</summary>
#
# Reading the whole row again costs more as the prompt grows. With the cache, the prompt is read once, and each new
# token costs about the same. (The rates depend on the machine.)
#
# ```python
# for length in (4, 256):
#     long = (prompt * 64)[:length]
#     row = jnp.zeros((1, length + 16), jnp.int32).at[0, :length].set(jnp.array(long))
#     decoders = {
#         "without cache": lambda: slow(params, row, length, 16).block_until_ready(),
#         "with the cache": lambda: gptjax.generate(params, [long], cfg, max_new_tokens=16, key=key),
#     }
#     for name, decode in decoders.items():
#         decode()  # compiles
#         begin = time.perf_counter()
#         decode()
#         print(f"prompt of {length}, {name}: {16 / (time.perf_counter() - begin):.1f} tokens/s")
# ```
#
# ```text
# prompt of 4, without cache: 2.4 tokens/s
# prompt of 4, with the cache: 7.5 tokens/s
# prompt of 256, without cache: 0.6 tokens/s
# prompt of 256, with the cache: 6.1 tokens/s
# ```
#
# </details>
