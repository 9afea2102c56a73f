"""Every YAML file under configs/ loads, validates and builds its model, without allocating parameters."""

import dataclasses
import math

import jax
import pytest

from gptjax import config
from gptjax.model.gpt import abstract_params

FILES = config.presets()
WORDS = {"gpt2": 50257, "chars": 65, "bytes": 257}
PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "nanogpt-cpu": 804_096,
    "tiny-shakespeare-modern": 803_212,
    "the-verdict": 162_419_712,
}


def n_params(name, *overrides):
    cfg = config.load_config(name, *overrides)
    vocab_size = cfg.model.vocab_size or WORDS[cfg.tokenizer.name]
    tree = abstract_params(dataclasses.replace(cfg.model, vocab_size=vocab_size))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", sorted(FILES))
def test_it_builds(name):
    config.validate(config.load_config(name))
    assert n_params(name) == PARAMETERS.get(name, n_params(name)) > 0


def test_the_books_count():
    assert n_params("the-verdict", "model.context_length=1024") == 163_009_536


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_header_says_command_source_result_and_time(name):
    header = [line for line in FILES[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    task = config.load_config(name).task
    verb = "pretrain" if task == "pretrain" else f"finetune {task}"
    assert f"gptjax {verb} {name}" in text or name in ("shakespeare-char", task)
    assert all(word in text for word in ("Source", "Time")) and ("Expected" in text or "Result" in text)


def test_names_are_unique_over_all_folders():
    files = next(iter(FILES.values())).parents[1].glob("*/*.yaml")
    assert len({path.stem for path in files}) == len(FILES)
