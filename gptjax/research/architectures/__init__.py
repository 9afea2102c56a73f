"""Architectures to study, apart from the model: each one file, each four pure functions with the same arguments.

    params   = init(key, cfg)                  nested dict, paths such as "q/kernel"
    y        = apply(params, x, cfg)           x, y [B, T, D]; no place reads a later one
    cache    = init_cache(cfg, batch, length)  of an empty past
    y, cache = extend(params, x, cfg, cache)   the next T places; apply = extend, however x is cut into pieces

    attention        multi-head, grouped-query and multi-query attention
    sliding_window   the same over the last few tokens, which are all that is kept
    mla              multi-head latent attention: one short vector a token is kept
    moe              a mixture of experts in the place of the feed-forward layer
    deltanet         gated DeltaNet: a matrix a head is kept, whatever the length
    costs            bytes, parameters and FLOPs of all of them by formula

All rows of a batch have the same length; for rows that differ `jax.vmap` over them. The trees are plain, so that
`jax.grad`, `vmap`, an optimizer or `gptjax.lora` (targets="*/kernel") take them as they take the model's.
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
