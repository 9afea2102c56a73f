import pytest

from gptjax.__main__ import main
from gptjax.cli import doctor


def test_it_prints_versions_devices_assets_and_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("python", "jaxlib", "backend", "shakespeare", "not here yet", str(tmp_path / "cache"), "all well"):
        assert words in out
    assert not (tmp_path / "cache").exists()


def test_a_tpu_that_is_not_used_is_said_loudly(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "tpu_here", lambda: True)
    assert main(["doctor"]) == 2
    assert "has a TPU and jax runs on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, None),
        ({"jax": "0.10.2", "jaxlib": "0.10.1"}, None),
        ({"jax": "0.10.2", "jaxlib": "0.7.2"}, "do not fit"),
        ({"jax": "0.10.2", "jaxlib": ""}, "not installed"),
    ],
)
def test_versions_that_do_not_fit(versions, words):
    problems = doctor.version_problems(versions)
    assert not problems if words is None else words in problems[0]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 2
    assert "cannot be written" in capsys.readouterr().err
