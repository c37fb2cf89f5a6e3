"""The one training loop, checkpoints, and where it runs."""
