"""The ladder: one model at four stages between Linen and nnx, and the keys that they draw."""
