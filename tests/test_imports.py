"""Imports point one way: from what comes late on the way of the data to what comes early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "gptjax"

# a part may import parts of a lower number
LEVEL = {
    "types": 0, "signals": 0, "files": 0, "tree": 0, "config_io": 0, "config": 0, "config_uses": 0,
    "assets": 0, "gguf": 0,
    "show": 1, "ops": 1, "tokenizers": 1, "data": 2,
    "model": 3,
    "tasks": 4, "optim": 4, "parallel": 4, "checkpoint": 4, "weights": 4, "lora": 4,
    "training": 5, "generation": 5,
    "finetuning": 6, "planning": 7, "research": 7,
    "cli": 8, "__main__": 9, "reference": 9,
}  # fmt: skip
SAME_LEVEL = {  # (from, to) within one level
    ("config", "config_io"), ("config", "types"), ("config_uses", "config"), ("config_uses", "config_io"),
    ("config_uses", "types"), ("config_io", "types"), ("tree", "types"), ("assets", "types"),
    ("gguf", "types"), ("files", "types"), ("assets", "files"), ("config_io", "files"), ("config", "files"),
    ("weights", "lora"),  # a model that is kept as an adapter
    ("training", "generation"),  # samples during training
    ("research", "training"), ("research", "generation"),  # on top of both, for notebooks
}  # fmt: skip
NEVER = {
    "model": {"lora", "optim", "parallel", "tasks", "data", "tokenizers"},
    "data": {"jax", "flax", "optax", "ops", "model"},
    "tokenizers": {"jax", "flax", "optax", "ops", "model", "data"},
    "config": {"jax", "flax", "optax"},
    "config_io": {"jax", "flax", "optax"},
    "assets": {"jax", "flax", "optax"},
    "gguf": {"jax", "flax", "optax"},
    "optim": {"model", "lora"},
    "training": {"lora"},
    "ops": {"data", "tokenizers", "model"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """Top-level packages, and for our own the part: {"jax", "gptjax.data", ..}; imports inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            plain = node.module != "gptjax"
            found |= {node.module} if plain else {f"gptjax.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:2]) if name.startswith("gptjax") else name.split(".")[0] for name in found}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_point_one_way(path):
    here = part_of(path)
    assert here in LEVEL, f"{here} has no place in the house: add it to LEVEL"
    for name in imported(path):
        part = name.removeprefix("gptjax.")
        assert part not in NEVER.get(here, set()), f"{path.name} must not import {name}"
        if name.startswith("gptjax.") and part in LEVEL and part != here:
            lower = LEVEL[part] < LEVEL[here]
            assert lower or (here, part) in SAME_LEVEL, f"{path.name} ({here}) imports {name}, which comes after it"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import gptjax",
        "import gptjax.config; gptjax.load_config('tiny-gpt2')",
        "import gptjax.data, gptjax.tokenizers, gptjax.assets",
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


def test_every_name_of_the_front_door_opens():
    import gptjax

    for name in gptjax.__all__:
        assert getattr(gptjax, name) is not None, name
    assert set(gptjax.__all__) <= set(dir(gptjax))
    with pytest.raises(AttributeError, match="it has load"):
        _ = gptjax.nothing


@pytest.mark.parametrize(
    "name", ["tasks.pretrain", "research.architectures.mla", "research.taps", "MeshConfig", "lora.init"]
)
def test_the_front_door_opens_in_a_fresh_process(name):
    subprocess.run([sys.executable, "-c", f"import gptjax; gptjax.{name}"], check=True, timeout=120)
