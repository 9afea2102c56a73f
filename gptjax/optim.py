"""Builds the optimizer that an OptimConfig describes, as an optax gradient transformation.

Every parameter belongs to a group, which decides its update rule (AdamW or Muon), learning rate and weight decay.
"""

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

# Pairs (path pattern, parameter group). A leaf's shape does not determine its group, because the biases and scales of
# stacked layers are matrices.
GROUPS = (
    ("*/kernel/a | */kernel/b | */kernel/d | */embedding/a | */embedding/b", "adapter"),
    ("wte/* | wpe/*", "embed"),
    ("lm_head/kernel", "head"),
    ("*/kernel", "matrix"),
    ("*", "vector"),
)


def groups(params: Params) -> Params:
    """Returns the parameter group of every leaf: adapter, embed, head, matrix or vector."""
    return tree.label(params, GROUPS)


def make_schedule(cfg: OptimConfig, max_steps: int) -> optax.Schedule:
    """Returns the learning rate schedule, a function of the step.

    Its result is the factor by which the peak learning rate is multiplied. The factor warms up linearly from
    initial_lr_ratio to 1 over warmup_steps. Then, with the schedule

    cosine    decays to min_lr_ratio over all remaining steps (arXiv:1608.03983)
    linear    decays to min_lr_ratio over all remaining steps
    wsd       stays 1, then decays linearly to min_lr_ratio over the last decay_fraction of max_steps
              (arXiv:2404.06395)
    constant  stays 1

    In this function and in `make_optimizer`, learning rates and warmup_steps of the config may be tracers.
    """
    decay_steps = max(1, round(cfg.decay_fraction * max_steps))  # wsd

    def schedule(step: jax.Array) -> jax.Array:
        warmup = cfg.warmup_steps
        rest = jnp.maximum(max_steps - warmup, 1)
        first, length = (rest - jnp.minimum(rest, decay_steps), decay_steps) if cfg.schedule == "wsd" else (0, rest)
        done = jnp.clip((step - warmup - first) / jnp.minimum(rest, length), 0, 1)
        left = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "constant": jnp.ones_like(done)}
        after = cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left.get(cfg.schedule, 1 - done)
        before = cfg.initial_lr_ratio + (1 - cfg.initial_lr_ratio) * step / jnp.maximum(warmup, 1)
        return jnp.where(step < warmup, before, after)

    return schedule


def make_optimizer(cfg: OptimConfig, max_steps: int) -> optax.GradientTransformation:
    """Returns an optimizer that clips gradients by global norm, then applies the update rule of each parameter group
    (`GROUPS`).

    cfg.name="adamw": AdamW (arXiv:1711.05101) for all parameters, with a learning rate per group.
    cfg.name="muon": Muon (Jordan 2024; arXiv:2502.16982) for the matrices of the blocks, AdamW for all other
    parameters. Each [in, out] slice of stacked layers is orthogonalised separately. Muon's updates are scaled to a root
    mean square of 0.2, that of AdamW's updates, so that AdamW's learning rates can be used.

    The matrices of an adapter are always updated by AdamW, with learning rate lr and the weight decay of
    matrices (arXiv:2106.09685), as in peft. DoRA's magnitude vector m is in the group `vector`.
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
    """Returns `tx` with its state kept in host memory; each update copies the state to the device and back."""
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, _put(state, jax.memory.Space.Device), params, **extra)
        return updates, _put(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _put(state: optax.OptState, memory: Space) -> optax.OptState:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory) if leaf.ndim else leaf, state)


def clip_by_norm(limit: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that scales gradients by min(1, limit / norm), where `norm` is their global norm.

    Unlike `optax.clip_by_global_norm`, it can use a global norm that is already known: `update(..., grad_norm=norm)`
    saves a pass over all gradients.

    It is also faster, because XLA fuses the multiplication by min(1, limit / norm) with the operations after it, but
    does not fuse the division and the select in `optax.clip_by_global_norm`. On a CPU, clipping and AdamW together take
    a third of the time that they take with `optax.clip_by_global_norm`.
    """

    def update(updates, state, params=None, *, grad_norm=None, **_):
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _consistent_rms(rms: float = 0.2) -> optax.GradientTransformation:
    """Returns a transformation that scales updates by rms * sqrt(max(in, out)), which gives an orthogonal [in, out]
    matrix the root mean square `rms`.

    Source: arXiv:2502.16982.
    """
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * (rms * max(u.shape[-2:]) ** 0.5), updates))
