"""This package implements the decoder-only transformer: the parameters, the forward pass and the KV cache."""
