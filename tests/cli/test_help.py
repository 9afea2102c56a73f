"""`gptjax COMMAND --help`, `gptjax help TOPIC`, and the examples of both."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gptjax import config
from gptjax.__main__ import main
from gptjax.cli import ALL_VERBS, GROUPS, VERBS, audit, classify, compare
from gptjax.cli.manual import PAGES
from gptjax.cli.topics import TOPICS
from gptjax.config.schema import leaf_fields

ROOT = Path(__file__).parents[2]
CHECKED_BY_PRINT_CONFIG = ("pretrain", "finetune", "sample", "chat", "plan", "sweep", "data prepare", "data inspect")


def help_of(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


def commands(line):
    """The words after `gptjax` of each gptjax command in a shell line, with those of pipes, ; and && told apart."""
    words = shlex.shlex(line, posix=True, punctuation_chars="|;&<>()")
    words.whitespace_split = True
    commands, command = [], None
    for word in words:
        if set(word) <= set("|;&<>()"):
            command = None
        elif word == "gptjax" and command is None:
            commands.append(command := [])
        elif command is not None:
            command.append(word)
    return commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-gpt2").mkdir(parents=True)
    (tmp_path / "my.csv").write_text("label,text\na,b\n")
    return tmp_path


def test_every_verb_and_action_has_a_page():
    names = [*ALL_VERBS, *(f"{name} {action}" for name, verb in ALL_VERBS.items() for action in verb.actions)]
    assert {name for name in names if not name.startswith("completion ")} == set(PAGES)
    assert {verb.group for verb in ALL_VERBS.values()} == set(GROUPS)


def test_gptjax_help_lists_verbs_and_topics(capsys):
    assert main(["--help"]) == main([]) == main(["help"]) == 0
    first, second, third = re.split(r"(?m)^(?=gptjax trains)", capsys.readouterr().out)[1:]
    assert first == second == third
    for name, verb in ALL_VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", first, re.MULTILINE)
    assert all(re.search(rf"^  {name} ", first, re.MULTILINE) for name in TOPICS)
    assert max(map(len, first.splitlines())) <= 120


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_it_does_and_has_three_examples(name, capsys):
    out, page = help_of(name, capsys), PAGES[name]
    assert out.startswith(page.about.split(" ")[0]) and "\nUsage: gptjax " in out and "None" not in out
    assert len(page.examples) == 3 and all(f"\n  {command}\n" in out for command, _ in page.examples)
    assert all(page.usage.startswith(f"gptjax {word}") for word in [name.split()[0]])
    assert all(f"gptjax {name}" in command for command, _ in page.examples) or name in ("import", "presets ls")
    texts = [page.about, *(what for _, what in page.examples), *(option.text for option in page.options)]
    assert all(re.match(r"[A-Z]", text) and text.endswith(".") for text in texts)
    if name not in TOPICS:  # data is both: `gptjax help data` is the topic, which names the other
        assert main(["help", *name.split()]) == 0
        assert capsys.readouterr().out == out


def test_every_setting_has_a_sentence_of_help():
    texts = {key: field.metadata["help"] for key, field in leaf_fields().items()}
    wrong = [key for key, text in texts.items() if not re.match(r"[A-Z].{9,}\.$", text)]
    assert not wrong


def test_the_options_of_a_page_are_those_of_the_verb():
    names = {name: {option.name.rstrip("=") for option in page.options} for name, page in PAGES.items()}
    assert names["audit"] == {*audit.TEXTS, *audit.NUMBERS, *audit.LISTS, "alpha"}
    assert names["classify"] == set(classify.SETTINGS)
    assert names["compare"] == set(compare.SETTINGS)


@pytest.mark.parametrize("name", PAGES)
def test_topics_and_presets_that_a_page_names_exist(name, capsys):
    check_names(help_of(name, capsys))


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic(name, capsys):
    assert main(["help", name]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == TOPICS[name][0] and len(lines) <= 70 and max(map(len, lines)) <= 100
    check_names(out)
    sections = "|".join({key.partition(".")[0] for key in config.schema() if "." in key})
    assert set(re.findall(rf"\b((?:{sections})\.\w+)", out)) <= set(config.schema())


def check_names(text):
    """The commands, topics and presets that the text names in backquotes or in lines with a command exist."""
    for verb, word in re.findall(r"(?:`|^ +)gptjax ([a-z]+)(?: ([a-z]+))?", text, re.MULTILINE):
        assert verb in ALL_VERBS
        assert verb != "help" or word in ("", *TOPICS, *ALL_VERBS)
    for preset in re.findall(r"^ +gptjax (?:pretrain|sweep|plan) ([a-z][\w-]+)(?= |$)", text, re.MULTILINE):
        assert preset in config.presets()


def test_the_file_of_help_config_is_one(here):
    text = TOPICS["config"][1]
    block = textwrap.dedent("\n".join(line for line in text.splitlines() if line.startswith("    ")))
    Path("mine.yaml").write_text(block[: block.index("1e-3") + 4])
    cfg = config.load_config("mine.yaml")
    assert (cfg.model.n_layer, cfg.optim.lr, cfg.model.d_model) == (6, 1e-3, 32)


def test_the_records_of_help_data_are_read(here):
    from gptjax.data import classification, conversations, preferences, sources

    records = [line.strip() for line in TOPICS["data"][1].splitlines() if line.startswith("    {")]
    kinds = {"text": [], "chosen": [], "": []}
    for record in records:
        kinds[next((key for key in ("text", "chosen") if f'"{key}"' in record), "")].append(record)
    for name, lines in kinds.items():
        Path(f"of-{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert len(list(sources.documents(config.DataConfig(source=("of-text.jsonl",))))) == 2
    assert len(preferences.read("of-chosen.jsonl")) == 1
    assert len(conversations.read("of-.jsonl")) == len(conversations.FORMATS) == 5
    Path("a.csv").write_text("text,label\nYou have won a prize,spam\nSee you,ham\n")
    assert classification.read("a.csv").names == ("ham", "spam")
    assert all(kind in TOPICS["data"][1] for kind in sources.READERS)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["help", "confg"], "did you mean config?"),
        (["help", "pretrian"], "did you mean pretrain?"),
        (["help", "data", "chekc"], "did you mean check?"),
        (["help", "doctor", "who"], "gptjax doctor has no actions"),
        (["help", "runs", "now"], "expected no further word, got now"),
        (["help", "xyzzy"], "topics: config, data, runs"),
    ],
)
def test_an_unknown_topic(args, words, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ")


# ---------------------------------------------------------------- examples


LINES = sorted({line for page in PAGES.values() for line in (*page.needs, *(command for command, _ in page.examples))})


@pytest.mark.parametrize("line", [line for line in LINES if "presets cp" not in line])  # test_quick_examples_run has it
def test_an_example_is_understood(line, here, capsys):
    """By the parser of its command and the checks of the configuration; nothing is run."""
    for command in commands(line):
        name = " ".join(command[:2]) if " ".join(command[:2]) in PAGES else command[0]
        assert name in PAGES
        if name.startswith(CHECKED_BY_PRINT_CONFIG):
            switches = [word for word in command if word not in ("--dry-run", "--print-config")]
            assert main([*switches, "--print-config"]) == 0, capsys.readouterr().err
        elif name == "tokenizer train":
            assert main([*command, *([] if "--dry-run" in command else ["--dry-run"])]) == 0
        elif name == "audit":
            audit.settings_of(word for word in command[2:])
        elif name == "classify":
            assert classify.parse(command[1:]).sources
        elif name in ("data check", "compare"):
            given = {word.partition("=")[0] + "=" for word in command[1:] if "=" in word}
            assert given <= {option.name for option in PAGES[name].options}
        elif name.startswith(("export", "import")):
            options = {option.name: option.choices for option in PAGES[name].options}
            for word in command:
                key, is_set, value = word.partition("=")
                assert not is_set or value in options[f"{key}="]


SHELL = 'gptjax() { "$PYTHON" -m gptjax "$@"; }; set -e -o pipefail\n'
QUICK = ("presets", "presets ls", "presets show", "presets cp", "help", "completion")


@pytest.fixture(scope="module")
def run_examples(tmp_path_factory):
    """Runs the examples of a page, and what they need, in one folder for all pages; each line once.

    A line that is one command runs in this process, which has imported jax; bash runs the others.
    """
    folder = tmp_path_factory.mktemp("examples")
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["GPTJAX_CACHE"] = str(folder / "cache")
    done = set()

    def run(name):
        for line in (*PAGES[name].needs, *(command for command, _ in PAGES[name].examples)):
            if line in done:
                continue
            done.add(line)
            if line.startswith("gptjax ") and not line.startswith("gptjax chat") and not set(line) & set("|;&<>()$*"):
                with pytest.MonkeyPatch.context() as patch:
                    patch.chdir(folder)
                    patch.setenv("GPTJAX_CACHE", env["GPTJAX_CACHE"])
                    assert main(shlex.split(line)[1:]) == 0, line
            else:
                command = ["bash", "-c", SHELL + line]
                result = subprocess.run(
                    command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
                )
                assert result.returncode == 0, f"{line}\n{result.stdout[-1000:]}\n{result.stderr[-1000:]}"

    return run


@pytest.mark.parametrize("name", QUICK)
def test_quick_examples_run(name, run_examples):
    run_examples(name)


# train several models
LONG = (
    "pretrain", "finetune", "finetune instruct", "finetune prefer", "finetune reward", "finetune reward_model",
    "finetune distill", "sweep", "audit",
)  # fmt: skip
FURTHER = [pytest.param(name, marks=pytest.mark.further_case) for name in LONG]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*(name for name in PAGES if name not in QUICK + LONG), *FURTHER])
def test_all_other_examples_run(name, run_examples):
    if name == "plan":
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed (gptjax[tpu-plan])")
    if name in ("export", "export stablehlo"):
        pytest.importorskip("flatbuffers", reason="the exporter is not installed (gptjax[export])")
    run_examples(name)


def test_help_imports_no_jax():
    for args in (["--help"], ["pretrain", "--help"], ["help", "runs"], ["completion", "--words", "pretrain", ""]):
        code = f"import sys; from gptjax.__main__ import main; main({args}); sys.exit('jax' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, args


def test_readme_lists_the_verbs_that_do_something():
    assert list(ALL_VERBS) == [*VERBS, "help", "completion"]
