"""A reward model on held-out pairs, and how much best-of-n, majority and mean log-probability gain over greedy answers.

    python tests/bench/best_of_n.py [--pairs 600] [--examples 400] [--questions 40] [--n 8] [--temperature 1.0]
                                    [--base MODEL] [--runs FOLDER] [a.b=c ...]

Trains a reward model with the preset reward_model on synthetic pairs, and a policy with the preset instruct on few
synthetic questions, so that it is often wrong; both from the same base. The policy answers questions whose words and
numbers do not occur in training: once greedily and n times at random. Prints the accuracy of the reward model on
held-out pairs, and the exact match of each choice with its 95 % interval. "any of n" is the fraction of questions with
a right answer among the samples, which no choice can exceed. A repeated command resumes the runs in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import gptjax
from gptjax.data import synthetic
from gptjax.data.conversations import render_all
from gptjax.evaluation.intervals import interval
from gptjax.generation import best_of_n, by_logprob, chain, complete, majority, sequence_rewards, temperature
from gptjax.tokenizers.base import whole_tokens
from gptjax.tokenizers.chat import end_of_answer
from gptjax.weights import stop_ids

BATCH_SIZE, MAX_NEW_TOKENS = 8, 32


def train(preset: str, run_dir: Path, *settings: str) -> float:
    """Train the preset, and return the seconds that it took."""
    start = time.monotonic()
    gptjax.finetune(gptjax.load_config(preset, f"run_dir={run_dir}", *settings))
    return time.monotonic() - start


def line(name: str, right: list[bool]) -> str:
    low, high = interval(sum(right), len(right))
    return f"{name:24} {np.mean(right):.1%} (95 % interval {low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("pairs", 600), ("examples", 400), ("questions", 40), ("n", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--runs", type=Path, default=Path("runs/best-of-n"))
    parser.add_argument("settings", nargs="*", help="settings of both runs, such as train.batch_size=2")
    args = parser.parse_args()

    common = [f"finetune.base={args.base}", *args.settings]
    judge, policy = args.runs / "reward_model", args.runs / "policy"
    seconds = train("reward_model", judge, f"reward_model.examples={args.pairs}", *common)
    scores = json.loads((judge / "test.json").read_text())
    low, high = scores["accuracy_interval"]
    print(
        f"reward model: {scores['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) of {scores['pairs']} held-out "
        f"pairs, margin {scores['margin']:.2f}, trained in {seconds:.0f} s",
        flush=True,
    )
    few = ["instruct.compare=false", "instruct.test_fraction=0.01"]  # test questions; there are others below
    seconds = train("instruct", policy, f"instruct.examples={args.examples}", *few, *common)
    print(f"policy: trained in {seconds:.0f} s", flush=True)

    params, cfg = gptjax.load(policy)
    reward_params, reward_cfg = gptjax.load(judge)
    tokenizer = gptjax.tokenizers.load(policy)
    end = whole_tokens(tokenizer)[end_of_answer(tokenizer)]
    talks = synthetic.skills(args.questions, 1, held_out=True)
    prompts = [[i for span in spans[:-1] for i in span.ids] for spans in render_all(talks, tokenizer)]
    sampler = chain(temperature(args.temperature))
    right: dict[str, list[bool]] = {}
    start = time.monotonic()
    for first in range(0, len(talks), BATCH_SIZE):
        batch = prompts[first : first + BATCH_SIZE]
        common_args = dict(
            max_new_tokens=MAX_NEW_TOKENS, stop=stop_ids(tokenizer), vocab_size=tokenizer.vocab_size,
            key=jax.random.fold_in(jax.random.key(0), first),
        )  # fmt: skip
        greedy = complete(params, batch, cfg, **common_args)
        samples = complete(params, batch, cfg, n=args.n, logprobs=0, sampler=sampler, **common_args)
        for i in range(len(batch)):
            expected = talks[first + i].messages[-1]
            of_question = samples[i * args.n : (i + 1) * args.n]
            texts = [tokenizer.decode(c.tokens) for c in of_question]
            answers = [[*batch[i], *c.tokens, *([end] if c.finish == "stop" else [])] for c in of_question]
            rewards = sequence_rewards(reward_params, reward_cfg, answers)
            is_right = [text == expected["content"] for text in texts]
            chosen = {
                "greedy": tokenizer.decode(greedy[i].tokens) == expected["content"],
                "one sample, on average": float(np.mean(is_right)),
                f"best of {args.n} by reward": is_right[best_of_n(texts, rewards).choice],
                f"majority of {args.n}": is_right[majority(texts).choice],
                f"mean log-probability of {args.n}": is_right[by_logprob(of_question).choice],
                f"any of {args.n}": any(is_right),
            }
            for name, value in chosen.items():
                right.setdefault(name, []).append(value)
    print(f"{len(talks)} held-out questions, answered in {time.monotonic() - start:.0f} s, exact match:")
    print("\n".join(line(name, values) for name, values in right.items()))


if __name__ == "__main__":
    main()
