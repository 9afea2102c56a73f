"""OptimConfig -> an optax transformation: which leaf is decayed, which rate it takes, which rule moves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from gptjax import tree
from gptjax.config import OptimConfig
from gptjax.ops.dropout import off
from gptjax.types import Params

if TYPE_CHECKING:
    from jax.memory import Space

# Every leaf is one of these by its path: stacked biases and scales are matrices by shape alone.
GROUPS = (
    ("*/kernel/a | */kernel/b | */embedding/a | */embedding/b", "adapter"),
    ("wte/* | wpe/*", "embed"),
    ("lm_head/kernel", "head"),
    ("*/kernel", "matrix"),
    ("*", "vector"),
)


def groups(params: Params) -> Params:
    """adapter, embed, head, matrix or vector at every leaf."""
    return tree.label(params, GROUPS)


def make_schedule(cfg: OptimConfig, max_steps: int) -> optax.Schedule:
    """Step -> the part of the peak rate that applies: linear warmup from initial_lr_ratio to 1, then

    cosine    down to min_lr_ratio over all remaining steps (arXiv:1608.03983)
    linear    down to min_lr_ratio over all remaining steps
    wsd       flat, then linear down to min_lr_ratio over the last decay_fraction of max_steps (arXiv:2404.06395)
    constant  flat

    The config's rates and its warmup_steps may be traced, here and in `make_optimizer`.
    """
    decay_steps = max(1, round(cfg.decay_fraction * max_steps))  # wsd

    def part(step: jax.Array) -> jax.Array:
        warmup = cfg.warmup_steps
        rest = jnp.maximum(max_steps - warmup, 1)
        first, length = (rest - jnp.minimum(rest, decay_steps), decay_steps) if cfg.schedule == "wsd" else (0, rest)
        done = jnp.clip((step - warmup - first) / jnp.minimum(rest, length), 0, 1)
        left = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "constant": jnp.ones_like(done)}
        after = cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left.get(cfg.schedule, 1 - done)
        before = cfg.initial_lr_ratio + (1 - cfg.initial_lr_ratio) * step / jnp.maximum(warmup, 1)
        return jnp.where(step < warmup, before, after)

    return part


def make_optimizer(cfg: OptimConfig, max_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then a rule for each group of leaves (`GROUPS`).

    adamw: AdamW (arXiv:1711.05101) everywhere, one rate a group.
    muon: Muon (Jordan 2024; arXiv:2502.16982) on the block matrices, each [in, out] slice of a stack for itself,
    scaled so that its updates have AdamW's root mean square (0.2) and its rates carry over; AdamW on the rest.

    An adapter's a and b take AdamW at the rate lr, decayed as matrices are, under either name: as LoRA is trained
    (arXiv:2106.09685) and as peft's users have it. DoRA's m is a vector.
    """
    schedule = make_schedule(cfg, max_steps)

    def finish(peak: float | None, decayed: bool) -> list[optax.GradientTransformation]:
        rate = cfg.lr if peak is None else peak
        decayed = decayed and not off(cfg.weight_decay)
        decay = optax.add_decayed_weights(cfg.weight_decay) if decayed else optax.identity()
        return [decay, optax.scale_by_learning_rate(lambda step: rate * schedule(step))]

    def adam(peak: float | None, decayed: bool = True) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps), *finish(peak, decayed))

    def muon() -> optax.GradientTransformation:
        dims = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        rule = contrib.scale_by_muon(
            beta=cfg.momentum, weight_dimension_numbers=lambda p: jax.tree.map(lambda _: dims, p)
        )
        return optax.chain(rule, _consistent_rms(), *finish(cfg.lr, True))

    rules = {
        "embed": adam(cfg.embed_lr),
        "head": adam(cfg.head_lr),
        "matrix": muon() if cfg.name == "muon" else adam(cfg.lr),
        "adapter": adam(cfg.lr),
        "vector": adam(cfg.vector_lr, cfg.decay == "all"),
    }
    clip = [] if off(cfg.clip_norm) else [clip_by_norm(cfg.clip_norm)]
    tx = optax.chain(*clip, optax.partition(rules, groups))
    return offloaded(tx) if cfg.offload else tx


def offloaded(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` whose state lies in the memory of the devices' hosts: it is fetched for the update and taken back."""
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, _moved(state, jax.memory.Space.Device), params, **extra)
        return updates, _moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _moved(state: optax.OptState, where: Space) -> optax.OptState:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, where) if leaf.ndim else leaf, state)


def clip_by_norm(limit: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Gradients times min(1, limit / norm): optax.clip_by_global_norm for a caller who has the norm already.

    `update(..., grad_norm=norm)` spares a pass over all gradients, and one multiplication fuses with what follows,
    where optax's division and select do not: on a CPU, AdamW with the clip takes a third of the time.
    """

    def update(updates, state, params=None, *, grad_norm=None, **_):
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _consistent_rms(rms: float = 0.2) -> optax.GradientTransformation:
    """rms * sqrt(max(in, out)): an orthogonal [in, out] matrix then has root mean square `rms`. arXiv:2502.16982."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * (rms * max(u.shape[-2:]) ** 0.5), updates))
