"""A program that runs reward functions in a child process. `workers.Scorer` starts the program `_scoring` to score
answers, and `rewards.parse` starts the program `_scoring` to check the Python files of users.

The program `_scoring` reads requests from its stdin, one JSON object per line, and writes one line of JSON to its
stdout for each request:

    {"names": [..], "timeout_s": ..}                                    loads functions; a list of error messages
    {"k": .., "prompt": .., "answer": .., "example": .., "timeout_s": ..}   calls function k; its value, or a text that
                                                                        says how it failed

Reward functions read an empty stdin, and text that they print is discarded. The parent process kills the child process
if a call of a reward function exceeds the time limit. If the parent process itself has been killed, the child process
exits when it reaches the end of its stdin. If the parent process has been killed during a call of a reward function
that does not return, a watchdog ends the child process 5 s after the time limit.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import random
import signal
import sys
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.rewards import RewardFunction, describe, load

# The watchdog ends this process GRACE_S seconds after the time limit, if the parent process has not killed this process
# by then.
GRACE_S = 5.0


def call(name: str, function: RewardFunction, prompt: str, answer: str, example: dict[str, Any]) -> float | str:
    """Calls a reward function, and returns its value, or an error message if the call failed."""
    random.seed(f"{prompt}\0{answer}".encode("utf-8", "surrogatepass"))
    np.random.seed(random.getrandbits(32))
    try:
        value: Any = function(prompt, answer, example)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
        got = f"{value!r:.60}" if value is None or isinstance(value, Real | str) else f"a {type(value).__name__}"
        return f"{name} returned {got}, expected a finite number"
    except UserError as error:  # the error was raised by a built-in reward function
        return f"{name}: {error}"
    except BaseException as error:  # also SystemExit
        return f"{name} raised {describe(error, getattr(function, '__module__', ''))}"


def main() -> None:
    # Programs that a reward function starts do not inherit the file descriptors `requests` and `replies`, so that such
    # programs cannot keep the parent process waiting for a reply.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    names: list[str] = []
    functions: list[RewardFunction] = []
    while line := requests.readline():
        request = json.loads(line)
        # The watchdog is a C thread, so it also ends a process that is busy in C code, for example in a regular
        # expression.
        faulthandler.dump_traceback_later(request["timeout_s"] + GRACE_S, exit=True, file=null)
        if "names" in request:
            names, problems = request["names"], []
            for name in names:
                try:
                    functions.append(load(name))
                except UserError as error:
                    problems.append(str(error))
            reply: Any = problems
        else:
            k = request["k"]
            reply = call(names[k], functions[k], request["prompt"], request["answer"], request["example"])
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        faulthandler.cancel_dump_traceback_later()
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        with suppress(OSError):
            os.killpg(0, signal.SIGKILL)  # SIGKILL also ends child processes that reward functions have started.
    os._exit(0)  # The process exits without waiting for threads that reward functions have started.


if __name__ == "__main__":
    sys.exit("started by gptjax.evaluation.workers")
