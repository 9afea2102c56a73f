"""colab/README.md lists every notebook, with the badge that opens it in Colab."""

import importlib.util
import re
from pathlib import Path

COLAB = Path(__file__).parents[2] / "colab"


def test_every_notebook_has_its_row():
    spec = importlib.util.spec_from_file_location("colab_build", COLAB / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    text = (COLAB / "README.md").read_text(encoding="utf-8")
    for source in build.sources():
        name = source.stem
        row = next((line for line in text.splitlines() if f"[{name}]({name}.py)" in line), "")
        assert build.BADGE.format(build.REPOSITORY, name) in row, f"colab/README.md has no row for {name}"


def test_commands_name_presets_and_files_that_exist():
    text = (COLAB / "README.md").read_text(encoding="utf-8")
    presets = {path.stem for path in COLAB.parent.glob("configs/*/*.yaml")}
    named = re.findall(r"python colab/train\.py (\S+)", text)
    assert named and set(named) <= presets
