import numpy as np
import pytest

from gptjax import tree
from gptjax.errors import UserError

TREE = {"wte": {"embedding": np.zeros((3, 2))}, "blocks": {"attn": {"q": {"kernel": np.ones(4)}}, "ln": np.ones(2)}}


def test_flatten_names_and_unflatten_restores():
    flat = tree.flatten(TREE)
    assert set(flat) == {"wte/embedding", "blocks/attn/q/kernel", "blocks/ln"}
    restored = tree.unflatten(flat)
    assert restored["blocks"]["attn"]["q"]["kernel"] is TREE["blocks"]["attn"]["q"]["kernel"]
    assert tree.flatten(restored).keys() == flat.keys()


def test_map_paths_and_size():
    assert tree.map_paths(lambda path, leaf: (path, leaf.size), TREE)["blocks"]["ln"] == ("blocks/ln", 2)
    assert tree.size(TREE) == 12


@pytest.mark.parametrize(
    ("pattern", "path", "yes"),
    [
        ("wte/*", "wte/embedding", True),
        ("*/kernel", "blocks/attn/q/kernel", True),
        ("blocks/*/kernel | wte/*", "wte/embedding", True),
        ("kernel", "blocks/attn/q/kernel", False),
        ("*/Kernel", "blocks/attn/q/kernel", False),
        ("*/ln_?/scale", "blocks/ln_1/scale", True),
        ("blocks/[0-11]/attn/*", "blocks/7/attn/q", True),
        ("blocks/[0-11]/attn/*", "blocks/12/attn/q", False),
        ("blocks/[0-3,8-11]/*/kernel", "blocks/10/mlp/up/kernel", True),
        ("blocks/[0-3,8-11]/*/kernel", "blocks/5/mlp/up/kernel", False),
        ("wte/* | blocks/[1,12]/*", "blocks/2/bias", False),
        ("blocks/[01]/bias", "blocks/1/bias", True),  # a set of characters
        ("blocks/[a-c]/*", "blocks/b/7", True),
    ],
)
def test_matches(pattern, path, yes):
    assert tree.matches(pattern, path) is yes


def test_the_first_rule_that_matches_a_path():
    rules = (("*/kernel", 1), ("blocks/*", 2))
    assert [tree.first_match(path, rules) for path in ("blocks/q/kernel", "blocks/ln", "wte")] == [1, 2, None]


def test_the_first_rule_that_matches_labels():
    labels = tree.label(TREE, (("*/kernel", "matrix"), ("blocks/*", "vector"), ("*", "rest")))
    assert tree.flatten(labels) == {
        "wte/embedding": "rest", "blocks/attn/q/kernel": "matrix", "blocks/ln": "vector",
    }  # fmt: skip


def test_every_uncovered_leaf_is_named():
    with pytest.raises(UserError, match=r"no rule covers .*blocks/ln.*") as error:
        tree.label(TREE, (("*/kernel", 1),))
    assert "wte/embedding" in str(error.value) and "kernel" not in str(error.value)


def test_split_and_join():
    whole = {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}
    first, second = tree.split(whole, "*/kernel")
    assert first == {"a": {"kernel": 1}, "b": {"kernel": 3}} and second == {"a": {"bias": 2}}
    assert tree.join(first, second) == whole
    with pytest.raises(UserError, match=r"'c/\*' matches no parameter; there are a/bias, a/kernel"):
        tree.split(whole, "a/* | c/*")
