from __future__ import annotations

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.tokenizers import chars


def test_ids_follow_the_code_points():
    tok = chars.train(["cab", "😀é"])
    assert tok.chars == "abcé😀" and tok.encode("abc😀") == [0, 1, 2, 4]
    assert tok.encode_array("é").dtype == np.uint16
    assert tok.eot_id is None and tok.special_tokens == {}


@pytest.mark.parametrize("unknown", ["x", "`", "\x00", "😀", "\U0010ffff"])
def test_an_unknown_character_is_named_with_its_place(unknown):
    with pytest.raises(UserError, match=f"U\\+{ord(unknown):04X}, character 3"):
        chars.train(["abc"]).encode("abc" + unknown)


def test_bytes_are_utf8():
    tok = chars.Bytes()
    assert tok.encode("aé") == [97, 195, 169]
    assert tok.decode([195]) == "\ufffd"
    assert tok.decode([97, 256, 98]) == "a<|endoftext|>b"
