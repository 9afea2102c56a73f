"""What a training process sets up around itself: compile cache and memory; what it ends with."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from gptjax import assets
from gptjax.signals import HEARD
from gptjax.signals import Stopped as Stopped

NON_FINITE = 3  # exit code
HUGE_PAGES, TUNABLE = Path("/sys/kernel/mm/transparent_hugepage/enabled"), "glibc.malloc.hugetlb"


def keep_buffers() -> bool:
    """Have glibc keep freed memory instead of giving it back and faulting it in again at every step.

    With XLA's temporaries on the CPU that was half the time of a small step (42 -> 20 ms, 0.8 M parameters).
    Call it before the first step. False where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    m_trim_threshold, m_mmap_threshold, most = -1, -3, 2**31 - 1
    return bool(mallopt(m_mmap_threshold, most)) and bool(mallopt(m_trim_threshold, most))


def ask_for_huge_pages() -> None:
    """Start the program again, as the same process, with glibc told to ask for huge pages where Linux gives them on
    request. For the beginning of a program that trains: what it did before is done again.

    XLA's CPU backend takes its temporaries anew at every step; faulting 2 GB of them in by pages of 4 KiB was 0.4 of
    2.2 s of an adapter's step at 135 M parameters. glibc reads its tunables at the start of a process only.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE not in tunables and HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text():
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # they wait until the new beginning can hear them
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    folder = assets.cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # slower starts, nothing else
    jax.config.update("jax_compilation_cache_dir", str(folder))
