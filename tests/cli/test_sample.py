"""`gptjax sample` with an untrained model: inputs, settings and output."""

import json

import jax
import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.cli import sample

MODEL = gptjax.ModelConfig(n_layer=1, n_head=2, d_model=8, context_length=16, vocab_size=257)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    params = gptjax.init_params(jax.random.key(0), MODEL)
    gptjax.save(folder / "final", params, MODEL, gptjax.tokenizers.load("bytes"))
    cfg = gptjax.load_config(None, "sample.max_new_tokens=5", "sample.temperature=0")
    (folder / "config.yaml").write_text(gptjax.config.to_yaml(cfg))
    return folder


def test_it_writes_what_generate_gives(run, capsysbinary):
    assert main(["sample", str(run), "--prompt", "a=b"]) == 0
    params, model = gptjax.load(run)
    tokenizer = gptjax.tokenizers.load(run)
    ids = tokenizer.encode("a=b")
    (new,) = gptjax.generate(params, [ids], model, max_new_tokens=5, key=jax.random.key(0), stop=[tokenizer.eot_id])
    out = capsysbinary.readouterr()
    assert out.out.decode().rstrip("\n") == tokenizer.decode(ids + new).rstrip("\n")
    assert b"tokens in" in out.err


@pytest.mark.parametrize("prompt", [["--prompt", "a"], ["--prompt=a"], ["prompt=a"], ["sample.prompt=a"]])
def test_a_setting_can_be_written_in_these_ways(run, prompt, capsys):
    assert main(["sample", str(run), *prompt, "--max-new-tokens", "2", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "prompt: a " in out and "max_new_tokens: 2 " in out
    assert "temperature: 0.0" in out and "config.yaml:" in out  # from the run's config


def test_it_works_after_the_folder_was_moved(run, tmp_path, capsys):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert main(["sample", str(moved), "prompt=a", "n=2"]) == 0
    assert "-----" in capsys.readouterr().out


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("settings", [["quantize=int8", "cache_dtype=int8"], ["cache_dtype=bfloat16"]])
def test_quantized_weights_and_cache(run, settings, capsys):
    assert main(["sample", str(run), "prompt=a", *settings]) == 0
    assert "5 tokens" in capsys.readouterr().err


@pytest.mark.first_cases(1)
@pytest.mark.parametrize("draft", ["ngram", "itself"])
def test_a_draft_changes_no_greedy_token(run, tmp_path, capsys, draft):
    rows = {}
    for name, settings in {"alone": [], "drafted": [f"draft={run if draft == 'itself' else draft}", "ahead=3"]}.items():
        out = tmp_path / f"{name}.jsonl"
        options = ["prompt=abab", "temperature=0", "max_new_tokens=8", "n=2", f"out={out}", *settings]
        assert main(["sample", str(run), *options]) == 0
        rows[name] = [{**json.loads(line), "logprobs": None} for line in out.read_text().splitlines()]
    assert rows["alone"] == rows["drafted"] and len(rows["alone"]) == 2
    assert "% of the draft tokens accepted" in capsys.readouterr().err


def test_a_draft_that_cannot_be(run, tmp_path, capsys):
    assert main(["sample", str(run), "prompt=a", "draft=ngram", "repetition_penalty=1.2"]) == 2
    assert "a repetition penalty" in capsys.readouterr().err
    assert main(["sample", str(run), "prompt=a", "draft=no/such"]) == 2
    assert "no/such" in capsys.readouterr().err
    assert main(["sample", str(run), "prompt=a", "ahead=2"]) == 2
    assert "sample.ahead would have no effect: sample.draft=null" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_string_ends_text_and_is_left_out(run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = ["prompt=a", "temperature=5", "max_new_tokens=12", "seed=3"]
    assert main(["sample", str(run), *options, f"out={out}"]) == 0
    full = json.loads(out.read_text())
    stop = full["text"][4:6]
    out.unlink()
    assert main(["sample", str(run), *options, f"out={out}", f"stop={json.dumps([stop])}"]) == 0
    cut = json.loads(out.read_text())
    assert cut["text"] == full["text"][: full["text"].index(stop)]
    assert cut["finish"] == "stop" and cut["tokens"] == full["tokens"][: len(cut["tokens"])]
    capsys.readouterr()
    assert main(["sample", str(run), *options, f"stop={json.dumps([stop])}"]) == 0
    assert capsys.readouterr().out == "a" + cut["text"] + "\n"


def test_dry_run(run, capsys):
    assert main(["sample", str(run), "prompt=abc", "--dry-run"]) == 0
    assert "3 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "which model?"),
        (["absent"], "absent: no such run"),
        (["RUN", "temperature=hot"], "sample.temperature: expected float"),
        (["RUN", "ROMEO:"], "'ROMEO:': a prompt is given as --prompt ROMEO:"),
        (["RUN", "n=2", "To be"], '--prompt "TEXT"'),
        (["RUN", "optim.lr=1"], "optim.lr: not a setting of gptjax sample, which reads prompt, prompts, out"),
        (["RUN", "temp=1"], "sample.temperature"),
        (["RUN", "max_tokens=1"], "sample.max_new_tokens"),
        (["RUN", "promt=1"], "did you mean prompt?"),
        (["RUN", 'stop=["a", ""]'], "sample.stop contains an empty string"),
        (["RUN", "quantize=nf4"], "no even divisor"),
        (["RUN", "top_p=2"], "sample.top_p (2.0) must be"),
    ],
)
def test_mistakes(run, args, words, capsys):
    assert main(["sample", *(str(run) if arg == "RUN" else arg for arg in args)]) == 2
    assert words in capsys.readouterr().err


def test_prompts_of_any_line_end(tmp_path):
    file = tmp_path / "p.txt"
    cfg = gptjax.load_config(None, f"sample.prompts={file}")
    for content in (b"one\ntwo\n", b"one\r\ntwo\r\n", b"one\rtwo\r", b"\xef\xbb\xbfone\ntwo"):
        file.write_bytes(content)
        assert sample.read_prompts(cfg) == ["one", "two"]
    file.write_bytes("one\n".encode("utf-16"))
    with pytest.raises(gptjax.UserError, match="UTF-16 by its byte order mark FF FE"):
        sample.read_prompts(cfg)


def test_rows_beyond_the_tokenizer_are_not_drawn(tmp_path, capsys):
    """257 tokens, 4,096 embedding rows: unrestricted sampling would almost always draw an id without a token."""
    import dataclasses

    wide = dataclasses.replace(MODEL, vocab_size=4096)
    params = gptjax.init_params(jax.random.key(0), wide)
    gptjax.save(tmp_path / "m", params, wide, gptjax.tokenizers.load("bytes"))
    assert main(["sample", str(tmp_path / "m"), "prompt=a", "n=4", "temperature=1.5", "max_new_tokens=20"]) == 0
    assert "80 tokens" in capsys.readouterr().err
