"""This package predicts the memory, FLOPs, memory traffic and step time of a run on a TPU slice.

The predictions are computed from the run's program, which is compiled ahead of time without a TPU.
"""
