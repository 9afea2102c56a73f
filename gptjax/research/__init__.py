"""Research tools for notebooks: composable pure functions.

The submodules of `gptjax.research` are imported lazily, on first access.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gptjax.research' has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"gptjax.research.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
