"""`gptjax doctor`: checks package versions, devices, downloaded files and folders. The exit code is 2 if there is a
problem that would affect training or using a model."""

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
from gptjax.cli import cuda
from gptjax.cli.options import human
from gptjax.errors import UserError

PACKAGES = (
    "gptjax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "tiktoken",
    "tokenizers",
)  # fmt: skip
OPTIONAL = ("libtpu", *cuda.PACKAGES)  # packages whose versions are printed only if they are installed


def run(args: list[str]) -> int:
    if args:
        raise UserError(f"doctor takes no arguments, got {' '.join(args)}")
    versions = {name: _version(name) for name in (*PACKAGES, *cuda.PACKAGES)}
    print(f"python             {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, installed in versions.items():
        if installed or name not in OPTIONAL:
            print(f"{name:<18} {installed or 'not installed'}")
    problems = version_problems(versions)
    problems += _devices(versions)
    print("\nassets")
    for name in assets.ASSETS:
        asset = assets.status(name)
        state = "cached" if asset.cached else "not cached yet"
        print(f"  {name:<24} {f'{state}, {human(asset.size_bytes)}':<26} {asset.licence:<32} {asset.what}")
    cache = assets.cache_dir()
    print(f"\ncache              {cache}")
    parent = next(path for path in (cache, *cache.parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        problems.append(f"the cache folder {cache} cannot be written; set GPTJAX_CACHE to one that can")
    if problems:
        raise UserError.all(problems)
    print("no problems found")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def version_problems(versions: dict[str, str]) -> list[str]:
    """Returns a list with one error text if jax or jaxlib is not installed, or if their minor versions differ;
    otherwise []. Patch versions are not compared here, because jax raises an error on import if jaxlib has a newer
    patch version."""
    jax, jaxlib = versions.get("jax", ""), versions.get("jaxlib", "")
    if not jax or not jaxlib:
        return ["jax or jaxlib is not installed: pip install -U jax"]
    if jax.split(".")[:2] != jaxlib.split(".")[:2]:
        return [f"jax {jax} and jaxlib {jaxlib} do not fit: pip install -U jax jaxlib"]
    return []


def tpu_here() -> bool:
    """Returns True if this machine has a TPU, which the function detects from device files and from environment
    variables of Colab and TPU VMs. `jax.devices` is not called, because `jax.devices` does not list a TPU whose driver
    is missing."""
    return bool(glob.glob("/dev/accel*") or os.environ.get("TPU_NAME") or os.environ.get("COLAB_TPU_ADDR"))


def holders(proc: Path = Path("/proc"), own_pid: int | None = None) -> list[str]:
    """Returns the other processes that have a TPU's device file open, as texts such as "python (pid 123)". `gptjax
    doctor` reports these processes, because only one process at a time can use a TPU."""
    processes = []
    for folder in proc.glob("[0-9]*"):
        if int(folder.name) == (os.getpid() if own_pid is None else own_pid):
            continue
        with suppress(OSError):  # OSError is raised if the process has ended, or belongs to another user
            if any(os.readlink(file).startswith(("/dev/accel", "/dev/vfio/")) for file in (folder / "fd").iterdir()):
                processes.append(f"{(folder / 'comm').read_text().strip()} (pid {folder.name})")
    return processes


def wanted_libtpu() -> str:
    """Returns the libtpu release that the installed jax requires, such as "0.0.42.*", or "" if jax requires no libtpu
    release."""
    with suppress(PackageNotFoundError):
        for line in requires("jax") or []:
            if match := re.match(r"libtpu==([\w.*]+)", line):
                return match[1]
    return ""


def backend_problem(backend: str, tpu: bool, libtpu: str, wanted: str, held_by: list[str]) -> list[str]:
    """Returns a list with one error text, which names the most likely cause, if the machine has a TPU that jax does not
    use; otherwise []. If `gptjax doctor` did not report an unused TPU, gptjax would compute on the CPU, and the user
    would not notice."""
    if not tpu or backend == "tpu":
        return []
    if not libtpu:
        way_out = "its driver is not installed: pip install 'jax[tpu]'"
    elif held_by:
        way_out = f"{', '.join(held_by)} holds it: end that process (in a notebook, restart the other runtime)"
    elif (name := os.environ.get("JAX_PLATFORMS")) and "tpu" not in name:
        way_out = f"JAX_PLATFORMS={name} excludes it: unset it"
    elif wanted and not fnmatch.fnmatch(libtpu, wanted):
        jax = _version("jax")
        way_out = f"libtpu {libtpu} does not fit jax {jax}, which needs {wanted}: pip install 'jax[tpu]=={jax}'"
    else:
        way_out = "to see the error: python -c 'import jax; jax.devices(\"tpu\")'"
    return [f"this machine has a TPU and jax runs on {backend}; {way_out}"]


def precision_line(backend: str, capability: float, setting: str | None) -> str:
    """Returns a line of text with the precision of matrix multiplications on this backend, for a run with
    model.dtype=float32 and model.precision=default.

    Args:
        capability: compute capability of the GPU; 0 if it is unknown.
        setting: the value of JAX's jax_default_matmul_precision.
    """
    if setting not in (None, "default"):
        return f"float32 matmul: {setting}, set by JAX's jax_default_matmul_precision"
    exact = "model.precision=highest for full float32"
    if backend == "tpu":
        return f"float32 matmul: one bfloat16 pass (relative error about 4e-3); {exact}"
    if backend == "gpu" and not 0 < capability < cuda.AMPERE:
        return f"float32 matmul: TF32 if the GPU has it (relative error 3e-4 to 1e-3); {exact}"
    return "float32 matmul: float32"


def attention_line(backend: str) -> str:
    """Returns the name of the attention implementation that a training run on this device uses."""
    from gptjax.ops import device, fused

    if backend == "tpu":
        return "the splash kernel, for rows of a multiple of 128 tokens" if fused.splash_fits(1024) else "XLA"
    return gpu_attention(device.capability(), fused.cudnn_version())


def gpu_attention(capability: float, cudnn: int) -> str:
    """Returns the names of the attention kernels that a training run on a GPU uses; `ops.fused.kernel_for` selects
    these kernels."""
    if capability < cuda.AMPERE:
        needs = f"the fused kernels need compute capability 8.0 (Ampere), not {capability}"
        return f"XLA, with T x T scores in memory: {needs}"
    pallas = "Pallas kernels of gptjax"
    return f"cuDNN; for packed documents or float32 {pallas}" if cudnn else f"{pallas} (jax finds no cuDNN)"


def _devices(versions: dict[str, str]) -> list[str]:
    cards = cuda.cards()
    problems = cuda.plugin_problems(versions, cards)
    try:
        import jax

        devices, backend = jax.devices(), jax.default_backend()
    except (ImportError, RuntimeError) as error:
        return [*problems, f"jax cannot be initialised: {error}"]
    kinds = {device.device_kind for device in devices}
    print(f"backend            {backend}: {len(devices)} x {', '.join(sorted(kinds))}; {os.cpu_count()} CPU cores")
    if backend != "cpu":
        device = devices[0]
        capability = cuda.number(getattr(device, "compute_capability", 0))
        if backend == "gpu":
            for line in cuda.lines(cards or [cuda.Card(device.device_kind, capability, "")]):
                print(f"gpu                {line}")
            if line := cuda.bfloat16_line(capability):
                print(f"bfloat16           {line}")
        if backend == "tpu" or capability:
            print(f"attention          {attention_line(backend)}")
        setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        print(f"precision          {precision_line(backend, capability, setting)}")
    problems += backend_problem(backend, tpu_here(), _version("libtpu"), wanted_libtpu(), holders())
    return problems or cuda.backend_problem(backend, bool(cards) or cuda.gpu_here(), versions, cards)
