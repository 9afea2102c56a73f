"""Ctrl-C and SIGTERM end a program with their exit code at any moment, without a traceback."""

import gc
import os
import signal
import subprocess
import sys

import pytest

import gptjax
from gptjax.signals import Stopped, Terminated, catch_signals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_raises_unless_somebody_looks_at_it(number):
    before = signal.getsignal(number)
    with catch_signals() as signals, catch_signals() as inner:
        assert inner is signals
        with pytest.raises(RAISED[number]):
            os.kill(os.getpid(), number)
        assert signals.code == CODES[number]
        signals.forget()
        signals.polled = True
        os.kill(os.getpid(), number)
        with pytest.raises(RAISED[number]):
            signals.raise_if_any()
    assert signal.getsignal(number) is before


def in_a_collection(number: int):
    """Send the signal inside a garbage collector callback, where Python ignores exceptions."""

    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)


@pytest.mark.parametrize("send", [in_a_collection, lambda number: os.kill(os.getpid(), number)])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_the_data_are_prepared(number, send, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 40)
    prepare = gptjax.data.prepare

    def and_signal(cfg, *tokenizer, log):
        send(number)
        return prepare(cfg, *tokenizer, log=log)

    monkeypatch.setattr(gptjax.data, "prepare", and_signal)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    cfg = gptjax.load_config(
        "tiny-gpt2", f"data.source={text}", f"run_dir={tmp_path / 'run'}", "model.context_length=8"
    )
    lines: list[str] = []
    with pytest.raises(Stopped) as stopped:
        gptjax.train(cfg, log=lines.append)
    assert stopped.value.code == CODES[number] and "before the first step: nothing to save" in lines[-1]
    assert not (tmp_path / "run").exists()


PROGRAM = """
import os, signal, sys
sys.argv = ["gptjax", {verb!r}, "x"]
from gptjax import __main__, cli, signals
signals.GRACE_S = 0.5
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {action}
sys.meta_path.insert(0, Finder())
sys.exit(__main__.main())
"""
IN_C = (  # blocks in C on a mutex locked twice, where no Python signal handler can run
    "import ctypes, threading; lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None); "
    "threading.Timer(0.2, os.kill, (os.getpid(), signal.{name})).start(); "
    "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)"
)
DROPPED = (
    "import gc; sent = iter([1]); "
    "gc.callbacks.append(lambda phase, info: next(sent, 0) and os.kill(os.getpid(), signal.{name})); gc.collect()"
)
AS_IMPORT_ERROR = (
    "\n            try: os.kill(os.getpid(), signal.{name})"
    "\n            except BaseException as error: raise ImportError('half') from error"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mutex")
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    ("verb", "module", "action"),
    [
        ("data", "numpy", "os.kill(os.getpid(), signal.{name})"),
        ("data", "numpy", AS_IMPORT_ERROR),
        ("data", "gptjax.cli.data", IN_C),
        ("data", "gptjax.cli.data", DROPPED),
    ],
)
def test_a_signal_during_imports_or_in_c_code(number, verb, module, action):
    name = signal.Signals(number).name
    code = PROGRAM.format(verb=verb, module=module, action=action.format(name=name))
    if module == "numpy":
        code = code.replace(
            "sys.exit(", "import gptjax.cli.data as d; d.run = lambda args: __import__('numpy')\nsys.exit("
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == CODES[number], done.stderr
    assert "Traceback" not in done.stderr and "ended by" in done.stderr
