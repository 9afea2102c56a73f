"""GGUF exports of models and tokenizers trained by `gptjax.train`, compared with llama.cpp.

Needs the extra `parity`; without it these tests are skipped.
"""

import json
import urllib.request

import jax
import pytest

import gptjax
from gptjax.weights import export_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="extra 'parity' is not installed")

TEXT = [
    f"{name} the {kind} has {count} {things}, and it's {name} who'd count 12{count} of them.\n"
    for name in ("Ada", "Émile", "Grace")
    for kind in ("cat", "owl", "fox")
    for count in range(7)
    for things in ("apples", "new  books", "naïve ideas", "日本 maps")
]
PROMPTS = ["Ada the cat", "it's", "Émile the owl has 3 naïve", "  12", "books,\n\nGrace don't"]
SHAPES = {
    "gpt2": ["model.arch=gpt2"],
    "llama": ["model.arch=llama", "model.n_kv_head=2", "model.d_ff=128"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_continues_a_model_trained_here(shape, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("".join(TEXT[i::4]), encoding="utf-8")
    cfg = gptjax.load_config(
        None, *SHAPES[shape], f"data.source=[{tmp_path}]", "data.cache_dir=" + str(tmp_path / "cache"),
        "tokenizer.name=bpe", "tokenizer.vocab_size=400", f"run_dir={tmp_path / 'run'}",
        "model.n_layer=2", "model.n_head=4", "model.d_model=64", "model.context_length=64",
        "train.max_steps=40", "train.batch_size=8", "optim.lr=3e-3", "sample.max_new_tokens=8",
    )  # fmt: skip
    run = gptjax.train(cfg, log=lambda line: None)
    params, model = gptjax.load(run.run_dir)
    tokenizer = gptjax.weights.load_tokenizer(run.run_dir)
    path = export_gguf(tmp_path / "model.gguf", params, model, tokenizer)
    common = xllamacpp.CommonParams()
    common.model.path, common.n_ctx, common.n_parallel, common.warmup = str(path), 64, 1, False
    common.cache_type_k = common.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # the default is float16
    server = xllamacpp.Server(common)

    def not_the_end(logits, key):  # as llama.cpp's ignore_eos does
        return logits.at[:, tokenizer.eot_id].set(-jax.numpy.inf).argmax(-1)

    prompts = [tokenizer.encode(text) for text in PROMPTS]
    ours = gptjax.generate(params, prompts, model, max_new_tokens=16, key=jax.random.key(0), sampler=not_the_end)
    for text, ids, row in zip(PROMPTS, prompts, ours, strict=True):
        assert ids_of(server, text) == ids
        request = dict(prompt=text, max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=1, cache_prompt=False)
        reply = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        assert [token["id"] for token in reply] == row, text
    assert len({tuple(row) for row in ours}) > 1


def ids_of(server, text):
    """Token ids of a text from llama.cpp's tokenizer."""
    request = urllib.request.Request(server.listening_address + "/tokenize", json.dumps({"content": text}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["tokens"]
