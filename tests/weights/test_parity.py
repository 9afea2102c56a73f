"""Every family against transformers: import, export, packed and ragged batches, decoding; and against llama.cpp.

Needs the extra `parity`; without it these tests are skipped.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="extra 'parity' is not installed")
transformers = pytest.importorskip("transformers", reason="extra 'parity' is not installed")

from gptjax import generate, load, tokenizers  # noqa: E402
from gptjax.errors import UserError  # noqa: E402
from gptjax.model.gpt import backbone, forward, lm_logits  # noqa: E402
from gptjax.weights import export_gguf, export_hf, families  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA3 = dict(
    rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
SIZES = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=97, n_positions=128, n_embd=24, n_layer=2, bos_token_id=1, eos_token_id=2)
MODELS = {
    "gpt2": ("GPT2", GPT2 | dict(n_head=3)),
    "gpt2 untied, another width": ("GPT2", GPT2 | dict(n_head=4, n_inner=50, tie_word_embeddings=False)),
    "llama 3": ("Llama", SIZES | dict(rope_parameters=LLAMA3)),
    "llama biases, tied, linear": (
        "Llama",
        SIZES
        | dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4, head_dim=10, tie_word_embeddings=True)
        | dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=500.0)),
    ),
    "mistral": ("Mistral", SIZES | dict(sliding_window=5, head_dim=8)),
    "mistral without window": ("Mistral", SIZES | dict(sliding_window=None, num_key_value_heads=1)),
    "qwen2": ("Qwen2", SIZES),
    "qwen2 windows": (
        "Qwen2",
        SIZES | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=8)),
    "qwen3 tied": ("Qwen3", SIZES | dict(head_dim=6, num_key_value_heads=1, tie_word_embeddings=True)),
    "gemma3": (
        "Gemma3Text",
        SIZES | dict(num_hidden_layers=7, num_key_value_heads=1, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    ),
    "gemma3 softcap": (
        "Gemma3Text",
        SIZES
        | dict(head_dim=6, sliding_window=3, final_logit_softcapping=5.0, num_hidden_layers=3)
        | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "olmo2": ("Olmo2", SIZES),
    "olmo2 tied": ("Olmo2", SIZES | dict(num_key_value_heads=1, tie_word_embeddings=True)),
}


@pytest.fixture(scope="module", params=MODELS, ids=[name.replace(" ", "-") for name in MODELS])
def pair(request, tmp_path_factory):
    """(the transformers model, the folder it saved)"""
    kind, values = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


def theirs(model, tokens, mask=None):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=None if mask is None else torch.tensor(mask)).logits.numpy()


def tokens_of(*shape):
    return np.random.default_rng(0).integers(3, 97, shape)


def test_logits_of_padded_and_packed_batches(pair):
    model, folder = pair
    params, cfg = load(folder)
    tokens = tokens_of(2, 24)
    run = jax.jit(lambda params, tokens, segments: forward(params, tokens, cfg, segment_ids=segments))
    whole = theirs(model, tokens)
    np.testing.assert_allclose(run(params, tokens, np.ones((2, 24), int)), whole, atol=1e-4)
    mask = (np.arange(24) < [[24], [15]]).astype(int)  # right padding
    padded = np.where(mask, tokens, 0)
    ours = run(params, padded, mask)
    np.testing.assert_allclose(ours[1, :15], theirs(model, padded, mask)[1, :15], atol=1e-4)
    segments = np.repeat([[1, 2, 3]], [7, 12, 5], axis=1).repeat(2, 0)
    packed = run(params, tokens, segments)
    for start, end in ((0, 7), (7, 19), (19, 24)):
        np.testing.assert_allclose(packed[:, start:end], theirs(model, tokens[:, start:end]), atol=1e-4)


def test_greedy_tokens_of_a_ragged_batch(pair):
    model, folder = pair
    params, cfg = load(folder)
    prompts = [tokens_of(9).tolist(), tokens_of(4).tolist(), [5]]
    ours = generate(params, prompts, cfg, max_new_tokens=64, key=jax.random.key(0))
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert row == out[0, len(prompt) :].tolist()


def test_out_again(pair, tmp_path):
    """transformers loads our export with the same logits, and our config.json describes the same model."""
    model, folder = pair
    params, cfg = load(folder)
    export_hf(tmp_path / "out", params, cfg)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokens = tokens_of(2, 24)
    np.testing.assert_allclose(theirs(reloaded, tokens), theirs(model, tokens), atol=1e-5)
    back, back_cfg = load(tmp_path / "out")
    assert not families.differences(back_cfg, cfg)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), params, back))


def test_several_shards_and_other_dtypes(pair, tmp_path):
    model, folder = pair
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, sharded = load(folder)[0], load(tmp_path / "shards")[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, sharded))
    low = load(folder, dtype="bfloat16")[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a.astype(jnp.bfloat16), b), whole, low))


def test_an_attribute_or_a_tensor_that_is_not_known_is_refused_by_name(pair, tmp_path):
    _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    config |= {"surprise": 1, "mystery_scale": 2.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert "surprise=1" in str(error.value) and "mystery_scale=2.5" in str(error.value)


LLAMA_CPP = [
    "gpt2",
    "gpt2 untied, another width",
    "llama 3",
    "mistral without window",
    "qwen2",
    "qwen3",
    "gemma3",
    "olmo2",
]


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_continues_the_same(name, tmp_path):
    """llama.cpp loads our GGUF file and generates the same greedy tokens after five prompts."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="extra 'parity' is not installed")
    kind, values = MODELS[name]
    sizes = dict(n_embd=64, n_head=4) if kind == "GPT2" else dict(hidden_size=64, intermediate_size=96)
    sizes |= {key: 16 for key in ("head_dim", "query_pre_attn_scalar") if key in values}
    tokenizer = tokenizers.train("chars", ["".join(map(chr, range(32, 127)))])
    with pytest.raises(UserError, match="has an end token"):
        export_gguf(tmp_path / "model.gguf", {}, families.model_config(dict(vocab_size=95), ""), tokenizer)
    tokenizer = tokenizers.extend(tokenizer, ["<|endoftext|>"])
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**{**values, **sizes, "vocab_size": tokenizer.vocab_size})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "hf")
    params, cfg = load(tmp_path / "hf")
    path = export_gguf(tmp_path / "model.gguf", params, cfg, tokenizer)
    back, back_cfg = load(path)
    assert not families.differences(back_cfg, cfg)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), params, back))
    prompts = [tokenizer.encode(text) for text in ("To be", "x", "JAX and ", "0123", "The way of the data")]

    def no_end(logits, key):  # as llama.cpp's ignore_eos does
        return logits[:, :-1].argmax(-1)

    ours = generate(params, prompts, cfg, max_new_tokens=12, key=jax.random.key(0), sampler=no_end)
    server = llama_cpp_server(xllamacpp, path)
    for prompt, row in zip(prompts, ours, strict=True):
        assert [token["id"] for token in continued(server, prompt, 12)] == row


def llama_cpp_server(xllamacpp, path):
    common = xllamacpp.CommonParams()
    common.model.path, common.n_ctx, common.n_parallel, common.warmup = str(path), 256, 1, False
    common.cache_type_k = common.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # the default is float16
    return xllamacpp.Server(common)


def continued(server, prompt, n):
    """llama.cpp's greedy tokens, each with its five most likely candidates."""
    request = dict(prompt=prompt, max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=5, cache_prompt=False)
    return server.handle_completions(request)["choices"][0]["logprobs"]["content"]


PROMPTS = """
The capital of France is|Water boils at|The opposite of hot is|My favourite colour is|Once upon a time| 2 + 2
=|import numpy as|The largest planet in the solar system is|Photosynthesis is the process by which|She opened
the door and|The quick brown fox|In 1969, humans first|A triangle has|To make bread, you need flour,|def
add(a, b):|The chemical symbol for gold is|Dear Sir or|The president of the United States lives in the|Paris
is to France as Tokyo is to|The moon goes around the|Roses are red, violets are|An apple a day keeps
the|Machine learning is|The first month of the year is| Cats and|The Pacific is the largest|She speaks English
and|I would like a cup of|The square root of 81 is|You should never give
"""


def test_smollm2_from_its_gguf_file():
    """Log-probabilities are within 0.1 of llama.cpp's, which rounds activations to 8 bits. On 30 prompts the most
    likely token is the same, and on average four of the five most likely ones."""
    from gptjax import assets

    xllamacpp = pytest.importorskip("xllamacpp", reason="extra 'parity' is not installed")
    try:
        path = assets.fetch("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"asset smollm2-135m-instruct: {str(error).splitlines()[0]}")
    params, cfg = load(path)
    tokenizer = tokenizers.load(path)
    prompts = [" ".join(text.split()) for text in PROMPTS.split("|")]
    assert len(prompts) == 30
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, ids))
    tokens = np.array([row + [0] * (width - len(row)) for row in ids])
    last = np.array([len(row) - 1 for row in ids])

    @jax.jit
    def log_probabilities(params):
        hidden = backbone(params, tokens, cfg)[np.arange(30), last]
        return jax.nn.log_softmax(lm_logits(params, hidden, cfg))

    logp = np.asarray(log_probabilities(params))
    for token, value in ((7042, -0.2589), (260, -2.7646), (4528, -4.2949)):
        assert logp[0, token] == pytest.approx(value, abs=0.1)
    server = llama_cpp_server(xllamacpp, path)
    shared, other = [], []
    for prompt, row, text in zip(ids, logp, prompts, strict=True):
        first = continued(server, prompt, 1)[0]
        if first["id"] != row.argmax():
            other.append((text, first["top_logprobs"], np.sort(row)[-2:]))
        shared.append(len({t["id"] for t in first["top_logprobs"]} & set(np.argsort(-row)[:5].tolist())))
    assert not other, other
    assert np.mean(shared) >= 4
