"""Adapters in PEFT's format: export and import by gptjax, and against the peft library where it is installed."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import LoraConfig, UserError, lora
from gptjax.formats import safetensors
from gptjax.weights import export_peft, load_peft
from gptjax.weights.peft import CONFIG, HASHES, WEIGHTS, fingerprint

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(3, 17, (2, 12))
FORMS = {
    "lora": LoraConfig(rank=4),
    "some": LoraConfig(rank=3, alpha=5, targets="blocks/attn/q/* | blocks/attn/v/* | blocks/mlp/down/*"),
    "rslora": LoraConfig(rank=4, scaling="alpha/sqrt(r)", alpha=8),
    "alpha": LoraConfig(rank=4, scaling="alpha", alpha=1.5),
    "dora": LoraConfig(rank=4, dora=True),
    "one layer": LoraConfig(rank=4, targets="blocks/1/attn/*/kernel"),
    "layers": LoraConfig(rank=4, targets="blocks/1/attn/q/kernel | blocks/[0-1]/mlp/down/kernel"),
    "layers and slices": LoraConfig(rank=4, targets="blocks/0/attn/q/kernel | blocks/1/attn/[qv]/kernel"),
}
MISS = {
    "miss": LoraConfig(rank=5, miss=True),
    "miss, one layer": LoraConfig(rank=5, miss=True, targets="blocks/1/*/kernel"),
    "miss, layers": LoraConfig(rank=3, miss=True, targets="blocks/0/attn/q/kernel | blocks/1/mlp/*/kernel"),
}


def moved(adapter, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), adapter)


def trained(params, cfg, lcfg):
    """The adapter after three steps, in which layers that are not selected stay zero."""
    import optax

    from gptjax.losses import next_token
    from gptjax.types import Batch

    tx = optax.adam(3e-2)
    state = gptjax.TrainState.create(lora.init(KEY, params, lcfg), frozen=params, tx=tx, key=KEY)
    step = jax.jit(gptjax.make_train_step(next_token(cfg), tx, combine=lambda a, base: lora.attach(base, a, lcfg)))
    for _ in range(3):
        state, _ = step(state, Batch(TOKENS[:, :-1], TOKENS[:, 1:]))
    return state.params


def run(params, cfg, tokens=TOKENS):
    return np.asarray(jax.jit(lambda p: gptjax.forward(p, tokens, cfg))(params))


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_there_and_back(tiny, arch, form, tmp_path):
    """A round trip keeps the logits, and a second export writes the same files."""
    cfg, params = tiny(arch, n_kv_head=4 if arch == "gpt2" else 2, d_ff=128 if arch == "gpt2" else 48)
    lcfg = FORMS[form]
    adapter = moved(lora.init(KEY, params, lcfg))
    export_peft(tmp_path / "one", adapter, lcfg, cfg, base=params)
    back, back_cfg = load_peft(tmp_path / "one", cfg, base=params)
    want = run(lora.merge(params, adapter, lcfg), cfg)
    np.testing.assert_allclose(run(lora.attach(params, back, back_cfg), cfg), want, atol=1e-4)
    export_peft(tmp_path / "two", back, back_cfg, cfg, base=params)
    first, second = (safetensors.open_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert first.shapes() == second.shapes()
    reloaded, reloaded_cfg = load_peft(tmp_path / "two", cfg)
    np.testing.assert_allclose(run(lora.merge(params, reloaded, reloaded_cfg), cfg), want, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "layers", "names", "targets"),
    [
        ("lora", None, 7, "blocks/attn/q/kernel"),
        ("one layer", [1], 4, "blocks/1/attn/q/kernel"),
        ("layers", None, 3, "blocks/1/attn/q/kernel"),
        ("miss, one layer", [1], 7, "blocks/1/attn/q/kernel"),
        ("miss, layers", None, 4, "blocks/0/attn/q/kernel"),
    ],
)
def test_layers_there_and_back(tiny, form, layers, names, targets, tmp_path):
    """Only the selected layers are written, and the loaded config selects the same layers for further training."""
    cfg, params = tiny("llama")
    lcfg = (FORMS | MISS)[form]
    adapter = trained(params, cfg, lcfg)
    export_peft(tmp_path / "adapter", adapter, lcfg, cfg)
    body = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert body.get("layers_to_transform") == layers and len(body["target_modules"]) == names
    back, back_cfg = load_peft(tmp_path / "adapter", cfg)
    assert targets in back_cfg.targets.split(" | ")
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        np.testing.assert_array_equal(dict(jax.tree_util.tree_leaves_with_path(back))[path], leaf)
    fresh = lora.init(KEY, params, back_cfg)
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter)
    export_peft(tmp_path / "new", lora.init(KEY, params, MISS["miss"]), MISS["miss"], cfg)  # all values are zero
    assert not any(leaf.any() for leaf in jax.tree.leaves(load_peft(tmp_path / "new", cfg)[0]))


@pytest.fixture
def folder(tiny, tmp_path):
    cfg, params = tiny("llama")
    adapter = moved(lora.init(KEY, params, FORMS["lora"]))
    export_peft(tmp_path / "adapter", adapter, FORMS["lora"], cfg, base=params)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA and MISS are known"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "no whole module but score"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_something": True}, "use_something=True"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"rank_pattern": {"(a+)+$": 4}}, "expected the name of a module"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
    ],
)
def test_a_config_that_means_something_else_is_refused(folder, tiny, change, words):
    body = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(body | change))
    with pytest.raises(UserError) as error:
        load_peft(folder, tiny("llama")[0])
    assert words in str(error.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_bit_of_an_adapter_is_noticed(name, folder, tiny, monkeypatch):
    cfg, _ = tiny("llama")
    raw = (folder / name).read_bytes()
    changed = (
        raw.replace(b'"lora_alpha": ', b'"lora_alpha": 1')
        if name == CONFIG
        else raw[:-2] + bytes([raw[-2] ^ 1, raw[-1]])
    )
    assert changed != raw
    (folder / name).write_bytes(changed)
    with pytest.raises(UserError, match=f"{name}: not as gptjax wrote it"):
        load_peft(folder, cfg)
    with monkeypatch.context() as patch:
        patch.setenv("GPTJAX_VERIFY", "0")
        load_peft(folder, cfg)
    (folder / HASHES).unlink()  # as in a folder of another tool
    load_peft(folder, cfg)


@pytest.mark.parametrize("label", [b'"I32"', b'"U32"'])
def test_integers_are_no_weights(label, folder, tiny):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw.replace(b'"F32"', label, 1))
    with pytest.raises(UserError, match=r"holds u?int32, expected floating-point values"):
        load_peft(folder, tiny("llama")[0])


def test_another_model_or_another_base(folder, tiny):
    cfg, params = tiny("llama")
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert fingerprint(low) == fingerprint(params)
    load_peft(folder, cfg, base=low)
    with pytest.raises(UserError, match="an adapter for other weights than these"):
        load_peft(folder, cfg, base=tiny("llama", seed=1)[1])
    with pytest.raises(UserError, match=r"lora_A.weight is \[4, 32\], expected \[4, 16\]"):
        load_peft(folder, tiny("llama", d_model=16)[0])
    with pytest.raises(UserError, match="is no adapter of a matrix of this model"):
        load_peft(folder, tiny("gpt2", n_kv_head=4)[0])


def test_other_mistakes(tiny, tmp_path):
    cfg, params = tiny("llama")
    with pytest.raises(UserError, match="holds no adapter"):
        load_peft(tmp_path, cfg)
    split = LoraConfig(rank=2, init="olora")
    with pytest.raises(UserError, match=r"export lora.to_lora"):
        export_peft(tmp_path / "a", lora.init_from_weights(params, split)[1], split, cfg)
    with pytest.raises(UserError, match="lora.miss=true does not fit the adapter"):
        export_peft(tmp_path / "a", lora.init(KEY, params, FORMS["lora"]), MISS["miss"], cfg)
    gpt2, its_params = tiny("gpt2", n_kv_head=4)
    with pytest.raises(UserError, match="not the Conv1D layers of GPT-2"):
        export_peft(tmp_path / "a", lora.init(KEY, its_params, MISS["miss"]), MISS["miss"], gpt2)
    export_peft(tmp_path / "miss", lora.init(KEY, params, MISS["miss"]), MISS["miss"], cfg)
    body = json.loads((tmp_path / "miss" / CONFIG).read_text())
    for change, words in (({"init_weights": "bat"}, "init_weights='bat' is not supported"), ({"r": 4}, "has rank 5")):
        (tmp_path / "miss" / CONFIG).write_text(json.dumps(body | change))
        with pytest.raises(UserError, match=words):
            load_peft(tmp_path / "miss", cfg)
    tables = LoraConfig(rank=2, targets="wte/*")
    with pytest.raises(UserError, match="no place for"):
        export_peft(tmp_path / "a", lora.init(KEY, params, tables), tables, cfg)


# ---------------------------------------------------------------- beside peft


SIZES = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=97, n_positions=64, n_embd=24, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2)
THEIRS = {
    "gpt2": ("GPT2", GPT2, dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 untied head": (
        "GPT2", GPT2 | dict(tie_word_embeddings=False), dict(target_modules=["attn.c_proj", "lm_head"]),
    ),
    "gpt2 dora": ("GPT2", GPT2, dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)),
    "llama": ("Llama", SIZES, dict(target_modules="all-linear")),
    "llama rslora": ("Llama", SIZES, dict(target_modules=["q_proj", "v_proj"], use_rslora=True)),
    "llama dora": ("Llama", SIZES, dict(target_modules=["k_proj", "down_proj"], use_dora=True)),
    "llama patterns": (
        "Llama", SIZES,
        dict(target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}),
    ),
    "llama layers to transform": ("Llama", SIZES, dict(target_modules=["q_proj"], layers_to_transform=[1])),
    "llama patterns that are expressions": (
        "Llama", SIZES,
        dict(
            target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1\..*": 2},
            alpha_pattern={r".*\.v_proj": 3, r"layers\.[01]\.self_attn\.q_proj": 5},
        ),
    ),
    "llama one layer": ("Llama", SIZES, dict(target_modules=["model.layers.1.self_attn.o_proj"])),
}  # fmt: skip


def base_model(name, folder):
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    kind, values, _ = THEIRS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return torch, model


def logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_an_adapter_that_peft_made(name, tmp_path):
    """An adapter of peft loads with the same logits, and its export loads in peft with the same logits."""
    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    torch, model = base_model(name, tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **THEIRS[name][2])).eval()
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "lora_" in key:
                p.add_(0.1 * torch.randn_like(p))
    made.save_pretrained(tmp_path / "adapter")
    want = logits(torch, made, TOKENS)
    params, cfg = gptjax.load(tmp_path / "base")
    adapter, lcfg = load_peft(tmp_path / "adapter", cfg)
    np.testing.assert_allclose(run(lora.attach(params, adapter, lcfg), cfg), want, atol=1e-4)
    assert np.abs(run(params, cfg) - want).max() > 0.01
    export_peft(tmp_path / "back", adapter, lcfg, cfg, base=params)
    _, fresh = base_model(name, tmp_path / "base2")
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    np.testing.assert_allclose(logits(torch, reloaded, TOKENS), want, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS | MISS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_loads_what_was_trained_here(name, form, tmp_path):
    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    if form in MISS and name == "gpt2":
        pytest.skip("peft's MiSS does not support Conv1D")
    torch, model = base_model(name, tmp_path / "base")
    params, cfg = gptjax.load(tmp_path / "base")
    lcfg = (FORMS | MISS)[form]
    adapter = trained(params, cfg, lcfg)
    export_peft(tmp_path / "adapter", adapter, lcfg, cfg, base=params)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    want = run(lora.attach(params, adapter, lcfg), cfg)
    np.testing.assert_allclose(logits(torch, theirs, TOKENS), want, atol=1e-4)
    assert np.abs(run(params, cfg) - want).max() > 0.01
    loaded = {key.split(".lora_")[0].split(".miss_")[0] for key, _ in theirs.named_parameters() if "default" in key}
    assert {".1." in key for key in loaded} == ({True} if "one layer" in form else {True, False})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, dict(layers_to_transform=[1])], ids=["all layers", "one layer"])
@pytest.mark.parametrize("rank", [4, 5])  # 4 divides the sizes 24 and 40, 5 does not divide 24
def test_miss_is_that_of_peft(rank, more, tmp_path):
    """Logits, gradients and merged weights of MiSS, and the way back into peft."""
    from gptjax.losses import next_token
    from gptjax.types import Batch

    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    torch, model = base_model("llama", tmp_path / "base")
    made = peft.get_peft_model(model, peft.MissConfig(r=rank, target_modules=["q_proj", "down_proj"], **more))
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "miss_" in key:
                p.add_(0.1 * torch.randn_like(p))
    made.save_pretrained(tmp_path / "adapter")
    want = logits(torch, made, TOKENS)
    params, cfg = gptjax.load(tmp_path / "base")
    adapter, lcfg = load_peft(tmp_path / "adapter", cfg)
    assert lcfg.miss and lcfg.rank == rank
    np.testing.assert_allclose(run(lora.attach(params, adapter, lcfg), cfg), want, atol=1e-4)
    assert np.abs(run(params, cfg) - want).max() > 0.01

    loss = lora.bind(next_token(cfg), params, lcfg)
    grads = jax.grad(lambda a: loss(a, Batch(TOKENS[:, :-1], TOKENS[:, 1:]))[0].value())(adapter)
    ids = torch.tensor(TOKENS)
    made(ids, labels=ids).loss.backward()
    seen = 0
    for key, p in made.named_parameters():
        if "miss_" not in key:
            continue
        layer, ours = int(key.split(".layers.")[1].split(".")[0]), ("attn", "q") if "q_proj" in key else ("mlp", "down")
        got = grads["blocks"][ours[0]][ours[1]]["kernel"]["d"][layer]
        np.testing.assert_allclose(got, p.grad.numpy(), atol=1e-5 * np.abs(p.grad.numpy()).max() + 1e-7, err_msg=key)
        seen += 1
    assert seen == (2 if more else 4)
    if more:  # the other layer is not trained
        assert not any(np.abs(leaf[0]).max() for leaf in jax.tree.leaves(grads))

    export_peft(tmp_path / "back", adapter, lcfg, cfg, base=params)
    _, fresh = base_model("llama", tmp_path / "base2")
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    np.testing.assert_allclose(logits(torch, reloaded, TOKENS), want, atol=1e-4)
    merged = reloaded.merge_and_unload().state_dict()
    ours = lora.merge(params, adapter, lcfg)["blocks"]["mlp"]["down"]["kernel"]
    for layer in range(2):
        theirs = merged[f"model.layers.{layer}.mlp.down_proj.weight"].numpy().T
        np.testing.assert_allclose(ours[layer], theirs, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_classifier_with_its_head(kind, tmp_path):
    """The classification head is stored as peft's modules_to_save, in both directions."""
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    from gptjax.losses import class_logits

    values = (GPT2 if kind == "GPT2" else SIZES) | dict(pad_token_id=0, num_labels=3)
    config = getattr(transformers, f"{kind}Config")(**values)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    names = ["c_attn", "c_fc"] if kind == "GPT2" else ["q_proj", "up_proj"]
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=names, fan_in_fan_out=kind == "GPT2")
    ).eval()
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "lora_" in key:
                p.add_(0.1 * torch.randn_like(p))
    made.save_pretrained(tmp_path / "adapter")
    want = logits(torch, made, TOKENS)
    params, cfg = gptjax.load(tmp_path / "base")
    adapter, lcfg = load_peft(tmp_path / "adapter", cfg)
    both = lora.attach(params, adapter, lcfg)
    ones = np.ones_like(TOKENS)
    np.testing.assert_allclose(class_logits(both, TOKENS, ones, cfg)[:, 0], want, atol=1e-4)
    head = adapter.pop("cls_head")
    export_peft(tmp_path / "back", adapter, lcfg, cfg, head=head, base=params)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    np.testing.assert_allclose(logits(torch, reloaded, TOKENS), want, atol=1e-4)
    with pytest.raises(UserError, match=r"classify.bias=false"):
        export_peft(tmp_path / "biased", adapter, lcfg, cfg, head=head | {"bias": jnp.ones(3)})


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_tied_head_is_refused_as_such(tmp_path):
    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    _, model = base_model("gpt2", tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"]))
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="lm_head is the token embedding itself in this model"):
        load_peft(tmp_path / "adapter", gptjax.load(tmp_path / "base")[1])


@pytest.mark.parametrize("pattern", ["(a+)+", "(.*)*x", ".*.*.*.*.*x", "[", "(q_proj", "x" * 201, "(a|a?)+"])
def test_patterns_that_would_take_long_are_refused(folder, tiny, pattern):
    body = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(body | dict(alpha_pattern={pattern: 3})))
    with pytest.raises(UserError, match="alpha_pattern: .*expected the name of a module, or a regular expression"):
        load_peft(folder, tiny("llama")[0])
