"""Makes the helper modules of this folder importable, and skips all but every eleventh case of the long test matrix."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MATRIX = ("test_a_switch[", "test_all_uses[", "test_documents_windows_and_heads[", "test_presets[")
EVERY = 11  # coprime to the number of platforms and dtypes, so that each combination of them is tested

if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items):
    if os.environ.get("GPTJAX_ALL_TRACES"):
        return
    matrix = [
        item
        for item in items
        if item.path.parent == HERE and item.name.startswith(MATRIX) and item.get_closest_marker("slow")
    ]
    for number, item in enumerate(matrix):
        if number % EVERY:
            item.add_marker(pytest.mark.skip(reason="all cases take an hour: GPTJAX_ALL_TRACES=1 runs them"))
