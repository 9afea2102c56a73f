"""The helpers beside the tests can be imported; of the long matrix every seventh case runs."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MATRIX = ("test_a_switch[", "test_all_uses[", "test_documents_windows_and_heads[", "test_presets[")
EVERY = 7  # no divisor of the number of platforms and dtypes: every one of them comes, with other cases

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
            item.add_marker(pytest.mark.skip(reason="an hour in all: GPTJAX_ALL_TRACES=1 runs every case"))
