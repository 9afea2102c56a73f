"""Settings that occur in published config files: each gives transformers' logits within 1e-4, or an error names it.

Needs the extra `parity`; without it these tests are skipped.
"""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")

from gptjax import load  # noqa: E402
from gptjax.errors import UserError  # noqa: E402
from gptjax.model.gpt import forward  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    num_hidden_layers=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
IDS = np.random.default_rng(0).integers(3, 61, (2, 30))
OLD = dict(
    _num_labels=1, num_labels=1, is_decoder=False, is_encoder_decoder=False, output_attentions=False,
    output_hidden_states=False, torchscript=False, use_bfloat16=False, pruned_heads={}, finetuning_task=None,
    do_sample=False, max_length=20, num_beams=1, temperature=1.0, top_k=50, tie_encoder_decoder=False,
)  # fmt: skip
CASES = {  # (class, its arguments, edits of config.json, keys removed from it)
    "gpt2 of 2019": ("GPT2", GPT2, OLD, ()),
    "qwen2 without mrope": ("Qwen2", SIZES, dict(use_mrope=False), ()),
    "qwen2, windows used nowhere": (
        "Qwen2", SIZES | dict(use_sliding_window=True, sliding_window=8, max_window_layers=4), {}, ()
    ),
    "gemma3, every second layer": (
        "Gemma3Text", SIZES | dict(sliding_window=8), dict(sliding_window_pattern=2),
        ("layer_types", "_sliding_window_pattern"),
    ),
    "gemma3, a pattern that transformers does not read": (
        "Gemma3Text", SIZES | dict(sliding_window=8), dict(_sliding_window_pattern=3), ("layer_types",)
    ),
    "llama, tied in name only": ("Llama", SIZES | dict(tie_word_embeddings=False), dict(tie_word_embeddings=True), ()),
    "qwen3, tied in name only": ("Qwen3", SIZES | dict(tie_word_embeddings=False), dict(tie_word_embeddings=True), ()),
}  # fmt: skip


def saved(folder, kind, settings, edit, drop):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind.removesuffix('Text')}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")
    model = model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    file = folder / "config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop} | edit
    file.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    folder = saved(tmp_path, *CASES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS)).logits.numpy()
    params, cfg = load(folder)
    np.testing.assert_allclose(forward(params, jnp.array(IDS), cfg), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "edit"),
    [
        ("Qwen2", SIZES, dict(use_mrope=True)),
        ("Llama", SIZES, dict(sliding_window_pattern=2)),
        ("GPT2", GPT2, dict(is_encoder_decoder=True)),
        ("GPT2", GPT2, dict(pruned_heads={"0": [1]})),
        ("Gemma3Text", SIZES, dict(sliding_window_pattern=0)),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(kind, settings, edit, tmp_path):
    folder = saved(tmp_path, kind, settings, edit, ("layer_types", "_sliding_window_pattern"))
    with pytest.raises(UserError, match=next(iter(edit))):
        load(folder)


def test_norms_stored_in_bfloat16_are_added_in_float32(tmp_path):
    folder = saved(tmp_path, "Gemma3Text", SIZES | dict(sliding_window=8), {}, ())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "low")
    params, _ = load(tmp_path / "low", dtype="float32")
    stored = model.model.layers[0].input_layernorm.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["blocks"]["ln_1"]["scale"][0], stored + 1)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_adapters_that_change_the_base_are_refused(init, tmp_path):
    from gptjax.weights import load_peft

    _, cfg = load(saved(tmp_path / "base", "Llama", SIZES, {}, ()))
    peft = pytest.importorskip("peft", reason="extra 'parity' is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    load_peft(tmp_path / "adapter", cfg)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(init_lora_weights=init)))
    with pytest.raises(UserError, match="init_lora_weights"):
        load_peft(tmp_path / "adapter", cfg)
