"""A program that runs reward functions; `workers.Scorer` starts it, and `rewards.parse` to check the files of users.

It reads requests from its stdin, each a line of JSON, and answers each with a line of JSON:

    {"names": [..], "timeout_s": ..}                                    loads functions; a list of error messages
    {"k": .., "prompt": .., "answer": .., "example": .., "timeout_s": ..}   calls function k; its value, or a text that
                                                                        says how it failed

The functions find an empty stdin, and what they print is dropped. The parent process kills this process after the time
limit; if the parent itself has been killed, this process ends with the end of its input or, a function that does not
return, soon after the time limit.
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

GRACE_S = 5.0  # time after the limit for the parent process to act


def call(name: str, function: RewardFunction, prompt: str, answer: str, example: dict[str, Any]) -> float | str:
    """Returns the value of a reward function, or a text that says how it failed."""
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
    except UserError as error:  # of a built-in function
        return f"{name}: {error}"
    except BaseException as error:  # also SystemExit
        return f"{name} raised {describe(error, getattr(function, '__module__', ''))}"


def main() -> None:
    # programs that a function starts do not inherit these two, and do not keep the parent process waiting
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    names: list[str] = []
    functions: list[RewardFunction] = []
    while line := requests.readline():
        request = json.loads(line)
        # the watchdog is a thread in C, which also ends a process that is busy in C, as in a regular expression
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
            os.killpg(0, signal.SIGKILL)  # with the processes that functions have left
    os._exit(0)  # without waiting for the threads that functions have left


if __name__ == "__main__":
    sys.exit("started by gptjax.evaluation.workers")
