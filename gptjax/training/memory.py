"""What a training step takes, by formula: before anything is compiled, and when it was too much."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gptjax.config import COMPUTED, Config, ModelConfig
from gptjax.types import UserError

GIB = 2**30
_AUTO_TOKENS = 2**19  # at most so many a step: a batch of GPT-3's size
_AUTO_ROWS = 8  # a device; where fewer fit, activations are computed again
_WORKSPACE_BYTES = 2**30  # logits of a chunk, their exponentials and gradients
_LESS = 0.75  # of the activations: a change that saves less is not worth a try
_MARGIN = 0.85  # of the device's memory that an estimate may fill


def memory_bytes(cfg: Config, n_params: int, vocab_size: int) -> dict[str, int]:
    """A rough account of a training step, within about a fifth of what XLA said for five configurations on a CPU.

    weights      4 bytes a parameter, and as much again for gradients and for updates
    optimizer    two float32 moments a parameter; Muon keeps one for the block matrices
    activations  what the backward pass needs of one micro-batch: about 12 D + 4 F numbers a token and block, and
                 T scores a head; with remat=dots the outputs of the products and with remat=full only D, with
                 remat=offload nothing, beside one whole block
    """
    model, rows = cfg.model, cfg.train.batch_size // cfg.train.accumulation
    matrices = max(0, n_params - (1 if model.tie_embeddings else 2) * vocab_size * model.d_model)
    moments = 2 * n_params - (matrices if cfg.optim.name == "muon" else 0)
    return {
        "weights, gradients and updates": 12 * n_params,
        "optimizer": 4 * moments,
        "activations": activation_bytes(model, rows, cfg.window),
    }


def activation_bytes(model: ModelConfig, rows: int, width: int) -> int:
    """What the backward pass needs of `rows` rows of `width` tokens."""
    whole = 12 * model.d_model + 4 * model.d_ff + 1.25 * model.n_head * width
    kept = {"none": whole, "dots": 6 * model.d_model + 2 * model.d_ff, "full": model.d_model, "offload": 0}[model.remat]
    a_token = model.n_layer * kept + 4 * model.d_model + (whole if model.remat != "none" else 0)
    return round((2 if model.dtype == "bfloat16" else 4) * rows * width * a_token)


def what_fits(cfg: Config, width: int, *, rows_a_device: int, lasting_bytes: int = 0, limit: int = 0) -> list[str]:
    """Of each setting that makes a step smaller the least change with which it should fit, as lines for a person.

    Args:
        width: tokens of a row. rows_a_device: of a micro-batch, on one device.
        lasting_bytes: of weights, optimizer and gradients on one device. limit: its memory; 0: not known, then every
            line halves the activations at least.
    """

    def bytes_of(rows: int, remat: str) -> int:
        return activation_bytes(dataclasses.replace(cfg.model, remat=remat), rows, width)

    now, out, n = bytes_of(rows_a_device, cfg.model.remat), [], 2
    room = _MARGIN * limit - lasting_bytes if limit else now / 2
    rows = cfg.train.batch_size // cfg.train.accumulation

    def fits(needed: int) -> bool:
        return needed <= room and needed <= _LESS * now

    while rows_a_device % n == 0 and not fits(bytes_of(rows_a_device // n, cfg.model.remat)):
        n *= 2
    if rows_a_device % n == 0 and rows % n == 0:
        accumulation, size = cfg.train.accumulation * n, cfg.train.batch_size // n
        out.append(f"train.accumulation={accumulation}: the same batch in parts of {rows // n} rows, as many steps")
        out.append(f"train.batch_size={size}: fewer rows a step")
    harder = {"none": ("dots", "full"), "dots": ("full",)}.get(cfg.model.remat, ())
    for remat in harder:
        if fits(bytes_of(rows_a_device, remat)):
            out.append(f"model.remat={remat}: activations are computed again in the backward pass")
            break
    return out


def fitted(cfg: Config) -> Config:
    """The config with train.batch_size as train.batch_size=auto means it: the most rows, a power of two times
    accumulation x data x fsdp, that fit the memory of this process's devices by estimate, up to 524,288 tokens a step.
    Where fewer than 8 rows a device fit, model.remat is dots, else full. What depends on the tokenizer's vocabulary
    counts as GPT-2's where it is not known yet.

    Raises:
        UserError: not one row fits; several processes, which must be told the same number.
    """
    import jax

    from gptjax import tree
    from gptjax.model.gpt import abstract_params
    from gptjax.parallel.mesh import sizes

    if cfg.distributed.coordinator is not None:
        raise UserError("train.batch_size=auto: expected a number where several processes share a run")
    model, width = _shape(cfg)
    data, fsdp, _, _ = sizes(cfg.mesh, jax.device_count())
    n_params = tree.size(abstract_params(model))
    a_weight = 16.0
    if cfg.task != "pretrain" and cfg.finetune.trainable == "lora":
        a_weight = {"none": 4.0, "int8": 1.0, "nf4": 0.52}[cfg.finetune.quantize]
    limit = device_bytes()
    room = _MARGIN * limit - a_weight * n_params / fsdp - min(_WORKSPACE_BYTES, limit // 8)
    unit = cfg.train.accumulation * data * fsdp
    most = 1
    while 2 * most * unit * width <= _AUTO_TOKENS:
        most *= 2

    def rows_that_fit(remat: str) -> int:
        """Of one device and micro-batch."""
        rows = most
        while rows and activation_bytes(dataclasses.replace(model, remat=remat), rows, width) > room:
            rows //= 2
        return rows

    kinds = {"none": ("none", "dots", "full"), "dots": ("dots", "full")}.get(model.remat, (model.remat,))
    found = {remat: rows_that_fit(remat) for remat in kinds}
    remat = next((kind for kind in kinds if found[kind] >= min(_AUTO_ROWS, most)), max(kinds, key=found.get))
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
    from gptjax import weights

    if cfg.task == "pretrain":
        from gptjax.training.loop import from_base

        cfg, _ = from_base(cfg)
        model = cfg.model
        return model if model.vocab_size else dataclasses.replace(model, vocab_size=50_257), cfg.window
    from gptjax.finetuning.base import longest_row

    found = weights.open_model(cfg.finetune.base).cfg
    model = dataclasses.replace(found, **{name: getattr(cfg.model, name) for name in COMPUTED})
    return model, longest_row(cfg, model)


def device_bytes() -> int:
    """Memory of one device; of a CPU half of what the machine, or the container, has, shared by its devices."""
    import jax

    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit", 0):
        return limit
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // 2 // jax.local_device_count()
