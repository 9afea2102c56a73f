"""Classes shared by the tensor file formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Stored(ABC):
    """Base class of tensor files in row-major order. Subclasses set `entries`, by tensor name, and define `_read`."""

    entries: Mapping[str, Any]  # objects with shape, offset and size_bytes

    @abstractmethod
    def _read(self, name: str, shape: Shape, offset: int) -> np.ndarray:
        """The values of a tensor of this shape, which begin at `offset` in the file."""

    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def array(self, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype. The file is read, not memory-mapped.

        Raises:
            UserError: the bytes cannot be read, or are not what the header says.
        """
        entry = self.entries[name]
        return self._read(name, entry.shape, entry.offset)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1 of a tensor."""
        entry = self.entries[name]
        shape = (stop - start, *entry.shape[1:])
        return self._read(name, shape, entry.offset + start * (entry.size_bytes // entry.shape[0]))


class Out(NamedTuple):
    """One tensor to write; `array()` computes its values lazily."""

    name: str
    shape: Shape
    array: Callable[[], np.ndarray]
