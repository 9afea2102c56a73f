"""What a run would take on a TPU slice that is not here: memory, work, traffic and time, from the compiled program."""
