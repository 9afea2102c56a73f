"""A reward model trained on samples of the policy, and how much best-of-n and others gain over greedy answers.

    python tests/bench/best_of_n.py [--policy RUN] [--examples 500] [--scored FILE] [--train 400] [--base MODEL]
                                    [--questions 200] [--n 8] [--temperature 1.0] [--runs FOLDER] [a.b=c ...]

The policy is a run of `gptjax finetune instruct`, or is made by one on few synthetic questions, so that it is often
wrong. The preset reward_model makes a reward model from `base` (the policy by default). Its pairs are right and wrong
answers of the policy: those in a file of scored answers, such as rollouts.jsonl of a run of `gptjax finetune reward`
that starts from the policy, or n samples for each of some training questions. Then the policy answers held-out
questions, whose words and numbers do not occur in training: once greedily and n times at random.

Prints the accuracy of the reward model on pairs of the held-out samples and on held-out synthetic pairs; and of each
choice the exact match with its 95 % interval, and for how many questions it is right where greedy is wrong, and the
reverse, with the p-value of McNemar's exact test. "any of n" is the fraction of questions with a right answer among the
samples, which no choice can exceed. A repeated command reads the answers and resumes the runs in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import binomtest

import gptjax
from gptjax.data import preferences, synthetic
from gptjax.data.conversations import Conversation, render_all
from gptjax.evaluation.generation_metrics import is_exact
from gptjax.evaluation.intervals import interval
from gptjax.generation import best_of_n, chain, complete, greedy, majority, reward_scores, temperature
from gptjax.model.gpt import for_decoding
from gptjax.tokenizers.base import found_in
from gptjax.weights import stop_ids

BATCH_SIZE, MAX_NEW_TOKENS = 16, 24


def train(preset: str, run_dir: Path, *settings: str) -> Path:
    """Trains the preset, and returns its run directory."""
    start = time.monotonic()
    gptjax.finetune(gptjax.load_config(preset, f"run_dir={run_dir}", *settings))
    print(f"{run_dir.name}: trained in {time.monotonic() - start:.0f} s", flush=True)
    return run_dir


def answer(policy: Path, talks: Sequence[Conversation], file: Path, n: int, degree: float) -> list[list[dict]]:
    """Returns n answers to each question with their rewards (1 if exact, else 0), and writes them to a file of scored
    answers, from which `reward_model.source` makes pairs. If the file exists, reads it.

    Args:
        degree: the temperature; 0: greedy.
    """
    if not file.exists():
        start = time.monotonic()
        params, cfg = gptjax.load(policy)
        tokenizer, params = gptjax.tokenizers.load(policy), for_decoding(params, cfg)
        prompts = [[i for span in spans[:-1] for i in span.ids] for spans in render_all(talks, tokenizer)]
        sampler = chain(temperature(degree)) if degree else greedy
        rows = []
        for first in range(0, len(talks), BATCH_SIZE):
            completions = complete(
                params, prompts[first : first + BATCH_SIZE], cfg, n=n, max_new_tokens=MAX_NEW_TOKENS, logprobs=0,
                key=jax.random.fold_in(jax.random.key(0), first), sampler=sampler, stop=stop_ids(tokenizer),
                vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            for i, completion in enumerate(completions):
                question, expected = (message["content"] for message in talks[first + i // n].messages)
                text = tokenizer.decode(completion.tokens)
                rows.append(
                    {"prompt": question, "expected": expected, "answer": text}
                    | {"reward": float(is_exact(text, expected)), "logprob": float(np.mean(completion.logprobs or -99))}
                )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{file.name}: {len(rows)} answers in {time.monotonic() - start:.0f} s", flush=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == n * len(talks), f"{file}: expected {n * len(talks)} answers, got {len(rows)}: remove it"
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def line(name: str, right: Sequence[Any]) -> str:
    low, high = interval(sum(right), len(right))
    return f"{name:32} {np.mean(right):.1%} (95 % interval {low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("examples", 500), ("train", 400), ("questions", 200), ("n", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--scored", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--runs", type=Path, default=Path("runs/best-of-n"))
    parser.add_argument("settings", nargs="*", help="settings of the reward model, such as optim.lr=1e-3")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)

    few = (f"instruct.examples={args.examples}", "instruct.compare=false", "instruct.test_fraction=0.01")
    policy = args.policy or train("instruct", args.runs / "policy", *few)
    scored = args.scored or args.runs / "train.jsonl"
    if args.scored is None:
        answer(policy, synthetic.skills(args.train, 1), scored, args.n, args.temperature)
    talks = synthetic.skills(args.questions, 1, held_out=True)
    first = answer(policy, talks, args.runs / "greedy.jsonl", 1, 0)
    drawn = answer(policy, talks, args.runs / "held_out.jsonl", args.n, args.temperature)
    judge = train(
        "reward_model", args.runs / "reward_model", f"finetune.base={args.base or policy}",
        f"reward_model.source={scored}", "reward_model.test_fraction=0.05", *args.settings,
    )  # fmt: skip
    params, cfg = gptjax.load(judge)
    tokenizer = gptjax.tokenizers.load(judge)

    def accuracy(pairs: Sequence[preferences.Pair]) -> list[bool]:
        chosen, rejected = (reward_scores(params, cfg, tokenizer, side) for side in zip(*pairs, strict=True))
        return (chosen > rejected).tolist()

    special = tokenizer.special_tokens
    held_out = preferences.read(str(args.runs / "held_out.jsonl"), [], special)
    print(line(f"{len(held_out)} pairs of held-out samples", accuracy(held_out)))
    made = preferences.of_mistakes(args.questions, 1, held_out=True)
    print(line(f"{len(made)} synthetic held-out pairs", accuracy(made)))

    right: dict[str, list[float]] = {}
    for talk, (greedy_row,), rows in zip(talks, first, drawn, strict=True):
        texts, is_right = [row["answer"] for row in rows], [row["reward"] for row in rows]
        written = [i for i, text in enumerate(texts) if text.strip() and not found_in(text, special)]
        asked = [Conversation((talk.messages[0], {"role": "assistant", "content": texts[i]}), "") for i in written]
        rewards = np.full(len(texts), -np.inf)
        rewards[written] = reward_scores(params, cfg, tokenizer, asked)
        shares = np.exp(rewards - rewards.max())
        chosen = {
            "greedy": greedy_row["reward"],
            "one sample, on average": float(np.mean(is_right)),
            f"best of {args.n} by reward": is_right[best_of_n(texts, rewards).choice],
            f"majority of {args.n}": is_right[majority(texts).choice],
            f"majority of {args.n}, by exp(reward)": is_right[majority(texts, shares).choice],
            f"mean log-probability of {args.n}": is_right[int(np.argmax([row["logprob"] for row in rows]))],
            f"any of {args.n}": max(is_right),
        }
        for name, value in chosen.items():
            right.setdefault(name, []).append(value)
    print(f"{len(talks)} held-out questions, exact match:")
    before = np.array(right["greedy"])
    for name, values in right.items():
        won, lost = int((np.array(values) > before).sum()), int((np.array(values) < before).sum())
        paired = "" if name.startswith(("greedy", "one", "any")) else f", {won} won and {lost} lost against greedy"
        p = f", p = {binomtest(won, won + lost).pvalue:.3g}" if paired and won + lost else ""
        print(line(name, values) + paired + p)


if __name__ == "__main__":
    main()
