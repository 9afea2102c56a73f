"""Runs reward functions in child processes, with a time limit per call.

    with Scorer(["number", "mine.py:score"], weights=[1.0, 0.5], time_limit_s=10) as scorer:
        scores = scorer.score(prompts, answers, examples)
        scores.check()
        scores.total      [n] float64, the weighted sum of the functions' values; nan if a function failed

A call of a reward function fails if the function raises an error, returns a value that is not a finite number, exceeds
the time limit, or ends its process. The value of a failed call of a reward function is nan, and all other calls are
still made. Each child process runs the program `_scoring.py`, which does not import JAX.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import Problems, UserError
from gptjax.evaluation.rewards import PROGRAM, SETTING, start
from gptjax.processes import Child

FIRST_CALLS = 8  # A reward function is not called again if its first FIRST_CALLS calls have all failed.
MAX_PROCESSES = 4


class Failure(NamedTuple):
    name: str  # Name of the reward function.
    answer: int  # Index of the answer.
    # Error message, such as "mine.py:score raised ValueError: no number (line 7), for answer 'The result is'".
    text: str


@dataclass(frozen=True)
class Scores:
    """The rewards of n answers.

    total: Reward of each answer, [n] float64: the sum of weight * value over all reward functions with a weight other
    than 0. The reward of an answer is nan if one of the reward functions with a weight other than 0 failed.
    parts: Dict that maps the name of each reward function to the function's values, [n] float64. A value is nan if the
      call of the reward function failed or was not made.
    failures: List of the calls that failed, in the order of the answers.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failures: list[Failure]

    def check(self) -> None:
        """Checks that each reward function has returned a value for at least one answer.

        Raises:
            UserError: a function failed for every answer. The message gives its first failure.
        """
        problems = Problems()
        for name, values in self.parts.items():
            failed = [failure.text for failure in self.failures if failure.name == name]
            if failed and np.isnan(values).all():
                problems.append(f"{SETTING}: all {len(failed)} calls of {name} failed; the first: {failed[0]}")
        problems.raise_if_any()


class Scorer:
    """Context manager that starts child processes, and runs reward functions in them.

    If the values of the reward functions depend only on the functions' arguments, the results do not depend on the
    number of processes.

    Args:
        names: names of reward functions; see `rewards`.
        weights: the weight of each function. A function of weight 0 is only measured.
        time_limit_s: limit on the duration of a call, in seconds.
        processes: number of processes. None: one per CPU, at most MAX_PROCESSES.

    Raises:
        UserError: the numbers of names and weights differ, a weight or the limit is not a valid number, or (when the
            `with` block is entered) a function cannot be loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        *,
        time_limit_s: float = 10.0,
        processes: int | None = None,
    ):
        problems = Problems()
        if not names or len(names) != len(weights):
            problems.append(f"reward.weights: expected a weight for each of {len(names)} functions, got {len(weights)}")
        if not all(math.isfinite(weight) for weight in weights):
            problems.append(f"reward.weights: expected finite numbers, got {list(weights)}")
        if not 0 < time_limit_s < threading.TIMEOUT_MAX / 2:
            problems.append(f"reward.time_limit: expected a positive number of seconds, got {time_limit_s}")
        problems.raise_if_any()
        self.names, self.weights, self.time_limit_s = tuple(names), tuple(weights), time_limit_s
        self.processes = processes or min(os.cpu_count() or 1, MAX_PROCESSES)
        self._worked: set[str] = set()  # names of the reward functions that have returned a value
        self._children: set[Child] = set()
        self._lock = threading.Lock()
        self._open = False

    def __enter__(self) -> Scorer:
        self._open = True
        # The queue holds the idle child processes; None stands for a process that has yet to be started.
        self._idle: queue.SimpleQueue[Child | None] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self.processes, "rewards")
        try:
            for child in self._threads.map(lambda _: self._start(), range(self.processes)):
                self._idle.put(child)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all child processes at once."""
        with self._lock:
            self._open = False
            for child in self._children:
                child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()
        self._children.clear()

    def score(self, prompts: Sequence[str], answers: Sequence[str], examples: Sequence[dict[str, Any]]) -> Scores:
        """Calls every reward function for each of the n answers, and returns the scores.

        Each reward function is first called for FIRST_CALLS answers, which are spread evenly over all answers. If all
        FIRST_CALLS calls of a reward function fail, and the reward function has never returned a value before, the
        reward function is not called for the remaining answers, because a function that always exceeds the time limit
        would take hours.

        Raises:
            UserError: a process could not be started again.
        """
        if not self._open:
            raise RuntimeError("Scorer is a context manager: use `with Scorer(..) as scorer:`")
        n, names = len(answers), self.names
        if not len(prompts) == n == len(examples):
            raise ValueError(f"{len(prompts)} prompts, {n} answers and {len(examples)} examples")
        outcomes: dict[tuple[int, int], float | str] = {}

        def run(calls: list[tuple[int, int]]) -> None:
            requests = [{"k": k, "prompt": prompts[i], "answer": answers[i], "example": examples[i]} for i, k in calls]
            try:
                outcomes.update(zip(calls, self._threads.map(self._call, requests), strict=True))
            except BaseException:  # such as Ctrl-C
                self.close()
                raise

        first = sorted({round(i) for i in np.linspace(0, n - 1, min(n, FIRST_CALLS))})
        run([(i, k) for i in first for k in range(len(names))])
        self._worked |= {names[k] for (_, k), outcome in outcomes.items() if isinstance(outcome, float)}
        run([(i, k) for i in range(n) if i not in first for k, name in enumerate(names) if name in self._worked])
        values = np.full((len(names), n), np.nan)
        failures = []
        for (i, k), outcome in sorted(outcomes.items(), key=lambda item: item[0]):
            if isinstance(outcome, str):
                failures.append(Failure(names[k], i, f"{outcome}, for answer {answers[i][:60]!r}"))
            else:
                values[k, i] = outcome
        total = np.zeros(n)
        for row, weight in zip(values, self.weights, strict=True):
            total += weight * row if weight else 0.0
        return Scores(total, dict(zip(names, values, strict=True)), failures)

    def _call(self, request: dict[str, Any]) -> float | str:
        """Calls a reward function in an idle child process. Returns the value of the function, or an error message if
        the call failed."""
        name, child = self.names[request["k"]], self._idle.get()
        try:
            # A thread of an earlier reward function may have ended the child process.
            if child is not None and not child.alive:
                self._discard(child)
                child = None
            child = child or self._start()
            try:
                return child.ask({**request, "timeout_s": self.time_limit_s}, self.time_limit_s)
            except TimeoutError:
                failure = f"{name} took longer than {self.time_limit_s:g} s"
            except EOFError as error:
                failure = f"{name} {error}"
            except ValueError:
                failure = f"{name} disturbed its process"
            self._discard(child)
            child = None
            return failure
        finally:
            self._idle.put(child)

    def _start(self) -> Child:
        with self._lock:
            if not self._open:
                raise RuntimeError("the Scorer is closed")
            child = Child.module(PROGRAM)
            self._children.add(child)
        if problems := start(child, self.names):
            raise UserError.all(problems)
        return child

    def _discard(self, child: Child) -> None:
        child.close()
        with self._lock:
            self._children.discard(child)
