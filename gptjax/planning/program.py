"""The programs themselves, compiled for devices that are only described: the train step and the decode step."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import losses, parallel, tree
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.cache import init_cache
from gptjax.model.gpt import abstract_params, extend, init_params
from gptjax.ops import device
from gptjax.optim import make_optimizer
from gptjax.tasks import find, trainable, tuning
from gptjax.training.step import TrainState, make_train_step
from gptjax.training.task import identity


class Program(NamedTuple):
    """A compiled step, or what the compiler said instead of compiling it."""

    parts: dict[str, int]  # bytes a chip of what lasts: params, optimizer, frozen, batch, cache
    compiled: jax.stages.Compiled | None  # None where it does not fit
    needed_bytes: int  # of HBM a chip, all in all
    usable_bytes: int  # 0: the compiler did not say
    seconds: float  # of tracing and compiling
    host_bytes: int = 0  # a chip, in the memory of its host


def train_program(cfg: Config, mesh: Mesh, *, chunk: int | None = None) -> Program:
    """The train step of `cfg` as `gptjax pretrain` or `gptjax finetune` runs it; cfg.model is the base's.

    Args:
        chunk: of pretraining, tokens whose logits are alive at once; None: the loss chooses.

    Raises:
        UserError: a mesh that does not fit the batch; a pattern that matches nothing.
    """
    rows, T = cfg.train.batch_size, width(cfg)
    if (rows // cfg.train.accumulation) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"train.batch_size / train.accumulation ({rows // cfg.train.accumulation} rows) must be divisible by "
            f"mesh.data x mesh.fsdp ({mesh.shape['data'] * mesh.shape['fsdp']}): take more rows or another mesh"
        )
    task = find(cfg.task)
    if cfg.task == "pretrain":
        tx, loss = make_optimizer(cfg.optim, cfg.train.max_steps), losses.next_token(cfg.model, chunk=chunk)
    else:
        tx, loss = trainable.optimizer(cfg), trainable.with_dropout(cfg, task.loss(cfg))
    create, combine = _state(cfg, tx)
    step = make_train_step(loss, tx, combine=combine, accumulation=cfg.train.accumulation)
    batch = task.batch_shapes(cfg, rows, T)
    started = time.monotonic()
    with device.compiling_for("tpu"):
        state = parallel.abstract_on(create, mesh, jax.eval_shape(lambda: jax.random.key(0)), offload=cfg.optim.offload)
        batch = _placed(batch, parallel.batch_shardings(batch, mesh, context_length=T))
        outs = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, P()))
        with jax.set_mesh(mesh):
            lowered = jax.jit(step, donate_argnums=0, out_shardings=outs).lower(state, batch)
    parts = {"params": state.params, "optimizer": state.opt_state, "frozen": state.frozen, "batch": batch}
    return _compiled(lowered, {name: bytes_a_chip(part) for name, part in parts.items()}, started)


def width(cfg: Config) -> int:
    """Tokens of a row."""
    return cfg.window if cfg.task == "pretrain" else tuning.longest_row(cfg, cfg.model)


def _state(
    cfg: Config, tx: optax.GradientTransformation
) -> tuple[Callable[[jax.Array], TrainState], Callable[[Any, Any], Any]]:
    """(key -> TrainState, combine)."""
    combine = [identity]

    def create(key: jax.Array) -> TrainState:
        params = init_params(key, cfg.model)
        if cfg.task == "pretrain":
            return TrainState.create(params, tx=tx, key=key)
        parts = trainable.partition(cfg, *trainable.split_heads(params), cfg.model, key)
        combine[:] = [parts.combine]  # which depends on what was traced in its names only
        return TrainState.create(parts.params, tx=tx, key=key, frozen=parts.frozen)

    return create, lambda trained, frozen: combine[0](trained, frozen)


def decode_program(cfg: Config, mesh: Mesh, rows: int) -> Program:
    """One token for each of `rows` sequences, after a cache of the whole context; weights and cache in bfloat16
    where the model computes in it."""
    model, dtype = cfg.model, jnp.dtype(cfg.model.dtype)
    started = time.monotonic()
    with device.compiling_for("tpu"):
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(model))
        params = _placed(params, parallel.shardings(params, mesh))
        cache = jax.eval_shape(lambda: dataclasses.replace(init_cache(model, rows, dtype=dtype), empty=False))
        cache = _placed(cache, parallel.cache_shardings(cache, mesh))
        tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
        tokens = _placed(tokens, parallel.batch_shardings(tokens, mesh))

        def step(params, tokens, cache):
            return extend(params, tokens, model, cache)

        with jax.set_mesh(mesh):
            lowered = jax.jit(step, donate_argnums=2).lower(params, tokens, cache)
    parts = {"params": params, "batch": tokens, "cache": cache}
    return _compiled(lowered, {name: bytes_a_chip(part) for name, part in parts.items()}, started)


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract, shardings)


def bytes_a_chip(abstract: Any) -> int:
    """Of a tree of abstract arrays, by their shardings; random keys, of some bytes, and what lies in the memory of the
    hosts are left out."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(abstract)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) and leaf.sharding.memory_kind != "pinned_host"
    ]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _compiled(lowered: jax.stages.Lowered, parts: dict[str, int], started: float) -> Program:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, usable = out_of_memory(str(error), sum(parts.values()))
        if not needed:
            raise
        return Program(parts, None, needed, usable, time.monotonic() - started)
    memory: Any = compiled.memory_analysis()
    host_bytes = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    return Program(parts, compiled, peak_bytes(memory), 0, time.monotonic() - started, host_bytes)


def peak_bytes(memory: Any) -> int:
    """The most that is alive at once, and the program; of an older jax all that is ever allocated, which is more.

    The compiler's peak counts what lies in the host's memory (optim.offload) too: that is taken off.
    """
    peak = getattr(memory, "peak_memory_in_bytes", 0) and (
        memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    )
    peak = peak or (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )  # fmt: skip
    return peak + memory.generated_code_size_in_bytes


def out_of_memory(message: str, lasting_bytes: int = 0) -> tuple[int, int]:
    """(needed, usable) bytes as the compiler says them; zeros where the message is about something else.

    Used 18.81G of 15.75G hbm
    the total memory required for HLO temporaries (47.73G) exceeds available HBM (31.25G)     without what lasts
    """
    whole = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    part = re.search(r"temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if (found := whole or part) is None:
        return 0, 0
    needed, usable = (
        int(float(text[:-1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[text[-1]]) for text in found.groups()
    )
    return needed + (0 if whole else lasting_bytes), usable


def count(cfg: Config) -> int:
    """Parameters of the model."""
    return tree.size(abstract_params(cfg.model))
