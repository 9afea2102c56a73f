# %% [markdown]
# # 11 Scaling: one program on many devices
#
# What you learn: the same train step runs on one device and on eight. A mesh gives the devices names, rules over paths
# say which part of every array lies where, and the compiler puts in the communication; the model and the loss hold none
# of it. Then `gptjax plan` compiles real runs for TPU slices that are not here, and says what they would take.
#
# What it costs: CPU 1 to 2 minutes, and about 2 for each of two plans (2 cores that had other work too); v5e-1: the
# same, since the eight devices are pretended ones of the CPU (Colab has TPU runtimes of one chip); only the last part
# asks the chip how much memory it has.

# %%
import os

# Before jax is imported: this kernel works on the CPU, as eight devices, and leaves a TPU to other processes.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import json
import subprocess
import sys

import jax
import numpy as np
import optax

import gptjax
from gptjax import parallel, show, tree
from gptjax.config import MeshConfig
from gptjax.losses import next_token
from gptjax.training.chips import CHIPS

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # a small run that only shows that everything works
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)
print(f"{jax.device_count()} devices, {jax.default_backend()}")
assert jax.device_count() == 8

# %% [markdown]
# ## A mesh, and rules over paths
#
# Four axes: `data` copies the weights and divides the rows of a batch, `fsdp` divides rows and weights, `tensor`
# divides heads and feed-forward, `context` the tokens of a row. A rule says for a path pattern which side of an array
# goes along which axis; the optimizer's state follows the weights. A path that no rule covers is an error.

# %%
cfg = gptjax.load_config(
    "tiny-llama", "model.vocab_size=257", "model.d_model=64", "model.n_head=4", "model.n_kv_head=2"
)
model = cfg.model
mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
print(dict(mesh.shape))
for path, leaf in tree.flatten(gptjax.abstract_params(model)).items():
    print(f"  {path:28} {leaf.shape!s:14} {parallel.spec_of(path, leaf.shape, mesh)}")

# %%
params = parallel.init_on(lambda key: gptjax.init_params(key, model), mesh, key)
kernel = params["blocks"]["mlp"]["up"]["kernel"]
jax.debug.visualize_array_sharding(kernel[0])
whole, here = kernel.nbytes, kernel.addressable_shards[0].data.nbytes
print(f"{whole:,} bytes in all, {here:,} on each device: a quarter, the other half of the eight holds a copy")
assert here * 4 == whole

# %%
places = {}
for name, axes in (("data=8", dict(data=8)), ("fsdp=8", dict(fsdp=8)), ("fsdp=4 tensor=2", dict(fsdp=4, tensor=2))):
    one = parallel.make_mesh(MeshConfig(**{"data": 1, **axes}))
    put = parallel.place_params(jax.tree.map(np.asarray, params), one)["blocks"]["mlp"]["up"]["kernel"]
    owner = np.zeros(kernel.shape[1:])
    for shard in reversed(put.addressable_shards):
        owner[shard.index[1:]] = shard.device.id
    places[name] = owner
show.maps(places, x="out", y="in", colours="tab10", per_row=3)

# %% [markdown]
# The colour is the device that holds a part of the feed-forward layer's first matrix; with `data=8` each has all of it.
#
# ## Eight devices compute what one computes
#
# The step is compiled for the mesh, its state stays where it lies, batches are cut by rows. Losses agree to rounding.

# %%
found = gptjax.data.prepare(gptjax.load_config("tiny-llama"))
loader = gptjax.data.Loader(
    found.train, cfg.data, batch_size=16, context_length=model.context_length, seed=0, vocab_size=257
)
tx = optax.adamw(3e-3)
raw_step = gptjax.make_train_step(next_token(model), tx)
STEPS = 5 if SMOKE else 20


def losses_on(mesh):
    state = parallel.init_on(
        lambda key: gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key), mesh, key
    )
    step = parallel.jit_step(raw_step, mesh, state)
    out = []
    for i in range(STEPS):
        state, metrics = step(state, parallel.place_batch(loader.batch(i), mesh))
        out.append(float(metrics["loss"]))
    return np.array(out), step, state


one, _, _ = losses_on(None)
meshes = {
    "data=8": dict(data=8),
    "fsdp=8": dict(data=1, fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
}
curve = {}
for name, axes in meshes.items():
    many, step, state = losses_on(parallel.make_mesh(MeshConfig(**axes)))
    print(f"{name:24} differs from one device by at most {np.abs(many - one).max():.1e}")
    assert np.abs(many - one).max() < 1e-4
    curve[name] = (np.arange(STEPS), np.abs(many - one))
print(f"the loss itself goes from {one[0]:.3f} to {one[-1]:.3f}")
show.curves(curve, x="step", y="difference of the losses, nats a byte", marker="o")

# %% [markdown]
# What is left is rounding: sums are taken in another order. What the mesh costs stands in the compiled program: sums
# (`all-reduce`) for data parallelism, gathered weights (`all-gather`) for `fsdp`. Eight pretended devices share the
# cores of one machine, so nothing here gets faster; on real chips the same program does.

# %%
kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
for name, axes in list(meshes.items())[: 1 if SMOKE else 3]:
    there = parallel.make_mesh(MeshConfig(**axes))
    state = parallel.init_on(
        lambda key: gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key), there, key
    )
    with jax.set_mesh(there):
        text = jax.jit(raw_step).lower(state, parallel.place_batch(loader.batch(0), there)).compile().as_text()
    counts = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}
    print(f"{name:24}", {kind: n for kind, n in counts.items() if n})
    assert counts["all-reduce"] > 0

# %% [markdown]
# Notebooks written for `pmap` find its form in `parallel.pmap_step`: the batch has a leading axis of devices. It is the
# same program.

# %%
pstep = parallel.pmap_step(raw_step)
state = gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key)
rows = jax.tree.map(lambda leaf: None if leaf is None else leaf.reshape(8, 2, *leaf.shape[1:]), loader.batch(0))
_, metrics = pstep(state, rows)
print(f"pmap_step: {float(metrics['loss']):.6f}, one device: {one[0]:.6f}")
assert abs(float(metrics["loss"]) - one[0]) < 1e-5

# %% [markdown]
# ## How much fits, and how fast at most
#
# `gptjax plan` compiles the real train step for a slice that is only described. Memory and traffic are the program's
# own; times are bounds at the chip's peaks, from the largest of compute, HBM and interconnect to their sum. Nothing of
# it is a measurement. It runs in a process of its own, on the CPU, and needs the package `libtpu`.

# %%
# @title Install libtpu where it is missing (about 150 MB)?
INSTALL_LIBTPU = False  # @param {type:"boolean"}
import importlib.util

if INSTALL_LIBTPU and importlib.util.find_spec("libtpu") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"jax[tpu]=={jax.__version__}"], check=True)
can_plan = importlib.util.find_spec("libtpu") is not None


def plan(*arguments):
    """The result of `gptjax plan` as a dict; None without the TPU compiler."""
    command = [sys.executable, "-m", "gptjax", "plan", *arguments, "out=plan.json"]
    print("gptjax", *command[3:-1])
    if not can_plan:
        print("  set INSTALL_LIBTPU above, or run it where libtpu is: pip install -e '.[tpu-plan]' in the checkout")
        return None
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    with open("plan.json") as file:
        found = json.load(file)
    gib = f"{found['needed_bytes'] / 2**30:.1f} of {found['hbm_bytes'] / 2**30:.1f} GiB a chip"
    if found["roofline"] is None:
        print(f"  does not fit: {gib}; it would with {', or '.join(found['advice'])}")
    else:
        times = [1e3 * found["roofline"][end] for end in ("best_s", "worst_s")]
        print(f"  {gib}; {times[0]:,.3g} to {times[1]:,.3g} ms a step, collectives {sorted(found['collectives'])}")
    return found


small = ("tiny-llama", "model.vocab_size=257", "train.batch_size=8")
gpt2 = ("gpt2-124m", "model.dtype=bfloat16", "train.batch_size=32", "train.accumulation=1")
runs = {"v5e-8": (*small, "--on", "v5e-8", "mesh.fsdp=8", "mesh.data=1")}
if not SMOKE:
    runs = {
        "v5e-1": (*gpt2, "--on", "v5e-1"),
        "v5e-8": (*gpt2, "--on", "v5e-8", "mesh.data=8"),
    }
plans = {name: plan(*arguments) for name, arguments in runs.items()}

# %%
found = {name: one for name, one in plans.items() if one}
if found:
    parts = sorted({part for one in found.values() for part in one["parts"]})
    table = np.array([[one["parts"].get(part, 0) / 2**30 for part in parts] for one in found.values()])
    names = [f"{name}: {one['hbm_bytes'] / 2**30:.0f} GiB" for name, one in found.items()]
    picture = show.maps({"GiB a chip": table}, rows=names, columns=[part.split(",")[0] for part in parts], size=4.5)
else:
    picture = None
picture

# %% [markdown]
# ## Which chip is where
#
# | | HBM | bfloat16 peak | where |
# |---|---|---|---|
# | v5e-1 | 16 GiB | 197 TFLOP/s | Colab, free |
# | v6e-1 | 32 GiB | 918 TFLOP/s | Colab, paid |
# | v5e-8 | 8 x 16 GiB | 8 x 197 TFLOP/s | Kaggle |
#
# A parameter in training with AdamW takes 16 bytes in float32: itself, its gradient, two moments. So the largest model
# whose state alone fills a v5e-1 has about a thousand million parameters, and with activations half of that is a good
# guess. LoRA has 4 bytes for each frozen weight (one, quantised), and 16 for the few that move.

# %%
assert (CHIPS["v5e"].hbm_gib, CHIPS["v5e"].tflops, CHIPS["v6e"].hbm_gib, CHIPS["v6e"].tflops) == (16, 197, 32, 918)
for chip in ("v5e", "v6e"):
    print(f"{chip}: {CHIPS[chip].hbm_gib * 2**30 / 16 / 1e6:,.0f} M parameters of 16 bytes fill its memory")
assert round(16 * 2**30 / 16 / 1e6) == 1074

# %% [markdown]
# The chip of this runtime, asked in a process of its own (a TPU belongs to one process at a time, which is why this
# kernel has not touched it).

# %%
ask = """
import jax
device = jax.devices()[0]
stats = device.memory_stats() or {}
limit = stats.get("bytes_limit")
print(device.device_kind, f"{limit / 2**30:.2f} GiB for arrays" if limit else "no limit but the machine's memory")
"""
free = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
if not any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0")):
    free["JAX_PLATFORMS"] = "cpu"  # no TPU here, and no search for one
done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=free)
print(done.stdout.strip() or done.stderr.strip().splitlines()[-1])

# %% [markdown]
# ## Exercises
#
# 1. Which of the meshes above communicates most for this model, by bytes? Count the operands of the collectives.
# 2. Give `make_mesh` a size that does not divide 8, and a batch that does not divide the rows. What do the errors say?
# 3. Remove the rule for `ln_f/*` from a copy of `parallel.RULES`, and read the error.
# 4. Plan the first run with four micro-batches (`train.accumulation=4`), and for a v6e-1: what changes? Then let
#    `gptjax plan gpt2-1558m --on v5e-16 --search tokens=30e9` choose. Why that mesh?
# 5. Train on `MeshConfig(context=8, data=1)`. Which collectives are new, and what are they for?
