"""This module implements `train.batch_size=auto`, the largest batch size that is estimated to fit in device memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax

from gptjax import tree, weights
from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import abstract_params
from gptjax.parallel.mesh import sizes
from gptjax.tasks.pretrain import from_base
from gptjax.tasks.tuning import longest_row
from gptjax.training.memory import GIB, MARGIN, SMALLER_REMAT, WORKSPACE_BYTES, Remat, activation_bytes, param_bytes

# _MOST_TOKENS is the maximum number of tokens per step, which is the batch size of GPT-3 125M (arXiv:2005.14165, table
# 2.1). If fewer than _FEW_ROWS rows per device and micro-batch fit in memory, activations are rematerialised.
_MOST_TOKENS = 2**19
_FEW_ROWS = 8


def fitted(cfg: Config) -> Config:
    """Returns the config with the largest train.batch_size that is estimated to fit in the memory of the local devices.

    The batch size is train.accumulation x data x fsdp x n, where n is the number of rows per device and micro-batch.
    The number of rows per device and micro-batch is a power of two, and is larger than 1 only if a training step of
    this batch size has at most 524,288 tokens. If fewer than 8 rows per device and micro-batch fit in memory,
    model.remat is set to dots, or to full if dots does not save enough memory. If the vocabulary size of the tokenizer
    is not known yet, the vocabulary size of GPT-2 is assumed.

    Raises:
        UserError: a single row does not fit in memory, or the run has several processes, which must all use the same
            batch size.
    """
    if cfg.distributed.coordinator is not None:
        raise UserError("train.batch_size=auto: expected a number if several processes share a run")
    model, width = _shape(cfg)
    data, fsdp, _, _ = sizes(cfg.mesh, jax.device_count())
    n_params = tree.size(abstract_params(model))
    limit = device_bytes()
    free_bytes = MARGIN * limit - param_bytes(cfg) * n_params / fsdp - min(WORKSPACE_BYTES, limit // 8)
    unit = cfg.train.accumulation * data * fsdp
    most = 1
    while 2 * most * unit * width <= _MOST_TOKENS:
        most *= 2

    def rows_that_fit(remat: Remat) -> int:
        """Returns the largest power of two of rows per device and micro-batch whose activations fit in the free
        memory."""
        rows = most
        while rows and activation_bytes(dataclasses.replace(model, remat=remat), rows, width) > free_bytes:
            rows //= 2
        return rows

    policies = (model.remat, *SMALLER_REMAT.get(model.remat, ()))
    rows = {remat: rows_that_fit(remat) for remat in policies}
    remat = next(
        (policy for policy in policies if rows[policy] >= min(_FEW_ROWS, most)),
        max(policies, key=lambda policy: rows[policy]),
    )
    if not rows[remat]:
        raise UserError(
            f"train.batch_size=auto: not even one row of {width} tokens of a model of {n_params:,} parameters fits "
            f"{limit / GIB:.1f} GiB by estimate; use a smaller model, an adapter, or more devices (mesh.fsdp)"
        )
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, remat=remat),
        train=dataclasses.replace(cfg.train, batch_size=rows[remat] * unit),
    )  # fmt: skip


def _shape(cfg: Config) -> tuple[ModelConfig, int]:
    """Returns the config of the model that the run trains, and the number of tokens per row."""
    if cfg.task == "pretrain":
        cfg, _ = from_base(cfg)
        model = cfg.model
        return model if model.vocab_size else dataclasses.replace(model, vocab_size=50_257), cfg.window
    base_cfg = weights.open_model(cfg.finetune.base).cfg
    model = base_cfg.computed_as(cfg.model)
    return model, longest_row(cfg, model)


def device_bytes() -> int:
    """Returns the memory of one local device in bytes.

    On a CPU, half the memory of the machine or container is divided equally among the devices.
    """
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit", 0):
        return limit
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // 2 // jax.local_device_count()
