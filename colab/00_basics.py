# %% [markdown]
# # 00 Basics: arrays, gradients, and one backpropagation by hand
#
# What you learn: arrays in JAX, the chain rule behind a gradient, and the five things that all later notebooks combine:
# `grad`, `vmap`, `jit`, trees of arrays (pytrees), and random keys.
#
# What it costs: CPU 15 to 25 s (2 cores); v5e-1: not measured, most of the time is compilation of small programs.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import gptjax
from gptjax import show, tree
from gptjax.types import Mean

# By default a TPU rounds the inputs of a matrix multiplication to bfloat16; the values below have four decimals.
jax.config.update("jax_default_matmul_precision", "highest")
print(jax.__version__, jax.devices())

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## Arrays
# An array has a shape, a dtype, and a device. It looks like a NumPy array, with one difference: it is immutable. An
# update returns a new array. This makes functions pure (their outputs depend on their inputs only), and only pure
# functions can be transformed by `grad`, `vmap` and `jit`.

# %%
x = jnp.arange(6.0).reshape(2, 3)
y = x.at[0, 1].set(10.0)  # a new array; x stays
print(x)
print(y)
print(x.shape, x.dtype, x.devices())
assert x[0, 1] == 1 and y[0, 1] == 10
try:
    x[0, 1] = 10.0
except TypeError as error:
    print(str(error).split(".")[0])

# %% [markdown]
# The whole package names dimensions by the same letters: `B` batch, `T` tokens per row, `D` the model's width (elements
# per token), `V` vocabulary size. `einsum` states a product in these letters. Axes of length 1 are broadcast.

# %%
hidden = jnp.ones((2, 4, 3))  # [B, T, D]
head = jnp.ones((3, 5))  # [D, V]
logits = jnp.einsum("BTD,DV->BTV", hidden, head)
assert logits.shape == (2, 4, 5) and (logits == 3).all()
centred = logits - logits.mean(axis=-1, keepdims=True)  # [2, 4, 5] - [2, 4, 1]
assert (centred == 0).all()

# %% [markdown]
# ## One neuron
# A neuron multiplies its input by a weight, adds a bias, and maps the sum to a probability by the sigmoid:
#
# $$z = wx + b, \quad a = \sigma(z) = \frac{1}{1 + e^{-z}}, \quad \ell = -\big(y \ln a + (1-y) \ln(1-a)\big)$$
#
# With $w = 2.2$, $b = 0$, $x = 1.1$ and the label $y = 1$:

# %%
w, b, x, y = 2.2, 0.0, 1.1, 1.0


def neuron(w, b, x, y):
    """Logistic loss of one example, a scalar."""
    a = jax.nn.sigmoid(w * x + b)
    return -(y * jnp.log(a) + (1 - y) * jnp.log(1 - a))


z = w * x + b
a = jax.nn.sigmoid(z)
loss = neuron(w, b, x, y)
print(f"z {z:.4f}   a {a:.4f}   loss {loss:.4f}")
assert abs(z - 2.42) < 5e-5 and abs(a - 0.9183) < 5e-5 and abs(loss - 0.0852) < 5e-5

# %% [markdown]
# ## Backpropagation by hand
# The loss depends on $w$ through a chain of functions, so its derivative is a product with one factor per function,
# from the loss back to $w$:
#
# $$\frac{\partial \ell}{\partial w} = \frac{\partial \ell}{\partial a} \cdot \frac{\partial a}{\partial z} \cdot
# \frac{\partial z}{\partial w}, \qquad \frac{\partial \ell}{\partial b} = \frac{\partial \ell}{\partial a} \cdot
# \frac{\partial a}{\partial z} \cdot \frac{\partial z}{\partial b}$$
#
# The first two factors are computed once and used for both parameters. Because backpropagation shares them, the
# gradient with respect to millions of parameters costs about as much as two forward passes.

# %%
loss_a = -y / a + (1 - y) / (1 - a)
a_z = a * (1 - a)
z_w, z_b = x, 1.0
loss_z = loss_a * a_z  # used for both parameters; simplifies to a - y
loss_w, loss_b = loss_z * z_w, loss_z * z_b
print(f"loss_a {loss_a:.4f}  times  a_z {a_z:.4f}  =  loss_z {loss_z:.4f}  (a - y = {a - y:.4f})")
print(f"by hand:   d loss / dw = {loss_w:.4f}   d loss / db = {loss_b:.4f}")
assert abs(loss_w - -0.0898) < 5e-5 and abs(loss_b - -0.0817) < 5e-5
assert abs(loss_z - (a - y)) < 1e-6

# %% [markdown]
# `jax.grad` takes a function and returns the function that computes its gradient:

# %%
grad_w, grad_b = jax.grad(neuron, argnums=(0, 1))(w, b, x, y)
print(f"jax.grad:  d loss / dw = {grad_w:.4f}   d loss / db = {grad_b:.4f}")
assert abs(grad_w - -0.0898) < 5e-5 and abs(grad_b - -0.0817) < 5e-5
assert abs(grad_w - loss_w) < 1e-6 and abs(grad_b - loss_b) < 1e-6

# %% [markdown]
# The loss as a function of $w$, and its tangent at $w = 2.2$, whose slope is the gradient. One step of gradient
# descent, $w - \eta\, \partial \ell/\partial w$, moves down that slope. `vmap` evaluates the loss at all values of $w$:
# it turns a function of one $w$ into a function of a vector of them.

# %%
ws = jnp.linspace(-2, 5, 200)
losses = jax.vmap(neuron, in_axes=(0, None, None, None))(ws, b, x, y)
near = jnp.array([w - 2, w + 2])
picture = show.curves(
    {"loss": (ws, losses), f"slope {grad_w:.4f} at w = 2.2": (near, loss + grad_w * (near - w))},
    x="w", y="loss", title="One neuron, one example",
)  # fmt: skip
picture

# %% [markdown]
# ## Two layers by hand
# With matrices the chain rule multiplies by transposed matrices, and the gradient of a batch is a sum over its rows.
# The rest is unchanged. This network fits XOR, which one neuron cannot:

# %%
inputs = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # [B, 2]
answers = jnp.array([0.0, 1.0, 1.0, 0.0])  # [B]


def init(key, width=8):
    """Returns the parameters: nested dicts with arrays as leaves."""
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(first, (2, width)), "bias": jnp.zeros(width)},
        "out": {"kernel": jax.random.normal(second, (width, 1)), "bias": jnp.zeros(1)},
    }


def network(params, inputs):
    """[B, 2] -> logits [B]."""
    h = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (h @ params["out"]["kernel"] + params["out"]["bias"])[:, 0]


def xor_loss(params, batch, key=None):
    """Every loss in gptjax has this form: (params, batch, key) -> (Mean(total, weight), metrics)."""
    inputs, answers = batch
    logits = network(params, inputs)
    losses = optax.sigmoid_binary_cross_entropy(logits, answers)
    n_right = ((logits > 0) == (answers > 0.5)).sum()
    return Mean(losses.sum(), jnp.float32(len(answers))), {"accuracy": Mean(n_right, len(answers))}


def by_hand(params, inputs, answers):
    """Gradient of the summed losses by the chain rule, from the output back to the input."""
    h = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])  # [B, F]
    logits = (h @ params["out"]["kernel"] + params["out"]["bias"])[:, 0]  # [B]
    d_logits = (jax.nn.sigmoid(logits) - answers)[:, None]  # a - y, [B, 1]
    d_h = d_logits @ params["out"]["kernel"].T  # [B, F]
    d_z = d_h * (1 - h**2)  # derivative of tanh, [B, F]
    return {
        "hidden": {"kernel": inputs.T @ d_z, "bias": d_z.sum(0)},
        "out": {"kernel": h.T @ d_logits, "bias": d_logits.sum(0)},
    }


params = init(jax.random.key(0))
ours = by_hand(params, inputs, answers)
theirs = jax.grad(lambda params: xor_loss(params, (inputs, answers))[0].total)(params)
difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
print(difference)
assert max(jax.tree.leaves(difference)) < 1e-5

# %% [markdown]
# ## Trees
# Parameters, gradients and optimizer states are pytrees with the same paths. A path such as `hidden/kernel` can be
# matched by a pattern; weight decay, LoRA, freezing and sharding are rules over paths in the later notebooks.

# %%
for path, leaf in tree.flatten(params).items():
    print(f"{path:15} {leaf.shape}  {leaf.size} elements")
assert tree.size(params) == 33
kernels, rest = tree.split(params, "*/kernel")
print("kernels", list(tree.flatten(kernels)), "   the rest", list(tree.flatten(rest)))
assert list(tree.flatten(kernels)) == ["hidden/kernel", "out/kernel"]
halved = jax.tree.map(lambda leaf: leaf / 2, params)
assert (halved["out"]["kernel"] * 2 == params["out"]["kernel"]).all()

# %% [markdown]
# ## Training is a loop over a pure function
# `gptjax.make_train_step` turns any such loss into a function `(state, batch) -> (state, metrics)`. The later notebooks
# train GPTs by the same function.

# %%
tx = optax.adam(0.05)
state = gptjax.TrainState.create(params, tx=tx, key=jax.random.key(1))
step = jax.jit(gptjax.make_train_step(xor_loss, tx))
log = []
for _ in range(200):
    state, metrics = step(state, (inputs, answers))
    log.append(float(metrics["loss"]))
print(f"loss {log[0]:.3f} -> {log[-1]:.4f}, accuracy {metrics['accuracy']:.0%}")
assert log[-1] < 0.05 and metrics["accuracy"] == 1
show.curves({"XOR": (range(200), log)}, x="step", y="loss", log_y=True)

# %%
side = jnp.linspace(-0.5, 1.5, 60)
grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
probability = jax.nn.sigmoid(network(state.params, grid)).reshape(60, 60)
figure, axis = plt.subplots(figsize=(4.4, 3.6), layout="constrained")
image = axis.imshow(probability, origin="lower", extent=(-0.5, 1.5, -0.5, 1.5), cmap="RdBu", vmin=0, vmax=1)
axis.scatter(*inputs.T, c=answers, cmap="RdBu", edgecolors="black", s=90, vmin=0, vmax=1)
axis.set(title="Prediction of the trained network", xlabel="first input", ylabel="second input")
figure.colorbar(image, label="probability of 1")
plt.show()

# %% [markdown]
# ## `vmap`: write for one example, run on a batch
# Write the function for one example and let `vmap` add the batch axis. `vmap` of `grad` computes per-example gradients
# in one pass. Notebook 12 uses them to find the training examples behind a prediction.


# %%
def example_loss(params, example, answer):
    return xor_loss(params, (example[None], answer[None]))[0].total


example_gradients = jax.vmap(jax.grad(example_loss), in_axes=(None, 0, 0))(params, inputs, answers)
print({path: leaf.shape for path, leaf in tree.flatten(example_gradients).items()})
total = jax.tree.map(lambda leaf: leaf.sum(0), example_gradients)
assert all(jnp.allclose(a, b, atol=1e-5) for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(theirs), strict=True))

# %% [markdown]
# `vmap` over the *parameters* works the same way: 64 networks, initialised from 64 keys, are trained by one program. So
# we can count how many initialisations lead to a solution.

# %%
keys = jax.random.split(jax.random.key(2), 64)
states = jax.vmap(lambda key: gptjax.TrainState.create(init(key, width=3), tx=tx, key=key))(keys)
vmapped_step = jax.jit(jax.vmap(gptjax.make_train_step(xor_loss, tx), in_axes=(0, None)))
curves = []
for _ in range(200):
    states, metrics = vmapped_step(states, (inputs, answers))
    curves.append(np.asarray(metrics["loss"]))
curves = np.stack(curves)  # [steps, networks]
solved = int((metrics["accuracy"] == 1).sum())
print(f"{solved} of 64 networks of width 3 solve XOR")
assert 0 < solved <= 64
quantiles = {f"percentile {q}": (range(200), np.percentile(curves, q, axis=1)) for q in (10, 50, 90)}
show.curves(quantiles, x="step", y="loss", log_y=True, title="64 networks in one program")

# %% [markdown]
# ## `jit`: trace once, compile, run often
# The first call traces the Python function with abstract values (shapes and dtypes), and XLA compiles the traced
# program. Later calls with the same shapes and dtypes run the compiled program. Python side effects such as `print`
# happen only during tracing. A new shape triggers a new compilation, which is why batches have fixed shapes here.

# %%
traced = []


@jax.jit
def f(x):
    traced.append(x.shape)  # runs during tracing only
    return jnp.tanh(x @ x.T).sum()


for n in (500, 500, 500, 600):
    start = time.perf_counter()
    f(jnp.ones((n, n))).block_until_ready()  # dispatch is asynchronous: wait for the result
    print(f"[{n}, {n}]  {1000 * (time.perf_counter() - start):6.1f} ms")
print("traced for", traced)
assert traced == [(500, 500), (600, 600)]

# %% [markdown]
# ## Random keys
# JAX has no hidden random state. A key is a value, and the same key gives the same random values on every device,
# however the work is sharded. New keys come from `split` or from `fold_in(key, number)`. Step `n` of training uses
# `fold_in(key, n)`, so a run that is resumed at step `n` draws the same values as an uninterrupted run.

# %%
key = jax.random.key(42)
assert (jax.random.normal(key, (3,)) == jax.random.normal(key, (3,))).all()
first, second = jax.random.split(key)
assert (jax.random.normal(first, (3,)) != jax.random.normal(second, (3,))).all()
draws = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n)))(jnp.arange(1000))
print(f"mean {draws.mean():.2f}, standard deviation {draws.std():.2f}")
assert abs(draws.mean()) < 0.15 and abs(draws.std() - 1) < 0.1

# %% [markdown]
# ## Exercises
# 1. Set `y = 0` in the neuron. What are the two gradients now? Predict them first: `loss_z` is still `a - y`.
# 2. Take ten steps of gradient descent with learning rate 5 from `w = 2.2`, and draw the path into the first picture:
#    its axes are `picture.figure.axes[0]`.
# 3. In `by_hand`, replace `tanh` by `jax.nn.relu`. Which lines change? Check against `jax.grad`.
# 4. `jax.hessian(neuron)(w, b, x, y)` is the second derivative. Show by hand that it is `x**2 * a * (1 - a)`.
# 5. What share of 64 networks solves XOR at width 2, 3, 4, 8? Draw it.
# 6. Make `f` above take `n` and build its array inside. What happens, and what is `static_argnums` for?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# `loss_z` is `a - y` = 0.9183 - 0, so both gradients are positive: the loss falls as `w` and `b` fall.
#
# ```python
# print(*(f"{gradient:.4f}" for gradient in jax.grad(neuron, argnums=(0, 1))(2.2, 0.0, 1.1, 0.0)))
# ```
#
# ```text
# 1.0102 0.9183
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The curve is flat where the answer is right, so every step is smaller than the one before.
#
# ```python
# path = [2.2]
# for _ in range(10):
#     path.append(path[-1] - 5 * float(jax.grad(neuron)(path[-1], 0.0, 1.1, 1.0)))
# print([round(value, 2) for value in path])
# axis = picture.figure.axes[0]
# axis.plot(path, [neuron(value, 0.0, 1.1, 1.0) for value in path], "o-")
# picture
# ```
#
# ```text
# [2.2, 2.65, 2.93, 3.14, 3.31, 3.45, 3.57, 3.68, 3.77, 3.86, 3.94]
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Two lines of `by_hand` change, the activation and `d_z`, and the activation in `network`. The derivative of ReLU is 1
# where its input is positive and 0 elsewhere.
#
# ```python
# def relu_network(params, inputs):
#     h = jax.nn.relu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
#     return (h @ params["out"]["kernel"] + params["out"]["bias"])[:, 0]
#
#
# def relu_by_hand(params, inputs, answers):
#     z = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
#     d_logits = (jax.nn.sigmoid(relu_network(params, inputs)) - answers)[:, None]
#     d_z = d_logits @ params["out"]["kernel"].T * (z > 0)
#     return {
#         "hidden": {"kernel": inputs.T @ d_z, "bias": d_z.sum(0)},
#         "out": {"kernel": jax.nn.relu(z).T @ d_logits, "bias": d_logits.sum(0)},
#     }
#
#
# def relu_loss(params):
#     return optax.sigmoid_binary_cross_entropy(relu_network(params, inputs), answers).sum()
#
#
# fresh = init(jax.random.key(0))
# pairs = zip(
#     jax.tree.leaves(relu_by_hand(fresh, inputs, answers)), jax.tree.leaves(jax.grad(relu_loss)(fresh)), strict=True
# )
# print([bool(jnp.allclose(a, b, atol=1e-5)) for a, b in pairs])
# ```
#
# ```text
# [True, True, True, True]
# ```
#
# At an input of exactly 0 (the first row) the derivative of ReLU is a convention; `jax.nn.relu` and `z > 0` both use 0.
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# $\partial\ell/\partial w = (a - y)\,x$, and $a$ depends on $w$ through $\partial a/\partial w = a(1-a)\,x$.
#
# ```python
# a = jax.nn.sigmoid(2.2 * 1.1)
# print(f"{jax.hessian(neuron)(2.2, 0.0, 1.1, 1.0):.4f}  {1.1**2 * a * (1 - a):.4f}")
# ```
#
# ```text
# 0.0907  0.0907
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# Wider networks have more ways to fit XOR, so fewer initialisations get stuck.
#
# ```python
# def share_solved(width):
#     keys = jax.random.split(jax.random.key(2), 64)
#     states = jax.vmap(lambda key: gptjax.TrainState.create(init(key, width), tx=tx, key=key))(keys)
#     vmapped_step = jax.jit(jax.vmap(gptjax.make_train_step(xor_loss, tx), in_axes=(0, None)))
#     for _ in range(200):
#         states, metrics = vmapped_step(states, (inputs, answers))
#     return float((metrics["accuracy"] == 1).mean())
#
#
# widths = [2, 3, 4, 8]
# shares = [share_solved(width) for width in widths]
# print({width: f"{share:.0%}" for width, share in zip(widths, shares, strict=True)})
# show.curves({"XOR": (widths, shares)}, x="width", y="share of 64 networks", marker="o")
# ```
#
# ```text
# {2: '34%', 3: '77%', 4: '97%', 8: '100%'}
# ```
#
# </details>

# %% [markdown]
# **Exercise 6**
#
# <details><summary>Solution</summary>
#
# A traced `n` has no value, and a shape needs one: `jnp.ones((n, n))` raises a `TypeError`. With `static_argnums` the
# value of `n` is part of the program's key, so the function is traced once per value.
#
# ```python
# seen = []
#
#
# def sized(n):
#     seen.append(n)
#     return jnp.tanh(jnp.ones((n, n))).sum()
#
#
# try:
#     jax.jit(sized)(500)
# except TypeError as error:
#     print(str(error).split(".")[0])
# compiled = jax.jit(sized, static_argnums=0)
# for n in (500, 500, 600):
#     compiled(n)
# print("traced for", seen[1:])
# ```
#
# ```text
# Shapes must be 1D sequences of concrete values of integer type, got (JitTracer(~int32[]), JitTracer(~int32[]))
# traced for [500, 600]
# ```
#
# </details>
