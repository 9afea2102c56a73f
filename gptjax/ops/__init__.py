"""This package implements the mathematical operations of the model as plain functions of arrays."""
