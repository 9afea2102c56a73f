"""Fixtures that need a named asset. They skip, with the reason, only where it is neither cached nor reachable.

Almost all of the suite's time is XLA compiling tiny programs, so the compiler is told to take less care with them.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")


def _fetch(name: str):
    from gptjax import assets
    from gptjax.types import UserError

    try:
        return assets.fetch(name)
    except UserError as error:
        pytest.skip(f"asset {name} is neither cached nor reachable here: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer."""
    _fetch("gpt2")
    from gptjax import tokenizers

    return tokenizers.load("gpt2")


@pytest.fixture(scope="session")
def verdict() -> str:
    """The text of the book's short story."""
    return _fetch("the-verdict").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_shakespeare() -> str:
    return _fetch("tiny-shakespeare").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def shakespeare():
    """The folder with the 38 plays."""
    return _fetch("shakespeare")
