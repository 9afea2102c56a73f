"""gptjax: trains, fine-tunes, evaluates and runs language models, with pure functions in JAX.

Public names are imported on first use, so that `import gptjax` is fast.

    cfg = gptjax.load_config("shakespeare-char", "optim.lr=3e-4")
    result = gptjax.train(cfg)
    params, model = gptjax.load(result.run_dir)
    logits = gptjax.forward(params, tokens, model)
"""

from __future__ import annotations

import importlib
from typing import Any

from gptjax import _moved

# Maps each public name to the module that defines this name, or to "" if the name is a submodule of gptjax.
_HOMES: dict[str, str] = {
    "load": "gptjax.weights",
    "save": "gptjax.weights",
    "load_config": "gptjax.config",
    "Config": "gptjax.config",
    "ModelConfig": "gptjax.config",
    "TokenizerConfig": "gptjax.config",
    "DataConfig": "gptjax.config",
    "OptimConfig": "gptjax.config",
    "TrainConfig": "gptjax.config",
    "SampleConfig": "gptjax.config",
    "train": "gptjax.tasks",
    "finetune": "gptjax.tasks",
    "TrainState": "gptjax.training.step",
    "make_train_step": "gptjax.training.step",
    "init_params": "gptjax.model.gpt",
    "abstract_params": "gptjax.model.gpt",
    "forward": "gptjax.model.gpt",
    "backbone": "gptjax.model.gpt",
    "extend": "gptjax.model.gpt",
    "tapped": "gptjax.model.gpt",
    "extend_tapped": "gptjax.model.gpt",
    "grow_vocabulary": "gptjax.model.gpt",
    "generate": "gptjax.generation",
    "plan": "gptjax.planning.plan",
    "quantize": "gptjax.ops.quant",
    "dequantize": "gptjax.ops.quant",
    "UserError": "gptjax.errors",
    "LoraConfig": "gptjax.config",
    "MeshConfig": "gptjax.config",
    "lora": "",
    "losses": "",
    "parallel": "",
    "research": "",
    "generation": "",
    "weights": "",
    "tasks": "",
    "tokenizers": "",
    "assets": "",
    "data": "",
    "types": "",
    "presets": "gptjax.config",
}

__all__ = list(_HOMES)
_moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    home = _HOMES[name]
    value = getattr(importlib.import_module(home), name) if home else importlib.import_module(f"gptjax.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *_HOMES})
