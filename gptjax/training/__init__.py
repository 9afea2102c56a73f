"""The training step, the training loop and the run directory."""
