"""Attention, recurrent and mixture-of-experts layers for experiments; the layers do not depend on `gptjax.model`.

Each architecture is a module that defines four functions, `init`, `apply`, `init_cache` and `extend`:

    params   = init(key, cfg)                  nested dict, paths such as "q/kernel"
    y        = apply(params, x, cfg)           x and y [B, T, D]; causal
    cache    = init_cache(cfg, batch, length)  an empty cache
    y, cache = extend(params, x, cfg, cache)   y for x [B, T, D], the next T tokens of the sequence

    attention        multi-head, grouped-query and multi-query attention
    sliding_window   attention over the last `window` tokens, with a cache of window - 1 slots
    mla              multi-head latent attention: caches one low-rank latent vector per token
    moe              mixture of experts in place of the feed-forward layer
    deltanet         gated DeltaNet: caches one matrix per head, whose size does not depend on the sequence length
    costs            formulas for cache bytes, numbers of parameters and FLOPs; no architecture

The functions are pure. A sequence of inputs may be split anywhere: calls of a layer's function `extend` on consecutive
parts of the sequence return the same outputs as one call of the layer's function `apply` on the whole sequence. All
rows of a batch have the same length; for rows of different lengths, use `jax.vmap` over the rows. The params of a layer
are a plain nested dict, so `jax.grad`, `jax.vmap`, optax optimizers and `gptjax.lora` (targets="*/kernel") accept the
params.
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
