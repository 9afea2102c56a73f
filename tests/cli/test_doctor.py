import pytest

from gptjax.__main__ import main
from gptjax.cli import doctor


def test_it_prints_versions_devices_assets_and_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    cache = str(tmp_path / "cache")
    for words in ("python", "jaxlib", "backend", "shakespeare", "not cached yet", cache, "no problems found"):
        assert words in out
    assert not (tmp_path / "cache").exists()


@pytest.mark.cpu
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


@pytest.mark.parametrize(
    ("capability", "cudnn", "words"),
    [(7.5, 91100, "XLA, with T x T scores"), (8.0, 91100, "cuDNN; for packed documents"), (9.0, 0, "finds no cuDNN")],
)
def test_what_attends_on_a_gpu_is_said(capability, cudnn, words):
    line = doctor.gpu_attention(capability, cudnn)
    assert words in line and (str(capability) in line) == (capability < 8)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("libtpu", "held_by", "platforms", "words"),
    [
        ("", [], "", "pip install 'jax[tpu]'"),
        ("0.0.42.1", ["python3 (pid 7)"], "", "python3 (pid 7) holds it: end that process"),
        ("0.0.42.1", [], "cpu", "JAX_PLATFORMS=cpu excludes it: unset it"),
        ("0.0.21.1", [], "", "libtpu 0.0.21.1 does not fit"),
        ("0.0.42.1", [], "", "to see the error"),
    ],
)
def test_why_a_tpu_is_not_used(libtpu, held_by, platforms, words, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert words in doctor.backend_problem("cpu", True, libtpu, "0.0.42.*", held_by)[0]
    assert not doctor.backend_problem("tpu", True, "0.0.21.1", "0.0.42.*", []) + doctor.backend_problem(
        "cpu", False, "", "", []
    )


def test_who_holds_a_tpu(tmp_path):
    for pid, target in ((7, "/dev/accel0"), (8, "/dev/null"), (9, "/dev/vfio/0")):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "comm").write_text("python3\n")
        (tmp_path / str(pid) / "fd" / "3").symlink_to(target)
    assert sorted(doctor.holders(tmp_path, own_pid=9)) == ["python3 (pid 7)"]


def test_which_libtpu_jax_wants():
    assert doctor.wanted_libtpu().startswith("0.0.")
