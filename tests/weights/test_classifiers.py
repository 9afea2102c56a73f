"""Export to and import from transformers' ForSequenceClassification: every family, right- and left-padded batches.

Tests that need transformers are skipped where the extra `parity` is not installed.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import tokenizers
from gptjax.__main__ import main
from gptjax.errors import UserError
from gptjax.losses import class_logits
from gptjax.tasks.classify import classify_texts
from gptjax.weights import export_gguf, export_hf, families, load, read_labels

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
ABOUT = {"labels": ["spam", "ham", "other"], "pooling": "last", "max_length": 20, "prompt": "{text}"}
SIZES = dict(vocab_size=259, context_length=32, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, n_classes=3)
LLAMA = SIZES | dict(arch="llama", cls_bias=False, tie_embeddings=False)
FAMILIES = {
    "gpt2": SIZES | dict(arch="gpt2", cls_bias=False, n_kv_head=4),
    "llama": LLAMA,
    "mistral": LLAMA | dict(sliding_window=6),
    "qwen2": LLAMA | dict(qkv_bias=True),
    "qwen3": LLAMA | dict(qk_norm=True),
    "gemma3_text": LLAMA | dict(
        tie_embeddings=True, activation="geglu", norm_position="both", qk_norm=True, rope_local_base=10_000.0,
        sliding_window=6, window_pattern="SL", attention_scale=0.25, embed_gain=32**0.5,
    ),
    "olmo2": LLAMA | dict(norm_position="post", qk_norm=True, qk_norm_over="all"),
}  # fmt: skip


def tokenizer():
    return tokenizers.extend(tokenizers.load("bytes"), ["<pad>"]).replace(pad_id=257)


def built(tiny, name):
    fields = {**FAMILIES[name]}
    return tiny(fields.pop("arch"), **fields)


def ours(params, cfg, rows):
    """Class logits of each text, computed separately."""
    run = jax.jit(lambda params, tokens: class_logits(params, tokens, jnp.ones_like(tokens), cfg)[:, 0])
    return np.concatenate([run(params, jnp.array([row])) for row in rows])


TEXTS = [[5, 9, 30, 8, 70, 7, 11, 40, 3], [65, 66, 4], [100, 2, 55, 54, 53, 12, 90]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_transformers_gives_the_same_logits(name, tiny, tmp_path):
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    transformers.utils.logging.disable_progress_bar()
    cfg, params = built(tiny, name)
    export_hf(tmp_path / "hf", params, cfg, tokenizer(), ABOUT)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == families.FAMILIES[name].classifier
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == {0: "spam", 1: "ham", 2: "other"} and model.config.label2id["other"] == 2
    want = ours(params, cfg, TEXTS)
    width = max(map(len, TEXTS))
    for left in (False, True):
        gaps = [[model.config.pad_token_id] * (width - len(row)) for row in TEXTS]
        ids = torch.tensor([gap + row if left else row + gap for row, gap in zip(TEXTS, gaps, strict=True)])
        mask = (ids != model.config.pad_token_id).long()
        places = (mask.cumsum(-1) - 1).clamp(min=0)  # otherwise GPT-2 counts left padding as positions
        with torch.no_grad():
            got = model.eval()(ids, attention_mask=mask, position_ids=places).logits.numpy()
        np.testing.assert_allclose(got, want, atol=1e-4)
    back, back_cfg = load(tmp_path / "hf")
    assert (back_cfg.n_classes, back_cfg.cls_bias) == (3, False)
    np.testing.assert_allclose(ours(back, back_cfg, TEXTS), want, atol=1e-5)
    export_hf(tmp_path / "again", back, back_cfg, tokenizer(), read_labels(tmp_path / "hf"))
    assert load(tmp_path / "again")[1] == back_cfg


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2", "Qwen3"])
def test_one_that_transformers_saved(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
    transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
    sizes = dict(vocab_size=259, num_labels=2, pad_token_id=0, hidden_size=32, num_attention_heads=4)
    sizes |= dict(num_hidden_layers=2)
    if kind == "Qwen3":
        sizes |= dict(num_key_value_heads=2, intermediate_size=48, head_dim=8, max_position_embeddings=64)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save(tmp_path / "tokenizer.json")
    params, cfg = load(tmp_path)
    with torch.no_grad():
        want = np.concatenate([model(torch.tensor([row])).logits.numpy() for row in TEXTS])
    np.testing.assert_allclose(ours(params, cfg, TEXTS), want, atol=1e-4)
    assert read_labels(tmp_path) == {
        "labels": ["LABEL_0", "LABEL_1"], "pooling": "last", "max_length": cfg.context_length, "prompt": "{text}",
    }  # fmt: skip
    (row,) = classify_texts(tmp_path, ["abc"])
    assert list(row) == ["LABEL_0", "LABEL_1"]


def test_what_no_class_holds_is_refused_by_the_reason(tiny, tmp_path):
    cfg, params = built(tiny, "llama")
    biased = params | {"cls_head": params["cls_head"] | {"bias": jnp.ones(3)}}
    with pytest.raises(UserError, match=r"no bias: .*classify\.bias=false"):
        export_hf(tmp_path / "a", biased, cfg, tokenizer(), ABOUT)
    with pytest.raises(UserError, match=r"classify\.pooling=mean: .*classify\.pooling=last"):
        export_hf(tmp_path / "a", params, cfg, tokenizer(), ABOUT | {"pooling": "mean"})
    with pytest.raises(UserError, match="expected 3 different names"):
        export_hf(tmp_path / "a", params, cfg, tokenizer(), ABOUT | {"labels": ["x", "x", "y"]})
    with pytest.raises(UserError, match="n_classes=3"):
        export_gguf(tmp_path / "a.gguf", params, cfg, tokenizer())
    unbiased = params | {"cls_head": params["cls_head"] | {"bias": jnp.zeros(3)}}
    export_hf(tmp_path / "b", unbiased, cfg, tokenizer(), ABOUT)
    file = tmp_path / "b" / "config.json"
    values = json.loads(file.read_text())
    for wrong in ({"id2label": {"0": "a", "2": "b"}}, {"id2label": []}, {"id2label": {"0": 1}}):
        file.write_text(json.dumps(values | wrong))
        with pytest.raises(UserError, match="id2label"):
            load(tmp_path / "b")


def test_a_token_that_no_text_ends_with_fills_rows(tiny, tmp_path):
    """The padding token is the tokenizer's, else its end token, else an embedding row without a token."""
    cfg, params = built(tiny, "llama")
    spare = tokenizers.train("chars", ["abc"])
    for name, words, pad in (("a", tokenizer(), 257), ("b", tokenizers.load("bytes"), 256), ("c", spare, 3)):
        export_hf(tmp_path / name, params, cfg, words, ABOUT)
        assert json.loads((tmp_path / name / "config.json").read_text())["pad_token_id"] == pad


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_out_and_is_used_and_comes_back(tiny, tmp_path, capsys):
    fields = {**FAMILIES["llama"]}
    cfg, params = tiny(fields.pop("arch"), **fields)
    about = json.dumps(ABOUT | {"prompt": "Is {text} spam?"})
    gptjax.save(tmp_path / "run" / "final", params, cfg, tokenizer(), {"labels.json": about})
    assert main(["classify", str(tmp_path / "run"), "abc", "hello"]) == 0
    want = capsys.readouterr().out
    assert main(["export", "hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    out = capsys.readouterr()
    assert "AutoModelForSequenceClassification" in out.out and "Is {text} spam?" in out.err
    assert main(["classify", str(tmp_path / "hf"), "abc", "hello"]) == 0
    assert capsys.readouterr().out == want
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main(["classify", str(tmp_path / "back"), "abc", "hello"]) == 0
    assert capsys.readouterr().out == want
