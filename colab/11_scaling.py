# %% [markdown]
# # 11 Scaling: one program on many devices
#
# What you learn: the same train step runs on one device and on eight. A mesh names the axes of the devices, rules over
# parameter paths say how every array is sharded, and the compiler inserts the communication; model and loss contain
# none of it. Then `gptjax plan` compiles real runs for TPU slices that are not present, and reports what they would
# take.
#
# What it costs: CPU 1 to 2 minutes, and about 2 for each of two plans (2 cores under other load); v5e-1: the same,
# since the eight devices are simulated on the CPU (Colab has TPU runtimes of one chip); only the last cell asks the
# chip for its memory.

# %%
import os

# Set before jax is imported: this kernel simulates eight devices on the CPU and leaves a TPU to other processes.
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

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)
print(f"{jax.device_count()} devices, {jax.default_backend()}")
assert jax.device_count() == 8

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## A mesh, and rules over paths
#
# Four axes: `data` replicates the parameters and shards the batch (data parallel), `fsdp` shards batch and parameters
# (fully sharded data parallel), `tensor` shards heads and the feed-forward dimension (tensor parallel), `context`
# shards the tokens of a row (context parallel). A rule assigns the dimensions of the arrays at matching paths to mesh
# axes; the optimizer state is sharded like the parameters. A path that no rule covers is an error.

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
total, per_device = kernel.nbytes, kernel.addressable_shards[0].data.nbytes
print(f"{total:,} bytes in total, {per_device:,} per device: sharded four ways, replicated twice")
assert per_device * 4 == total

# %%
owners = {}
for name, axes in (("data=8", dict(data=8)), ("fsdp=8", dict(fsdp=8)), ("fsdp=4 tensor=2", dict(fsdp=4, tensor=2))):
    other_mesh = parallel.make_mesh(MeshConfig(**{"data": 1, **axes}))
    sharded = parallel.place_params(jax.tree.map(np.asarray, params), other_mesh)["blocks"]["mlp"]["up"]["kernel"]
    owner = np.zeros(kernel.shape[1:])
    for shard in reversed(sharded.addressable_shards):
        owner[shard.index[1:]] = shard.device.id
    owners[name] = owner
show.maps(owners, x="out", y="in", colours="tab10", per_row=3)

# %% [markdown]
# The colour is the device that holds a shard of the first feed-forward matrix; with `data=8` every device has a
# replica.
#
# ## Eight devices compute what one computes
#
# The step is compiled for the mesh, its state stays sharded, and batches are sharded by rows. The losses agree up to
# rounding.

# %%
ready = gptjax.data.prepare(gptjax.load_config("tiny-llama"))
loader = gptjax.data.Loader(
    ready.train, cfg.data, batch_size=16, context_length=model.context_length, seed=0, vocab_size=257
)
tx = optax.adamw(3e-3)
raw_step = gptjax.make_train_step(next_token(model), tx)
STEPS = 5 if SMOKE else 20


def losses_on(mesh):
    """Losses of all steps, the compiled step and the last state; mesh None: one device."""
    state = parallel.init_on(
        lambda key: gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key), mesh, key
    )
    step = parallel.jit_step(raw_step, mesh, state)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, parallel.place_batch(loader.batch(i), mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), step, state


single, _, _ = losses_on(None)
meshes = {
    "data=8": dict(data=8),
    "fsdp=8": dict(data=1, fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
}
curve = {}
for name, axes in meshes.items():
    sharded, step, state = losses_on(parallel.make_mesh(MeshConfig(**axes)))
    print(f"{name:24} differs from one device by at most {np.abs(sharded - single).max():.1e}")
    assert np.abs(sharded - single).max() < 1e-4
    curve[name] = (np.arange(STEPS), np.abs(sharded - single))
print(f"the loss itself falls from {single[0]:.3f} to {single[-1]:.3f}")
show.curves(curve, x="step", y="difference of the losses, nats per byte", marker="o")

# %% [markdown]
# The remaining difference is rounding: sums are taken in another order. The communication is visible in the compiled
# program: `all-reduce` sums for data parallelism, `all-gather` of the parameters for `fsdp`. Eight simulated devices
# share the cores of one machine, so nothing here gets faster; on real chips the same program does.

# %%
collectives = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
for name, axes in list(meshes.items())[: 1 if SMOKE else 3]:
    other_mesh = parallel.make_mesh(MeshConfig(**axes))
    state = parallel.init_on(
        lambda key: gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key), other_mesh, key
    )
    batch = parallel.place_batch(loader.batch(0), other_mesh)
    with jax.set_mesh(other_mesh):
        text = jax.jit(raw_step).lower(state, batch).compile().as_text()
    counts = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in collectives}
    print(f"{name:24}", {kind: n for kind, n in counts.items() if n})
    assert counts["all-reduce"] > 0

# %% [markdown]
# Code written for `pmap` can use `parallel.pmap_step`: the batch has a leading device axis. It is the same program.

# %%
pstep = parallel.pmap_step(raw_step)
state = gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key)
rows = jax.tree.map(lambda leaf: None if leaf is None else leaf.reshape(8, 2, *leaf.shape[1:]), loader.batch(0))
_, metrics = pstep(state, rows)
print(f"pmap_step: {float(metrics['loss']):.6f}, one device: {single[0]:.6f}")
assert abs(float(metrics["loss"]) - single[0]) < 1e-5

# %% [markdown]
# ## Memory and bounds on the speed
#
# `gptjax plan` compiles the real train step for a slice that is only described. Memory and traffic are those of the
# compiled program. Times are bounds at the chip's peak rates: from the maximum of compute, HBM and interconnect time to
# their sum. Nothing here is measured. It runs in a process of its own, on the CPU, and needs the package `libtpu`.

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
    if os.path.exists("plan.json"):
        os.remove("plan.json")  # `gptjax plan` does not overwrite a file
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with open("plan.json") as file:
        result = json.load(file)
    gib = f"{result['needed_bytes'] / 2**30:.1f} of {result['hbm_bytes'] / 2**30:.1f} GiB per chip"
    if result["roofline"] is None:
        print(f"  does not fit: {gib}; it would with {', or '.join(result['advice'])}")
    else:
        best, worst = (1e3 * result["roofline"][bound] for bound in ("best_s", "worst_s"))
        print(f"  {gib}; {best:,.3g} to {worst:,.3g} ms per step, collectives {sorted(result['collectives'])}")
    return result


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
results = {name: result for name, result in plans.items() if result}
if results:
    kinds = sorted({kind for result in results.values() for kind in result["parts"]})
    table = np.array([[result["parts"].get(kind, 0) / 2**30 for kind in kinds] for result in results.values()])
    names = [f"{name}: {result['hbm_bytes'] / 2**30:.0f} GiB" for name, result in results.items()]
    picture = show.maps({"GiB per chip": table}, rows=names, columns=[kind.split(",")[0] for kind in kinds], size=4.5)
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
# Training with AdamW in float32 takes 16 bytes per parameter: the parameter, its gradient, and two moments. So a model
# of about 1,000 M parameters fills a v5e-1 by its state alone; with activations, plan for half of that. LoRA takes 4
# bytes per frozen parameter (1 if quantised to int8) and 16 per trained one.

# %%
assert (CHIPS["v5e"].hbm_gib, CHIPS["v5e"].tflops, CHIPS["v6e"].hbm_gib, CHIPS["v6e"].tflops) == (16, 197, 32, 918)
for chip in ("v5e", "v6e"):
    print(f"{chip}: {CHIPS[chip].hbm_gib * 2**30 / 16 / 1e6:,.0f} M parameters at 16 bytes fill its memory")
assert round(16 * 2**30 / 16 / 1e6) == 1074

# %% [markdown]
# The chip of this runtime, queried in a separate process (a TPU belongs to one process at a time, which is why this
# kernel has not used it).

# %%
ask = """
import jax
device = jax.devices()[0]
stats = device.memory_stats() or {}
limit = stats.get("bytes_limit")
print(device.device_kind, f"{limit / 2**30:.2f} GiB for arrays" if limit else "no limit but the host's memory")
"""
environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
if not any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0")):
    environment["JAX_PLATFORMS"] = "cpu"  # no TPU here: do not search for one
done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=environment)
print(done.stdout.strip() or done.stderr.strip().splitlines()[-1])

# %% [markdown]
# ## Exercises
#
# 1. Which of the meshes above communicates most for this model, by bytes? Add up the results of the collectives.
# 2. Give `make_mesh` an axis size that does not divide 8. What does the error say?
# 3. Ask for the sharding of a path that no rule covers. What does the error say, and what would you add?
# 4. Plan the small run with `train.accumulation=4`, and for a v6e-1: what changes?
# 5. Compile the step for `MeshConfig(context=8, data=1)`. Which collectives are new, and what are they for?

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# `fsdp` gathers the parameters and reduces their gradients, about twice the bytes of data parallelism, which only sums
# the gradients. (A collective inside the scan over layers is listed once but runs once per layer.)
#
# ```python
# import re
#
#
# def compiled_text(**axes):
#     mesh = parallel.make_mesh(MeshConfig(**axes))
#     state = parallel.init_on(
#         lambda key: gptjax.TrainState.create(gptjax.init_params(key, model), tx=tx, key=key), mesh, key
#     )
#     batch = parallel.place_batch(loader.batch(0), mesh)
#     with jax.set_mesh(mesh):
#         return jax.jit(raw_step).lower(state, batch).compile().as_text()
#
#
# def collective_bytes(text):
#     n_bytes = 0
#     for line in text.splitlines():
#         if re.search(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line):
#             for shape in re.findall(r"f32\[([\d,]*)\]", line.split(" = ")[1].split("(%")[0]):
#                 n_bytes += 4 * int(np.prod([int(size) for size in shape.split(",") if size]))
#     return n_bytes
#
#
# for name, axes in meshes.items():
#     print(f"{name:24} {collective_bytes(compiled_text(**axes)):,} bytes of results")
# ```
#
# ```text
# data=8                   624,396 bytes of results
# fsdp=8                   1,247,528 bytes of results
# data=2 fsdp=2 tensor=2   1,247,812 bytes of results
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The error names the sizes of all axes and the number of devices that their product must equal.
#
# ```python
# from gptjax.errors import UserError
#
# try:
#     parallel.make_mesh(MeshConfig(data=3))
# except UserError as error:
#     print(error)
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# The error names the path, the shape and where to add a rule.
#
# ```python
# try:
#     parallel.spec_of("blocks/gate/kernel", (2, 64, 64), mesh)
# except UserError as error:
#     print(error)
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# Micro-batches save activation memory, of which this small model has almost none, so here they only cost time. The
# v6e-1 has twice the memory, and its bounds are about half.
#
# ```python
# for target, accumulation in (("v5e-1", 1), ("v5e-1", 4), ("v6e-1", 1)):
#     plan(*small, "--on", target, f"train.accumulation={accumulation}")
# ```
#
# ```text
# gptjax plan tiny-llama model.vocab_size=257 train.batch_size=8 --on v5e-1 train.accumulation=1
#   0.0 of 16.0 GiB per chip; 0.00164 to 0.00198 ms per step, collectives []
# gptjax plan tiny-llama model.vocab_size=257 train.batch_size=8 --on v5e-1 train.accumulation=4
#   0.0 of 16.0 GiB per chip; 0.00232 to 0.00265 ms per step, collectives []
# gptjax plan tiny-llama model.vocab_size=257 train.batch_size=8 --on v6e-1 train.accumulation=1
#   0.0 of 32.0 GiB per chip; 0.000842 to 0.000914 ms per step, collectives []
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# `all-to-all` and `all-gather` are new compared with data parallelism: each device holds a part of the tokens of every
# row, and attention needs the keys and values of all of them.
#
# ```python
# text = compiled_text(context=8, data=1)
# counts = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in collectives}
# print({kind: n for kind, n in counts.items() if n})
# ```
#
# ```text
# {'all-reduce': 11, 'all-gather': 16, 'all-to-all': 3}
# ```
#
# </details>
