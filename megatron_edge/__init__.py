"""Quantisation-aware training with Megatron for small devices: one proven checkpoint out of any parallel layout."""

__version__ = "0.1.0"
