"""Runs of every kind that are killed by SIGKILL and started again end with the same results.

These tests take minutes and run only with GPTJAX_KILLS=1, as in .ci/run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import gptjax
from gptjax.training.run_dir import read_metrics

pytestmark = pytest.mark.skipif(not os.environ.get("GPTJAX_KILLS"), reason="minutes: GPTJAX_KILLS=1 runs it")
CLOCK = ("seconds", "tokens_per_s", "rollout/seconds")
BASE = gptjax.ModelConfig(arch="llama", n_layer=1, n_head=2, d_model=16, d_ff=24, context_length=128, vocab_size=257)

# All files of a run but metrics.jsonl and rollouts.jsonl are written by renaming. This program kills itself before
# (odd) or after (even) a chosen rename.
PROGRAM = """
import os, signal, sys
left = int(sys.argv.pop(1))
def deadly(move):
    def moved(*args, **kwargs):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        result = move(*args, **kwargs)
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return result
    return moved
os.rename, os.replace = deadly(os.rename), deadly(os.replace)
from gptjax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    for seed, name in enumerate(("base", "teacher")):
        params = gptjax.init_params(jax.random.key(seed), BASE)
        gptjax.save(folder / name, params, BASE, gptjax.tokenizers.load("bytes"))
    rows = [{"prompt": f"say {x}", "chosen": x * 2, "rejected": "no"} for x in "abcdefgh"] * 5
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"say {x}", "response": x} for x in "abcdefgh"] * 5
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ascii = "def ascii(prompt, answer, example):\n    return sum(x < '\\x80' for x in answer) / max(len(answer), 1)\n"
    (folder / "mine.py").write_text(ascii)
    texts = [(label, label * n) for label in ("up", "DOWN") for n in range(1, 31)]
    (folder / "texts.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in texts))
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 100)
    return folder


def command(folder: Path, kind: str, run_dir: Path) -> list[str]:
    steps = ["train.max_steps=8", "train.eval_every=4", "train.checkpoint_every=4", "train.batch_size=4"]
    tuned = [
        f"finetune.base={folder / 'base'}", f"run_dir={run_dir}", "optim.warmup_steps=0", "train.epochs=null", *steps,
        "optim.lr=1e-2", "optim.eps=1e-4", "lora.rank=2",
    ]  # fmt: skip
    return {
        "prefer": [
            "finetune", "prefer", "prefer.style=phi3", f"prefer.source={folder / 'pairs.jsonl'}",
            "prefer.context_length=128", *tuned,
        ],
        "reward_model": [
            "finetune", "reward_model", "reward_model.style=phi3", f"reward_model.source={folder / 'pairs.jsonl'}",
            "reward_model.context_length=128", *tuned,
        ],
        "distill": [
            "finetune", "distill", "distill.style=phi3", f"distill.source={folder / 'rows.jsonl'}", "distill.top_k=8",
            f"distill.teacher={folder / 'teacher'}", "distill.context_length=64", "finetune.trainable=lora", *tuned,
        ],
        "reward": [
            "finetune", "reward", "reward.style=phi3", f"reward.source={folder / 'rows.jsonl'}", "reward.group=2",
            f"reward.functions=[{folder / 'mine.py'}:ascii]", "reward.max_new_tokens=4", "reward.context_length=64",
            "reward.updates=2", "reward.kl=0.1", *tuned,
        ],
        "seeds": ["finetune", "classify", f"classify.source={folder / 'texts.tsv'}", "finetune.seeds=2", *tuned],
        "together": [
            "finetune", "classify", f"classify.source={folder / 'texts.tsv'}", "finetune.seeds=2",
            "finetune.together=true", *tuned,
        ],
        "sweep": [
            "sweep", "tiny-gpt2", f"data.source={folder / 'text.txt'}", "tokenizer.name=bytes", f"run_dir={run_dir}",
            "model.d_model=16", "model.n_layer=1", "model.context_length=16", "optim.lr=[1e-3,3e-3]", "seed=range(2)",
            *steps,
        ],
    }[kind]  # fmt: skip


def start(
    folder: Path, kind: str, run_dir: Path, left: int = 10**9, after_s: float | None = None
) -> subprocess.CompletedProcess:
    """Starts a run, which kills itself when `left` more renames have begun or ended, or is killed `after_s` seconds
    after the first new line in rollouts.jsonl."""
    line = [sys.executable, "-c", PROGRAM, str(left), *command(folder, kind, run_dir)]
    env = {**os.environ, "GPTJAX_CACHE": str(folder / "cache")}
    if after_s is None:
        return subprocess.run(line, capture_output=True, text=True, timeout=120, env=env)
    file, began = run_dir / "rollouts.jsonl", time.time()
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        while process.poll() is None and not (file.exists() and file.stat().st_mtime > began and file.stat().st_size):
            time.sleep(0.005)
        time.sleep(after_s)
        process.kill()
        return subprocess.CompletedProcess(line, process.wait(), *process.communicate())


def result(run_dir: Path) -> dict:
    """The models, metrics, rollouts, file names and sweep rows of a run, without timings."""
    models = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*.safetensors")
        if "checkpoints" not in path.parts
    }
    rows = {
        str(path.relative_to(run_dir)): [
            {name: value for name, value in row.items() if name not in CLOCK} for row in read_metrics(path.parent)
        ]
        for path in run_dir.rglob("metrics.jsonl")
    }
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    sweep, rollouts = run_dir / "sweep.json", run_dir / "rollouts.jsonl"
    table = json.loads(sweep.read_text())["rows"] if sweep.exists() else []
    answers = [json.loads(line) for line in rollouts.read_text().split("\n")[:-1]] if rollouts.exists() else []
    names = {name for name in names if "checkpoints/" not in name}
    return {"models": models, "rows": rows, "names": names, "table": table, "answers": answers}


@pytest.fixture(scope="module")
def oracle(folder):
    """oracle(kind) -> (folder, `result`) of an uninterrupted run."""
    done: dict = {}

    def make(kind):
        if kind not in done:
            run_dir = folder / f"{kind}-whole"
            ended = start(folder, kind, run_dir)
            assert ended.returncode == 0, ended.stderr
            done[kind] = run_dir, result(run_dir)
        return done[kind]

    return make


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "kills", "max_renames"),
    [
        ("prefer", 8, 16), ("distill", 8, 16), ("reward_model", 8, 16), ("reward", 8, 16), ("seeds", 10, 16),
        ("together", 8, 16), ("sweep", 4, 4),
    ],
)  # fmt: skip
def test_killed_runs_end_like_uninterrupted_ones(kind, kills, max_renames, folder, oracle, tmp_path):
    whole, expected = oracle(kind)
    shutil.rmtree(folder / "cache" / "teachers", ignore_errors=True)
    run_dir, draw, killed = tmp_path / whole.name, random.Random(kills), 0
    while killed < kills:
        ended = start(folder, kind, run_dir, draw.randint(1, max_renames))
        if ended.returncode == 0:
            break  # the run ended before the chosen rename
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        killed += 1
    for _ in range(4 if kind == "reward" else 0):
        ended = start(folder, kind, run_dir, after_s=draw.uniform(0, 3))
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        killed += ended.returncode != 0
    ended = start(folder, kind, run_dir)
    print(f"{kind}: {killed} kills")
    sweep_complete = kind == "sweep" and ended.returncode == 2 and "holds a sweep already" in ended.stderr
    assert killed and (ended.returncode == 0 or sweep_complete), ended.stderr
    assert "Traceback" not in ended.stderr and "damaged" not in ended.stdout
    assert result(run_dir) == expected
    for name in ("test.json", "seeds.json"):
        for path in whole.rglob(name):
            scores = json.loads((run_dir / path.relative_to(whole)).read_text())
            assert numeric(scores) == pytest.approx(numeric(json.loads(path.read_text())), abs=1e-4)


def numeric(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}
