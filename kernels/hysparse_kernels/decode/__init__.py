"""Kernels for one new token a row, from a cache."""
