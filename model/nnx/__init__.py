"""The nnx twins."""
