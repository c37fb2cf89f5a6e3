"""The larger commands of `python -m attention_transfer`, one a file."""
