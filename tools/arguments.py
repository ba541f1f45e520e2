"""Types of command-line options that several tools take."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1. Raises argparse.ArgumentTypeError."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text}; allowed a whole number from 1")
    return int(text)
