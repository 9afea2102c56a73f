"""Accuracy of influence estimates, on test messages of the SMS Spam data with an exact copy in the training split.

    python tests/bench/influence.py SMSSpamCollection.tsv [--epochs 8] [--dims 1024] [--seeds 3]

For each seed, a small classifier is trained from scratch on the book's split (1045 training texts, 300 test texts). For
each test message that also occurs in the training split, checks whether a copy of it is the most similar training
message. Prints the hit rate for the cosine similarity of full gradients and of their random projections, and for TracIn
over checkpoints with dot products and with cosines. Then prints the gradient noise scale, and the epsilon, accuracy and
time per step of a DP-SGD run.
"""

import argparse
import time

import jax
import numpy as np

import gptjax
from gptjax import tokenizers
from gptjax.config import TokenizerConfig
from gptjax.data import classification
from gptjax.data.split import split_labelled
from gptjax.losses import class_logits, classify
from gptjax.model.gpt import init_params
from gptjax.optim import make_optimizer
from gptjax.research import influence, privacy
from gptjax.training.process import ask_for_huge_pages
from gptjax.training.step import TrainState, make_train_step

WIDTH, BATCH, RATE = 64, 16, 2e-3


def rows_of(data, tokenizer):
    rows = classification.rows(classification.encode(data, tokenizer, WIDTH), packed=False)
    pad = WIDTH - rows.tokens.shape[1]
    wide = [np.pad(leaf, ((0, 0), (0, pad))) for leaf in (rows.tokens, rows.segment_ids)]
    return classification.LabelledBatch(*wide, rows.labels, np.ones(rows.labels.shape, np.float32))


def hits(scores, test, train, queries):
    """Fraction of the test texts `queries` (rows of scores) whose most similar training text is a copy."""
    near = scores.argmax(1)
    return sum(train.texts[k] == test.texts[i] for i, k in zip(queries, near, strict=True)) / len(queries)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dims", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = classification.read(args.source, quoted=True)
    splits = split_labelled(data, how="book", deduplicate=False)
    known = set(splits.train.texts)
    queries = [i for i, text in enumerate(splits.test.texts) if text in known]
    print(f"{len(splits.train.texts)} training texts, {len(splits.test.texts)} test texts, {len(queries)} in both")
    tokenizer = tokenizers.build(TokenizerConfig(name="bpe", vocab_size=2048), lambda: iter(splits.train.texts))
    train, test = (rows_of(split, tokenizer) for split in (splits.train, splits.test))
    query_rows = jax.tree.map(lambda leaf: leaf[queries], test)
    cfg = gptjax.ModelConfig(
        arch="llama", vocab_size=tokenizer.vocab_size, context_length=WIDTH, n_layer=2, n_head=4, n_kv_head=4,
        d_model=64, d_ff=128, n_classes=2,
    )  # fmt: skip
    loss = classify(cfg)
    steps = args.epochs * len(splits.train.texts) // BATCH
    whole, small = (influence.gradient_features(loss, dims=dims) for dims in (None, args.dims))
    rows = classification.Rows(train.tokens, train.segment_ids, np.zeros_like(train.labels), train.labels)
    for seed in range(args.seeds):
        tx = make_optimizer(gptjax.OptimConfig(lr=RATE, warmup_steps=10), steps)
        fresh = init_params(jax.random.key(seed), cfg)
        state = TrainState.create(fresh, tx=tx, key=jax.random.key(seed))
        step = jax.jit(make_train_step(loss, tx))
        kept, start = [], time.monotonic()
        for i in range(steps):
            state, metrics = step(state, classification.batch(rows, i, batch_size=BATCH, seed=seed))
            if (i + 1) % (steps // 4) == 0:
                kept.append(state.params)
        logits = jax.jit(lambda params: class_logits(params, test.tokens, test.segment_ids, cfg))(state.params)
        accuracy = float((logits[:, 0].argmax(-1) == test.labels[:, 0]).mean())
        trained = time.monotonic() - start
        start = time.monotonic()
        pair = whole(kept[0], query_rows), whole(kept[0], train)
        whole_s, cosines = time.monotonic() - start, influence.similarity(*pair)
        scores_by_method = {"cosine, whole": cosines, "product, whole": influence.similarity(*pair, cosine=False)}
        start = time.monotonic()
        sketched = small(kept[0], query_rows), small(kept[0], train)
        small_s = time.monotonic() - start
        scores_by_method[f"cosine, {args.dims} of {pair[0].shape[1]:,}"] = influence.similarity(*sketched)
        last = small(kept[-1], query_rows), small(kept[-1], train)
        scores_by_method["the same, after the last epoch"] = influence.similarity(*last)
        rates = [RATE] * len(kept)
        for name, cosine in (("TracIn, 4 checkpoints, products", False), ("TracIn, cosines", True)):
            scores_by_method[name] = influence.tracin(small, kept, train, query_rows, rates=rates, cosine=cosine)
        print(
            f"seed {seed}: test accuracy {accuracy:.2%}, loss {float(metrics['loss']):.4f} after {steps} steps in "
            f"{trained:.0f} s; gradients of {len(queries) + len(train.tokens)} texts in {whole_s:.1f} s full, "
            f"{small_s:.1f} s projected"
        )
        for name, scores in scores_by_method.items():
            second = np.sort(scores, 1)
            gap = np.median(second[:, -1] - second[:, -2])
            share = hits(scores, splits.test, splits.train, queries)
            print(f"  {name:<34} hit@1 {share:7.2%}   median difference to the second {gap:.3g}", flush=True)
        if seed == 0:
            sample = jax.tree.map(lambda leaf: leaf[:512], train)
            for name, params in (("at the start", fresh), ("after a quarter", kept[0]), ("at the end", kept[-1])):
                noise = influence.gradient_noise(loss, params, sample, chunk=32)
                estimate = f"{noise.scale:.1f} texts" if noise.square_norm > 0 else "more than 512 texts can measure"
                print(f"  noise scale {name}: {estimate} (trace {noise.trace:.3g}, |G|^2 {noise.square_norm:.3g})")
    private(loss, cfg, train, test, args.epochs)


def private(loss, cfg, train, test, epochs):
    """Train the same model with DP-SGD."""
    n, size = len(train.tokens), 64
    rate, delta, steps = size / n, 1e-4, epochs * n // size
    noise = privacy.noise_for(8.0, rate=rate, steps=steps, delta=delta)
    spent = privacy.epsilon(noise=noise, rate=rate, steps=steps, delta=delta)
    tx = make_optimizer(gptjax.OptimConfig(lr=RATE, warmup_steps=10), steps)
    guarded = privacy.private(loss, clip=1.0, noise=noise, batch_size=size, chunk=None)
    step = jax.jit(make_train_step(guarded, tx, combine=privacy.pair))
    state = TrainState.create(init_params(jax.random.key(0), cfg), tx=tx, key=jax.random.key(0))
    start = time.monotonic()
    for i in range(steps):
        chosen, here = privacy.poisson_sample(n, rate=rate, step=i, seed=0)
        batch = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], train)
        state, _ = step(state, batch._replace(weights=batch.weights * here[:, None]))
    logits = jax.jit(lambda params: class_logits(params, test.tokens, test.segment_ids, cfg))(state.params)
    accuracy = float((logits[:, 0].argmax(-1) == test.labels[:, 0]).mean())
    print(
        f"DP-SGD: {steps} steps of {size} texts sampled from {n}, clip 1, noise {noise:.2f}: epsilon {spent:.2f} "
        f"at delta {delta:g}; test accuracy {accuracy:.2%}, {(time.monotonic() - start) / steps * 1e3:.0f} ms per step"
    )


if __name__ == "__main__":
    ask_for_huge_pages()
    main()
