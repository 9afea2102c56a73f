"""What a training step takes, by formula: before anything is compiled."""

from __future__ import annotations

from gptjax.config import Config


def memory_bytes(cfg: Config, n_params: int, vocab_size: int) -> dict[str, int]:
    """A rough account of a training step, within about a fifth of what XLA said for five configurations on a CPU.

    weights      4 bytes a parameter, and as much again for gradients and for updates
    optimizer    two float32 moments a parameter; Muon keeps one for the block matrices
    activations  what the backward pass needs of one micro-batch: about 12 D + 4 F numbers a token and block, and
                 T scores a head; with remat=dots the outputs of the products and with remat=full only D, with
                 remat=offload nothing, beside one whole block
    """
    model, rows = cfg.model, cfg.train.batch_size // cfg.train.accumulation
    whole = 12 * model.d_model + 4 * model.d_ff + 1.25 * model.n_head * cfg.window
    kept = {"none": whole, "dots": 6 * model.d_model + 2 * model.d_ff, "full": model.d_model, "offload": 0}[model.remat]
    a_token = model.n_layer * kept + 4 * model.d_model + (whole if model.remat != "none" else 0)
    matrices = max(0, n_params - (1 if model.tie_embeddings else 2) * vocab_size * model.d_model)
    moments = 2 * n_params - (matrices if cfg.optim.name == "muon" else 0)
    return {
        "weights, gradients and updates": 12 * n_params,
        "optimizer": 4 * moments,
        "activations": round((2 if model.dtype == "bfloat16" else 4) * rows * cfg.window * a_token),
    }
