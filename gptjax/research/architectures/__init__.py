"""Layer architectures for study, independent of the model: one file each, with the same four pure functions.

    params   = init(key, cfg)                  nested dict, paths such as "q/kernel"
    y        = apply(params, x, cfg)           x, y [B, T, D]; causal
    cache    = init_cache(cfg, batch, length)  an empty cache
    y, cache = extend(params, x, cfg, cache)   the next T tokens; equals apply, however x is split into chunks

    attention        multi-head, grouped-query and multi-query attention
    sliding_window   attention over the last few tokens, with a cache of that size
    mla              multi-head latent attention: caches one low-rank latent vector per token
    moe              mixture of experts in place of the feed-forward layer
    deltanet         gated DeltaNet: caches one matrix per head, independent of the length
    costs            cache bytes, parameters and FLOPs of all of them, by formula

All rows of a batch have the same length; for rows of different lengths, `jax.vmap` over them. Params are plain nested
dicts, so `jax.grad`, `vmap`, optimizers and `gptjax.lora` (targets="*/kernel") work as with the model's.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
