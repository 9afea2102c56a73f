"""What `gptjax doctor` says of an NVIDIA GPU: the card, its driver, whether jax's CUDA plugin fits them."""

from __future__ import annotations

import glob
import os
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from typing import NamedTuple

NEEDS = {"12": (525, 5.2), "13": (580, 7.5)}  # of CUDA: the oldest driver, the lowest compute capability
PACKAGES = tuple(
    name for cuda in NEEDS for name in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt", f"nvidia-cudnn-cu{cuda}")
)
AMPERE = 8.0  # from here on: bfloat16 and TF32 units, and cuDNN's flash attention


class Card(NamedTuple):
    name: str
    capability: float  # 0: unknown
    driver: str  # empty: unknown


def cards() -> list[Card]:
    """The cards that nvidia-smi lists; none where it is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in out.splitlines()]
    return [Card(row[0], number(row[1]), row[2]) for row in rows if len(row) == 3]


def number(text: object) -> float:
    """A compute capability such as "9.0"; 0 of what is none, such as an AMD GPU's "gfx942"."""
    try:
        return float(str(text))
    except ValueError:
        return 0.0


def gpu_here() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def lines(cards: list[Card]) -> list[str]:
    """One for each kind of card."""
    kinds = {card: cards.count(card) for card in cards}
    return [
        f"{f'{n} x ' if n > 1 else ''}{card.name}, compute capability {card.capability or 'unknown'}, "
        f"driver {card.driver or 'unknown'}"
        for card, n in kinds.items()
    ]


def plugin_problems(versions: dict[str, str], cards: list[Card]) -> list[str]:
    """What keeps jax from a GPU. `versions` of jax, jaxlib and `PACKAGES`, empty where not installed."""
    plugins = [cuda for cuda in NEEDS if versions.get(f"jax-cuda{cuda}-plugin")]
    jaxlib = versions.get("jaxlib", "")
    if len(plugins) > 1:
        return ["jax-cuda12-plugin and jax-cuda13-plugin are both installed: pip uninstall the one that is not wanted"]
    if not plugins:
        return []
    (cuda,), problems = plugins, []
    again = f"pip install -U 'jax[cuda{cuda}]=={versions.get('jax') or jaxlib}'"
    for name in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"):
        found = versions.get(name, "")
        if not found:
            problems.append(f"{name} is not installed beside jax-cuda{cuda}-plugin: {again}")
        elif _release(found) != _release(jaxlib):
            problems.append(f"{name} {found} does not fit jaxlib {jaxlib}: jax will not use it; {again}")
    wanted, cudnn = _wanted_cudnn(cuda), versions.get(f"nvidia-cudnn-cu{cuda}", "")
    if wanted and cudnn and _release(cudnn) < _release(wanted):
        problems.append(f"cuDNN {cudnn} is older than {wanted}, which jax-cuda{cuda}-plugin needs: {again}")
    driver, capability = NEEDS[cuda]
    for card in dict.fromkeys(cards):
        if card.driver and _release(card.driver)[0] < driver:
            older = "; an older CUDA: pip install 'jax[cuda12]'" if cuda == "13" else ""
            problems.append(f"driver {card.driver} is older than {driver}, which CUDA {cuda} needs: update it{older}")
        if card.capability and card.capability < capability:
            problems.append(
                f"{card.name} has compute capability {card.capability}, CUDA {cuda} begins at {capability}: "
                + ("pip install 'jax[cuda12]' in its place" if cuda == "13" else "JAX has no kernels for it")
            )
    return problems


def backend_problem(backend: str, here: bool, versions: dict[str, str], cards: list[Card]) -> list[str]:
    """A GPU that jax does not use, and the likeliest cause. What JAX_PLATFORMS leaves out is left out on purpose."""
    if not here or backend in ("gpu", "tpu") or os.environ.get("JAX_PLATFORMS"):
        return []
    if not any(versions.get(f"jax-cuda{cuda}-plugin") for cuda in NEEDS):
        driver, capability = NEEDS["13"]  # the newest that every card and its driver take
        new = all(c.capability >= capability and c.driver and _release(c.driver)[0] >= driver for c in cards)
        best = "13" if cards and new else "12"
        way_out = f"its plugin is not installed: pip install 'jax[cuda{best}]=={versions['jax']}'"
    elif os.environ.get("LD_LIBRARY_PATH"):
        way_out = "LD_LIBRARY_PATH may bring other CUDA libraries than jax's: unset it"
    else:
        way_out = "python -c 'import jax; jax.devices(\"cuda\")' says why"
    return [f"this machine has an NVIDIA GPU and jax runs on {backend}; {way_out} (JAX_PLATFORMS=cpu: on purpose)"]


def bfloat16_line(capability: float) -> str:
    """Empty for an Ampere GPU or a later one."""
    if not 0 < capability < AMPERE:
        return ""
    return f"no units for it at compute capability {capability}: model.dtype=float32 is as fast or faster"


def _release(version: str) -> tuple[int, ...]:
    """(0, 10, 2) of "0.10.2.dev1": the numbers that jax compares too."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _wanted_cudnn(cuda: str) -> str:
    """The lowest version of cuDNN that the installed plugin names; empty if it names none."""
    with suppress(PackageNotFoundError):
        for line in requires(f"jax-cuda{cuda}-plugin") or []:
            if line.startswith(f"nvidia-cudnn-cu{cuda}") and (match := re.search(r">=([\d.]+)", line)):
                return match[1]
    return ""
