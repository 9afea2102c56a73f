"""Runs the checks of `gptjax doctor` for NVIDIA GPUs: these checks test whether jax's CUDA plugin supports the GPU and
its driver."""

from __future__ import annotations

import glob
import os
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from typing import NamedTuple

# Maps each CUDA version to the oldest driver version and the lowest compute capability that the CUDA version supports.
NEEDS = {"12": (525, 5.2), "13": (580, 7.5)}
PACKAGES = tuple(
    name for cuda in NEEDS for name in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt", f"nvidia-cudnn-cu{cuda}")
)
# The lowest compute capability that has bfloat16 and TF32 tensor cores and supports cuDNN's flash attention.
AMPERE = 8.0


class Card(NamedTuple):
    name: str
    capability: float  # Compute capability, such as 9.0; 0 if the compute capability is unknown.
    driver: str  # Driver version; "" if the driver version is unknown.


def cards() -> list[Card]:
    """Returns the GPUs that the program nvidia-smi lists, or [] if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in out.splitlines()]
    return [Card(row[0], number(row[1]), row[2]) for row in rows if len(row) == 3]


def number(text: object) -> float:
    """Parses a compute capability such as "9.0". Returns 0 for any other text, such as "gfx942", which an AMD GPU
    reports."""
    try:
        return float(str(text))
    except ValueError:
        return 0.0


def gpu_here() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def lines(cards: list[Card]) -> list[str]:
    """Returns one line of text for each group of identical GPUs in the machine, with the number, name, compute
    capability and driver version of the GPUs."""
    kinds = {card: cards.count(card) for card in cards}
    return [
        f"{f'{n} x ' if n > 1 else ''}{card.name}, compute capability {card.capability or 'unknown'}, "
        f"driver {card.driver or 'unknown'}"
        for card, n in kinds.items()
    ]


def plugin_problems(versions: dict[str, str], cards: list[Card]) -> list[str]:
    """Returns an error text for each reason why jax cannot use the GPU; the texts also suggest solutions.

    Args:
        versions: dict from the name of a package to its version, or to "" if the package is not installed. The packages
            are jax, jaxlib and those in `PACKAGES`.
    """
    plugins = [cuda for cuda in NEEDS if versions.get(f"jax-cuda{cuda}-plugin")]
    jaxlib = versions.get("jaxlib", "")
    if len(plugins) > 1:
        return ["jax-cuda12-plugin and jax-cuda13-plugin are both installed: pip uninstall one of them"]
    if not plugins:
        return []
    (cuda,), problems = plugins, []
    reinstall = f"pip install -U 'jax[cuda{cuda}]=={versions.get('jax') or jaxlib}'"
    for name in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"):
        version = versions.get(name, "")
        if not version:
            problems.append(f"{name} is not installed beside jax-cuda{cuda}-plugin: {reinstall}")
        elif _release(version) != _release(jaxlib):
            problems.append(f"{name} {version} does not fit jaxlib {jaxlib}: jax will not use it; {reinstall}")
    wanted, cudnn = _wanted_cudnn(cuda), versions.get(f"nvidia-cudnn-cu{cuda}", "")
    if wanted and cudnn and _release(cudnn) < _release(wanted):
        problems.append(f"cuDNN {cudnn} is older than {wanted}, which jax-cuda{cuda}-plugin needs: {reinstall}")
    driver, capability = NEEDS[cuda]
    for card in dict.fromkeys(cards):
        if card.driver and _release(card.driver)[0] < driver:
            fallback = ", or use CUDA 12: pip install 'jax[cuda12]'" if cuda == "13" else ""
            needs = f"older than {driver}, which CUDA {cuda} needs"
            problems.append(f"driver {card.driver} is {needs}: update it{fallback}")
        if card.capability and card.capability < capability:
            problems.append(
                f"{card.name} has compute capability {card.capability}, CUDA {cuda} needs {capability} or more: "
                + ("pip install 'jax[cuda12]' instead" if cuda == "13" else "JAX has no kernels for it")
            )
    return problems


def backend_problem(backend: str, here: bool, versions: dict[str, str], cards: list[Card]) -> list[str]:
    """Returns a list with one error text, which names the most likely cause, if the machine has a GPU that jax does not
    use. Returns [] if jax uses a GPU or TPU, if there is no GPU, or if the user chose the backend with
    JAX_PLATFORMS."""
    if not here or backend in ("gpu", "tpu") or os.environ.get("JAX_PLATFORMS"):
        return []
    if not any(versions.get(f"jax-cuda{cuda}-plugin") for cuda in NEEDS):
        driver, capability = NEEDS["13"]  # CUDA 13 is recommended only if all GPUs and drivers support CUDA 13
        supports_13 = all(c.capability >= capability and c.driver and _release(c.driver)[0] >= driver for c in cards)
        best = "13" if cards and supports_13 else "12"
        way_out = f"its plugin is not installed: pip install 'jax[cuda{best}]=={versions['jax']}'"
    elif os.environ.get("LD_LIBRARY_PATH"):
        way_out = "LD_LIBRARY_PATH may load other CUDA libraries than those of jax: unset it"
    else:
        way_out = "to see the error: python -c 'import jax; jax.devices(\"cuda\")'"
    return [
        f"this machine has an NVIDIA GPU and jax runs on {backend}; {way_out} "
        "(set JAX_PLATFORMS=cpu if this is intended)"
    ]


def bfloat16_line(capability: float) -> str:
    """Returns a warning if the GPU has no tensor cores for bfloat16. Returns "" for Ampere and later GPUs, or if the
    compute capability is unknown."""
    if not 0 < capability < AMPERE:
        return ""
    return f"no bfloat16 tensor cores at compute capability {capability}: model.dtype=float32 is as fast or faster"


def _release(version: str) -> tuple[int, ...]:
    """Returns the release segment of a version as integers: "0.10.2.dev1" -> (0, 10, 2). jax itself also compares only
    this segment of a version."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(segment) for segment in match[0].split(".")) if match else ()


def _wanted_cudnn(cuda: str) -> str:
    """Returns the lowest cuDNN version that the installed CUDA plugin of jax requires, or "" if the plugin requires no
    cuDNN version."""
    with suppress(PackageNotFoundError):
        for line in requires(f"jax-cuda{cuda}-plugin") or []:
            if line.startswith(f"nvidia-cudnn-cu{cuda}") and (match := re.search(r">=([\d.]+)", line)):
                return match[1]
    return ""
