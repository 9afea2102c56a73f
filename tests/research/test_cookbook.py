"""Every recipe of the cookbook runs by itself after its start, has at most 15 lines, and prints what the page says."""

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
    found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"one {language} block, not {len(found)}, in {section[:60]!r}"
    return found[0]


@pytest.fixture(scope="module")
def start():
    return compile(block("python", START), "cookbook.md, the start", "exec")


def printed(start, code):
    """By the recipe, in a namespace that holds the start and no more; with devices of its own, where it asks for
    them, in a process of its own."""
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
def test_recipe(start, section):
    """Decimals may differ by one in their last place, everything else by nothing."""
    code, stated = block("python", section), block("text", section)
    assert 0 < len(code.splitlines()) <= 15
    found = printed(start, code)
    assert stated and NUMBER.sub("#", " ".join(found.split())) == NUMBER.sub("#", " ".join(stated.split())), found
    for a, b in zip(NUMBER.findall(found), NUMBER.findall(stated), strict=True):
        places = len(b.partition(".")[2])
        assert abs(float(a) - float(b)) < 1.5 * 10**-places, found


def test_ten_recipes_in_the_table():
    assert len(RECIPES) == 10 and len(block("python", START).splitlines()) <= 15
    anchors = [re.sub(r"[^\w -]", "", s.splitlines()[0].lower()).replace(" ", "-") for s in RECIPES]
    linked = re.findall(r"^\| \[(.+)\]\(#(.+)\) \|", START, re.MULTILINE)
    assert linked == [
        (section.splitlines()[0], f"{i}-{anchor}")
        for i, (section, anchor) in enumerate(zip(RECIPES, anchors, strict=True), 1)
    ]
