"""The optimizer: update rules, learning rates and weight decay per parameter group, clipping, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import optim, tree
from gptjax.config import ModelConfig, OptimConfig
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
