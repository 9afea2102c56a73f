"""Every notebook matches its source file; GPTJAX_NOTEBOOKS=1 also runs each from top to bottom."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "colab" / "build.py"
SOURCES = sorted((ROOT / "colab").glob("[0-9][0-9]_*.py"))
NAMES = [source.stem for source in SOURCES]


def read(name):
    return json.loads((ROOT / "colab" / f"{name}.ipynb").read_text(encoding="utf-8"))


def text(cell):
    return "".join(cell["source"])


@pytest.fixture
def build(tmp_path, monkeypatch):
    """colab/build.py as a module that works in a temporary folder with only `first_cells.py`."""
    spec = importlib.util.spec_from_file_location("colab_build", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "first_cells.py").write_bytes(BUILD.with_name("first_cells.py").read_bytes())
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_the_notebooks_are_numbered():
    assert NAMES and [name[:2] for name in NAMES] == [f"{i:02}" for i in range(len(NAMES))]


def test_every_notebook_is_what_its_source_gives(build, monkeypatch, capsys):
    monkeypatch.setattr(build, "HERE", BUILD.parent)
    assert build.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("change", ["source", "notebook", "missing", "orphan"])
def test_drift_is_seen(build, tmp_path, capsys, change):
    source = tmp_path / SOURCES[0].name
    source.write_bytes(SOURCES[0].read_bytes())
    notebook = source.with_suffix(".ipynb")
    assert build.main([]) == 0
    before = notebook.read_bytes()
    assert before == (BUILD.parent / notebook.name).read_bytes()
    assert build.main(["--check"]) == 0
    if change == "source":
        source.write_text(source.read_text(encoding="utf-8") + "\n# %%\n1 + 1\n", encoding="utf-8")
    elif change == "notebook":
        notebook.write_bytes(before.replace(b"jax", b"Jax", 1))
    elif change == "missing":
        notebook.unlink()
    else:
        notebook = tmp_path / "99_alone.ipynb"
        notebook.write_bytes(before)
    assert build.main(["--check"]) == 1
    assert capsys.readouterr().err.endswith(f": {notebook.name}\n")


def test_a_new_cell_leaves_the_ids_of_the_others(build, tmp_path):
    cells = ["# %% [markdown]\n# # Title\n", "# %%\n1 + 1\n", "# %%\n1 + 1\n"]

    def ids():
        (tmp_path / "00_x.py").write_text("\n".join(cells), encoding="utf-8")
        return [cell["id"] for cell in json.loads(build.build(tmp_path / "00_x.py"))["cells"]]

    before = ids()
    cells.insert(1, "# %%\n2 + 2\n")
    assert len(set(before)) == 5
    assert [i for i in ids() if i in before] == before


def test_a_source_without_a_title(build, tmp_path):
    (tmp_path / "00_x.py").write_text("# %%\n1 + 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="whose first line is '# # Title'"):
        build.main([])


def test_a_run_tells_which_notebook_failed(tmp_path):
    (tmp_path / "first_cells.py").write_bytes(BUILD.with_name("first_cells.py").read_bytes())
    for name, line in (("00_x", "assert 1 + 1 == 3"), ("01_y", "print(40 + 2)")):
        source = f"# %% [markdown]\n# # Title\n\n# %%\n{line}\n"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    script = tmp_path / "build.py"
    script.write_bytes(BUILD.read_bytes())
    command = [sys.executable, str(script), "--run", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"00_x: \d+ s, failed\n01_y: \d+ s\n", done.stdout)
    assert "assert 1 + 1 == 3" in done.stderr and "AssertionError" in done.stderr
    outputs = json.loads((tmp_path / "out" / "01_y.ipynb").read_text(encoding="utf-8"))["cells"][-1]["outputs"]
    assert outputs[0]["text"] == ["42\n"]


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    notebook = read(name)
    cells = notebook["cells"]
    assert notebook["metadata"]["accelerator"] == "TPU"
    assert notebook["metadata"]["colab"]["gpuType"] == "V5E1"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(set(cell["metadata"]) <= {"cellView"} for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_beginning_and_end(name):
    cells = read(name)["cells"]
    title = text(cells[0])
    badges = title.splitlines()[2]
    assert f"colab.research.google.com/github/gptjax/gptjax/blob/main/colab/{name}.ipynb)" in badges
    assert f"kaggle.com/kernels/welcome?src=https://github.com/gptjax/gptjax/blob/main/colab/{name}.ipynb)" in badges
    for word in ("v5e-1", "CPU"):  # the title cell states the run time on both
        assert word in title
    install, mount = text(cells[1]), text(cells[2])
    assert "    %pip install --quiet --constraint as-it-is.txt {SOURCE}" in install.splitlines()
    assert " -U" not in install and "--upgrade" not in install
    assert 'MOUNT_DRIVE = False  # @param {type:"boolean"}' in mount
    assert not any("save_pictures" in text(cell) for cell in cells), "for the plain script only"


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_has_a_solution(name):
    cells = [text(cell) for cell in read(name)["cells"] if cell["cell_type"] == "markdown"]
    (exercises,) = (cell.partition("## Exercises")[2] for cell in cells if "## Exercises" in cell)
    exercise_numbers = re.findall(r"^(\d+)\. ", exercises, re.MULTILINE)
    solutions = [cell for cell in cells if cell.startswith("**Exercise ")]
    assert cells[-len(solutions) - 1].startswith("## Solutions")
    assert exercise_numbers == [re.match(r"\*\*Exercise (\d+)\*\*", cell)[1] for cell in solutions]
    for cell in solutions:
        assert cell.count("<details><summary>Solution</summary>\n") == 1 and cell.endswith("\n</details>")
        for code in re.findall(r"^```python\n(.*?)^```$", cell, re.MULTILINE | re.DOTALL):
            compile(code, f"{name}, a solution", "exec")


def test_a_script_saves_its_pictures(tmp_path):
    """`python colab/NN_name.py` saves its figures in the current directory."""
    lines = (
        "import save_pictures",
        "import matplotlib.pyplot as plt",
        "from gptjax import show",
        "show.curves({'a line': (range(3), range(3))})",
        "plt.plot([1, 2])",
        "plt.show()",
    )
    script = tmp_path / "99_x.py"
    script.write_text("\n".join(lines), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{BUILD.parent}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, check=True)
    assert sorted(path.name for path in tmp_path.glob("figures/*")) == ["99_x-1.png", "99_x-2.png"]


@pytest.mark.skipif(os.environ.get("GPTJAX_NOTEBOOKS") != "1", reason="minutes: GPTJAX_NOTEBOOKS=1 runs them")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, tmp_path):
    """Run in a new folder, as a reader would, but with the XLA flags that speed up compilation in this test suite."""
    command = [sys.executable, str(BUILD), "--run", str(tmp_path), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout, end="")
    outputs = [
        o for cell in json.loads((tmp_path / f"{name}.ipynb").read_text())["cells"] for o in cell.get("outputs", ())
    ]
    assert list(tmp_path.glob(f"{name}-*.png")), "a notebook has pictures"
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
