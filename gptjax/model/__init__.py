"""The decoder-only transformer: its parameters, and the functions that compute with them."""
