"""Settings of the test suite on a GPU or a TPU."""

import os
import runpy
from pathlib import Path

import jax
import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
SET = ("JAX_DEFAULT_MATMUL_PRECISION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@pytest.mark.parametrize(("platforms", "elsewhere"), [("cpu", False), ("cuda,cpu", True), ("tpu", True)])
def test_float32_is_float32(platforms, elsewhere, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    for name in (*SET, "XLA_FLAGS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that monkeypatch also removes what is set later
    runpy.run_path(str(CONFTEST))
    assert [os.environ.get(name) for name in SET] == (["highest", "false"] if elsewhere else [None, None])
    assert ("deterministic" in os.environ["XLA_FLAGS"]) == elsewhere


@pytest.mark.cpu
def test_what_only_a_cpu_can_show_is_skipped_elsewhere(request, monkeypatch):
    setup = runpy.run_path(str(CONFTEST))["pytest_runtest_setup"]
    setup(request.node)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(pytest.skip.Exception, match="JAX runs on gpu"):
        setup(request.node)
