"""Plans of runs on a TPU slice: memory, FLOPs, traffic and step time, from a program that is compiled without a TPU."""
