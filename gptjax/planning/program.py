"""This module compiles training and decode steps ahead of time for a TPU topology, without a TPU."""

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
from gptjax._moved import moved_name
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.cache import init_cache
from gptjax.model.gpt import abstract_params, extend, init_params
from gptjax.ops import device
from gptjax.optim import make_optimizer, with_average
from gptjax.tasks import distill, find, trainable, tuning
from gptjax.training.step import TrainState, make_train_step
from gptjax.training.task import identity


class Program(NamedTuple):
    """Holds a compiled training or decode step.

    If the step does not fit in memory, `compiled` is None and `needed_bytes` is the memory that the step would need.
    """

    # `argument_bytes` is the bytes per chip of each argument: params, optimizer, frozen, batch or cache.
    argument_bytes: dict[str, int]
    compiled: jax.stages.Compiled | None  # `compiled` is None if the step does not fit in memory.
    needed_bytes: int  # `needed_bytes` is the peak HBM per chip in bytes.
    usable_bytes: int  # `usable_bytes` is the HBM per chip in bytes that the compiler can use, or 0 if unknown.
    seconds: float  # `seconds` is the time to trace and compile the step, in seconds.
    host_bytes: int = 0  # `host_bytes` is the host memory in bytes that the step uses per chip.


def train_program(cfg: Config, mesh: Mesh, *, chunk: int | None = None) -> Program:
    """Compiles the training step that `gptjax pretrain` or `gptjax finetune` runs with the config `cfg`.

    Args:
        cfg: config, in which cfg.model must be complete; for fine-tuning, cfg.model is the model config of the base
            model.
        chunk: number of tokens per chunk of the pretraining loss, or None for the default chunk size of the loss.

    Raises:
        UserError: the number of rows of a micro-batch is not divisible by mesh.data x mesh.fsdp, or a path pattern in
            the config matches no parameter.
    """
    rows, T = cfg.train.batch_size, width(cfg)
    if (rows // cfg.train.accumulation) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"train.batch_size / train.accumulation ({rows // cfg.train.accumulation} rows) must be divisible by "
            f"mesh.data x mesh.fsdp ({mesh.shape['data'] * mesh.shape['fsdp']}): use more rows or another mesh"
        )
    task = find(cfg.task)
    if cfg.task == "pretrain":
        tx, loss = make_optimizer(cfg.optim, cfg.train.max_steps), losses.next_token(cfg.model, chunk=chunk)
    else:
        tx, loss = trainable.optimizer(cfg), trainable.with_dropout(cfg, task.loss(cfg))
    tx = with_average(tx, cfg)
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
    arguments = {"params": state.params, "optimizer": state.opt_state, "frozen": state.frozen, "batch": batch}
    return _compiled(lowered, {name: bytes_per_chip(arrays) for name, arrays in arguments.items()}, started)


def width(cfg: Config) -> int:
    """Returns the number of tokens per row of a training batch."""
    return cfg.window if cfg.task == "pretrain" else tuning.longest_row(cfg, cfg.model)


def _state(
    cfg: Config, tx: optax.GradientTransformation
) -> tuple[Callable[[jax.Array], TrainState], Callable[[Any, Any], Any]]:
    """Returns the functions `create` and `combine` of a training task.

    The call `create(key)` returns the initial train state. The call `combine(trained, frozen)` merges the trained and
    the frozen parameters into the parameters of the whole model.
    """
    combine = [identity]

    def create(key: jax.Array) -> TrainState:
        params = init_params(key, cfg.model)
        if cfg.task == "pretrain":
            return TrainState.create(params, tx=tx, key=key)
        partitioned = trainable.partition(cfg, *trainable.split_heads(params), cfg.model, key)
        if cfg.task == "distill" and cfg.distill.top_k is None:
            partitioned = distill.with_teacher(partitioned, init_params(key, distill.teacher_config(cfg)))
        # `combine` captures no tracers, so that `combine` can be called after the tracing of `create`.
        combine[:] = [partitioned.combine]
        return TrainState.create(partitioned.params, tx=tx, key=key, frozen=partitioned.frozen)

    return create, lambda trained, frozen: combine[0](trained, frozen)


def decode_program(cfg: Config, mesh: Mesh, rows: int) -> Program:
    """Compiles the decode step, which generates one token for each of `rows` sequences.

    The KV cache has slots for the whole context length. The parameters and the KV cache have the dtype cfg.model.dtype.
    """
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
    arguments = {"params": params, "batch": tokens, "cache": cache}
    return _compiled(lowered, {name: bytes_per_chip(arrays) for name, arrays in arguments.items()}, started)


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def bytes_per_chip(abstract: Any) -> int:
    """Returns the bytes of HBM per chip that a pytree of sharded abstract arrays takes.

    PRNG keys and arrays in host memory are not counted.
    """
    leaves = [
        leaf
        for leaf in jax.tree.leaves(abstract)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) and leaf.sharding.memory_kind != "pinned_host"
    ]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _compiled(lowered: jax.stages.Lowered, argument_bytes: dict[str, int], started: float) -> Program:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, usable = out_of_memory(str(error), sum(argument_bytes.values()))
        if not needed:
            raise
        return Program(argument_bytes, None, needed, usable, time.monotonic() - started)
    memory: Any = compiled.memory_analysis()
    host_bytes = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    return Program(argument_bytes, compiled, peak_bytes(memory), 0, time.monotonic() - started, host_bytes)


def peak_bytes(memory: Any) -> int:
    """Returns the peak HBM of a compiled program in bytes, including the code of the program.

    Older versions of jax do not report the peak memory. With versions of jax that do not report the peak memory, the
    result is the sum of all allocations, which is an upper bound.

    The host memory that optim.offload uses is subtracted, because the peak that the compiler reports includes host
    memory.
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
    """Returns the (needed, usable) bytes in an out-of-memory message of the compiler, or (0, 0) for any other message.

    An out-of-memory message of the compiler contains either `Used 18.81G of 15.75G hbm` or `the total memory required
    for HLO temporaries (47.73G) exceeds available HBM (31.25G)`.

    The compiler's message about HLO temporaries does not count the arguments of the program. For a message about HLO
    temporaries, the needed bytes are the sum of the memory for temporaries and `lasting_bytes`, the size of the
    arguments.
    """
    total = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    temporaries = re.search(r"temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if (match := total or temporaries) is None:
        return 0, 0
    needed, usable = (
        int(float(text[:-1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[text[-1]]) for text in match.groups()
    )
    return needed + (0 if total else lasting_bytes), usable


def count(cfg: Config) -> int:
    """Returns the number of parameters of the model in `cfg`."""
    return tree.size(abstract_params(cfg.model))


def __getattr__(name: str) -> Any:
    """Returns the function of this module that formerly had the given name, with a DeprecationWarning."""
    return moved_name(__name__, name)
