"""The GPU checks of `gptjax doctor`, with a simulated GPU, driver and set of packages."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from gptjax.__main__ import main
from gptjax.cli import cuda, doctor
from gptjax.cli.cuda import Card

H200 = Card("NVIDIA H200", 9.0, "575.57.08")
T4 = Card("Tesla T4", 7.5, "535.104.05")
V100 = Card("Tesla V100-SXM2-16GB", 7.0, "580.65.06")
FITS = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}


def smi(monkeypatch, answer):
    """Make nvidia-smi print `answer`, or raise it if it is an exception."""

    def run(command, **_):
        assert command[0] == "nvidia-smi"
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(cuda.subprocess, "run", run)


@pytest.mark.parametrize(
    ("answer", "cards"),
    [
        ("NVIDIA H200, 9.0, 575.57.08\n", [H200]),
        ("Tesla T4, 7.5, 535.104.05\nTesla T4, 7.5, 535.104.05\n", [T4, T4]),
        ("Tesla K80, [N/A], 470.1\n", [Card("Tesla K80", 0.0, "470.1")]),
        ("Failed to initialize NVML: Driver/library version mismatch\n", []),
        (FileNotFoundError("nvidia-smi"), []),
        (subprocess.CalledProcessError(9, "nvidia-smi"), []),
        (subprocess.TimeoutExpired("nvidia-smi", 20), []),
    ],
)
def test_cards(answer, cards, monkeypatch):
    smi(monkeypatch, answer)
    assert cuda.cards() == cards


def on_gpu(monkeypatch, cards, capability, kind):
    device = SimpleNamespace(device_kind=kind, compute_capability=capability, platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    smi(monkeypatch, "".join(f"{card.name}, {card.capability}, {card.driver}\n" for card in cards))
    monkeypatch.setattr(doctor, "_version", lambda name: FITS.get(name, "0.0.1" if name in doctor.PACKAGES else ""))
    monkeypatch.setattr(doctor, "tpu_here", lambda: False)


@pytest.mark.parametrize(
    ("cards", "capability", "kind", "words", "absent"),
    [
        (
            [H200], "9.0", "NVIDIA H200",
            ["gpu                NVIDIA H200, compute capability 9.0, driver 575.57.08", "jax-cuda12-plugin  0.10.2",
             "attention          Pallas kernels of gptjax (jax finds no cuDNN)", "float32 matmul: TF32",
             "model.precision=highest"],
            ["no bfloat16"],
        ),
        (
            [T4, T4], "7.5", "Tesla T4",
            ["2 x Tesla T4", "bfloat16           no bfloat16 tensor cores at compute capability 7.5",
             "attention          XLA, with T x T scores in memory", "float32 matmul: float32"],
            ["TF32"],
        ),
        ([], "8.0", "NVIDIA A100", ["NVIDIA A100, compute capability 8.0, driver unknown"], ["no bfloat16"]),
        ([], "gfx942", "AMD MI300X", ["AMD MI300X, compute capability unknown"], ["attention   ", "no bfloat16"]),
    ],
    ids=["H200", "T4", "no nvidia-smi", "AMD"],
)  # fmt: skip
def test_what_a_run_on_the_gpu_gets(cards, capability, kind, words, absent, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    on_gpu(monkeypatch, cards, capability, kind)
    with jax.default_matmul_precision(None):
        assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in words), out
    assert not any(text in out for text in absent), out


def test_what_a_run_on_a_tpu_gets(monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with jax.default_matmul_precision(None):
        assert doctor._devices({}) == []
    out = capsys.readouterr().out
    assert "attention          the splash kernel" in out and "one bfloat16 pass" in out


@pytest.mark.parametrize(
    ("backend", "capability", "setting", "words"),
    [
        ("tpu", 0, None, "one bfloat16 pass"),
        ("gpu", 9.0, None, "TF32"),
        ("gpu", 9.0, "default", "TF32"),
        ("gpu", 9.0, "highest", "highest, set by JAX's jax_default_matmul_precision"),
        ("gpu", 7.5, None, "float32 matmul: float32"),
        ("gpu", 0, None, "if the GPU has it"),
    ],
)
def test_what_float32_means(backend, capability, setting, words):
    assert words in doctor.precision_line(backend, capability, setting)


CUDA13 = {name.replace("cuda12", "cuda13"): version for name, version in FITS.items()}


@pytest.mark.parametrize(
    ("versions", "cards", "words"),
    [
        (FITS, [H200], []),
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, [H200], []),  # no plugin: reported by `backend_problem`
        (FITS | {"jax-cuda12-plugin": "0.7.2"}, [],
         ["jax-cuda12-plugin 0.7.2 does not fit jaxlib 0.10.2", "'jax[cuda12]==0.10.2'"]),
        (FITS | {"jax-cuda12-pjrt": "0.10.1"}, [], ["jax-cuda12-pjrt 0.10.1 does not fit"]),
        (FITS | {"jax-cuda12-pjrt": ""}, [], ["jax-cuda12-pjrt is not installed beside"]),
        (FITS | CUDA13, [H200], ["both installed"]),
        (CUDA13, [H200], ["driver 575.57.08 is older than 580, which CUDA 13 needs", "'jax[cuda12]'"]),
        (CUDA13, [V100], ["V100-SXM2-16GB has compute capability 7.0, CUDA 13 needs 7.5 or more", "'jax[cuda12]'"]),
        (FITS, [V100], []),
        (FITS, [Card("Tesla M40", 5.2, "470.256.02")], ["driver 470.256.02 is older than 525"]),
    ],
)  # fmt: skip
def test_packages_driver_and_card_that_do_not_fit(versions, cards, words):
    problems = cuda.plugin_problems(versions, cards)
    assert bool(problems) == bool(words)
    assert all(text in " ".join(problems) for text in words), problems


def test_a_cudnn_that_is_too_old(monkeypatch):
    needs = ["nvidia-cublas-cu12>=12.1; extra == 'with-cuda'", "nvidia-cudnn-cu12<10.0,>=9.8; extra == 'with-cuda'"]
    monkeypatch.setattr(cuda, "requires", lambda name: needs)
    (problem,) = cuda.plugin_problems(FITS | {"nvidia-cudnn-cu12": "9.5.1.17"}, [H200])
    assert "cuDNN 9.5.1.17 is older than 9.8" in problem
    assert not cuda.plugin_problems(FITS | {"nvidia-cudnn-cu12": "9.10.2"}, [H200])


@pytest.mark.parametrize(
    ("versions", "cards", "library_path", "platforms", "words"),
    [
        ({"jax": "0.10.2"}, [H200], "", "", "pip install 'jax[cuda12]==0.10.2'"),
        ({"jax": "0.10.2"}, [Card("NVIDIA B200", 10.0, "580.65.06")], "", "", "pip install 'jax[cuda13]==0.10.2'"),
        ({"jax": "0.10.2"}, [V100], "", "", "pip install 'jax[cuda12]==0.10.2'"),
        (FITS, [H200], "/usr/local/cuda/lib64", "", "LD_LIBRARY_PATH"),
        (FITS, [H200], "", "", "to see the error"),
        (FITS, [H200], "", "cpu", None),
    ],
)
def test_why_a_gpu_is_not_used(versions, cards, library_path, platforms, words, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", library_path)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    problems = cuda.backend_problem("cpu", True, versions, cards)
    assert not problems if words is None else words in problems[0]
    assert not cuda.backend_problem("gpu", True, versions, cards) + cuda.backend_problem("cpu", False, versions, [])


@pytest.mark.cpu
def test_a_gpu_that_is_not_used_is_said_loudly(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(cuda, "cards", lambda: [H200])
    assert main(["doctor"]) == 2
    assert "has an NVIDIA GPU and jax runs on cpu" in capsys.readouterr().err


def test_extras_are_named_as_jax_names_them():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = {name: re.findall(r"jax\[(\w+)\]", " ".join(extras[name])) for name in ("tpu", "cuda", "cuda13")}
    assert named == {"tpu": ["tpu"], "cuda": ["cuda12"], "cuda13": ["cuda13"]}
    assert {"tpu", "cuda12", "cuda13"} <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))
