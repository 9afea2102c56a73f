"""Builds the optimizer that an OptimConfig describes, as an optax gradient transformation.

Every parameter belongs to a parameter group, which determines the update rule (AdamW or Muon), the learning rate and
the weight decay.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from gptjax import tree
from gptjax.config import Config, OptimConfig
from gptjax.ops.dropout import off
from gptjax.types import Params

if TYPE_CHECKING:
    from jax.memory import Space

# `GROUPS` is a tuple of pairs (path pattern, parameter group). The group of a leaf cannot be determined from its shape,
# because the biases and scales of stacked layers are matrices.
GROUPS = (
    ("*/kernel/a | */kernel/b | */kernel/d | */embedding/a | */embedding/b", "adapter"),
    ("wte/* | wpe/*", "embed"),
    ("lm_head/kernel", "head"),
    ("*/kernel", "matrix"),
    ("*", "vector"),
)


def groups(params: Params) -> Params:
    """Returns a pytree with the name of the parameter group of every leaf: adapter, embed, head, matrix or vector."""
    return tree.label(params, GROUPS)


def make_schedule(cfg: OptimConfig, max_steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule, which is a function of the step.

    The schedule returns the factor by which the peak learning rate is multiplied. The learning-rate factor increases
    linearly from initial_lr_ratio to 1 over warmup_steps. After the warmup, the learning-rate factor depends on
    cfg.schedule:

    cosine: The learning-rate factor decays to min_lr_ratio along a cosine over all remaining steps (arXiv:1608.03983).
    linear: The learning-rate factor decays linearly to min_lr_ratio over all remaining steps.
    wsd: The learning-rate factor stays 1 after the warmup, and decays linearly to min_lr_ratio over the last
      decay_fraction of max_steps (arXiv:2404.06395).
    constant: The learning-rate factor stays 1.

    The learning rates and warmup_steps in the config may be tracers, both in `make_schedule` and in `make_optimizer`.
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


def decay_schedule(cfg: OptimConfig, max_steps: int) -> optax.Schedule:
    """Returns the schedule of the weight decay coefficient, which is a function of the step, as
    cfg.weight_decay_schedule selects it.

    In each update, weight decay subtracts learning rate * coefficient * parameter from the parameter. If
    weight_decay_schedule is "lr", the coefficient is proportional to the learning rate, so that the decay of the
    parameters is proportional to the square of the learning rate's factor (AdamC, arXiv:2506.02285).
    """
    factors = {
        "constant": lambda step: 1.0, "lr": make_schedule(cfg, max_steps),
        "linear": optax.linear_schedule(1.0, 0.0, max_steps), "cosine": optax.cosine_decay_schedule(1.0, max_steps),
    }  # fmt: skip
    return lambda step: cfg.weight_decay * factors[cfg.weight_decay_schedule](step)


def make_optimizer(cfg: OptimConfig, max_steps: int) -> optax.GradientTransformation:
    """Returns an optimizer that clips gradients by global norm, then applies the update rule of each parameter group
    (`GROUPS`).

    If cfg.name is "adamw", AdamW (arXiv:1711.05101) updates all parameters, with a learning rate per parameter group.
    If cfg.name is "muon", Muon (Jordan 2024; arXiv:2502.16982) updates the matrices of the blocks, and AdamW updates
    all other parameters. Muon orthogonalises each [in, out] matrix of stacked layers separately. By default, Muon's
    updates are scaled to a root mean square of 0.2, which is typical of AdamW's updates, so that AdamW's learning rates
    can be used. The settings cfg.normuon, cfg.cautious and cfg.cautious_decay are explained at `per_neuron`, `cautious`
    and `decayed_weights`.

    AdamW always updates the matrices of an adapter, with the learning rate cfg.lr and the weight decay of matrices
    (arXiv:2106.09685), as in peft. DoRA's magnitude vector m is in the parameter group `vector`.
    """
    schedule = make_schedule(cfg, max_steps)

    def finish(peak: float | None, decayed: bool) -> list[optax.GradientTransformation]:
        rate = cfg.lr if peak is None else peak
        decayed = decayed and not off(cfg.weight_decay)
        decay = decayed_weights(cfg, max_steps) if decayed else optax.identity()
        return [decay, optax.scale_by_learning_rate(lambda step: rate * schedule(step))]

    def direction(*rule: optax.GradientTransformation) -> list[optax.GradientTransformation]:
        return [cautious(optax.chain(*rule))] if cfg.cautious else [*rule]

    def adam(peak: float | None, decayed: bool = True) -> optax.GradientTransformation:
        rule = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
        return optax.chain(*direction(rule), *finish(peak, decayed))

    def muon() -> optax.GradientTransformation:
        dims = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        rule = contrib.scale_by_muon(
            beta=cfg.momentum, nesterov=cfg.nesterov, preconditioning=cfg.preconditioning,
            weight_dimension_numbers=lambda p: jax.tree.map(lambda _: dims, p),
        )  # fmt: skip
        normalised = [per_neuron(cfg.normuon)] if cfg.normuon else []
        scale = _consistent_rms() if cfg.muon_scale == "rms" else _by_width()
        return optax.chain(*direction(rule, *normalised, scale), *finish(cfg.lr, True))

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
    """Wraps the optimizer `tx` so that its state is kept in host memory; each update copies the state to the device and
    back."""
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, _put(state, jax.memory.Space.Device), params, **extra)
        return updates, _put(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _put(state: optax.OptState, memory: Space) -> optax.OptState:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory) if leaf.ndim else leaf, state)


def clip_by_norm(limit: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Returns a gradient transformation that multiplies all gradients by min(1, limit / norm), where `norm` is the
    global norm of the gradients.

    If the global norm is already known, `update(..., grad_norm=norm)` saves a pass over all gradients, which
    `optax.clip_by_global_norm` does not support.

    `clip_by_norm` is also faster than `optax.clip_by_global_norm`, because XLA fuses the multiplication by min(1, limit
    / norm) with the following operations, but does not fuse the division and the select in `optax.clip_by_global_norm`.
    On a CPU, `clip_by_norm` followed by AdamW takes a third of the time of `optax.clip_by_global_norm` followed by
    AdamW.
    """

    def update(updates, state, params=None, *, grad_norm=None, **_):
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


class PerNeuronState(NamedTuple):
    """The state of `per_neuron`: the second moment `nu` of each output neuron, a pytree of leaves [.., 1, out]."""

    nu: Params


def per_neuron(beta: float, eps: float = 1e-10) -> optax.GradientTransformation:
    """Returns a gradient transformation that normalises orthogonalised updates [.., in, out] per output neuron
    (NorMuon).

    The second moment nu of each neuron is an exponential moving average of the mean square of the neuron's updates,
    with decay rate `beta`. Updates are divided by sqrt(nu) + eps, where nu is the second moment of the neuron, and each
    matrix is then scaled to the Frobenius norm of an orthogonal matrix, sqrt(min(in, out)).

    Source: arXiv:2510.05491, algorithm 1. With optim.muon_scale=rms, each update has a root mean square of 0.2, as in
    NorMuon's paper.
    """

    def init(params):
        return PerNeuronState(jax.tree.map(lambda p: jnp.zeros_like(p[..., :1, :]), params))

    def update(updates, state, params=None):
        nu = jax.tree.map(
            lambda u, v: beta * v + (1 - beta) * jnp.mean(u * u, axis=-2, keepdims=True), updates, state.nu
        )

        def normalise(u, v):
            u = u / (jnp.sqrt(v) + eps)
            norm = jnp.linalg.norm(u, axis=(-2, -1), keepdims=True)
            return u * (min(u.shape[-2:]) ** 0.5 / (norm + eps))

        return jax.tree.map(normalise, updates, nu), PerNeuronState(nu)

    return optax.GradientTransformation(init, update)


def cautious(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps the optimizer `tx`: sets elements of an update to 0 if their sign differs from the sign of the gradient.

    `tx` must return updates that have not been multiplied by the negative learning rate yet. Elements of an update that
    are not set to 0 are divided by max(f, 1e-3), where f is the fraction of these elements, computed per layer for
    stacked layers.

    Source: arXiv:2411.16085, algorithm 1, with the normalisation in the code of the paper's authors.
    """

    def update(grads, state, params=None):
        updates, state = tx.update(grads, state, params)

        def masked(path, u, g):
            mask = (u * g > 0).astype(u.dtype)
            fraction = jnp.mean(mask, axis=tuple(range("blocks" in path.split("/"), u.ndim)), keepdims=True)
            return u * (mask / jnp.maximum(fraction, 1e-3))

        return tree.map_paths(masked, updates, grads), state

    return optax.GradientTransformation(tx.init, update)


def decayed_weights(cfg: OptimConfig, max_steps: int) -> optax.GradientTransformation:
    """Returns a gradient transformation that adds coefficient * parameter to the updates (weight decay); the
    coefficient follows cfg.weight_decay_schedule.

    With cfg.cautious_decay, weight decay is applied only to elements with update * parameter >= 0, which the update
    moves towards 0 (arXiv:2510.12402, algorithm 1).
    """
    scheduled = cfg.weight_decay_schedule != "constant"
    decay = optax.add_decayed_weights(decay_schedule(cfg, max_steps) if scheduled else cfg.weight_decay)
    if not cfg.cautious_decay:
        return decay

    def update(updates, state, params=None):
        decayed, state = decay.update(updates, state, params)
        return jax.tree.map(lambda u, d, p: jnp.where(u * p >= 0, d, u), updates, decayed, params), state

    return optax.GradientTransformation(decay.init, update)


def _by_width() -> optax.GradientTransformation:
    """Returns a gradient transformation that multiplies updates of matrices [in, out] by sqrt(max(1, out / in)).
    Source: Jordan 2024."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
    )


def _consistent_rms(rms: float = 0.2) -> optax.GradientTransformation:
    """Returns a gradient transformation that multiplies updates by rms * sqrt(max(in, out)), so that an orthogonal
    matrix [in, out] gets the root mean square `rms`.

    Source: arXiv:2502.16982.
    """
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * (rms * max(u.shape[-2:]) ** 0.5), updates))


# ---------------------------------------------------------------- averages of the parameters


class AveragedState(NamedTuple):
    """The state of `averaged`: the state of the optimizer, the number of updates, and the average of the params."""

    inner: Any
    step: jax.Array
    mean: Params


def averaged(tx: optax.GradientTransformation, weight: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Wraps the optimizer `tx` so that its state also holds an average of the params. The updates of `tx` are not
    changed.

    After update n = 1, 2, .., the average of the params becomes mean = (1 - w) * mean + w * params, where w =
    weight(n).

    If `weight` is `ema_weight(0.999)`, the average is an exponential moving average of the params. If `weight` is
    `last_weight(900)`, the average equals the params until update 900, and after update 900 the uniform average of the
    params after the updates 901, 902, ..
    """
    inner = optax.with_extra_args_support(tx)

    def init(params):
        # The params are copied, because a compiled step that donates its state cannot donate the same buffer twice.
        return AveragedState(inner.init(params), jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, **extra):
        updates, new = inner.update(updates, state.inner, params, **extra)
        step = optax.safe_increment(state.step)
        w = weight(step)
        mean = jax.tree.map(
            lambda m, p: (1 - w).astype(m.dtype) * m + w.astype(p.dtype) * p,
            state.mean, optax.apply_updates(params, updates),
        )  # fmt: skip
        return updates, AveragedState(new, step, mean)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_weight(decay: float) -> optax.Schedule:
    """Returns the weight of the newest params in an exponential moving average with bias correction, as in `optax.ema`:
    (1 - decay) / (1 - decay**n) after n updates, which is 1 after the first update.

    Sources: weight averaging is from arXiv:2411.18704, and bias correction is from arXiv:1412.6980, section 3.
    """
    return lambda n: (1 - decay) / -jnp.expm1(math.log(decay) * n)


def last_weight(begin: int) -> optax.Schedule:
    """Returns the weight of the newest params in a uniform average that begins after update `begin`.

    Source: arXiv:1803.05407, equation 1; arXiv:2209.14981.
    """
    return lambda n: 1 / jnp.maximum(n - begin, 1).astype(jnp.float32)


def with_average(tx: optax.GradientTransformation, cfg: Config) -> optax.GradientTransformation:
    """Wraps the optimizer `tx` so that its state holds the average of the params that train.ema or train.average_last
    selects; returns `tx` itself if both settings are 0."""
    train = cfg.train
    if train.ema:
        tx = averaged(tx, ema_weight(train.ema))
    elif train.average_last:
        last = train.average_last if train.average_last >= 1 else max(1, round(train.average_last * train.max_steps))
        tx = averaged(tx, last_weight(max(0, train.max_steps - int(last))))
    else:
        return tx
    return offloaded(tx) if cfg.optim.offload else tx


def average_of(params: Any, opt_state: Any) -> Any:
    """Returns the average of the params that the optimizer state `opt_state` holds, or `params` if the state holds no
    average."""
    if not isinstance(opt_state, AveragedState):
        return params

    # with optim.offload, the average of the params is in host memory
    def on_device(mean: jax.Array, p: jax.Array) -> jax.Array:
        return mean if mean.sharding.memory_kind == p.sharding.memory_kind else jax.device_put(mean, p.sharding)

    return jax.tree.map(on_device, opt_state.mean, params)
