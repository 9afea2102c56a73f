"""Numbers from "Build a Large Language Model (From Scratch)", chapters 2.6 and 5.1, and nanoGPT's data split."""

import numpy as np
import pytest

from gptjax import data
from gptjax.config import DataConfig
from gptjax.data.sources import Document, Documents, Source

# The first 33 GPT-2 ids of "The Verdict".
IDS = [
    40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138, 257, 7026, 15632, 438, 2016, 257, 922,
    5891, 1576, 438, 568, 340, 373, 645, 1049, 5975, 284, 502, 284, 3285, 326, 11, 287,
]  # fmt: skip


def test_first_window_of_length_4_stride_1():
    inputs, targets = data.windows(IDS, 4, 1)
    assert inputs[0].tolist() == [40, 367, 2885, 1464]
    assert targets[0].tolist() == [367, 2885, 1464, 1807]
    assert inputs[1].tolist() == [367, 2885, 1464, 1807]


def test_eight_windows_of_length_4_stride_4():
    inputs, targets = data.windows(IDS, 4, 4)
    assert inputs.tolist() == [
        [40, 367, 2885, 1464],
        [1807, 3619, 402, 271],
        [10899, 2138, 257, 7026],
        [15632, 438, 2016, 257],
        [922, 5891, 1576, 438],
        [568, 340, 373, 645],
        [1049, 5975, 284, 502],
        [284, 3285, 326, 11],
    ]
    assert targets.tolist() == [
        [367, 2885, 1464, 1807],
        [3619, 402, 271, 10899],
        [2138, 257, 7026, 15632],
        [438, 2016, 257, 922],
        [5891, 1576, 438, 568],
        [340, 373, 645, 1049],
        [5975, 284, 502, 284],
        [3285, 326, 11, 287],
    ]


def test_split_of_the_verdict():
    """4,612 training and 534 validation tokens give 9 and 1 batches of [2, 256]: 4,608 and 512 tokens."""
    cfg = DataConfig(stride=256)
    train = data.Loader(
        data.TokenStore.from_ids(np.arange(4612)), cfg, batch_size=2, context_length=256, seed=0, vocab_size=50257
    )
    assert train.steps_per_epoch == 9
    assert sum(train.batch(step).tokens.size for step in range(9)) == 4608
    val, _ = data.windows(np.arange(534), 256, 256)
    assert val.shape == (2, 256) and val.size == 512


@pytest.mark.parametrize(
    ("characters", "train", "val"), [(20_479, 18_431, 2_048), (1_115_394, 1_003_854, 111_540)], ids=["verdict", "tiny"]
)
def test_last_tenth_by_characters(characters, train, val):
    text = "x" * characters
    source = Source("one", (("one.txt", lambda: iter([Document("one.txt", text, "one.txt")])),), "")
    splits = data.split(Documents((source,)), DataConfig())[:2]
    assert [len(document.text) for split in splits for document in split] == [train, val]
