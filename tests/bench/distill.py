"""A student of 30 M parameters distilled from SmolLM2-135M-Instruct, compared with the same student without a teacher.

    python tests/bench/distill.py [--seeds 3] [--teacher RUN] [--examples 8000] [--epochs 1] [--alphas 1 0.5 0]
        [--on-policy 0 0.5 1] [distill.max_new_tokens=32 ..]

The teacher is instruction-tuned on the synthetic skills (preset `instruct`), unless --teacher names a run. The students
are Llama models with random weights and the teacher's tokenizer; seed i sets their weights, their texts and the order
of the texts. All are trained by `gptjax finetune distill` for the same number of steps; alpha=1 is training on the
texts alone. --on-policy lists values of distill.on_policy, the fraction of the batches that are the student's own
answers; each is combined with each alpha, and if one is not 0, all students have one conversation per row, so that they
see as many conversations. Prints a Markdown table with the mean over the seeds and, in brackets, the range: exact
answers to held-out questions, loss per response token, and how often the teacher and the student have the same most
probable token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import gptjax
from gptjax.evaluation.generation_metrics import scores
from gptjax.tasks import instruct

ON_POLICY = ("distill.sampling_temperature=", "distill.max_new_tokens=")  # settings of the students with own answers
STUDENT = dict(arch="llama", n_layer=6, n_head=6, n_kv_head=2, d_model=384, d_ff=1024, tie_embeddings=True)


def student(folder: Path, seed: int, teacher: Path, context_length: int) -> Path:
    """Writes a model with random weights and the tokenizer of the teacher."""
    _, teacher_cfg = gptjax.load(teacher)
    cfg = gptjax.ModelConfig(**STUDENT, vocab_size=teacher_cfg.vocab_size, context_length=context_length)
    path = folder / f"student-{seed}"
    gptjax.save(path, gptjax.init_params(jax.random.key(seed), cfg), cfg, gptjax.tokenizers.load(teacher))
    return path


def exact(run: Path, seed: int, questions: int) -> float:
    """Returns the share of exact answers to held-out questions."""
    cfg = gptjax.load_config("instruct", f"seed={seed}", f"instruct.examples={10 * questions}")
    params, model = gptjax.load(run)
    talks = instruct.conversations(cfg, []).test[:questions]
    rows = instruct.answers(params, dataclasses.replace(cfg, model=model), gptjax.tokenizers.load(run), talks)
    return scores(rows)["exact"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1, 0.5, 0])
    parser.add_argument("--on-policy", type=float, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-distill"))
    parser.add_argument("settings", nargs="*", help="further settings of `gptjax finetune distill`")
    args = parser.parse_args()
    teacher = args.teacher or args.folder / "teacher"
    if args.teacher is None:
        gptjax.train(gptjax.load_config("instruct", f"run_dir={teacher}", f"instruct.examples={args.examples}"))
    cases = [(alpha, own) for alpha in args.alphas for own in args.on_policy]
    rows: dict[tuple[float, float], list[tuple[float, float, float]]] = {case: [] for case in cases}
    for seed in range(args.seeds):
        base = student(args.folder, seed, teacher, 512)
        for alpha, own in cases:
            name, layout = f"alpha-{alpha:g}", []
            if any(args.on_policy):
                name += f"-on-policy-{own:g}"
                layout = [f"distill.on_policy={own}"] if own else ["distill.packing=padded"]
            run = args.folder / f"{name}-seed-{seed}"
            cfg = gptjax.load_config(
                "distill", f"distill.teacher={teacher}", f"finetune.base={base}", f"run_dir={run}", f"seed={seed}",
                f"distill.alpha={alpha}", f"distill.examples={args.examples}", f"train.epochs={args.epochs}",
                *layout, *(text for text in args.settings if own or not text.startswith(ON_POLICY)),
            )  # fmt: skip
            gptjax.train(cfg)
            test = json.loads((run / "test.json").read_text())
            rows[alpha, own].append((exact(run, seed, args.questions), test["loss"], test["agreement"]))
    print(f"\n| student, {args.seeds} seeds | exact answers | loss per token | agreement with the teacher |")
    print("|---|---|---|---|")
    for (alpha, own), values in rows.items():
        cells = [f"{np.mean(column):.3f} ({min(column):.3f}-{max(column):.3f})" for column in zip(*values, strict=True)]
        name = "texts alone" if (alpha, own) == (1, 0) else f"alpha {alpha:g}"
        print(f"| {name}{f', on-policy {own:g}' if own else ''} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
