"""The decoder: parameters, and the functions that read them."""
