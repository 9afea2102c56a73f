"""A run small enough to be killed many times: a model of one block with d_model 16.

All tests compile the same program, with a constant schedule and 5 steps per call, and share it through the cache.
"""

import random
from pathlib import Path

import pytest

from gptjax.config import load_config

BASE = (
    "tokenizer.name=bytes", "data.split=tail", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "model.context_length=16", "model.dropout=0.1", "optim.lr=3e-3",
    "optim.schedule=constant", "train.batch_size=4", "train.max_steps=40",
    "train.eval_every=20", "train.checkpoint_every=10", "train.log_every=5", "sample.max_new_tokens=8",
)  # fmt: skip


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def separate_cache(cache_folder):
    """Use a temporary cache folder for compiled programs and tokens, also in subprocesses. Tests of other folders use
    the user's cache folder, which holds their assets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(cache_folder))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choices(words, k=1500)))
    return path


@pytest.fixture(scope="session")
def make(text):
    """make(run_dir, "a.b=c", ...) -> Config"""
    return lambda run_dir, *overrides: load_config(None, *BASE, f"data.source={text}", f"run_dir={run_dir}", *overrides)
