"""Attention transfer: losses, one file per method, where the teacher's attention comes from."""
