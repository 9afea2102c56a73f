"""Classes that are shared by the readers and writers of tensor files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Stored(ABC):
    """Base class for file formats that store tensors in row-major order.

    Subclasses of `Stored` set the attribute `entries` and define the method `_read`.
    """

    # `entries` maps the name of each tensor to an object with the attributes shape, offset and size_bytes.
    entries: Mapping[str, Any]

    @abstractmethod
    def _read(self, name: str, shape: Shape, offset: int) -> np.ndarray:
        """Reads values of the tensor `name`, beginning at byte `offset` of the file, and returns an array of the given
        shape."""

    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def array(self, name: str) -> np.ndarray:
        """Read one tensor, and return an array with the dtype in the file. The tensor is read into memory; the file is
        not memory-mapped.

        Raises:
            UserError: the tensor's bytes cannot be read, or the file was changed or damaged.
        """
        entry = self.entries[name]
        return self._read(name, entry.shape, entry.offset)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads the rows start .. stop - 1 of a tensor, along its first axis."""
        entry = self.entries[name]
        shape = (stop - start, *entry.shape[1:])
        return self._read(name, shape, entry.offset + start * (entry.size_bytes // entry.shape[0]))


class Out(NamedTuple):
    """A tensor to be written to a file. The function `array` computes the values of the tensor, and is called only when
    the tensor is written."""

    name: str
    shape: Shape
    array: Callable[[], np.ndarray]
