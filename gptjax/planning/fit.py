"""`train.batch_size=auto`: the rows that fit the memory of the devices that are here, by the formula of a step."""

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

_MOST_TOKENS = 2**19  # a step: a batch of GPT-3's size
_FEW_ROWS = 8  # a device; where not so many fit, activations are computed again


def fitted(cfg: Config) -> Config:
    """The config with train.batch_size as train.batch_size=auto means it: the most rows, a power of two times
    accumulation x data x fsdp, that fit the memory of this process's devices by estimate, up to 524,288 tokens a step.
    Where fewer than 8 rows a device fit, model.remat is dots, else full. What depends on the tokenizer's vocabulary
    counts as GPT-2's where it is not known yet.

    Raises:
        UserError: not one row fits; several processes, which must be told the same number.
    """
    if cfg.distributed.coordinator is not None:
        raise UserError("train.batch_size=auto: expected a number where several processes share a run")
    model, width = _shape(cfg)
    data, fsdp, _, _ = sizes(cfg.mesh, jax.device_count())
    n_params = tree.size(abstract_params(model))
    limit = device_bytes()
    room = MARGIN * limit - param_bytes(cfg) * n_params / fsdp - min(WORKSPACE_BYTES, limit // 8)
    unit = cfg.train.accumulation * data * fsdp
    most = 1
    while 2 * most * unit * width <= _MOST_TOKENS:
        most *= 2

    def rows_that_fit(remat: Remat) -> int:
        """Of one device and micro-batch."""
        rows = most
        while rows and activation_bytes(dataclasses.replace(model, remat=remat), rows, width) > room:
            rows //= 2
        return rows

    kinds = (model.remat, *SMALLER_REMAT.get(model.remat, ()))
    found = {remat: rows_that_fit(remat) for remat in kinds}
    remat = next(
        (kind for kind in kinds if found[kind] >= min(_FEW_ROWS, most)), max(kinds, key=lambda kind: found[kind])
    )
    if not found[remat]:
        raise UserError(
            f"train.batch_size=auto: not one row of {width} tokens of a model of {n_params:,} parameters fits "
            f"{limit / GIB:.1f} GiB by estimate; take a smaller model, an adapter, or more devices (mesh.fsdp)"
        )
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, remat=remat),
        train=dataclasses.replace(cfg.train, batch_size=found[remat] * unit),
    )  # fmt: skip


def _shape(cfg: Config) -> tuple[ModelConfig, int]:
    """The model that will be trained, and the tokens of its rows."""
    if cfg.task == "pretrain":
        cfg, _ = from_base(cfg)
        model = cfg.model
        return model if model.vocab_size else dataclasses.replace(model, vocab_size=50_257), cfg.window
    found = weights.open_model(cfg.finetune.base).cfg
    model = found.computed_as(cfg.model)
    return model, longest_row(cfg, model)


def device_bytes() -> int:
    """Memory of one device; of a CPU half of what the machine, or the container, has, shared by its devices."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit", 0):
        return limit
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // 2 // jax.local_device_count()
