"""Names of version 0.1 that are in `gptjax.losses` now; they go with the next release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.model.gpt import init_params


class OldTask(NamedTuple):
    """What `gptjax.tasks.pretrain.task(cfg)` and its like returned."""

    prepare: Callable[[Any], Any]
    init: Callable[[Any], Any]
    loss: Callable[..., Any]


def old_name(module: str, name: str, moved: Mapping[str, Callable]) -> Any:
    """The function that `name` of `module` is now, with a DeprecationWarning; of `task` one that gives an `OldTask`."""
    if name not in moved:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = moved[name]
    text = f"{module}.{name} is now gptjax.losses.{new.__name__}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    if name != "task":
        return new

    def task(cfg: Any, *args: Any, **options: Any) -> OldTask:
        return OldTask(lambda batch: batch, lambda key: init_params(key, cfg), new(cfg, *args, **options))

    return task
