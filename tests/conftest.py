"""Shared fixtures and settings of the tests. Fixtures that need an asset skip if it is neither cached nor reachable.

The suite spends almost all of its time in XLA compiling tiny programs, so the compiler's optimisations are disabled.

On a GPU or a TPU, float32 matrix products use full float32 precision (jax_default_matmul_precision=highest, unless the
environment sets it) and deterministic kernels; tests marked `cpu` are skipped there. On a CPU no precision is set: its
float32 products are exact float32 already.
"""

from __future__ import annotations

import collections
import glob
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FLAGS += " --xla_cpu_multi_thread_eigen=false"  # one test process per core
# only for releases that know the flag: XLA aborts on an unknown one
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # compiles three times faster


def on_an_accelerator() -> bool:
    """Whether there is a GPU or TPU, by its device files: asking JAX would initialise it before it is configured."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] != "cpu"
    return any(glob.glob(files) for files in ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*"))


if on_an_accelerator():
    FLAGS += " --xla_gpu_deterministic_ops=true"  # otherwise atomic additions make sums differ between runs
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes share the GPU
os.environ.setdefault("XLA_FLAGS", FLAGS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark all but the first n cases of a test with `first_cases(n)` as `slow` and `further_case`."""
    seen = collections.Counter()
    for item in items:
        if marker := item.get_closest_marker("first_cases"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > marker.args[0]:
                item.add_marker(pytest.mark.slow)
                item.add_marker(pytest.mark.further_case)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cpu"):
        import jax

        if (backend := jax.default_backend()) != "cpu":
            pytest.skip(f"only a CPU can show this, and JAX runs on {backend}")


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Clear JAX's compilation caches after a test module once the process uses more than 3 GiB."""
    yield
    pages = Path("/proc/self/statm")
    if "jax" in sys.modules and pages.exists():
        resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > 3 * 2**30:
            sys.modules["jax"].clear_caches()


# Tests without optax and the decoding loop, which rely on dtype promotion. Rank promotion stays allowed.
STRICT_DTYPES = {
    "losses": {"test_classify", "test_policy", "test_preference", "test_reward_model"},
    "model": {"test_cache"},
    "ops": {
        "test_activation", "test_attention", "test_linear", "test_loss", "test_norm", "test_position", "test_scale",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """Make implicit dtype promotion an error in the tests of `STRICT_DTYPES`."""
    if request.path.stem not in STRICT_DTYPES.get(request.path.parent.name, ()):
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


def _fetch(name: str):
    from gptjax import assets
    from gptjax.errors import UserError

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
    """The folder with the 38 plays of Shakespeare."""
    return _fetch("shakespeare")


@pytest.fixture(scope="session")
def tiny():
    """tiny(arch, **switches) -> (cfg, params): two layers, d_model 32. No leaf keeps its initial 0 or 1, which could
    hide an error: all are random."""
    import jax
    import numpy as np

    from gptjax import tree
    from gptjax.config import ModelConfig
    from gptjax.model.gpt import abstract_params

    def build(arch="gpt2", seed=0, **switches):
        sizes = dict(vocab_size=17, context_length=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
        cfg = ModelConfig(arch=arch, **{**sizes, "unroll": False, **switches})
        rng = np.random.default_rng(seed)

        def leaf(path, x):
            std, mean = (0.3, 0.0) if path.endswith(("kernel", "embedding", "bias")) else (0.2, 0.8)
            return (mean + std * rng.normal(size=x.shape)).astype(np.float32)

        return cfg, jax.tree.map(jax.numpy.asarray, tree.map_paths(leaf, abstract_params(cfg)))

    return build
