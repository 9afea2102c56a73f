"""Reward tuning (GRPO) of SmolLM2-135M-Instruct on the synthetic skills: what it gains, and how fast it is.

    python tests/bench/rewards.py skills [--seeds 3] [--steps 120] [--base RUN]
    python tests/bench/rewards.py speed [--steps 4] [--rollouts 32]
    python tests/bench/rewards.py logprobs [--tokens 10000]

`skills` tunes the model shortly by `gptjax finetune instruct`, so that it gives some right answers, then trains it for
each seed by `gptjax finetune reward` with the reward `exact`, and prints a Markdown table: exact answers to held-out
questions, whose words and numbers do not occur in training, before and after, with 95 % intervals.

`speed` trains an adapter for some steps, here and with TRL (extra [parity]) on the same model, prompts and sizes, and
prints seconds per step without the first one, the share of generation, and generated tokens per second relative to
`generate` alone on the same prompts.

`logprobs` draws answers at temperature 0.7 from the model with an adapter of random weights, to prompts of different
lengths, and prints how much the log-probabilities of the sampler differ from those that the trainer computes for the
same tokens, in float32, for both layouts of reward.branches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gptjax
from gptjax import losses, weights
from gptjax.data import rollouts, synthetic
from gptjax.evaluation.intervals import interval, t_interval
from gptjax.generation.decode import complete
from gptjax.generation.sampling import chain, temperature
from gptjax.model.gpt import for_decoding
from gptjax.tasks.on_policy import rollout
from gptjax.training.run_dir import read_metrics

SMOLLM = "smollm2-135m-instruct"
LONGEST = 24  # tokens per answer


def skills(args: argparse.Namespace) -> None:
    base = args.base or args.folder / "base"
    if args.base is None:
        gptjax.train(
            gptjax.load_config(
                "instruct", f"run_dir={base}", f"instruct.examples={args.examples}", "instruct.compare=false",
                "sample.max_new_tokens=24", "sample.batch_size=32",
            )
        )  # fmt: skip
    rows, gains, minutes = [], [], []
    for seed in range(args.seeds):
        run, began = args.folder / f"seed-{seed}", time.monotonic()
        gptjax.train(
            gptjax.load_config(
                "reward", f"run_dir={run}", f"finetune.base={base}", f"seed={seed}", f"train.max_steps={args.steps}",
                f"reward.max_new_tokens={LONGEST}", "reward.test_fraction=0.1", *args.settings,
            )
        )  # fmt: skip
        minutes.append((time.monotonic() - began) / 60)
        scores = json.loads((run / "test.json").read_text())
        rows.append((scores["before"], scores))
        gains.append(100 * (scores["exact"] - scores["before"]["exact"]))

    def exact(scores: dict) -> str:
        low, high = interval(scores["exact"] * scores["n"], scores["n"])
        return f"{scores['exact']:.1%} ({low:.1%} to {high:.1%})"

    print("| seed | questions | exact before | exact after | points | minutes |\n|---|---|---|---|---|---|")
    for seed, ((before, after), gain, spent) in enumerate(zip(rows, gains, minutes, strict=True)):
        print(f"| {seed} | {after['n']} | {exact(before)} | {exact(after)} | {gain:+.1f} | {spent:.1f} |")
    mean, low, high = t_interval(gains)
    print(f"\nmean gain {mean:+.1f} points" + ("" if low is None else f", 95 % interval {low:+.1f} to {high:+.1f}"))


def speed(args: argparse.Namespace) -> None:
    run = args.folder / "speed"
    settings = (
        f"run_dir={run}", f"finetune.base={SMOLLM}", f"train.max_steps={args.steps}", "train.eval_every=1000",
        "train.checkpoint_every=1000", f"train.batch_size={args.rollouts}", "train.accumulation=1",
        f"reward.max_new_tokens={LONGEST}", "reward.compare=false", "reward.examples=200", "train.resume=never",
    )  # fmt: skip
    gptjax.train(gptjax.load_config("reward", *settings, *args.settings))
    metrics = read_metrics(run)
    rolled = [row for row in metrics if "rollout/seconds" in row]
    ends = [row["seconds"] for row in metrics if "train/loss" in row]
    steps = [b - a for a, b in itertools.pairwise(ends)]
    ours, generated = statistics.median(steps), statistics.median(row["rollout/seconds"] for row in rolled[1:])
    tokens = args.rollouts * statistics.mean(row["rollout/length"] for row in rolled[1:])
    print(f"gptjax: {ours:.2f} s per step, generation {generated / ours:.0%}, {tokens / generated:,.0f} tokens/s")
    alone = generation_alone(args)
    print(f"generation alone: {alone:,.0f} tokens/s; rollouts have {tokens / generated / alone:.2f} of it")
    theirs = trl_step(args)
    print(f"TRL: {theirs:.2f} s per step; gptjax is {theirs / ours:.2f} times as fast")


def generation_alone(args: argparse.Namespace) -> float:
    """Returns tokens per second of `complete` on the questions of the first steps."""
    params, cfg = gptjax.load(SMOLLM)
    model = weights.open_model(SMOLLM)
    tokenizer = model.tokenizer()
    talks = synthetic.skills(200, 0)
    questions, _ = rollouts.questions(talks, tokenizer, longest=400)
    decoding, rates = for_decoding(params, cfg), []
    for step in range(args.steps):
        picked = rollouts.draw(len(questions), step, args.rollouts // 8, 0)
        began = time.monotonic()
        answers = complete(
            decoding, [questions[i].ids for i in picked], cfg, max_new_tokens=LONGEST, key=jax.random.key(step), n=8,
            sampler=chain(temperature(1.0)), stop=weights.stop_ids(tokenizer), vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        n = sum(len(answer.tokens) + (answer.end is not None) for answer in answers)
        rates.append(n / (time.monotonic() - began))
    return statistics.median(rates[1:])


def trl_step(args: argparse.Namespace) -> float:
    """Returns the seconds per step of TRL's GRPOTrainer, with a LoRA adapter of the same rank."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    folder = args.folder / "hf"
    if not folder.exists():
        weights.export_hf(folder, *gptjax.load(SMOLLM), weights.open_model(SMOLLM).tokenizer())
    rows = [
        {"prompt": list(talk.messages[:-1]), "expected": talk.messages[-1]["content"]}
        for talk in synthetic.skills(200, 0)
    ]

    def exact(completions: list, expected: list[str], **_: object) -> list[float]:
        return [float(c[0]["content"].strip() == e) for c, e in zip(completions, expected, strict=True)]

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.monotonic())

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=exact,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        args=GRPOConfig(
            output_dir=str(args.folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=args.rollouts,
            num_generations=8, max_completion_length=LONGEST, max_steps=args.steps, logging_steps=1000,
            save_strategy="no", report_to=[], learning_rate=1e-4, gradient_checkpointing=False,
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def logprobs(args: argparse.Namespace) -> None:
    params, cfg = gptjax.load(SMOLLM)
    tokenizer, settings = weights.open_model(SMOLLM).tokenizer(), gptjax.LoraConfig(rank=16)
    adapter = gptjax.lora.init(jax.random.key(1), params, settings)
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.01 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    adapted = gptjax.lora.attach(params, jax.tree.map(jnp.add, adapter, structure.unflatten(noise)), settings)
    questions, _ = rollouts.questions(synthetic.skills(2000, 0), tokenizer, longest=200)
    decoding, sampler, stop = for_decoding(adapted, cfg), chain(temperature(0.7)), weights.stop_ids(tokenizer)
    trained = jax.jit(lambda params, batch: losses.token_log_probs(params, batch, cfg, temperature=0.7))
    differences: dict[str, list[np.ndarray]] = {"rows": [], "tree": []}
    ended = answers = 0
    while sum(map(len, differences["rows"])) < args.tokens:
        picked = [questions[i] for i in range(answers // 8, answers // 8 + 8)]
        made = complete(
            decoding, [question.ids for question in picked], cfg, max_new_tokens=64, key=jax.random.key(answers), n=8,
            sampler=sampler, stop=stop, vocab_size=tokenizer.vocab_size, logprobs=0, logprobs_temperature=0.7,
        )  # fmt: skip
        flat = [rollout(picked[i // 8], answer) for i, answer in enumerate(made)]
        groups = [flat[i : i + 8] for i in range(0, len(flat), 8)]
        rows = rollouts.rollout_batch(flat, np.zeros(len(flat)), 264)
        trees = rollouts.tree_batch(
            groups, [rollouts.group_tree(g) for g in groups], np.zeros((8, 8)), 200 + 8 * 64, 64
        )
        for name, batch in (("rows", rows), ("tree", trees)):
            mine = losses.of_answers(trained(adapted, batch), batch).reshape(batch.old.shape)
            differences[name].append(np.abs(mine - batch.old)[batch.weights > 0])
        answers, ended = answers + len(made), ended + sum(answer.finish == "stop" for answer in made)
    print(f"{answers} answers to prompts of different lengths, {ended} of them ended before 64 tokens")
    print("| reward.branches | tokens | mean difference | 99.9 % below | largest |\n|---|---|---|---|---|")
    for name, values in differences.items():
        x = np.concatenate(values)
        print(f"| {name} | {len(x):,} | {x.mean():.1e} | {np.quantile(x, 0.999):.1e} | {x.max():.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("skills", "speed", "logprobs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-rewards"))
    parser.add_argument("settings", nargs="*", help="further settings of `gptjax finetune reward`")
    args = parser.parse_intermixed_args()
    args.steps = args.steps or {"skills": 120}.get(args.what, 4)
    {"skills": skills, "speed": speed, "logprobs": logprobs}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
