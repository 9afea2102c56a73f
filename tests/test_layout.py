"""tests/ mirrors gptjax/: gptjax/a/b.py is tested in tests/a/test_b.py."""

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "gptjax"
OTHERS = {  # folders without a counterpart in gptjax/, and their purpose
    "accelerators": "programs traced and compiled for GPUs and TPUs",
    "bench": "benchmarks, run by hand",
    "colab": "the notebooks and recipes",
    "contracts": "properties and mistakes that concern several parts",
    "golden": "published numbers",
}


def test_every_folder_of_tests_is_one_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path()}
    strangers = [str(path) for path in folders if path.parts[0] not in OTHERS and not (PACKAGE / path).is_dir()]
    assert not strangers


def test_no_module_is_tested_in_another_folder():
    """A test file without a module of the same name in its folder covers several modules. Its name must not be that of
    a module in another folder."""
    modules = {path.stem: path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    for path in TESTS.rglob("test_*.py"):
        folder, name = path.parent.relative_to(TESTS), path.stem.removeprefix("test_")
        if folder.parts[:1] and folder.parts[0] in OTHERS:
            continue
        here = PACKAGE / folder / name
        if not (here.with_suffix(".py").is_file() or here.is_dir()):
            assert name not in modules, f"{path.relative_to(TESTS)}: {name} is a module of gptjax/{modules[name]}"
