"""Checkpoints on disk: every layout that people have read, converted, written. No jax, either."""
