"""Transforms for notebooks: pure functions that compose with what the rest of the package gives."""
