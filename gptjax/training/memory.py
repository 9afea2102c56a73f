"""Formulas that estimate the device memory of a training step, for `gptjax plan` and for out-of-memory errors."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gptjax.config import Config, ModelConfig

GIB = 2**30
Remat = Literal["none", "dots", "full", "offload"]
# SMALLER_REMAT maps each value of model.remat to the values of model.remat that keep fewer activations.
SMALLER_REMAT: dict[Remat, tuple[Remat, ...]] = {"none": ("dots", "full"), "dots": ("full",)}
# To save memory, a change of the config is proposed only if it shrinks the activations to at most _MAX_SHARE of their
# size.
_MAX_SHARE = 0.75
# The estimated memory of a training step may fill at most the fraction MARGIN of the device's memory.
MARGIN = 0.85
# The loss is computed in chunks of tokens. WORKSPACE_BYTES is the memory for the logits of one chunk of tokens, the
# exponentials of these logits and their gradients.
WORKSPACE_BYTES = 2**30
_PROGRAM_BYTES = 2**28
# The numbers of bytes per trained parameter of the weight, the gradient and AdamW's two moments, all in float32.
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8
# The number of bytes per frozen parameter for each value of finetune.quantize.
_FROZEN = {"none": 4.0, "int8": 1.0, "nf4": 0.52}

# The sizes of the mesh axes data, fsdp, tensor and context.
Shape = tuple[int, int, int, int]


def memory_bytes(cfg: Config, n_params: int, vocab_size: int) -> dict[str, int]:
    """Returns a rough estimate of the memory of a training step in bytes, by category.

    For five configurations on a CPU, the memory estimate differed by at most about 20 % from the memory that XLA
    reports.

    Returns:
        A dict with three categories:
            weights, gradients and updates: 4 bytes per parameter each.
            optimizer: two float32 moments per parameter, or one moment with Muon for parameters in matrices of the
                blocks; the average of the parameters, if train.ema or train.average_last is set.
            activations: the activations of one micro-batch, as estimated by `activation_elements`.
    """
    model, rows = cfg.model, cfg.train.batch_size // cfg.train.accumulation
    matrices = max(0, n_params - (1 if model.tie_embeddings else 2) * vocab_size * model.d_model)
    return {
        "weights, gradients and updates": (_WEIGHT + 2 * _GRADIENT) * n_params,
        "optimizer": (_MOMENTS + _average(cfg)) * n_params
        - (_MOMENTS // 2 * matrices if cfg.optim.name == "muon" else 0),
        "activations": activation_bytes(model, rows, cfg.window),
    }


def chip_bytes(cfg: Config, n_params: int, width: int, shape: Shape) -> float:
    """Estimates the memory of a training step on one chip of a device mesh, in bytes.

    Attention is assumed to run in a fused kernel. If AdamW trains all weights, the memory estimate differs by at most
    about 20 % from the memory that the TPU compiler reports. The memory estimate is the sum of the following terms:

        state        `param_bytes` per parameter, divided by fsdp x tensor
        head         the LM head's matrix in bfloat16 and its gradient in float32, both unsharded; on several chips, two
                     copies of the gradient, because the gradient is summed over the chips
        activations  the elements counted by `activation_elements`, plus the all-gathered weights of two layers
        constants    WORKSPACE_BYTES and _PROGRAM_BYTES

    Args:
        width: number of tokens per row.
    """
    model, (data, fsdp, tensor, context) = cfg.model, shape
    tokens = cfg.train.batch_size // cfg.train.accumulation * width / (data * fsdp * context)
    state = param_bytes(cfg, accumulation=cfg.train.accumulation) * n_params / (fsdp * tensor)
    head = (10 if data * fsdp * tensor > 1 else 6) * model.d_model * model.vocab_size
    # The number of bytes of the all-gathered weights of two successive layers.
    layer = 2 * 2 * 12 * model.d_model**2 / tensor
    elements = activation_elements(model, width, tensor=tensor, scores=False)
    return state + head + (itemsize(model) * tokens * elements + layer) + WORKSPACE_BYTES + _PROGRAM_BYTES


def param_bytes(cfg: Config, *, accumulation: int = 1) -> float:
    """Returns the number of bytes of training state per parameter.

    The training state of a parameter is the weight, the gradient, AdamW's two moments, the average of the weights if
    train.ema or train.average_last is set, and the sum of the gradients if gradients are accumulated. With LoRA, the
    function returns the number of bytes per frozen weight, which depends on finetune.quantize, and neglects the
    adapter.
    """
    if cfg.task != "pretrain" and cfg.finetune.trainable == "lora":
        return _FROZEN[cfg.finetune.quantize]
    return _WEIGHT + _GRADIENT + _MOMENTS + _average(cfg) + (_GRADIENT if accumulation > 1 else 0)


def _average(cfg: Config) -> int:
    return _WEIGHT if cfg.train.ema or cfg.train.average_last else 0


def activation_bytes(model: ModelConfig, rows: int, width: int) -> int:
    """Returns the size in bytes of the activations that the backward pass needs for `rows` rows of `width` tokens.

    Attention is assumed to run without a fused kernel, so that the attention scores are kept for the backward pass.
    """
    return round(itemsize(model) * rows * width * activation_elements(model, width))


def activation_elements(model: ModelConfig, width: int, *, tensor: int = 1, scores: bool = True) -> float:
    """Returns the number of activation elements per token that the backward pass needs.

    The function counts the activations that all blocks keep, and temporary activations, such as the activations of the
    block whose backward pass is running. The setting `model.remat` selects the activations of a block that are kept on
    the device:

        none     two activations of the residual stream, and all activations of the attention and feed-forward layers
        dots     two activations of the residual stream, and the outputs of the matrix multiplications
        full     the block's input
        offload  no activations, because the block's input is kept in host memory

    Args:
        width: number of tokens per row.
        tensor: tensor-parallel size, by which the activations of attention and feed-forward layers are sharded.
        scores: whether attention scores are kept for the backward pass. True: attention runs without a fused kernel, as
            on a CPU, so that one score is kept per head and pair of tokens; without rematerialisation, XLA also keeps
            12 d_model + 4 d_ff elements per token and block. False: attention runs with a fused kernel, as on TPUs, so
            that no scores are kept.
    """
    D, F = model.d_model, model.d_ff
    if scores:
        block, dots = (10 * D + 4 * F + 1.25 * model.n_head * width) / tensor, (4 * D + 2 * F) / tensor
        workspace, stream = (0.0, 4 * D) if model.remat == "none" else (2 * D + block, 4 * D)
    else:
        projected = (model.n_head + 2 * model.n_kv_head) * model.head_dim
        block = block_elements(model) / tensor
        dots = (projected + 2 * D + (2 if model.gated else 1) * F) / tensor
        workspace, stream = 2 * block, 6 * D
    kept = {"none": 2 * D + block, "dots": 2 * D + dots, "full": D, "offload": 0}[model.remat]
    return model.n_layer * kept + workspace + stream


def block_elements(model: ModelConfig) -> int:
    """Returns the number of activation elements per token and block that tensor parallelism shards.

    The following activations are kept for the backward pass and sharded: two copies of the queries, keys and values,
    three copies of the hidden units of the feed-forward layer (four copies if the layer is gated), and 4 x d_model
    further elements.
    """
    projected = (model.n_head + 2 * model.n_kv_head) * model.head_dim
    return 4 * model.d_model + 2 * projected + (4 if model.gated else 3) * model.d_ff


def itemsize(model: ModelConfig) -> int:
    """Returns the number of bytes per element of the model's activations."""
    return 2 if model.dtype == "bfloat16" else 4


def what_fits(cfg: Config, width: int, *, rows_per_device: int, lasting_bytes: int = 0, limit: int = 0) -> list[str]:
    """Returns a list of changes of the config, each of which should make a training step fit into device memory.

    Args:
        width: number of tokens per row.
        rows_per_device: number of rows of a micro-batch on one device.
        lasting_bytes: bytes of weights, gradients and optimizer state on one device.
        limit: memory of the device in bytes. 0: the memory is unknown, and each change at least halves the
            activations.

    Returns:
        Lines such as "model.remat=dots: ..", with the smallest sufficient change of each setting.
    """

    def bytes_with(rows: int, remat: Remat) -> int:
        return activation_bytes(dataclasses.replace(cfg.model, remat=remat), rows, width)

    now, out, n = bytes_with(rows_per_device, cfg.model.remat), [], 2
    available = MARGIN * limit - lasting_bytes if limit else now / 2
    rows = cfg.train.batch_size // cfg.train.accumulation

    def fits(needed: int) -> bool:
        return needed <= available and needed <= _MAX_SHARE * now

    while rows_per_device % n == 0 and not fits(bytes_with(rows_per_device // n, cfg.model.remat)):
        n *= 2
    if rows_per_device % n == 0 and rows % n == 0:
        accumulation, size = cfg.train.accumulation * n, cfg.train.batch_size // n
        out.append(f"train.accumulation={accumulation}: the same batch in micro-batches of {rows // n} rows")
        out.append(f"train.batch_size={size}: fewer rows per step")
    for remat in SMALLER_REMAT.get(cfg.model.remat, ()):
        if fits(bytes_with(rows_per_device, remat)):
            out.append(f"model.remat={remat}: recompute activations in the backward pass")
            break
    return out
