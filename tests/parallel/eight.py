"""Run by `test_mesh.py` in processes with eight CPU devices: `python eight.py CASE [MESH ...]` prints JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gptjax
from gptjax import LoraConfig, lora, parallel, tree
from gptjax.checkpoint import Checkpoints
from gptjax.data.classification import LabelledBatch
from gptjax.losses import classify, distill, next_token
from gptjax.losses.distill import TeacherBatch
from gptjax.ops import fused
from gptjax.ops.attention import heads_attention
from gptjax.ops.flash import Tile, Tiles
from gptjax.optim import average_of, make_optimizer, with_average
from gptjax.parallel.mesh import mesh_of
from gptjax.training import loop
from gptjax.training.run_dir import read_metrics
from gptjax.types import Batch

STEPS, B, T, V = 20, 8, 32, 64
CFG = gptjax.ModelConfig(
    arch="llama", n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=64, context_length=T, vocab_size=V
)
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(shape) == 8]
# eps is large, because Adam would turn a gradient of pure rounding error into a full step
TX = make_optimizer(gptjax.OptimConfig(lr=1e-2, eps=1e-4, warmup_steps=3), STEPS)
LORA = LoraConfig(rank=4, dora=True)
RNG = np.random.default_rng(0)


class Case:
    """A training case: a loss, its batches, a config, and whether a LoRA adapter is trained."""

    def __init__(self, loss: Callable, batches: list, cfg=CFG, adapter: bool = False, tx=TX):
        self.loss, self.batches, self.cfg, self.adapter, self.tx = loss, batches, cfg, adapter, tx

    def state(self, mesh: Any) -> Any:
        def fresh(key: jax.Array) -> Any:
            params = gptjax.init_params(jax.random.key(0), self.cfg)
            trained, frozen = (lora.init(key, params, LORA), params) if self.adapter else (params, None)
            return gptjax.TrainState.create(trained, tx=self.tx, key=key, frozen=frozen)

        return parallel.init_on(fresh, mesh, jax.random.key(1))

    def step(self, accumulation: int = 1) -> Callable:
        options = dict(combine=lambda a, base: lora.attach(base, a, LORA)) if self.adapter else {}
        return gptjax.make_train_step(self.loss, self.tx, accumulation=accumulation, **options)

    def losses(self, mesh: Any, accumulation: int = 1) -> np.ndarray:
        return self.train(mesh, accumulation)[0]

    def train(self, mesh: Any, accumulation: int = 1) -> tuple[np.ndarray, Any]:
        """(losses, final state)."""
        state = self.state(mesh)
        step = parallel.jit_step(self.step(accumulation), mesh, state)
        values = []
        for batch in self.batches:
            state, metrics = step(state, parallel.place_batch(batch, mesh))
            values.append(float(metrics["loss"]))
        return np.array(values), state


def tokens() -> np.ndarray:
    return RNG.integers(0, V, (STEPS, B, T + 1)).astype(np.int32)


def packed(weights: Callable[[], np.ndarray]) -> list[Batch]:
    segments = np.sort(RNG.integers(1, 4, (STEPS, B, T)), -1).astype(np.int32)
    return [Batch(t[:, :-1], t[:, 1:], weights(), s) for t, s in zip(tokens(), segments, strict=True)]


def labelled() -> list[LabelledBatch]:
    segments = np.sort(RNG.integers(1, 4, (STEPS, B, T)), -1).astype(np.int32)
    labels = RNG.integers(0, 2, (STEPS, B, 3)).astype(np.int32)
    present = np.stack([(segments == k + 1).any(-1) for k in range(3)], -1).astype(np.float32)
    return [LabelledBatch(t[:, :-1], s, y, w) for t, s, y, w in zip(tokens(), segments, labels, present, strict=True)]


def taught(k: int = 4) -> list[TeacherBatch]:
    """Batches with the probabilities of k tokens, and of all others, under a teacher."""
    batches = packed(lambda: (RNG.random((B, T)) < 0.4).astype(np.float32))
    ids = np.argsort(RNG.random((STEPS, B, T, V)))[..., :k].astype(np.int32)
    log_probs = np.log(RNG.dirichlet(np.ones(k + 1), (STEPS, B, T))).astype(np.float32)
    return [TeacherBatch(*batch[:4], i, p) for batch, i, p in zip(batches, ids, log_probs, strict=True)]


WITH_HEAD = gptjax.ModelConfig(
    arch="gpt2", n_layer=2, n_head=4, d_model=32, context_length=T, vocab_size=V, n_classes=2
)
CASES = {
    "pretrain": lambda: Case(next_token(CFG), [Batch(t[:, :-1], t[:, 1:]) for t in tokens()]),
    "lora": lambda: Case(next_token(CFG), packed(lambda: np.ones((B, T), np.float32)), adapter=True),
    "classify": lambda: Case(classify(WITH_HEAD), labelled(), WITH_HEAD),
    "instruct": lambda: Case(next_token(CFG), packed(lambda: (RNG.random((B, T)) < 0.4).astype(np.float32))),
    "distill": lambda: Case(distill(CFG, CFG), taught()),
}


def mesh(shape: tuple[int, ...]) -> Any:
    return mesh_of(shape, jax.devices()[: int(np.prod(shape))])


def equal(kind: str, shapes: list) -> dict[str, float]:
    """{mesh shape: largest difference in loss, over all steps, from a single device}."""
    case = CASES[kind]()
    alone = case.losses(None)
    assert alone[-1] != alone[0] and np.isfinite(alone).all()
    return {str(shape): float(np.abs(case.losses(mesh(shape)) - alone).max()) for shape in shapes}


def accumulated() -> float:
    case = CASES["instruct"]()
    return float(np.abs(case.losses(mesh((2, 2, 1, 2)), 2) - case.losses(None)).max())


def pmapped() -> dict[str, float]:
    """Largest differences in loss and params between `pmap_step` and `jit` on one device."""
    case = CASES["instruct"]()
    states = [case.state(None), case.state(None)]
    pmap_step, jit_step = parallel.pmap_step(case.step()), jax.jit(case.step())
    worst = 0.0
    for batch in case.batches:
        shards = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), batch)
        states[0], a = pmap_step(states[0], shards)
        states[1], b = jit_step(states[1], batch)
        worst = max(worst, abs(float(a["loss"]) - float(b["loss"])))
    difference = jax.tree.map(lambda x, y: float(abs(np.asarray(x) - np.asarray(y)).max()), *(s.params for s in states))
    return {"loss": worst, "params": max(jax.tree.leaves(difference))}


def checkpointed() -> dict[str, Any]:
    """Save and restore on 8 -> 4 -> 2 -> 1 -> 8 devices: whether each restored state is bitwise equal, and the largest
    difference in loss from a single device."""
    case = CASES["pretrain"]()
    alone, state, losses, identical = case.losses(None), None, [], []
    shapes = [(2, 2, 2, 1), (1, 2, 1, 2), (2, 1, 1, 1), None, (1, 8, 1, 1)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        for i, shape in enumerate(shapes):
            here = None if shape is None else mesh(shape)
            if state is None:
                state = case.state(here)
            else:
                shapes_of = jax.eval_shape(case.state, None) if here is None else _abstract(case, here)
                read = checkpoints.restore(shapes_of).state
                identical.append(_bits(read) == _bits(state))
                state = read if here is None else parallel.place(read, parallel.shardings(read, here))
            step = parallel.jit_step(case.step(), here, state)
            for batch in case.batches[4 * i : 4 * i + 4]:
                state, metrics = step(state, parallel.place_batch(batch, here))
                losses.append(float(metrics["loss"]))
            checkpoints.save(4 * (i + 1), state, {})
    return {"same": identical, "loss": float(np.abs(np.array(losses) - alone).max())}


def _abstract(case: Case, here: Any) -> Any:
    shapes = jax.eval_shape(lambda: case.state(None))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, parallel.shardings(shapes, here),
    )  # fmt: skip


def _bits(state: Any) -> dict[str, bytes]:
    state = state.replace(key=jax.random.key_data(state.key))
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.flatten(state).items()}


def generated() -> bool:
    """Whether tensor-parallel params generate the same greedy tokens for a ragged batch as unsharded ones."""
    params = gptjax.init_params(jax.random.key(3), CFG)
    prompts = [RNG.integers(0, V, n).tolist() for n in (3, 7, 5, 4)]
    options = dict(max_new_tokens=12, key=jax.random.key(0))
    alone = gptjax.generate(params, prompts, CFG, **options)
    here = mesh((2, 1, 2, 1))
    cut = parallel.place_params(params, here)
    return parallel.on_mesh(gptjax.generate, here)(cut, prompts, CFG, **options) == alone


def attention() -> dict[str, float]:
    """Largest difference, in output and gradients, between the attention kernels on a mesh (run by interpreters) and
    XLA's attention on one device."""
    small = Tiles(*[Tile(32, 32)] * 3)
    runs = {
        "splash 1,1,2,4": (fused.splash, 512, {"interpret": True}),
        "splash 2,1,1,2": (fused.splash, 256, {"interpret": True, "window": 100}),
        "flash 2,1,2,2": (fused.flash, 76, {"interpret": True, "tiles": small, "window": np.int32(50)}),
        "flash 1,2,4,1": (fused.flash, 50, {"interpret": True, "tiles": small}),
        "cudnn 2,1,4,1": (fused.cudnn, 50, {"by": "xla", "window": 20}),
    }

    def both(fn: Callable, args: tuple, where: Any = None) -> list:
        def total(args: tuple) -> tuple:
            out = fn(*args)
            return jax.numpy.sin(out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True), out_shardings=where)(args)
        return [np.asarray(x) for x in (out, *gradients)]

    errors = {}
    for name, (kernel, length, options) in runs.items():
        here = mesh(tuple(map(int, name.split()[1].split(","))))
        args = tuple(RNG.normal(size=s).astype(np.float32) for s in ((2, length, 4, 16), *[(2, 2, length, 16)] * 2))
        ids = None if kernel is fused.cudnn else np.sort(RNG.integers(0, 4, (2, length)))
        seen = {"segment_ids": ids, "window": options.get("window", 0)}
        want = both(lambda *args, seen=seen: heads_attention(*args, **seen), args)
        with jax.set_mesh(here):
            whole = jax.NamedSharding(here, jax.P())
            got = both(lambda q, k, v, f=kernel, o={**seen, **options}: f(q / 4, k, v, **o), args, whole)
        errors[name] = max(float(np.abs(a - b).max()) for a, b in zip(want, got, strict=True))
    return errors


def switched() -> dict[str, list[float]]:
    """Largest differences in loss and in the average of the params between a mesh and one device, with the switches of
    the optimizer: without and with the cautious ones, whose masks may differ where rounding changes a sign."""
    differences = {}
    for name, masks in (("smooth", False), ("cautious", True)):
        cfg = gptjax.OptimConfig(
            name="muon", lr=1e-2, eps=1e-4, normuon=0.9, weight_decay_schedule="lr", cautious=masks,
            cautious_decay=masks,
        )  # fmt: skip
        tx = with_average(make_optimizer(cfg, STEPS), gptjax.Config(train=gptjax.TrainConfig(ema=0.8)))
        case = Case(next_token(CFG), [Batch(t[:, :-1], t[:, 1:]) for t in tokens()[:8]], tx=tx)
        (alone, single), (losses, state) = case.train(None), case.train(mesh((1, 2, 2, 2)))
        means = [average_of(s.params, s.opt_state) for s in (single, state)]
        apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), *means)
        differences[name] = [float(np.abs(losses - alone).max()), max(jax.tree.leaves(apart))]
    return differences


def finetuned() -> dict[str, dict[str, float]]:
    """For whole runs of `gptjax finetune` that train an adapter, on a mesh of all four axes and on one device: the
    largest difference in the training losses. In reward tuning also the fraction of equal answers, and the number of
    programs that are compiled after the third step and before the last."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    tokenizer, results = gptjax.tokenizers.load("bytes"), {}
    cfg = dataclasses.replace(CFG, context_length=64, vocab_size=260)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate(("base", "teacher")):
            gptjax.save(folder / model, gptjax.init_params(jax.random.key(seed), cfg), cfg, tokenizer)
        rows = [{"prompt": f"say {x}", "response": x} for x in "abcdefgh"] * 5
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "mine.py").write_text("def score(prompt, answer, example):\n    return float(answer.isascii())\n")
        for task, settings in {
            "distill": [f"distill.teacher={folder / 'teacher'}", "finetune.trainable=lora"],
            "reward": [
                f"reward.functions=[{folder / 'mine.py'}:score]", "reward.max_new_tokens=2", "reward.group=4",
                "reward.branches=rows", "reward.kl=0.1",
            ],
        }.items():  # fmt: skip
            losses, answers, new = [], [], 0
            for here in (None, mesh((2, 2, 2, 1)), mesh((1, 2, 2, 2))):
                loop.make_mesh = lambda *args, here=here, **options: here
                marks: list[int] = []
                run_dir = folder / f"{task}-{len(losses)}"
                run = gptjax.load_config(
                    None, f"task={task}", f"finetune.base={folder / 'base'}", f"{task}.source={folder / 'rows.jsonl'}",
                    f"{task}.style=phi3", f"{task}.context_length=48", f"run_dir={run_dir}", "optim.warmup_steps=0",
                    "optim.lr=1e-2", "optim.eps=1e-4", "train.epochs=null", "train.max_steps=8", "train.eval_every=8",
                    "train.log_every=1", "train.batch_size=16", "train.accumulation=1", *settings,
                )  # fmt: skip
                gptjax.train(
                    run, log=lambda line: None, hooks=[(1, lambda run, marks=marks: marks.append(len(compiled)))]
                )
                losses.append([row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row])
                if task == "reward":
                    lines = (run_dir / "rollouts.jsonl").read_text().split("\n")
                    answers.append([json.loads(line)["answer"] for line in lines[:-1]])
                    new += marks[6] - marks[2]
            apart = float(np.abs(np.array(losses[1:]) - losses[0]).max())
            results[task] = {"loss": apart, "learned": float(np.ptp(losses[0]))}
            if answers:
                results[task] |= {"answers": float(np.mean(np.array(answers[1:]) == answers[0])), "compiled": new}
    return results


OTHERS = {fn.__name__: fn for fn in (switched, accumulated, pmapped, checkpointed, generated, attention, finetuned)}


def main() -> None:
    case, *shapes = sys.argv[1:]
    if case in OTHERS:
        result = OTHERS[case]()
    else:
        third = shapes == ["third"]
        result = equal(case, MESHES[::3] if third else [tuple(map(int, s.split(","))) for s in shapes] or MESHES)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
