"""The mathematics of the model as plain functions of arrays."""
