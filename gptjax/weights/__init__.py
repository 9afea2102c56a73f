"""Parameters in and out of files."""

from gptjax.weights.native import load, save

__all__ = ["load", "save"]
