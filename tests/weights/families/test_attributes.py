"""Every attribute of every family's config class, at its default, absent, null and at other values, against
transformers: either the logits agree within 1e-4, or an error names the attribute.

The attributes are read from transformers' own classes, so that a release which adds one is tested too. Needs the
extra `parity`; without it these tests are skipped.
"""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

from gptjax.errors import UserError  # noqa: E402
from gptjax.formats import safetensors  # noqa: E402
from gptjax.model.gpt import forward  # noqa: E402
from gptjax.weights import families, open_model  # noqa: E402
from gptjax.weights.families.attributes import NEUTRAL  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = dict(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
    num_hidden_layers=3, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
WINDOWS = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
MODELS = {  # family: (transformers class, settings of the tiny model)
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", SIZES),
    "mistral": ("Mistral", SIZES | dict(sliding_window=8)),
    "qwen2": ("Qwen2", SIZES | WINDOWS),
    "qwen3": ("Qwen3", SIZES | WINDOWS | dict(head_dim=8)),
    "gemma3_text": ("Gemma3Text", SIZES | dict(head_dim=8, sliding_window=8)),
    "olmo2": ("Olmo2", SIZES),
}
# Attributes that earlier releases of transformers did not write: the `old` form of a config lacks them.
NEW = ("rope_parameters", "layer_types")
NOT_THERE = object()
ROPES = [
    dict(rope_type="linear", factor=2.0), dict(type="linear", factor=2.0), dict(rope_type="yarn", factor=2.0),
    dict(rope_type="linear", factor=2.0, rope_theta=300.0), dict(rope_type="dynamic", factor=2.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=100.0)
    | dict(original_max_position_embeddings=16),
    dict(rope_theta=50.0, rope_type="default"), {},
    dict(rope_theta=50.0, rope_type="default", partial_rotary_factor=0.5),
]  # fmt: skip
BY_LAYER = [
    dict(full_attention=dict(rope_theta=50.0, rope_type="default"), sliding_attention=dict(rope_theta=20.0)),
    dict(full_attention=dict(rope_type="linear", factor=4.0)), dict(sliding_attention=dict(rope_theta=20.0)),
    dict(sliding_attention=dict(rope_type="linear", factor=4.0)), dict(full_attention=None),
]  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
OTHERS = {  # values to try where the default's type does not suggest any
    "transformers_version": ["3.0.2"], "architectures": [["OtherForCausalLM"], []], "model_type": ["other"],
    "dtype": ["bfloat16", "float16"], "torch_dtype": ["bfloat16"], "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0, "b": 1}], "problem_type": ["regression"], "num_labels": [3], "_num_labels": [3],
    "hidden_act": ["gelu", "silu", "relu"], "hidden_activation": ["gelu", "silu"], "sliding_window": [3, 0, 1000],
    "activation_function": ["relu", "gelu", "gelu_pytorch_tanh"], "summary_type": ["last"],
    "summary_activation": ["tanh"], "n_inner": [24, 64], "rope_parameters": [*ROPES, *BY_LAYER], "rope_scaling": ROPES,
    "rope_theta": [50.0], "rope_local_base_freq": [50.0], "rope_interleaved": [True], "head_dim": [4, 8, 16],
    "num_key_value_heads": [1, 2, 0], "num_attention_heads": [1, 4, 0], "n_head": [1, 4, 3],
    "layer_types": [[FULL] * 3, [SLIDING] * 3, [FULL, SLIDING, FULL], [FULL], ["other"] * 3],
    "sliding_window_pattern": [1, 2, 3, 0], "_sliding_window_pattern": [2], "max_window_layers": [0, 2, 3, 28],
    "final_logit_softcapping": [2.0, 0.0], "attn_logit_softcapping": [2.0], "query_pre_attn_scalar": [8, 2.5, 0],
    "use_mrope": [True], "partial_rotary_factor": [0.5, 1.0], "eos_token_id": [5, [5, 6]], "bos_token_id": [5],
    "pad_token_id": [5], "sep_token_id": [5], "pretraining_tp": [2], "quantization_config": [{"quant_method": "x"}],
    "auto_map": [{"AutoModel": "x.Y"}], "pruned_heads": [{}, {"0": [1]}], "_name_or_path": ["x"],
    "name_or_path": ["x"], "task_specific_params": [{"text-generation": {"do_sample": True}}], "n_ctx": [32, 64],
    "cache_implementation": ["static"], "transformers.js_config": [{"dtype": "q4"}], "unsloth_version": ["2025.1"],
    "finetuning_task": ["x"], "tokenizer_class": ["LlamaTokenizer"], "prefix": ["x"], "bad_words_ids": [[[5]]],
    "cross_attention_hidden_size": [8], "decoder_start_token_id": [5], "suppress_tokens": [[5]],
    "begin_suppress_tokens": [[5]], "forced_bos_token_id": [5], "forced_eos_token_id": [5],
    "exponential_decay_length_penalty": [[5, 1.5]], "per_layer_config": [{"0": {"hidden_act": "relu"}}],
    "tie_last_hidden_states": [True], "attn_implementation": ["sdpa"], "initializer_range": [0.5],
    "encoder_no_repeat_ngram_size": [2], "max_length": [5], "min_length": [5], "num_beams": [2], "top_k": [5],
    "num_beam_groups": [2], "no_repeat_ngram_size": [2], "num_return_sequences": [2], "chunk_size_feed_forward": [4],
    "diversity_penalty": [0.5], "temperature": [0.5], "top_p": [0.5], "typical_p": [0.5], "repetition_penalty": [1.5],
    "length_penalty": [1.5],
}  # fmt: skip
SWITCHES = {  # old boolean attributes without a default in any current class
    "gradient_checkpointing", "_attn_implementation_autoset", "is_llama_config", "output_past", "unsloth_fixed",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "is_decoder", "tie_encoder_decoder", "do_sample",
    "early_stopping", "output_scores", "return_dict_in_generate", "remove_invalid_values", "summary_use_proj",
    "summary_proj_to_labels", "reorder_and_upcast_attn", "add_cross_attention", "use_cache", "output_attentions",
    "qkv_bias", "attention_bias", "mlp_bias",
}  # fmt: skip
FRACTIONS = {"attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}
IDS = np.random.default_rng(0).integers(3, 61, (2, 30))


def attributes(config) -> list[str]:
    """All attribute names to test: of the config class, of older releases, and those that gptjax knows."""
    fields = {field.name for field in dataclasses.fields(type(config))} | set(config.to_dict())
    return sorted(fields | set(config.attribute_map) | NEUTRAL | set(OTHERS) | SWITCHES | FRACTIONS)


def others(name, default) -> list:
    """One or more values other than the default."""
    if name in OTHERS:
        return OTHERS[name]
    if name in SWITCHES or isinstance(default, bool):
        return [True, False]
    if name in FRACTIONS or isinstance(default, float):
        return [(default or 0.0) * 2 + 0.1]
    assert isinstance(default, int), f"{name}={default!r}: say in OTHERS what else to try"
    return [default + 1]


class Theirs:
    """transformers' logits of the model in a folder, cached by the config object."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}
        self.stored = safetensors.open_file(folder / "model.safetensors").shapes()

    def logits(self):
        """The logits; None if transformers refuses the value, or it changes the parameters of the model."""
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder)
            key = repr(sorted(vars(config).items(), key=str))
            if key not in self.known:
                self.known[key] = self._run(config)
            return self.known[key]
        except Exception:  # of any type: transformers does not support the value
            return None

    def _run(self, config):
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        if any(self.stored.get(name, tensor.shape) != tensor.shape for name, tensor in empty.items()):
            return None
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager", dtype="float32", output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        with torch.no_grad():
            logits = model.eval()(torch.tensor(IDS))[0].numpy()
        return logits if np.isfinite(logits).all() else None


class Ours:
    """gptjax's logits of the model in a folder, cached by ModelConfig, or the error message if it is refused."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}

    def logits(self):
        try:
            model = open_model(self.folder)
            if model.cfg not in self.known:
                params = model.params("float32", None)
                with jax.disable_jit():  # compiling every config would take ten times as long
                    logits = forward(params, jnp.array(IDS), model.cfg)
                self.known[model.cfg] = np.asarray(logits)
            return self.known[model.cfg]
        except UserError as error:
            return str(error)


def made(folder, kind, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def outcome(ours, theirs, name, values, usual) -> str:
    """One of "equal", "refused", or a description of the mismatch."""
    (ours.folder / "config.json").write_text(json.dumps(values))
    got = ours.logits()
    want = None if isinstance(got, str) else theirs.logits()
    if isinstance(got, str):
        return "refused" if name in got else f"refused without its name: {got}"
    if want is None:  # transformers cannot load the value: gptjax must ignore it
        return "equal" if np.abs(got - usual).max() < 1e-6 else "transformers cannot load it, gptjax gives other logits"
    return "equal" if np.abs(got - want).max() <= 1e-4 else f"logits differ by {np.abs(got - want).max():.1g}"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_attribute_gives_the_same_logits_or_is_refused_by_name(family, tmp_path, record_property, capsys):
    kind, settings = MODELS[family]
    folder = tmp_path / "m"
    saved = made(folder, kind, settings)
    ours, theirs = Ours(folder), Theirs(folder)
    defaults = getattr(transformers, f"{kind}Config")()
    fields = {field.name for field in dataclasses.fields(type(defaults))}
    counts, wrong, neutral_but_refused = {}, [], []
    names = attributes(defaults)
    for form, base in (("new", saved), ("old", {key: value for key, value in saved.items() if key not in NEW})):
        (folder / "config.json").write_text(json.dumps(base))
        usual = ours.logits()
        np.testing.assert_allclose(usual, theirs.logits(), atol=1e-4)
        for name in names if form == "new" else sorted(fields | {"rope_theta", "rope_scaling", "rope_local_base_freq"}):
            default = getattr(defaults, name, None) if name in fields | set(defaults.attribute_map) else None
            default = str(default).removeprefix("torch.") if isinstance(default, torch.dtype) else default
            tried = [NOT_THERE, None, *([] if default is None else [default])]
            for value in [*tried, *(value for value in others(name, default) if value not in tried[1:])]:
                values = {key: v for key, v in base.items() if key != name}
                values |= {} if value is NOT_THERE else {name: value}
                result = "equal" if values == base else outcome(ours, theirs, name, values, usual)
                counts[result] = counts.get(result, 0) + 1
                shown = f"{family}, {form} form: {name}={'(absent)' if value is NOT_THERE else value!r}"
                if result not in ("equal", "refused"):
                    wrong.append(f"{shown}: {result}")
                neutral = name in NEUTRAL - families.FAMILIES[family].defaults.keys() - {"architectures", "model_type"}
                if neutral and result == "refused":
                    neutral_but_refused.append(shown)
    shutil.rmtree(folder)
    summary = {"attributes": len(names), "values": sum(counts.values())} | {k: counts[k] for k in ("equal", "refused")}
    for key, value in summary.items():
        record_property(key, value)
    with capsys.disabled():
        print(f"\n{family}: " + ", ".join(f"{value} {key}" for key, value in summary.items()))
    assert not wrong, "\n".join(wrong)
    assert not neutral_but_refused


def test_the_defaults_are_those_of_transformers():
    for family, (kind, _) in MODELS.items():
        fields = {f.name: f.default for f in dataclasses.fields(getattr(transformers, f"{kind}Config"))}
        defaults = families.FAMILIES[family].defaults
        assert defaults == {name: fields[name] for name in defaults}, family
