"""Import rules: packages import only packages of lower layers, and there are no cycles."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1] / "gptjax"

# a package may import packages with a lower number
LEVEL = {
    "_moved": -1, "errors": -1,
    "types": 0, "signals": 0, "processes": 0, "files": 0, "tree": 0, "config": 0, "assets": 0, "formats": 0,
    "ops": 1, "tokenizers": 1, "show": 2, "data": 2, "from_scratch": 2,
    "model": 3,
    "losses": 4, "optim": 4, "parallel": 4, "checkpoint": 4, "weights": 4, "lora": 4,
    "training": 5, "generation": 5,
    "evaluation": 6, "tasks": 7, "planning": 8, "research": 8,
    "cli": 9, "__main__": 10, "reference": 10,
}  # fmt: skip
SAME_LEVEL = {  # (from, to) within one level
    ("assets", "files"), ("config", "files"), ("formats", "files"),
    ("weights", "lora"),  # for models stored as an adapter
    ("research", "training"), ("research", "generation"),  # research builds on both
}  # fmt: skip
NEVER = {
    "model": {"lora", "optim", "parallel", "tasks", "losses", "data", "tokenizers"},
    "data": {"jax", "flax", "optax", "ops", "model"},
    "tokenizers": {"jax", "flax", "optax", "ops", "model", "data"},
    "config": {"jax", "flax", "optax"},
    "assets": {"jax", "flax", "optax"},
    "formats": {"jax", "flax", "optax"},
    "optim": {"model", "lora"},
    "training": {"lora", "model", "losses", "tasks"},
    "ops": {"data", "tokenizers", "model"},
}


def package_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """The packages that a file imports, also inside functions, such as jax or gptjax.data."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            plain = node.module != "gptjax"
            modules |= {node.module} if plain else {f"gptjax.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:2]) if name.startswith("gptjax") else name.split(".")[0] for name in modules}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_point_one_way(path):
    here = package_of(path)
    assert here in LEVEL, f"{here} has no place in the house: add it to LEVEL"
    for name in imported(path):
        package = name.removeprefix("gptjax.")
        assert package not in NEVER.get(here, set()), f"{path.name} must not import {name}"
        if name.startswith("gptjax.") and package in LEVEL and package != here:
            lower = LEVEL[package] < LEVEL[here]
            assert lower or (here, package) in SAME_LEVEL, f"{path.name} ({here}) imports {name}, which comes after it"


def modules_imported(path: Path) -> set[str]:
    """The modules of gptjax that a file imports, also inside functions, such as gptjax.data or gptjax.data.split."""
    files = {
        ".".join(("gptjax", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for file in FILES
    }
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names} & files
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} & files
            modules |= (
                {node.module} & files
                if any(f"{node.module}.{alias.name}" not in files for alias in node.names)
                else set()
            )
    return modules


def test_no_files_import_each_other_in_a_circle():
    """`__init__.py` files are ignored, because they only re-export names."""
    graph = {}
    for path in FILES:
        name = ".".join(("gptjax", *path.relative_to(ROOT).with_suffix("").parts))
        if path.name != "__init__.py":
            graph[name] = modules_imported(path)
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other, or what does: {sorted(graph)}"


CONFIG = ("aliases", "leaves", "schema", "check", "load", "uses")  # each module may import those before it


def test_the_modules_of_config_import_in_one_direction():
    """Only top-level imports count: creating a ModelConfig calls the checks, which are imported later."""
    files = {path.stem: path for path in (ROOT / "config").glob("*.py")}
    assert set(files) == {*CONFIG, "__init__"}
    for i, name in enumerate(CONFIG):
        loading = ast.parse(files[name].read_text(encoding="utf-8")).body
        modules = {node.module for node in loading if isinstance(node, ast.ImportFrom)}
        ours = {module for module in modules if f"{module}.".startswith("gptjax.config.")}
        assert ours <= {f"gptjax.config.{earlier}" for earlier in CONFIG[:i]}, name


def test_every_name_of_config_is_found_in_the_package():
    from gptjax import config

    assert callable(config.schema)  # the function, not the module of the same name
    assert all(getattr(config, name) is not None for name in config.__all__)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import gptjax",
        "import gptjax.config; gptjax.load_config('tiny-gpt2')",
        "import gptjax.config.uses",
        "import gptjax.data, gptjax.tokenizers, gptjax.assets",
        "import gptjax.evaluation.rewards, gptjax.evaluation.workers",
        "from gptjax.__main__ import main; main(['pretrain', 'tiny-gpt2', '--print-config'])",
    ],
)
def test_these_need_no_jax(statement):
    assert not {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "matplotlib"} & loaded_by(statement)


def test_help_imports_nothing_heavy():
    heavy = {
        "jax",
        "flax",
        "optax",
        "orbax",
        "yaml",
        "numpy",
        "rich",
        "datasets",
        "tiktoken",
        "tokenizers",
    }
    assert not heavy & loaded_by("from gptjax.__main__ import main; main(['--help'])")


def test_every_name_of_the_front_door_opens_and_every_name_behind_it():
    import gptjax

    for name in gptjax.__all__:
        opened = getattr(gptjax, name)
        assert opened is not None, name
        if isinstance(opened, ModuleType):
            assert hasattr(opened, "__all__") or not hasattr(opened, "__path__"), f"{name} does not list its names"
            for inner in getattr(opened, "__all__", ()):
                assert getattr(opened, inner) is not None, f"{name}.{inner}"
    assert set(gptjax.__all__) <= set(dir(gptjax))
    with pytest.raises(AttributeError, match="it has load"):
        _ = gptjax.nothing


@pytest.mark.parametrize(
    "name", ["tasks.pretrain", "research.architectures.mla", "research.taps", "MeshConfig", "lora.init"]
)
def test_the_front_door_opens_in_a_fresh_process(name):
    subprocess.run([sys.executable, "-c", f"import gptjax; gptjax.{name}"], check=True, timeout=120)
