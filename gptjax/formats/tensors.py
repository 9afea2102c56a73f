"""What the formats of tensors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Stored(ABC):
    """A source whose tensors lie in a file row after row. A kind has `entries`, by name, and adds `_read`."""

    entries: Mapping[str, Any]  # with shape, offset and size_bytes

    @abstractmethod
    def _read(self, name: str, shape: Shape, offset: int) -> np.ndarray:
        """The values of a tensor of this shape, which begin at `offset` in the file."""

    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def array(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype; pages are not mapped, so that they do not count as memory.

        Raises:
            UserError: its bytes cannot be read, or are not those that were promised.
        """
        entry = self.entries[name]
        return self._read(name, entry.shape, entry.offset)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some of a tensor's rows."""
        entry = self.entries[name]
        shape = (stop - start, *entry.shape[1:])
        return self._read(name, shape, entry.offset + start * (entry.size_bytes // entry.shape[0]))


class Out(NamedTuple):
    """One tensor to write: `array()` makes it when its turn comes."""

    name: str
    shape: Shape
    array: Callable[[], np.ndarray]
