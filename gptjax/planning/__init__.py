"""This package predicts the memory, FLOPs, memory traffic and step time of a run on a TPU slice.

The memory, FLOPs, memory traffic and step time are computed from the program of the run, which is compiled ahead of
time without a TPU.
"""
