"""The JSON reader for foreign files, which is stricter than `json.loads`."""

import json
import math

import pytest

from gptjax.errors import UserError
from gptjax.formats.json import DuplicateKey, loads, parse_json


def test_what_json_loads_takes_and_this_does_not():
    with pytest.raises(DuplicateKey, match="duplicate key 'b'") as error:
        loads('{"a": [{"b": 1, "c": 2, "b": 3}]}')
    assert error.value.key == "b"
    with pytest.raises(ValueError, match="nested too deeply"):
        loads("[" * 200_000)
    for constant in ("NaN", "Infinity", "-Infinity"):
        assert not math.isfinite(loads(constant))
        with pytest.raises(ValueError, match=f"{constant} is not JSON"):
            loads(f'{{"a": {constant}}}', constants=False)


def test_the_rest_is_as_json_reads_it():
    text = '{"a": [1, 2.5, null, true, "\\u00e9"], "b": {"a": {}}}'
    assert loads(text) == json.loads(text) == loads(text, constants=False)
    with pytest.raises(json.JSONDecodeError):
        loads('{"a": ')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 2}', "x: duplicate key 'a' in the index"),
        (b"[1]", "x: the index must be a JSON object, got list"),
        (b'{"a": ', "x: the index is not JSON"),
        (b'{"a": ' + b"[" * 200_000, "x: the index is not JSON .nested too deeply"),
        (b"\xff\xfe{", "x: expected UTF-8, found UTF-16"),
        (b'{"a": "\xff"}', "x: the index is not JSON"),
        (b"[" + b"1," * 500_001, "x: the index has more than 500,000 values"),
    ],
)
def test_an_object_is_read_or_refused_with_its_name(text, says):
    with pytest.raises(UserError, match=says):
        parse_json(text, "x", "index")
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x", "index") == {"a": 1}
