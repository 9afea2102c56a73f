"""Old module paths keep working for one release, with a warning that names the new path."""

import ast
import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptjax._moved import MOVED, NAMES, new_path

ROOT = Path(__file__).parents[1]
GONE = {"gptjax.gone": "gptjax.planning", "gptjax.gone.deep": "gptjax.files", "gptjax.old_files": "gptjax.files"}


@pytest.fixture
def gone(monkeypatch):
    for old, new in GONE.items():
        monkeypatch.setitem(MOVED, old, new)
    with forgotten():
        yield


@contextmanager
def forgotten():
    """Remove modules imported under an old path from sys.modules after the test."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if new_path(name):
            parent, _, last = name.rpartition(".")
            vars(sys.modules.get(parent, sys)).pop(last, None)
            del sys.modules[name]


@pytest.mark.parametrize(
    ("statement", "new"),
    [
        ("import gptjax.old_files as got", "gptjax.files"),
        ("from gptjax import old_files as got", "gptjax.files"),
        ("import gptjax.gone.deep as got", "gptjax.files"),
        ("from gptjax.gone import deep as got", "gptjax.files"),
        ("from gptjax.gone import fit as got", "gptjax.planning.fit"),  # mapped by the row of the package
        ("import gptjax.gone.fit as got", "gptjax.planning.fit"),
    ],
)
def test_every_form_of_import_gives_the_same_module_and_names_the_new_path(gone, statement, new):
    seen = {}
    with pytest.warns(DeprecationWarning, match=r"^gptjax\.\S+ is now gptjax\.") as warned:
        exec(statement, seen)
    assert f" is now {new};" in str(warned[-1].message)
    assert seen["got"] is importlib.import_module(new) and seen["got"].__spec__.name == new
    assert warned[0].filename == "<string>"  # the warning points to the importing line


def test_a_package_that_is_gone(gone):
    """A module of a removed package is found by its own row, else by the row of the package."""
    from gptjax import files
    from gptjax.planning import fit

    seen = {}
    with pytest.warns(DeprecationWarning, match=r"gptjax.gone is now gptjax.planning;"):
        exec("from gptjax import gone", seen)
    with pytest.warns(DeprecationWarning, match=r"gptjax.gone.fit is now gptjax.planning.fit;"):
        assert seen["gone"].fit is fit
    with pytest.warns(DeprecationWarning, match=r"gptjax.gone.deep is now gptjax.files;"):
        assert seen["gone"].deep is files
    with pytest.raises(AttributeError, match=r"gptjax.planning.*nothing"):
        _ = seen["gone"].nothing


def test_names_are_imported_from_an_old_path(gone):
    from gptjax.files import write_text

    seen = {}
    with pytest.warns(DeprecationWarning, match=r"^gptjax\.gone\S* is now gptjax\."):
        exec("from gptjax.gone.deep import write_text", seen)
    assert seen["write_text"] is write_text
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match="nothing"):
        exec("from gptjax.old_files import nothing", {})


def test_what_was_never_there_is_not_found(gone):
    with pytest.raises(ModuleNotFoundError, match="gptjax.never"):
        importlib.import_module("gptjax.never")
    with pytest.warns(DeprecationWarning), pytest.raises(ModuleNotFoundError, match="gptjax.planning.never"):
        importlib.import_module("gptjax.gone.never")


def test_a_script_is_told_in_its_own_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import gptjax\nfrom gptjax._moved import MOVED\nMOVED['gptjax.old_files'] = 'gptjax.files'\n"
        "from gptjax.old_files import write_text\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    assert f"{script}:4: DeprecationWarning: gptjax.old_files is now gptjax.files" in done.stderr


@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=list(MOVED))
def test_a_row_of_the_table_leads_from_where_nothing_stands_to_a_module(old, new):
    path = ROOT / old.replace(".", "/")
    assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()
    with forgotten(), pytest.warns(DeprecationWarning, match=" is now ") as warned:
        imported = importlib.import_module(old)
    assert f"{old} is now {new};" in str(warned[-1].message)
    assert imported is importlib.import_module(new) or imported.__path__ == []


@pytest.mark.parametrize(("old", "new"), NAMES.items(), ids=list(NAMES))
def test_a_name_that_left_its_module_is_found_and_its_new_path_named(old, new):
    (module, _, name), (home, _, new_name) = old.rpartition("."), new.rpartition(".")
    seen = {}
    with forgotten(), pytest.warns(DeprecationWarning) as warned:
        exec(f"from {module} import {name} as got", seen)
    assert f"{old} is now {new};" in str(warned[-1].message) and warned[-1].filename == "<string>"
    if name != "task":  # a wrapper of the new function: see tests/tasks/test_example.py
        assert seen["got"] is getattr(importlib.import_module(home), new_name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = importlib.import_module("gptjax.training.loop").nothing


OURS = [path for folder in ("gptjax", "tests", "colab") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_our_own_code_imports_the_new_paths():
    old = [f"{path.relative_to(ROOT)}: {name}" for path in OURS for name in imports(path) if new_path(name)]
    assert not old


def imports(path: Path) -> set[str]:
    """Modules that a file may import: `from a import b` may mean the module a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
