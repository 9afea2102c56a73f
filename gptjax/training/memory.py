"""What a training step takes, by formula: before anything is compiled, and when it was too much."""

from __future__ import annotations

import dataclasses

from gptjax.config import Config, ModelConfig

GIB = 2**30
SMALLER_REMAT = {"none": ("dots", "full"), "dots": ("full",)}  # policies that keep fewer activations
_LESS = 0.75  # of the activations: a change that saves less is not worth a try
MARGIN = 0.85  # of the device's memory that an estimate may fill


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
