"""Merges of adapters: against peft's `add_weighted_adapter` where it is installed, and against their definitions."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import LoraConfig, UserError, lora, tree
from gptjax.lora.combination import mask_key
from gptjax.weights import load_peft
from gptjax.weights.peft import _modules

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
KEY = jax.random.key(3)
SIZES = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WEIGHTS = (0.7, -0.4, 1.5)
METHODS = {  # peft's combination_type: further arguments
    "cat": {},
    "svd": {},
    "linear": {},
    "magnitude_prune": dict(density=0.4),
    "ties": dict(density=0.4),
    "ties_svd": dict(density=0.3, majority_sign="frequency"),
    "dare_linear": dict(density=0.6),
    "dare_ties": dict(density=0.6),
    "dare_ties_svd": dict(density=0.6),
    "magnitude_prune_svd": dict(density=1.0),
}
MIXED_RANKS = ("cat", "svd", "ties_svd", "dare_ties_svd", "magnitude_prune_svd")


def deltas(adapter, scale=1.0):
    """The contribution of an adapter to each weight."""
    return {path: scale * np.asarray(pair["a"] @ pair["b"]) for path, pair in tree.by_parent(adapter).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def theirs(folder, ranks, alphas, targets):
    """A peft model with several adapters, the same adapters here, and their scales."""
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    made, names = None, [f"n{i}" for i in range(len(ranks))]
    for name, rank, alpha, modules in zip(names, ranks, alphas, targets, strict=True):
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
        if made is None:
            made = peft.get_peft_model(model, settings, adapter_name=name)
        else:
            made.add_adapter(name, settings)
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "lora_" in key:
                p.add_(0.1 * torch.randn_like(p))
    cfg = gptjax.load(folder / "base")[1]
    place = folder / "-".join(map(str, ranks))
    made.save_pretrained(place)
    pairs = [load_peft(place / name, cfg) for name in names]
    return torch, made, names, [adapter for adapter, _ in pairs], [lcfg.scale for _, lcfg in pairs], cfg


def masks_of(made, adapters, cfg, density, method):
    """The masks of `combine` in the order in which peft draws them."""
    modules = {f"base_model.model.{module.name}": module for module in _modules(cfg)}
    for name, layer in made.named_modules():
        if not hasattr(layer, "lora_A") or name not in modules:
            continue
        path, i = modules[name].rules[0].ours, modules[name].layer
        for part in ("w",) if method.endswith("svd") else ("a", "b"):
            for n, adapter in enumerate(adapters):
                if (pair := tree.by_parent(adapter).get(path)) is None:
                    continue
                shape = (pair["a"] @ pair["b"]).shape if part == "w" else pair[part].shape
                yield np.array(jax.random.bernoulli(mask_key(KEY, f"{path}/{part}", n), density, shape)[i].T)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_equals_peft(method, folder, monkeypatch):
    """Adapters of different scales, targets and, where the method allows it, ranks, with a negative weight."""
    ranks = (3, 4, 2) if method in MIXED_RANKS else (3, 3, 3)
    targets = (["q_proj", "down_proj"], ["q_proj", "k_proj", "down_proj"], ["q_proj"])
    torch, made, names, adapters, scales, cfg = theirs(folder, ranks, (6, 3, 5), targets)
    more = METHODS[method]
    masks = masks_of(made, adapters, cfg, more.get("density"), method)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda p: torch.tensor(next(masks)).to(p.dtype))
        peft_more = {key if key == "density" else "majority_sign_method": value for key, value in more.items()}
        made.add_weighted_adapter(names, list(WEIGHTS), "merged", combination_type=method, **peft_more)
    if method.startswith("dare"):
        assert next(masks, None) is None  # peft has used every mask
    got = lora.combine(adapters, WEIGHTS, method, scales=scales, key=KEY if "dare" in method else None, **more)
    ours = deltas(got)
    seen = set()
    for module in _modules(cfg):
        layer = dict(made.named_modules()).get(f"base_model.model.{module.name}")
        if layer is None or "merged" not in getattr(layer, "lora_A", {}):
            continue
        want = layer.get_delta_weight("merged").detach().numpy().T
        seen.add(module.rules[0].ours)
        np.testing.assert_allclose(ours[module.rules[0].ours][module.layer], want, atol=1e-5, err_msg=module.name)
        assert np.abs(want).max() > 0.01
    assert seen == set(ours) and len(seen) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_different_ranks_are_refused_as_in_peft(method, folder):
    _, made, names, adapters, _, _ = theirs(folder, (3, 4), (6, 6), (["q_proj"],) * 2)
    with pytest.raises(ValueError, match="same r value"):
        made.add_weighted_adapter(names, [1.0, 1.0], "merged", combination_type=method, density=0.5)
    with pytest.raises(UserError, match=r"has the ranks 3, 4, but .* needs one rank: use cat, slerp, or"):
        lora.combine(adapters, [1.0, 1.0], method, density=0.5)


# ---------------------------------------------------------------- without peft


def adapter(tiny, seed, rank=3, **settings):
    """A random adapter of a tiny Llama with two layers."""
    lcfg = LoraConfig(rank=rank, **settings)
    start = lora.init(KEY, tiny("llama")[1], lcfg)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), start)


def slerp(p, q, t):
    p, q = p.astype(np.float64), q.astype(np.float64)
    angle = np.arccos((p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q))
    return (np.sin((1 - t) * angle) * p + np.sin(t * angle) * q) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_its_formula_per_matrix(tiny, t):
    first, second = adapter(tiny, 1), adapter(tiny, 2, rank=5)
    scales = [2.0, 0.5]
    got = deltas(lora.combine([first, second], [1 - t, t], "slerp", scales=scales))
    d1, d2 = deltas(first, 2.0), deltas(second, 0.5)
    for path, array in got.items():
        for layer in range(2):
            np.testing.assert_allclose(array[layer], slerp(d1[path][layer], d2[path][layer], t), atol=1e-5)


def test_slerp_is_linear_where_it_has_no_angle(tiny):
    """Equal, opposite and missing adapters."""
    first = adapter(tiny, 1)
    only_q = {"blocks": {"attn": {"q": first["blocks"]["attn"]["q"]}}}
    want = deltas(first)
    for other, factor in ((first, 1.0), (lora.negate(first), 0.5), (only_q, None)):
        got = deltas(lora.combine([first, other], [0.75, 0.25], "slerp"))
        for path, array in got.items():
            f = (1.0 if "/q/" in path else 0.75) if factor is None else factor
            np.testing.assert_allclose(array, f * want[path], atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_one_scale_for_all_may_be_applied_afterwards(tiny):
    """With equal scales s, combining with scale 1 and attaching with s is the same as combining with s."""
    adapters = [adapter(tiny, seed) for seed in (1, 2)]
    for method, more in METHODS.items():
        more = more | (dict(key=KEY) if "dare" in method else {})
        plain = deltas(lora.combine(adapters, [0.5, 0.8], method, **more), 4.0)
        scaled = deltas(lora.combine(adapters, [0.5, 0.8], method, scales=[4.0, 4.0], **more))
        for path, array in plain.items():
            np.testing.assert_allclose(array, scaled[path], atol=1e-5, err_msg=f"{method} {path}")


@pytest.mark.slow
def test_masks_follow_the_key(tiny):
    adapters = [adapter(tiny, seed) for seed in (1, 2)]
    merge = jax.jit(lambda key: lora.combine(adapters, [1.0, 1.0], "dare_linear", density=0.5, key=key))
    one, same, other = (tree.flatten(merge(key)) for key in (KEY, KEY, jax.random.key(4)))
    for path, leaf in one.items():
        assert np.array_equal(leaf, same[path]) and not np.array_equal(leaf, other[path])
    # DARE keeps the expectation: the mean over keys approaches the linear combination
    mean = jax.tree.map(lambda x: x.mean(0), jax.vmap(merge)(jax.random.split(KEY, 400)))
    for path, leaf in tree.flatten(lora.combine(adapters, [1.0, 1.0], "linear")).items():
        assert np.abs(tree.flatten(mean)[path] - leaf).mean() < 0.1 * np.abs(leaf).mean()


def test_rank_of_svd(tiny):
    """Truncation to `rank` singular values is the best approximation; at the sum of the ranks it is exact."""
    adapters = [adapter(tiny, seed) for seed in (1, 2)]
    exact, low = (lora.combine(adapters, [1.0, 2.0], method, rank=r) for method, r in (("cat", None), ("svd", 2)))
    want, got = deltas(exact), deltas(low)
    full = deltas(lora.combine(adapters, [1.0, 2.0], "svd", rank=6))
    for path, array in got.items():
        u, s, v = np.linalg.svd(want[path], full_matrices=False)
        np.testing.assert_allclose(array, u[..., :2] * s[..., None, :2] @ v[..., :2, :], atol=1e-5)
        np.testing.assert_allclose(full[path], want[path], atol=1e-5)
    assert {leaf.shape[-1] for path, leaf in tree.flatten(low).items() if path.endswith("/a")} == {2}


@pytest.mark.parametrize(
    ("weights", "method", "more", "words"),
    [
        ((1.0,), "cat", {}, "2 adapters, 1 weights and 2 scales"),
        ((1.0, 1.0), "tie", dict(density=0.5), "unknown method 'tie'; did you mean ties"),
        ((1.0, 1.0), "ties", {}, "ties needs a density above 0 and at most 1, got None"),
        ((1.0, 1.0), "dare_ties", dict(density=0.0), "needs a density above 0"),
        ((1.0, 1.0), "dare_linear", dict(density=0.5), "drops random elements: pass key="),
        ((1.0, 1.0), "slerp", {}, r"weights 1 - t and t, got weights \[1.0, 1.0\]"),
        ((1.0, 1.0), "ties", dict(density=0.5, majority_sign="all"), "expected 'total' or 'frequency'"),
        ((1.0, 1.0), "svd", dict(rank=0), "rank=0"),
    ],
)
def test_mistakes(tiny, weights, method, more, words):
    with pytest.raises(UserError, match=words):
        lora.combine([adapter(tiny, 1), adapter(tiny, 2)], weights, method, **more)


def test_what_cannot_be_merged(tiny):
    for settings, words in ((dict(dora=True), "DoRA magnitude vector"), (dict(miss=True), "MiSS matrix")):
        with pytest.raises(UserError, match=words):
            lora.combine([adapter(tiny, 1, **settings)], [1.0], "linear")
    head = {"cls_head": {"kernel": jnp.ones((32, 2))}}
    with pytest.raises(UserError, match="cls_head has whole weights"):
        lora.combine([adapter(tiny, 1) | head], [1.0])
