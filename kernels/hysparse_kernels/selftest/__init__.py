"""Checks of this machine: `python -m hysparse_kernels.selftest`."""
