"""Damaged JSON files of a run give an error that names the file, not a traceback or a wrong value."""

import json

import pytest

from gptjax.errors import UserError
from gptjax.files import use_json, write_json
from gptjax.tasks import classify, distill, instruct, prefer, reward_model, seeds
from gptjax.training.resume import result_of
from gptjax.weights.load import _labels

SCORES = {"n": 4, "exact": 0.5, "normalised": 0.5, "token_f1": 0.5, "nats_per_token": 1.0}
FILES = {
    "classify": (classify.summary, {
        "n": 4, "accuracy": 0.5, "accuracy_interval": [0.1, 0.9], "macro_f1": 0.5, "calibration_error": 0.1,
        "naive_bayes": 0.5, "majority": 0.5, "labels": ["a", "b"], "confusion": [[1, 1], [1, 1]],
    }),
    "labels": (_labels, {"labels": ["a"], "pooling": "last", "max_length": 8, "prompt": "{text}"}),
    "instruct": (instruct.summary, SCORES),
    "prefer": (prefer.summary, {"pairs": 4, "accuracy": 0.5, "margin": 0.1, "loss": 0.7}),
    "distill": (distill.summary, {
        "tokens": 4, "loss": 0.7, "teacher_loss": 0.6, "divergence": 0.1, "agreement": 0.5,
    }),
    "reward_model": (reward_model.summary, {
        "pairs": 4, "accuracy": 0.5, "accuracy_interval": [0.1, 0.9], "margin": 0.1, "loss": 0.7,
    }),
    "seeds": (seeds._numbers, {"accuracy": 0.5}),
    "result": (result_of, {"step": 40, "val/loss": 1.5}),
}  # fmt: skip
WRONG_TYPES = ("x", None, [], {}, [[1]])


@pytest.mark.parametrize("kind", FILES)
def test_a_missing_field_or_wrong_type_is_reported(kind, tmp_path):
    make, body = FILES[kind]
    path = tmp_path / "file.json"
    write_json(path, body)
    use_json(path, make)
    for key in body:
        for other in ({}, *({key: value} for value in WRONG_TYPES)):
            changed = {name: value for name, value in body.items() if name != key} | other
            write_json(path, changed)
            try:
                use_json(path, make)
            except UserError as error:
                assert f"{path} is damaged" in str(error) and "delete it" in str(error)
            else:  # not noticed: a count that is only printed, or another text
                assert other and (key in ("n", "pairs", "tokens") or other[key] == "x"), (key, other)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", "[" * 100_000, '{"step": true, "val/loss": 1}'])
def test_invalid_json_is_reported(text, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(UserError, match="result.json is damaged"):
        use_json(path, result_of)


@pytest.mark.parametrize("step", [-1, 1.5, "40", True])
def test_the_step_of_a_result_must_be_a_non_negative_integer(step, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"step": step, "val/loss": 1.0}))
    with pytest.raises(UserError, match="result.json is damaged"):
        use_json(path, result_of)
