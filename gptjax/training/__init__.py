"""Modules for the training step, the training loop and the run directory."""
