"""What the README shows works: its commands and Python blocks run here, in its order, in one folder.

Runs are made small, and no other way changed: settings for a tiny model and four steps are appended to every command
that reads a configuration, and my.txt stands in for the plays (`TINY`). Commands that install or
that start this suite are left out, by name (`LEFT_OUT`). The files that the README speaks of as the reader's own are
made first: my.txt, my.csv, and each YAML block whose first line is `# its-name.yaml`.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from gptjax.__main__ import main
from gptjax.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEFT_OUT = {"pip install -e .", "pip install -e '.[test]'", "pytest"}
TINY = (
    "data.source=my.txt", "data.split=tail", "data.val_fraction=0.02", "data.cache_dir=cache",
    "model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.context_length=32",
    "optim.warmup_steps=0", "train.max_steps=4", "train.batch_size=4", "sample.max_new_tokens=8",
)  # fmt: skip
TEXT = "ROMEO:\nThe more I give to thee, the more I have, for both are infinite.\n\nJULIET:\nGood night!\n\n" * 40


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Of the bash blocks, one a line or joined by &&, and of the code spans in tables, in the README's order."""
    found = re.finditer(r"^```bash\n(.*?)^```$|^\|[^\n]*`(gptjax [^`\n]+)` \|$", README, re.MULTILINE | re.DOTALL)
    lines = [line for match in found for line in (match[1] or match[2]).splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def arguments(command: str) -> list[str]:
    """`gptjax ...` as arguments, made small."""
    program, verb, *rest = shlex.split(command)
    assert program == "gptjax", f"{command}: add it to LEFT_OUT if it cannot run here"
    few = ("train.epochs=null", "train.max_steps=4", "optim.warmup_steps=0")
    writes = ("max_new_tokens=8",)
    small = {"pretrain": TINY, "data": TINY, "sweep": TINY, "finetune": few, "sample": writes}.get(verb, ())
    given = {arg.partition("=")[0] for arg in rest} & {"data.source"}  # my.txt, or python-docs, which needs no network
    if any(arg.startswith("pretrain.base=") for arg in rest):  # which brings its model
        small = [setting for setting in small if not setting.startswith("model.")]
    return [verb, *rest, *(setting for setting in small if setting.partition("=")[0] not in given)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the reader's own files; load_config makes small."""
    import gptjax

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "gptjax-cache"))
    Path("my.txt").write_text(TEXT, encoding="utf-8")
    rows = [f"{kind},{name} number {i}\n" for i in range(20) for kind, name in (("fruit", "apple"), ("tool", "saw"))]
    Path("my.csv").write_text("label,text\n" + "".join(rows), encoding="utf-8")
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        assert name, f"the first line of a YAML block names its file: {block}"
        Path(name[1]).write_text(block, encoding="utf-8")
    real = gptjax.load_config
    monkeypatch.setattr(gptjax, "load_config", lambda *args: real(*args, *TINY), raising=False)
    return tmp_path


@pytest.mark.slow
def test_every_command_and_python_block_runs(folder, capsys):
    for command in commands():
        if command not in LEFT_OUT:
            code = main(arguments(command))
            assert code == 0, f"{command}: exit code {code}\n{capsys.readouterr().err}"
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    for run in ("shakespeare-char", "tiny-modern", "no-qk-norm", "notebook", "python-docs"):
        made = {path.name for path in (folder / "runs" / run).iterdir() if not path.name.startswith(".")}
        assert made == {name.rstrip("/") for name in run_directory()}, run


def run_directory() -> list[str]:
    """The names in the README's picture of a run directory."""
    picture = next(block for block in blocks("text") if block.startswith("config.yaml"))
    return re.findall(r"\b[a-z]+(?:\.[a-z]+\b|/)", re.sub(r"train/loss.*|val/loss", "", picture))


def test_the_two_commands():
    assert commands()[:2] == ["pip install -e .", "gptjax pretrain"]
    assert {"pip install -e '.[test]'", "pytest"} <= set(commands())


def test_what_is_left_out_is_there():
    assert set(commands()) >= LEFT_OUT


def test_every_verb_has_its_line():
    table = re.findall(r"^\| `(\w+)` \|.*`gptjax (\w+)", README, re.MULTILINE)
    assert table == [(verb, verb) for verb in VERBS]


def test_every_file_and_folder_is_there():
    tree = re.findall(r"^\| `([\w/]+/)` \|", README, re.MULTILINE)
    folders = {f"gptjax/{path.name}/" for path in (ROOT / "gptjax").iterdir() if (path / "__init__.py").exists()}
    assert set(tree) == {"gptjax/", "configs/", "tests/", "colab/", *folders}
    picture = next(block for block in blocks("text") if block.startswith("text "))
    names = re.findall(r"(?:\w+/)*\w+\.py|\b\w+/(?=$|\n)", picture)
    assert len(names) >= 12
    where = [(ROOT / "gptjax" / name).exists() or list((ROOT / "gptjax").glob(f"*/{name}")) for name in names]
    assert all(where), [name for name, found in zip(names, where, strict=True) if not found]


def test_every_name_of_the_package_is_there():
    import gptjax

    for name in set(re.findall(r"gptjax\.(\w+)(?=[(.`])", README)):
        assert name in gptjax.__all__
    for module, names in re.findall(r"^from (gptjax\S*) import (.+)", README, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


def test_it_is_short():
    assert len(README.splitlines()) <= 490
