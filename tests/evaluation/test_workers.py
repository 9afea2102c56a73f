"""Reward functions in processes of their own: limits, failures, restarts, and what ends with the parent process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gptjax import UserError
from gptjax.evaluation import rewards
from gptjax.evaluation.workers import Scorer
from gptjax.processes import Child

FILE = r'''
import os, random, re, signal, subprocess, sys, threading, time
import numpy as np

calls = 0

def bad(prompt, answer, example):
    """Does what the answer says."""
    global calls
    calls += 1
    if answer == "raise":
        raise ValueError("no number\nin \x1b[31mthis")
    if answer == "exit": os._exit(3)
    if answer == "sys.exit": sys.exit()
    if answer == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if answer == "abort": os.abort()
    if answer == "hang": time.sleep(1000)
    if answer == "regex": re.match("(a+)+$", "a" * 100 + "b")  # holds Python's global lock
    if answer == "close": os.closerange(0, 100)
    if answer == "deep": return bad(prompt, answer, example)
    if answer == "print":
        print("x" * 10_000_000)
        os.write(1, b'"no reply"\n' * 100_000)
        os.write(2, b"y" * 1_000_000)
    if answer == "read": return len(sys.stdin.read()) + 1
    if answer == "input": input()
    if answer == "change": example["expected"] = "changed"
    if answer == "thread": threading.Thread(target=time.sleep, args=(1000,)).start()
    if answer == "late":  # ends the process after the call
        threading.Timer(0.1, os._exit, (5,)).start()
        return 1
    if answer == "program":
        child = subprocess.Popen(["sleep", "1000"])
        open(example["file"], "w").write(str(child.pid))
        time.sleep(1000)
    values = {"nan": float("nan"), "inf": float("inf"), "text": "1", "none": None, "list": [1], "huge": 10**400,
              "true": True, "int": 2, "float32": np.float32(0.5), "int64": np.int64(3), "bool_": np.bool_(True),
              "array": np.ones(1), "complex": 1j}
    return values.get(answer, 1.0)

def length(prompt, answer, example): return len(answer) + len(prompt) / 8 + example["row"] / 64
def noise(prompt, answer, example): return random.random() + np.random.rand() + hash(answer) % 97
def expected(prompt, answer, example): return example["expected"] == "x"
def jax(prompt, answer, example): return "jax" in sys.modules
def never(prompt, answer, example): raise KeyError(answer)
def hang(prompt, answer, example): time.sleep(1000)
def eight(prompt, answer, example): return 1 if answer == "8" else 1 / 0

def tell(prompt, answer, example):
    with open(answer, "a") as file: file.write(f"{os.getpid()} ")
    if prompt == "regex": re.match("(a+)+$", "a" * 100 + "b")
    time.sleep(1000)
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FILE)
    return str(path)


def score(scorer, answers, **example):
    return scorer.score(["p"] * len(answers), answers, [{"expected": "x", **example} for _ in answers])


@pytest.fixture(scope="module")
def scorer(mine):
    with Scorer([f"{mine}:bad", "exact"], [1.0, 0.5], time_limit_s=3.0, processes=2) as scorer:
        yield scorer


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("raise", r"raised ValueError: no number in \[31mthis \(line 12\)"),
        ("exit", "ended its process with exit code 3"),
        ("sys.exit", "raised SystemExit"),
        ("kill", "ended its process by SIGKILL"),
        ("abort", "ended its process by SIGABRT"),
        ("hang", "took longer than 3 s"),
        ("regex", "took longer than 3 s"),
        ("close", "ended its process"),
        ("deep", "raised RecursionError"),
        ("input", "raised EOFError"),
        ("nan", "returned nan, expected a finite number"),
        ("inf", "returned inf"),
        ("huge", "raised OverflowError"),
        ("text", "returned '1'"),
        ("none", "returned None"),
        ("list", "returned a list"),
        ("array", "returned a ndarray"),
        ("complex", "returned a complex"),
    ],
)
def test_failures(scorer, mine, answer, failure):
    """A failed call has the value nan, and the calls around it are not lost."""
    scores = score(scorer, ["x", answer, "x", "y"])
    bad = scores.parts[f"{mine}:bad"]
    assert np.isnan(bad[1]) and bad[[0, 2, 3]].tolist() == [1, 1, 1]
    assert scores.parts["exact"].tolist() == [1, 0, 1, 0]
    assert np.isnan(scores.total[1]) and scores.total[[0, 2, 3]].tolist() == [1.5, 1.5, 1]
    (failed,) = scores.failures
    assert (failed.name, failed.answer) == (f"{mine}:bad", 1)
    with pytest.raises(AssertionError, match=f"mine.py:bad {failure}.*, for answer '{answer}'$"):
        raise AssertionError(failed.text)
    scores.check()


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("print", 1), ("read", 1), ("thread", 1), ("true", 1), ("int", 2), ("float32", 0.5), ("int64", 3),
        ("bool_", 1), ("\ud800\0\n", 1), ("x" * 1_000_000, 1),
    ],
)  # fmt: skip
def test_values(scorer, mine, answer, value):
    scores = score(scorer, [answer, "x"])
    assert scores.parts[f"{mine}:bad"].tolist() == [value, 1] and not scores.failures
    assert scores.total.dtype == np.float64 and scores.total.tolist() == [value, 1.5]


def test_a_long_answer_is_shortened_in_the_message(mine):
    with Scorer([f"{mine}:never"], [1], processes=1) as scorer:
        (failure,) = score(scorer, ["ab\n" * 1000]).failures
    assert failure.text.endswith(", for answer " + repr("ab\n" * 20)) and len(failure.text) < 500


def test_a_process_that_ends_after_its_call_is_restarted(mine):
    with Scorer([f"{mine}:bad"], [1], processes=1) as scorer:
        assert score(scorer, ["late"]).total.tolist() == [1]
        (child,) = scorer._children
        while child.alive:
            time.sleep(0.01)
        assert score(scorer, ["x", "x"]).total.tolist() == [1, 1]


def test_an_example_is_the_call_s_own(mine):
    example = {"expected": "x"}
    with Scorer([f"{mine}:bad", f"{mine}:expected"], [0, 1], processes=1) as scorer:
        scores = scorer.score(["p"] * 2, ["change"] * 2, [example] * 2)
    assert scores.total.tolist() == [1, 1] and example == {"expected": "x"}


def test_values_of_a_row_that_json_does_not_have(mine):
    import datetime

    with Scorer([f"{mine}:expected"], [1], processes=1) as scorer:
        row = {
            "expected": "x",
            "date": datetime.date(2024, 1, 1),
            "array": np.ones(3),
            "nan": float("nan"),
            "b": b"\xff",
        }
        assert scorer.score(["p"], ["x"], [row]).total.tolist() == [1]


def test_results_do_not_depend_on_the_number_of_processes(mine):
    n = 40
    answers = [("x" * (i % 5)) or "raise" for i in range(n)]
    results = []
    for processes in (1, 3):
        with Scorer([f"{mine}:length", f"{mine}:noise", f"{mine}:bad"], [1, 0.1, 2], processes=processes) as scorer:
            scores = scorer.score([str(i) for i in range(n)], answers, [{"row": i} for i in range(n)])
        results.append((scores.total.tobytes(), {k: v.tobytes() for k, v in scores.parts.items()}, scores.failures))
    assert results[0] == results[1]
    expected = [len(a) + len(str(i)) / 8 + i / 64 for i, a in enumerate(answers)]
    assert scores.parts[f"{mine}:length"].tolist() == expected
    assert [failure.answer for failure in scores.failures] == list(range(0, n, 5))
    assert len(set(scores.parts[f"{mine}:noise"])) > 5


def test_a_function_of_weight_0_is_only_measured(mine):
    with Scorer([f"{mine}:bad", "exact"], [0, 1], processes=1) as scorer:
        scores = score(scorer, ["raise", "x"])
    assert scores.total.tolist() == [0, 1] and np.isnan(scores.parts[f"{mine}:bad"][0])


@pytest.mark.slow
def test_a_function_that_always_fails_is_left_out(mine):
    names = [f"{mine}:never", f"{mine}:hang", f"{mine}:eight", "exact"]
    with Scorer(names, [1, 1, 1, 1], time_limit_s=1.5, processes=4) as scorer:
        scores = score(scorer, [str(i) for i in range(50)])
        with pytest.raises(UserError) as error:
            scores.check()
        first, second, third = str(error.value).splitlines()
        assert first.startswith(f"reward.functions: all 8 calls of {mine}:never failed; the first: {mine}:never raised")
        assert "KeyError: '0' (line" in first and first.endswith(", for answer '0'")
        assert "hang took longer than 1.5 s" in second and "ZeroDivisionError" in third
        assert np.isfinite(scores.parts["exact"]).all() and len(scores.failures) == 24
        scores = score(scorer, ["8"] * 20)
        assert np.isfinite(scores.parts[f"{mine}:eight"]).all()
        scores = score(scorer, ["9"] * 20)  # it has worked before, so it is called for every answer
        assert [failure.name for failure in scores.failures].count(f"{mine}:eight") == 20


def test_no_answers(scorer):
    scores = score(scorer, [])
    assert scores.total.shape == (0,) and not scores.failures
    scores.check()


def test_jax_is_not_imported(mine):
    with Scorer([f"{mine}:jax", *rewards.FUNCTIONS], [1] + [0] * len(rewards.FUNCTIONS), processes=1) as scorer:
        assert score(scorer, ["1"], expected="1").total.tolist() == [0]


def test_invalid_arguments(mine):
    for arguments in (([], []), (["exact"], [1, 2]), (["exact"], [float("nan")])):
        with pytest.raises(UserError, match="reward.weights: expected"):
            Scorer(*arguments)
    for limit in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="reward.time_limit: expected a positive number"):
            Scorer(["exact"], [1], time_limit_s=limit)
    for name in ("exat", f"{mine}:nothing"):
        with pytest.raises(UserError, match="did you mean|no such function"), Scorer([name], [1]):
            pass
    scorer = Scorer(["exact"], [1])
    with pytest.raises(RuntimeError, match="with Scorer"):
        score(scorer, ["x"])
    with scorer, pytest.raises(ValueError, match="1 prompts, 2 answers"):
        scorer.score(["p"], ["a", "b"], [{}, {}])


def test_a_judge_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Scorer(["judge:m@http://127.0.0.1:1/v1"], [1], processes=1) as scorer:
        scores = score(scorer, ["x"])
    with pytest.raises(UserError, match="is the server running"):
        scores.check()


# --- the ends of processes


def gone(pid: int) -> bool:
    """Waits until a process has ended; the test's limit ends the wait."""
    while True:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":  # nobody waits for it here
                return True
        except (ProcessLookupError, FileNotFoundError):
            return not Path("/proc/self").exists() or not Path(f"/proc/{pid}").exists()
        time.sleep(0.02)


def pids(path: Path, n: int) -> list[int]:
    while not path.exists() or len(path.read_text().split()) < n or not path.read_text().endswith(" "):
        time.sleep(0.02)
    return [int(word) for word in path.read_text().split()]


def test_programs_that_a_function_started_end_with_it(mine, tmp_path):
    file = tmp_path / "pid"
    with Scorer([f"{mine}:bad"], [1], time_limit_s=1.0, processes=1) as scorer:
        assert len(score(scorer, ["program"], file=str(file)).failures) == 1
        assert gone(int(file.read_text()))


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with SIGINT ignored
from gptjax.evaluation.workers import Scorer
name, file, prompt, limit = sys.argv[1:]
with Scorer([name], [1], time_limit_s=float(limit), processes=2) as scorer:
    scorer.score([prompt] * 2, [file] * 2, [{}] * 2)
"""


def run(mine, file, prompt="", limit=1000.0):
    """Starts a program, without a guard for its main module, whose two workers are in calls that do not return."""
    command = [sys.executable, "-c", PROGRAM, f"{mine}:tell", str(file), prompt, str(limit)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.parametrize("prompt", ["", pytest.param("regex", marks=pytest.mark.slow)])
def test_no_process_outlives_a_parent_that_is_killed(mine, tmp_path, monkeypatch, prompt):
    with run(mine, tmp_path / "pids", prompt, 2.0) as parent:
        children = pids(tmp_path / "pids", 2)
        parent.kill()
    assert all(gone(pid) for pid in children)


def test_idle_processes_end_with_their_parent(mine):
    program = (
        "import os; from gptjax.evaluation.workers import *; s = Scorer(['exact'], [1], processes=2).__enter__(); "
    )
    program += "print(*(c._process.pid for c in s._children), flush=True); os.kill(os.getpid(), 9)"
    out = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True).stdout
    assert len(out.split()) == 2 and all(gone(int(pid)) for pid in out.split())


@pytest.mark.parametrize("group", [True, False])
def test_ctrl_c(mine, tmp_path, group):
    """A Ctrl-C in a terminal goes to all processes of the parent's group; one of a notebook to the parent alone."""
    with run(mine, tmp_path / "pids") as parent:
        children = pids(tmp_path / "pids", 2)
        (os.killpg if group else os.kill)(parent.pid, signal.SIGINT)
        _, err = parent.communicate()
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt") and parent.returncode
    assert all(gone(pid) for pid in children)


def test_processes_inherit_no_file_descriptors(mine, tmp_path):
    code = """
import os
def count(prompt, answer, example):
    return sum(os.path.realpath(f"/dev/fd/{i}") == answer for i in range(256) if os.path.exists(f"/dev/fd/{i}"))
"""
    (tmp_path / "fds.py").write_text(code)
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        with Scorer([f"{tmp_path}/fds.py:count"], [1], processes=1) as scorer:
            assert score(scorer, [os.path.realpath(tmp_path / "open")]).total.tolist() == [0]


def test_close_does_not_wait_for_calls(mine, tmp_path):
    with Scorer([f"{mine}:tell"], [1], time_limit_s=1000, processes=2) as scorer:
        thread = threading.Thread(target=score, args=(scorer, [str(tmp_path / "pids")] * 2))
        thread.start()
        children = pids(tmp_path / "pids", 2)
    thread.join()
    assert all(gone(pid) for pid in children)


# --- a child process


def test_a_child_and_its_replies():
    echo = [sys.executable, "-c", "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"]
    with Child(echo) as child:
        assert child.ask({"a": [1, None, "\n\ud800"]}, 60) == {"a": [1, None, "\n\ud800"]}
        with pytest.raises(ValueError, match="more than 100 bytes"):
            child.ask("x" * 1000, 60, max_bytes=100)
    with Child(echo) as child:
        with pytest.raises(TimeoutError, match="no reply within 0.1 s"):
            child.ask(None, 0.1)
        assert not child.alive
    child = Child([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"])
    with child, pytest.raises(EOFError, match="ended its process by SIGTERM"):
        child.ask("x" * 1_000_000, 60)
