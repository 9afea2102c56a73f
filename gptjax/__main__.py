"""The entry point of the command line: `gptjax COMMAND ...` or `python -m gptjax COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from gptjax.cli import ALL_VERBS
from gptjax.errors import UserError
from gptjax.signals import HEARD, INTERRUPTED, catch_signals, signal_name

USER_ERROR = 2
TRAINS = ("pretrain", "finetune", "sweep")
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the command line.

    Returns:
        The exit code: 0 for success, 2 for invalid input or environment (with a message on stderr), 3 if training
        stopped because the loss is not finite, 130 after Ctrl-C, 143 after SIGTERM. Unexpected exceptions, which are
        bugs, are not caught.
    """
    with catch_signals(program=argv is None) as signals:
        try:
            if argv is None:
                _set_up_process()
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
            signals.raise_if_any()
            return code
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or (signals.code and not signals.polled):
                # If a signal interrupts an import, the import may raise ImportError instead of KeyboardInterrupt.
                code = signals.code or INTERRUPTED
                print(f"ended by {signal_name(code)}", file=sys.stderr)
                if argv is None:
                    _leave(code)
                return code
            explained = _explain(error)
            if explained is None:
                raise
            return explained


def _set_up_process() -> None:
    if sys.argv[1:2] and sys.argv[1] in TRAINS and not _asks_for_help(sys.argv[2:]):
        from gptjax.training.process import ask_for_huge_pages

        ask_for_huge_pages()
    if hasattr(signal, "pthread_sigmask"):
        # `ask_for_huge_pages` blocks SIGINT (Ctrl-C) and SIGTERM while the program restarts; these signals are
        # unblocked here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    for stream in (sys.stdout, sys.stderr):  # Characters that the terminal cannot encode are printed as "?".
        # AttributeError is raised if sys.stdout was replaced with an object without `reconfigure`.
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _leave(code: int) -> None:
    """End the process immediately with the given exit code, without the normal exit of the Python interpreter.

    The interpreter's normal exit can block, because it may wait for other processes. The normal exit can also replace
    the exit code: if a KeyboardInterrupt was raised in code that `exec` or `eval` ran from a string, `python -m gptjax`
    ends by sending SIGINT to its own process.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _explain(error: BaseException) -> int | None:
    """Print the message of an expected error, such as a UserError, and return the exit code. For an unexpected error,
    which is a bug, return None."""
    if isinstance(error, UserError):
        return _complain(str(error))
    if isinstance(error, SystemExit):  # such as `Stopped`, which is raised if training ends before its last step
        return error.code if isinstance(error.code, int) else USER_ERROR
    if isinstance(error, BrokenPipeError):
        # A closed pipe, as in `gptjax presets ls | head -1`, is not an error. stdout is replaced so that Python does
        # not flush into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno is not None:
        path = f"{error.filename}: " if error.filename else ""
        return _complain(f"{path}{error.strerror or error}")
    return None


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        from gptjax.cli.help import overview

        print(overview())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"gptjax {version('gptjax')}")
        except PackageNotFoundError:
            print("gptjax is run from a source tree, not installed")
        return 0
    name, *args = argv
    if name not in ALL_VERBS:
        from gptjax.errors import did_you_mean

        hint = did_you_mean(PEERS.get(name.removeprefix("--"), name), ALL_VERBS)
        raise UserError(f"no command {name!r}{hint}\n  commands: {', '.join(ALL_VERBS)}; `gptjax --help` explains each")
    # with `completion --words`, --help is a word to be completed
    completes = name == "completion" and args[:1] == ["--words"]
    if _asks_for_help(args) and not completes:
        from gptjax.cli.help import verb_help

        print(verb_help(name, [arg for arg in args if arg not in HELP]))
        return 0
    module = importlib.import_module(ALL_VERBS[name].module)
    return (module.run if hasattr(module, "run") else getattr(module, f"run_{name}"))(args)


def _asks_for_help(args: Sequence[str]) -> bool:
    return any(arg in HELP for arg in args)


# Maps command names of other tools to the corresponding commands of gptjax, for the hint "did you mean".
PEERS = {
    "train": "pretrain", "generate": "sample", "tokenize": "tokenizer", "prepare": "data", "preprocess": "data",
    "ls": "presets", "cp": "presets", "validate": "pretrain", "check": "doctor", "version": "doctor",
}  # fmt: skip


def _complain(message: str) -> int:
    # Each line of `message` is an error, except for indented lines, which continue the error in the line above.
    many = sum(not line.startswith(" ") for line in message.splitlines()) > 1
    print(f"errors:\n{message}" if many else f"error: {message}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
