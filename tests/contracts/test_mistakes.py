"""Common user mistakes: a clear message, exit code 2, no traceback, and nothing overwritten."""

import os
import shutil
from pathlib import Path

import pytest

from gptjax.__main__ import main

TEXT = "To be, or not to be, that is the question.\n"
TINY = [
    "tiny-gpt2",
    "tokenizer.name=chars",
    "data.source=a.txt",
    "train.max_steps=2",
    "train.batch_size=2",
    "model.n_layer=1",
]
RUN = ["run_dir=runs/x", "train.checkpoint_every=1", "train.eval_every=1", "train.steps_per_call=1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with valid and invalid files, and its own cache."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "a.txt").write_text(TEXT * 60, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Straße und Bäume\n".encode("latin-1") * 60)
    (folder / "short.txt").write_text("To be")
    (folder / "empty.yaml").write_text("")
    (folder / "broken.yaml").write_text("model:\n  n_layer: 2\n n_head: 2\n")
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (folder / "peer.yaml").write_text("optim:\n  learning_rate: 1e-3\n")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


MISTAKES = {
    "unknown key": (["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
    "a peer's key": (["learning_rate=1e-3"], "here it is called optim.lr"),
    "a peer's key in a file": (
        ["peer.yaml"],
        "peer.yaml:2: unknown key optim.learning_rate; here it is called optim.lr",
    ),
    "bare leaf": (["lr=1e-3"], "did you mean optim.lr?"),
    "wrong type": (["model.n_layer=six"], "model.n_layer: expected int, got 'six'"),
    "wrong choice": (["model.arch=gpt5"], "expected gpt2, llama or modern, got 'gpt5'"),
    "not divisible": (
        ["model.n_head=3"],
        "model.d_model (32) must be divisible by model.n_head (3): n_head can be 1, 2, 4",
    ),
    "kv heads": (["model.n_kv_head=3"], "use one of 1, 2"),
    "negative rate": (["optim.lr=-1e-3"], "optim.lr (-0.001) must be above 0"),
    "not a number": (["optim.lr=nan"], "optim.lr (nan) must be above 0"),
    "accumulation": (["train.accumulation=3"], "must divide train.batch_size (2): use one of 1, 2"),
    "no value": (["--optim.lr"], "expected --optim.lr VALUE"),
    "several at once": (["lr=1", "model.n_layer=x", "optim.beta1=2"], "errors:"),
    "missing file": (["data.source=absent.txt"], "absent.txt"),
    "empty file": (["data.source=empty.txt"], "empty.txt"),
    "not UTF-8": (["data.source=latin.txt"], "UTF-8"),
    "too little text": (["data.source=short.txt"], "needed"),
    "missing config": (["absent.yaml"], "absent.yaml: no such config file"),
    "empty config": (["empty.yaml"], "empty.yaml: the config is empty"),
    "YAML syntax": (["broken.yaml"], "broken.yaml:3"),
    "key twice": (["twice.yaml"], "twice.yaml:2: seed is set twice, first in line 1"),
    "unknown preset": (["tiny-gpt3"], "did you mean tiny-gpt2?"),
    "unknown tokenizer": (["tokenizer.name=gpt3"], "gpt3"),
    "vocabulary too small": (["model.vocab_size=3"], "model.vocab_size"),
    "run below a file": (["run_dir=a.txt/run"], "a.txt"),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_pretrain(here, capsys, name):
    args, words = MISTAKES[name]
    before = snapshot(here)
    given = [*args[:1], *TINY[1:]] if "=" not in args[0] and not args[0].startswith("-") else [*TINY, *args]
    assert main(["pretrain", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert snapshot(here) == before


def test_several_at_once_are_all_named(here, capsys):
    main(["pretrain", *TINY, *MISTAKES["several at once"][0]])
    error = capsys.readouterr().err
    assert all(word in error for word in ("optim.lr?", "'x'", "optim.beta1 (2.0)"))


def test_an_equals_sign_in_a_value_is_no_mistake(here, capsys):
    assert main(["pretrain", *TINY, "sample.prompt=a=b=c", "--print-config"]) == 0
    assert 'prompt: "a=b=c"' in capsys.readouterr().out


def test_unknown_verb(capsys):
    assert main(["pretrian"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_sampling_from_a_run_that_is_not_there(here, capsys):
    assert main(["sample", "runs/absent"]) == 2
    assert "runs/absent: no such run" in capsys.readouterr().err


# ---------------------------------------------------------------- on a run that exists


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A folder with a run that was interrupted after the first of its two steps."""
    folder = tmp_path_factory.mktemp("half_way")
    (folder / "a.txt").write_text(TEXT * 60, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert main(["pretrain", *TINY, *RUN]) == 0
    for done in ("runs/x/final", "runs/x/checkpoints/2"):
        shutil.rmtree(folder / done)
    return folder


@pytest.fixture
def trained(half_way, here):
    shutil.copytree(half_way / "runs", here / "runs")
    return here


@pytest.mark.first_cases(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["optim.lr=1e-5"], "optim.lr"),
        (["model.n_layer=2"], "model.n_layer"),
        (["tokenizer.name=bytes"], "tokenizer.name"),
        (["data.source=b.txt"], "data"),
    ],
    ids=["rate", "layers", "tokenizer", "text"],
)
def test_resuming_as_something_else_shows_the_difference(trained, change, words, capsys):
    (trained / "b.txt").write_text(TEXT.upper() * 60 + "é§")
    before = snapshot(trained)
    assert main(["pretrain", *TINY, *RUN, *change]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert snapshot(trained / "runs") == {
        k.removeprefix("runs/"): v for k, v in before.items() if k.startswith("runs/")
    }


def test_the_text_changed_under_a_run(trained, capsys):
    (trained / "a.txt").write_text(TEXT.upper() * 60 + "é§", encoding="utf-8")
    before = snapshot(trained / "runs")
    assert main(["pretrain", *TINY, *RUN]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and ("vocab" in error or "data" in error or "tokenizer" in error)
    assert snapshot(trained / "runs") == before


@pytest.mark.slow
def test_the_same_command_goes_on(trained, capsys):
    assert main(["pretrain", *TINY, *RUN]) == 0
    assert (trained / "runs/x/final/model.safetensors").exists()


def test_a_run_that_must_not_resume(trained, capsys):
    before = snapshot(trained / "runs")
    assert main(["pretrain", *TINY, *RUN, "train.resume=never"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert snapshot(trained / "runs") == before


def test_a_prompt_outside_the_vocabulary(trained, capsys):
    assert main(["sample", "runs/x", "--prompt", "€"]) == 2
    assert "€" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk(here):
    """Simulates a full disk: a subprocess whose files are limited to 20 kB."""
    import subprocess
    import sys

    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from gptjax.__main__ import main; import gptjax.training.loop;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    root = str(Path(__file__).parents[2])
    env = dict(os.environ, PYTHONPATH=root, JAX_COMPILATION_CACHE_DIR="")
    args = ["pretrain", *TINY, "model.d_model=64", "run_dir=runs/full"]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr or "space" in done.stderr
