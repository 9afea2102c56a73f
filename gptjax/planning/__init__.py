"""Memory, FLOPs, traffic and step time of a run on a TPU slice, from the program compiled without a TPU."""
