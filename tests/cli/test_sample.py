"""`gptjax sample` with an untrained model: inputs, settings and output."""

import dataclasses
import json

import jax
import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.cli import sample
from gptjax.data.conversations import Conversation
from gptjax.generation import reward_scores
from gptjax.tokenizers.chat import styled

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


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("settings", [["quantize=int8", "cache_dtype=int8"], ["cache_dtype=bfloat16"]])
def test_quantized_weights_and_cache(run, settings, capsys):
    assert main(["sample", str(run), "prompt=a", *settings]) == 0
    assert "5 tokens" in capsys.readouterr().err


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model with the vocabulary of MODEL, and other settings of its tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    cfg = dataclasses.replace(MODEL, n_classes=1, cls_bias=False)
    params = gptjax.init_params(jax.random.key(1), cfg)
    gptjax.save(folder / "reward", params, cfg, styled(gptjax.tokenizers.load("bytes"), "alpaca"))
    return folder / "reward"


SEVERAL = ["prompt=ab", "n=4", "temperature=1.5", "max_new_tokens=6"]


def rows_of(folder, out, *settings):
    assert main(["sample", str(folder), *SEVERAL, *settings, f"out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("pick", ["reward", "majority", "logprob"])
def test_one_of_several_samples_is_picked(run, judge, tmp_path, capsys, pick):
    everything = rows_of(run, tmp_path / "all.jsonl")
    model = [f"reward_model={judge}"] if pick == "reward" else []
    (row,) = rows_of(run, tmp_path / "one.jsonl", f"pick={pick}", *model)
    score = row.pop(pick)
    assert row in everything and len(everything) == 4
    if pick == "reward":
        params, cfg = gptjax.load(judge)
        rewards = gptjax.generation.sequence_rewards(
            params, cfg, [[97, 98, *r["tokens"], *([256] if r["finish"] == "stop" else [])] for r in everything]
        )
        assert score == pytest.approx(rewards.max(), abs=1e-4) and row == everything[rewards.argmax()]
    elif pick == "logprob":
        means = [sum(r["logprobs"]) / len(r["logprobs"]) for r in everything]
        assert score == pytest.approx(max(means), abs=1e-3) and row == everything[means.index(max(means))]
    else:
        assert score == 0.25 and row == everything[0]  # four different texts
    capsys.readouterr()
    assert main(["sample", str(run), *SEVERAL, f"pick={pick}", *model]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("ab" + row["text"]) and "-----" not in out.out
    assert f"{pick} {score:.4f}, the largest of 4 samples" in out.err


@pytest.mark.slow
def test_every_prompt_has_its_own_pick(run, judge, tmp_path):
    (tmp_path / "p.txt").write_text("a\nbc\ndef\n")
    settings = [f"prompts={tmp_path / 'p.txt'}", "prompt=", "batch_size=2"]
    everything = rows_of(run, tmp_path / "all.jsonl", *settings)
    picked = rows_of(run, tmp_path / "picked.jsonl", *settings, "pick=reward", f"reward_model={judge}")
    assert [row["prompt"] for row in picked] == ["a", "bc", "def"]
    assert all({**row, "reward": None} in [{**r, "reward": None} for r in everything] for row in picked)


def test_a_sample_that_ended_at_a_stop_string_is_scored_without_it(run, judge, tmp_path):
    letters = {
        c for row in rows_of(run, tmp_path / "all.jsonl") for c in row["text"] if c.isascii() and c.isprintable()
    }
    stop = [f"stop={json.dumps(sorted(letters))}"]
    rows = rows_of(run, tmp_path / "cut.jsonl", *stop)
    (picked,) = rows_of(run, tmp_path / "one.jsonl", *stop, "pick=reward", f"reward_model={judge}")
    params, cfg = gptjax.load(judge)
    tokenizer = gptjax.tokenizers.load(judge)
    assert any(row["text"] != tokenizer.decode(row["tokens"]) for row in rows)
    ids = [
        row["tokens"] if row["text"] == tokenizer.decode(row["tokens"]) else tokenizer.encode(row["text"])
        for row in rows
    ]
    ends = [[tokenizer.eot_id] if row["finish"] == "stop" else [] for row in rows]
    rewards = gptjax.generation.sequence_rewards(
        params, cfg, [[97, 98, *i, *e] for i, e in zip(ids, ends, strict=True)]
    )
    assert picked["reward"] == pytest.approx(rewards.max(), abs=1e-4)


def test_chat_models_read_their_own_templates(run, judge, tmp_path, capsys):
    """The model that writes has the template phi3, the reward model alpaca."""
    cfg, tokenizer = dataclasses.replace(MODEL, context_length=256), gptjax.tokenizers.load("bytes")
    heads = dataclasses.replace(cfg, n_classes=1, cls_bias=False)
    for name, model, style in (("writer", cfg, "phi3"), ("judge", heads, "alpaca")):
        params = gptjax.init_params(jax.random.key(0), model)
        gptjax.save(tmp_path / name, params, model, styled(tokenizer, style))
    written = b"<|user|>\nab<|end|>\n<|assistant|>\n"
    scored = (
        b"Below is an instruction that describes a task. Write a response that appropriately completes the request."
        b"\n\n### Instruction:\nab\n\n### Response:\n"
    )
    chat = ["chat=true", "stop=[a,e,i,o,u]", "max_new_tokens=30", "temperature=1"]
    everything = rows_of(tmp_path / "writer", tmp_path / "all.jsonl", *chat)
    as_typed = rows_of(tmp_path / "writer", tmp_path / "typed.jsonl", *chat[1:], f"prompt={written.decode()}")
    assert [row["tokens"] for row in everything] == [row["tokens"] for row in as_typed]
    picks = ["pick=reward", f"reward_model={tmp_path / 'judge'}"]
    (row,) = rows_of(tmp_path / "writer", tmp_path / "one.jsonl", *chat, *picks)
    params, _ = gptjax.load(tmp_path / "judge")
    answers = [
        r["tokens"] if tokenizer.decode(r["tokens"]) == r["text"] else tokenizer.encode(r["text"]) for r in everything
    ]
    ends = [[256] if r["finish"] == "stop" else [] for r in everything]
    sequences = [[*scored, *answer, *end] for answer, end in zip(answers, ends, strict=True)]
    rewards = gptjax.generation.sequence_rewards(params, heads, sequences)
    assert row.pop("reward") == pytest.approx(rewards.max(), abs=1e-4) and row == everything[rewards.argmax()]
    talk = ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "xy"})
    judge_tokenizer = gptjax.tokenizers.load(tmp_path / "judge")
    (reward,) = reward_scores(params, heads, judge_tokenizer, [Conversation(talk, "")])
    assert reward == pytest.approx(gptjax.generation.sequence_rewards(params, heads, [[*scored, *b"xy", 256]])[0])
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "writer"), *SEVERAL, *chat, *picks]) == 0
    assert capsys.readouterr().out == row["text"] + "\n"
    assert main(["sample", str(run), "prompt=a", "chat=true"]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["pick=reward"], "sample.pick=reward needs sample.reward_model=RUN"),
        (["pick=reward", "reward_model=no/such"], "no/such: no such run"),
        (["pick=reward", "reward_model=RUN"], "expected a reward model, which has a head of one class, got a language"),
        (["pick=reward", "reward_model=CLASSES"], "got a classifier of 3 classes"),
        (["pick=reward", "reward_model=OTHER"], "expected the vocabulary of the model, got another one"),
        (["pick=majority", "reward_model=JUDGE"], "sample.reward_model would have no effect: sample.pick=majority"),
        (["pick=majority", "n=1"], "but sample.n=1: set sample.n=8"),
        (["pick=majority", "temperature=0"], "all samples are the same: set a temperature above 0"),
        (["pick=logprob", "draft=ngram"], "set sample.draft=null"),
        (["pick=best"], "sample.pick: expected reward, majority, logprob or null"),
    ],
)
def test_what_cannot_pick(run, judge, tmp_path, settings, words, capsys):
    for name, cfg, tokenizer in (
        ("CLASSES", dataclasses.replace(MODEL, n_classes=3), gptjax.tokenizers.load("bytes")),
        (
            "OTHER",
            dataclasses.replace(MODEL, n_classes=1, vocab_size=259),
            gptjax.tokenizers.extend(gptjax.tokenizers.load("bytes"), ["<a>"]),
        ),
    ):
        if f"reward_model={name}" in settings:
            gptjax.save(tmp_path / name, gptjax.init_params(jax.random.key(0), cfg), cfg, tokenizer)
    places = {"RUN": run, "JUDGE": judge, "CLASSES": tmp_path / "CLASSES", "OTHER": tmp_path / "OTHER"}
    given = [f"reward_model={places.get(s[13:], s[13:])}" if s.startswith("reward_model=") else s for s in settings]
    assert main(["sample", str(run), *SEVERAL, *given]) == 2
    assert words in capsys.readouterr().err
    assert main(["sample", str(run), *SEVERAL, *given, "--dry-run"]) == 2  # the error is raised before any generation


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


@pytest.mark.slow
def test_rows_beyond_the_tokenizer_are_not_drawn(tmp_path, capsys):
    """257 tokens, 4,096 embedding rows: unrestricted sampling would almost always draw an id without a token."""
    wide = dataclasses.replace(MODEL, vocab_size=4096)
    params = gptjax.init_params(jax.random.key(0), wide)
    gptjax.save(tmp_path / "m", params, wide, gptjax.tokenizers.load("bytes"))
    assert main(["sample", str(tmp_path / "m"), "prompt=a", "n=4", "temperature=1.5", "max_new_tokens=20"]) == 0
    assert "80 tokens" in capsys.readouterr().err
