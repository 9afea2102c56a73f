"""Transforms for notebooks: pure functions over parameters, losses and batches."""
