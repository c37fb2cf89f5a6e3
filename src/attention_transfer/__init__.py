"""Attention transfer for Vision Transformers: a reproducible study."""

__version__ = "0.1.0"
