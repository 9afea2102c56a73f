"""Token trees: common prefixes are stored once, and losses and gradients are those of one row per sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config import ModelConfig
from gptjax.data import packing, token_tree
from gptjax.data.packing import Encoded
from gptjax.errors import UserError
from gptjax.types import Batch

# letters as ids: the example of the module's docstring
FIRST, SECOND = "u1<t>aE", "u1aEv2bE"


def sequence(text, learn):
    """The letters of a text as ids; those in the slice `learn` have the loss weight 1."""
    weights = np.zeros(len(text), np.float32)
    weights[learn] = 1
    return np.array([ord(c) for c in text], np.int32), weights


def paths(tree):
    """The sequences of tokens on the paths of a tree, with the targets that have a weight."""
    children = token_tree.children(tree)
    found = []

    def walk(node, path, learned):
        path, learned = [*path, int(tree.tokens[node])], dict(learned)
        if tree.weights[node]:
            learned[len(path)] = (int(tree.targets[node]), float(tree.weights[node]))
        if node not in children:
            found.append((path, learned))
        for child in children.get(node, ()):
            walk(child, path, learned)

    for root in children[-1]:
        walk(root, [], {})
    return found


def test_the_example_of_the_docstring():
    tree = token_tree.merge([sequence(FIRST, slice(2, 7)), sequence(SECOND, slice(6, 8))])
    assert "".join(map(chr, tree.tokens)) == "u1<t>aaEv2b"
    assert "".join(map(chr, tree.targets)) == "1<t>aEEv2bE"
    assert tree.weights.tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6]
    assert tree.subtree_end.tolist() == [11, 11, 6, 6, 6, 6, 11, 11, 11, 11, 11]


def test_one_sequence_is_a_tree_of_one_path():
    ids, weights = sequence(FIRST, slice(2, 7))
    tree = token_tree.merge([(ids, weights)])
    np.testing.assert_array_equal(tree.tokens, ids[:-1])
    np.testing.assert_array_equal(tree.weights, weights[1:])
    np.testing.assert_array_equal(tree.positions, np.arange(6))
    assert (tree.subtree_end == 6).all()


def test_two_targets_after_one_token_need_it_twice():
    tree = token_tree.merge([sequence("abX", slice(2, 3)), sequence("abY", slice(2, 3))])
    assert "".join(map(chr, tree.tokens)) == "abb" and "".join(map(chr, tree.targets)) == "bXY"
    same = token_tree.merge([sequence("abX", slice(2, 3))] * 2)
    assert len(same.tokens) == 2 and same.weights.tolist() == [0, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=5), st.randoms())
def test_every_sequence_is_on_a_path_with_its_targets(sequences, random):
    weighted = [(np.array(ids, np.int32), np.array([float(random.random() < 0.5) for _ in ids])) for ids in sequences]
    tree = token_tree.merge(weighted)
    assert tree.weights.sum() == sum(weights[1:].sum() for _, weights in weighted)
    for ids, weights in weighted:
        wanted = {i: int(ids[i]) for i in range(1, len(ids)) if weights[i]}
        assert any(
            path[: len(ids) - 1] == ids[:-1].tolist()
            and all(learned.get(i, (None,))[0] == t for i, t in wanted.items())
            for path, learned in paths(tree)
        )
    n = len(tree.tokens)
    assert n <= sum(len(ids) - 1 for ids in sequences)
    assert (tree.subtree_end > np.arange(n)).all() and (tree.subtree_end <= n).all()


SHAPES = {
    "gpt2": dict(arch="gpt2"),
    "llama": dict(arch="llama", n_kv_head=1),
    "modern": dict(arch="modern", smear=False),
    "window": dict(arch="llama", sliding_window=4),
    "alibi": dict(arch="gpt2", position="alibi"),
    "sinusoidal": dict(arch="gpt2", position="sinusoidal"),
}


def random_sequences(rng, n_turns=6):
    """Sequences as a template makes them that drops the reasoning of earlier answers: each answer once in full, and
    without its first tokens in the prompts after it."""
    history, sequences = rng.integers(1, 50, 6), []
    for _ in range(n_turns):
        history = np.concatenate([history, rng.integers(1, 50, rng.integers(2, 6))])
        thought, answer = rng.integers(1, 50, rng.integers(2, 9)), rng.integers(1, 50, rng.integers(2, 6))
        ids = np.concatenate([history, thought, answer])
        sequences.append((ids.astype(np.int32), (np.arange(len(ids)) >= len(history)).astype(np.float32)))
        history = np.concatenate([history, answer])
    return sequences


@pytest.mark.parametrize(
    "name", [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_loss_and_gradients_are_those_of_one_row_per_sequence(name):
    rng = np.random.default_rng(0)
    talks = [random_sequences(rng) for _ in range(3)]
    plain = [sequence("another example", slice(3, 9))]
    trees = Encoded([plain[0][0] % 50], [plain[0][1]], 0, [token_tree.merge(talk) for talk in talks])
    rows = [pair for talk in talks for pair in talk] + [(plain[0][0] % 50, plain[0][1])]
    alone = Encoded([ids for ids, _ in rows], [weights for _, weights in rows], 0)
    packed = packing.packed(trees, 160)
    assert packed.segment_ids.max() > 1  # several examples in one row
    assert (packed.segment_ids > 0).sum() < 0.6 * sum(len(ids) - 1 for ids in alone.rows)
    cfg = ModelConfig(vocab_size=50, n_layer=2, n_head=2, d_model=32, context_length=160, **SHAPES[name])
    params = gptjax.init_params(jax.random.key(0), cfg)
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), params)

    @jax.jit
    def loss_and_gradient(params, batch):
        def total(params):
            metrics = gptjax.losses.next_token(cfg)(params, batch, None)[0]
            return metrics.total, metrics

        (_, metrics), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return metrics, gradient

    (ours, gradient), (theirs, expected) = (
        loss_and_gradient(params, Batch(*rows)) for rows in (packed, packing.padded(alone))
    )
    assert ours.weight == theirs.weight
    np.testing.assert_allclose(ours.value(), theirs.value(), rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * scale)


def test_a_model_with_smear_has_no_trees():
    cfg = ModelConfig(arch="modern", vocab_size=50, n_layer=1, n_head=1, d_model=8, context_length=8)
    params, tokens = gptjax.init_params(jax.random.key(0), cfg), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(UserError, match="smear"):
        gptjax.backbone(params, tokens, cfg, positions=tokens, subtree_end=tokens + 4)
    with pytest.raises(UserError, match="need positions"):
        gptjax.backbone(
            params, tokens, ModelConfig(vocab_size=50, n_layer=1, n_head=1, d_model=8), subtree_end=tokens + 4
        )


def test_eval_batches_are_padded_with_trees():
    tree = token_tree.merge(random_sequences(np.random.default_rng(0)))
    rows = packing.padded(Encoded([], [], 0, [tree] * 3))
    batches = list(packing.eval_batches(rows, 2))
    assert [batch.tokens.shape[0] for batch in batches] == [2, 2]
    assert batches[1].weights[1].sum() == 0 and (batches[1].subtree_end[1] == rows.tokens.shape[1]).all()
