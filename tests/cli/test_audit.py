"""`gptjax audit` on a run with checkpoints, and its error messages."""

import json
import shutil

import pytest

from gptjax.__main__ import main
from gptjax.cli import audit as verb
from gptjax.errors import UserError

TINY = (
    "tokenizer.name=bytes", "data.split=tail", "data.val_fraction=0.2", "model.n_layer=1", "model.n_head=2",
    "model.d_model=16", "model.context_length=32", "train.batch_size=4", "train.max_steps=10", "train.eval_every=10",
    "train.checkpoint_every=5", "train.log_every=5", "optim.warmup_steps=0", "sample.max_new_tokens=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(here / "cache"))
        patch.chdir(here)
        lines = (f"The number of line {i} is {i * 7919 % 1000}, and then it ends.\n" for i in range(60))
        (here / "a.txt").write_text("".join(lines))
        (here / "canaries.jsonl").write_text('{"prefix": "My code is ", "secret": "12345"}\n')
        (here / "prompts.txt").write_text("The number of line\nand then\n")
        assert main(["pretrain", "tiny-gpt2", "data.source=a.txt", "run_dir=run", *TINY]) == 0
        shutil.copytree(here / "run/final", here / "model", ignore=lambda *_: ["config.yaml"])
        yield here


@pytest.mark.slow
def test_a_run(folder, capsys):
    args = ["audit", "run", "canaries=canaries.jsonl", "prompts=prompts.txt", "base=run", "rows=24", "suffix=4",
            "prefixes=4", "of=blocks/mlp/*"]  # fmt: skip
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "membership" in out and "audit.html" in out
    report = json.loads((folder / "run/audit.json").read_text(encoding="utf-8"))
    assert report["models"] == ["step 5", "step 10, the last"]
    assert [row["model"] for row in report["membership"]] == report["models"]
    assert report["drift"]["kl"] == pytest.approx(0, abs=1e-6)  # the base is the run itself
    assert "<svg" in (folder / "run/audit.html").read_text(encoding="utf-8")
    assert main(args) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_is_the_model_that_was_saved(folder):
    """The parameters in the last checkpoint equal those in final/."""
    import jax
    import numpy as np

    from gptjax import weights
    from gptjax.checkpoint import Checkpoints

    read, final = Checkpoints(folder / "run/checkpoints").read(10)["params"], weights.load(folder / "run/final")[0]
    assert jax.tree.structure(read) == jax.tree.structure(final)
    jax.tree.map(np.testing.assert_array_equal, read, final)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "which run?"),
        (["absent"], "absent: no such run"),
        (["a.txt"], "a.txt"),
        (["run", "out=a.txt/b"], "cannot create the folder a.txt"),
        (["run", "rwos=3"], "did you mean rows?"),
        (["run", "rows=few"], "expected a whole number"),
        (["run", "alpha=2"], "between 0 and 1"),
        (["run", "prefixes=8,0"], "1 or more"),
        (["run", "train=a.txt", "out=b"], "go together"),
        (["run", "base=run", "out=b"], "prompts=FILE"),
        (["run", "prompts=prompts.txt", "out=b"], "base=MODEL"),
        (["run", "canaries=a.txt", "out=b"], "trigger and payload"),
        (["model", "out=b"], "train=FILE and held_out=FILE"),
        (["run", "of=layers/*", "out=b"], "layers/*"),
    ],
)
def test_what_it_refuses(folder, args, says, capsys):
    assert main(["audit", *args]) == 2
    assert says in capsys.readouterr().err


def test_settings():
    assert verb.settings_of(["rows=3", "prefixes=4,8", "alpha=0.1", "of=blocks/*"]) == {
        "rows": 3, "prefixes": [4, 8], "alpha": 0.1, "of": "blocks/*"
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        verb.settings_of(["rows=x", "seed=y"])
    assert len(str(error.value).splitlines()) == 2
