"""What a training process sets up around itself: compile cache, memory, signals."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gptjax import assets

NON_FINITE = 3  # exit code
HUGE_PAGES, TUNABLE = Path("/sys/kernel/mm/transparent_hugepage/enabled"), "glibc.malloc.hugetlb"


class Stopped(SystemExit):
    """Training ended before its last step; `code` is the exit code and `str()` says why.

    3: the loss is not finite. 130: Ctrl-C, saved. 143: SIGTERM, saved. A SystemExit, so that any program which
    calls `train` ends with this code.
    """

    def __init__(self, code: int, why: str):
        super().__init__(code)
        self.why = why

    def __str__(self) -> str:
        return self.why


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
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.jax_compilation_cache_dir:
        return
    folder = assets.cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # slower starts, nothing else
    jax.config.update("jax_compilation_cache_dir", str(folder))


class Signals:
    """Which signal has come; `code` is then 128 + its number, the exit code of a run that it ended."""

    code: int = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            os._exit(128 + number)  # the second one: now
        self.code = 128 + number


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """SIGTERM and Ctrl-C set a flag that the loop looks at. Outside the main thread nothing is installed."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
