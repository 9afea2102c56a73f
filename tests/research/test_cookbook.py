"""Every recipe of the cookbook needs only the setup, has at most 15 lines, and prints the output shown below it."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "colab" / "cookbook.md"
START, *RECIPES = re.split(r"^## \d+\. ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+")


def block(language, section):
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"expected one {language} block, got {len(blocks)}, in {section[:60]!r}"
    return blocks[0]


@pytest.fixture(scope="module")
def start():
    return compile(block("python", START), "cookbook.md, the start", "exec")


def printed(start, code):
    """The output of the setup and one recipe; a recipe that sets XLA_FLAGS runs in a new process."""
    if flags := re.match(r"# XLA_FLAGS=(\S+)\n", code):
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags[1]}"
        command = [sys.executable, "-W", "error", "-c", block("python", START) + code]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, cwd=PAGE.parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    names, out = {}, io.StringIO()
    exec(start, names)
    with contextlib.redirect_stdout(out):
        exec(compile(code, "cookbook.md", "exec"), names)
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("section", RECIPES, ids=[section.splitlines()[0] for section in RECIPES])
def test_recipe(start, section, tmp_path, monkeypatch):
    """Numbers may differ by one in the last decimal; the rest of the text is equal. Each recipe has an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "gptjax-cache"))
    code, expected = block("python", section), block("text", section)
    assert 0 < len(code.splitlines()) <= 15
    output = printed(start, code)
    assert expected and NUMBER.sub("#", " ".join(output.split())) == NUMBER.sub("#", " ".join(expected.split())), output
    for a, b in zip(NUMBER.findall(output), NUMBER.findall(expected), strict=True):
        places = len(b.partition(".")[2])
        assert abs(float(a) - float(b)) < 1.5 * 10**-places, output


def test_every_recipe_is_in_the_table():
    assert len(RECIPES) >= 16 and len(block("python", START).splitlines()) <= 15
    anchors = [re.sub(r"[^\w -]", "", s.splitlines()[0].lower()).replace(" ", "-") for s in RECIPES]
    linked = re.findall(r"^\| \[(.+)\]\(#(.+)\) \|", START, re.MULTILINE)
    assert linked == [
        (section.splitlines()[0], f"{i}-{anchor}")
        for i, (section, anchor) in enumerate(zip(RECIPES, anchors, strict=True), 1)
    ]
