"""The API reference builds without warnings and has a page for every module and public name."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pdoc", reason="pip install -e '.[docs]'")

import gptjax
from gptjax.model.gpt import extend

PACKAGE = Path(gptjax.__file__).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if "GPTJAX_API" in os.environ:  # .ci/run has built the reference with the documentation
        return Path(os.environ["GPTJAX_API"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "error", "-m", "gptjax.reference", str(folder)]
    made = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [str(folder / "index.html")] and not made.stderr
    return folder


def page(site, module):
    return (site / "gptjax" / f"{module}.html").read_text(encoding="utf-8")


def test_every_name_of_the_front_door_shows(site):
    front = (site / "gptjax.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'<section id="(\w+)"', front)) | set(re.findall(r'<a href="gptjax/(\w+)\.html', front))
    assert set(gptjax.__all__) <= shown
    assert html.escape(extend.__doc__.splitlines()[0]) in front


def test_every_module_has_its_page(site):
    modules = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    modules = [path.parent if path.name == "__init__.py" else path.with_suffix("") for path in modules]
    public = {str(path) for path in modules if path.name and not any(name.startswith("_") for name in path.parts)}
    assert len(public) > 80
    assert public == {str(path.relative_to(site / "gptjax").with_suffix("")) for path in site.glob("gptjax/**/*.html")}


def test_a_docstring_is_as_it_was_written(site):
    """Line breaks, columns and asterisks of a docstring are kept, and known names become links."""
    text = page(site, "from_scratch")
    assert "causal_mask(3, 3)   1 0 0\n                    1 1 0\n" in text
    assert "w_q [D, N*H]; w_k, w_v [D, K*H]; w_o [N*H, D]" in text
    text = page(site, "ops/attention")
    assert '<code><a href="#heads_attention">heads_attention</a></code>' in text
    assert "jaxlib" not in text
