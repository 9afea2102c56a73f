"""`gptjax doctor`: versions, devices, assets, folders. Exit code 2 when something here would hurt a run."""

from __future__ import annotations

import fnmatch
import glob
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from gptjax import assets
from gptjax.cli.options import human
from gptjax.types import UserError

PACKAGES = (
    "gptjax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "tiktoken",
    "tokenizers", "safetensors",
)  # fmt: skip


def run(args: list[str]) -> int:
    if args:
        raise UserError(f"doctor takes no arguments, got {' '.join(args)}")
    versions = {name: _version(name) for name in PACKAGES}
    print(f"python             {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, found in versions.items():
        if found or name != "libtpu":
            print(f"{name:<18} {found or 'not installed'}")
    problems = version_problems(versions)
    problems += _devices()
    _assets()
    problems += _folders()
    if problems:
        raise UserError.all(problems)
    print("all well")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def version_problems(versions: dict[str, str]) -> list[str]:
    """jax and jaxlib come in pairs: jaxlib may lag behind, by patch releases, and never lead."""
    jax, jaxlib = versions.get("jax", ""), versions.get("jaxlib", "")
    if not jax or not jaxlib:
        return ["jax is not installed whole: pip install -U jax"]
    if jax.split(".")[:2] != jaxlib.split(".")[:2]:
        return [f"jax {jax} and jaxlib {jaxlib} do not fit: pip install -U jax jaxlib"]
    return []


def tpu_here() -> bool:
    """Signs of a TPU that do not need its driver: device files, or what Colab and TPU machines set."""
    return bool(glob.glob("/dev/accel*") or os.environ.get("TPU_NAME") or os.environ.get("COLAB_TPU_ADDR"))


def holders(proc: Path = Path("/proc"), own: int | None = None) -> list[str]:
    """Other processes that have a TPU's device file open: "python (pid 123)". Only one process can hold a TPU."""
    found = []
    for folder in proc.glob("[0-9]*"):
        if int(folder.name) == (os.getpid() if own is None else own):
            continue
        with suppress(OSError):  # gone, or another user's
            if any(os.readlink(file).startswith(("/dev/accel", "/dev/vfio/")) for file in (folder / "fd").iterdir()):
                found.append(f"{(folder / 'comm').read_text().strip()} (pid {folder.name})")
    return found


def wanted_libtpu() -> str:
    """The release of libtpu that the installed jax names, such as "0.0.42.*"; empty if it names none."""
    with suppress(PackageNotFoundError):
        for line in requires("jax") or []:
            if found := re.match(r"libtpu==([\w.*]+)", line):
                return found[1]
    return ""


def backend_problem(backend: str, tpu: bool, libtpu: str, wanted: str, held_by: list[str]) -> list[str]:
    """A run that silently falls from the TPU to the CPU is the worst surprise there is. One cause, the likeliest."""
    if not tpu or backend == "tpu":
        return []
    if not libtpu:
        way_out = "its driver is not installed: pip install 'jax[tpu]'"
    elif held_by:
        way_out = f"{', '.join(held_by)} holds it: end that process (in a notebook: restart the other runtime)"
    elif (name := os.environ.get("JAX_PLATFORMS")) and "tpu" not in name:
        way_out = f"JAX_PLATFORMS={name} says so: unset it"
    elif wanted and not fnmatch.fnmatch(libtpu, wanted):
        own = _version("jax")
        way_out = f"libtpu {libtpu} does not fit jax {own}, which wants {wanted}: pip install 'jax[tpu]=={own}'"
    else:
        way_out = "python -c 'import jax; jax.devices(\"tpu\")' says why"
    return [f"this machine has a TPU and jax runs on {backend}; {way_out}"]


def _devices() -> list[str]:
    try:
        import jax

        devices, backend = jax.devices(), jax.default_backend()
    except (ImportError, RuntimeError) as error:
        return [f"jax does not start: {error}"]
    kinds = {device.device_kind for device in devices}
    print(f"backend            {backend}: {len(devices)} x {', '.join(sorted(kinds))}; {os.cpu_count()} CPU cores")
    if backend == "gpu":
        from gptjax.ops import device, fused

        print(f"attention          {gpu_attention(device.capability(), fused.cudnn_version())}")
    return backend_problem(backend, tpu_here(), _version("libtpu"), wanted_libtpu(), holders())


def gpu_attention(capability: float, cudnn: int) -> str:
    """Which kernels a run takes (`ops.fused.kernel_for`)."""
    if capability < 8:
        return (
            f"XLA, scores of T x T in memory: the fused kernels need compute capability 8.0 (Ampere), not {capability}"
        )
    own = "Pallas kernels of gptjax"
    return f"cuDNN; with documents or float32 {own}" if cudnn else f"{own} (jax finds no cuDNN)"


def _assets() -> None:
    print("\nassets")
    for name in assets.ASSETS:
        found = assets.status(name)
        where = f"cached, {human(found.size_bytes)}" if found.cached else f"not here yet, {human(found.size_bytes)}"
        print(f"  {name:<24} {where:<26} {found.licence:<32} {found.what}")


def _folders() -> list[str]:
    """The cache must be writable; the folder of runs is the current one."""
    cache = assets.cache_dir()
    print(f"\ncache              {cache}")
    parent = next(path for path in (cache, *cache.parents) if path.exists())
    if parent.is_dir() and os.access(parent, os.W_OK):
        return []
    return [f"the cache folder {cache} cannot be written; set GPTJAX_CACHE to one that can"]
