"""The notebooks are what their sources give; with GPTJAX_NOTEBOOKS=1 each is also run from top to bottom."""

import json
import os
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


def build(*arguments, script=BUILD, **options):
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, **options)


def test_there_are_sources():
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(len(NAMES))] and NAMES


def test_every_notebook_is_what_its_source_gives():
    done = build("--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["source", "notebook", "missing", "orphan"])
def test_drift_is_seen(tmp_path, change):
    for path in (BUILD, BUILD.with_name("first_cells.py"), SOURCES[0]):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    script, source = tmp_path / "build.py", tmp_path / SOURCES[0].name
    notebook = source.with_suffix(".ipynb")
    assert build(script=script).returncode == 0
    before = notebook.read_bytes()
    assert before == (ROOT / "colab" / notebook.name).read_bytes()
    assert build("--check", script=script).returncode == 0
    if change == "source":
        source.write_text(source.read_text(encoding="utf-8") + "\n# %%\n1 + 1\n", encoding="utf-8")
    elif change == "notebook":
        notebook.write_bytes(before.replace(b"jax", b"Jax", 1))
    elif change == "missing":
        notebook.unlink()
    else:
        notebook = notebook.rename(tmp_path / "99_alone.ipynb")
        notebook.with_name(SOURCES[0].stem + ".ipynb").write_bytes(before)
    done = build("--check", script=script)
    assert done.returncode == 1 and notebook.name in done.stderr


def test_a_new_cell_leaves_the_ids_of_the_others(tmp_path):
    for path in (BUILD, BUILD.with_name("first_cells.py")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = tmp_path / "00_x.py"
    cells = ["# %% [markdown]\n# # Title\n", "# %%\n1 + 1\n", "# %%\n1 + 1\n"]

    def ids():
        source.write_text("\n".join(cells), encoding="utf-8")
        build(script=tmp_path / "build.py", check=True)
        return [cell["id"] for cell in json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]]

    before = ids()
    cells.insert(1, "# %%\n2 + 2\n")
    assert len(set(before)) == 5
    assert [i for i in ids() if i in before] == before


def test_a_source_without_a_title(tmp_path):
    for path in (BUILD, BUILD.with_name("first_cells.py")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00_x.py").write_text("# %%\n1 + 1\n", encoding="utf-8")
    done = build(script=tmp_path / "build.py")
    assert done.returncode == 1 and "whose first line is '# # Title'" in done.stderr


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
    assert f"/blob/main/colab/{name}.ipynb)" in title.splitlines()[2]
    for word in ("v5e-1", "CPU"):  # what it costs
        assert word in title
    install, mount = text(cells[1]), text(cells[2])
    assert "    %pip install --quiet --constraint as-it-is.txt {SOURCE}" in install.splitlines()
    assert " -U" not in install and "--upgrade" not in install
    assert 'MOUNT_DRIVE = False  # @param {type:"boolean"}' in mount
    assert any("## Exercises" in text(cell) for cell in cells[3:] if cell["cell_type"] == "markdown")


@pytest.mark.skipif(os.environ.get("GPTJAX_NOTEBOOKS") != "1", reason="minutes: GPTJAX_NOTEBOOKS=1 runs them")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, tmp_path):
    """As a reader runs it: without the flags that make this suite compile faster, in a folder of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = build("--run", str(tmp_path), name, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout, end="")
    outputs = [
        o for cell in json.loads((tmp_path / f"{name}.ipynb").read_text())["cells"] for o in cell.get("outputs", ())
    ]
    assert list(tmp_path.glob(f"{name}-*.png")), "a notebook has pictures"
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
