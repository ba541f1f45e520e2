"""Portable kernels in Triton. Inside, `import triton` is the library: imports are absolute."""
