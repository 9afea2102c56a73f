"""pyproject.toml declares exactly the packages that are imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = {"test", "parity", "bench", "dev"}
# plugins and commands, which no file imports
TOOLS = {"mypy", "pytest-timeout", "pytest-xdist", "ruff", "types-pyyaml"}
SITE = {"sphinx", "furo", "myst-parser", "sphinx-copybutton"}  # named in colab/guides/conf.py
PACKAGE = {  # module: package, where the names differ
    "yaml": "pyyaml", "orbax": "orbax-checkpoint", "tiktoken_ext": "tiktoken", "IPython": "ipykernel",
    "libtpu": "jax", "jax_cuda12_plugin": "jax",  # extras of jax
}  # fmt: skip
ELSEWHERE = {"pip", "google"}  # optional: there is a fallback without pip, and google.colab exists on Colab only
BY_NAME = {"import_module", "find_spec", "importorskip", "_module"}  # functions whose first argument names a module


def declared(*groups: str) -> set[str]:
    """The packages of these extras; "" stands for the required dependencies."""
    lines = [line for group in groups for line in (extras()[group] if group else PROJECT["dependencies"])]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


def extras() -> dict[str, list[str]]:
    return PROJECT["optional-dependencies"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(text: str, everywhere: bool = True) -> set[str]:
    """Top-level names of the modules that a file imports; `everywhere`: inside functions too."""
    tree = ast.parse(text)
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            names |= {node.args[0].value} if function in BY_NAME else set()
    return {name.partition(".")[0] for name in names}


def imported(*folders: str, everywhere: bool = True) -> set[str]:
    """The packages that the files of these folders import."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    names = {name for path in files for name in imports(path.read_text(encoding="utf-8"), everywhere)}
    ours = {"gptjax", *(path.stem for path in files)}
    return {normal(PACKAGE.get(name, name)) for name in names - sys.stdlib_module_names - ours - ELSEWHERE}


def test_imports_are_seen_in_all_their_forms():
    text = (
        "import a.b\nfrom c.d import e\ndef f():\n    import g\n    find_spec('h')\n    importlib.import_module('i.j')"
    )
    assert imports(text) == {"a", "c", "g", "h", "i"}
    assert imports(text, everywhere=False) == {"a", "c"}


def test_the_package_declares_what_it_imports_and_imports_what_it_declares():
    assert imported("gptjax") == declared("", *(extras().keys() - FOR_DEVELOPERS)) - SITE


def test_what_modules_import_when_they_are_loaded_is_always_installed():
    assert imported("gptjax", everywhere=False) <= declared("")


def test_tests_and_notebooks_too():
    every = declared("", *extras())
    assert imported("tests", "colab") <= every
    assert declared(*FOR_DEVELOPERS) - TOOLS <= imported("gptjax") | imported("tests", "colab")
