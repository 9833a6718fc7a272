"""Checkpoints in transformers' format, written and read by all ranks, one tensor at a time."""
