"""What a training step takes, by formula: before anything is compiled, and when it was too much."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gptjax.config import Config, ModelConfig

GIB = 2**30
Remat = Literal["none", "dots", "full", "offload"]
SMALLER_REMAT: dict[Remat, tuple[Remat, ...]] = {"none": ("dots", "full"), "dots": ("full",)}  # keep fewer activations
_LESS = 0.75  # of the activations: a change that saves less is not worth a try
MARGIN = 0.85  # of the device's memory that an estimate may fill
WORKSPACE_BYTES = 2**30  # logits of one chunk, their exponentials and gradients
_PROGRAM_BYTES = 2**28
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8  # bytes per trained parameter: all of them are float32, AdamW has two moments
_FROZEN = {"none": 4.0, "int8": 1.0, "nf4": 0.52}  # bytes per frozen parameter

Shape = tuple[int, int, int, int]  # sizes of the mesh: data, fsdp, tensor, context


def memory_bytes(cfg: Config, n_params: int, vocab_size: int) -> dict[str, int]:
    """A rough account of a training step, within about a fifth of what XLA said for five configurations on a CPU.

    weights      4 bytes per parameter, and as much again for gradients and for updates
    optimizer    two float32 moments per parameter; Muon keeps one for the block matrices
    activations  see `activation_elements`, of one micro-batch
    """
    model, rows = cfg.model, cfg.train.batch_size // cfg.train.accumulation
    matrices = max(0, n_params - (1 if model.tie_embeddings else 2) * vocab_size * model.d_model)
    return {
        "weights, gradients and updates": (_WEIGHT + 2 * _GRADIENT) * n_params,
        "optimizer": _MOMENTS * n_params - (_MOMENTS // 2 * matrices if cfg.optim.name == "muon" else 0),
        "activations": activation_bytes(model, rows, cfg.window),
    }


def chip_bytes(cfg: Config, n_params: int, width: int, shape: Shape) -> float:
    """Of one chip of a mesh, with attention kernels. Within about a fifth of the TPU compiler's own figure, where all
    weights are trained by AdamW.

    state        `param_bytes`, over fsdp x tensor
    head         its matrix whole in bfloat16, its gradient whole in float32, twice while it is summed over chips
    activations  see `activation_elements`, and the gathered weights of one layer

    Args:
        width: tokens of a row.
    """
    model, (data, fsdp, tensor, context) = cfg.model, shape
    tokens = cfg.train.batch_size // cfg.train.accumulation * width / (data * fsdp * context)
    state = param_bytes(cfg, accumulation=cfg.train.accumulation) * n_params / (fsdp * tensor)
    head = (10 if data * fsdp * tensor > 1 else 6) * model.d_model * model.vocab_size
    layer = 2 * 2 * 12 * model.d_model**2 / tensor  # gathered weights, one layer ahead
    elements = activation_elements(model, width, tensor=tensor, scores=False)
    return state + head + (itemsize(model) * tokens * elements + layer) + WORKSPACE_BYTES + _PROGRAM_BYTES


def param_bytes(cfg: Config, *, accumulation: int = 1) -> float:
    """Bytes per parameter: weight, gradient and AdamW's two moments, and the gradients' sum where micro-batches are
    added up; of LoRA's frozen base the weight alone, as it is quantised."""
    if cfg.task != "pretrain" and cfg.finetune.trainable == "lora":
        return _FROZEN[cfg.finetune.quantize]
    return _WEIGHT + _GRADIENT + _MOMENTS + (_GRADIENT if accumulation > 1 else 0)


def activation_bytes(model: ModelConfig, rows: int, width: int) -> int:
    """What the backward pass needs of `rows` rows of `width` tokens, where attention keeps its scores."""
    return round(itemsize(model) * rows * width * activation_elements(model, width))


def activation_elements(model: ModelConfig, width: int, *, tensor: int = 1, scores: bool = True) -> float:
    """Activations that the backward pass needs of one token, in elements: what every block keeps, and a workspace.

    none     the residual stream twice, and a block's heads and neurons
    dots     the residual stream twice, and the outputs of the matrix products
    full     the block's input
    offload  nothing

    Args:
        width: tokens of a row. tensor: tensor-parallel size, which divides heads and neurons.
        scores: attention keeps a score for each pair of tokens and head, and what else XLA keeps on a CPU (12 D + 4 F);
            False: by a kernel, which keeps none, as compiled for TPUs.
    """
    D, F = model.d_model, model.d_ff
    if scores:
        whole, dots = (10 * D + 4 * F + 1.25 * model.n_head * width) / tensor, (4 * D + 2 * F) / tensor
        workspace, stream = (0.0, 4 * D) if model.remat == "none" else (2 * D + whole, 4 * D)
    else:
        projected = (model.n_head + 2 * model.n_kv_head) * model.head_dim
        whole = block_elements(model) / tensor
        dots = (projected + 2 * D + (2 if model.gated else 1) * F) / tensor
        workspace, stream = 2 * whole, 6 * D
    kept = {"none": 2 * D + whole, "dots": 2 * D + dots, "full": D, "offload": 0}[model.remat]
    return model.n_layer * kept + workspace + stream


def block_elements(model: ModelConfig) -> int:
    """Of one token and block, what tensor parallelism divides: queries, keys, values and neurons, before and after."""
    projected = (model.n_head + 2 * model.n_kv_head) * model.head_dim
    return 4 * model.d_model + 2 * projected + (4 if model.gated else 3) * model.d_ff


def itemsize(model: ModelConfig) -> int:
    """Bytes per activation."""
    return 2 if model.dtype == "bfloat16" else 4


def what_fits(cfg: Config, width: int, *, rows_a_device: int, lasting_bytes: int = 0, limit: int = 0) -> list[str]:
    """Of each setting that makes a step smaller the least change with which it should fit, as lines for a person.

    Args:
        width: tokens of a row. rows_a_device: of a micro-batch, on one device.
        lasting_bytes: of weights, optimizer and gradients on one device. limit: its memory; 0: not known, then every
            line halves the activations at least.
    """

    def bytes_of(rows: int, remat: Remat) -> int:
        return activation_bytes(dataclasses.replace(cfg.model, remat=remat), rows, width)

    now, out, n = bytes_of(rows_a_device, cfg.model.remat), [], 2
    room = MARGIN * limit - lasting_bytes if limit else now / 2
    rows = cfg.train.batch_size // cfg.train.accumulation

    def fits(needed: int) -> bool:
        return needed <= room and needed <= _LESS * now

    while rows_a_device % n == 0 and not fits(bytes_of(rows_a_device // n, cfg.model.remat)):
        n *= 2
    if rows_a_device % n == 0 and rows % n == 0:
        accumulation, size = cfg.train.accumulation * n, cfg.train.batch_size // n
        out.append(f"train.accumulation={accumulation}: the same batch in parts of {rows // n} rows, as many steps")
        out.append(f"train.batch_size={size}: fewer rows a step")
    for remat in SMALLER_REMAT.get(cfg.model.remat, ()):
        if fits(bytes_of(rows_a_device, remat)):
            out.append(f"model.remat={remat}: activations are computed again in the backward pass")
            break
    return out
