"""The optimizer: update rules, learning rates and weight decay per parameter group, clipping, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from gptjax import optim, tree
from gptjax.config import Config, ModelConfig, OptimConfig, TrainConfig
from gptjax.model.gpt import abstract_params

FLAT = OptimConfig(schedule="constant", clip_norm=0.0, weight_decay=0.0, lr=0.5)


def tree_of(std=1.0, seed=0):
    """The params of a small model, with random values."""
    shapes = {
        "wte/embedding": (7, 8), "wpe/embedding": (4, 8), "lm_head/kernel": (8, 7),
        "blocks/attn/q/kernel": (3, 8, 8), "blocks/mlp/up/kernel": (3, 8, 24), "blocks/mlp/down/kernel": (3, 24, 8),
        "blocks/attn/q/bias": (3, 8), "blocks/ln_1/scale": (3, 8), "blocks/x0_lambda": (3,), "ln_f/scale": (8,),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    return tree.unflatten({k: jnp.array(std * rng.normal(size=s), jnp.float32) for k, s in shapes.items()})


def first_update(cfg, params, grads):
    tx = optim.make_optimizer(cfg, 10)
    update = jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(update(params, grads)).items()}


GROUP = {"embed": "wte/* | wpe/*", "head": "lm_head/*", "matrix": "blocks/*/kernel"}


@pytest.mark.parametrize("arch", ["gpt2", "llama", "modern"])
def test_parameter_groups_follow_from_paths(arch):
    """Stacked biases and scales are in the group `vector`, although they have two axes."""
    shapes = abstract_params(
        ModelConfig(arch=arch, vocab_size=11, n_layer=2, n_head=2, d_model=8, tie_embeddings=False)
    )
    for path, group in tree.flatten(optim.groups(shapes)).items():
        expected = [name for name, pattern in GROUP.items() if tree.matches(pattern, path)] or ["vector"]
        assert [group] == expected, path


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_decay(name, decay):
    """With a zero gradient, the update is -lr * weight_decay * parameter if the parameter is decayed, otherwise 0."""
    cfg = dataclasses.replace(FLAT, name=name, weight_decay=0.2, decay=decay)
    params = tree_of()
    updates = first_update(cfg, params, jax.tree.map(jnp.zeros_like, params))
    for path, leaf in tree.flatten(params).items():
        decayed = decay == "all" or path.endswith(("kernel", "embedding"))
        np.testing.assert_allclose(updates[path], -0.5 * 0.2 * leaf if decayed else 0 * leaf, rtol=1e-5, err_msg=path)


def test_adamw_equals_the_formula_for_three_steps():
    cfg = dataclasses.replace(FLAT, lr=1e-2, weight_decay=0.1, decay="all", beta1=0.8, beta2=0.9, eps=1e-3)
    tx = optim.make_optimizer(cfg, 10)
    params = {"ln_f": {"scale": jnp.array([1.0, -2.0])}}
    state, p, m, v = tx.init(params), np.array([1.0, -2.0]), 0.0, 0.0
    for t, g in enumerate([[0.5, -1.0], [2.0, 0.1], [-1.0, 0.0]], 1):
        updates, state = tx.update({"ln_f": {"scale": jnp.array(g)}}, state, params)
        params = optax.apply_updates(params, updates)
        g = np.array(g)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        p = p - 1e-2 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.1 * p)
    np.testing.assert_allclose(params["ln_f"]["scale"], p, rtol=1e-5)


def test_each_group_has_its_learning_rate():
    cfg = dataclasses.replace(FLAT, lr=1.0, embed_lr=2.0, head_lr=3.0, vector_lr=4.0)
    params = tree_of()
    for path, update in first_update(cfg, params, tree_of(seed=1)).items():
        rate = {"wte": 2.0, "wpe": 2.0, "lm_head": 3.0}.get(path.split("/")[0], 1.0 if "kernel" in path else 4.0)
        np.testing.assert_allclose(np.abs(update), rate, rtol=1e-3, err_msg=path)  # Adam's first update is lr * sign


@pytest.fixture(scope="module")
def updates():
    """The first update of each path: by Muon, by Muon with larger gradients in layer 0, and by AdamW; the gradient."""
    params, grads = tree_of(), tree_of(seed=1)
    large = tree.map_paths(lambda path, g: g.at[0].multiply(1000.0) if "blocks" in path else g, grads)
    muon = dataclasses.replace(FLAT, name="muon")
    return {
        "muon": first_update(muon, params, grads),
        "layer 0 large": first_update(muon, params, large),
        "adamw": first_update(FLAT, params, grads),
        "gradient": tree.flatten(grads),
    }


def matrices(updates):
    return {path: leaf for path, leaf in updates["muon"].items() if path.startswith("blocks/") and "kernel" in path}


def test_muon_orthogonalises_each_layer_of_each_matrix(updates):
    """Divided by lr * 0.2 * sqrt(max(in, out)), all singular values are in the range that five Newton-Schulz iterations
    reach."""
    matrix_updates = matrices(updates)
    assert len(matrix_updates) == 3
    for path, update in matrix_updates.items():
        singular = np.linalg.svd(update / (0.5 * 0.2 * max(update.shape[-2:]) ** 0.5), compute_uv=False)
        assert singular.shape == (3, 8)
        assert singular.min() > 0.4 and singular.max() < 1.35, path


def test_muon_updates_have_the_root_mean_square_of_adamw(updates):
    for path, update in matrices(updates).items():
        assert np.sqrt((update**2).mean()) == pytest.approx(0.5 * 0.2, rel=0.2), path


def test_muon_updates_are_descent_directions(updates):
    for path, update in matrices(updates).items():
        assert (np.sum(update * updates["gradient"][path], (1, 2)) < 0).all(), path


def test_muon_treats_layers_separately(updates):
    """A larger gradient in one layer changes neither the other layers' updates nor its own."""
    for path, update in matrices(updates).items():
        np.testing.assert_allclose(updates["layer 0 large"][path], update, atol=2e-3, err_msg=path)


def test_muon_applies_adamw_to_embeddings_head_and_vectors(updates):
    for path in updates["muon"].keys() - matrices(updates).keys():
        np.testing.assert_array_equal(updates["muon"][path], updates["adamw"][path], err_msg=path)


def test_clipping_uses_the_global_norm():
    tx = optim.make_optimizer(dataclasses.replace(FLAT, clip_norm=1.0, eps=1e3, lr=1e3), 10)
    grads = {"lm_head": {"kernel": jnp.full((2, 2), 3.0)}, "ln_f": {"scale": jnp.full(4, 4.0)}}  # norm 10
    updates, _ = tx.update(grads, tx.init(grads), grads)  # with a large eps, Adam is close to SGD
    np.testing.assert_allclose(updates["lm_head"]["kernel"], -0.3, rtol=1e-2)
    np.testing.assert_allclose(updates["ln_f"]["scale"], -0.4, rtol=1e-2)


def test_clip_by_norm_equals_optax_and_accepts_a_precomputed_norm():
    grads = tree_of()
    norm = float(optax.tree.norm(grads))
    for limit in (0.5 * norm, 2 * norm):
        ours, theirs = optim.clip_by_norm(limit), optax.clip_by_global_norm(limit)
        expected = theirs.update(grads, theirs.init(grads))[0]
        for options in ({}, {"grad_norm": norm}):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                ours.update(grads, ours.init(grads), **options)[0],
                expected,
            )
    clipped = optim.clip_by_norm(1.0).update(grads, optax.EmptyState(), grad_norm=4.0)[0]
    np.testing.assert_allclose(clipped["ln_f"]["scale"], grads["ln_f"]["scale"] / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 100 steps with 20 steps of warmup from 0.1 to 1; the decay ends at 0.2; wsd decays over the last 40 steps
        ("constant", {0: 0.1, 10: 0.55, 20: 1.0, 99: 1.0}),
        ("linear", {0: 0.1, 20: 1.0, 60: 0.6, 100: 0.2, 120: 0.2}),
        ("cosine", {0: 0.1, 20: 1.0, 40: 0.8828, 60: 0.6, 100: 0.2, 120: 0.2}),
        ("wsd", {0: 0.1, 19: 0.955, 20: 1.0, 60: 1.0, 80: 0.6, 100: 0.2, 120: 0.2}),
    ],
)
def test_schedules(schedule, expected):
    cfg = OptimConfig(
        schedule=schedule, warmup_steps=20, initial_lr_ratio=0.1, min_lr_ratio=0.2, decay_fraction=0.4
    )  # fmt: skip
    rate = optim.make_schedule(cfg, 100)(jnp.arange(121))
    np.testing.assert_allclose([rate[step] for step in expected], list(expected.values()), atol=1e-4)

    @jax.jit
    def traced(warmup, least):
        return optim.make_schedule(dataclasses.replace(cfg, warmup_steps=warmup, min_lr_ratio=least), 100)(
            jnp.arange(121)
        )

    np.testing.assert_allclose(traced(20, 0.2), rate, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_without_warmup_start_at_the_peak(schedule):
    for steps in (1, 10):
        assert float(optim.make_schedule(OptimConfig(schedule=schedule), steps)(0)) == 1.0


# ---------------------------------------------------------------- switches of the optimizer, against numpy and optax

KERNEL = "blocks/mlp/up/kernel"


def updates_of(cfg, params, gradients, max_steps=10):
    """The updates of successive steps, all from the same params, as dicts of arrays by path."""
    tx, out = optim.make_optimizer(cfg, max_steps), []
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        out.append({path: np.asarray(leaf) for path, leaf in tree.flatten(updates).items()})
    return out


@pytest.fixture(scope="module")
def steps():
    """The params, and the gradients of three steps."""
    return tree_of(), [tree_of(seed=seed) for seed in (1, 2, 3)]


def reference_muon(gradients, **options):
    """Muon of optax.contrib for one layer of one matrix, with learning rate 0.5 and without weight decay."""
    tx = contrib.muon(0.5, beta=FLAT.momentum, **options)
    params = {"w": jnp.zeros_like(gradients[0])}
    state, out = tx.init(params), []
    for g in gradients:
        updates, state = tx.update({"w": g}, state, params)
        out.append(np.asarray(updates["w"]))
    return out


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"nesterov": False}, {"nesterov": False}),
        ({"preconditioning": "spectral"}, {"preconditioning": "spectral"}),
        ({"preconditioning": "aol"}, {"preconditioning": "aol"}),
        ({"preconditioning": "schatten"}, {"preconditioning": "schatten"}),
        ({"muon_scale": "width"}, {"consistent_rms": None}),
    ],
)
def test_variants_of_muon_equal_optax(steps, options, theirs):
    """Layer 1 of a stack of three, against optax's optimizer of this matrix alone."""
    params, gradients = steps
    ours = updates_of(dataclasses.replace(FLAT, name="muon", **options), params, gradients)
    single = [tree.flatten(g)[KERNEL][1] for g in gradients]
    default = updates_of(dataclasses.replace(FLAT, name="muon"), params, gradients)
    for update, expected in zip(ours, reference_muon(single, **{"consistent_rms": 0.2} | theirs), strict=True):
        np.testing.assert_allclose(update[KERNEL][1], expected, atol=1e-5)
    assert np.abs(update[KERNEL] - default[-1][KERNEL]).max() > 1e-3  # each variant differs from Muon


@pytest.mark.parametrize("path", ["blocks/mlp/up/kernel", "blocks/mlp/down/kernel"])
@pytest.mark.parametrize("scale", ["rms", "width"])
def test_normuon_equals_algorithm_1(steps, path, scale):
    """In numpy, from the updates that Muon orthogonalises. With scale=rms, the root mean square is 0.2, as in the
    paper."""
    params, gradients = steps
    muon = updates_of(dataclasses.replace(FLAT, name="muon", muon_scale=scale), params, gradients)
    ours = updates_of(dataclasses.replace(FLAT, name="muon", muon_scale=scale, normuon=0.9), params, gradients)
    n_in, n_out = tree.flatten(params)[path].shape[1:]
    factor = 0.2 * max(n_in, n_out) ** 0.5 if scale == "rms" else max(1, n_out / n_in) ** 0.5
    v = np.zeros((3, n_out))
    for before, update in zip(muon, ours, strict=True):
        orthogonal = -before[path].astype(np.float64) / 0.5 / factor  # the learning rate is 0.5
        v = 0.9 * v + 0.1 * (orthogonal**2).mean(1)
        expected = orthogonal / (np.sqrt(v) + 1e-10)[:, None, :]
        for layer in range(3):
            frobenius = np.sqrt((expected[layer] ** 2).sum())
            expected[layer] *= factor * min(n_in, n_out) ** 0.5 / frobenius
        np.testing.assert_allclose(update[path], -0.5 * expected, rtol=1e-3, atol=1e-5)
        if scale == "rms":
            assert np.sqrt((update[path] ** 2).mean((1, 2))) == pytest.approx(0.5 * 0.2, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cautious_equals_numpy(steps, name):
    """Elements whose sign differs from that of the gradient are 0; the others are divided by their fraction, in each
    layer of stacked leaves."""
    params, gradients = steps
    plain = updates_of(dataclasses.replace(FLAT, name=name), params, gradients)
    ours = updates_of(dataclasses.replace(FLAT, name=name, cautious=True), params, gradients)
    masked = 0
    for before, update, grads in zip(plain, ours, gradients, strict=True):
        for path, g in tree.flatten(grads).items():
            layers = before[path].shape[0] if path.startswith("blocks") else 1
            u, g = (np.asarray(x, np.float64).reshape(layers, -1) for x in (before[path], g))
            mask = -u * g > 0
            masked += (~mask).sum()
            expected = u * mask / np.maximum(mask.mean(1, keepdims=True), 1e-3)
            np.testing.assert_allclose(update[path].reshape(layers, -1), expected, rtol=1e-5, atol=1e-7, err_msg=path)
    assert masked > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cautious_decay_applies_where_the_update_moves_a_weight_towards_0(steps, name):
    params, gradients = steps
    plain = updates_of(dataclasses.replace(FLAT, name=name), params, gradients)
    cfg = dataclasses.replace(FLAT, name=name, weight_decay=0.2, cautious_decay=True)
    for before, update in zip(plain, updates_of(cfg, params, gradients), strict=True):
        for path, p in tree.flatten(params).items():
            decayed = path.endswith(("kernel", "embedding"))
            toward = (-before[path] * p >= 0) & decayed
            assert not decayed or 0.2 < toward.mean() < 0.8
            np.testing.assert_allclose(update[path], before[path] - 0.5 * 0.2 * p * toward, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cautious_decay", [False, True])
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # the factors of steps 0, 1, 2 and 4 of 4; the learning rate warms up from 0 to 1 in one step, then is linear
        ("linear", [1, 0.75, 0.5, 0]),
        ("cosine", [1, 0.8536, 0.5, 0]),
        ("lr", [0, 1, 0.6667, 0]),
    ],
)
def test_weight_decay_schedules(schedule, expected, cautious_decay):
    """With a zero gradient, the update is -lr * factor of lr * weight_decay * factor * parameter."""
    cfg = OptimConfig(
        lr=0.5, clip_norm=0.0, weight_decay=0.2, weight_decay_schedule=schedule, schedule="linear", warmup_steps=1,
        cautious_decay=cautious_decay,
    )  # fmt: skip
    params = {"lm_head": {"kernel": jnp.ones((2, 3))}}
    rate = optim.make_schedule(cfg, 4)
    found = updates_of(cfg, params, [jax.tree.map(jnp.zeros_like, params)] * 5, 4)
    for step, factor in zip((0, 1, 2, 4), expected, strict=True):
        np.testing.assert_allclose(optim.decay_schedule(cfg, 4)(step), 0.2 * factor, atol=1e-4)
        np.testing.assert_allclose(found[step]["lm_head/kernel"], -0.5 * rate(step) * 0.2 * factor, atol=1e-5)

    def traced(decay):
        traced_cfg = dataclasses.replace(cfg, weight_decay=decay)
        tx = optim.make_optimizer(traced_cfg, 4)
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    np.testing.assert_allclose(jax.jit(traced)(0.2)["lm_head"]["kernel"], found[0]["lm_head/kernel"], atol=1e-7)


def test_switches_that_are_off_leave_the_optimizer_state_as_it_was():
    """Checkpoints of earlier releases have these leaves."""
    params = {"blocks": {"q": {"kernel": jnp.ones((1, 2, 2))}}, "ln_f": {"scale": jnp.ones(2)}}
    state = optim.make_optimizer(OptimConfig(name="muon"), 10).init(params)
    prefix = "1/inner_states"
    assert sorted(tree.flatten(state)) == sorted(
        [f"{prefix}/{group}/inner_state/0/count" for group in ("adapter", "embed", "head", "matrix", "vector")]
        + [f"{prefix}/{group}/inner_state/2/count" for group in ("adapter", "embed", "head", "vector")]
        + [f"{prefix}/matrix/inner_state/0/mu/blocks/q/kernel", f"{prefix}/matrix/inner_state/0/ns_coeffs"]
        + [f"{prefix}/matrix/inner_state/3/count"]
        + [f"{prefix}/vector/inner_state/0/{moment}/ln_f/scale" for moment in ("mu", "nu")]
    )
    tx = optax.sgd(0.1)
    assert optim.with_average(tx, Config()) is tx
    assert optim.average_of(params, state) is params


# ---------------------------------------------------------------- averages of the weights


def averages(train, n=6):
    """The weights after each of n steps, and the averages after each step, starting with those before the first."""
    cfg = Config(train=TrainConfig(max_steps=n, **train))
    tx = optim.with_average(optax.adam(0.1), cfg)
    params = {"w": jnp.array([1.0, -2.0])}
    state = tx.init(params)
    weights, means = [], [optim.average_of(params, state)["w"]]

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update({"w": g}, state, params)
        return optax.apply_updates(params, updates), state

    for g in np.random.default_rng(0).normal(size=(n, 2)):
        params, state = step(params, state, jnp.float32(g))
        weights.append(np.asarray(params["w"]))
        means.append(np.asarray(optim.average_of(params, state)["w"]))
    return weights, means


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_ema_equals_optax_and_numpy(decay):
    weights, means = averages({"ema": decay})
    np.testing.assert_array_equal(means[0], [1, -2])
    ema, total = optax.ema(decay, debias=True), np.zeros(2)
    state = ema.init(weights[0])
    for t, (w, mean) in enumerate(zip(weights, means[1:], strict=True), 1):
        theirs, state = ema.update(w, state)
        total = decay * total + (1 - decay) * w.astype(np.float64)
        np.testing.assert_allclose(mean, total / (1 - decay**t), rtol=1e-6)
        if decay < 0.999:  # with a larger decay, optax computes 1 - decay**t in float32 with few digits
            np.testing.assert_allclose(mean, theirs, rtol=1e-6)


@pytest.mark.parametrize(("last", "n"), [(4, 4), (0.5, 3), (1, 1), (0.01, 1), (6, 6)])
def test_the_average_of_the_last_steps_is_uniform(last, n):
    weights, means = averages({"average_last": last})
    for step in range(1, 7):
        first = min(6 - n, step - 1)
        np.testing.assert_allclose(means[step], np.mean(weights[first:step], 0), rtol=1e-6)


def test_averaging_changes_no_update():
    with_average, without = averages({"ema": 0.9}), averages({})
    np.testing.assert_array_equal(with_average[0], without[0])
    np.testing.assert_array_equal(without[0], without[1][1:])


def test_a_skipped_step_does_not_change_the_average():
    from gptjax.training.step import TrainState, make_train_step
    from gptjax.types import Mean

    tx = optim.averaged(optax.sgd(0.1), optim.ema_weight(0.9))
    step = jax.jit(make_train_step(lambda p, x, key: (Mean(jnp.sum(p["w"] * x), jnp.float32(1)), {}), tx))
    state, _ = step(TrainState.create({"w": jnp.ones(2)}, tx=tx, key=jax.random.key(0)), jnp.ones(2))
    skipped, metrics = step(state, jnp.full(2, jnp.nan))
    assert int(metrics["skipped"]) == 1 and int(skipped.opt_state.step) == 1
    np.testing.assert_array_equal(skipped.opt_state.mean["w"], state.opt_state.mean["w"])
