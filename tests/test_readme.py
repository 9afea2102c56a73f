"""What the README and the guides show works: their commands and Python blocks run here, page by page, in their order.

Each page runs in an empty folder. Runs are made small, and changed in no other way: settings for a tiny model and four
steps are appended to every command that reads a configuration (`TINY`), and a tiny model stands in for the one that
would be downloaded (`BASE`). Commands that install or that start this suite are left out, by name (`LEFT_OUT`). The
files that the pages speak of as the reader's own are made first, and each YAML block whose first line is `# NAME.yaml`.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from gptjax.__main__ import main
from gptjax.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README": README} | {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "colab/guides").glob("*.md"))
}
LEFT_OUT = {"pip install -e .", "pip install -e '.[test]'", "pytest"}
BASE = "smollm2-135m-instruct"
TINY_MODEL = ("model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.context_length=32")
STEPS = ("train.epochs=null", "train.max_steps=4", "optim.warmup_steps=0")
TINY = {
    "pretrain": (
        "data.source=my.txt", "data.split=tail", "data.val_fraction=0.02", "data.cache_dir=cache", *TINY_MODEL, *STEPS,
        "train.batch_size=4", "sample.max_new_tokens=8",
    ),
    "finetune": ("finetune.base=base", *STEPS, "train.batch_size=4"),
    "sample": ("max_new_tokens=8",),
}  # fmt: skip
TINY |= {"data": TINY["pretrain"], "sweep": TINY["pretrain"]}
TINY_TASK = {
    "instruct": ("sample.max_new_tokens=8", "instruct.compare=false"),
    "prefer": (),
    "classify": (),
    "distill": (),
    "reward_model": (),
    "reward": ("reward.group=4", "reward.max_new_tokens=8", "reward.compare=false", "train.accumulation=1"),
}
TEXT = "ROMEO:\nThe more I give to thee, the more I have, for both are infinite.\n\nJULIET:\nGood night!\n\n" * 40


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def steps(page: str) -> list[tuple[str, str]]:
    """("bash", command) and ("python", block) of a page in its order: of bash blocks one command per line, or joined by
    &&, and the code spans at the end of a table's row."""
    pattern = r"^```(bash|python)\n(.*?)^```$|^\|[^\n]*`(gptjax [^`\n]+)` \|$"
    steps_of_page: list[tuple[str, str]] = []
    for match in re.finditer(pattern, page, re.MULTILINE | re.DOTALL):
        if match[1] == "python":
            steps_of_page.append(("python", match[2]))
        else:
            lines = (match[2] or match[3]).splitlines()
            steps_of_page += [("bash", command.strip()) for line in lines for command in line.split("&&")]
    return steps_of_page


def commands(page: str = README) -> list[str]:
    return [text for language, text in steps(page) if language == "bash"]


def small(verb: str, given: list[str]) -> list[str]:
    """The settings that make a command small, without those it gives itself: a source, a base, a number of tokens."""
    task = given[0] if verb == "finetune" and given else ""
    keys = {arg.partition("=")[0] for arg in given} & {"data.source", "finetune.base", "max_new_tokens"}
    settings = [*TINY.get(verb, ()), *TINY_TASK.get(task, ())]
    if any(arg.startswith("pretrain.base=") for arg in given):  # which brings its model
        settings = [setting for setting in settings if not setting.startswith("model.")]
    chosen = {arg.partition("=")[0] for arg in given if arg.startswith("model.")}
    if chosen:  # what a page shows of the model is what runs, in one small layer
        settings = [setting for setting in settings if setting.partition("=")[0] not in chosen]
    return [setting for setting in settings if setting.partition("=")[0] not in keys]


def arguments(command: str) -> list[str]:
    """`gptjax ...` as arguments, made small."""
    program, verb, *rest = shlex.split(command)
    assert program == "gptjax", f"{command}: add it to LEFT_OUT if it cannot run here"
    return [verb, *(arg.replace(BASE, "base") for arg in rest), *small(verb, rest)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the reader's own files; load_config makes small."""
    import jax

    import gptjax

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "gptjax-cache"))
    Path("my.txt").write_text(TEXT, encoding="utf-8")
    rows = [f"{kind},{name} number {i}\n" for i in range(20) for kind, name in (("fruit", "apple"), ("tool", "saw"))]
    Path("my.csv").write_text("label,text\n" + "".join(rows), encoding="utf-8")
    chats = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(60)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "No."} for i in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    cfg = gptjax.ModelConfig(arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=16, context_length=512, vocab_size=257)
    gptjax.save("base", gptjax.init_params(jax.random.key(0), cfg), cfg, gptjax.tokenizers.load("bytes"))
    for block in (block for page in PAGES.values() for block in blocks("yaml", page)):
        name = re.match(r"# (\S+\.yaml)\n", block)
        assert name, f"the first line of a YAML block names its file: {block}"
        Path(name[1]).write_text(block, encoding="utf-8")
    real = gptjax.load_config

    def tiny_config(source, *settings):
        task = source if source in TINY_TASK else ""
        return real(source, *settings, *small("finetune" if task else "pretrain", [task, *settings]))

    monkeypatch.setattr(gptjax, "load_config", tiny_config, raising=False)
    return tmp_path


NEEDS = {"pretrain": ["gptjax pretrain tiny-gpt2 data.source=my.txt run_dir=runs/mine"]}  # what a page takes as done
NEEDS["models"] = NEEDS["pretrain"]
NEEDS["reward"] = ["gptjax finetune instruct instruct.source=my.jsonl run_dir=runs/instruct"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_python_block_of_a_page_runs(name, folder, capsys):
    done = [("bash", command) for command in NEEDS.get(name, []) if command not in commands(PAGES[name])]
    for language, text in [*done, *steps(PAGES[name])]:
        if language == "python":
            exec(compile(text.replace(BASE, "base"), f"{name}.md", "exec"), {})
        elif text not in LEFT_OUT:
            code = main(arguments(text))
            assert code == 0, f"{text}: exit code {code}\n{capsys.readouterr().err}"


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
    assert all(where), [name for name, matches in zip(names, where, strict=True) if not matches]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / "README.md" if name == "README" else ROOT / "colab/guides" / f"{name}.md"
    made = {"config.md", "api/gptjax.html"}  # by colab/guides/build.py
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[name]):
        assert target in made or (page.parent / target).exists(), f"{name}: {target}"
    for toctree in blocks(r"\{toctree\}", PAGES[name]):
        for entry in [line for line in toctree.splitlines() if line and not line.startswith(":")]:
            assert f"{entry}.md" in made or (page.parent / f"{entry}.md").exists(), f"{name}: {entry}"


@pytest.mark.parametrize("name", PAGES)
def test_every_name_of_the_package_is_there(name):
    import gptjax

    for attribute in set(re.findall(r"gptjax\.(\w+)(?=[(.`])", PAGES[name])):
        assert attribute in gptjax.__all__
    for module, names in re.findall(r"^from (gptjax\S*) import (.+)", PAGES[name], re.MULTILINE):
        for attribute in names.split(", "):
            opened = importlib.import_module(module)
            assert hasattr(opened, attribute) or importlib.import_module(f"{module}.{attribute}")


def test_it_is_short():
    assert len(README.splitlines()) <= 250
