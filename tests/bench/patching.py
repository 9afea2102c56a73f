"""Activation patching on a factual prompt pair: one vmapped program for all layers x positions, or a Python loop.

    python tests/bench/patching.py grid.png [--rounds 3] [--model smollm2-135m-instruct]

Each cell of the grid is a forward pass on the corrupted prompt in which one activation is replaced by that of the clean
prompt. The metric is the logit difference of the two answers after the last token. Prints the logit difference of both
prompts, then the time for the grid of the residual stream, vmapped and as a loop, measured alternately, and the ratio
(median, minimum, maximum). The time to compile is reported separately; the loop is compiled once, with layer and
position as arguments.

The figure has four grids: residual stream, attention output, feed-forward output, and single heads. 0 is the logit
difference of the corrupted prompt, 1 that of the clean one. Finally prints greedy continuations of the corrupted
prompt, without and with steering: the difference of the two residual streams is added at every token, at the first
layer at which patching the last position restores more than half of the logit difference.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gptjax
from gptjax.model.gpt import lm_logits
from gptjax.research import taps

CLEAN, CORRUPTED, ANSWERS = "The capital of France is", "The capital of Italy is", (" Paris", " Rome")
PANELS = {  # title: site, axes
    "residual stream": ("resid", ("position",)),
    "attention": ("attn/out", ("position",)),
    "feed-forward": ("mlp/out", ("position",)),
    "heads": ("attn/heads", ("head",)),
}


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def draw(grids: dict[str, np.ndarray], words: list[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, grid) in zip(figure.subplots(1, len(grids), sharey=True), grids.items(), strict=True):
        image = axes.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        axes.set(title=title, ylabel="layer" if title == next(iter(grids)) else "")
        if title == "heads":
            axes.set_xlabel("head")
        else:
            axes.set_xticks(range(len(words)), words, rotation=45, ha="right")
    figure.colorbar(image, ax=figure.axes, label="restored fraction of the logit difference")
    figure.suptitle(f"{CLEAN!r} into {CORRUPTED!r}:{ANSWERS[0]} -{ANSWERS[1]}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    params, cfg = gptjax.load(args.model)
    tokenizer = gptjax.tokenizers.load(args.model)
    clean, corrupted = (jnp.array([tokenizer.encode(text)]) for text in (CLEAN, CORRUPTED))
    (right,), (wrong,) = (tokenizer.encode(text) for text in ANSWERS)
    metric = taps.logit_difference(right, wrong)
    T = clean.shape[1]

    def at_end(params, tokens, patches=None):
        return metric(gptjax.forward(params, tokens, cfg, patches=patches)[:, -1])

    top, bottom = (float(jax.jit(at_end)(params, tokens)) for tokens in (clean, corrupted))
    print(f"logit difference{ANSWERS[0]} -{ANSWERS[1]}: {top:.3f} after {CLEAN!r}, {bottom:.3f} after {CORRUPTED!r}")

    @jax.jit
    def vmapped_grid(params):
        return taps.patching_grid(params, clean, corrupted, cfg, metric)

    path = "blocks/*/resid"
    acts = jax.jit(lambda params: taps.tapped(params, clean, cfg, (path,))[1])(params)

    @jax.jit
    def patched(params, acts, layer, position):
        mask = (jnp.arange(cfg.n_layer) == layer)[:, None, None, None] & (jnp.arange(T) == position)[:, None]
        hidden = gptjax.backbone(params, corrupted, cfg, patches={path: taps.replace(acts[path], mask)})
        return metric(lm_logits(params, hidden[:, -1], cfg))

    def loop():
        return np.array([[float(patched(params, acts, i, t)) for t in range(T)] for i in range(cfg.n_layer)])

    started = seconds(lambda: vmapped_grid(params)), seconds(lambda: patched(params, acts, 0, 0))
    grid = np.asarray(vmapped_grid(params))
    np.testing.assert_allclose(grid, loop(), atol=1e-3)
    times = [(seconds(lambda: vmapped_grid(params)), seconds(loop)) for _ in range(args.rounds)]
    ratios = sorted(b / a for a, b in times)
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{cfg.n_layer} layers x {T} positions, s: one program {a:.2f}, Python loop {b:.2f}")
    print(f"loop over program: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
    print(f"first calls with compilation, s: {started[0]:.1f}, {started[1]:.1f} (one cell)")

    grids = {}
    for title, (site, axes) in PANELS.items():
        values = jax.jit(
            lambda params, site=site, axes=axes: taps.patching_grid(
                params, clean, corrupted, cfg, metric, site=site, axes=axes
            )
        )(params)
        grids[title] = (np.asarray(values) - bottom) / (top - bottom)
        cell = np.unravel_index(grids[title].argmax(), grids[title].shape)
        print(f"{title:16} {site:11} largest {grids[title].max():.3f} at layer {cell[0]}, {cell[1]}")
    layer = int((grids["residual stream"][:, -1] > 0.5).argmax())
    vector = taps.steering_vector(params, clean, corrupted, cfg, layer)
    for strength in (0.0, 0.5, 1.0):
        new = gptjax.generate(
            params, corrupted.tolist(), cfg, max_new_tokens=8, key=jax.random.key(0),
            patches=taps.steering(vector, layer, strength),
        )  # fmt: skip
        print(f"steered at layer {layer} by {strength}: {CORRUPTED + tokenizer.decode(new[0])!r}")
    draw(grids, [repr(tokenizer.decode([int(t)]))[1:-1] for t in corrupted[0]], args.out)


if __name__ == "__main__":
    main()
