"""`gptjax import`, `gptjax export` and prompt files of `gptjax sample`, end to end."""

import json

import jax
import jax.export
import numpy as np
import pytest

import gptjax
from gptjax.__main__ import main

MODEL = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=32, context_length=64, vocab_size=257)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    gptjax.save(folder / "final", gptjax.init_params(jax.random.key(0), MODEL), MODEL, gptjax.tokenizers.load("bytes"))
    return folder


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_out_and_in_again(run, tmp_path, capsys, form):
    target = tmp_path / ("model.gguf" if form == "gguf" else "model")
    assert main(["export", form, str(run), str(target)]) == 0
    assert main(["import", str(target), str(tmp_path / "back")]) == 0
    params, cfg = gptjax.load(run)
    back, back_cfg = gptjax.load(tmp_path / "back")
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), params, back))
    assert (back_cfg.n_layer, back_cfg.d_model) == (cfg.n_layer, cfg.d_model)
    tokenizer = gptjax.tokenizers.load(tmp_path / "back")
    assert tokenizer.encode("héllo") == gptjax.tokenizers.load(run).encode("héllo")
    capsys.readouterr()
    assert main(["export", form, str(run), str(target)]) == 2  # an existing target is never overwritten
    assert str(target) in capsys.readouterr().err


def test_one_program_for_every_platform(run, tmp_path):
    pytest.importorskip("flatbuffers", reason="extra 'export' is not installed")
    assert main(["export", "stablehlo", str(run), str(tmp_path / "out")]) == 0
    params, cfg = gptjax.load(tmp_path / "out")
    program = jax.export.deserialize((tmp_path / "out" / "forward.stablehlo").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    tokens = np.random.default_rng(0).integers(0, 257, (3, cfg.context_length), dtype=np.int32)
    np.testing.assert_allclose(program.call(params, tokens), gptjax.forward(params, tokens, cfg), atol=1e-5)


def test_a_model_that_no_other_format_holds_says_so(tmp_path, capsys):
    cfg = gptjax.ModelConfig(arch="modern", n_layer=1, n_head=2, d_model=32, context_length=64, vocab_size=257)
    folder = gptjax.save(
        tmp_path / "m", gptjax.init_params(jax.random.key(0), cfg), cfg, gptjax.tokenizers.load("bytes")
    )
    for form in ("hf", "gguf"):
        assert main(["export", form, str(folder), str(tmp_path / f"out.{form}")]) == 2
        error = capsys.readouterr().err
        assert "holds this model (arch=modern)" in error and "model.value_residual=True" in error
        assert not (tmp_path / f"out.{form}").exists()


@pytest.mark.slow
def test_a_file_of_prompts_becomes_a_file_of_answers(run, tmp_path, capsys):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "bb", "ccc")))
    args = ["sample", str(run), f"prompts={prompts}", f"out={out}", "temperature=0", "max_new_tokens=4", "n=2"]
    assert main([*args, "batch_size=2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "a", "bb", "bb", "ccc", "ccc"]
    assert all(len(row["tokens"]) == len(row["logprobs"]) <= 4 for row in rows)
    assert main(args) == 2 and "exists already" in capsys.readouterr().err
    prompts.write_text('{"prompt": 1}\n{\n')
    assert main(["sample", str(run), f"prompts={prompts}"]) == 2
    error = capsys.readouterr().err
    assert "p.jsonl:1: expected" in error and "p.jsonl:2: not JSON" in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["import", "RUN"], "expected: gptjax import"),
        (["import", "RUN", "x", "dtype=int4"], "dtype=int4: expected float32"),
        (["import", "absent", "x"], "absent: no such run"),
        (["export", "onnx", "RUN", "x"], "export onnx: expected hf, gguf, peft, stablehlo"),
        (["export", "gguf", "RUN", "x", "type=Q2"], "type=Q2: expected F32"),
        (["export", "gguf", "RUN", "x", "kind=Q2"], "unknown setting kind=Q2"),
        (["chat"], "which model?"),
        (["chat", "RUN"], "has no chat template"),
    ],
)
def test_mistakes(run, args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if arg == "RUN" else arg for arg in args]) == 2
    assert words in capsys.readouterr().err
