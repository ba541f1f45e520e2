"""From text on disk to micro-batches: prepare a corpus, and read it in a fixed order.

prepare/ (text -> token files and their card) | read/ (dataset -> order -> batches).
The order of samples depends on seed and data fingerprint only.
"""
